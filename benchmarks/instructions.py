"""User instructions per close: lingerx against the Python idiom, where the clock is too noisy to tell.

    python benchmarks/instructions.py [--calls 500] [--runs 5] [--counter perf|valgrind] [--json]

Counts a whole process (this script again, as a child) that makes its connections and then closes them; the same
process with an empty loop in place of the closes is taken off. How to read the table: README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys

from batches import CASES, connected
from ways import WAYS, nothing

import lingerx

PERF = ["perf", "stat", "-e", "instructions:u", "-x,", "--"]
# Counts what one process executes, without any hardware counter: exact, and some fifty times slower.
VALGRIND = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", "--"]
COMMANDS = {"perf": PERF, "valgrind": VALGRIND}
PATTERNS = {"perf": r"^(\d+),[^,]*,[^,]*instructions", "valgrind": r"Collected\s*:\s*(\d+)"}

NO_COUNTER = (
    "instructions: nothing here can count instructions. Install perf (Debian: linux-perf) where the machine has "
    "hardware counters and kernel.perf_event_paranoid is 2 or less; in a virtual machine without counters "
    "install valgrind."
)


def count(counter: str, command: list[str]) -> int | None:
    """The user instructions of a command, or None where the counter is missing or counts nothing."""
    if shutil.which(counter) is None:
        return None
    environment = {**os.environ, "PYTHONHASHSEED": "0"}  # the same dictionaries in every run
    done = subprocess.run([*COMMANDS[counter], *command], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"instructions: a run failed:\n{done.stdout}{done.stderr}")
    # More than one line where a machine has more than one kind of core.
    return sum(map(int, re.findall(PATTERNS[counter], done.stderr, re.MULTILINE))) or None


def pick_counter(wanted: str | None) -> str:
    """`wanted`, or else the first that works; ends the program with a sentence when there is none."""
    for counter in [wanted] if wanted else COMMANDS:
        if shutil.which(counter) and count(counter, [shutil.which("true") or "true"]):
            return counter
    sys.exit(f"instructions: {wanted} is missing, or counts nothing on this machine" if wanted else NO_COUNTER)


def child(way: str, case: str, calls: int) -> None:
    """What is counted. Ends without tidying up: nothing that comes after the loop may differ."""
    close_them = WAYS[way][case] if way in WAYS else nothing
    with connected(calls, case) as socks:
        close_them(socks)
        os._exit(0)


def measure(counter: str, case: str, calls: int, runs: int) -> dict[str, float]:
    """Instructions per call, by way."""
    totals: dict[str, list[int]] = {way: [] for way in ("empty", *WAYS)}
    for _ in range(runs):
        for way, found in totals.items():
            script = [sys.executable, os.path.abspath(__file__)]
            total = count(counter, [*script, "--child", way, "--case", case, "--calls", str(calls)])
            if total is None:
                sys.exit(NO_COUNTER)
            found.append(total)
    empty = statistics.median(totals.pop("empty"))
    return {way: (statistics.median(found) - empty) / calls for way, found in totals.items()}


def show(about: dict[str, object], rows: list[dict[str, object]]) -> None:
    print(*(f"{name}: {value}" for name, value in about.items()), sep="; ")
    print(f"{'':12}{'lingerx':>12}{'Python':>12}{'lingerx / Python':>20}     user instructions per close")
    for row in rows:
        print(f"{row['case']:12}{row['lingerx']:>12.0f}{row['python']:>12.0f}{row['lingerx_to_python']:>20.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="User instructions per close: lingerx and the Python idiom.")
    parser.add_argument("--calls", type=int, default=500, help="closes per run")
    parser.add_argument("--runs", type=int, help="runs of each process; default: 5 with perf, 1 with valgrind")
    parser.add_argument("--counter", choices=COMMANDS, help="default: the first of them that works here")
    parser.add_argument("--case", choices=CASES, action="append", help="only this one; may be repeated")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.case[0], options.calls)
    counter = pick_counter(options.counter)
    runs = options.runs or (5 if counter == "perf" else 1)
    rows: list[dict[str, object]] = []
    for case in options.case or CASES:
        found = measure(counter, case, options.calls, runs)
        ratio = round(found["lingerx"] / found["python"], 3)
        rows.append({"case": case, **{way: round(value) for way, value in found.items()}, "lingerx_to_python": ratio})
    about: dict[str, object] = {
        "lingerx": f"{lingerx.__version__}, {lingerx.engine} engine",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "counter": counter,
        "calls": options.calls,
        "runs": runs,
    }
    if options.json:
        print(json.dumps({**about, "rows": rows}, indent=2))
    else:
        show(about, rows)


if __name__ == "__main__":
    main()
