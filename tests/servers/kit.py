"""How a server is tested here: as the program that it is, over real sockets, with real clients that it refuses.

To add a server, derive classes in a test module:

    @needs("uvicorn")                            # or skip_module_without("uvicorn"); where it is missing, they say so
    class Uvicorn(Server):
        name = "uvicorn, protocol"               # in the table at the end of the run
        packages = ("uvicorn", "h11")            # whose versions stand there too

        def command(self, at: At) -> Command:    # what to start: on at.port of 127.0.0.1, to serve `apps`;
            kind = "lingerx.uvicorn:H11Protocol" if at.lingering else "h11"      # with and without lingerx,
            tls = ["--ssl-certfile", at.tls.chain, "--ssl-keyfile", at.tls.key] if at.tls else []   # and with TLS
            return [sys.executable, "-m", "uvicorn", "--port", str(at.port), "--http", kind, *tls, "servers.apps:asgi"]

    class TestUvicorn(Uvicorn, RefusedUploads): ...                       # loopback, 1 MiB; SIGTERM
    class TestUvicornOverTls(Uvicorn, RefusedUploadsOverTls): ...
    class TestUvicornOnASlowLink(Uvicorn, RefusedUploadsOnASlowLink): ... # 64 KiB
    class TestUvicornWithBigAnswers(Uvicorn, BigAnswers): ...             # 16 MiB; only who reads while it writes

All classes may also be the bases of one. Other attributes: see `Server`. `serve()` is for tests of your own. The
program finds `servers.apps` and all modules of tests/ by PYTHONPATH. It must end by SIGTERM with `exit_status`,
within `ends_within` seconds; with lingerx it may say nothing of warnings and tracebacks (ResourceWarnings are errors).

Environment: LINGERX_TEST_UPLOADS, how many per test (100; 25 for variants and TLS, 20 on the slow link);
LINGERX_TEST_RECORD, see `record`: with it the servers without lingerx get as many uploads, else they stop at the first
lost answer.

Only what every server is asked may live here.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from connections import Connection, TcpState
from refusals import GOOD, UPLOAD, Seen, finish

from . import record
from .apps import ANSWER_VARIABLE, FRESH, page_of
from .links import Link, SlowLink
from .running import COMPLAINTS, Running, free_port, running

UPLOADS = int(os.environ.get("LINGERX_TEST_UPLOADS", 100))
FEWER_UPLOADS = int(os.environ.get("LINGERX_TEST_UPLOADS", 25))
"""For the same adapter once more: over TLS, in an example, with other options of its server."""
SLOW_UPLOADS = int(os.environ.get("LINGERX_TEST_UPLOADS", 20))
"""One takes 0.2 s there, however many come at once."""
BIG_UPLOADS = 10

AT_ONCE = 3
"""Clients: enough to keep two cores busy, too few for them to time each other out."""
PATIENCE = 10.0
"""Seconds for one upload."""
LONGEST = 45.0
"""Seconds for all uploads of a test; what is not done by then has not arrived."""

HEAD = b"POST /upload HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % UPLOAD
BODY = bytes(UPLOAD)
REQUEST = HEAD + BODY

SMALL = 1024
"""Bytes of an answer that a client's kernel takes, whatever else is there."""
NO_WAITING = 1.0
"""Seconds that an answer may take which waits for nobody, however busy the machine."""

Command = Sequence[str | Path]


class Certificate(NamedTuple):
    """Files of PEM: for the server the chain and the key, for clients the authority."""

    chain: Path
    key: Path
    authority: Path


class At(NamedTuple):
    """What a server is to be: on which port of 127.0.0.1, with lingerx or without, with TLS or without."""

    port: int
    lingering: bool
    tls: Certificate | None


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skips a class where one of these cannot be imported; by their names for import."""
    missing = _missing(packages)
    return pytest.mark.skipif(missing is not None, reason=missing or "")


def skip_module_without(*packages: str) -> None:
    """The same for the whole module that is being imported: it says so once, and costs nothing."""
    if missing := _missing(packages):
        pytest.skip(missing, allow_module_level=True)


def _missing(packages: Sequence[str]) -> str | None:
    missing = [package for package in packages if find_spec(package) is None]
    return f"needs {', '.join(missing)}: pip install 'lingerx[servers]'" if missing else None


# A server -------------------------------------------------------------------------------------------------


class Served(NamedTuple):
    """A server that runs, as its clients know it."""

    process: Running
    page: bytes
    tls: Certificate | None

    @property
    def link(self) -> Link:
        return self.process.link

    def connect(self) -> socket.socket:
        """A connection, on a thread that is on the server's link."""
        sock = socket.create_connection(("127.0.0.1", self.process.port), PATIENCE)
        if self.tls is None:
            return sock
        context = ssl.create_default_context(cafile=str(self.tls.authority))
        return context.wrap_socket(sock, server_hostname="localhost")


@pytest.mark.slow
@pytest.mark.timeout(120)
class Server:
    """How to start a server, with its adapter and without."""

    name: str
    packages: tuple[str, ...] = ()
    exit_status = 0
    ends_within = 8.0
    """Seconds from SIGTERM to its exit, with one connection that lingers until it may no longer."""

    def command(self, at: At) -> Command:
        """The program and its arguments."""
        raise NotImplementedError

    def env(self, at: At) -> Mapping[str, str]:
        """What it needs in its environment besides."""
        return {}

    def page(self, answer: int) -> bytes:
        """The body of its refusals; the one of `apps` is `answer` bytes long."""
        return page_of(answer)

    @contextmanager
    def serve(
        self, link: Link, *, lingering: bool = True, tls: Certificate | None = None, answer: int = 1 << 20
    ) -> Iterator[Served]:
        """The server for the length of the block. Afterwards SIGTERM, unless the block has sent one.

        answer: bytes of each refusal.
        """
        record.packages.update(self.packages)
        at = At(free_port(), lingering, tls)
        env = {ANSWER_VARIABLE: str(answer), **self.env(at)}
        with running(self.command(at), link, at.port, env) as process:
            yield Served(process, self.page(answer), tls)
            if process.process.poll() is None:
                process.terminate()
            status = process.wait(self.ends_within)
            said = process.said()
            if lingering:
                assert status == self.exit_status, f"status {status}:\n{said}"
                assert not COMPLAINTS.search(said), said

    # The two questions that all classes below ask.

    def _all_arrive(self, served: Served, client: str, count: int) -> None:
        seen = uploads(served, client, count)
        self._record(served, client, True, seen)
        assert seen == count * [GOOD] if client == "raw" else all(one.whole for one in seen) and len(seen) == count, (
            f"{seen.count(GOOD)} of {count} arrived whole and without a send error, "
            f"{sum(one.whole for one in seen)} whole; the server said:\n{served.process.said()}"
        )

    def _some_get_lost(self, served: Served, count: int) -> None:
        if record.FILE is None:
            seen = uploads(served, "raw", count, until_lost=True)
        else:
            self._record(served, "curl", False, uploads(served, "curl", count))
            seen = uploads(served, "raw", count)
        self._record(served, "raw", False, seen)
        assert seen.count(GOOD) < len(seen), "nothing is lost without the adapter: what is it for?"

    def _record(self, served: Served, client: str, lingering: bool, seen: list[Seen]) -> None:
        link = served.link.name + (", TLS" if served.tls else "")
        record.add(self.name, client, link, len(served.page), lingering, seen)


CLIENTS = ["raw", "curl"]
each_client = pytest.mark.parametrize("client", CLIENTS)


class RefusedUploads(Server):
    """What every server must do on loopback, where 1 MiB is more than a client's kernel takes unread."""

    answer = 1 << 20
    uploads = UPLOADS

    @each_client
    def test_every_answer_arrives(self, client: str, loopback: Link) -> None:
        with self.serve(loopback, answer=self.answer) as served:
            self._all_arrive(served, client, self.uploads)

    def test_without_the_adapter_answers_are_lost(self, loopback: Link) -> None:
        with self.serve(loopback, answer=self.answer, lingering=False) as served:
            self._some_get_lost(served, self.uploads)

    def test_sigterm_with_lingering_connections_in_flight(self, loopback: Link) -> None:
        """Clients that go on get all of it; one that stays silent does not keep the server."""
        with self.serve(loopback, answer=self.answer) as served, ExitStack() as stack:
            _silent, *clients = [answered(served, stack) for _ in range(1 + AT_ONCE)]
            for client in clients:
                client.wait_for_the_close()
            served.process.terminate()
            with ThreadPoolExecutor(AT_ONCE) as pool:
                seen = list(pool.map(lambda client: client.go_on(served.page), clients))
            assert seen == AT_ONCE * [GOOD], served.process.said()
            served.process.wait(self.ends_within)


class RefusedUploadsOverTls(Server):
    """The same over TLS."""

    tls_answer = 1 << 20

    @each_client
    def test_every_answer_arrives_over_tls(self, client: str, loopback: Link, certificate: Certificate) -> None:
        with self.serve(loopback, answer=self.tls_answer, tls=certificate) as served:
            self._all_arrive(served, client, FEWER_UPLOADS)

    def test_without_the_adapter_answers_are_lost_over_tls(self, loopback: Link, certificate: Certificate) -> None:
        """(Where the server itself does it right: `test_without_the_adapter_answers_are_lost_over_tls = None`.)"""
        with self.serve(loopback, answer=self.tls_answer, tls=certificate, lingering=False) as served:
            self._some_get_lost(served, FEWER_UPLOADS)


class RefusedUploadsOnASlowLink(Server):
    """The same where 64 KiB take their time."""

    slow_answer = 64 << 10

    @each_client
    def test_every_answer_arrives_on_a_slow_link(self, client: str, slow_link: SlowLink) -> None:
        with self.serve(slow_link, answer=self.slow_answer) as served:
            self._all_arrive(served, client, SLOW_UPLOADS)

    def test_without_the_adapter_answers_are_lost_on_a_slow_link(self, slow_link: SlowLink) -> None:
        with self.serve(slow_link, answer=self.slow_answer, lingering=False) as served:
            self._some_get_lost(served, SLOW_UPLOADS)


class BigAnswers(Server):
    """For adapters that own the write path: client and server both write first, far more than both kernels take."""

    big_answer = 16 << 20

    @each_client
    def test_every_big_answer_arrives(self, client: str, loopback: Link) -> None:
        with self.serve(loopback, answer=self.big_answer) as served:
            self._all_arrive(served, client, BIG_UPLOADS)


class SilentClients(Server):
    """Nobody waits for clients that keep their answered connection open."""

    silent = 4

    def test_fresh_requests_do_not_wait_for_silent_clients(self, loopback: Link) -> None:
        delays = []
        for lingering in (False, True):
            with self.serve(loopback, lingering=lingering, answer=SMALL) as served:
                delays.append(delay_beside_silent_clients(served, self.silent))
        record_delays(self.name, self.silent, *delays)
        assert delays[1].longest < NO_WAITING, delays


# Clients --------------------------------------------------------------------------------------------------


def uploads(served: Served, client: str, count: int, until_lost: bool = False) -> list[Seen]:
    """What so many clients saw, a few at a time, on the server's link; fewer when LONGEST is over.

    client: "raw" or "curl". until_lost: stop after the first that did not see the whole answer, or had a send error.
    """
    if client == "curl" and shutil.which("curl") is None:
        pytest.skip("needs curl")
    todo = list(range(count))
    seen: list[Seen] = []
    give_up = time.monotonic() + LONGEST

    with tempfile.TemporaryDirectory(prefix="lingerx-") as name:
        folder = Path(name)
        if client == "curl":
            (folder / "body").write_bytes(BODY)
        upload: Callable[[int], Seen] = (
            (lambda number: by_curl(served, folder, number)) if client == "curl" else (lambda _: by_socket(served))
        )

        def work() -> None:
            served.link.enter()
            while time.monotonic() < give_up and not (until_lost and seen.count(GOOD) < len(seen)):
                try:
                    number = todo.pop()
                except IndexError:
                    return
                seen.append(upload(number))

        with ThreadPoolExecutor(AT_ONCE) as pool:
            for future in [pool.submit(work) for _ in range(AT_ONCE)]:
                future.result()
    return seen


def by_socket(served: Served) -> Seen:
    """Writes its whole body before it reads a byte, and reads on after a send error."""
    try:
        sock = served.connect()
    except OSError:
        return Seen(whole=False, sent=False)
    return finish(sock, REQUEST, served.page, PATIENCE)


def by_curl(served: Served, folder: Path, number: int) -> Seen:
    """The real one, told not to ask first. `sent` is whether it has nothing to complain about."""
    answer = folder / f"answer-{number}"
    scheme = "http" if served.tls is None else "https"
    command: list[str | Path] = ["curl", "-q", "-s", "--http1.1", "--noproxy", "*", "-o", answer, "-H", "Expect:"]
    command += ["--data-binary", f"@{folder / 'body'}", "--max-time", str(PATIENCE)]
    if served.tls is not None:
        command += ["--cacert", served.tls.authority]
    command.append(f"{scheme}://localhost:{served.process.port}/upload")
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=2 * PATIENCE)
    body = answer.read_bytes() if answer.exists() else b""
    answer.unlink(missing_ok=True)
    return Seen(body == served.page, done.returncode == 0)


class Answered(NamedTuple):
    """A client that has sent a part of its request, and whose answer has begun to come."""

    sock: socket.socket
    rest: bytes
    begun: bytes

    def go_on(self, page: bytes) -> Seen:
        """Owns: sends the rest, then reads all."""
        return finish(self.sock, self.rest, page, PATIENCE, begun=self.begun)

    def wait_for_the_close(self) -> None:
        """Until the server has half-closed its side, or closed it; at once where the kernel has no table to ask."""
        if sys.platform == "linux":
            near, far = Connection.of(self.sock)
            Connection(far, near).wait_for(TcpState.FIN_WAIT1, TcpState.FIN_WAIT2, None)


def answered(served: Served, stack: ExitStack, body: int = 65536) -> Answered:
    """One such client; `stack` owns its socket. body: bytes of it that it has sent."""

    def make() -> Answered:
        sock = stack.enter_context(served.connect())
        sock.sendall(HEAD + BODY[:body])
        return Answered(sock, BODY[body:], sock.recv(1))

    return served.link.call(make)


# Who waits ------------------------------------------------------------------------------------------------


class Delay(NamedTuple):
    """Seconds that a short answer took."""

    median: float
    longest: float


def delay_beside_silent_clients(served: Served, silent: int, requests: int = 50) -> Delay:
    """How long a fresh GET takes while so many answered clients neither send, nor read, nor close."""

    def get() -> float:
        began = time.perf_counter()
        with served.connect() as sock:
            sock.sendall(b"GET /fresh HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = b"".join(itertools.takewhile(bool, iter(lambda: sock.recv(4096), None)))
        assert answer.endswith(b"\r\n\r\n" + FRESH), answer
        return time.perf_counter() - began

    with ExitStack() as stack:
        for _ in range(silent):
            answered(served, stack)
        times = served.link.call(lambda: [get() for _ in range(requests)])
    return Delay(statistics.median(times), max(times))


def record_delays(name: str, silent: int, without: Delay, lingering: Delay) -> None:
    """Adds a line to the table."""
    words = [f"{1e3 * delay.median:.1f} ms (longest {1e3 * delay.longest:.1f})" for delay in (without, lingering)]
    record.delays.append(f"{name}: GET beside {silent} silent clients: without {words[0]}, with lingerx {words[1]}")
