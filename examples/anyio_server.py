"""A server on anyio that refuses uploads: every client gets the whole refusal, and no task waits for it.

    python examples/anyio_server.py 8413
    python examples/anyio_server.py 8413 trio

It answers once it has the head of a request, while the client is still sending the rest. `stream.send` would wait for
a client that does not read before it has sent everything, and closing then would reset the connection. The closer
sends, discards what comes, and closes; the handler is done at once. SIGTERM ends the server: no new connections, one
more second for those in flight.
"""

from __future__ import annotations

import signal
import sys

import anyio
from anyio.abc import SocketAttribute

from lingerx import Closer, Drain
from lingerx.anyio import LingeringStream, lingering

LONGEST_HEAD = 16384
PAGE = b"Nothing can be uploaded here.\n" * 100_000  # more than the kernel takes at once: the rest goes out later
HEAD = b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"
ANSWER = HEAD % len(PAGE) + PAGE


async def refuse(stream: LingeringStream) -> None:
    head = b""
    try:
        while b"\r\n\r\n" not in head and len(head) < LONGEST_HEAD:
            head += await stream.receive(4096)  # (A real server gives up on clients that never send one.)
    except (anyio.EndOfStream, anyio.BrokenResourceError):  # the client has gone
        return
    await stream.send_and_aclose(ANSWER)


async def main(port: int, closer: Closer) -> None:
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port)
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        print("port", listener.extra(SocketAttribute.local_port), flush=True)
        async with listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, lingering(refuse, closer=closer))
            async for _ in signals:
                tasks.cancel_scope.cancel()


if __name__ == "__main__":
    with Closer(Drain(timeout=30.0, idle_timeout=5.0), exit_timeout=1.0) as closer:
        anyio.run(main, int(sys.argv[1]), closer, backend=sys.argv[2] if len(sys.argv) > 2 else "asyncio")
    print("closed", closer.stats().handed_over, flush=True)
