"""gunicorn with the workers of lingerx, with its middleware, and as an example."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import lingerx
from closers import closer_over, ended_afterwards, linux
from conformance import Closer, Graceful
from connections import DEADLINE, wait_until
from lingerx import Drain, KernelLinger, Policy, Report

from .kit import (
    AT_ONCE,
    FEWER_UPLOADS,
    NO_WAITING,
    SMALL,
    At,
    Certificate,
    Command,
    RefusedUploads,
    RefusedUploadsOnASlowLink,
    RefusedUploadsOverTls,
    Server,
    answered,
    delay_beside_silent_clients,
    needs,
    record_delays,
)
from .links import Link

if find_spec("gunicorn") is not None:
    import gunicorn.config
    import gunicorn.util

    import lingerx.gunicorn

    BLOCKS = hasattr(gunicorn.util, "close_graceful")
    """Whether gunicorn itself lingers, 2 s at most, in its worker."""

EXAMPLES = Path(__file__).parents[2] / "examples"

SILENT = 50
SILENT_WITHOUT = 2
"""They already cost 4 s of waiting."""

pytestmark = needs("gunicorn")


class Gunicorn(Server):
    """gunicorn as people start it, with one worker process."""

    packages: tuple[str, ...] = ("gunicorn",)
    worker: str
    """Ours; `plain` is gunicorn's own."""
    plain: str
    app: str = "servers.apps:wsgi"
    options: Sequence[str] = ()

    def command(self, at: At) -> Command:
        kind = f"lingerx.gunicorn.{self.worker}" if at.lingering else self.plain
        tls: list[str | Path] = ["--certfile", at.tls.chain, "--keyfile", at.tls.key] if at.tls else []
        options = ["-k", kind, "-b", f"127.0.0.1:{at.port}", *self.options]
        if "control_socket_disable" in gunicorn.config.make_settings():
            options.append("--no-control-socket")
        return [sys.executable, "-m", "gunicorn", *options, *tls, self.app]


class Sync(Gunicorn):
    worker, plain = "SyncWorker", "sync"


class Threads(Gunicorn):
    worker, plain = "ThreadWorker", "gthread"


class Asgi(Gunicorn):
    worker, plain, app = "AsgiWorker", "asgi", "servers.apps:asgi"

    def command(self, at: At) -> Command:
        # Its own takes uvloop where that is installed, which over TLS reads on while it closes.
        return [*super().command(at), *([] if at.lingering else ["--asgi-loop", "asyncio"])]


class Gevent(Gunicorn):
    worker, plain = "GeventWorker", "gevent"
    packages = ("gunicorn", "gevent")


class TestSync(Sync, RefusedUploads, RefusedUploadsOverTls, RefusedUploadsOnASlowLink):
    name = "gunicorn sync, worker"


class TestThreads(Threads, RefusedUploads, RefusedUploadsOverTls, RefusedUploadsOnASlowLink):
    """(raw asks for the connection to be closed, curl does not.)"""

    name = "gunicorn gthread, worker"

    def test_keep_alive_is_as_ever(self, loopback: Link) -> None:
        with self.serve(loopback) as served, served.connect() as client:
            for _ in range(3):
                client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answer = b""
                while not answer.endswith(b"\r\n\r\nfresh\n"):
                    data = client.recv(4096)
                    assert data, answer
                    answer += data


class TestThreadsWithoutKeepAlive(Threads, RefusedUploads):
    uploads = FEWER_UPLOADS
    name, options = "gunicorn gthread --keep-alive 0, worker", ("--keep-alive", "0")


class TestAsgi(Asgi, RefusedUploads, RefusedUploadsOverTls, RefusedUploadsOnASlowLink):
    name = "gunicorn asgi, worker"


@needs("gevent")
@pytest.mark.skipif(lingerx.engine != "native", reason="the portable engine waits by what gevent replaces")
class TestGevent(Gevent, RefusedUploads, RefusedUploadsOverTls, RefusedUploadsOnASlowLink):
    name = "gunicorn gevent --keep-alive 0, worker"
    options = ("--keep-alive", "0", "-c", "python:servers.gunicorn_gevent")


class TestWorkersThatAreRecycled(Sync):
    """After every tenth request, with whatever still lingers then."""

    name, options = "gunicorn sync --max-requests 10, worker", ("--max-requests", "10")

    def test_every_answer_arrives(self, loopback: Link) -> None:
        with self.serve(loopback) as served:
            self._all_arrive(served, "raw", 40)
            assert served.process.said().count("Autorestarting worker") >= 3


class TestMiddleware(Sync, RefusedUploads):
    """gunicorn's own worker; its own close waits before it ends the worker's part."""

    uploads = FEWER_UPLOADS

    name, app = "gunicorn sync, middleware", "servers.gunicorn_apps:with_middleware"
    worker = ""

    def command(self, at: At) -> Command:
        *command, app = super().command(at._replace(lingering=False))
        return [*command, app if at.lingering else "servers.apps:wsgi"]

    def env(self, at: At) -> Mapping[str, str]:
        return {"PYTHONWARNINGS": "ignore::ResourceWarning"}  # gunicorn's own worker leaves its listener open


class TestExample(Sync):
    name = "gunicorn sync, example"
    options = ("--chdir", str(EXAMPLES))
    app = "gunicorn_app:app"

    def test_clients_that_write_everything_before_they_read(self, loopback: Link) -> None:
        with self.serve(loopback) as served:
            for _ in range(3):
                with served.connect() as client:
                    client.sendall(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % (8 << 20))
                    client.sendall(bytes(8 << 20))
                    answer = b"".join(iter(lambda: client.recv(65536), b""))
                assert len(answer) > 1 << 20
                assert answer.endswith(b"Nothing can be uploaded here.\n")


# Who waits ------------------------------------------------------------------------------------------------


class NobodyWaits(Gunicorn):
    def test_fresh_requests_do_not_wait_for_silent_clients(self, loopback: Link) -> None:
        with self.serve(loopback, answer=SMALL) as served:
            idle = delay_beside_silent_clients(served, 0)
            lingering = delay_beside_silent_clients(served, SILENT)
        with self.serve(loopback, answer=SMALL, lingering=False) as served:
            without = delay_beside_silent_clients(served, SILENT_WITHOUT)
        record_delays(f"{self.name} (without: {SILENT_WITHOUT})", SILENT, without, lingering)
        assert lingering.longest < NO_WAITING, (idle, lingering)
        assert lingering.median < 5 * idle.median + 0.02, (idle, lingering)
        if BLOCKS:
            assert without.longest > NO_WAITING, "gunicorn's worker no longer waits: what is the worker for?"


class TestNobodyWaitsForSync(Sync, NobodyWaits):
    name = "gunicorn sync, worker"


class TestNobodyWaitsForThreads(Threads, NobodyWaits):
    name = "gunicorn gthread, worker"


class TestTheEndOfAWorker(Sync):
    """SIGTERM while clients stay silent."""

    name = "gunicorn sync, worker"

    @pytest.mark.parametrize("options", [(), ("--graceful-timeout", "1"), ("--timeout", "1")], ids=" ".join)
    def test_is_bounded_and_leaves_nothing(
        self, options: tuple[str, ...], loopback: Link, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(type(self), "options", options)
        with self.serve(loopback, answer=SMALL) as served:
            for _ in range(AT_ONCE):
                answered(served, stack)
            served.process.terminate()
            served.process.wait(self.ends_within)
            said = served.process.said()
        assert "Worker exiting" in said
        assert "SIGKILL" not in said
        assert "WORKER TIMEOUT" not in said


class LeavesNoFd(Gunicorn):
    def test_worker_has_as_many_fds_as_before(self, loopback: Link) -> None:
        with self.serve(loopback) as served:
            pid = served.process.process.pid
            children = Path(f"/proc/{pid}/task/{pid}/children")
            wait_until(lambda: children.read_text() != "")  # the master listens before it forks
            [worker] = children.read_text().split()

            def sockets() -> int:
                found = 0
                for fd in Path(f"/proc/{worker}/fd").iterdir():
                    with suppress(FileNotFoundError):  # closed meanwhile
                        found += "socket:" in os.readlink(fd)
                return found

            before = sockets()
            self._all_arrive(served, "raw", 10)
            wait_until(lambda: sockets() <= before)


@linux
class TestSyncLeavesNoFd(Sync, LeavesNoFd):
    name = "gunicorn sync, worker"


@linux
class TestThreadsLeaveNoFd(Threads, LeavesNoFd):
    name = "gunicorn gthread, worker"


class TestSubclass(Sync):
    """Its policy, and a closer that the master made."""

    name = "gunicorn sync, subclass"

    def command(self, at: At) -> Command:
        return ["servers.gunicorn_apps.Patient" if "SyncWorker" in str(word) else word for word in super().command(at)]

    def test_every_answer_arrives(self, loopback: Link, certificate: Certificate) -> None:
        for tls in (None, certificate):
            with self.serve(loopback, tls=tls) as served:
                self._all_arrive(served, "raw", 10)


@linux
class TestAppThatForks(Sync):
    """With copies of its socket about, a listener's connection is closed plainly. A half-close is meant for all."""

    name, app = "gunicorn sync, app that forks", "servers.gunicorn_apps:forking"

    def test_every_answer_arrives(self, loopback: Link) -> None:
        with self.serve(loopback) as served:
            self._all_arrive(served, "raw", 10)


# In this process ------------------------------------------------------------------------------------------


class TestSocketsOfAWorker(Graceful):
    """What gunicorn's own close does to a socket that a worker has accepted."""

    @pytest.fixture
    def reporting(self, engine_name: str) -> Iterator[Any]:
        def close(self: Any, sock: socket.socket, policy: Policy | None = None) -> None:
            self.future = self.submit(sock, policy)

        with ended_afterwards(type("Reporting", (closer_over(engine_name),), {"close": close})) as make:
            yield make()

    @pytest.fixture
    def closer(self, reporting: Any) -> Closer:
        own_close = gunicorn.util.close_graceful if BLOCKS else gunicorn.util.close

        def close(sock: socket.socket, policy: Policy) -> Report:
            if sock.fileno() < 0:  # there is nothing to hand over, and nobody hears of that
                reporting.close(sock)
            else:
                conn = lingerx.gunicorn._Socket(sock.family, sock.type, sock.proto, sock.detach())
                conn.policy, conn.closer = policy, reporting
                own_close(conn)
                assert conn.fileno() == -1
            report: Report = reporting.future.result(2 * DEADLINE)
            return report

        return close


def test_apps_may_still_shut_down_their_socket(stack: ExitStack) -> None:
    ours, peer = map(stack.enter_context, socket.socketpair())
    conn = stack.enter_context(lingerx.gunicorn._Socket(ours.family, ours.type, ours.proto, ours.detach()))
    conn.shutdown(socket.SHUT_RD)
    conn.sendall(b"x")
    conn.shutdown(socket.SHUT_RDWR)
    assert conn.fileno() >= 0
    assert peer.recv(2) == b"x"
    conn.wait = True


def test_subclass_with_wrong_terms_is_not_made() -> None:
    for name, value in (("policy", KernelLinger(1)), ("policy", 3), ("closer", 3), ("exit_timeout", -1.0)):
        with pytest.raises((TypeError, ValueError)):
            type("Mine", (lingerx.gunicorn.SyncWorker,), {name: value})
    type("Mine", (lingerx.gunicorn.ThreadWorker,), {"policy": Drain(timeout=1.0), "closer": None})


@needs("gevent")
def test_gevent_worker_takes_closers_of_gevent_only() -> None:
    with pytest.raises(TypeError, match=r"closer is a lingerx\.gevent\.Closer"):
        type("Mine", (lingerx.gunicorn.GeventWorker,), {"closer": lingerx.Closer()})
    assert lingerx.gunicorn.GeventWorker is lingerx.gunicorn.GeventWorker


def test_no_such_worker() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'TornadoWorker'"):
        getattr(lingerx.gunicorn, "TornadoWorker")  # noqa: B009


@pytest.mark.parametrize(
    ("missing", "wanted", "words"),
    [
        ("gunicorn", "", "lingerx.gunicorn needs gunicorn (pip install 'lingerx[gunicorn]')"),
        ("gunicorn.workers.gasgi", ".AsgiWorker", "lingerx.gunicorn.AsgiWorker needs gunicorn 24 or later"),
        ("gevent", ".GeventWorker", "lingerx.gunicorn.GeventWorker needs gevent (pip install 'lingerx[gevent]')"),
    ],
)
def test_something_is_missing(missing: str, wanted: str, words: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; import lingerx.gunicorn; lingerx.gunicorn{wanted}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    assert f"ImportError: {words}" in done.stderr
