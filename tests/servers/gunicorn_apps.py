"""Apps for gunicorn that have lingerx's middleware, and workers that its command line names."""

from __future__ import annotations

import lingerx.gunicorn
from lingerx import Drain
from lingerx.wsgi import LingeringMiddleware

from .apps import wsgi

with_middleware = LingeringMiddleware(wsgi)


class Patient(lingerx.gunicorn.SyncWorker):
    """With a policy of its own, and a closer that was made before the fork."""

    policy = Drain(timeout=20.0)
    closer = lingerx.Closer()
