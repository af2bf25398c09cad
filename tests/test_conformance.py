"""The engines' own closers, and the adapters, held to what every closer must do."""

from __future__ import annotations

import socket
import socketserver
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from closers import closer_over, ended_afterwards
from conformance import Closer, Engine, Graceful, Immediate
from connections import DEADLINE, PairMaker
from lingerx import LingerSocket, Policy, Report
from lingerx.socketserver import LingeringMixIn
from lingerx.wsgi import LingeringMiddleware


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


@pytest.fixture
def reporting(engine_name: str) -> Iterator[Any]:
    """A background closer that keeps the future of what an adapter hands over."""

    def close(self: Any, sock: socket.socket, policy: Policy | None = None) -> None:
        self.future = self.submit(sock, policy)

    with ended_afterwards(type("Reporting", (closer_over(engine_name),), {"close": close})) as make:
        yield make()


def report_of(reporting: Any) -> Report:
    future: Future[Report] = reporting.future
    return future.result(2 * DEADLINE)


class TestSocketsThatLinger(Graceful):
    """The plain close() of what a listener accepts."""

    @pytest.fixture
    def closer(self, reporting: Any) -> Closer:
        def close(sock: socket.socket, policy: Policy) -> Report:
            if sock.fileno() < 0:  # close() has nothing to hand over, and nobody hears of that
                reporting.close(sock)
                return report_of(reporting)
            conn = LingerSocket(sock.family, sock.type, sock.proto, sock.detach())
            conn.policy, conn.closer = policy, reporting
            conn.close()
            return report_of(reporting)

        return close


class TestRequestsThatLinger(Graceful):
    """What a server of socketserver does when a request is over."""

    @pytest.fixture
    def closer(self, reporting: Any) -> Closer:
        class Server(LingeringMixIn, socketserver.TCPServer):
            def __init__(self) -> None:
                """It serves nobody."""

        def close(sock: socket.socket, policy: Policy) -> Report:
            server = Server()
            server.policy, server.closer = policy, reporting
            server.shutdown_request(sock)
            return report_of(reporting)

        return close


class TestCopiesThatLinger(Graceful):
    """What the WSGI middleware does when an answer has ended, before the server's own close."""

    @pytest.fixture
    def closer(self, reporting: Any) -> Closer:
        def close(sock: socket.socket, policy: Policy) -> Report:
            if sock.fileno() < 0:  # a server does not answer there
                reporting.close(sock)
                return report_of(reporting)
            app = LingeringMiddleware(lambda environ, start_response: [], policy=policy, closer=reporting)
            body: Any = app({"gunicorn.socket": sock, "wsgi.multithread": False}, lambda status, fields: None)
            assert list(body) == []
            body.close()
            sock.close()
            return report_of(reporting)

        return close
