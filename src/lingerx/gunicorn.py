"""gunicorn's workers, whose connections end lingering: `gunicorn -k lingerx.gunicorn.SyncWorker app:app`.

They change what the listening sockets accept, what TLS makes of it, and how a worker ends. No system call is made
here, and nothing of gunicorn's is replaced: a worker class, its methods, and the setting `ssl_context`.
"""

from __future__ import annotations

import socket
import ssl
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ._linger_socket import LingerSocket
from ._linger_ssl_socket import LingerSSLSocket
from ._terms import came_of_a_fork_since, check_terms
from .closer import EXIT_TIMEOUT, Closer, default_closer
from .listener import LingerListener, _move, wrap_listener
from .policy import Policy, seconds_to_ns

try:
    from gunicorn.workers.base import Worker
    from gunicorn.workers.gthread import ThreadWorker as _ThreadWorker
    from gunicorn.workers.sync import SyncWorker as _SyncWorker
except ImportError as missing:
    raise ImportError("lingerx.gunicorn needs gunicorn (pip install 'lingerx[gunicorn]')") from missing

if TYPE_CHECKING:
    from collections.abc import Callable

    Socket = LingerSocket
else:
    Socket = object

__all__ = ["AsgiWorker", "GeventWorker", "LingeringMixIn", "SyncWorker", "ThreadWorker"]

TO_LEAVE = 0.5
"""Seconds of `graceful_timeout` that are left for the worker's own end: a guess."""


class LingeringMixIn(Worker):
    """What the workers here have in common. Stands before gunicorn's class.

    Attributes, to be set by a subclass, which `worker_class` in gunicorn.conf.py takes too:

        class Worker(lingerx.gunicorn.ThreadWorker):
            policy = lingerx.Drain(timeout=10.0)

        worker_class = Worker

    policy: how a connection is closed; None for the closer's own policy.
    closer: where it lingers; None for `lingerx.default_closer()`. May be made before the fork: every worker's copy of
        it is empty and starts a thread of its own. Shut down when the worker ends.
    exit_timeout: seconds that lingering connections get when the worker ends (SIGTERM, SIGQUIT, `max_requests`), but
        not more than `graceful_timeout` leaves. The listening sockets are closed meanwhile. A worker that is recycled
        by `max_requests` is replaced when it has ended: give it less where that is too long.

    Raises TypeError or ValueError when a class is made with a policy or closer that cannot be used here.

    Sources: gunicorn's docs, "Settings"; gunicorn.workers.base.
    """

    policy: Policy | None = None
    closer: Closer | None = None
    exit_timeout: float = EXIT_TIMEOUT

    _told: float | None = None  # to exit, by SIGTERM; on the monotonic clock

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_terms(cls.policy, cls.closer, wait=False)
        seconds_to_ns("exit_timeout", cls.exit_timeout)

    def init_process(self) -> None:
        """In the worker's own process, before it serves: its listening sockets accept what lingers."""
        for sock in self.sockets:
            sock.sock = self._listener(sock.sock)
        super().init_process()

    def _listener(self, sock: socket.socket) -> socket.socket:
        return wrap_listener(sock, policy=self.policy, closer=self.closer)

    def _closer(self) -> Closer:
        return default_closer() if self.closer is None else self.closer

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM."""
        self._told = time.monotonic()
        super().handle_exit(sig, frame)

    def run(self) -> None:
        """Serve, then let what lingers come to its end."""
        try:
            super().run()
        finally:
            for sock in self.sockets:
                sock.close()  # or clients would wait for a worker that is about to end
            self._end()

    def _end(self) -> None:
        closer = self._closer()
        now = time.monotonic()
        told = now if self._told is None else self._told
        end = min(now + self.exit_timeout, told + self.cfg.graceful_timeout - TO_LEAVE)
        try:
            while (left := end - time.monotonic()) > 0:
                self.notify()  # within `timeout`, or gunicorn takes the worker for dead
                if closer.join(min(left, self.timeout or left)):
                    break
        finally:
            closer.shutdown(0.0)


# Servers with a thread for each connection ----------------------------------------------------------------


class _HalfCloseHandsOver(Socket):
    # gunicorn's util.close_graceful (since 26) half-closes, reads for 2 s or 64 KiB, and closes. Its half-close is
    # where the closer takes over; then it finds no fd, and returns.

    # Where nobody can linger it reads on as ever. (A fork is no reason here: a half-close is meant for all copies.)

    def shutdown(self, how: int) -> None:
        if how == socket.SHUT_WR and self.fileno() >= 0:
            self._linger(self, came_of_a_fork_since(self._born))
            if self.fileno() < 0:
                return
        super().shutdown(how)


class _Socket(_HalfCloseHandsOver, LingerSocket):
    pass


class _SSLSocket(_HalfCloseHandsOver, LingerSSLSocket):
    pass


class _Listener(LingerListener):
    def accept(self) -> tuple[LingerSocket, Any]:
        conn, address = super().accept()
        other = _Socket.__new__(_Socket)
        other._take_terms_of(self)
        return _move(conn, other), address


class _Blocking(LingeringMixIn):
    def _listener(self, sock: socket.socket) -> LingerListener:
        plain = wrap_listener(sock, policy=self.policy, closer=self.closer)
        listener = _Listener.__new__(_Listener)
        listener._take_terms_of(plain)
        return _move(plain, listener)

    def init_process(self) -> None:
        if self.cfg.is_ssl:
            self._linger_with_tls()
        super().init_process()

    def _linger_with_tls(self) -> None:
        if "ssl_context" not in self.cfg.settings:
            self.log.warning("lingerx: connections with TLS do not linger, gunicorn 21 or later can make them")
            return
        make: Callable[..., ssl.SSLContext] = self.cfg.ssl_context
        terms = {"policy": self.policy, "closer": self.closer}
        kind = type(_SSLSocket.__name__, (_SSLSocket,), terms)

        def ssl_context(config: Any, default_ssl_context_factory: Any) -> ssl.SSLContext:
            context = make(config, default_ssl_context_factory)
            if context.sslsocket_class is ssl.SSLSocket:  # nobody else's
                context.sslsocket_class = kind
            return context

        self.cfg.set("ssl_context", ssl_context)


class SyncWorker(_Blocking, _SyncWorker):
    """gunicorn's sync worker, which goes on with the next request while the last client is still uploading.

    Attributes: those of `LingeringMixIn`.
    """


class ThreadWorker(_Blocking, _ThreadWorker):
    """gunicorn's gthread worker, whose main thread never waits for a client to close. Keep-alive is as ever.

    Attributes: those of `LingeringMixIn`.
    """


# Workers with an event loop -------------------------------------------------------------------------------


def _asgi_worker() -> type:
    from gunicorn.workers.gasgi import ASGIWorker

    class AsgiWorker(LingeringMixIn, ASGIWorker):
        """gunicorn's asgi worker (gunicorn 24 and later), on asyncio's own event loop.

        The setting `asgi_loop` "auto" means "asyncio" here; with "uvloop", which accepts by itself, nothing lingers.
        Attributes: those of `LingeringMixIn`.
        """

        def init_process(self) -> None:
            if self.cfg.asgi_loop == "auto":
                self.cfg.set("asgi_loop", "asyncio")
            elif self.cfg.asgi_loop == "uvloop":
                self.log.warning("lingerx: connections do not linger with asgi_loop uvloop, which accepts by itself")
            super().init_process()

        def handle_exit_signal(self) -> None:
            """SIGTERM."""
            self._told = time.monotonic()
            super().handle_exit_signal()

    return AsgiWorker


def _gevent_worker() -> type:
    from gevent.monkey import get_original
    from gunicorn.workers.ggevent import GeventWorker as _GeventWorker

    from . import gevent

    class GeventWorker(LingeringMixIn, _GeventWorker):
        """gunicorn's gevent worker: a greenlet ends when its answer is written, and does not wait for the client.

        Attributes: those of `LingeringMixIn`; closer is a `lingerx.gevent.Closer`. Needs the native engine: else
        nothing lingers, which the log tells.
        """

        def __init_subclass__(cls) -> None:
            super().__init_subclass__()
            if cls.closer is not None and not isinstance(cls.closer, gevent.Closer):
                raise TypeError(f"closer is a lingerx.gevent.Closer, or None for the default one; got {cls.closer!r}")

        def _closer(self) -> Closer:
            return gevent.default_closer() if self.closer is None else self.closer

        def _listener(self, sock: socket.socket) -> socket.socket:
            return sock  # gevent accepts by itself

        def run(self) -> None:
            """As `LingeringMixIn.run`."""
            try:
                self._closer()
            except RuntimeError as why:
                self.log.warning("lingerx: connections do not linger: %s", why)
                super(LingeringMixIn, self).run()
            else:
                super().run()

        def handle(self, listener: Any, client: Any, addr: Any) -> None:
            """One connection, until gunicorn closes it."""
            plain: type[socket.socket] = get_original("socket", "socket")  # closers take no other
            kind = client.family, client.type, client.proto
            # As long as there is such an object, gunicorn's close() leaves the fd open.
            kept = client.makefile("rb", 0)
            try:
                super().handle(listener, client, addr)
            finally:
                if client.fileno() >= 0:
                    with plain(*kind, client.detach()) as sock, suppress(RuntimeError, OSError):
                        self._closer().close(sock, self.policy)  # else a plain close has to do
                kept.close()

    return GeventWorker


if TYPE_CHECKING:
    AsgiWorker = Any
    GeventWorker = Any
else:

    def __getattr__(name: str) -> object:
        # Made for those who ask: gunicorn's own import asyncio and gevent, or are not there at all.
        make = {"AsgiWorker": _asgi_worker, "GeventWorker": _gevent_worker}.get(name)
        if make is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            worker = make()
        except (ImportError, RuntimeError) as missing:  # gunicorn's own word for a missing gevent
            needed = "gunicorn 24 or later" if name == "AsgiWorker" else "gevent (pip install 'lingerx[gevent]')"
            raise ImportError(f"lingerx.gunicorn.{name} needs {needed}") from missing
        worker.__module__, worker.__qualname__ = __name__, name
        return globals().setdefault(name, worker)
