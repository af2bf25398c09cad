"""A server of the standard library that refuses uploads: every client gets the whole refusal.

    python examples/http_server.py 8413

It answers once it has the head of a request, while the client is still sending the rest. Only the base class says that
lingerx is there: the thread of a request ends at once, and its connection lingers in the background. SIGTERM ends the
server; the interpreter's exit gives three more seconds to connections in flight.
"""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import lingerx
from lingerx.socketserver import LingeringMixIn

# No more than the kernel takes at once: a client that sends everything before it reads would block a bigger write.
PAGE = b"Nothing can be uploaded here.\n" * 35_000


class Refuse(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.send_response(413)
        self.send_header("Connection", "close")
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing: only errors are told."""


class Server(LingeringMixIn, ThreadingHTTPServer):
    policy = lingerx.Drain(timeout=30.0, idle_timeout=5.0)


def main(port: int) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), Server(("127.0.0.1", port), Refuse) as server:
        print("port", server.server_address[1], flush=True)
        server.serve_forever(poll_interval=0.1)
    print("closed", lingerx.default_closer().stats().handed_over, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
