"""How an fd changes hands: from the caller's object to one of ours, and out of this process.

Everything here serves one promise: once a call has taken a socket over, its fd is closed exactly once, also when an
exception (what a signal handler raises) comes between any two steps. Nothing here waits or knows a policy.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress

from ._sockopt import NO_SOCKET, set_linger

__all__ = ["Hold", "attach", "blank", "drop", "give_back", "take"]


def blank() -> socket.socket:
    """A socket object without an fd, to be kept where an exception at any moment finds it, before it gets one."""
    return socket.socket.__new__(socket.socket)


def attach(sock: socket.socket, fd: int) -> None:
    """Give a number to a socket object that has none, with O_NONBLOCK as it was. `sock` owns it then.

    The object itself never waits on top of what MSG_DONTWAIT asks for: it has no timeout, or one of 0.0. Raises
    OSError with one of NO_SOCKET for a number that is no open socket.
    """
    # With a default timeout a new socket object makes its fd non-blocking, and that is shared with all copies of
    # it. (Windows cannot tell which it was, and has no such copies in other processes unless share() made them.)
    restore = socket.getdefaulttimeout() is not None and sys.platform != "win32" and os.get_blocking(fd)
    try:
        socket.socket.__init__(sock, fileno=fd)
    except OSError as error:
        if error.errno in NO_SOCKET:
            raise
        # macOS: getsockname, which finds the family, is EINVAL after a reset. Any family will do to close it.
        socket.socket.__init__(sock, socket.AF_INET, -1, 0, fd)
    if sock.gettimeout() is not None:
        sock.settimeout(0.0)
    if restore:
        os.set_blocking(fd, True)


def take(sock: socket.socket) -> int:
    """The fd, which is the caller's from here on (Owns), or -1 when the object had none.

    An SSLSocket loses its session with it: OpenSSL keeps the number, and would write to whatever gets it next.
    """
    fd = sock.detach()
    ssl = sys.modules.get("ssl")
    if ssl is not None and isinstance(sock, ssl.SSLSocket):
        sock._sslobj = None  # as its own close() does
    return fd


def give_back(sock: socket.socket, fd: int) -> None:
    """Undo `take` for an object whose type is exactly socket.socket: it was a mistake. `sock` owns the fd then."""
    timeout = sock.gettimeout()
    blocking = sys.platform == "win32" or os.get_blocking(fd)
    socket.SocketType.__init__(sock, sock.family, sock.type, sock.proto, fd)
    if sock.gettimeout() != timeout:  # a default timeout has come in, and O_NONBLOCK with it
        sock.settimeout(timeout)
    if blocking:
        os.set_blocking(fd, True)


def drop(fd: int) -> None:
    """A plain close that cannot block, for when an exception leaves no time for more; nothing for -1. Owns."""
    if fd < 0:
        return
    with suppress(OSError):
        raw = blank()
        attach(raw, fd)
        with suppress(OSError):
            set_linger(raw, -1)
        raw.close()


class Hold:
    """An fd on its way from the caller's object (None: there is only the number) to `raw`, which nobody else knows."""

    __slots__ = ("_settled", "_taken", "fd", "raw", "wrapper")

    def __init__(self, wrapper: socket.socket | None, fd: int) -> None:
        self.fd = fd
        self.raw = blank()
        self.wrapper = wrapper
        self._taken = wrapper is None
        self._settled = fd < 0  # the fd is raw's, or nobody's

    def take(self) -> None:
        """Owns the fd from here on. Raises OSError with one of NO_SOCKET when there is none after all."""
        self._taken = True
        try:
            if self.wrapper is not None:
                fd = take(self.wrapper)
                if fd < 0:  # another thread was quicker
                    raise OSError(errno.EBADF, os.strerror(errno.EBADF))
                self.fd = fd  # another than before, when another thread has closed it while TLS said goodbye
            attach(self.raw, self.fd)
        except OSError as error:
            self._settled = error.errno in NO_SOCKET
            raise
        self._settled = True

    def give_up(self, close: Callable[[int], None] = drop) -> None:
        """Owns. An exception goes on to the caller: the kernel gets the rest at once. Harmless when it is closed.

        close: what is done to the number.
        """
        mine = self.raw.detach() >= 0
        # Detached from the caller's object but not yet ours, or not even that; unless it is settled already.
        if mine or (not self._settled and (self.wrapper is None or take(self.wrapper) >= 0 or self._taken)):
            self._settled = True
            close(self.fd)
