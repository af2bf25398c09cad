"""Performs and waits: one socket that closes, and a crowd of them, for everything in the portable engine.

A `Closing` performs what the machine answers, with the standard library's modules over system calls; a `Crowd`
waits for what the machine wants, for one socket as for many, for a given number as for those that come and go while
it runs. Nothing is decided here, arguments are not checked, and no thread is known.

After SHUT_WR a socket is always "writable", so poll(2) cannot wait for an ACK. Edge-triggered epoll with EPOLLOUT
can: its edge comes when the kernel has seen our FIN ACKed (epoll(7); measured). Where there is no epoll, or none
to be had (EMFILE), the crowd looks at the send queue from time to time instead.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import math
import select
import selectors
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from . import _machine as m
from . import _sockopt
from ._ownership import Hold
from ._sockopt import NO_SOCKET
from .policy import ABORT, DRAIN, KERNEL_LINGER, Policy
from .report import Outcome, Report

if TYPE_CHECKING:
    from typing import Protocol

    class Waker(Protocol):
        """Whatever can call a waiting crowd."""

        def fileno(self) -> int: ...
        def hear(self) -> None: ...


__all__ = ["Closing", "Crowd"]

# _machine.py has its types in a file of its own.
begin: Callable[..., None] = m.begin
advance: Callable[..., int] = m.advance
allowance: Callable[..., int] = m.allowance
look_often: Callable[..., None] = m.look_often

OUTCOMES = tuple(Outcome)

# Windows has no MSG_DONTWAIT: there our sockets are made non-blocking, which nobody shares with us.
DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)
# MSG_MORE keeps the last bytes back until the shutdown that follows: FIN rides on them (Linux).
SEND_FLAGS = DONTWAIT | getattr(socket, "MSG_NOSIGNAL", 0) | getattr(socket, "MSG_MORE", 0)

RDHUP = getattr(select, "EPOLLRDHUP", 0x2000)  # which PyPy does not name (epoll(7))

LONGEST_WAIT = 1e6  # seconds; more is too much for poll(2), and nobody sees a wake-up in eleven days
MOST_AT_ONCE = 1024  # closings whose time has come that have their turn in one round: a guess

NOTHING = memoryview(b"")

# Where discarded input goes. Shared by all threads: nobody ever reads it.
WASTE = memoryview(bytearray(64 * 1024))


# One socket -----------------------------------------------------------------------------------------------


class Closing(Hold):
    """The machine's record of one socket (the attributes of `Closing` in `_machine_c.pxd`), and the engine's."""

    __slots__ = (
        *("abort", "broken", "budget", "deadline", "drained", "error", "fin_queued", "goal", "heard", "idle", "local"),
        *("lost", "max_bytes", "never_sent", "outcome", "patience", "polled", "queue_empty", "short", "started"),
        *("state", "unacked", "unsent", "wake_at", "wants"),
        *("data", "policy", "report", "tcp", "timer", "waiting", "watched"),
    )

    def __init__(self, wrapper: socket.socket | None, fd: int, policy: Policy, data: memoryview | None = None) -> None:
        super().__init__(wrapper, fd)
        self.drained = self.error = self.fin_queued = self.local = self.lost = self.outcome = self.patience = 0
        self.abort = self.deadline = 0
        self.polled = self.state = self.unacked = self.unsent = self.wake_at = self.wants = 0
        self.started = -1  # until its begin, of which `wake_at` is the time
        self.policy = policy
        self.tcp = False
        self.watched = 0
        self.data = NOTHING if data is None else data
        self.report: Report | None = None
        self.timer: float = math.inf  # the earliest time at which the driver's heap has it
        self.waiting = True
        if fd < 0:
            lost = len(self.data)
            self.report = Report(Outcome.ALREADY_CLOSED, unacked=lost or None, lost=lost > 0)

    def start(self) -> None:
        """Take over the fd. Owns it from here on, unless there is none: then there is a report."""
        try:
            self.take()
        except OSError as error:
            if error.errno not in NO_SOCKET:
                raise
            self.report = Report(Outcome.ALREADY_CLOSED, error=error.errno, lost=len(self.data) > 0)
            return
        if not DONTWAIT:
            self.raw.setblocking(False)
        self.tcp = self.raw.family in _sockopt.TCP_FAMILIES

    def begin(self, end: int, polled: bool) -> None:
        kind, timeout, idle, max_bytes, abort, _, short = self.policy._terms
        now = self.wake_at
        timeout = min(timeout, max(0, end - now)) if end >= 0 else timeout
        goal = m.DRAINING if kind == DRAIN else m.FLUSHING
        local = self.raw.family == _sockopt.LOCAL_FAMILY
        begin(self, goal, timeout, idle, max_bytes, abort, short, len(self.data), local, polled, now)
        # The application may have set it: our close would block. Now, for macOS refuses it after a shutdown.
        with suppress(OSError):
            _sockopt.set_linger(self.raw, -1)

    def perform(self, action: int) -> tuple[int, int]:
        """One call that cannot block. Returns what to tell the machine: an event and its amount."""
        try:
            if action == m.DISCARD:
                most = allowance(self)
                flags = DONTWAIT if most else DONTWAIT | socket.MSG_PEEK
                got = self.raw.recv_into(WASTE, min(most, len(WASTE)) or 1, flags)
                return (m.INPUT, got) if got else (m.FIN, 0)
            if action == m.HALF_CLOSE:
                self.raw.shutdown(socket.SHUT_WR)
                return m.HALF_CLOSED, 0
            if action == m.COUNT:
                return m.COUNTED, self.count()
            if action == m.SEND:
                return m.SENT, self.raw.send(self.data[-self.unsent :], SEND_FLAGS)
            error = self.raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            return self.explain(action, error) if error else (m.NO_ERROR, 0)
        except BlockingIOError:
            return (m.NO_ROOM if action == m.SEND else m.EMPTY), 0
        except OSError as trouble:
            return self.explain(action, trouble.errno or errno.EIO)

    def count(self) -> int:
        """What is in the send queue."""
        queue = _sockopt.send_queue(self.raw, self.fin_queued)
        # A peer whose FIN was seen has done its part of the handshake.
        if queue == 0 and self.tcp and self.state not in (m.CONFIRMING, m.FLUSHING_ON):
            # Asked again, for the handshake may have ended in between: a 0 counts only after it.
            opening = _sockopt.opening(self.raw)
            queue = m.UNTOLD if opening else _sockopt.send_queue(self.raw, self.fin_queued)
        if queue == 1 and self.outcome == m.NOT_CONNECTED and _sockopt.no_data_sent(self.raw):
            queue = 0
        if self.state == m.LEAVING:
            self.never_sent = -1 if queue == m.UNTOLD else _sockopt.never_sent(self.raw)
        return queue

    def explain(self, action: int, error: int) -> tuple[int, int]:
        """What an errno means to the machine."""
        if self.tcp and action == m.SEND and error == errno.EPIPE:
            # EPIPE tells little. There is no connection, or not any more: recv(2) knows which.
            if _sockopt.tcp_state(self.raw) in (None, "CLOSED"):
                return m.UNCONNECTED, error
            # Or the application half-closed it before: its FIN is in the queue.
            self.fin_queued = 1
            return m.BROKEN, error
        if self.tcp and action == m.DISCARD and error == errno.ECONNRESET and _sockopt.never_heard(self.raw):
            return m.UNCONNECTED, error  # not the peer's doing: our shutdown ended an attempt to connect
        if error in (errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED):
            return m.RESET, error
        if error in (errno.ENOTCONN, errno.EINVAL):  # AF_UNIX says the latter (unix(7))
            return m.UNCONNECTED, error
        return (m.GONE if error in NO_SOCKET else m.BROKEN), error

    def finish(self, action: int) -> None:
        """Owns. The machine has ended: close as it says, and report."""
        user_timeout = self.policy._terms[5]
        if action == m.FORGET:
            self.raw.detach()
        elif action == m.CLOSE_ABORT:
            with suppress(OSError):
                _sockopt.set_linger(self.raw, 0)
        elif action == m.CLOSE_SHORT:
            _sockopt.set_tcp(self.raw, "TCP_LINGER2", -1)
        elif self.tcp and user_timeout >= 0 and self.outcome not in (m.PEER_CLOSED, m.ACKED):
            _sockopt.set_tcp(self.raw, "TCP_USER_TIMEOUT", user_timeout)
        with suppress(OSError):  # the fd is free all the same (close(2))
            self.raw.close()
        self.wake_at = time.monotonic_ns()  # it will not be woken any more: when it ended
        elapsed = (self.wake_at - self.started) / 1e9
        unacked = None if self.unacked < 0 else self.unacked
        outcome = OUTCOMES[self.outcome]
        self.data = NOTHING  # the crowd's timers may know us for a while
        self.report = Report(outcome, self.drained, unacked, elapsed, self.error or None, lost=bool(self.lost))

    def leave_to_kernel(self, seconds: int) -> None:
        """Owns. Background, Abort and KernelLinger: SO_LINGER, then close, as the kernel understands it."""
        kind, _, _, _, _, user_timeout, _ = self.policy._terms
        started = time.monotonic_ns()
        with suppress(OSError):
            _sockopt.set_linger(self.raw, 0 if kind == ABORT else seconds or -1)
        if self.tcp and user_timeout >= 0:
            _sockopt.set_tcp(self.raw, "TCP_USER_TIMEOUT", user_timeout)
        with suppress(OSError):
            if not DONTWAIT and seconds:
                self.raw.setblocking(True)  # Windows: else close fails (WSAEWOULDBLOCK), and leaves it open
            self.raw.close()
        elapsed = (time.monotonic_ns() - started) / 1e9 if kind == KERNEL_LINGER else 0.0
        self.report = Report(Outcome.ABORTED if kind == ABORT else Outcome.BACKGROUND, elapsed=elapsed)


# The driver -----------------------------------------------------------------------------------------------


class Edges:
    """Waits by edge-triggered epoll, the one that knows when our FIN was ACKed (Linux)."""

    polled = False

    def __init__(self) -> None:
        self.epoll = select.epoll()

    def watch(self, c: Closing) -> None:
        if not c.watched:  # what has happened before is reported at once: nothing can be missed
            self.epoll.register(c.fd, select.EPOLLIN | select.EPOLLOUT | RDHUP | select.EPOLLET)
            c.watched = 1

    def listen(self, waker: Waker) -> None:
        self.epoll.register(waker.fileno(), select.EPOLLIN)

    def forget(self, c: Closing) -> None:
        if c.watched:  # a copy of the fd elsewhere would keep it in the set
            with suppress(OSError):
                self.epoll.unregister(c.fd)

    def wait(self, seconds: float) -> list[int]:
        return [fd for fd, _ in self.epoll.poll(seconds)]

    def close(self) -> None:
        self.epoll.close()


class Levels:
    """Waits by poll(2), or select(2), for input and room; for an ACK there is only the time. Takes no fd."""

    polled = True

    def __init__(self) -> None:
        self.selector = selectors.PollSelector() if hasattr(select, "poll") else selectors.SelectSelector()

    def watch(self, c: Closing) -> None:
        events = selectors.EVENT_READ if c.wants & m.FOR_INPUT else 0
        events |= selectors.EVENT_WRITE if c.wants & m.FOR_ROOM else 0
        if events == c.watched:
            return
        # Without anything to watch a hang-up would still be reported, at once and for ever.
        self.forget(c)
        c.watched = 0
        if events:
            self.selector.register(c.fd, events)
        c.watched = events

    def listen(self, waker: Waker) -> None:
        self.selector.register(waker.fileno(), selectors.EVENT_READ)

    def forget(self, c: Closing) -> None:
        if c.watched:
            self.selector.unregister(c.fd)

    def wait(self, seconds: float) -> list[int]:
        watched = [key.fd for key in self.selector.get_map().values()]
        if watched:
            try:
                return [key.fd for key, _ in self.selector.select(seconds)]
            except ValueError:  # Windows: select takes 512 at most; look at all of them from time to time
                seconds = min(seconds, m.OFTEN_MOST / 1e3)
        time.sleep(seconds)
        return watched

    def close(self) -> None:
        self.selector.close()


class Crowd:
    """Sockets that close at the same time, each by its own limits and all at `end` (ns; -1: none) at the latest.

    waker: readable when somebody wants `wait` to return, until it was heard. Borrows. Who waits for it waits long:
        then OSError is raised where there is no fd left to do that rightly.
    """

    def __init__(self, end: int = -1, waker: Waker | None = None) -> None:
        self.by_fd: OrderedDict[int, Closing] = OrderedDict()
        """Those that are not closed yet, in the order in which they came."""
        self.ended: list[Closing] = []
        """Those that are, until whoever wants to know takes them away."""
        self.again: list[Closing] = []
        """Those whose turn was over before their input."""
        self.end = end
        self.timers: list[tuple[float, int, Closing]] = []
        self.count = itertools.count()
        self.waker = waker
        self.waiter: Edges | Levels | None = None
        if waker is not None:
            self.waiter = Edges() if hasattr(select, "epoll") else Levels()
            self.waiter.listen(waker)

    def admit(self, c: Closing) -> None:
        """Owns. Its first turn comes at `wake_at`, or by `turn`."""
        other = self.by_fd.get(c.fd)
        if other is not None:  # its number was closed behind our back, and is another socket's by now
            self.turn(other, m.GONE, errno.EBADF)
        self.by_fd[c.fd] = c

    def run(self) -> None:
        """Until all are closed."""
        try:
            while self.by_fd:
                self.serve(self.wait(self.patience()))
        finally:
            self.close()

    def close(self) -> None:
        """The sockets are left as they are."""
        if self.waiter is not None:
            self.waiter.close()

    def serve(self, ready: list[Closing]) -> None:
        """One turn, bounded by the machine, for everybody who is ready, before anybody has a second one."""
        again, self.again = self.again, []
        for c in again + ready:
            if c.report is None:
                self.turn(c)

    def turn(self, c: Closing, seen: int = m.WOKEN, amount: int = 0) -> None:
        """Tell the machine what was `seen`, and perform until it waits, yields or has ended."""
        c.waiting = False
        if c.started < 0:
            c.begin(self.end, not hasattr(select, "epoll") if self.waiter is None else self.waiter.polled)
            if seen == m.WOKEN:
                seen = m.BEGUN
            elif seen != m.BEGUN:
                advance(c, m.BEGUN, 0, c.started)  # which asks for what somebody has done already
        while True:
            action = advance(c, seen, amount, time.monotonic_ns())
            if action == m.WAIT:
                self.park(c)
                return
            if action == m.YIELD:
                self.again.append(c)
                return
            if action >= m.CLOSE:
                if self.waiter is not None:
                    self.waiter.forget(c)
                c.timer = math.inf
                del self.by_fd[c.fd]
                self.ended.append(c)
                c.finish(action)
                return
            seen, amount = c.perform(action)

    def park(self, c: Closing) -> None:
        c.waiting = True
        if self.waiter is None:
            self.waiter = _open_waiter()
        if self.waiter.polled and not c.polled:
            look_often(c, time.monotonic_ns())
        try:
            self.waiter.watch(c)
        except (OSError, KeyError):
            # ENOMEM, ENOSPC, or the number is not ours any more, as a look at it will show.
            c.wake_at = min(c.wake_at, time.monotonic_ns() + m.OFTEN_MOST * m.MS)
        self.set_timer(c)

    def set_timer(self, c: Closing) -> None:
        """See to it that it has a turn at its `wake_at`, which may have been moved forward."""
        if c.wake_at < c.timer:
            c.timer = c.wake_at
            heapq.heappush(self.timers, (c.timer, next(self.count), c))
            if len(self.timers) > 2 * len(self.by_fd) + 64:
                self.timers = [timer for timer in self.timers if timer[0] == timer[2].timer]
                heapq.heapify(self.timers)

    def patience(self) -> float:
        """Seconds for which nothing needs to be done, as long as nothing happens."""
        if self.again:
            return 0.0
        while self.timers and self.timers[0][0] != self.timers[0][2].timer:  # it has ended, or was set anew
            heapq.heappop(self.timers)
        if not self.timers:
            return LONGEST_WAIT
        return min(max(0.0, (self.timers[0][0] - time.monotonic_ns()) / 1e9), LONGEST_WAIT)

    def wait(self, seconds: float) -> list[Closing]:
        """Wait until it is somebody's turn, or look once for 0.0; returns whose. A call of the waker ends it too."""
        ready = []
        if self.waiter is not None:
            for fd in self.look(seconds):
                c = self.by_fd.get(fd)
                if c is None:
                    self.hear()
                elif c.waiting:
                    c.waiting = False
                    ready.append(c)
        elif seconds:
            time.sleep(seconds)
        now = time.monotonic_ns()
        most = len(ready) + MOST_AT_ONCE
        while self.timers and self.timers[0][0] <= now and len(ready) < most:
            at, _, c = heapq.heappop(self.timers)
            if at == c.timer:  # else another one has been set since
                c.timer = math.inf
                if c.waiting and c.wake_at <= now:
                    c.waiting = False
                    ready.append(c)
                elif c.waiting:
                    self.set_timer(c)
        return ready

    def look(self, seconds: float) -> list[int]:
        """The fds that something happened to, within `seconds`."""
        assert self.waiter is not None
        try:
            return self.waiter.wait(seconds)
        except OSError:
            if not self.waiter.polled:
                raise  # somebody has closed our epoll descriptor, which select.epoll cannot let go of
            # poll(2) refuses (more sockets than RLIMIT_NOFILE, ENOMEM): look at all of them, but not often.
            time.sleep(min(seconds, m.OFTEN_MOST / 1e3))
            return list(self.by_fd)

    def hear(self) -> None:
        if self.waker is not None:
            self.waker.hear()


def _open_waiter() -> Edges | Levels:
    with suppress(AttributeError, OSError):  # not Linux; EMFILE
        return Edges()
    return Levels()
