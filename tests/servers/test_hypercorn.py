"""hypercorn with the Config of lingerx: from the command line, in worker processes, by serve(), and as an example."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lingerx import Closer, Drain, KernelLinger
from lingerx.listener import LingerListener

from .hypercorn_config import VARIABLE
from .kit import (
    FEWER_UPLOADS,
    At,
    Command,
    RefusedUploads,
    RefusedUploadsOnASlowLink,
    RefusedUploadsOverTls,
    Server,
    delay_beside_silent_clients,
    needs,
    record_delays,
)
from .links import Link

if find_spec("hypercorn") is not None:
    from lingerx.hypercorn import Config

EXAMPLE = Path(__file__).parents[2] / "examples" / "hypercorn_app.py"

pytestmark = needs("hypercorn")


class CommandLine(Server):
    """hypercorn as people start it; it serves in worker processes, be it one."""

    packages = ("hypercorn", "h11")
    workers = 1
    worker_class = "asyncio"

    def command(self, at: At) -> Command:
        return [sys.executable, "-m", "hypercorn", "-c", "python:servers.hypercorn_config", "servers.apps:asgi"]

    def env(self, at: At) -> Mapping[str, str]:
        settings: dict[str, object] = {"bind": f"127.0.0.1:{at.port}", "workers": self.workers}
        settings["worker_class"] = self.worker_class
        if at.tls is not None:
            settings |= {"certfile": str(at.tls.chain), "keyfile": str(at.tls.key)}
            # With and without lingerx hypercorn logs a traceback for every client that sends on after close_notify
            # (pgjones/hypercorn#261): asyncio's wait_closed raises an SSLError.
            settings["loglevel"] = "CRITICAL"
        return {VARIABLE: json.dumps({"lingering": at.lingering, "settings": settings})}


class TestHypercorn(CommandLine, RefusedUploads, RefusedUploadsOverTls, RefusedUploadsOnASlowLink):
    name = "hypercorn, Config"

    def test_silent_clients_delay_nobody(self, loopback: Link) -> None:
        delays = []
        for lingering in (False, True):
            with self.serve(loopback, lingering=lingering) as served:
                delays.append(delay_beside_silent_clients(served, 50))
        record_delays(self.name, 50, *delays)
        assert delays[1].median < 5 * delays[0].median + 0.02


class TestHypercornWithTwoWorkers(CommandLine, RefusedUploads):
    uploads = FEWER_UPLOADS
    name, workers = "hypercorn, Config, 2 workers", 2

    # hypercorn kills the other workers as soon as the first has ended, whatever they still do.
    test_sigterm_with_lingering_connections_in_flight = None  # type: ignore[assignment]


@pytest.mark.parametrize("worker_class", ["uvloop", "trio"])
class TestWorkersThatAreNotReached(CommandLine):
    """They run as without lingerx."""

    name = "hypercorn, Config, no effect"

    def test_serves(self, worker_class: str, loopback: Link, monkeypatch: Any) -> None:
        if find_spec(worker_class) is None:
            pytest.skip(f"needs {worker_class}")
        monkeypatch.setattr(type(self), "worker_class", worker_class)
        with self.serve(loopback) as served:
            assert delay_beside_silent_clients(served, 0, requests=1).median > 0


class TestExample(Server):
    """serve(), in the process that calls it."""

    name = "hypercorn, serve()"

    def command(self, at: At) -> Command:
        return [sys.executable, "-X", "dev", EXAMPLE, str(at.port)]

    def test_clients_that_write_everything_before_they_read(self, loopback: Link) -> None:
        with self.serve(loopback) as served:
            for _ in range(3):
                with served.connect() as client:
                    client.sendall(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % (8 << 20))
                    client.sendall(bytes(8 << 20))
                    answer = b"".join(iter(lambda: client.recv(65536), b""))
                assert len(answer) > 1 << 20
                assert answer.endswith(b"Nothing can be uploaded here.\n")
            served.process.terminate()
            served.process.wait()
            assert "closed 4\n" in served.process.said()  # one to see whether it accepts


# The Config -----------------------------------------------------------------------------------------------


@pytest.fixture
def sockets_of(stack: ExitStack) -> Callable[[Any], Any]:
    """What a config makes, closed after the test."""

    def make(config: Any) -> Any:
        config.bind = "127.0.0.1:0"
        sockets = config.create_sockets()
        stack.callback(lambda: [sock.close() for sock in sockets.insecure_sockets])
        return sockets

    return make


def test_listeners_linger_in_asyncio_and_are_plain_elsewhere(sockets_of: Callable[[Any], Any]) -> None:
    """Elsewhere: where hypercorn sends them to its workers, and in trio."""
    config, policy, closer = Config(), Drain(timeout=1.0), Closer()
    config.policy, config.closer = policy, closer
    sockets = sockets_of(config)

    async def inside() -> list[socket.socket]:
        return list(sockets.insecure_sockets)

    assert [type(sock) for sock in sockets.insecure_sockets] == [socket.socket]
    for _ in range(2):
        [listener] = asyncio.run(inside())
        assert isinstance(listener, LingerListener)
        assert (listener.policy, listener.closer) == (policy, closer)


def test_wrong_terms_make_no_socket(sockets_of: Callable[[Any], Any]) -> None:
    for name, value in (("policy", KernelLinger(1)), ("policy", 3), ("closer", 3)):
        config = Config()
        setattr(config, name, value)
        with pytest.raises((TypeError, ValueError)):
            sockets_of(config)


def test_hypercorn_is_missing() -> None:
    program = "import sys; sys.modules['hypercorn'] = None; import lingerx.hypercorn"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ImportError: lingerx.hypercorn needs hypercorn (pip install 'lingerx[hypercorn]')" in done.stderr
