"""gunicorn's configuration for its gevent worker: gevent prints a traceback when a client leaves before TLS begins."""

from __future__ import annotations

import ssl
from typing import Any


def post_worker_init(worker: Any) -> None:
    """In the worker, when gevent has done its patching."""
    import gevent

    gevent.get_hub().NOT_ERROR += (ssl.SSLEOFError,)
