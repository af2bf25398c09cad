"""`LingeringMixIn`: servers of the standard library refuse uploads, and every client gets the whole refusal."""

from __future__ import annotations

import http.server
import os
import socket
import socketserver
import ssl
import wsgiref.simple_server
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import lingerx
from closers import LONG, CloserMaker, nonzero, output_of, start_program
from connections import DEADLINE, wait_until
from lingerx import KernelLinger, Outcome
from lingerx.closer import Closer
from lingerx.socketserver import LingeringMixIn
from peers import read_to_end
from refusals import GOOD, PAGE, Refuse, serving, upload

UPLOADS = 3


@pytest.fixture
def closer(closers: CloserMaker) -> Closer:
    """One whose policy outlasts every test."""
    return closers(LONG)


def lingering(server: type, closer: Closer | None) -> Any:
    """That server's class with the mixin in front; without it for None."""
    return server if closer is None else type("Server", (LingeringMixIn, server), {"closer": closer})


class Greet(socketserver.StreamRequestHandler):
    """Sends a word, reads nothing."""

    def handle(self) -> None:
        self.wfile.write(b"hello")


@pytest.mark.parametrize("server", [http.server.HTTPServer, http.server.ThreadingHTTPServer])
def test_uploads_are_refused(server: type, closer: Closer) -> None:
    with serving(lingering(server, closer)(("127.0.0.1", 0), Refuse)) as address:
        assert [upload(address) for _ in range(UPLOADS)] == UPLOADS * [GOOD]
    wait_until(lambda: closer.stats().handed_over == UPLOADS)
    with serving(lingering(server, None)(("127.0.0.1", 0), Refuse)) as address:
        assert GOOD not in [upload(address) for _ in range(UPLOADS)]


def refuse(environ: Any, start_response: Callable[..., Any]) -> Iterable[bytes]:
    """The same as a WSGI application."""
    start_response("413 Content Too Large", [("Content-Length", str(len(PAGE)))])
    return [PAGE]


class QuietWsgi(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""


def test_wsgiref(closer: Closer) -> None:
    def make(with_closer: Closer | None) -> Any:
        kind = lingering(wsgiref.simple_server.WSGIServer, with_closer)
        return wsgiref.simple_server.make_server("127.0.0.1", 0, refuse, kind, QuietWsgi)

    with serving(make(closer)) as address:
        assert [upload(address) for _ in range(UPLOADS)] == UPLOADS * [GOOD]
    with serving(make(None)) as address:
        assert GOOD not in [upload(address) for _ in range(UPLOADS)]


def test_tls(closer: Closer) -> None:
    trustme = pytest.importorskip("trustme", reason="trustme makes the certificates")
    authority = trustme.CA()
    ours, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.issue_cert("localhost").configure_cert(ours)
    authority.configure_trust(client)
    for kind in (lingering(http.server.HTTPServer, closer), http.server.HTTPServer):
        server = kind(("127.0.0.1", 0), Refuse)
        server.socket = ours.wrap_socket(server.socket, server_side=True)
        with serving(server) as address:
            seen = [upload(address, client) for _ in range(UPLOADS)]
        assert seen == UPLOADS * [GOOD] if kind is not http.server.HTTPServer else GOOD not in seen


def test_serial_server_does_not_wait_for_silent_clients(closer: Closer) -> None:
    with serving(lingering(socketserver.TCPServer, closer)(("127.0.0.1", 0), Greet)) as address:
        clients = [socket.create_connection(address, DEADLINE) for _ in range(5)]
        assert [read_to_end(client).received for client in clients] == 5 * [5]
        wait_until(lambda: closer.pending == 5)
    for client in clients:
        client.close()
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 5}


def test_refused_requests_linger_too(closer: Closer) -> None:
    server = lingering(socketserver.TCPServer, closer)(("127.0.0.1", 0), Greet)
    server.verify_request = lambda *_: False
    with serving(server) as address, socket.create_connection(address, DEADLINE) as client:
        assert client.recv(1) == b""
        wait_until(lambda: closer.stats().handed_over == 1)


def test_close_request_is_called_as_ever(closer: Closer) -> None:
    closed = []

    class Server(LingeringMixIn, socketserver.TCPServer):
        def close_request(self, request: Any) -> None:
            closed.append(request.fileno())
            super().close_request(request)

    Server.closer = closer
    with serving(Server(("127.0.0.1", 0), Greet)) as address, socket.create_connection(address, DEADLINE) as client:
        assert read_to_end(client).received == 5
    assert closed == [-1]


def test_closer_was_shut_down(closer: Closer) -> None:
    closer.shutdown()
    server = lingering(socketserver.TCPServer, closer)(("127.0.0.1", 0), Greet)
    with serving(server) as address, socket.create_connection(address, DEADLINE) as client:
        assert read_to_end(client).received == 5


def test_datagrams_are_none_of_our_business(closer: Closer) -> None:
    class Echo(socketserver.DatagramRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.read())

    server = lingering(socketserver.UDPServer, closer)(("127.0.0.1", 0), Echo)
    with serving(server) as address, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(DEADLINE)
        client.sendto(b"hello", address)
        assert client.recv(100) == b"hello"
    assert closer.stats().handed_over == 0


def test_listener_and_mixin_together(closer: Closer) -> None:
    server = lingering(socketserver.TCPServer, closer)(("127.0.0.1", 0), Greet)
    server.socket = lingerx.wrap_listener(server.socket, closer=closer)
    with serving(server) as address, socket.create_connection(address, DEADLINE) as client:
        assert read_to_end(client).received == 5
    assert closer.stats().handed_over == 1


def test_class_with_wrong_terms_is_not_made() -> None:
    with pytest.raises(ValueError, match="would block"):
        type("Server", (LingeringMixIn, socketserver.TCPServer), {"policy": KernelLinger(3)})


# In a process of its own: a fork in the tests' own, which has threads, is deprecated.
FORKING = """
import http.server, socketserver, sys, threading
import lingerx, lingerx.socketserver
sys.path.insert(0, sys.argv[1])
from refusals import Refuse

class Server({bases}):
    pass

with Server(("127.0.0.1", 0), Refuse) as server:
    {prepare}
    print(server.server_address[1], flush=True)
    for _ in range(3):
        server.handle_request()
print(threading.active_count())
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("how", ["mixin", "listener", "both", "neither"])
def test_forking_server(engine_name: str, how: str) -> None:
    bases = "socketserver.ForkingMixIn, http.server.HTTPServer"
    if how in ("mixin", "both"):
        bases = f"lingerx.socketserver.LingeringMixIn, {bases}"
    prepare = "server.socket = lingerx.wrap_listener(server.socket)" if how in ("listener", "both") else ""
    program = FORKING.format(bases=bases, prepare=prepare)
    with start_program(engine_name, program, Path(__file__).parent) as process:
        assert process.stdout is not None
        port = process.stdout.readline()
        if not port:
            pytest.fail(process.communicate()[1])
        seen = [upload(("127.0.0.1", int(port))) for _ in range(UPLOADS)]
        assert seen == UPLOADS * [GOOD] if how != "neither" else GOOD not in seen
        assert output_of(process) == "1\n", "the parent needs no closer"
