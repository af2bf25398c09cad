"""An ASGI app that refuses uploads, by uvicorn: every client gets the whole refusal, however big it is.

    python examples/uvicorn_app.py 8413
    uvicorn --http lingerx.uvicorn:AutoHTTPProtocol --workers 2 --app-dir examples uvicorn_app:app
    uvicorn --http uvicorn_app:Protocol --app-dir examples uvicorn_app:app

It answers without a look at the body, while the client is still sending. Only the protocol is lingerx's: on asyncio
and uvloop, with TLS too, its connections linger in the background. SIGTERM ends the server: no new connections, three
more seconds for those in flight.
"""

from __future__ import annotations

import sys
from typing import Any

import uvicorn

import lingerx
from lingerx.uvicorn import H11Protocol

PAGE = b"Nothing can be uploaded here.\n" * 150_000  # more than the kernel takes at once: the rest goes out later


class Protocol(H11Protocol):
    """One with a policy of its own; otherwise `--http lingerx.uvicorn:H11Protocol` does."""

    policy = lingerx.Drain(timeout=30.0, idle_timeout=5.0)


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        raise NotImplementedError(f"no {scope['type']} here")  # as the ASGI specification wants it
    fields = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(PAGE)), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": fields})
    await send({"type": "http.response.body", "body": PAGE})


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), http=Protocol, log_level="warning")
