"""Listening sockets whose connections linger when somebody closes them, in servers that know nothing of lingerx.

Whatever calls accept() and later close() in Python is served: plain loops, socketserver, asyncio's own loop, servers
that are handed a socket. Only listeners and how they get their fd live here, and no system call.
"""

from __future__ import annotations

import socket

from ._arguments import check_open
from ._linger_socket import LingerSocket
from ._ownership import Hold
from ._terms import Terms, check_terms
from .closer import Closer
from .policy import Policy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    from typing_extensions import Self

    from ._linger_ssl_socket import LingerSSLSocket as LingerSSLSocket

    Taker = TypeVar("Taker", LingerSocket, "LingerListener")
else:

    def __getattr__(name: str) -> object:
        # For this module and for lingerx: who does not ask for TLS need not import ssl.
        if name != "LingerSSLSocket":
            raise AttributeError(f"module {__package__!r} has no attribute {name!r}")
        from ._linger_ssl_socket import LingerSSLSocket

        return LingerSSLSocket


__all__ = ["LingerListener", "LingerSSLSocket", "LingerSocket", "create_server", "wrap_listener"]


class LingerListener(Terms, socket.socket):
    """A listening socket whose accept() returns a LingerSocket; its own close() is a plain one.

    policy, closer, wait: attributes, as in `create_server`; every accepted socket gets them.
    """

    def accept(self) -> tuple[LingerSocket, Any]:
        """As socket.accept, but the connection lingers when it is closed."""
        plain, address = super().accept()
        conn = LingerSocket.__new__(LingerSocket)
        conn._take_terms_of(self)
        return _move(plain, conn), address

    def dup(self) -> Self:
        """As socket.dup, with the same terms."""
        other = super().dup()
        other._take_terms_of(self)
        return other


def create_server(
    address: tuple[Any, ...],
    *,
    policy: Policy | None = None,
    closer: Closer | None = None,
    wait: bool = False,
    family: int = socket.AF_INET,
    backlog: int | None = None,
    reuse_port: bool = False,
    dualstack_ipv6: bool = False,
) -> LingerListener:
    """As socket.create_server, but every accepted socket lingers when it is closed, by whomever.

    policy: how connections are closed; None for the closer's own policy: with the default closer
        Drain(timeout=30.0, idle_timeout=5.0).
    closer: where they linger; None for `default_closer()`. It is not shut down with the listener.
    wait: True to linger in the thread that calls close(), as `lingerx.close` does: by `policy`, or
        Drain(timeout=3.0). For programs that have a thread to spare for each connection; never for an event loop.

    family, backlog, reuse_port, dualstack_ipv6: as for socket.create_server.

    Raises TypeError or ValueError for wrong arguments, before a socket is made; OSError as socket.create_server does.
    """
    check_terms(policy, closer, wait)
    sock = socket.create_server(
        address, family=family, backlog=backlog, reuse_port=reuse_port, dualstack_ipv6=dualstack_ipv6
    )
    return wrap_listener(sock, policy=policy, closer=closer, wait=wait)


def wrap_listener(
    sock: socket.socket, *, policy: Policy | None = None, closer: Closer | None = None, wait: bool = False
) -> LingerListener:
    """A listening socket that somebody else made, as one whose accepted sockets linger when they are closed.

    sock: a stream socket that listens, or will before it accepts. Taken over: it is as after `sock.detach()`. The fd
        stays the same, with its options, its timeout, O_NONBLOCK and whether children inherit it.
    policy, closer, wait: as for `create_server`.

    Hand the result to whatever accepts in Python: `server.socket = wrap_listener(server.socket)` in socketserver,
    `sock=` in asyncio. It has no effect where accept() is not called on it: in uvloop, or where only its fileno() is
    used. It cannot be pickled.

    Raises, with the socket untouched, TypeError for what is no stream socket object, ValueError for an ssl.SSLSocket,
    OSError (EBADF) for one that is closed.
    """
    check_terms(policy, closer, wait)
    check_open(sock)
    if sock.type != socket.SOCK_STREAM:
        raise TypeError(f"sock is a listening stream socket (SOCK_STREAM); got {sock!r}")
    if hasattr(sock, "unwrap"):
        raise ValueError(
            "the listener has TLS, which would get lost: set context.sslsocket_class = lingerx.LingerSSLSocket before "
            f"wrap_socket(), and leave the listener as it is; got {sock!r}"
        )
    listener = LingerListener.__new__(LingerListener)
    listener.policy, listener.closer, listener.wait = policy, closer, wait
    return _move(sock, listener)


def _move(sock: socket.socket, to: Taker) -> Taker:
    # Owns: `to`, which has no fd yet, gets the one of `sock`, and its timeout.
    timeout = sock.gettimeout()
    hold = Hold(sock, sock.fileno())
    hold.raw = to
    try:
        hold.take()
        if to.gettimeout() != timeout:
            to.settimeout(timeout)
    except BaseException:
        hold.give_up()
        raise
    return to
