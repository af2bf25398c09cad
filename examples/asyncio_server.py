"""An asyncio server that refuses uploads: every client gets the whole refusal, and the loop waits for none.

    python examples/asyncio_server.py 8413

It answers once it has the head of a request, while the client is still sending the rest. Only `lingering_client` says
that lingerx is there: `writer.close()` sends what is left while it discards input, closes the transport, and leaves
the client to the closer. TLS (`ssl=`), UNIX sockets and uvloop work in the same way. SIGTERM ends the server: no new
connections, one more second for answers that are being written, and one for those that linger.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import suppress

from lingerx import Closer, Drain
from lingerx.asyncio import lingering_client

GRACE = 1.0  # seconds
PAGE = b"Nothing can be uploaded here.\n" * 100_000  # more than the kernel takes at once: the rest goes out later
HEAD = b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"


async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        with suppress(asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")  # (A real server gives up on clients that never send one.)
            writer.write(HEAD % len(PAGE) + PAGE)
    finally:
        writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()  # until all is written: asyncio.run would cut off what is not


async def main(port: int, closer: Closer) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = await asyncio.start_server(lingering_client(refuse, closer=closer), "127.0.0.1", port)
    print("port", server.sockets[0].getsockname()[1], flush=True)
    await stop.wait()
    server.close()
    clients = asyncio.all_tasks() - {asyncio.current_task()}
    if clients:
        await asyncio.wait(clients, timeout=GRACE)


if __name__ == "__main__":
    with Closer(Drain(timeout=30.0, idle_timeout=5.0), exit_timeout=GRACE) as closer:
        asyncio.run(main(int(sys.argv[1]), closer))
    print("closed", closer.stats().handed_over, flush=True)
