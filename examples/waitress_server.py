"""A waitress server with a limit on uploads: every client gets the refusal, and can know why it was refused.

    python examples/waitress_server.py 8413

waitress calls an app when it has the whole body, so nothing of the app's answers is in danger. What is: its own answer
to a body that is longer than `max_request_body_size`, which it sends and closes while the client is still sending.
Only the listener is lingerx's. SIGTERM ends the server: no new connections, one more second for those in flight.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any

import waitress

from lingerx import Closer, Drain, create_server


def app(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"%s bytes\n" % environ.get("CONTENT_LENGTH", "0").encode()]


def main(port: int, closer: Closer) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # waitress ends by KeyboardInterrupt
    listener = create_server(("127.0.0.1", port), closer=closer)
    print("port", listener.getsockname()[1], flush=True)
    server = waitress.create_server(app, sockets=[listener], max_request_body_size=65536)
    server.run()
    for channel in list(server.active_channels.values()):  # which waitress leaves open
        channel.handle_close()
    server.close()


if __name__ == "__main__":
    with Closer(Drain(timeout=30.0, idle_timeout=5.0), exit_timeout=1.0) as closer:
        main(int(sys.argv[1]), closer)
    print("closed", closer.stats().handed_over, flush=True)
