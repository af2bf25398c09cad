"""lingerx closes sockets rightly: the peer gets every byte of the last answer, and the caller hears the truth.

The public names. No logic may live here.
"""

from ._closing import closing
from ._engine import (
    abort,
    close,
    close_all,
    close_fd,
    engine,
    get_linger,
    send_and_close,
    set_linger,
    tcp_status,
)
from ._status import TcpStatus
from .closer import Closer, Stats, default_closer
from .listener import LingerSocket, create_server, wrap_listener
from .policy import Abort, Background, Drain, Flush, KernelLinger, Policy, policy_from_linger
from .report import Outcome, Report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from . import anyio as anyio
    from . import asyncio as asyncio
    from . import cheroot as cheroot
    from . import gevent as gevent
    from . import gunicorn as gunicorn
    from . import hypercorn as hypercorn
    from . import prometheus as prometheus
    from . import socketserver as socketserver
    from . import trio as trio
    from . import twisted as twisted
    from . import uvicorn as uvicorn
    from . import wsgi as wsgi
    from .listener import LingerSSLSocket
else:
    from ._lazy import __getattr__ as __getattr__  # what is asked for: it may need an extra
del TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "Abort",
    "Background",
    "Closer",
    "Drain",
    "Flush",
    "KernelLinger",
    "LingerSSLSocket",
    "LingerSocket",
    "Outcome",
    "Policy",
    "Report",
    "Stats",
    "TcpStatus",
    "abort",
    "close",
    "close_all",
    "close_fd",
    "closing",
    "create_server",
    "default_closer",
    "engine",
    "get_linger",
    "policy_from_linger",
    "send_and_close",
    "set_linger",
    "tcp_status",
    "wrap_listener",
]
