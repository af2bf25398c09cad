"""The examples do what they say. Each runs as the program that it is, over each engine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from connections import DEADLINE
from peers import reset

EXAMPLES = Path(__file__).parents[1] / "examples"

UPLOAD = 8 << 20
HEAD = b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % UPLOAD
EXIT_TIMEOUT = 1.0
"""What the closer of closer_server.py gives to sockets in flight."""
ENDING = 2.0
"""Seconds that an interpreter may take for its own end on a busy machine: a guess."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to handle"),
]


every_server = pytest.mark.parametrize(
    "server",
    ["closer_server.py", "http_server.py", "asyncio_listener.py", "asyncio_server.py"],
    indirect=True,
)


@pytest.fixture
def server(engine_name: str, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """closer_server.py, or the one that the test names, which has yet to tell its port."""
    with subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", EXAMPLES / getattr(request, "param", "closer_server.py"), "0"],
        env={**os.environ, "LINGERX_ENGINE": engine_name},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def port_of(server: subprocess.Popen[str]) -> int:
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line:
        raise AssertionError(server.communicate()[1])
    return int(line.split()[1])


def connect(stack: ExitStack, port: int) -> socket.socket:
    return stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=DEADLINE))


def read_answer(sock: socket.socket) -> bytes:
    """The body, after a look at the head; ConnectionError when the connection is lost before its end."""
    answer = bytearray()
    while data := sock.recv(65536):
        answer += data
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    assert b"Content-Length: %d" % len(body) in head.split(b"\r\n")
    return body


def end(server: subprocess.Popen[str]) -> str:
    """SIGTERM; what it still had to say."""
    server.send_signal(signal.SIGTERM)
    out, err = server.communicate(timeout=DEADLINE)
    assert (server.returncode, err) == (0, "")
    return out


@every_server
def test_clients_that_write_everything_before_they_read(server: subprocess.Popen[str], stack: ExitStack) -> None:
    port = port_of(server)
    for _ in range(3):
        with connect(stack, port) as client:
            client.sendall(HEAD)
            client.sendall(bytes(UPLOAD))
            assert len(read_answer(client)) > 1 << 20
    assert end(server) == "closed 3\n"


@pytest.mark.parametrize("server", ["closer_server.py", "asyncio_listener.py", "asyncio_server.py"], indirect=True)
def test_clients_that_say_nothing_or_go_away(server: subprocess.Popen[str], stack: ExitStack) -> None:
    port = port_of(server)
    connect(stack, port)
    connect(stack, port).close()
    reset(connect(stack, port))
    half_closed = connect(stack, port)
    half_closed.shutdown(socket.SHUT_WR)
    assert half_closed.recv(1) == b""
    late = connect(stack, port)
    for piece in (HEAD[:10], HEAD[10:]):
        late.sendall(piece)
    assert read_answer(late)
    late.close()
    end(server)


def test_sigterm_while_a_client_does_not_read(server: subprocess.Popen[str], stack: ExitStack) -> None:
    client = connect(stack, port_of(server))
    client.sendall(HEAD)
    assert client.recv(1) == b"H"  # it is in flight
    began = time.monotonic()
    assert end(server) == "closed 1\n"
    assert EXIT_TIMEOUT <= time.monotonic() - began < EXIT_TIMEOUT + ENDING


@every_server
def test_sigterm_while_nothing_happens(server: subprocess.Popen[str]) -> None:
    port_of(server)
    began = time.monotonic()
    assert end(server) == "closed 0\n"
    assert time.monotonic() - began < ENDING
