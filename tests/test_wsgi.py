"""The middleware, called as a WSGI server would: which connections it lets linger, and when."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

import pytest

from closers import LONG, CloserMaker, nonzero
from connections import DEADLINE, Ending, PairMaker, identity, still_open
from lingerx import Closer, Drain, KernelLinger, LingerSocket, Outcome
from lingerx.wsgi import LingeringMiddleware
from peers import read_to_end, send_unread
from refusals import PAGE, serving

SYNC = {"wsgi.multithread": False, "wsgi.multiprocess": False, "SERVER_PROTOCOL": "HTTP/1.1"}
"""What gunicorn's sync worker says."""
THREADS = {"wsgi.multithread": True, "wsgi.multiprocess": False, "SERVER_PROTOCOL": "HTTP/1.1"}


@pytest.fixture
def closer(closers: CloserMaker) -> Closer:
    """One whose policy outlasts every test."""
    return closers(LONG)


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("413 Content Too Large", [])
    return [b"too ", b"large"]


def serve(application: Any, environ: dict[str, Any], ours: socket.socket, key: str = "gunicorn.socket") -> None:
    """One answer, as PEP 3333 wants it; the server then closes its socket plainly."""
    body = application({**environ, key: ours}, lambda status, fields: None)
    try:
        for piece in body:
            ours.sendall(piece)
    finally:
        if hasattr(body, "close"):
            body.close()
    ours.close()


def test_answer_arrives_although_the_server_closes(closer: Closer, tcp: PairMaker) -> None:
    ours, peer = tcp()
    send_unread(peer, ours, b"never read")
    serve(LingeringMiddleware(app, closer=closer), SYNC, ours)
    assert closer.pending == 1
    assert read_to_end(peer) == Ending(9, None)
    peer.close()
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 1}


def test_without_it_the_connection_is_reset(tcp: PairMaker) -> None:
    ours, peer = tcp()
    send_unread(peer, ours, b"never read")
    serve(app, SYNC, ours)
    assert read_to_end(peer).error == errno.ECONNRESET


@pytest.mark.parametrize(
    ("environ", "lingers"),
    [
        (SYNC, True),
        (THREADS, False),
        ({**THREADS, "HTTP_CONNECTION": "Close"}, True),
        ({**THREADS, "HTTP_CONNECTION": "keep-alive"}, False),
        ({**THREADS, "HTTP_CONNECTION": "close, keep-alive"}, False),
        ({**THREADS, "SERVER_PROTOCOL": "HTTP/1.0"}, True),
        ({**THREADS, "SERVER_PROTOCOL": "HTTP/1.0", "HTTP_CONNECTION": "keep-alive"}, False),
        ({**THREADS, "SERVER_PROTOCOL": "HTTP/2.0", "HTTP_CONNECTION": "close"}, False),
    ],
)
def test_only_what_gunicorn_is_about_to_close(
    environ: dict[str, Any], lingers: bool, closer: Closer, tcp: PairMaker
) -> None:
    ours, _ = tcp()
    serve(LingeringMiddleware(app, closer=closer), environ, ours)
    assert closer.stats().handed_over == lingers


def test_werkzeug_closes_always(closer: Closer, tcp: PairMaker) -> None:
    ours, _ = tcp()
    serve(LingeringMiddleware(app, closer=closer), THREADS, ours, "werkzeug.socket")
    assert closer.stats().handed_over == 1


def test_child_of_werkzeug_s_forking_server_waits_itself(closer: Closer, tcp: PairMaker) -> None:
    """It leaves by os._exit right after the answer."""
    ours, peer = tcp()
    known = identity(ours)
    peer.shutdown(socket.SHUT_WR)
    middleware = LingeringMiddleware(app, closer=closer, policy=Drain(timeout=DEADLINE))
    serve(middleware, {**THREADS, "wsgi.multithread": False, "wsgi.multiprocess": True}, ours, "werkzeug.socket")
    assert closer.stats().handed_over == 0
    assert not still_open(known)
    assert read_to_end(peer) == Ending(9, None)


def test_servers_that_tell_no_socket_get_the_application_s_own_answer(closer: Closer) -> None:
    body = [b"x"]
    assert LingeringMiddleware(lambda *_: body, closer=closer)(SYNC, lambda *_: None) is body


def test_sockets_that_linger_anyway_or_have_tls_are_left_alone() -> None:
    body = [b"x"]
    with LingerSocket() as ours, ssl.create_default_context().wrap_socket(socket.socket(), server_hostname="x") as tls:
        for sock in (ours, tls):
            environ = {**SYNC, "gunicorn.socket": sock}
            assert LingeringMiddleware(lambda *_: body)(environ, lambda *_: None) is body
        ours.wait = True


def test_policy_and_waiting(tcp: PairMaker) -> None:
    ours, peer = tcp()
    peer.shutdown(socket.SHUT_WR)
    known = identity(ours)
    serve(LingeringMiddleware(app, policy=Drain(timeout=DEADLINE), wait=True), SYNC, ours)
    assert not still_open(known)
    assert read_to_end(peer) == Ending(9, None)


def test_close_of_the_application_s_iterable_comes_first(closer: Closer, tcp: PairMaker) -> None:
    ours, _ = tcp()
    seen = []

    class Body:
        def __iter__(self) -> Any:
            return iter([b"x"])

        def close(self) -> None:
            seen.append(closer.stats().handed_over)
            raise KeyError("the application's own")

    middleware = LingeringMiddleware(lambda *_: Body(), closer=closer)
    with pytest.raises(KeyError):
        serve(middleware, SYNC, ours)
    assert seen == [0]
    assert closer.stats().handed_over == 1


def test_application_that_raises(closer: Closer, tcp: PairMaker) -> None:
    def broken(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        raise KeyError

    with pytest.raises(KeyError):
        serve(LingeringMiddleware(broken, closer=closer), SYNC, tcp()[0])
    assert closer.stats().handed_over == 0


def test_application_that_raises_half_way(closer: Closer, tcp: PairMaker) -> None:
    """The server may have an answer of its own to send: 500."""

    def broken(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        yield b"too "
        raise KeyError

    ours, peer = tcp()
    with pytest.raises(KeyError):
        serve(LingeringMiddleware(broken, closer=closer), SYNC, ours)
    assert closer.stats().handed_over == 0
    ours.sendall(b"500")
    ours.close()
    assert read_to_end(peer) == Ending(7, None)


def test_no_copy_can_be_made(closer: Closer, tcp: PairMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, peer = tcp()

    def dup(fd: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket, "dup", dup)
    serve(LingeringMiddleware(app, closer=closer), SYNC, ours)
    assert read_to_end(peer) == Ending(9, None)


def test_closer_that_was_shut_down(closer: Closer, tcp: PairMaker) -> None:
    ours, peer = tcp()
    closer.shutdown(0.0)
    serve(LingeringMiddleware(app, closer=closer), SYNC, ours)
    assert read_to_end(peer) == Ending(9, None)


class Paused(NamedTuple):
    """What a client saw that makes pauses while it uploads, and then reads."""

    page: bytes
    sent: bool


def paused_upload(address: Any, size: int = 11_000_000) -> Paused:
    with socket.create_connection(address[:2], DEADLINE) as sock:
        sent = True
        try:
            sock.sendall(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % size)
            for _ in range(4):
                time.sleep(0.05)  # longer than werkzeug looks for more
                sock.sendall(bytes(size // 4))
        except OSError:
            sent = False
        answer = bytearray()
        with suppress(OSError):
            while data := sock.recv(65536):
                answer += data
    return Paused(bytes(answer).partition(b"\r\n\r\n")[2], sent)


@pytest.mark.slow
def test_werkzeug_s_clients_may_make_a_pause(closer: Closer) -> None:
    """By itself it reads for as long as there is something to read, and then closes."""
    werkzeug = pytest.importorskip("werkzeug.serving", reason="needs werkzeug")
    silent = type("Silent", (werkzeug.WSGIRequestHandler,), {"log": lambda *_: None})

    def refuse(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("413 Content Too Large", [("Content-Length", str(len(PAGE)))])
        return [PAGE]

    seen = []
    for application in (refuse, LingeringMiddleware(refuse, closer=closer)):
        server = werkzeug.make_server("127.0.0.1", 0, application, request_handler=silent)
        with serving(server) as address:
            seen.append(paused_upload(address))
    assert seen[0] != Paused(PAGE, True), "nothing is lost without the middleware: what is it for?"
    assert seen[1] == Paused(PAGE, True)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="policy is one of"):
        LingeringMiddleware(app, policy=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="would block"):
        LingeringMiddleware(app, policy=KernelLinger(1))
    with pytest.raises(ValueError, match="pass one of the two"):
        LingeringMiddleware(app, closer=Closer(), wait=True)
