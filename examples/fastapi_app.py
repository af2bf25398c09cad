"""A FastAPI app that refuses uploads: every client gets the whole refusal.

    uvicorn --http lingerx.uvicorn:AutoHTTPProtocol --app-dir examples --port 8413 fastapi_app:app
    uvicorn --http fastapi_app:Protocol --app-dir examples --port 8413 fastapi_app:app
    python examples/fastapi_app.py 8413

The view has no parameter that stands for the body, so it answers without a look at it, while the client is still
sending. Only the protocol says that lingerx is there. SIGTERM ends the server; three more seconds for connections in
flight.
"""

from __future__ import annotations

import sys

import uvicorn
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

import lingerx
from lingerx.uvicorn import H11Protocol

PAGE = "Nothing can be uploaded here.\n" * 35_000

app = FastAPI()


@app.post("/upload")
async def upload() -> PlainTextResponse:
    # Without this field the connection goes on, and uvicorn reads the upload to its end, however long it is.
    return PlainTextResponse(PAGE, 413, {"Connection": "close"})


class Protocol(H11Protocol):
    """One with a policy of its own; otherwise `--http lingerx.uvicorn:AutoHTTPProtocol` does."""

    policy = lingerx.Drain(timeout=30.0, idle_timeout=5.0)


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), http=Protocol, log_level="warning")
