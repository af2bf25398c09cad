"""Closers for tests, over each engine in turn, and questions to the kernel about their threads.

Only what several test modules of the closer share may live here; the fixture `closers` ends what a test has made.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from connections import DEADLINE, wait_until
from lingerx import Drain, Outcome, Report

if sys.platform != "win32":
    import resource

if TYPE_CHECKING:
    from lingerx.closer import Closer, Stats

LONG = Drain(timeout=DEADLINE)
MORE_THAN_FITS = bytes(range(256)) * (4 << 12)
"""4 MiB: more than the kernel takes with SMALL_BUFFERS."""

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

CloserMaker = Callable[..., "Closer"]
"""What the fixture `closers` is: as `Closer`, but ended after the test."""

SCHEDULING = 0.05
"""Seconds beyond a deadline that the contract allows."""


def overstay(engine: str) -> float:
    """The same for hundreds of sockets: to give them up is Python's work in the portable engine."""
    return SCHEDULING if engine == "native" else 4 * SCHEDULING


@cache
def closer_over(engine: str) -> type[Closer]:
    """`Closer` over this engine."""
    base = import_module("lingerx.closer").Closer
    return cast("type[Closer]", type("Closer", (base,), {"_engine_loop": import_module(f"lingerx._{engine}").Loop}))


@contextmanager
def ended_afterwards(kind: type[Closer]) -> Iterator[CloserMaker]:
    """Makes closers of this kind, and shuts all of them down."""
    made: list[Closer] = []

    def make(*arguments: Any, **options: Any) -> Closer:
        closer = kind(*arguments, **options)
        made.append(closer)
        return closer

    try:
        yield make
    finally:
        while made:
            made.pop().shutdown(0.0)


# Sockets --------------------------------------------------------------------------------------------------


def assert_usable(ours: socket.socket, peer: socket.socket) -> None:
    """Both directions still work."""
    ours.sendall(b"to the peer")
    assert peer.recv(100) == b"to the peer"
    peer.sendall(b"to us")
    assert ours.recv(100) == b"to us"


def make_room_for(count: int) -> None:
    """Raise RLIMIT_NOFILE so that there is room for `count` more fds, or skip."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512
    if soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"RLIMIT_NOFILE is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# Futures --------------------------------------------------------------------------------------------------


def outcomes(futures: Iterable[Future[Report]]) -> list[Outcome]:
    """In the order of the futures, once all are done."""
    known = list(futures)
    assert not wait(known, DEADLINE).not_done
    return [future.result(0).outcome for future in known]


# Counters -------------------------------------------------------------------------------------------------


def nonzero(stats: Stats) -> dict[Outcome, int]:
    """The outcomes that occurred."""
    return {outcome: count for outcome, count in stats.outcomes.items() if count}


def assert_adds_up(stats: Stats) -> None:
    """What must hold at every moment."""
    assert stats.handed_over == stats.pending + sum(stats.outcomes.values())
    assert sum(stats.linger_times.values()) == sum(stats.outcomes.values())
    assert min(stats.pending, stats.buffered, stats.drained, stats.total_linger_time) >= 0


# Threads --------------------------------------------------------------------------------------------------


def thread_of(closer: Closer) -> int:
    """The kernel's id of its thread, which has started."""
    thread = closer._loop.thread
    assert thread is not None
    assert thread.native_id is not None
    return thread.native_id


def thread_status(thread: int, field: str) -> str:
    """A field of /proc/self/task/<thread>/status, see proc_pid_status(5)."""
    for line in Path(f"/proc/self/task/{thread}/status").read_text("ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return value.strip()
    raise LookupError(field)


def wait_until_asleep(thread: int) -> None:
    """Until it has slept for a while: while it collects it wakes every few milliseconds."""
    seen = [-1]

    def settled() -> bool:
        before = seen[0]
        seen[0] = int(thread_status(thread, "voluntary_ctxt_switches"))
        if seen[0] != before:
            return False
        return thread_status(thread, "State").startswith("S")

    wait_until(settled, poll=0.02)


# Programs -------------------------------------------------------------------------------------------------


def start_program(
    engine: str,
    program: str,
    *arguments: object,
    pass_fds: tuple[int, ...] = (),
    wrapper: Iterable[str] = (),
) -> subprocess.Popen[str]:
    """A Python program over this engine, its stdout and stderr piped. wrapper: a command that runs a command."""
    return subprocess.Popen(
        [*wrapper, sys.executable, "-X", "faulthandler", "-c", program, *map(str, arguments)],
        env={**os.environ, "LINGERX_ENGINE": engine},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=pass_fds,
    )


def output_of(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait until it has ended; its stdout. AssertionError for another exit code."""
    try:
        out, err = process.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {DEADLINE} s; stdout {out!r}; stderr:\n{err}") from None
    assert process.returncode == code, f"exit code {process.returncode}; stdout {out!r}; stderr:\n{err}"
    return out
