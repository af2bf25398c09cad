"""A WSGI app that refuses uploads, for gunicorn: every client gets the whole refusal, and the worker waits for none.

    gunicorn -k lingerx.gunicorn.SyncWorker --chdir examples --bind 127.0.0.1:8413 gunicorn_app:app

It answers without a look at the body, while the client is still sending. Only the worker's class says that lingerx is
there: the worker goes on with the next request, and the connection lingers in the background. SIGTERM ends gunicorn;
its workers give three more seconds to connections in flight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# No more than the kernel takes at once: a client that sends everything before it reads would block a bigger write.
PAGE = b"Nothing can be uploaded here.\n" * 35_000


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    fields = [("Content-Type", "text/plain"), ("Content-Length", str(len(PAGE)))]
    start_response("413 Content Too Large", fields)
    return [PAGE]
