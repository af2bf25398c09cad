"""The loop behind Closer, in Python: the twin of the native engine's `Loop`.

Two sides meet here. The hot side (any thread) half-closes and puts the socket into an inbox; nothing it does can
block. The loop (one thread) takes the inbox in every few milliseconds and runs a crowd. `_lock` guards what both
touch and is never held for long; `_working` is held by the loop whenever it does not wait, so that a fork finds its
sockets in order. No policy is decided here, and the thread is somebody else's.

A signal handler, or the garbage collector, may hand over a socket in the middle of another hand-over of the same
thread, and a handler may end that one by an exception between any two steps. So the locks are reentrant, and the hot
side keeps no sums: it adds to a queue, or takes from one, by a single call that is done or not. Sums are the loop's,
whose thread runs no handlers; `counters` adds what it has not booked yet.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, cast

from . import _arguments, _tls
from . import _machine as m
from ._ledger import ON_FULL
from ._portable_crowd import NOTHING, Closing, Crowd
from ._portable_handed import Accounts, Bell, Handed
from .policy import ABORT, FLUSH, Policy
from .report import Outcome, Report

if TYPE_CHECKING:
    from concurrent.futures import Future

    from typing_extensions import Buffer

__all__ = ["Intake", "Loop"]

SHEDS_OLDEST, LEAVES_NEW, ABORTS_OLDEST = range(len(ON_FULL))

ACCEPTED_AT_ONCE, BOOKED_AT_ONCE = 256, 64
"""Sockets that have their first turn before the others have theirs, and for which the hot side waits: guesses."""
UNBOOKED = 256
"""Sockets closed by the hot side that may wait to be booked without waking the loop: a guess."""
GIVE_UP_TIME, GIVE_UP_SHARE, GIVEN_UP_AT_ONCE = 150_000, 3, 32
"""When a closer stops with thousands in flight, giving them up takes time: ns for each (a guess, at three times what
was measured). They begin so much earlier, in groups, but not before the last third of the time they were given."""
DEAF, MAKE_WAY = 0.02, 0.001
"""Seconds between two looks: into the inbox where nothing can wake the loop (EMFILE in a forked child), and whether
somebody is out of the way. Guesses."""
NEVER = sys.maxsize


class Loop:
    """What a Closer has: takes sockets over, and closes them in `run`, for which `start` makes a thread."""

    thread: threading.Thread | None = None
    name = ""
    exit_timeout = 0

    def __init__(
        self,
        policy: Policy,
        max_pending: int,
        max_buffered: int,
        on_full: int,
        collect: int,
        start: Callable[[Loop], None],
    ) -> None:
        self._policy = policy
        self._max_pending = max_pending
        self._max_buffered = max_buffered
        self._on_full = on_full
        self._collect = collect / 1e9
        self._start = start
        self._begin_life()
        self._open_own()

    @property
    def policy(self) -> Policy:
        return self._policy

    def _begin_life(self) -> None:
        self._bell = Bell()
        self._crowd = Crowd()
        self._lock = threading.RLock()
        self._working = threading.RLock()
        self._forking = False
        self._passing: dict[Handed, int] = {}  # those between the caller and the inbox, and in whose thread
        # guarded by _lock
        self._accounts = Accounts()
        self._open, self._over = True, False
        self._expiring = False  # some are marked to end now
        self._ends: list[int] = []  # of all calls of `stop`; the earliest counts
        self._rings_at = NEVER  # that many in the inbox, and the next one wakes the loop
        self._idle_calls: deque[Callable[[], object]] = deque()
        # the loop's own
        self._taken: deque[Handed] = deque()
        self._untold: deque[Handed] = deque()
        self._busy = False

    def _open_own(self) -> None:
        self._bell.open()
        self._crowd = Crowd(waker=self._bell)

    def _close_own(self) -> None:
        self._bell.close()
        self._crowd.close()

    def __del__(self) -> None:
        self._close_own()

    # The hot side -----------------------------------------------------------------------------------------

    def intake(self) -> Intake:
        return Intake(self)

    def hand_over(
        self, sock: socket.socket, policy: Policy | None, data: memoryview | None, future: Future[Report] | None
    ) -> tuple[Report | None, bool]:
        """Owns, once the arguments are checked. Returns the Report when the socket is closed already, and whether some
        of `data` is known to be lost.
        """
        policy = self._policy if policy is None else policy
        _arguments.check_policy(policy, deadline=data is not None, blocking=False)
        c = Handed(sock, _arguments.check_socket(sock), policy, data or NOTHING, self._accounts.let_go)
        if data is not None:
            _tls.check_unencrypted(sock)
        try:
            self._passing[c] = threading.get_ident()  # before the look at _open: the loop ends only after us
            if not self._open:
                raise RuntimeError("this closer was shut down; the socket is untouched")
            if self.thread is None:
                self._start(self)
            report = self._take_over(c, future)
            return report, c.dropped or (report is not None and report.delivered is False)
        finally:
            self._passing.pop(c, None)

    def _take_over(self, c: Handed, future: Future[Report] | None) -> Report | None:
        # Owns.
        kind, done = c.policy._terms[0], self._accounts.done
        c.wake_at = time.monotonic_ns()
        try:
            if c.report is None:
                if kind != ABORT and c.wrapper is not None and _tls.is_tls(c.wrapper):
                    _tls.say_goodbye(c.wrapper)
                c.start()
            c.wrapper = None  # the caller's object is nothing to us any more
            if c.report is None and kind >= FLUSH:
                c.half_close()
                c.future = future
                if future is not None:
                    vars(future)["_handed"] = self, c  # for `expire`
                if self._push(c):
                    return None
                c.future = None
            with self._lock:  # so that no fork comes in the middle of a close
                if c.report is None and kind >= FLUSH:
                    c.shed(self._on_full == ABORTS_OLDEST)
                elif c.report is None:
                    c.leave_to_kernel(-1)
                if len(done) >= UNBOOKED and self._rings_at < NEVER:
                    self._ring()
                done.append(c)
        except BaseException:
            with self._lock:
                ours = not (c.accepted or c in self._accounts.inbox or c in done)
            if ours:
                c.give_up()
            raise
        return c.report

    def _push(self, c: Handed) -> bool:
        # Owns c when it returns True. Whoever interrupts us may exceed a limit by one.
        inbox, done = self._accounts.inbox, self._accounts.done
        with self._lock:
            full = len(inbox) + self._accounts.in_flight >= self._max_pending
            if self._over or (full and self._on_full == LEAVES_NEW):
                return False
            if c.held and c.held + self._accounts.buffered() > self._max_buffered:
                return False
            while len(inbox) >= self._max_pending:
                oldest = inbox[0]
                oldest.shed(self._on_full == ABORTS_OLDEST)
                done.append(oldest)
                with suppress(ValueError):  # somebody has interrupted us for the same
                    inbox.remove(oldest)
            if len(inbox) >= self._rings_at:
                self._ring()  # before, lest an exception leave it asleep; it comes when it gets the lock
            inbox.append(c)
        return True

    def _ring(self) -> None:
        self._bell.ring(crowd_waits=self._rings_at == 0)
        self._rings_at = NEVER

    def expire(self, future: Future[Report]) -> None:
        loop, c = vars(future).get("_handed", (None, None))
        if loop is not self:
            raise ValueError(f"future is one that submit of this closer has returned; got {future!r}")
        with self._lock:
            if c.report is None and not self._over:
                c.expires = self._expiring = True
                self._rings_at = 0  # whatever it is doing
                self._ring()

    def counters(self) -> tuple[int, int, int, int, tuple[int, ...], tuple[int, ...], int]:
        with self._lock:
            return self._accounts.counters()

    def is_open(self) -> bool:
        return self._open

    def when_idle(self, call: Callable[[], object]) -> None:
        with self._lock:
            telling = len(self._untold) > 0 and threading.current_thread() is not self.thread
            idle = not telling and self._accounts.nothing_pending()
            if not idle:
                self._idle_calls.append(call)
        if idle:
            call()

    def forget(self, call: Callable[[], object]) -> None:
        with self._lock, suppress(ValueError):  # it is being called
            self._idle_calls.remove(call)

    def stop(self, timeout: int) -> None:
        with self._lock:
            self._open = False
            if timeout >= 0:
                self._ends.append(time.monotonic_ns() + timeout)
            self._rings_at = 0  # whatever it is doing
            self._ring()
            unused = self.thread is None and not self._passing
        if unused:
            self._finish()

    # The loop -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        with self._working:
            if self._crowd.waker is None:  # a forked child's
                with suppress(OSError):
                    self._open_own()
        crowd = self._crowd
        try:
            while self._round(crowd):
                pass
        finally:
            if self._crowd is crowd:  # else a callback has forked, and this is the child
                self._finish()

    def _round(self, crowd: Crowd) -> bool:
        # Returns whether there is to be another one.
        while self._forking:  # who releases a lock for a moment only would keep it from everybody else
            time.sleep(MAKE_WAY)
        with self._working:
            self._hurry(crowd)
            n = self._take_in(crowd)
            self._expire(crowd)
        self._tell()
        if self._crowd is not crowd:
            return False
        with self._lock:
            a = self._accounts
            if not (self._open or a.inbox or a.done or a.in_flight or self._passing):
                return False
            leaving = not self._open and len(self._passing) > 0
            more = len(a.inbox) > 0 or len(crowd.again) > 0
            awake = more or leaving or self._busy or n > 0 or len(a.done) > 0
            self._rings_at = max(0, self._max_pending - a.in_flight) if awake else 0
            calls = [self._idle_calls.popleft() for _ in list(self._idle_calls)] if a.nothing_pending() else []
        for call in calls:
            call()
        patience = crowd.patience() if crowd.waker is not None else min(crowd.patience(), DEAF)
        if awake and not more:
            # There is something going on: collect for a moment, then take all of it in one go.
            self._bell.nap(min(MAKE_WAY if leaving else self._collect, patience))
        ready = crowd.wait(0.0 if awake else patience)
        self._rings_at = NEVER
        with self._working:
            crowd.serve(ready)
        self._busy = n > 0 or len(ready) > 0
        return True

    def _hurry(self, crowd: Crowd) -> None:
        # Those in flight end by the deadline of `stop`: one after the other, so that the last one is in time.
        end = min(self._ends, default=-1)
        if end < 0 or 0 <= crowd.end <= end:
            return
        crowd.end = end  # for those that come now
        n = len(crowd.by_fd)
        early = max(0, min(n * GIVE_UP_TIME, (end - time.monotonic_ns()) // GIVE_UP_SHARE))
        for place, c in enumerate(crowd.by_fd.values(), 1):
            at = end - early + early * min(n, -(-place // GIVEN_UP_AT_ONCE) * GIVEN_UP_AT_ONCE) // n
            self._end_by(crowd, c, at)

    def _expire(self, crowd: Crowd) -> None:
        if not self._expiring:
            return
        with self._lock:
            self._expiring = len(self._accounts.inbox) > 0  # there may be one of them
        now = time.monotonic_ns()
        for c in cast("list[Handed]", list(crowd.by_fd.values())):
            if c.expires:
                self._end_by(crowd, c, now)

    def _end_by(self, crowd: Crowd, c: Closing, deadline: int) -> None:
        c.deadline = min(c.deadline, deadline)
        c.wake_at = min(c.wake_at, deadline)
        if c.waiting:
            crowd.set_timer(c)

    def _take_in(self, crowd: Crowd) -> int:
        while not self._exchange(crowd):
            oldest = next(iter(crowd.by_fd.values()))
            oldest.abort = self._on_full == ABORTS_OLDEST
            crowd.turn(oldest, m.SHEDDING)
        taken = self._taken
        n = len(taken)
        while taken:
            c = taken[0]
            crowd.admit(c)
            crowd.turn(c, c.seen, c.amount)
            taken.popleft()
        self._book(crowd)
        return n

    def _exchange(self, crowd: Crowd) -> bool:
        # Book those that were closed, and take others. False: the oldest has to go first.
        self._book(crowd)
        a = self._accounts
        with self._lock:
            n = min(len(a.inbox), ACCEPTED_AT_ONCE)
            if crowd.by_fd and len(crowd.by_fd) + n > self._max_pending:
                return False
            for _ in range(n):
                c = a.inbox.popleft()
                if c.report is None:
                    c.accepted = True
                    self._taken.append(c)
                    a.in_flight += 1
                    a.held += c.held
                else:  # an exception came while it was being shed
                    a.done.append(c)
            closed = [c for c in dict.fromkeys(a.done) if not c.accepted]
            a.done.clear()
            self._enter(closed)
        for c in closed:
            c.give_up()  # an exception may have come before it was closed
        return True

    def _book(self, crowd: Crowd) -> None:
        while crowd.ended:
            ended = cast("list[Handed]", crowd.ended[:BOOKED_AT_ONCE])
            with self._lock:
                del crowd.ended[:BOOKED_AT_ONCE]
                self._accounts.in_flight -= len(ended)
                self._accounts.held -= sum(c.held for c in ended)
                self._enter(ended)

    def _enter(self, closed: list[Handed]) -> None:
        self._accounts.enter(closed)
        self._untold.extend(c for c in closed if c.future is not None)

    def _tell(self) -> None:
        untold = self._untold
        while untold and self._untold is untold:  # else a callback has forked, and this is the child
            untold[0].tell()
            untold.popleft()

    def _finish(self) -> None:
        # Owns. It is over. Should it be before its time (out of memory, a mistake of ours), the kernel gets the rest.
        crowd, a = self._crowd, self._accounts
        self._book(crowd)
        with self._lock:
            self._open, self._over = False, True
            left = dict.fromkeys(cast("list[Handed]", [*crowd.by_fd.values(), *self._taken, *a.inbox, *a.done]))
            closed = [c for c in left if c.report is None or not c.accepted]
            for queue in (crowd.by_fd, self._taken, a.inbox, a.done):
                queue.clear()
            for c in closed:
                c.give_up()
                c.report = c.report or Report(Outcome.BACKGROUND)
            a.in_flight = a.held = 0
            self._enter(closed)
            self._close_own()
        self._tell()
        while self._idle_calls:
            self._idle_calls.popleft()()

    # Fork -----------------------------------------------------------------------------------------------------

    def before_fork(self) -> None:
        self._forking = True
        self._working.acquire()
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        self._forking = False
        for lock in (self._lock, self._working):
            with suppress(RuntimeError):  # a signal handler's exception has come before we had it
                lock.release()

    def after_fork_in_child(self) -> None:
        # Its own fds are opened by `run`. Whoever forks in the middle of a hand-over will finish it, on both sides.
        me = threading.get_ident()
        left = [c for c, thread in self._passing.items() if thread != me]
        left += [*self._accounts.inbox, *self._accounts.done, *self._taken]
        left += cast("list[Handed]", self._crowd.by_fd.values())
        self._close_own()
        for c in left:
            c.give_up(_forget)
        self._begin_life()


class Intake:
    """Hands sockets to a Loop, which takes no more when nobody holds its Intake any longer."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def __del__(self) -> None:
        self._loop.stop(-1)

    def close(self, sock: socket.socket, policy: Policy | None = None) -> None:
        self._loop.hand_over(sock, policy, None, None)

    def send_and_close(self, sock: socket.socket, data: Buffer, policy: Policy | None = None) -> bool:
        _, lost = self._loop.hand_over(sock, policy, _arguments.check_data(data), None)
        return not lost

    def submit(
        self, future: Future[Report], sock: socket.socket, data: Buffer | None, policy: Policy | None
    ) -> Report | None:
        report, _ = self._loop.hand_over(sock, policy, None if data is None else _arguments.check_data(data), future)
        return report

    def expire(self, future: Future[Report]) -> None:
        self._loop.expire(future)


def _forget(fd: int) -> None:
    # Owns a copy of the parent's: nothing may be asked of the socket.
    with suppress(OSError):
        os.close(fd)
