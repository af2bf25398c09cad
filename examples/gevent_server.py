"""A server of gevent that refuses uploads: every client gets the whole refusal, and its greenlet ends at once.

    python examples/gevent_server.py 8413

It answers once it has the head of a request, while the client is still sending the rest. Only the server's class is
lingerx's. It is imported before gevent patches the standard library: that way the closer's thread remains a thread,
and holds up no greenlet. (This server would not need the patches; most programs that use gevent do.) SIGTERM ends the
server; the interpreter's exit gives one more second to connections in flight.
"""

from __future__ import annotations

import lingerx.gevent  # isort: skip
from gevent import monkey

monkey.patch_all()

import signal  # noqa: E402
import sys  # noqa: E402
from typing import Any  # noqa: E402

import gevent  # noqa: E402

from lingerx import Drain  # noqa: E402

LONGEST_HEAD = 16384
# No more than the kernel takes at once: a client that sends everything before it reads would block a bigger write.
PAGE = b"Nothing can be uploaded here.\n" * 35_000
HEAD = b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"


def refuse(sock: Any, address: Any) -> None:
    head = b""  # (A real server gives up on clients that never send one.)
    while b"\r\n\r\n" not in head and len(head) < LONGEST_HEAD:
        data = sock.recv(4096)
        if not data:
            return
        head += data
    sock.sendall(HEAD % len(PAGE) + PAGE)


def main(port: int) -> None:
    closer = lingerx.gevent.Closer(Drain(timeout=30.0, idle_timeout=5.0), exit_timeout=1.0)
    server = lingerx.gevent.StreamServer(("127.0.0.1", port), refuse)
    server.closer = closer
    gevent.signal_handler(signal.SIGTERM, server.stop)
    server.start()
    print("port", server.server_port, flush=True)
    server.serve_forever()
    print("closed", closer.stats().handed_over, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
