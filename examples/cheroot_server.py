"""A WSGI server of cheroot, CherryPy's, that refuses uploads: every client gets the whole refusal.

    python examples/cheroot_server.py 8413

It answers once it has the head of a request, while the client is still sending the rest. Only the connection class is
lingerx's: a worker thread goes on with the next connection at once, and this one lingers in the background. SIGTERM
ends the server; the interpreter's exit gives one more second to connections in flight.
"""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from typing import Any

import cheroot.wsgi

from lingerx import Closer, Drain
from lingerx.cheroot import Connection

# No more than the kernel takes at once: a client that sends everything before it reads would block a bigger write.
PAGE = b"Nothing can be uploaded here.\n" * 35_000


def refuse(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    fields = [("Connection", "close"), ("Content-Type", "text/plain"), ("Content-Length", str(len(PAGE)))]
    start_response("413 Content Too Large", fields)
    return [PAGE]


class Lingering(Connection):
    closer = Closer(Drain(timeout=30.0, idle_timeout=5.0), exit_timeout=1.0)


def main(port: int) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = cheroot.wsgi.Server(("127.0.0.1", port), refuse, numthreads=4)
    server.ConnectionClass = Lingering
    server.prepare()
    print("port", server.bind_addr[1], flush=True)
    with suppress(KeyboardInterrupt):
        server.serve()
    server.stop()
    print("closed", Lingering.closer.stats().handed_over, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
