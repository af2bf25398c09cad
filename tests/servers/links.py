"""Where servers and clients meet: this machine's loopback, or a slow one of their own.

Nothing of lingerx and no assertion may live here.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from peers import Call

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
RATE, BURST, LATENCY = "400mbit", "64kb", "50ms"
"""So slow that a 64 KiB answer is still on its way when the server closes: an unpatched one loses most of them."""


class Link:
    """The loopback of this machine. A thread that has called `enter` makes its sockets and processes there."""

    name = "loopback"

    def enter(self) -> None:
        """Nothing to do: we are there."""

    def call(self, function: Callable[[], T]) -> T:
        """What the function returns on a thread that is there."""

        def there() -> T:
            self.enter()
            return function()

        with Call(there) as call:
            return call.result()


class SlowLink(Link):
    """A loopback in a network namespace of its own, with an MTU of 1500 and a limited rate.

    It has no name, only an fd and what runs in it, and so it goes with them, also when this process is killed.
    """

    name = "slow link"

    def __init__(self, namespace: int) -> None:
        self._namespace = namespace

    def enter(self) -> None:
        """Moves this thread, and what it will start, for good."""
        libc = ctypes.CDLL(None, use_errno=True)
        _check(libc.setns(self._namespace, CLONE_NEWNET))


def why_no_slow_link() -> str | None:
    """What is missing on this machine, or None."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "needs root: the slow link is a network namespace of its own"
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    return f"needs {' and '.join(missing)} (iproute2)" if missing else None


@contextmanager
def slow_link() -> Iterator[SlowLink]:
    """One for the length of the block. Raises OSError where the kernel refuses."""

    def make() -> int:
        # Only this thread moves; it ends at once, and the fd keeps the namespace.
        _check(ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET))
        _run("ip", "link", "set", "lo", "up", "mtu", "1500")
        _run("tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", RATE, "burst", BURST, "latency", LATENCY)
        return os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    with Call(make) as call:
        namespace = call.result()
    try:
        yield SlowLink(namespace)
    finally:
        os.close(namespace)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def _check(status: int) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
