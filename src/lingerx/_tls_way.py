"""The way between a TLS session and its connection, while `_tls.py` ends the session.

Only this way may live here: what is sent on it, and for how long, is decided there.

How OpenSSL is kept from waiting, and from working without end. It reads as long as there is something to read: TLS 1.3
lets a peer send KeyUpdates for ever (RFC 8446 4.6.3), and one call takes all of them. And CPython tries again for as
long as the socket object's timeout says. So for this time OpenSSL does not get the network: under the number of its fd
stands one end of a socketpair (dup2(2)). What it writes there is sent on, and what it may read there comes in small
portions. The connection itself stays as it is, O_NONBLOCK too, which is shared with every copy of it.

Windows has no dup2 for sockets. There the session's own socket is made non-blocking, and OpenSSL is trusted.
"""

from __future__ import annotations

import _socket
import errno
import os
import socket
import sys
from contextlib import suppress

from ._ownership import Hold, attach, drop, take

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ssl import SSLSocket
    from typing import Any

__all__ = ["PORTION", "RECORD", "Way"]

# What OpenSSL makes one record of (RFC 8446 5.1): a bigger write is cut up there, with no saying how far it got.
RECORD = 16 * 1024
# How much input OpenSSL gets at a time: a guess. Of nothing but KeyUpdates that takes it 4 ms.
PORTION = 8 * 1024

ALERTS = (b"\x15\x03", b"\x17\x03")
"""How a record with close_notify begins, by TLS 1.2 and by 1.3 (RFC 5246 6.2.1, RFC 8446 5.2)."""

DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)  # none on Windows, where the fd is non-blocking by then
NOSIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)


class Way:
    """The way between a TLS session and its connection, from `begin` to `end`.

        the fd's number    the connection before and after, meanwhile one end of a socketpair (`theirs`): OpenSSL has it
        `connection`       the connection, by whatever number it has (meanwhile that of `spare`)
        `ours`             the other end of the socketpair

    `hold` owns the number from `begin` on; `sock` has it too, for OpenSSL looks for it there. Whatever comes out of a
    method, `give_up` closes all that is open.
    """

    __slots__ = ("connection", "hold", "ours", "sent", "session", "sock", "spare", "tail", "theirs")

    def __init__(self, sock: SSLSocket) -> None:
        self.sock = sock
        # It is used by itself: what `sock` does with it, or without, is not ours to rely on. (An SSLSocket that has
        # lost its session, to another thread's shutdown(), sends in clear.)
        self.session: Any = vars(sock)["_sslobj"]
        self.hold = Hold(sock, sock.fileno())
        # Of the C type, which owns its fd at any moment: an exception that comes right then leaves nothing open.
        self.ours: _socket.socket | None = None
        """Our end of the socketpair; None where OpenSSL has the connection itself."""
        self.theirs: _socket.socket | None = None
        """OpenSSL's end, but for its number."""
        self.spare: _socket.socket | None = None
        """Another number for the connection, meanwhile."""
        self.connection: socket.socket | _socket.socket = self.hold.raw
        self.tail = memoryview(b"")
        """What OpenSSL has written and the kernel has not taken yet."""
        self.sent = 0
        """How many bytes the kernel has taken."""

    def begin(self) -> None:
        """Raises OSError, with nothing done, where there is no fd left or none to take (one of NO_SOCKET)."""
        # From `take` on another thread that closes `sock` too, or shuts it down, finds it closed, or hits `theirs`.
        if sys.platform == "win32":
            self.hold.take()
        else:
            self.ours, self.theirs = _socket.socketpair()
            self.spare = _socket.socket()
            for each in (self.ours, self.theirs, self.spare):
                each.settimeout(0.0)
            self.hold.take()
            os.dup2(self.hold.fd, self.spare.fileno(), inheritable=False)
            self.connection = self.spare
            os.dup2(self.theirs.fileno(), self.hold.fd, inheritable=False)
        vars(self.sock)["_sslobj"] = self.session
        attach(self.sock, self.hold.fd)
        self.sock.settimeout(0.0)

    def end(self) -> None:
        """OpenSSL has nothing any more, and the connection its number; harmless when that is so already."""
        if self.hold.raw.fileno() >= 0:
            self.sock.detach()
        if self.connection is self.spare and self.theirs is not None:
            if _are_same(self.hold.fd, self.theirs.fileno()):
                os.dup2(self.spare.fileno(), self.hold.fd, inheritable=False)
            elif not _are_same(self.hold.fd, self.spare.fileno()):  # that other thread
                self.hold.raw.detach()
                self.hold.fd = self.spare.detach()
                attach(self.hold.raw, self.hold.fd)
            self.connection = self.hold.raw
        for each in (self.ours, self.theirs, self.spare):
            if each is not None:
                each.close()

    def give_up(self) -> None:
        """An exception goes on to the caller: the kernel gets the rest at once."""
        try:
            self.end()
        finally:
            self.hold.give_up()
            drop(take(self.sock))  # `end` has left it one only if `hold` has none

    def bring(self) -> bool:
        """A portion of input for OpenSSL, if there is any; False: there will be no more."""
        # A session that reads a FIN without a close_notify is dead at once, for writing too. So it must not read it: a
        # peer that has only half-closed its TCP connection still gets its answer.
        flags = DONTWAIT if self.ours is not None else DONTWAIT | socket.MSG_PEEK
        try:
            portion = self.connection.recv(PORTION, flags)
        except (BlockingIOError, InterruptedError):
            return True
        if portion and self.ours is not None:
            self.ours.sendall(portion)  # for which there is room: OpenSSL has read what came before
        return bool(portion)

    def send_on(self) -> bool:
        """What OpenSSL has written, to the peer; False: not all of it was taken."""
        while self.ours is not None:
            if not self.tail:
                try:
                    self.tail = memoryview(self.ours.recv(2 * RECORD))
                except BlockingIOError:
                    break
                if not self.tail:  # another thread has shut it down
                    raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            try:
                sent = self.connection.send(self.tail, DONTWAIT | NOSIGNAL)
            except BlockingIOError:
                return False
            self.tail = self.tail[sent:]
            self.sent += sent
        return True

    def say_goodbye(self) -> None:
        """Send close_notify, if there is room for it."""
        if self.tail:
            return
        # Two calls of SSL_shutdown: the first writes, the second looks for the peer's close_notify.
        with suppress(OSError, ValueError):
            self.session.shutdown()
        if self.ours is None:
            return
        with suppress(OSError):
            record = self.ours.recv(2 * RECORD)
            # Where the kernel encrypts (the ULP of tls(7)) OpenSSL has written the bare alert, which must not go out.
            if record.startswith(ALERTS) and int.from_bytes(record[3:5], "big") == len(record) - 5:
                self.connection.send(record, DONTWAIT | NOSIGNAL)


def _are_same(fd: int, other: int) -> bool:
    # Borrows. Whether two numbers stand for one file.
    try:
        return os.path.sameopenfile(fd, other)
    except OSError:
        return False
