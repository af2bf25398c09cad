"""An aiohttp server that refuses uploads: every client gets the whole refusal, and no task waits for one.

    python examples/aiohttp_server.py 8413

It answers once it has the head of a request, while the client is still sending the rest. Only the listener is
lingerx's: aiohttp's connections are accepted from it, and linger in the background when aiohttp closes them, with TLS
too. (By itself aiohttp keeps the task of such a request, and reads on up to the end of the body, for 10 s at most;
`lingering_time=0` turns that off.) SIGTERM ends the server: no new connections, one more second for those in flight.
"""

from __future__ import annotations

import asyncio
import signal
import sys

from aiohttp import web

from lingerx import Closer, Drain, create_server

# No more than the kernel takes at once: closing, asyncio reads no more, and a client that sends everything before it
# reads would never take the rest.
PAGE = b"Nothing can be uploaded here.\n" * 35_000


async def refuse(request: web.Request) -> web.Response:
    return web.Response(status=413, body=PAGE, headers={"Connection": "close"})


async def main(port: int, closer: Closer) -> None:
    listener = create_server(("127.0.0.1", port), closer=closer)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    app = web.Application()
    app.router.add_post("/{path:.*}", refuse)
    runner = web.AppRunner(app, lingering_time=0, shutdown_timeout=1.0)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    print("port", listener.getsockname()[1], flush=True)
    await stop.wait()
    await runner.cleanup()


if __name__ == "__main__":
    with Closer(Drain(timeout=30.0, idle_timeout=5.0), exit_timeout=1.0) as closer:
        asyncio.run(main(int(sys.argv[1]), closer))
    print("closed", closer.stats().handed_over, flush=True)
