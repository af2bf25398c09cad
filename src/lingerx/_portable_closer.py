"""The loop behind Closer, in Python: the twin of the native engine's `Loop`.

Two sides meet here. The hot side (any thread) half-closes and puts the socket into an inbox; nothing it does can
block. The loop (one thread) takes what is in the inbox every few milliseconds and runs a crowd. `_lock` guards what
both touch and is never held for long; `_working` is held by the loop whenever it does not wait, so that a fork finds
its sockets in order. Both are reentrant: a signal handler may close a socket while its thread is closing another.
No policy is decided here, and the thread is somebody else's.
"""

from __future__ import annotations

import bisect
import os
import socket
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING

from . import _arguments, _sockopt, _tls
from . import _machine as m
from ._portable_crowd import OUTCOMES, SEND_FLAGS, Closing, Crowd
from .policy import ABORT, BACKGROUND, Policy
from .report import Outcome, Report

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

__all__ = ["Loop"]

# What happens beyond max_pending, in the order of closer.ON_FULL.
FULL_SHED_OLDEST, FULL_BACKGROUND, FULL_ABORT_OLDEST = range(3)

# Upper bounds of the histogram of linger times, in ns; the last bucket is for what took longer.
BOUNDS = tuple(round(ms * 1_000_000) for ms in (1, 5, 10, 50, 100, 500, 1000, 5000, 10_000, 30_000, 60_000))

ADMITTED_AT_ONCE = 256
"""Sockets that have their first turn before the others have theirs: a guess that keeps a round below 10 ms."""
DEAF = 0.02
"""Seconds between two looks into the inbox where nothing can wake the loop (EMFILE in a forked child): a guess."""


class Handed(Closing):
    """A socket on its way from the hot side to the loop, and through it."""

    __slots__ = ("amount", "future", "held", "seen")

    def __init__(self, sock: socket.socket, fd: int, policy: Policy, data: memoryview, future: Future[Report] | None):
        super().__init__(sock, fd, policy, data)
        self.future = future
        self.held = 0  # bytes, counted against max_buffered
        self.seen, self.amount = m.BEGUN, 0  # what the hot side has to tell the machine

    def is_closed(self) -> bool:
        return self.report is not None

    def half_close(self) -> None:
        """Send what the kernel takes at once; when that is all of it, half-close. Cannot block."""
        if self.data:
            with suppress(OSError):  # the loop will meet it too
                self.data = self.data[self.raw.send(self.data, SEND_FLAGS) :]
        if self.data:
            return
        self.seen = m.HALF_CLOSED
        try:
            if sys.platform == "darwin":
                _sockopt.set_linger(self.raw, -1)  # which is refused after a shutdown
            self.raw.shutdown(socket.SHUT_WR)
        except OSError as trouble:
            self.seen, self.amount = self.explain(m.HALF_CLOSE, trouble.errno or 0)

    def shed(self, abort: bool) -> Report:
        """Owns. There is no room for it: closed at once."""
        with suppress(OSError):
            _sockopt.set_linger(self.raw, 0 if abort else -1)
        with suppress(OSError):
            self.raw.close()
        elapsed = (time.monotonic_ns() - self.wake_at) / 1e9
        unsent = len(self.data)
        return Report(Outcome.SHED, unacked=unsent or None, elapsed=elapsed, lost=unsent > 0)


class Loop:
    policy: Policy
    started: bool = False
    _bell: tuple[socket.socket, socket.socket] | None = None
    _crowd: Crowd | None = None

    def __new__(cls, policy: Policy, max_pending: int, max_buffered: int, on_full: int, collect: int) -> Self:
        self = super().__new__(cls)
        self._settings(policy, max_pending, max_buffered, on_full, collect)
        self._set_up()
        return self

    def _settings(self, policy: Policy, max_pending: int, max_buffered: int, on_full: int, collect: int) -> None:
        self.policy = policy
        self._max_pending = max_pending
        self._max_buffered = max_buffered
        self._on_full = on_full
        self._collect = collect / 1e9

    def _set_up(self) -> None:
        self._lock = threading.RLock()
        self._working = threading.RLock()
        self._forking = False
        self._life = object()  # another one after a fork: a thread that comes out of it in `run` must leave
        self._passing: set[Handed] = set()  # between the caller and the inbox
        # guarded by _lock
        self._inbox: deque[Handed] = deque()
        self._open = True
        self._stop_at = 0
        self._asleep = self._over = False
        self._in_flight = 0  # those that the loop took and has not booked
        self._closed = self._buffered = self._drained = self._total_time = 0
        self._outcomes = [0] * len(OUTCOMES)
        self._times = [0] * (len(BOUNDS) + 1)
        # the loop's own
        self._busy = self._stopping = False
        self._crowd = Crowd()
        bell = socket.socketpair()
        for end in bell:
            end.setblocking(False)
        self._bell = bell
        self._crowd = Crowd(waker=bell[0])

    def __del__(self) -> None:
        self._tear_down()

    def _tear_down(self) -> None:
        # What the loop itself has opened; the sockets are left as they are.
        bell, self._bell = self._bell, None
        for end in bell or ():
            end.close()
        if self._crowd is not None:
            self._crowd.close()

    def _start(self) -> None:
        """Start a thread that calls `run`, unless it was `started`."""
        raise NotImplementedError

    # The hot side -----------------------------------------------------------------------------------------

    def close(self, sock: socket.socket, policy: Policy | None = None) -> None:
        self._hand_over(sock, policy, None, None)

    def send_and_close(self, sock: socket.socket, data: Buffer, policy: Policy | None = None) -> bool:
        _arguments.check_data(data)  # None, too, which is "no data" in there
        report = self._hand_over(sock, policy, data, None)
        return report is None or report.delivered is not False

    def _submit(
        self, future: Future[Report], sock: socket.socket, data: Buffer | None, policy: Policy | None
    ) -> Report | None:
        return self._hand_over(sock, policy, data, future)

    def _hand_over(
        self, sock: socket.socket, policy: Policy | None, data: Buffer | None, future: Future[Report] | None
    ) -> Report | None:
        # Owns, once the arguments are checked. Returns the Report when the socket is closed already.
        policy = self.policy if policy is None else policy
        _arguments.check_policy(policy, deadline=data is not None, blocking=False)
        view = memoryview(b"") if data is None else _arguments.check_data(data)
        fd = _arguments.check_socket(sock)
        tls = fd >= 0 and _tls.is_tls(sock)
        if tls and data is not None:
            # The session ends where the fd is taken; what OpenSSL cannot write now nobody could write later.
            raise ValueError(
                "a TLS socket's data can't be sent in the background: call sock.sendall(data), then close(sock)"
            )
        if not self._open:
            raise RuntimeError("this closer was shut down; the socket is untouched")
        if not self.started:
            self._start()
        kind = policy._terms[0]
        if tls and kind != ABORT:
            _tls.say_goodbye(sock)  # type: ignore[arg-type]
        c = Handed(sock, fd, policy, view, future)
        c.wake_at = time.monotonic_ns()
        if c.report is None:
            self._passing.add(c)
            try:
                c.start()
                if not c.is_closed() and kind in (BACKGROUND, ABORT):
                    c.leave_to_kernel(-1)
                elif not c.is_closed():
                    c.half_close()
                    if c.data:
                        c.held = len(view)  # as it is kept in one piece where it is immutable
                        if type(data) is not bytes:  # the caller may change it
                            c.data = memoryview(bytes(c.data))
                    if self._push(c):
                        return None
                    c.report = c.shed(self._on_full == FULL_ABORT_OLDEST)
            except BaseException:
                if c in self._passing:  # else it is the loop's
                    c.give_up()
                raise
            finally:
                self._passing.discard(c)
        self._count(c.report)
        return c.report

    def _push(self, c: Handed) -> bool:
        # The loop owns it when this returns True.
        with self._lock:
            pending = len(self._inbox) + self._in_flight
            most = self._max_pending if self._on_full == FULL_BACKGROUND else 2 * self._max_pending
            if self._over or pending >= most or (c.held and self._buffered + c.held > self._max_buffered):
                return False
            self._buffered += c.held
            self._inbox.append(c)
            self._passing.discard(c)
            c.wrapper = None  # the caller's object is nothing to us any more
            if self._asleep:
                self._wake()
        return True

    def _wake(self) -> None:
        self._asleep = False
        if self._bell is not None:
            with suppress(OSError):  # full: it is awake
                self._bell[1].send(b"!")

    def _count(self, report: Report | None) -> None:
        # One that was closed on the hot side.
        if report is not None:
            with self._lock:
                self._closed += 1
                self._outcomes[OUTCOMES.index(report.outcome)] += 1
                self._times[0] += 1

    def counters(self) -> tuple[int, int, int, int, tuple[int, ...], tuple[int, ...], int]:
        """(handed over, pending, buffered, drained, per outcome, histogram, total linger time in ns), at one moment."""
        with self._lock:
            pending = len(self._inbox) + self._in_flight
            outcomes, times = tuple(self._outcomes), tuple(self._times)
            return self._closed + pending, pending, self._buffered, self._drained, outcomes, times, self._total_time

    # The loop -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until `stop` was called and everything is closed. For the closer's thread."""
        life, crowd = self._life, self._crowd
        try:
            while crowd is not None and self._life is life and self._round(crowd):
                pass
        except BaseException:
            # Out of memory, or a mistake of ours: the kernel gets what is left, and nobody's future stays open.
            with self._lock:
                self._open, self._over = False, True
                self._in_flight += len(self._inbox)
                left = [*(crowd.by_fd.values() if crowd else ()), *self._inbox]
                self._inbox.clear()
            self._settle(left, given_up=True)
            raise

    def _round(self, crowd: Crowd) -> bool:
        # Returns whether there is to be another one.
        with self._working:
            n = self._take_in(crowd)
            with self._lock:
                quiet = n == 0 and not self._busy and not self._inbox and not crowd.again
                self._asleep = quiet
                self._over = self._stopping and not self._inbox and not crowd.by_fd
        self._settle_ended(crowd)
        if self._over:
            with self._lock:
                self._tear_down()
            return False
        patience = crowd.patience() if self._bell is not None else min(crowd.patience(), DEAF)
        if not quiet:
            # There is something going on: collect for a moment, then take all of it in one go.
            if not self._inbox or n < ADMITTED_AT_ONCE:
                time.sleep(min(self._collect, patience))
            patience = 0.0
        while self._forking:  # who releases a lock for a moment only would keep it from everybody else
            time.sleep(DEAF / 10)
        ready = crowd.wait(patience)
        with self._working:
            crowd.serve(ready)
        self._settle_ended(crowd)
        self._busy = n > 0 or len(ready) > 0
        return True

    def _take_in(self, crowd: Crowd) -> int:
        with self._lock:
            n = min(len(self._inbox), ADMITTED_AT_ONCE)
            taken = [self._inbox.popleft() for _ in range(n)]
            self._in_flight += n
            stop = not self._open and not self._stopping
        if stop:
            self._stopping = True
            crowd.end = self._stop_at  # for those that come now
            for c in crowd.by_fd.values():
                c.deadline = min(c.deadline, self._stop_at)
                c.wake_at = min(c.wake_at, self._stop_at)
                if c.waiting:
                    crowd.set_timer(c)
        for c in taken:
            crowd.admit(c)
            crowd.turn(c, c.seen, c.amount)
        while len(crowd.by_fd) > self._max_pending:
            oldest = next(iter(crowd.by_fd.values()))
            oldest.abort = self._on_full == FULL_ABORT_OLDEST
            crowd.turn(oldest, m.SHEDDING)
        return n

    def _settle_ended(self, crowd: Crowd) -> None:
        if crowd.ended:
            ended, crowd.ended = crowd.ended, []
            self._settle(ended)

    def _settle(self, closings: list[Closing], given_up: bool = False) -> None:
        # Book those that were closed, and tell who wants to know.
        if given_up:
            for c in closings:
                c.give_up()
                c.outcome, c.started, c.drained = m.BACKGROUND, c.wake_at, 0
                c.report = Report(Outcome.BACKGROUND)
        with self._lock:
            for c in closings:
                elapsed = c.wake_at - c.started
                self._in_flight -= 1
                self._closed += 1
                self._outcomes[c.outcome] += 1
                self._drained += c.drained
                self._times[bisect.bisect_left(BOUNDS, elapsed)] += 1
                self._total_time += elapsed
                self._buffered -= c.held if isinstance(c, Handed) else 0
        for c in closings:
            if isinstance(c, Handed) and c.future is not None and c.report is not None:
                c.future.set_result(c.report)
                c.future = None

    def stop(self, timeout: int) -> None:
        """Take no more sockets; those in flight have `timeout` ns. Wakes the loop."""
        with self._lock:
            if self._open:
                self._open = False
                self._stop_at = time.monotonic_ns() + timeout
            self._wake()

    # Fork -----------------------------------------------------------------------------------------------------

    def before_fork(self) -> None:
        self._forking = True
        self._working.acquire()
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        self._forking = False
        self._lock.release()
        self._working.release()

    def after_fork_in_child(self) -> None:
        """The sockets are the parent's: give back the numbers, and start afresh."""
        left = [*self._passing, *self._inbox, *(self._crowd.by_fd.values() if self._crowd else ())]
        self._tear_down()
        for c in left:
            c.give_up(_forget)
        self.started = False
        with suppress(OSError):
            self._set_up()


def _forget(fd: int) -> None:
    # Owns a copy of the parent's: nothing may be asked of the socket.
    with suppress(OSError):
        os.close(fd)
