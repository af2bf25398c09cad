"""uvicorn with the protocols of lingerx: on each parser and event loop, in worker processes, and as an example."""

from __future__ import annotations

import base64
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest

from connections import wait_until
from lingerx import KernelLinger
from refusals import GOOD

from .apps import FRESH
from .kit import (
    FEWER_UPLOADS,
    At,
    BigAnswers,
    Command,
    RefusedUploads,
    RefusedUploadsOnASlowLink,
    RefusedUploadsOverTls,
    Served,
    Server,
    answered,
    delay_beside_silent_clients,
    needs,
    record_delays,
)
from .links import Link

EXAMPLE = Path(__file__).parents[2] / "examples" / "uvicorn_app.py"

pytestmark = needs("uvicorn")


class CommandLine(Server):
    """uvicorn as people start it. Its own end is the signal that ended it."""

    packages = ("uvicorn", "h11", "httptools", "uvloop")
    exit_status = -signal.SIGTERM
    protocol = "H11Protocol"
    loop = "asyncio"
    workers = 1
    more: tuple[str, ...] = ()

    def env(self, at: At) -> Mapping[str, str]:
        # With workers uvicorn's parent never closes its listener.
        return {"PYTHONWARNINGS": "ignore::ResourceWarning"} if self.workers > 1 else {}

    def command(self, at: At) -> Command:
        plain = {"H11Protocol": "h11", "HttpToolsProtocol": "httptools", "AutoHTTPProtocol": "auto"}[self.protocol]
        words = [sys.executable, "-m", "uvicorn", "--port", str(at.port), "--no-access-log", "--loop", self.loop]
        words += ["--http", f"lingerx.uvicorn:{self.protocol}" if at.lingering else plain]
        if self.workers > 1:
            words += ["--workers", str(self.workers)]
        if at.tls is not None:
            words += ["--ssl-certfile", str(at.tls.chain), "--ssl-keyfile", str(at.tls.key)]
        return [*words, *self.more, "servers.apps:asgi"]


class TestOnH11(CommandLine, RefusedUploads, RefusedUploadsOverTls, RefusedUploadsOnASlowLink, BigAnswers):
    name = "uvicorn, h11, asyncio"

    def test_silent_clients_delay_nobody(self, loopback: Link) -> None:
        delays = []
        for lingering in (False, True):
            with self.serve(loopback, lingering=lingering) as served:
                delays.append(delay_beside_silent_clients(served, 50))
        record_delays(self.name, 50, *delays)
        assert delays[1].median < 5 * delays[0].median + 0.02


@needs("httptools")
class TestOnHttpTools(CommandLine, RefusedUploads, RefusedUploadsOverTls, BigAnswers):
    name, protocol = "uvicorn, httptools, asyncio", "HttpToolsProtocol"


class _OnUvloop(CommandLine, RefusedUploads, RefusedUploadsOverTls, BigAnswers):
    loop = "uvloop"

    # uvloop reads on while it says goodbye by TLS: nothing gets lost.
    test_without_the_adapter_answers_are_lost_over_tls = None  # type: ignore[assignment]


@needs("uvloop")
class TestOnH11AndUvloop(_OnUvloop):
    name = "uvicorn, h11, uvloop"


@needs("httptools", "uvloop")
class TestOnHttpToolsAndUvloop(_OnUvloop, RefusedUploadsOnASlowLink):
    name, protocol = "uvicorn, httptools, uvloop", "HttpToolsProtocol"


class TestWithTwoWorkers(CommandLine, RefusedUploads):
    uploads = FEWER_UPLOADS
    name, protocol, workers, loop = "uvicorn, 2 workers", "AutoHTTPProtocol", 2, "auto"
    exit_status = 0


# Its end --------------------------------------------------------------------------------------------------


class TestTheEnd(CommandLine):
    """SIGTERM while connections linger. (uvicorn ends by the signal itself: no function of atexit runs.)"""

    name = "uvicorn, its end"

    def _end(self, served: Served) -> float:
        began = time.monotonic()
        served.process.terminate()
        served.process.wait()
        return time.monotonic() - began

    def test_nothing_lingers(self, loopback: Link) -> None:
        with self.serve(loopback) as served:
            assert self._end(served) < 2.0

    @pytest.mark.parametrize(("workers", "status"), [(1, -signal.SIGTERM), (2, 0)])
    def test_client_that_goes_on_late(
        self, workers: int, status: int, loopback: Link, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """When without lingerx the process would be gone."""
        for name, value in (("workers", workers), ("exit_status", status)):
            monkeypatch.setattr(type(self), name, value)
        with self.serve(loopback) as served:
            client = answered(served, stack)
            client.wait_for_the_close()
            served.process.terminate()
            wait_until(lambda: "Waiting for connections to close" in served.process.said())
            assert client.go_on(served.page) == GOOD
            served.process.wait(2.0)

    def test_one_client_stays_silent(self, loopback: Link, stack: ExitStack) -> None:
        with self.serve(loopback) as served:
            answered(served, stack)
            assert 3.0 <= self._end(served) < 6.0

    def test_timeout_of_uvicorn_s_own_is_shorter(
        self, loopback: Link, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(type(self), "more", ("--timeout-graceful-shutdown", "1"))
        with self.serve(loopback) as served:
            answered(served, stack)
            assert self._end(served) < 3.0

    @pytest.mark.parametrize("lingering", [False, True])
    def test_connections_are_counted_as_ever(
        self, lingering: bool, loopback: Link, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """--limit-concurrency: 503 for the connection that reaches it."""
        monkeypatch.setattr(type(self), "more", ("--limit-concurrency", "2"))
        with self.serve(loopback, lingering=lingering) as served:

            def serves() -> bool:
                return get(stack.enter_context(served.connect())).startswith(b"HTTP/1.1 200 ")

            wait_until(serves, poll=0.01)  # as soon as those have gone that asked whether it accepts
            assert not serves()


def get(sock: socket.socket) -> bytes:
    """One answer, of a connection that stays open."""
    sock.sendall(b"GET /fresh HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = b""
    while not answer.endswith((FRESH, b"Service Unavailable")):
        answer += sock.recv(4096)
    return answer


# Websockets -----------------------------------------------------------------------------------------------

ECHO = """
async def app(scope, receive, send):
    assert scope["type"] == "websocket"
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept"})
    message = await receive()
    await send({"type": "websocket.send", "text": message["text"]})
    await send({"type": "websocket.close", "code": 1000})
"""
TEXT, CLOSE = 0x1, 0x8


def frame(kind: int, payload: bytes) -> bytes:
    """A client's, unmasked by a mask of zeros (RFC 6455 5.3)."""
    return bytes([0x80 | kind, 0x80 | len(payload)]) + bytes(4) + payload


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize(
    ("implementation", "package"),
    [("websockets", "websockets"), ("websockets-sansio", "websockets"), ("wsproto", "wsproto")],
)
class TestWebsockets(CommandLine):
    """The transport goes on to uvicorn's websocket protocol, and lingers when that closes it."""

    name, protocol = "uvicorn, websockets", "AutoHTTPProtocol"

    def command(self, at: At) -> Command:
        return [*super().command(at)[:-1], "--lifespan", "off", "echo:app"]

    def env(self, at: At) -> Mapping[str, str]:
        return {"PYTHONWARNINGS": "error::ResourceWarning,ignore::UserWarning"}  # uvicorn deprecates an implementation

    def test_echo_and_close(
        self,
        implementation: str,
        package: str,
        loop: str,
        loopback: Link,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for needed in (package, loop):
            if find_spec(needed) is None:
                pytest.skip(f"needs {needed}")
        (tmp_path / "echo.py").write_text(ECHO)
        monkeypatch.setattr(type(self), "more", ("--ws", implementation, "--app-dir", str(tmp_path)))
        monkeypatch.setattr(type(self), "loop", loop)
        with self.serve(loopback) as served, served.connect() as client, client.makefile("rb") as answers:
            fields = [b"Host: localhost", b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Version: 13"]
            fields.append(b"Sec-WebSocket-Key: " + base64.b64encode(bytes(16)))
            client.sendall(b"\r\n".join([b"GET / HTTP/1.1", *fields, b"", b""]))
            assert answers.readline().startswith(b"HTTP/1.1 101 ")
            while answers.readline() != b"\r\n":
                pass
            client.sendall(frame(TEXT, b"hello"))
            assert answers.read(7) == bytes([0x80 | TEXT, 5]) + b"hello"
            assert answers.read(2)[0] == 0x80 | CLOSE
            client.sendall(frame(CLOSE, (1000).to_bytes(2, "big")))
            answers.read()  # to its end: no reset


# An example -----------------------------------------------------------------------------------------------


class TestExample(CommandLine):
    """With a policy of its own."""

    name = "uvicorn, example"

    def command(self, at: At) -> Command:
        return [sys.executable, EXAMPLE, str(at.port)]

    def test_clients_that_write_everything_before_they_read(self, loopback: Link) -> None:
        with self.serve(loopback) as served:
            for _ in range(3):
                with served.connect() as client:
                    client.sendall(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % (8 << 20))
                    client.sendall(bytes(8 << 20))
                    answer = b"".join(iter(lambda: client.recv(65536), b""))
                assert len(answer) > 3 << 20
                assert answer.endswith(b"Nothing can be uploaded here.\n")


# Classes --------------------------------------------------------------------------------------------------


def test_subclass_with_wrong_terms_is_not_made() -> None:
    from lingerx.uvicorn import H11Protocol

    for wrong in ({"policy": KernelLinger(1)}, {"policy": 3}, {"closer": 3}, {"wait": True}):
        with pytest.raises((TypeError, ValueError)):
            type("Mine", (H11Protocol,), wrong)


@pytest.mark.parametrize(
    ("missing", "name", "message"),
    [
        ("uvicorn", "H11Protocol", "lingerx.uvicorn needs uvicorn (pip install 'lingerx[uvicorn]')"),
        ("httptools", "HttpToolsProtocol", "lingerx.uvicorn.HttpToolsProtocol needs httptools (pip install httptools)"),
    ],
)
def test_package_is_missing(missing: str, name: str, message: str) -> None:
    program = f"import sys; sys.modules['{missing}'] = None; import lingerx.uvicorn; lingerx.uvicorn.{name}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"ImportError: {message}" in done.stderr


def test_without_httptools_auto_is_h11() -> None:
    program = """if True:
        import sys
        sys.modules["httptools"] = None
        from lingerx.uvicorn import AutoHTTPProtocol, H11Protocol
        assert AutoHTTPProtocol is H11Protocol
    """
    subprocess.run([sys.executable, "-c", program], check=True)
