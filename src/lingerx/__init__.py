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
    from .listener import LingerSSLSocket
else:
    from .listener import __getattr__ as __getattr__  # LingerSSLSocket, when it is asked for: it imports ssl
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
