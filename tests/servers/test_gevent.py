"""gevent, with lingerx's servers and with its own, with its monkey patches and without."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import lingerx
from closers import ended_afterwards
from conformance import Closer, Graceful, Immediate
from connections import DEADLINE
from lingerx import KernelLinger, Policy, Report
from refusals import finish

from .kit import (
    BODY,
    FEWER_UPLOADS,
    PATIENCE,
    At,
    Command,
    RefusedUploads,
    RefusedUploadsOnASlowLink,
    RefusedUploadsOverTls,
    Server,
    SilentClients,
    needs,
)
from .links import Link

if find_spec("gevent") is not None:
    import gevent

    gevent.get_hub().loop.async_()  # what it opens once, it opens before the first test looks

EXAMPLES = Path(__file__).parents[2] / "examples"
patching = pytest.mark.skipif(lingerx.engine != "native", reason="patched by gevent it needs the native engine")

pytestmark = needs("gevent")

PROGRAM = """if True:
    import sys
    port, lingering, patched, *tls = sys.argv[1:]
    if lingering == "True":
        import lingerx.gevent
        from lingerx.gevent import StreamServer
    if patched == "True":
        from gevent import monkey
        monkey.patch_all()
    import signal
    import gevent, gevent.ssl
    from servers.apps import FRESH, PAGE, REFUSAL_HEAD
    if lingering == "False":
        from gevent.server import StreamServer

    def handle(sock, address):
        head = bytearray()
        while b"\\r\\n\\r\\n" not in head:
            data = sock.recv(4096)
            if not data:
                return
            head += data
        if head.startswith(b"POST "):
            sock.sendall(REFUSAL_HEAD + PAGE)
        else:
            sock.sendall(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\n\\r\\n" + FRESH)

    options = {}
    if tls:
        options["ssl_context"] = gevent.ssl.SSLContext(gevent.ssl.PROTOCOL_TLS_SERVER)
        options["ssl_context"].load_cert_chain(*tls)
    gevent.get_hub().NOT_ERROR += (OSError,)  # clients that go away, which gevent prints
    server = StreamServer(("127.0.0.1", int(port)), handle, **options)
    gevent.signal_handler(signal.SIGTERM, server.stop)
    server.serve_forever()
"""


class Gevent(Server):
    packages = ("gevent", "greenlet")
    patched = False

    def command(self, at: At) -> Command:
        tls = [] if at.tls is None else [str(at.tls.chain), str(at.tls.key)]
        return [sys.executable, "-c", PROGRAM, str(at.port), str(at.lingering), str(self.patched), *tls]


class TestStreamServer(Gevent, RefusedUploads, RefusedUploadsOverTls, RefusedUploadsOnASlowLink, SilentClients):
    name = "gevent, StreamServer"


@patching
class TestStreamServerPatched(Gevent, RefusedUploads, RefusedUploadsOverTls, SilentClients):
    uploads = FEWER_UPLOADS
    name, patched = "gevent, StreamServer, patch_all", True


@patching
class TestExample(RefusedUploads):
    uploads = FEWER_UPLOADS
    name = "examples/gevent_server.py"
    packages = ("gevent",)
    test_without_the_adapter_answers_are_lost = None  # type: ignore[assignment]

    def command(self, at: At) -> Command:
        return [sys.executable, EXAMPLES / "gevent_server.py", str(at.port)]

    def page(self, answer: int) -> bytes:
        return b"Nothing can be uploaded here.\n" * 35_000


# pywsgi ---------------------------------------------------------------------------------------------------

PYWSGI = """if True:
    import sys
    import gevent, gevent.pywsgi, gevent.ssl, signal
    from servers.apps import wsgi
    port, lingering, *tls = sys.argv[1:]
    WSGIServer = gevent.pywsgi.WSGIServer
    if lingering == "True":
        from lingerx.gevent import WSGIServer
    options = {}
    if tls:
        options["ssl_context"] = gevent.ssl.SSLContext(gevent.ssl.PROTOCOL_TLS_SERVER)
        options["ssl_context"].load_cert_chain(*tls)
    gevent.get_hub().NOT_ERROR += (OSError,)
    server = WSGIServer(("127.0.0.1", int(port)), wsgi, log=None, error_log=None, **options)
    gevent.signal_handler(signal.SIGTERM, server.stop)
    server.serve_forever()
"""


class TestPywsgi(Server):
    """It reads the whole announced body by itself; what gets lost are answers to requests that it cannot read."""

    name = "gevent, pywsgi"
    packages = ("gevent",)
    unreadable = b"POST /" + 20_000 * b"x" + b" HTTP/1.1\r\n\r\n" + BODY

    def command(self, at: At) -> Command:
        tls = [] if at.tls is None else [str(at.tls.chain), str(at.tls.key)]
        return [sys.executable, "-c", PYWSGI, str(at.port), str(at.lingering), *tls]

    @pytest.mark.parametrize("tls", [False, True])
    def test_requests_that_it_cannot_read(self, tls: bool, loopback: Link, certificate: Any) -> None:
        for lingering in (True, False):
            with self.serve(loopback, lingering=lingering, tls=certificate if tls else None) as served:
                seen = [finish(served.connect(), self.unreadable, b"", PATIENCE) for _ in range(10)]
                went_through = [one.sent for one in seen]
                assert all(went_through) if lingering else not all(went_through)

    def test_ordinary_requests(self, loopback: Link) -> None:
        """Keep-alive, and a body that is read."""
        with self.serve(loopback) as served, served.connect() as client, client.makefile("rb") as answers:
            for _ in range(3):
                client.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
                while answers.readline() != b"\r\n":
                    pass
                assert answers.read(6) == b"fresh\n"
            client.sendall(b"POST / HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello")
            assert answers.read().endswith(b"\r\n\r\n" + served.page)


# In this process ------------------------------------------------------------------------------------------


class TestServers(Graceful, Immediate):
    """What a server does to a connection in the end."""

    @pytest.fixture
    def reporting(self, engine_name: str) -> Iterator[Any]:
        import lingerx.gevent

        engine = import_module(f"lingerx._{engine_name}")

        def loop(*terms: Any) -> Any:
            return engine.Loop(*terms[:-1], lingerx.gevent._start)

        def close(self: Any, sock: socket.socket, policy: Policy | None = None) -> None:
            self.future = self.submit(sock, policy)

        own = {"_engine_loop": staticmethod(loop), "close": close}
        with ended_afterwards(type("Reporting", (lingerx.gevent.Closer,), own)) as make:
            yield make()

    @pytest.fixture
    def closer(self, reporting: Any) -> Closer:
        import gevent.socket

        from lingerx.gevent import StreamServer

        server = StreamServer(("127.0.0.1", 0), lambda *_: None)

        def close(sock: socket.socket, policy: Policy) -> Report:
            if sock.fileno() < 0:  # there is nothing to hand over, and nobody hears of that
                reporting.close(sock)
            else:
                kind = sock.family, sock.type, sock.proto
                server.policy, server.closer = policy, reporting
                server.do_close(gevent.socket.socket(*kind, sock.detach()))
            report: Report = reporting.future.result(2 * DEADLINE)
            return report

        return close

    # A socket of gevent's is non-blocking from the start.
    test_nonblocking_flag_of_a_shared_description_is_never_touched = None  # type: ignore[assignment]


def test_wrong_terms() -> None:
    from lingerx.gevent import StreamServer

    for name, value in (("policy", KernelLinger(1)), ("policy", 3), ("closer", 3), ("wait", True)):
        with pytest.raises((TypeError, ValueError)):
            type("Mine", (StreamServer,), {name: value})
        server = StreamServer(("127.0.0.1", 0), lambda *_: None)
        setattr(server, name, value)
        with pytest.raises((TypeError, ValueError)):
            server.start()
    closer = lingerx.Closer()
    with pytest.raises(TypeError, match=r"lingerx\.gevent\.Closer"):
        type("Mine", (StreamServer,), {"closer": closer})
    closer.shutdown()


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=2 * DEADLINE
    )


CLOSER = """if True:
    import lingerx, lingerx.gevent
    from gevent import monkey
    {patch}
    import gevent
    ticks = []

    def tick():
        while True:
            ticks.append(None)
            gevent.sleep(0.005)

    def pair():
        ours, peer = gevent.socket.socketpair()
        return monkey.get_original("socket", "socket")(fileno=ours.detach()), peer

    gevent.spawn(tick)
    gevent.sleep(0.01)
    closer = lingerx.gevent.Closer(lingerx.Drain(timeout=5.0))
    ours, peer = pair()
    gevent.spawn_later(0.1, peer.close)
    future, before = closer.submit(ours), len(ticks)
    while not future.done():
        gevent.sleep(0.01)
    assert future.result().outcome is lingerx.Outcome.PEER_CLOSED
    assert len(ticks) > before + 5, "greenlets had to wait"
    ours, peer = pair()
    closer.close(ours)
    before = len(ticks)
    closer.shutdown(0.1)
    assert len(ticks) > before + 5, "greenlets had to wait for shutdown"
    assert closer.pending == 0
    peer.close()
    {more}
    ours, peer = pair()
    lingerx.gevent.default_closer().close(ours)
    gevent.spawn_later(0.1, peer.close)
"""
WAITING = """
    ours, peer = pair()
    closer = lingerx.gevent.Closer(lingerx.Drain(timeout=5.0))
    gevent.spawn_later(0.1, peer.close)
    future, before = closer.submit(ours), len(ticks)
    assert future.result(5.0).delivered
    assert len(ticks) > before + 5, "greenlets had to wait for the result"
    ours, peer = pair()
    closer.close(ours)
    before = len(ticks)
    gevent.spawn_later(0.1, peer.close)
    assert closer.join(5.0)
    assert len(ticks) > before + 5, "greenlets had to wait for join"
    closer.shutdown()
"""


@pytest.mark.parametrize("patched", [False, pytest.param(True, marks=patching)])
def test_closer_holds_up_no_greenlet(patched: bool) -> None:
    program = CLOSER.format(patch="monkey.patch_all()" if patched else "", more=WAITING if patched else "")
    done = run(program)
    assert (done.returncode, done.stderr) == (0, "")


PLAIN_CLOSER = """if True:
    from gevent import monkey; monkey.patch_all()
    import socket, lingerx
    ours, peer = socket.socketpair()
    try:
        lingerx.Closer().close(ours)
    except RuntimeError as error:
        print(error, ours.fileno() >= 0)
    listener = lingerx.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    conn, _ = listener.accept()
    conn.close()
    assert client.recv(1) == b""
    for each in (ours, peer, listener, client):
        each.close()
"""


def test_plain_closer_where_threads_are_greenlets() -> None:
    """It would hold up the whole process. It refuses, and sockets that linger by themselves are closed plainly."""
    done = run(PLAIN_CLOSER)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("use lingerx.gevent.Closer; the socket is untouched True\n")


def test_lingerx_comes_too_late() -> None:
    done = run("from gevent import monkey; monkey.patch_all(); import lingerx.gevent; lingerx.gevent.Closer()")
    assert "RuntimeError: gevent has patched sockets before lingerx saw them" in done.stderr


def test_it_is_missing() -> None:
    program = "import sys; sys.modules['gevent'] = None; import lingerx.gevent"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    assert "ImportError: lingerx.gevent needs gevent (pip install 'lingerx[gevent]')" in done.stderr
