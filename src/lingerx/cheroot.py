"""`Connection`: cheroot's HTTP connections end lingering, in the background. For CherryPy too.

It changes how a connection is closed and nothing else; no system call is made here.
"""

from __future__ import annotations

from ._terms import Terms

try:
    from cheroot.server import HTTPConnection
except ImportError as missing:
    raise ImportError("lingerx.cheroot needs cheroot (pip install 'lingerx[cheroot]')") from missing

__all__ = ["Connection"]


class Connection(Terms, HTTPConnection):
    """A connection that lingers when cheroot closes it: the worker goes on with the next one at once.

        server = cheroot.wsgi.Server(("0.0.0.0", 8000), app)
        server.ConnectionClass = lingerx.cheroot.Connection

    cheroot's own way is SHUT_RDWR, after which nothing can be drained. Attributes, to be set by a subclass:

    policy: how a connection is closed; None for the closer's own policy.
    closer: where it lingers; None for `lingerx.default_closer()`.
    wait: True to linger in the thread that closes the connection: the one that served it, or, when a client has sent
        no other request for too long, the one that accepts, which accepts nobody meanwhile.

    TLS by cheroot's `builtin` adapter too: close_notify goes out first. Connections of its `pyopenssl` adapter are
    no socket objects, and are closed as ever.

    Raises TypeError or ValueError when a class is made with a policy or closer that cannot be used here.

    Sources: cheroot's docs, cheroot.server.HTTPServer.ConnectionClass and HTTPConnection.close.
    """

    def close(self) -> None:
        """Linger, then what cheroot does anyway where nobody can, or where `linger` leaves the socket to somebody."""
        if self.socket.fileno() >= 0 and not self.linger:
            self._linger(self.socket, wait=False)
        if self.socket.fileno() >= 0:
            super().close()
        else:
            self.rfile.close()  # which has no fd any more
