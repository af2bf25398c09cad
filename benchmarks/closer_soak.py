"""A million sockets through one closer: does anything stay behind?

    python benchmarks/closer_soak.py [--sockets 1000000] [--batch 5000] [--json]

TCP over loopback and socketpairs; peers that have closed, with data of theirs unread, that send late, that reset, and
silent ones with a short limit; `close`, `send_and_close` and `submit`; all policies that a closer takes. Each kind has
the one outcome it must have (KINDS), so the counters can be checked to the last socket and byte.

To reach, else the exit status is 1: fds and threads at the end as before the closer was made; memory at most 2 MiB more
than after the first batches (two bytes a socket would show); every counter as it must be.
"""

from __future__ import annotations

import argparse
import collections
import gc
import socket
import struct
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from batches import make_room
from costs import PATIENCE, Figure, end_after, open_fds, resident, show, tasks, wait_until

from lingerx import Abort, Background, Closer, Drain, Flush, Outcome, Report

PATIENT = Drain(timeout=300.0)  # nobody may run into it, however slow the machine
SHORT = Drain(timeout=0.05)
LINGER_RESET = struct.pack("ii", 1, 0)
DATA = b"x" * 1000
WARM_UP = 3  # batches after which memory is counted
MOST_MEMORY = 2 * 1024 * 1024  # bytes: what an allocator may keep; a guess
THREAD_END = 1.0  # seconds: Python's join returns shortly before the kernel's thread is gone
REPORTS = 10  # times that progress is printed

Before = Callable[[socket.socket], object]


def nothing(peer: socket.socket) -> None:
    pass


def send(peer: socket.socket) -> None:
    peer.sendall(DATA)


def send_and_leave(peer: socket.socket) -> None:
    peer.sendall(DATA)
    peer.close()


def leave(peer: socket.socket) -> None:
    peer.close()


def reset(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    peer.close()


def read_and_leave(peer: socket.socket) -> None:
    while peer.recv(65536):
        pass
    peer.close()


class Kind(NamedTuple):
    """What a socket goes through. The peer acts before and after the hand-over, and is closed when all are done."""

    outcome: Outcome
    tcp: bool
    policy: Drain | Flush | Background | Abort = PATIENT
    before: Before = nothing
    after: Before = nothing
    way: str = "close"
    drained: int = 0


KINDS = (
    Kind(Outcome.PEER_CLOSED, False, before=leave),
    Kind(Outcome.PEER_CLOSED, False, before=send_and_leave, drained=len(DATA)),
    Kind(Outcome.PEER_CLOSED, False, after=read_and_leave, way="send"),
    Kind(Outcome.PEER_CLOSED, False, after=read_and_leave, way="submit"),
    Kind(Outcome.TIMED_OUT, False, SHORT),
    Kind(Outcome.BACKGROUND, False, Background()),
    Kind(Outcome.PEER_CLOSED, True, before=leave),
    Kind(Outcome.PEER_CLOSED, True, before=send_and_leave, drained=len(DATA)),
    Kind(Outcome.PEER_CLOSED, True, before=send, after=leave, drained=len(DATA)),
    Kind(Outcome.PEER_CLOSED, True, after=send_and_leave, drained=len(DATA)),
    Kind(Outcome.PEER_CLOSED, True, after=read_and_leave, way="send"),
    Kind(Outcome.PEER_CLOSED, True, after=read_and_leave, way="submit"),
    Kind(Outcome.PEER_RESET, True, after=reset),
    Kind(Outcome.PEER_RESET, True, after=reset, way="submit"),
    Kind(Outcome.TIMED_OUT, True, SHORT),
    Kind(Outcome.TIMED_OUT, True, SHORT, before=send, drained=len(DATA)),
    Kind(Outcome.ACKED, True, Flush(timeout=300.0)),
    Kind(Outcome.BACKGROUND, True, Background()),
    Kind(Outcome.ABORTED, True, Abort()),
)


def one_batch(closer: Closer, first: int, count: int) -> int:
    """Sockets number `first` and on. Returns how many futures told something else than their kind."""
    peers: list[socket.socket] = []
    futures: list[tuple[Future[Report], Kind]] = []
    # A fresh listener: its port keeps the connections that are in TIME-WAIT out of the way.
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        address = listener.getsockname()
        for number in range(first, first + count):
            kind = KINDS[number % len(KINDS)]
            if kind.tcp:
                ours = socket.socket()
                ours.connect(address)
                peer, _ = listener.accept()
            else:
                ours, peer = socket.socketpair()
            kind.before(peer)
            if kind.way == "send":
                assert closer.send_and_close(ours, DATA, kind.policy)
            elif kind.way == "submit":
                futures.append((closer.submit(ours, kind.policy, data=DATA), kind))
            else:
                closer.close(ours, kind.policy)
            kind.after(peer)
            if peer.fileno() >= 0:
                peers.append(peer)
    wait_until(lambda: closer.pending == 0)
    for peer in peers:
        peer.close()
    return sum(future.result(PATIENCE).outcome is not kind.outcome for future, kind in futures)


def figures(closer: Closer, sockets: int, wrong_futures: int) -> list[Figure]:
    """How far the counters are from what they must be."""
    stats = closer.stats()
    rounds, rest = divmod(sockets, len(KINDS))
    expected: collections.Counter[Outcome] = collections.Counter()
    drained = 0
    for place, kind in enumerate(KINDS):
        number = rounds + (place < rest)
        expected[kind.outcome] += number
        drained += number * kind.drained
    wrong = {outcome.name: n - expected[outcome] for outcome, n in stats.outcomes.items() if n != expected[outcome]}
    return [
        Figure("handed over, off by", abs(stats.handed_over - sockets), "sockets", 0),
        Figure("outcomes, off by", sum(map(abs, wrong.values())), "sockets", 0, str(wrong or "")),
        Figure("sum of the outcomes, off by", abs(sum(stats.outcomes.values()) - sockets), "sockets", 0),
        Figure("histogram of linger times, off by", abs(sum(stats.linger_times.values()) - sockets), "sockets", 0),
        Figure("pending", stats.pending, "sockets", 0),
        Figure("buffered", stats.buffered, "bytes", 0),
        Figure("drained, off by", abs(stats.drained - drained), "bytes", 0, f"of {drained:,}"),
        Figure("futures with a wrong report", wrong_futures, "", 0),
    ]


def settled_size() -> int:
    gc.collect()
    return resident()


def main() -> None:
    parser = argparse.ArgumentParser(description="A million sockets through one closer: nothing may stay behind.")
    parser.add_argument("--sockets", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=5_000, help="sockets until all are waited for")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args()
    sockets, batch = options.sockets, options.batch
    if batch < 1 or sockets < (WARM_UP + 1) * batch:
        parser.error(f"--sockets is at least {WARM_UP + 1} times --batch")
    end_after(120 + sockets // 1000)
    make_room(2 * batch)
    began = time.monotonic()
    fds, threads = open_fds(), tasks()
    wrong_futures = told = size = done = 0
    with Closer(max_pending=2 * batch) as closer:
        while done < sockets:
            wrong_futures += one_batch(closer, done, min(batch, sockets - done))
            done = min(sockets, done + batch)
            if done == WARM_UP * batch:
                size = settled_size()
            if done * REPORTS // sockets > told and not options.json:
                told = done * REPORTS // sockets
                print(f"{done:,} after {time.monotonic() - began:.0f} s", file=sys.stderr)
        final_size = settled_size()
        lines = figures(closer, sockets, wrong_futures)
    end = time.monotonic() + THREAD_END
    while tasks() > threads and time.monotonic() < end:
        time.sleep(0.01)
    lines += [
        Figure("fds, more than before", abs(open_fds() - fds), "", 0),
        Figure("threads, more than before", abs(tasks() - threads), "", 0),
        Figure("memory, more than when warm", final_size - size, "bytes", MOST_MEMORY, f"({size:,} when warm)"),
    ]
    about: dict[str, object] = {"sockets": f"{sockets:,}", "seconds": round(time.monotonic() - began)}
    if not show(about, lines, options.json):
        sys.exit(1)


if __name__ == "__main__":
    main()
