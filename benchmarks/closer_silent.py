"""What silent peers cost a closer: 20 000 of them, with which nothing happens for as long as they are there.

    python benchmarks/closer_silent.py [--peers 20000] [--batch 200] [--turns 41] [--idle 5] [--json]

hand-over: batches given in turns to a closer that has nothing and to one that has all the silent ones; the median of
    the ratios within a turn.
idle: CPU time of the two closers' threads, and how often they woke up, while nothing happens.
memory: resident size with half of the peers pending, and with all of them; the difference by socket. The peers live
    in another process.

To reach: ratio 1.5; 1 % of a core; no wake-up where nothing is pending; 128 bytes. Needs an fd for each peer: raises
RLIMIT_NOFILE, and takes fewer peers where it may not (beyond the hard limit only with CAP_SYS_RESOURCE).
"""

from __future__ import annotations

import argparse
import gc
import resource
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from batches import SILENT, SPARE_FDS, connected, make_room
from close_cost import CLOCKS
from costs import Figure, child, end_after, resident, show, this_script, thread_of, usage, wait_until

from lingerx import Closer, Drain

POLICY = Drain(timeout=3600.0)
FEWEST_PEERS = 1000
SETTLE = 0.1  # seconds in which a closer takes in what it was given: many times its collecting


def as_many(wanted: int, batch: int) -> int:
    """How many peers the system lets us have."""
    try:
        make_room(wanted + 2 * batch)
        return wanted
    except (OSError, ValueError) as error:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        make_room(hard - SPARE_FDS)
        fewer = hard - SPARE_FDS - 2 * batch
        print(f"closer_silent: RLIMIT_NOFILE stays at {hard} ({error}): only {fewer} peers", file=sys.stderr)
        return fewer


def live_as_peers(port: int, count: int) -> None:
    """Another process: connects all, and does nothing until it is killed."""
    make_room(count)
    peers = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    sys.stdin.read()
    del peers


@contextmanager
def silent_peers(closer: Closer, count: int) -> Iterator[None]:
    """Hands over one by one, as fast as they can be connected; a listener for each lot, lest ports become scarce."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        port = listener.getsockname()[1]
        with child(*this_script("--port", port, "--peers", count)):
            for _ in range(count):
                closer.close(listener.accept()[0])
            time.sleep(SETTLE)
            yield


def settled_size() -> int:
    gc.collect()
    return resident()


def hand_over_cost(empty: Closer, full: Closer, batch: int, turns: int, clock: str) -> list[Figure]:
    now = CLOCKS[clock]
    times: dict[Closer, list[float]] = {empty: [], full: []}
    for turn in range(turns + 1):
        for closer, found in times.items():
            before = closer.pending
            with connected(batch, SILENT) as socks:
                close = closer.close
                start = now()
                for sock in socks:
                    close(sock)
                ns = now() - start
            if turn:
                found.append(ns / batch / 1000)
            wait_until(lambda closer=closer, before=before: closer.pending == before)  # type: ignore[misc]
    ratios = [own / other for own, other in zip(times[full], times[empty], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return [
        Figure("hand-over, nothing pending", statistics.median(times[empty]), "us"),
        Figure("hand-over, all pending", statistics.median(times[full]), "us"),
        Figure("hand-over, all / nothing pending", middle, "", 1.5, f"(quartiles {low:.2f} to {high:.2f})"),
    ]


def idle_cost(empty: Closer, full: Closer, seconds: float) -> list[Figure]:
    lines = []
    threads = {"nothing": thread_of("empty"), "all": thread_of("full")}
    before = {what: usage(thread) for what, thread in threads.items()}
    time.sleep(seconds)
    for what, thread in threads.items():
        used = usage(thread).since(before[what])
        share = used.cpu_ns / 1e7 / seconds
        lines.append(Figure(f"idle, {what} pending: CPU", share, "% of a core", 1.0))
        limit = 0.0 if what == "nothing" else None
        lines.append(Figure(f"idle, {what} pending: wake-ups", used.wakeups / seconds, "a second", limit))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="What thousands of silent peers cost a closer.")
    parser.add_argument("--peers", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=200, help="sockets per timed hand-over")
    parser.add_argument("--turns", type=int, default=41)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: the calling thread's CPU time")
    parser.add_argument("--idle", type=float, default=5.0, help="seconds in which nothing happens")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peers < FEWEST_PEERS or options.batch < 1 or options.turns < 2:
        parser.error(f"--peers is {FEWEST_PEERS} or more, --batch 1 or more, --turns 2 or more")
    end_after(300)
    if options.port:
        live_as_peers(options.port, options.peers)
        return
    count = as_many(options.peers, options.batch)
    room = count + 2 * options.batch
    with (
        Closer(POLICY, max_pending=room, name="empty") as empty,
        Closer(POLICY, max_pending=room, name="full") as full,
    ):
        # Both threads run, and Python has made its sockets once, before the first size is taken.
        for closer in (empty, full):
            with connected(options.batch, SILENT) as socks:
                closer.close_all(socks)
            wait_until(lambda closer=closer: closer.pending == 0)  # type: ignore[misc]
        none = settled_size()
        with silent_peers(full, count // 2):
            half = settled_size()
            with silent_peers(full, count - count // 2):
                all_of_them = settled_size()
                assert full.pending == count
                lines = hand_over_cost(empty, full, options.batch, options.turns, options.clock)
                time.sleep(SETTLE)
                lines += idle_cost(empty, full, options.idle)
        wait_until(lambda: full.pending == 0)
    each = (all_of_them - half) / (count - count // 2)
    first = f"(the first half: {(half - none) / (count // 2):.0f})"
    lines.append(Figure("memory per pending socket", each, "bytes", 128, first))
    show({"clock": options.clock, "peers": count, "batch": options.batch, "turns": options.turns}, lines, options.json)


if __name__ == "__main__":
    main()
