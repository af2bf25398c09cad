"""The upload experiment: a server that refuses uploads, clients that are still sending, and who saw what.

Here live the server, the clients and the ways to close; nothing is printed. The server's code is the same
for every way to close: it reads the request's head, gives the whole answer to the kernel, and then closes.
Only the closing call differs. Everything waits under a timeout.
"""

from __future__ import annotations

import errno
import functools
import os
import selectors
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import lingerx
from lingerx import Abort, Background, Drain, Flush, KernelLinger

from .tally import Cell, Fate, Row, Seen, Served

__all__ = ["WAYS", "Settings", "UploadServer", "Way", "curl_path", "run"]

HOST = "127.0.0.1"
CLIENTS_AT_ONCE = 4  # a guess: enough to keep two cores busy, too few for them to time each other out
LONGEST_HEAD = 64 * 1024  # bytes; only our own clients knock here
PATIENCE = 5.0  # seconds beyond a timeout before we stop believing that it will be kept
PLAIN, SO_LINGER = "sock.close()", "SO_LINGER 3 s, close"
OnUpload = Callable[[str], object]
CURL_SEND_ERROR, CURL_TIMED_OUT = 55, 28  # curl(1), EXIT CODES


@dataclass(frozen=True)
class Settings:
    """uploads: per way and client. timeout: seconds for one upload."""

    uploads: int = 20
    clients: tuple[str, ...] = ("raw",)
    answer_bytes: int = 1024 * 1024
    upload_bytes: int = 8 * 1024 * 1024
    timeout: float = 10.0


@dataclass(frozen=True)
class Way:
    """One way to close. Both calls own the socket.

    send_and_close: for an answer that the kernel does not take at once, where the way has something better to
    offer than `sendall`; see `UploadServer`.
    """

    name: str
    close: Callable[[socket.socket], lingerx.Report | None]
    send_and_close: Callable[[socket.socket, memoryview], lingerx.Report] | None = None
    reports: bool = True
    lossless: bool = False
    gentle: bool = False


def _plain_close(sock: socket.socket) -> None:
    sock.close()


def _so_linger_close(sock: socket.socket) -> None:
    layout = "hh" if sys.platform == "win32" else "ii"  # struct linger
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack(layout, 1, 3))
    sock.close()


WAYS: tuple[Way, ...] = (
    Way(PLAIN, _plain_close, reports=False),
    Way(SO_LINGER, _so_linger_close, reports=False),
    Way("Background()", lambda sock: lingerx.close(sock, Background())),
    Way("Abort()", lambda sock: lingerx.close(sock, Abort())),
    Way("KernelLinger(3)", lambda sock: lingerx.close(sock, KernelLinger(3))),
    Way(
        "Flush()",
        lambda sock: lingerx.close(sock, Flush()),
        lambda sock, rest: lingerx.send_and_close(sock, rest, Flush()),
        lossless=True,
    ),
    Way(
        "Drain()",
        lambda sock: lingerx.close(sock, Drain()),
        lambda sock, rest: lingerx.send_and_close(sock, rest, Drain()),
        lossless=True,
        gentle=True,
    ),
)


@functools.lru_cache(maxsize=1)
def make_answer(size: int) -> tuple[bytes, bytes]:
    """Header and body (`size` bytes) of a refusal, in numbered lines: no shifted byte passes for whole."""
    body = b"".join(b"%015d\n" % line for line in range(size // 16 + 1))[:size]
    header = (
        b"HTTP/1.1 413 Content Too Large\r\nContent-Type: text/plain\r\n"
        b"Content-Length: %d\r\nConnection: close\r\n\r\n" % size
    )
    return header, body


class UploadServer:
    """A thread per connection, and a refusal with 413 while the client is still sending its body.

    Use it as a context manager; leaving it waits for its threads, in bounded time.

    How the answer is sent was measured (Linux 6.18). SO_SNDBUF is left alone: on loopback the kernel then
    takes 3.9 MB without waiting, so that sending 1 MiB does not depend on whether the client reads, while a
    value set by hand would be cut to net.core.wmem_max (at its usual 208 KiB, 0.5 MB fitted) and end the
    growth besides. Where the kernel does not take the whole answer at once (bigger answers, links with a
    small MTU), a client that writes before it reads, and a server that writes before it reads, wait for each
    other. The two lossless policies then give the rest to `send_and_close`, which reads while it writes and
    is a part of what they offer; all the others have `sendall`, which here gives up after half of `timeout`,
    so that the client has time left to see what came of it.
    """

    def __init__(self, way: Way, answer: bytes, timeout: float) -> None:
        self.way = way
        self.answer = answer
        self.timeout = timeout
        self.served: list[Served] = []
        self.stuck = 0
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server((HOST, 0), backlog=128)
        self._listener.setblocking(False)
        self._stopper, self._stopped = socket.socketpair()
        # Daemons: should an engine hang, that is reported, and the interpreter can end all the same.
        self._acceptor = threading.Thread(target=self._accept, name="demo-accept", daemon=True)

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    def __enter__(self) -> UploadServer:
        self._acceptor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopper.close()
        self._acceptor.join()
        self._listener.close()
        self._stopped.close()
        deadline = time.monotonic() + self.timeout + PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self.stuck = sum(thread.is_alive() for thread in self._threads)

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._stopped, selectors.EVENT_READ)
            while all(key.fileobj is not self._stopped for key, _ in selector.select()):
                try:
                    sock, _ = self._listener.accept()
                except OSError:
                    continue  # the client has gone already (accept(2))
                thread = threading.Thread(target=self._serve, args=(sock,), name="demo-serve", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, sock: socket.socket) -> None:
        """Owns."""
        with sock:  # closes what is left over when a step before the closing call fails
            sock.settimeout(self.timeout)
            request = self._read_request(sock)
            if request is None:
                return
            rest = self._send_what_fits(sock)
            if rest and self.way.send_and_close is None:
                rest = self._send_rest(sock, rest)
            # Portable closing calls look at the socket's mode: all ways start from a blocking one.
            sock.settimeout(None)
            report, trouble = None, ""
            start = time.perf_counter()
            try:
                if rest and self.way.send_and_close is not None:
                    report = self.way.send_and_close(sock, rest)
                    rest = rest[:0]
                else:
                    report = self.way.close(sock)
            except Exception as error:
                trouble = f"{type(error).__name__}: {error}"
            closing = time.perf_counter() - start
        outcome = "" if report is None else report.outcome.name
        delivered = None if report is None else report.delivered
        self.served.append(Served(request, not rest, closing, outcome, delivered, trouble))

    def _read_request(self, sock: socket.socket) -> int | None:
        """Borrows. The number in the request's path, or None when this is no client of ours."""
        head = b""
        try:
            while b"\r\n\r\n" not in head and len(head) < LONGEST_HEAD:
                data = sock.recv(4096)
                if not data:
                    return None
                head += data
            return int(head.split(b" ", 2)[1].rpartition(b"/")[2])
        except (OSError, IndexError, ValueError):
            return None

    def _send_what_fits(self, sock: socket.socket) -> memoryview:
        """Borrows. What the kernel takes without waiting is sent; the rest is returned."""
        rest = memoryview(self.answer)
        sock.setblocking(False)
        try:
            while rest:
                rest = rest[sock.send(rest) :]
        except OSError:
            pass  # would block, or the client has gone: the next call will tell
        return rest

    def _send_rest(self, sock: socket.socket, rest: memoryview) -> memoryview:
        """Borrows. Empty when `sendall` went through in time."""
        sock.settimeout(self.timeout / 2)
        try:
            sock.sendall(rest)
        except OSError:
            return rest
        return rest[:0]


def raw_upload(port: int, request: int, settings: Settings) -> Seen:
    """A client that writes its whole request before it reads, and reads on after a send error."""
    deadline = time.monotonic() + settings.timeout
    expected = b"".join(make_answer(settings.answer_bytes))
    size = settings.upload_bytes
    head = b"POST /upload/%d HTTP/1.1\r\nHost: demo\r\nContent-Length: %d\r\n\r\n" % (request, size)
    answer, send_error, timed_out = bytearray(), "", False
    with socket.create_connection((HOST, port), settings.timeout) as sock:
        try:
            sock.sendall(head + bytes(size))
        except TimeoutError:
            timed_out = True
        except OSError as error:
            send_error = _errno_name(error)
        try:
            while True:
                # 1 ms at least: 0 would mean "non-blocking". What has arrived is read in any case.
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                data = sock.recv(256 * 1024)
                if not data:
                    break
                answer += data
        except TimeoutError:
            timed_out = True
        except OSError:
            pass  # reset: what arrived is what counts
    return Seen(request, _fate(answer == expected, len(answer), timed_out), len(answer), send_error)


def curl_path() -> str | None:
    """Where curl is, or None."""
    return shutil.which("curl")


def curl_upload(port: int, request: int, settings: Settings, folder: Path) -> Seen:
    """The real curl, told not to ask first (no Expect: 100-continue)."""
    answer = folder / f"answer-{request}"
    command = [curl_path() or "curl", "-q", "-s", "-o", str(answer), "--noproxy", "*", "-H", "Expect:"]
    command += ["--data-binary", f"@{folder / 'upload'}", "--max-time", f"{settings.timeout:.3f}"]
    command += ["-w", "%{size_header} %{size_download}", f"http://{HOST}:{port}/upload/{request}"]
    try:
        done = subprocess.run(
            command,
            # A sanitizer that is preloaded for our own modules makes curl hang before its first line.
            env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=settings.timeout + PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return Seen(request, "timed_out", 0, exit_code=-1)
    body = answer.read_bytes() if answer.exists() else b""
    answer.unlink(missing_ok=True)
    received = sum(int(word) for word in done.stdout.split() if word.isdigit())
    whole = body == make_answer(settings.answer_bytes)[1]
    send_error = f"exit {done.returncode}" if done.returncode == CURL_SEND_ERROR else ""
    fate = _fate(whole and received > 0, received, done.returncode == CURL_TIMED_OUT)
    return Seen(request, fate, received, send_error, done.returncode)


def _fate(whole: bool, received: int, timed_out: bool) -> Fate:
    if whole:
        return "whole"
    if timed_out:
        return "timed_out"
    return "truncated" if received else "reset"


def _errno_name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error))


def run(settings: Settings, progress: OnUpload, ways: tuple[Way, ...] = WAYS) -> list[Row]:
    """Try every way with every client.

    progress: called with the way's name after each upload, from any thread.
    """
    with ExitStack() as stack:
        folder = None
        if "curl" in settings.clients:  # which reads from a file, and writes to others
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lingerx-demo-")))
            (folder / "upload").write_bytes(bytes(settings.upload_bytes))
        return [
            Row(
                way.name,
                tuple(_run_cell(way, client, settings, folder, progress) for client in settings.clients),
                way.reports,
                way.lossless,
                way.gentle,
            )
            for way in ways
        ]


def _run_cell(way: Way, client: str, settings: Settings, folder: Path | None, progress: OnUpload) -> Cell:
    def upload(request: int) -> Seen:
        try:
            if folder is not None and client == "curl":
                return curl_upload(server.port, request, settings, folder)
            return raw_upload(server.port, request, settings)
        finally:
            progress(way.name)

    server = UploadServer(way, b"".join(make_answer(settings.answer_bytes)), settings.timeout)
    with server, ThreadPoolExecutor(CLIENTS_AT_ONCE, "demo-client") as pool:
        try:
            seen = tuple(pool.map(upload, range(settings.uploads)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return Cell(client, seen, tuple(server.served), server.stuck)
