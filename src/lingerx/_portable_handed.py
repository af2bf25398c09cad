"""What the two sides of the portable closer share: a socket on its way, the accounts, a bell.

For `_portable_closer`, which has the locks and the rules; nothing of them may live here.
"""

from __future__ import annotations

import bisect
import errno
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from . import _machine as m
from . import _sockopt
from ._ledger import LINGER_TIMES
from ._portable_crowd import NOTHING, OUTCOMES, SEND_FLAGS, Closing
from .policy import Policy
from .report import Outcome, Report

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["Accounts", "Bell", "Handed"]

BOUNDS = tuple(round(seconds * 1e9) for seconds in LINGER_TIMES)


class Handed(Closing):
    """A socket on its way from the hot side to the loop, and through it.

    let_go: told when nothing is left to be sent.
    """

    __slots__ = ("accepted", "amount", "dropped", "expires", "future", "held", "let_go", "seen")

    def __init__(
        self, sock: socket.socket, fd: int, policy: Policy, data: memoryview, let_go: Callable[[Handed], None]
    ) -> None:
        super().__init__(sock, fd, policy, data)
        self.let_go = let_go
        self.accepted = False  # by the loop, which books it once and for all
        self.future: Future[Report] | None = None
        self.expires = False  # somebody wants it to end now
        self.held = 0  # bytes, counted against max_buffered
        self.dropped = False  # the kernel can take no more of them
        self.seen, self.amount = m.BEGUN, 0  # what the hot side has to tell the machine

    def half_close(self) -> None:
        """Send what the kernel takes at once, and keep the rest; when there is none, half-close. Cannot block."""
        whole = len(self.data)
        try:
            if whole:
                self.data = self.data[self.raw.send(self.data, SEND_FLAGS) :]
        except BlockingIOError:
            pass
        except OSError as trouble:
            self.dropped = True
            if trouble.errno != errno.EPIPE:  # which stays, so that the loop meets it too; others are told once
                self.seen, self.amount = self.explain(m.SEND, trouble.errno or errno.EIO)
        if self.data:
            self.held = whole
            if type(self.data.obj) is not bytes:  # the caller may change it
                self.data = memoryview(bytes(self.data))
            return
        self.data = NOTHING
        if sys.platform == "darwin":
            with suppress(OSError):
                _sockopt.set_linger(self.raw, -1)  # which is refused after a shutdown
        self.seen, self.amount = self.perform(m.HALF_CLOSE)

    def perform(self, action: int) -> tuple[int, int]:
        if action == m.HALF_CLOSE and self.held:  # the last byte is the kernel's
            self.let_go(self)
        return super().perform(action)

    def shed(self, abort: bool) -> None:
        """Owns. There is no room for it: closed at once. When an exception comes before it is, the loop does it."""
        if self.report is None:
            unsent = len(self.data)
            elapsed = (time.monotonic_ns() - self.wake_at) / 1e9
            self.report = Report(Outcome.SHED, unacked=unsent or None, elapsed=elapsed, lost=unsent > 0)
        self.data = NOTHING
        user_timeout = self.policy._terms[5]
        if self.tcp and user_timeout >= 0 and not abort:
            _sockopt.set_tcp(self.raw, "TCP_USER_TIMEOUT", user_timeout)
        with suppress(OSError):
            _sockopt.set_linger(self.raw, 0 if abort else -1)
        with suppress(OSError):
            self.raw.close()

    def tell(self) -> None:
        """The future, if there is one, that it is closed. Its callbacks run, and can do no harm."""
        future, self.future = self.future, None
        if future is not None and self.report is not None:
            try:
                future.set_result(self.report)
            except BaseException:  # a sys.exit() in a callback: the others still want to know
                with suppress(BaseException):  # somebody's hook, or stderr is closed
                    threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))


class Books:
    """The sums over all sockets that were closed."""

    def __init__(self, other: Books | None = None) -> None:
        self.drained: int = other.drained if other else 0  # bytes
        self.time: int = other.time if other else 0  # ns
        self.outcomes: list[int] = list(other.outcomes) if other else [0] * len(OUTCOMES)
        self.times: list[int] = list(other.times) if other else [0] * (len(BOUNDS) + 1)

    def enter(self, report: Report) -> None:
        elapsed = round(report.elapsed * 1e9)
        self.outcomes[OUTCOMES.index(report.outcome)] += 1
        self.times[bisect.bisect_left(BOUNDS, elapsed)] += 1
        self.time += elapsed
        self.drained += report.drained


class Accounts:
    """Who is where. For both sides, under their lock; but of the hot side, which may be interrupted between any two
    steps, only single calls on the two queues change anything.
    """

    def __init__(self) -> None:
        self.inbox: deque[Handed] = deque()
        """Handed over, for the loop to take. One that has a report by now is closed."""
        self.done: deque[Handed] = deque()
        """Closed by the hot side, for the loop to book; perhaps twice, and perhaps still in the inbox too."""
        self.in_flight = 0
        """Sockets that the loop has."""
        self.held = 0
        """Bytes of their data."""
        self.books = Books()
        """Of those that are closed and accepted. Never changed, but replaced."""

    def enter(self, closed: list[Handed]) -> None:
        """For the loop: book them once and for all."""
        books = Books(self.books)
        for c in closed:
            c.accepted = True
            if c.report is not None:
                books.enter(c.report)
        self.books = books

    def let_go(self, c: Handed) -> None:
        """For the loop: the data of one that it has is all sent."""
        self.held -= c.held
        c.held = 0
        c.data = NOTHING

    def nothing_pending(self) -> bool:
        return self.in_flight == 0 and all(c.report is not None for c in list(self.inbox))

    def buffered(self) -> int:
        return self.held + sum(c.held for c in list(self.inbox))

    def counters(self) -> tuple[int, int, int, int, tuple[int, ...], tuple[int, ...], int]:
        books, pending, buffered = Books(self.books), self.in_flight, self.held
        for c in dict.fromkeys((*self.inbox, *self.done)):
            report = c.report
            if report is None:
                pending += 1
                buffered += c.held
            elif not c.accepted:
                books.enter(report)
        handed_over = pending + sum(books.outcomes)
        return handed_over, pending, buffered, books.drained, tuple(books.outcomes), tuple(books.times), books.time


class Bell:
    """Calls the loop out of its nap, or its crowd out of waiting, for which it needs an fd (on Linux) or two."""

    def __init__(self) -> None:
        self.ends: tuple[socket.socket, ...] = ()
        self.fd = -1
        self.silence = threading.Lock()  # released by whoever rings
        self.silence.acquire()

    def open(self) -> None:
        """Raises OSError where there is no fd left."""
        if sys.platform == "linux" and hasattr(os, "eventfd"):  # some builds of Python lack it
            self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self.ends = socket.socketpair()
            for end in self.ends:
                end.setblocking(False)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        for end in self.ends:
            end.close()

    def fileno(self) -> int:
        return self.ends[0].fileno() if self.ends else self.fd

    def ring(self, crowd_waits: bool) -> None:
        with suppress(RuntimeError):  # it was rung before
            self.silence.release()
        if crowd_waits:
            with suppress(OSError):  # full: as above
                if self.ends:
                    self.ends[1].send(b"!")
                elif self.fd >= 0:
                    os.eventfd_write(self.fd, 1)

    def hear(self) -> None:
        with suppress(OSError):  # nothing there
            if self.ends:
                self.ends[0].recv(1024)
            elif self.fd >= 0:
                os.eventfd_read(self.fd)

    def nap(self, seconds: float) -> None:
        """Until somebody rings, or did since the last time."""
        self.silence.acquire(timeout=seconds)
