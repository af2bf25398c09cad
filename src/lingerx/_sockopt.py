"""Asks and sets: one function for each socket option and queue that Python's sockets leave to their users.

For the portable engine and for `_tls`. Everything here borrows its socket, and none of it can block. What differs
between systems is told here, and -1 or None stands for what a system can't tell; no policy may live here.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
from contextlib import suppress

from ._status import STATES, TcpStatus

if sys.platform != "win32":
    import fcntl
    import termios

NO_SOCKET = (errno.EBADF, errno.ENOTSOCK)
"""The errnos that say: this number is not, or is not any more, an open socket."""

TCP_FAMILIES = (socket.AF_INET, socket.AF_INET6)
LOCAL_FAMILY = getattr(socket, "AF_UNIX", None)

# struct linger of socket(7); Windows has two 16-bit fields. macOS: SO_LINGER counts ticks, SO_LINGER_SEC seconds.
LINGER = struct.Struct("hh" if sys.platform == "win32" else "ii")
SO_LINGER = 0x1080 if sys.platform == "darwin" else socket.SO_LINGER
SO_NWRITE = 0x1024  # macOS: data bytes in the send queue
SIOCOUTQNSD = 0x894B  # linux/sockios.h: bytes of the send queue that were never sent
# Where struct tcp_info of linux/tcp.h has these numbers, of four bytes each.
SEGS_IN = 140  # Linux 4.2
DATA_SEGS_OUT = 156  # Linux 4.6
OPENING = ("SYN-SENT", "SYN-RECEIVED")
"""The states in which Linux counts the send queue as 0, whatever there is in it: data may be (RFC 7413)."""
FIN_QUEUED = ("FIN-WAIT-1", "LAST-ACK", "CLOSING")
"""The states in which our FIN may be the last byte of the send queue."""


def set_linger(sock: socket.socket, seconds: int) -> None:
    """SO_LINGER: below 0 off, else on with so many seconds. Raises OSError. Borrows."""
    sock.setsockopt(socket.SOL_SOCKET, SO_LINGER, LINGER.pack(seconds >= 0, max(seconds, 0)))


def get_linger(sock: socket.socket) -> int:
    """SO_LINGER as `set_linger` takes it; -1 for off. Raises OSError. Borrows."""
    on, seconds = LINGER.unpack(sock.getsockopt(socket.SOL_SOCKET, SO_LINGER, LINGER.size))
    return int(seconds) if on else -1


def set_tcp(sock: socket.socket, name: str, value: int) -> None:
    """An option of tcp(7) that some systems lack, and that nothing depends on. Borrows."""
    with suppress(AttributeError, OSError):
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def tcp_state(sock: socket.socket) -> str | None:
    """The state by its name in RFC 9293, or None where TCP_INFO of tcp(7) does not tell. Borrows."""
    if sys.platform == "linux":
        with suppress(OSError):
            return STATES[sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]]
    return None


def send_queue(sock: socket.socket, fin: int) -> int:
    """Bytes in the send queue, a FIN in it included (as SIOCOUTQ of tcp(7) counts), or -1. Borrows.

    fin: whether our FIN is in the queue, unless it is empty. Raises OSError with one of NO_SOCKET for a number that
    is no socket any more.
    """
    queue = -1
    if sock.family == LOCAL_FAMILY:
        queue = 0  # what the kernel took is already in the peer's queue (unix(7))
    elif sock.family in TCP_FAMILIES and sys.platform == "linux":
        queue = _ioctl(sock, termios.TIOCOUTQ)
    elif sock.family in TCP_FAMILIES and sys.platform == "darwin":
        queue = sock.getsockopt(socket.SOL_SOCKET, SO_NWRITE)
        if queue > 0:
            queue += fin  # which it does not count
    return queue


def never_sent(sock: socket.socket) -> int:
    """Bytes of a TCP socket's send queue that were never sent, or -1. Raises as `send_queue` does. Borrows."""
    if sys.platform == "linux" and sock.family in TCP_FAMILIES:
        return _ioctl(sock, SIOCOUTQNSD)
    return -1


def never_heard(sock: socket.socket) -> bool:
    """Whether a TCP socket never got a single segment from anybody: it was not connected yet. Borrows."""
    # Not of MPTCP, which shows those of a subflow, and begins to count anew when that is gone.
    return _counted_none(sock, SEGS_IN) and sock.proto in (0, socket.IPPROTO_TCP)


def no_data_sent(sock: socket.socket) -> bool:
    """Whether the one byte in the send queue of a TCP socket whose connection is over is a SYN or a FIN. Borrows."""
    return _counted_none(sock, DATA_SEGS_OUT)


def opening(sock: socket.socket) -> bool:
    """Whether the handshake of a TCP socket is still to be done. Borrows."""
    return tcp_state(sock) in OPENING


def _counted_none(sock: socket.socket, place: int) -> bool:
    # Borrows. Whether a number of struct tcp_info is known to be 0.
    if sys.platform == "linux":
        with suppress(OSError):
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, place + 4)
            return len(info) == place + 4 and not any(info[place:])
    return False


def tcp_status(sock: socket.socket) -> TcpStatus:
    """All that can be told about a connection. Raises OSError for a closed one. Borrows."""
    sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)  # raises, where the questions below would only not be answered
    state, unsent, unacked = None, -1, -1
    if sock.family in TCP_FAMILIES:
        state = tcp_state(sock)
        fin = state in FIN_QUEUED
        if state not in OPENING:
            unacked = send_queue(sock, fin)
            unsent = never_sent(sock)
        if state == "CLOSED" and unacked == 1 and no_data_sent(sock):
            unacked = unsent = 0  # a SYN
        if fin and unacked > 0:
            unacked -= 1  # the FIN, the last of the queue
            if unsent > 0:
                unsent -= 1
    unread = -1
    if sys.platform != "win32":
        unread = _ioctl(sock, termios.FIONREAD)
    return TcpStatus(state, *(None if value < 0 else value for value in (unsent, unacked, unread)))


def _ioctl(sock: socket.socket, request: int) -> int:
    # Borrows. A number of bytes.
    if sys.platform != "win32":
        try:
            return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), request, bytes(4)))[0])
        except OSError as error:
            if error.errno in NO_SOCKET:
                raise
    return -1
