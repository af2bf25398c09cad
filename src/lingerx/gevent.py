"""gevent's servers, whose connections end lingering, and a `Closer` that works where gevent has patched threads.

They change how a connection is closed; no system call is made here, and nothing of gevent's is replaced.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from . import closer as _closer
from ._engine import Loop, engine
from ._linger_socket import LingerSocket
from ._terms import Terms, check_terms

try:
    import gevent
    import gevent.monkey
    import gevent.pywsgi
    import gevent.server
except ImportError as missing:
    raise ImportError("lingerx.gevent needs gevent (pip install 'lingerx[gevent]')") from missing

if TYPE_CHECKING:
    import socket

    from gevent.server import StreamServer as Server
else:
    Server = object

__all__ = ["Closer", "LingeringMixIn", "StreamServer", "WSGIServer", "default_closer"]

LOOK = 0.005
"""Seconds between two looks whether a closer's thread has ended: a guess."""


# The closer -----------------------------------------------------------------------------------------------


class Closer(_closer.Closer):
    """As `lingerx.Closer`, with a thread of the system's also where `gevent.monkey` makes greenlets of threads.

    There the other one would hold up all greenlets. `close` and `submit` return at once and may be called by any
    greenlet; `join`, `shutdown` and a future's `result` let other greenlets run where `threading` is patched. It
    takes socket.socket objects as they were before they were patched; the servers here see to that.

    With `monkey.patch_all()` lingerx has to be imported first, and has to be the native engine:

        import lingerx.gevent
        from gevent import monkey; monkey.patch_all()

    Raises RuntimeError where that is not so; else as `lingerx.Closer`.
    """

    _engine_loop = staticmethod(  # type: ignore[assignment]
        lambda policy, pending, buffered, on_full, collect, _: Loop(policy, pending, buffered, on_full, collect, _start)
    )

    def __init__(self, *arguments: Any, **options: Any) -> None:
        if not issubclass(LingerSocket, _original("socket", "socket")):
            raise RuntimeError("gevent has patched sockets before lingerx saw them: import lingerx.gevent first")
        if engine != "native" and gevent.monkey.is_module_patched("socket"):
            raise RuntimeError("gevent has patched what the portable engine waits by: it needs the native engine")
        super().__init__(*arguments, **options)


def _original(module: str, name: str) -> Any:
    return gevent.monkey.get_original(module, name)


class _Thread:
    # What a Closer needs of threading.Thread, by that which gevent leaves alone.

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run
        self._running = _original("_thread", "allocate_lock")()

    def start(self) -> None:
        self._running.acquire()
        try:
            _original("_thread", "start_new_thread")(self._main, ())
        except BaseException:
            self._running.release()
            raise

    def _main(self) -> None:
        try:
            if hasattr(signal, "pthread_sigmask"):  # not on Windows
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            self._run()
        finally:
            self._running.release()

    def join(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while self._running.locked() and time.monotonic() < end:
            gevent.sleep(LOOK)


def _start(loop: Any) -> None:
    if _closer._exiting:
        raise RuntimeError("the interpreter exits: nobody would wait for a closer; the socket is untouched")
    if loop.thread is None:
        loop.thread = thread = _Thread(loop.run)
        try:
            thread.start()
        except BaseException:
            loop.thread = None
            raise


_default: Closer | None = None


def default_closer() -> Closer:
    """As `lingerx.default_closer()`, but one that works with gevent."""
    global _default
    if _default is None or not (_closer._exiting or _default._loop.is_open()):
        _default = Closer()
    return _default


# The servers ----------------------------------------------------------------------------------------------


class LingeringMixIn(Terms, Server):
    """Connections end lingering, in the background, when the server closes them: their greenlets end at once.

    Stands before a class made of gevent.server.StreamServer. Attributes of the class or the server:

    policy: how a connection is closed; None for the closer's own policy.
    closer: where it lingers, a `lingerx.gevent.Closer`; None for `lingerx.gevent.default_closer()`.

    TLS too: close_notify goes out first. A handler that calls close() on its socket closes it plainly: leave that
    to the server, as gevent advises. What the handler has made by makefile() is of no more use once it has returned.

    Raises TypeError or ValueError when a class is made, or a server started, with terms that cannot be used here.

    Sources: gevent's docs, gevent.server.StreamServer and gevent.baseserver.BaseServer.do_close.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _check(cls)

    def start(self) -> None:
        """As ever; from here on connections come."""
        _check(self)
        if self.closer is None:
            default_closer()  # or there is none, which is told before a client comes
        super().start()

    def do_close(self, sock: Any, *arguments: Any) -> None:
        """Called when a handler has returned: linger, then what the server does anyway."""
        if sock.fileno() >= 0:
            self._linger(sock)
        super().do_close(sock, *arguments)

    def wrap_socket_and_handle(self, client_socket: Any, address: Any) -> Any:
        """Called for each connection with TLS: it ends as others do."""
        sock = self.wrap_socket(client_socket, **self.ssl_args)
        try:
            return self.handle(sock, address)
        finally:
            self.do_close(sock, address)

    def _linger(self, sock: Any, wait: bool = False) -> None:
        with _take(sock) as taken, suppress(RuntimeError, OSError):  # a plain close has to do
            (default_closer() if self.closer is None else self.closer).close(taken, self.policy)


def _check(terms: Any) -> None:
    check_terms(terms.policy, terms.closer, wait=False)
    if terms.wait:
        raise ValueError("wait=True would hold up all greenlets: connections linger by a closer here")
    if terms.closer is not None and not isinstance(terms.closer, Closer):
        raise TypeError(f"closer is a lingerx.gevent.Closer, or None for the default one; got {terms.closer!r}")


def _take(sock: Any) -> socket.socket:
    # Owns. gevent's sockets are none of the standard library's: the fd moves to one that is.
    if hasattr(sock, "unwrap"):
        sock.settimeout(0.0)
        with suppress(OSError, ValueError):  # it has sent close_notify, and the peer has not: would block
            sock.unwrap()
    kind = sock.family, sock.type, sock.proto
    taken: socket.socket = _original("socket", "socket")(*kind, sock.detach())
    return taken


class StreamServer(LingeringMixIn, gevent.server.StreamServer):
    """gevent.server.StreamServer, whose connections linger: see `LingeringMixIn`."""


class WSGIServer(LingeringMixIn, gevent.pywsgi.WSGIServer):
    """gevent.pywsgi.WSGIServer, whose connections linger: see `LingeringMixIn`.

    pywsgi reads the whole announced body of a request by itself. What gets lost without lingering are its answers to
    requests that it cannot read to their end: 400, 414, a broken chunk.
    """

    def handle(self, sock: Any, address: Any) -> None:
        """Called for each connection."""
        super().handle(_Kept(sock), address)


class _Kept:
    # For pywsgi's handler, which closes its socket before the server does.

    _sock = None  # what it would close first

    def __init__(self, sock: Any) -> None:
        self._kept = sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kept, name)

    def close(self) -> None:
        """Left to the server."""
