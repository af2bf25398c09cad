"""`TcpStatus`, what `tcp_status` returns. A value only: nothing here touches a socket."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple
else:
    from ._named_tuple import NamedTuple

# In the order of the kernel's numbers (include/net/tcp_states.h); the names are RFC 9293's.
STATES = (
    None,
    "ESTABLISHED",
    "SYN-SENT",
    "SYN-RECEIVED",
    "FIN-WAIT-1",
    "FIN-WAIT-2",
    "TIME-WAIT",
    "CLOSED",
    "CLOSE-WAIT",
    "LAST-ACK",
    "LISTEN",
    "CLOSING",
    "SYN-RECEIVED",
)


class TcpStatus(NamedTuple):
    """Where a connection stands; a field is None where the platform can't tell (or the socket is not TCP)."""

    state: str | None
    """The state by its name in RFC 9293 3.3.2, such as "ESTABLISHED" or "FIN-WAIT-2"; Linux only."""
    unsent: int | None
    """Bytes in the send queue that were not sent yet; Linux only."""
    unacked: int | None
    """Bytes in the send queue that the peer has not ACKed, the unsent ones included. The FIN is not counted."""
    unread: int | None
    """Bytes of input that wait to be read."""
