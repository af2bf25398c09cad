"""cheroot, with lingerx's connection class and with its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from closers import closer_over, ended_afterwards
from conformance import Closer, Graceful, Immediate
from connections import DEADLINE
from lingerx import KernelLinger, Policy, Report

from .kit import (
    FEWER_UPLOADS,
    At,
    Command,
    RefusedUploads,
    RefusedUploadsOnASlowLink,
    RefusedUploadsOverTls,
    Server,
    SilentClients,
    needs,
)

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = needs("cheroot")

PROGRAM = """if True:
    import contextlib, signal, sys
    import cheroot.wsgi
    from servers.apps import wsgi_closing

    port, lingering, *tls = sys.argv[1:]
    server = cheroot.wsgi.Server(("127.0.0.1", int(port)), wsgi_closing, numthreads=4, request_queue_size=128)
    if lingering == "True":
        import lingerx.cheroot
        server.ConnectionClass = lingerx.cheroot.Connection
    if tls:
        from cheroot.ssl.builtin import BuiltinSSLAdapter
        server.ssl_adapter = BuiltinSSLAdapter(*tls)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server.error_log = lambda *_, **__: None
    with contextlib.suppress(KeyboardInterrupt):
        server.safe_start()
"""


class Cheroot(Server):
    packages = ("cheroot",)

    def command(self, at: At) -> Command:
        tls = [] if at.tls is None else [str(at.tls.chain), str(at.tls.key)]
        return [sys.executable, "-c", PROGRAM, str(at.port), str(at.lingering), *tls]


class TestCheroot(Cheroot, RefusedUploads, RefusedUploadsOverTls, RefusedUploadsOnASlowLink, SilentClients):
    name = "cheroot"


class TestExample(RefusedUploads):
    uploads = FEWER_UPLOADS
    name = "examples/cheroot_server.py"
    packages = ("cheroot",)
    test_without_the_adapter_answers_are_lost = None  # type: ignore[assignment]

    def command(self, at: At) -> Command:
        return [sys.executable, "-X", "dev", EXAMPLES / "cheroot_server.py", str(at.port)]

    def page(self, answer: int) -> bytes:
        return b"Nothing can be uploaded here.\n" * 35_000


# In this process ------------------------------------------------------------------------------------------


class TestConnections(Graceful, Immediate):
    """What cheroot does to a connection in the end."""

    @pytest.fixture
    def reporting(self, engine_name: str) -> Iterator[Any]:
        def close(self: Any, sock: socket.socket, policy: Policy | None = None) -> None:
            self.future = self.submit(sock, policy)

        with ended_afterwards(type("Reporting", (closer_over(engine_name),), {"close": close})) as make:
            yield make()

    @pytest.fixture
    def closer(self, reporting: Any) -> Closer:
        from cheroot.server import Gateway, HTTPServer

        from lingerx.cheroot import Connection

        server = HTTPServer(("127.0.0.1", 0), Gateway)

        def close(sock: socket.socket, policy: Policy) -> Report:
            if sock.fileno() < 0:  # there is nothing to hand over, and nobody hears of that
                reporting.close(sock)
            else:
                conn = Connection(server, sock)
                conn.policy, conn.closer = policy, reporting
                conn.close()
                conn.close()
            report: Report = reporting.future.result(2 * DEADLINE)
            return report

        return close


def test_class_with_wrong_terms_is_not_made() -> None:
    from lingerx.cheroot import Connection

    for name, value in (("policy", KernelLinger(1)), ("policy", 3), ("closer", 3)):
        with pytest.raises((TypeError, ValueError)):
            type("Mine", (Connection,), {name: value})


def test_closer_was_shut_down(stack: Any, tcp: Any, engine_name: str) -> None:
    from cheroot.server import Gateway, HTTPServer

    from lingerx.cheroot import Connection

    ours, peer = tcp()
    with ended_afterwards(closer_over(engine_name)) as make:
        closer = make()
        closer.shutdown()
        conn = Connection(HTTPServer(("127.0.0.1", 0), Gateway), ours)
        conn.closer = closer
        conn.close()
    assert ours.fileno() == -1
    assert peer.recv(1) == b""


def test_connection_that_is_left_to_somebody_else(stack: Any, tcp: Any) -> None:
    """`linger` is cheroot's own word for that: a websocket tool sets it, and keeps the socket."""
    from cheroot.server import Gateway, HTTPServer

    from lingerx.cheroot import Connection

    ours, peer = tcp()
    conn = Connection(HTTPServer(("127.0.0.1", 0), Gateway), ours)
    conn.linger = True
    conn.close()
    ours.sendall(b"by websocket")
    assert peer.recv(100) == b"by websocket"
    ours.close()


def test_it_is_missing() -> None:
    program = "import sys; sys.modules['cheroot'] = None; import lingerx.cheroot"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    assert "ImportError: lingerx.cheroot needs cheroot (pip install 'lingerx[cheroot]')" in done.stderr
