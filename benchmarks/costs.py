"""What the closer's benchmarks share: what a process and its threads cost (from /proc), and how figures are shown.

Nothing is measured here, and nothing closes a socket.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from batches import make_room

import lingerx
from lingerx import Closer, Drain

PATIENCE = 60.0  # seconds for what takes a moment


class Figure(NamedTuple):
    """A line of the table. `limit`: what it may be at most, None where there is nothing to reach."""

    what: str
    value: float
    unit: str = ""
    limit: float | None = None
    more: str = ""

    @property
    def reached(self) -> bool:
        return self.limit is None or self.value <= self.limit


def show(about: dict[str, object], figures: list[Figure], as_json: bool = False) -> bool:
    """Prints all of it. Returns whether every figure keeps to its limit."""
    system = {
        "lingerx": f"{lingerx.__version__}, {lingerx.engine} engine",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} CPUs",
    }
    reached = all(figure.reached for figure in figures)
    if as_json:
        lines = [{**figure._asdict(), "reached": figure.reached} for figure in figures]
        print(json.dumps({**system, **about, "figures": lines, "reached": reached}, indent=2))
        return reached
    print(*(f"{name}: {value}" for name, value in {**system, **about}.items()), sep="; ")
    for what, value, unit, limit, more in figures:
        number = f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"
        goal = "" if limit is None else f"at most {limit:,}: {'yes' if value <= limit else 'NO'}"
        print(f"{what:44}{number:>14} {unit:14}{goal:24}{more}".rstrip())
    return reached


# Time, and other processes ----------------------------------------------------------------------------------


def end_after(seconds: int) -> None:
    """End this program with a sentence when it takes longer; with-blocks are left as by any exception."""

    def late(number: int, frame: object) -> None:
        sys.exit(f"{Path(sys.argv[0]).stem}: not over after {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"{Path(sys.argv[0]).stem}: waited {PATIENCE} s in vain")
        time.sleep(0.001)


@contextmanager
def child(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A process with pipes; by default of this very script. It is killed at the end."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def this_script(*arguments: object) -> list[str]:
    return [sys.executable, os.path.abspath(sys.argv[0]), *map(str, arguments)]


# What it costs ----------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of memory. Not from statm, which is off by up to some hundred KiB since Linux 6.2 (proc(5))."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise OSError("no Rss in /proc/self/smaps_rollup")


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd")) - 1  # one is listdir's own


def tasks() -> int:
    """Threads as the kernel sees them."""
    return len(os.listdir("/proc/self/task"))


def thread_of(name: str) -> int:
    """The kernel's number of the closer's thread, when there is one of that name only."""
    (number,) = (thread.native_id for thread in threading.enumerate() if thread.name == name)
    assert number is not None
    return number


class Usage(NamedTuple):
    cpu_ns: int
    wakeups: int

    def since(self, before: Usage) -> Usage:
        return Usage(self.cpu_ns - before.cpu_ns, self.wakeups - before.wakeups)


def usage(thread: int, process: int | str = "self") -> Usage:
    """Of one thread: CPU time (schedstat), and how often it went to sleep."""
    folder = Path(f"/proc/{process}/task/{thread}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return Usage(int((folder / "schedstat").read_text().split()[0]), int(status["voluntary_ctxt_switches"]))


# Closers ----------------------------------------------------------------------------------------------------


def introduce(sockets: int) -> None:
    """Hand over sockets of all the fd numbers that `sockets` pairs will have.

    The first close of a number costs a system call more, which is not the common case that is to be measured.
    """
    make_room(2 * sockets)
    ends = [end for _ in range(sockets + 16) for end in socket.socketpair()]
    with Closer(Drain(timeout=0.0), max_pending=len(ends)) as closer:
        for end in ends:
            closer.close(end)
