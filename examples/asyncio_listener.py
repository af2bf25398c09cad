"""An asyncio server that refuses uploads: every client gets the whole refusal, and the loop waits for none.

    python examples/asyncio_listener.py 8413

It answers once it has the head of a request, while the client is still sending the rest. Only the listener is
lingerx's: asyncio's own loop accepts from it and closes what it accepted, with TLS too. (uvloop accepts by itself:
there it has no effect.) SIGTERM ends the server: no new connections, one more second for those in flight.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import suppress

from lingerx import Closer, Drain, create_server

# No more than the kernel takes at once: closing, asyncio reads no more, and a client that sends everything before it
# reads would never take the rest.
PAGE = b"Nothing can be uploaded here.\n" * 35_000
HEAD = b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"


async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        # Cancelled: at the end, by asyncio.run.
        with suppress(asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError, asyncio.CancelledError):
            await reader.readuntil(b"\r\n\r\n")  # (A real server gives up on clients that never send one.)
            writer.write(HEAD % len(PAGE) + PAGE)
    finally:
        writer.close()


async def main(port: int, closer: Closer) -> None:
    listener = create_server(("127.0.0.1", port), closer=closer)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    print("port", listener.getsockname()[1], flush=True)
    server = await asyncio.start_server(refuse, sock=listener)
    await stop.wait()
    server.close()


if __name__ == "__main__":
    with Closer(Drain(timeout=30.0, idle_timeout=5.0), exit_timeout=1.0) as closer:
        asyncio.run(main(int(sys.argv[1]), closer))
    print("closed", closer.stats().handed_over, flush=True)
