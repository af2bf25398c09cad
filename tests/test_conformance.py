"""The engines' own closers, held to what every closer must do."""

from __future__ import annotations

import socket

import pytest

from conformance import Closer, Engine, Graceful, Immediate
from connections import PairMaker
from lingerx import Policy, Report


@pytest.fixture(params=["close", "close_fd", "close_all_of_one", "close_all_of_several"])
def closer(request: pytest.FixtureRequest, engine: Engine, tcp: PairMaker) -> Closer:
    """Each way to close that takes every policy."""

    def close_fd(sock: socket.socket, policy: Policy) -> Report:
        # There is no number to pass for a closed socket, and close_fd refuses -1.
        return engine.close(sock, policy) if sock.fileno() < 0 else engine.close_fd(sock.detach(), policy)

    def close_all_of_one(sock: socket.socket, policy: Policy) -> Report:
        [report] = engine.close_all([sock], policy)
        return report

    def close_all_of_several(sock: socket.socket, policy: Policy) -> Report:
        (before, closed), (after, half_closed) = tcp(), tcp()
        closed.close()
        half_closed.shutdown(socket.SHUT_WR)
        reports = engine.close_all([before, sock, after], policy)
        assert len(reports) == 3
        assert before.fileno() == after.fileno() == -1
        return reports[1]

    closers: dict[str, Closer] = {
        "close": engine.close,
        "close_fd": close_fd,
        "close_all_of_one": close_all_of_one,
        "close_all_of_several": close_all_of_several,
    }
    return closers[request.param]


class TestClosing(Graceful, Immediate):
    """close, close_fd and close_all."""


class TestSendingAndClosing(Graceful):
    """send_and_close, with nothing left to send."""

    @pytest.fixture
    def closer(self, engine: Engine) -> Closer:
        return lambda sock, policy: engine.send_and_close(sock, b"", policy)
