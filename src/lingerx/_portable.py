"""Does and waits, in Python: the portable engine, for PyPy, Windows and machines without a compiler.

It decides nothing: it performs what the machine answers and waits for what the machine wants, with the standard
library's modules over system calls. One driver waits, for one socket as for many. Nothing else may live here; what
the calls promise is written in `_offers`, what TLS has to say in `_tls`.

After SHUT_WR a socket is always "writable", so poll(2) cannot wait for an ACK. Edge-triggered epoll with EPOLLOUT
can: its edge comes when the kernel has seen our FIN ACKed (epoll(7); measured). Where there is no epoll, or none
to be had (EMFILE), the driver looks at the send queue from time to time instead.
"""

from __future__ import annotations

import errno
import heapq
import math
import select
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from . import _arguments, _offers, _sockopt, _tls
from . import _machine as m
from ._arguments import check_policy, check_socket
from ._ownership import Hold
from ._sockopt import NO_SOCKET
from ._status import TcpStatus
from .policy import ABORT, DRAIN, FLUSH, KERNEL_LINGER, Abort, Drain, Policy
from .report import Outcome, Report

if TYPE_CHECKING:
    from typing_extensions import Buffer

# _machine.py has its types in a file of its own.
begin: Callable[..., None] = m.begin
advance: Callable[..., int] = m.advance

DEFAULT = Drain()
OUTCOMES = tuple(Outcome)

# Windows has no MSG_DONTWAIT: there our sockets are made non-blocking, which nobody shares with us.
DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)
# MSG_MORE keeps the last bytes back until the shutdown that follows: FIN rides on them (Linux).
SEND_FLAGS = DONTWAIT | getattr(socket, "MSG_NOSIGNAL", 0) | getattr(socket, "MSG_MORE", 0)

LONGEST_WAIT = 1e6  # seconds; more is too much for poll(2), and nobody sees a wake-up in eleven days

# Where discarded input goes. Shared by all threads: nobody ever reads it.
WASTE = memoryview(bytearray(64 * 1024))


# One socket -----------------------------------------------------------------------------------------------


class Closing(Hold):
    """The machine's record of one socket (the attributes of `Closing` in `_machine_c.pxd`), and the engine's."""

    __slots__ = (
        *("abort", "broken", "budget", "deadline", "drained", "error", "fin_queued", "goal", "heard", "idle", "local"),
        *("lost", "max_bytes", "never_sent", "outcome", "patience", "polled", "queue_empty", "short", "started"),
        *("state", "unacked", "unsent", "wake_at", "want", "wants"),
        *("data", "place", "policy", "report", "tcp", "timer", "waiting", "watched"),
    )

    def __init__(self, wrapper: socket.socket | None, fd: int, policy: Policy, data: memoryview | None = None) -> None:
        super().__init__(wrapper, fd)
        self.drained = self.error = self.fin_queued = self.local = self.lost = self.outcome = self.patience = 0
        self.place = self.polled = self.state = self.unacked = self.unsent = self.wake_at = self.want = self.wants = 0
        self.started = -1  # until its begin, of which `wake_at` is the time
        self.policy = policy
        self.tcp = False
        self.watched = 0
        self.data = memoryview(b"") if data is None else data
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
            self.report = Report(Outcome.ALREADY_CLOSED, error=error.errno)
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
                flags = DONTWAIT if self.want else DONTWAIT | socket.MSG_PEEK
                got = self.raw.recv_into(WASTE, min(self.want, len(WASTE)) or 1, flags)
                return (m.INPUT, got) if got else (m.FIN, 0)
            if action == m.HALF_CLOSE:
                self.raw.shutdown(socket.SHUT_WR)
                return m.HALF_CLOSED, 0
            if action == m.COUNT:
                if self.state == m.LEAVING:
                    self.never_sent = _sockopt.never_sent(self.raw)
                return m.COUNTED, _sockopt.send_queue(self.raw, self.fin_queued)
            if action == m.SEND:
                return m.SENT, self.raw.send(self.data[-self.unsent :], SEND_FLAGS)
            error = self.raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            return self.explain(action, error) if error else (m.NO_ERROR, 0)
        except BlockingIOError:
            return (m.NO_ROOM if action == m.SEND else m.EMPTY), 0
        except OSError as trouble:
            return self.explain(action, trouble.errno or errno.EIO)

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
        elapsed = (time.monotonic_ns() - self.started) / 1e9
        unacked = None if self.unacked < 0 else self.unacked
        outcome = OUTCOMES[self.outcome]
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
            self.epoll.register(c.fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET)
            c.watched = 1

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

    def forget(self, c: Closing) -> None:
        if c.watched:
            self.selector.unregister(c.fd)

    def wait(self, seconds: float) -> list[int]:
        watched = [key.fd for key in self.selector.get_map().values()]
        if watched:
            try:
                return [key.fd for key, _ in self.selector.select(seconds)]
            except ValueError:  # Windows: select takes 512 at most; look at all of them from time to time
                seconds = min(seconds, m.OFTEN_MOST / 1e9)
        time.sleep(seconds)
        return watched

    def close(self) -> None:
        self.selector.close()


class Crowd:
    """Some sockets that close at the same time, at `end` (ns; -1: by their own limits alone) at the latest."""

    def __init__(self, closings: Sequence[Closing], end: int) -> None:
        self.closings = closings
        self.by_fd = {c.fd: c for c in closings}
        self.alive = len(closings)
        self.end = end
        self.timers: list[tuple[float, int]] = []
        self.waiter: Edges | Levels | None = None
        for place, c in enumerate(closings):
            c.place = place
            self.set_timer(c)

    def run(self) -> None:
        again: list[Closing] = []
        try:
            while self.alive:
                # Each has one turn, bounded by the machine, before anybody has a second one.
                again = [c for c in again + self.wait(bool(again)) if self.turn(c)]
        finally:
            if self.waiter is not None:
                self.waiter.close()

    def turn(self, c: Closing) -> bool:
        """Perform until the machine waits, yields or has ended. Returns whether it yields."""
        seen, amount = m.WOKEN, 0
        if c.started < 0:
            seen = m.BEGUN
            c.begin(self.end, isinstance(self.waiter, Levels) or not hasattr(select, "epoll"))
        while True:
            action = advance(c, seen, amount, time.monotonic_ns())
            if action == m.WAIT:
                self.park(c)
                return False
            if action == m.YIELD:
                return True
            if action >= m.CLOSE:
                if self.waiter is not None:
                    self.waiter.forget(c)
                c.finish(action)
                self.alive -= 1
                return False
            seen, amount = c.perform(action)

    def park(self, c: Closing) -> None:
        c.waiting = True
        if self.waiter is None:
            self.waiter = _open_waiter()
        if self.waiter.polled and not c.polled:
            c.polled, c.patience = 1, m.OFTEN
            c.wake_at = min(c.wake_at, time.monotonic_ns() + m.OFTEN)
        try:
            self.waiter.watch(c)
        except (OSError, KeyError):
            # ENOMEM, ENOSPC, or the number is not ours any more, as a look at it will show.
            c.wake_at = min(c.wake_at, time.monotonic_ns() + m.OFTEN_MOST)
        self.set_timer(c)

    def set_timer(self, c: Closing) -> None:
        if c.wake_at < c.timer:
            c.timer = c.wake_at
            heapq.heappush(self.timers, (c.timer, c.place))

    def wait(self, at_once: bool) -> list[Closing]:
        """Wait until it is somebody's turn, or look `at_once`; returns whose."""
        first = self.timers[0][0] if self.timers else 0
        seconds = 0.0 if at_once else min(max(0.0, (first - time.monotonic_ns()) / 1e9), LONGEST_WAIT)
        ready = []
        if self.waiter is not None:
            ready = [c for fd in self.waiter.wait(seconds) if (c := self.by_fd[fd]).waiting]
        elif seconds:
            time.sleep(seconds)
        now = time.monotonic_ns()
        for c in ready:
            c.waiting = False
        while self.timers and self.timers[0][0] <= now:
            at, place = heapq.heappop(self.timers)
            c = self.closings[place]
            if at == c.timer:  # else an earlier one has been set since
                c.timer = math.inf
                if c.waiting and c.wake_at <= now:
                    c.waiting = False
                    ready.append(c)
                elif c.waiting:
                    self.set_timer(c)
        return ready


def _open_waiter() -> Edges | Levels:
    with suppress(AttributeError, OSError):  # not Linux; EMFILE
        return Edges()
    return Levels()


# The calls (documented in _offers) ------------------------------------------------------------------------


def close(sock: socket.socket, policy: Policy | None = None) -> Report:
    policy = DEFAULT if policy is None else check_policy(policy)
    return _close_all([Closing(sock, check_socket(sock), policy)], policy)[0]


def close_fd(fd: int, policy: Policy | None = None) -> Report:
    policy = DEFAULT if policy is None else check_policy(policy)
    return _close_all([Closing(None, _arguments.check_fd(fd), policy)], policy)[0]


def abort(sock: socket.socket) -> Report:
    return close(sock, Abort())


def send_and_close(sock: socket.socket, data: Buffer, policy: Policy | None = None) -> Report:
    policy = DEFAULT if policy is None else check_policy(policy, deadline=True)
    view = _arguments.check_data(data)
    fd = check_socket(sock)
    if fd >= 0 and _tls.is_tls(sock):
        return _tls.send_and_close(sock, view, policy, close)
    return _close_all([Closing(sock, fd, policy, view)], policy)[0]


def close_all(
    socks: Iterable[socket.socket],
    policy: Policy | None = None,
    *,
    timeout: float | None = None,
    spread: float = 0.0,
) -> list[Report]:
    policy = DEFAULT if policy is None else check_policy(policy)
    within = _arguments.check_timeout("timeout", timeout)
    over = _arguments.check_spread(spread)
    wanted = list(socks)
    unique = {id(sock): sock for sock in wanted}
    fds: set[int] = set()
    checked = [(sock, _arguments.check_unique(check_socket(sock), fds)) for sock in unique.values()]
    closings = [Closing(sock, fd, policy) for sock, fd in checked]
    reports = dict(zip(unique, _close_all(closings, policy, within, over), strict=True))
    return [reports[id(sock)] for sock in wanted]


def _close_all(closings: list[Closing], policy: Policy, within: int = -1, spread: int = 0) -> list[Report]:
    # Owns all of them, also those that were not taken yet when an exception comes.
    started = time.monotonic_ns()
    end = started + within if within >= 0 else -1
    kind, seconds = policy._terms[:2]
    try:
        for place, c in enumerate(closings):
            start = started + spread * place // len(closings)
            c.wake_at = min(start, end) if end >= 0 else start
            if c.report is not None:
                continue
            in_time = kind != ABORT and (end < 0 or time.monotonic_ns() < end)
            if in_time and c.wrapper is not None and _tls.is_tls(c.wrapper):
                _tls.say_goodbye(c.wrapper)
            c.start()
        alive = [c for c in closings if c.report is None]
        if kind in (DRAIN, FLUSH):
            Crowd(alive, end).run()
        else:
            for c in alive:
                if spread:
                    time.sleep(max(0, c.wake_at - time.monotonic_ns()) / 1e9)
                if end >= 0:
                    # Whole seconds only. Less than one is no linger at all: rounded to 0 it would be a reset.
                    seconds = min(seconds, max(0, end - time.monotonic_ns()) // 1_000_000_000)
                c.leave_to_kernel(seconds)
    except BaseException:
        for c in closings:
            c.give_up()
        raise
    return [c.report for c in closings if c.report is not None]


def set_linger(sock: socket.socket, seconds: int) -> None:
    _sockopt.set_linger(_arguments.check_open(sock), _arguments.check_linger(seconds))


def get_linger(sock: socket.socket) -> int:
    return _sockopt.get_linger(_arguments.check_open(sock))


def tcp_status(sock: socket.socket) -> TcpStatus:
    return _sockopt.tcp_status(_arguments.check_open(sock))


for _name in _offers.OFFERS:
    globals()[_name].__doc__ = getattr(_offers, _name).__doc__
