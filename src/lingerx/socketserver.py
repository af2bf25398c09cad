"""`LingeringMixIn` for the servers of socketserver, and those made of it: http.server, wsgiref, xmlrpc.

It changes how a request's socket is closed and nothing else; no system call is made here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._terms import Terms, came_of_a_fork_since, last_fork

if TYPE_CHECKING:
    import socketserver

    Server = socketserver.BaseServer
else:
    Server = object

__all__ = ["LingeringMixIn"]


class LingeringMixIn(Terms, Server):
    """Requests end lingering, in the background: the server goes on with the next one at once.

        class Server(lingerx.socketserver.LingeringMixIn, http.server.ThreadingHTTPServer):
            policy = lingerx.Drain(timeout=10.0)

    Stands before the server's class. Attributes of the class or the server:

    policy: how a request's socket is closed; None for the closer's own policy.
    closer: where it lingers; None for `lingerx.default_closer()`.
    wait: True to linger in the thread that served the request.

    Serial, Threading and Forking servers, TLS ones too. The child of a Forking one lingers itself before it leaves,
    by `policy` or Drain(timeout=3.0), and counts towards `max_children` until then. A server whose requests are no
    stream sockets (UDPServer) is left as it was.

    Raises TypeError or ValueError when a class is made with a policy or closer that cannot be used here.
    """

    _before: int | None = None

    def process_request(self, request: Any, client_address: Any) -> None:
        """As ever; from here on a ForkingMixIn may have forked."""
        self._before = last_fork()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Called when a request is over: linger, then what the server does anyway, to an object without an fd."""
        self._linger(request, self._before is not None and came_of_a_fork_since(self._before))
        super().shutdown_request(request)
