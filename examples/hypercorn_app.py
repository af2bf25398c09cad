"""hypercorn with an ASGI app that refuses uploads: every client gets the whole refusal, and the loop waits for none.

    python examples/hypercorn_app.py 8413

It answers without a look at the body, while the client is still sending. Only the Config is lingerx's. SIGTERM ends
the server; the interpreter's exit gives three more seconds to connections in flight. (From the command line, or with
worker processes: see `lingerx.hypercorn.Config`.)
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from hypercorn.asyncio import serve

import lingerx
from lingerx.hypercorn import Config

# No more than the kernel takes at once: closing, asyncio reads no more, and a client that sends everything before it
# reads would never take the rest.
PAGE = b"Nothing can be uploaded here.\n" * 35_000


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        raise NotImplementedError(f"no {scope['type']} here")  # as the ASGI specification wants it
    fields = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(PAGE)), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": fields})
    await send({"type": "http.response.body", "body": PAGE})


if __name__ == "__main__":
    config = Config.from_mapping(
        bind=f"127.0.0.1:{sys.argv[1]}", policy=lingerx.Drain(timeout=30.0, idle_timeout=5.0), errorlog=None
    )
    asyncio.run(serve(app, config))
    print("closed", lingerx.default_closer().stats().handed_over, flush=True)
