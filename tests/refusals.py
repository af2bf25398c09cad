"""The failure that adapters are for: a server refuses an upload while it is still coming, and closes.

A client that writes its whole body before it reads, the answer, and how to run servers of socketserver in a test. No
assertion and nothing of lingerx may live here.
"""

from __future__ import annotations

import http.server
import socket
import socketserver
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from connections import DEADLINE
from peers import Call

UPLOAD = 8 << 20
HEAD = b"POST / HTTP/1.0\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % UPLOAD
REQUEST = HEAD + bytes(UPLOAD)
PAGE = bytes(range(256)) * 4096
"""1 MiB: more than the client's kernel takes while the client does not read."""
ANSWER = b"HTTP/1.0 413 Content Too Large\r\nContent-Length: %d\r\n\r\n" % len(PAGE) + PAGE


class Seen(NamedTuple):
    """By the client: whether the whole page came, and whether the upload went through."""

    whole: bool
    sent: bool


GOOD = Seen(whole=True, sent=True)


def upload(address: Any, context: ssl.SSLContext | None = None) -> Seen:
    """Write everything, then read everything, whatever went wrong while writing."""
    sock = socket.create_connection(address[:2], DEADLINE)
    if context is not None:
        sock = context.wrap_socket(sock, server_hostname="localhost")
    return finish(sock, REQUEST, PAGE)


def finish(sock: socket.socket, request: bytes, page: bytes, patience: float = DEADLINE, *, begun: bytes = b"") -> Seen:
    """Owns: write the request, or what is left of it, then read to the end, whatever went wrong while writing.

    page: what should come after the head of the answer. patience: seconds for all of it. begun: of the answer, what
    has been read already.
    """
    give_up = time.monotonic() + patience
    with sock:
        sent = True
        answer = bytearray(begun)
        try:
            sock.settimeout(patience)
            sock.sendall(request)
        except OSError:
            sent = False
        try:
            while True:
                # At least 1 ms, for 0 would mean "non-blocking": what has come is read in any case.
                sock.settimeout(max(0.001, give_up - time.monotonic()))
                if not (data := sock.recv(262144)):
                    break
                answer += data
        except OSError:
            pass
    return Seen(bytes(answer).partition(b"\r\n\r\n")[2] == page, sent)


class Refuse(http.server.BaseHTTPRequestHandler):
    """413, without a look at the body."""

    def do_POST(self) -> None:
        self.send_response(413)
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""


@contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[Any]:
    """Its address, while a thread serves. Closed afterwards."""
    with server, Call(lambda: server.serve_forever(poll_interval=0.002)):
        try:
            yield server.server_address
        finally:
            server.shutdown()
