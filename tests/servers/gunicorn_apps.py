"""Apps for gunicorn that have lingerx's middleware, and workers that its command line names."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import lingerx.gunicorn
from lingerx import Drain
from lingerx.wsgi import LingeringMiddleware

from .apps import StartResponse, wsgi

with_middleware = LingeringMiddleware(wsgi)


def forking(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    """Has forked meanwhile; the child, and its copies of all sockets, are gone again."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return wsgi(environ, start_response)


class Patient(lingerx.gunicorn.SyncWorker):
    """With a policy of its own, and a closer that was made before the fork."""

    policy = Drain(timeout=20.0)
    closer = lingerx.Closer()
