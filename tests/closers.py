"""Closers for tests, over each engine in turn, and questions to the kernel about their threads.

Only what several test modules of the closer share may live here; the fixture `closers` ends what a test has made.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import pytest

from connections import DEADLINE, wait_until
from lingerx import Outcome

if TYPE_CHECKING:
    from lingerx.closer import Closer, Stats

CloserMaker = Callable[..., "Closer"]
"""What the fixture `closers` is: as `Closer`, but ended after the test."""

SCHEDULING = 0.05
"""Seconds beyond a deadline that the contract allows."""


@cache
def module_over(engine: str) -> ModuleType:
    """`lingerx.closer` over this engine: its `Closer` is a subclass of the `Loop` of the engine it was loaded with."""
    chosen = import_module("lingerx._engine")
    loop = import_module(f"lingerx._{engine}").Loop
    if chosen.Loop is loop:
        return import_module("lingerx.closer")
    name = f"lingerx._closer_over_{engine}"
    origin = import_module("lingerx.closer").__file__
    assert origin is not None
    spec = importlib.util.spec_from_file_location(name, origin)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chosen, "Loop", loop)
        spec.loader.exec_module(module)
    return module


@contextmanager
def ended_afterwards(module: ModuleType) -> Iterator[CloserMaker]:
    """Makes closers of `module`, and shuts all of them down."""
    made: list[Closer] = []

    def make(*arguments: Any, **options: Any) -> Closer:
        closer = cast("Closer", module.Closer(*arguments, **options))
        made.append(closer)
        return closer

    try:
        yield make
    finally:
        while made:
            made.pop().shutdown(0.0)  # and let go of: its own fds live as long as the object


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


def thread_ids() -> set[int]:
    """The kernel's ids of all threads of this process."""
    return set(map(int, os.listdir("/proc/self/task")))


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
    engine: str, program: str, *arguments: object, pass_fds: tuple[int, ...] = ()
) -> subprocess.Popen[str]:
    """A Python program over this engine, its stdout and stderr piped."""
    return subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", program, *map(str, arguments)],
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
