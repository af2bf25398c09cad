"""`LingerSSLSocket`, in a file of its own: importing it imports ssl."""

from __future__ import annotations

import ssl

from ._linger_socket import LingerSocket

__all__ = ["LingerSSLSocket"]


class LingerSSLSocket(LingerSocket, ssl.SSLSocket):
    """An ssl.SSLSocket whose close() sends close_notify and then lingers: for servers with blocking sockets.

        context.sslsocket_class = lingerx.LingerSSLSocket

    Whatever `context.wrap_socket` returns from then on, and what a listener made by it accepts, is one; see
    LingerSocket for the terms, which a subclass may set: `class Patient(LingerSSLSocket): policy = Drain(60.0)`.
    It does not take over the terms of a LingerSocket that it wraps. close_notify goes out in one try that does not
    wait; after `unwrap()` without it.

    asyncio and others that do TLS themselves close a plain socket in the end: give them `wrap_listener`.

    Sources: RFC 8446 6.1; SSLContext.sslsocket_class.
    """
