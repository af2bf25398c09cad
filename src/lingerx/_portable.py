"""Does and waits, in Python: the portable engine, for PyPy, Windows and machines without a compiler.

Here are its calls: they check arguments, take the sockets over and leave the rest to `_portable_crowd`. Nothing else
may live here; what the calls promise is written in `_offers`, what TLS has to say in `_tls`.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from . import _arguments, _offers, _sockopt, _tls
from ._arguments import check_policy, check_socket
from ._portable_closer import Intake as Intake
from ._portable_closer import Loop as Loop
from ._portable_crowd import Closing, Crowd
from ._status import TcpStatus
from .policy import ABORT, DRAIN, FLUSH, Abort, Drain, Policy
from .report import Report

if TYPE_CHECKING:
    from typing_extensions import Buffer

DEFAULT = Drain()


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
    if fd >= 0 and _tls.encrypts(sock):
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
    wanted = _arguments.check_many(socks)
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
            crowd = Crowd(end)
            for c in alive:
                crowd.admit(c)
                crowd.set_timer(c)
            crowd.run()
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
