"""A trio server that refuses uploads: every client gets the whole refusal, and no task waits for it.

    python examples/trio_server.py 8413

It answers once it has the head of a request, while the client is still sending the rest. `stream.send_all` would wait
for a client that does not read before it has sent everything, and closing then would reset the connection. The closer
sends, discards what comes, and closes; the handler is done at once. SIGTERM ends the server: no new connections, one
more second for those in flight.
"""

from __future__ import annotations

import signal
import sys

import trio

from lingerx import Closer, Drain
from lingerx.trio import LingeringStream, lingering

LONGEST_HEAD = 16384
PAGE = b"Nothing can be uploaded here.\n" * 100_000  # more than the kernel takes at once: the rest goes out later
HEAD = b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"
ANSWER = HEAD % len(PAGE) + PAGE


async def refuse(stream: LingeringStream) -> None:
    head = b""
    try:
        while b"\r\n\r\n" not in head and len(head) < LONGEST_HEAD:
            data = await stream.receive_some(4096)  # (A real server gives up on clients that never send one.)
            if not data:
                return
            head += data
    except trio.BrokenResourceError:  # reset by the client
        return
    await stream.send_and_aclose(ANSWER)


async def main(port: int, closer: Closer) -> None:
    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        print("port", listeners[0].socket.getsockname()[1], flush=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, lingering(refuse, closer=closer), listeners)
            async for _ in signals:
                nursery.cancel_scope.cancel()


if __name__ == "__main__":
    with Closer(Drain(timeout=30.0, idle_timeout=5.0), exit_timeout=1.0) as closer:
        trio.run(main, int(sys.argv[1]), closer)
    print("closed", closer.stats().handed_over, flush=True)
