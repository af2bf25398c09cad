"""`LingeringMiddleware`, for WSGI servers that put the connection's socket into environ: gunicorn and werkzeug.

It hands a copy of the connection to a closer when the server is about to close its own. No system call is made here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ._terms import Terms, check_terms
from .closer import Closer
from .policy import Policy

if TYPE_CHECKING:
    import socket

__all__ = ["LingeringMiddleware"]

StartResponse = Callable[..., Any]
Application = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]


class LingeringMiddleware(Terms):
    """Answers arrive although the server closes right behind them.

        app = lingerx.wsgi.LingeringMiddleware(app)

    app: a WSGI application.
    policy: how connections are closed; None for the closer's own policy.
    closer: where they linger; None for `lingerx.default_closer()`.
    wait: True to linger in the server's thread, as `lingerx.close` does, before the server closes.

    A connection lingers only where it is certain that the server closes it after this answer:

    - gunicorn's sync worker: always. Its gthread worker: when the client asked for that (Connection: close, or
      HTTP/1.0 without keep-alive). `lingerx.gunicorn` has workers that do it always, that cover TLS, and that do not
      wait for the client in gunicorn's own close: prefer them.
    - werkzeug's development server: always; in the child of its forking server, which would not wait for a closer, as
      with `wait`. (It reads on by itself first, in its own thread, until it has nothing to
      read for 10 ms or has 10 MB; what comes after that is the middleware's.)

    Everything else is left as it was: other servers, which tell no socket (waitress, cheroot, gevent.pywsgi, uWSGI,
    mod_wsgi), sockets with TLS or of gevent, applications that raise, be it half-way (the server may have an answer
    of its own to send then), clients that have gone. A server cannot see that an iterable of
    wsgi.file_wrapper is behind it, and sends it in pieces.

    Raises TypeError or ValueError for wrong arguments.

    Sources: PEP 3333 (the server calls close() of the iterable when all of it was sent); RFC 9112 9.3; dup(2).
    """

    def __init__(
        self, app: Application, *, policy: Policy | None = None, closer: Closer | None = None, wait: bool = False
    ) -> None:
        check_terms(policy, closer, wait)
        self.app = app
        self.policy, self.closer, self.wait = policy, closer, wait

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """The application, and what comes after its last byte."""
        sock = _about_to_be_closed(environ)
        body = self.app(environ, start_response)
        if sock is None:
            return body
        # werkzeug's forking server: its child leaves by os._exit right after this, which waits for no closer.
        wait = "werkzeug.socket" in environ and environ["wsgi.multiprocess"]
        return _Body(body, lambda: self._linger_on_a_copy(sock, wait))

    def _linger_on_a_copy(self, sock: socket.socket, wait: bool) -> None:
        try:
            copy = sock.dup()
        except OSError:  # no fd left, or closed already: the server's own close has to do
            return
        with copy:
            self._linger(copy, wait)


def _about_to_be_closed(environ: dict[str, Any]) -> socket.socket | None:
    sock: socket.socket | None
    if sock := environ.get("gunicorn.socket"):
        closes = not environ["wsgi.multithread"] or _asked_to_close(environ)
    else:
        sock, closes = environ.get("werkzeug.socket"), True
    # Plain ones only: lingerx's own linger anyway, ssl's cannot be copied, and gevent's want its event loop.
    return sock if closes and type(sock).__module__ == "socket" else None


def _asked_to_close(environ: dict[str, Any]) -> bool:
    wish = environ.get("HTTP_CONNECTION", "").strip().lower()
    return (environ["SERVER_PROTOCOL"], wish) in {("HTTP/1.1", "close"), ("HTTP/1.0", "close"), ("HTTP/1.0", "")}


class _Body:
    """What the application returned, and something to do after its close(), when all of it was asked for."""

    def __init__(self, body: Iterable[bytes], then: Callable[[], None]) -> None:
        self._body = body
        self._then = then
        self._ended = False

    def __iter__(self) -> Iterator[bytes]:
        yield from self._body
        self._ended = True

    def close(self) -> None:
        try:
            if hasattr(self._body, "close"):
                self._body.close()
        finally:
            if self._ended:
                self._then()
