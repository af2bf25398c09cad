"""What the servers under test serve, in their own processes: POST is refused, its body unread; GET is answered shortly.

    python -m gunicorn servers.apps:wsgi
    python -m uvicorn servers.apps:asgi

No assertion may live here, nothing of lingerx, and no import but the standard library's.
"""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

ANSWER_VARIABLE = "LINGERX_TEST_ANSWER"
FRESH = b"fresh\n"


def page_of(size: int) -> bytes:
    """So many bytes, the same in every process; no shifted one passes for the right one."""
    return random.Random(size).randbytes(size)


PAGE = page_of(int(os.environ.get(ANSWER_VARIABLE, 1 << 20)))
"""The body of every refusal."""
REFUSAL_HEAD = (
    b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"
    % len(PAGE)
)
"""For servers that write their answers themselves."""

StartResponse = Callable[[str, list[tuple[str, str]]], object]


def wsgi(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    """A WSGI app. Whether the connection is closed is left to the server: PEP 3333 forbids apps to say so."""
    refused = environ["REQUEST_METHOD"] == "POST"
    status, body = ("413 Content Too Large", PAGE) if refused else ("200 OK", FRESH)
    start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


def wsgi_closing(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    """The same, for servers that let apps say `Connection: close` all the same."""
    close = [("Connection", "close")] if environ["REQUEST_METHOD"] == "POST" else []
    return wsgi(environ, lambda status, fields: start_response(status, fields + close))


async def asgi(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """An ASGI app, which knows of the lifespan protocol."""
    if scope["type"] == "lifespan":
        while True:
            message = (await receive())["type"]
            await send({"type": f"{message}.complete"})
            if message == "lifespan.shutdown":
                return
    refused = scope["method"] == "POST"
    body = PAGE if refused else FRESH
    fields = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
    if refused:
        fields.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": 413 if refused else 200, "headers": fields})
    await send({"type": "http.response.body", "body": body})
