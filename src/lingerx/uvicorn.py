"""uvicorn's HTTP protocols, with transports that linger: `uvicorn --http lingerx.uvicorn:AutoHTTPProtocol app:app`.

Only how uvicorn gets and waits for them lives here; the transport is the one of `lingerx.asyncio`. No system call is
made.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING, Any

from ._terms import Terms
from .asyncio import LingeringTransport
from .closer import Closer, default_closer

try:
    from uvicorn.protocols.http import h11_impl
except ImportError as missing:
    raise ImportError("lingerx.uvicorn needs uvicorn (pip install 'lingerx[uvicorn]')") from missing

if TYPE_CHECKING:
    from uvicorn.server import ServerState

    class Protocol(asyncio.Protocol):
        # What all of uvicorn's have.
        server_state: ServerState
        connections: set[Any]
        limit_concurrency: int | None
else:
    Protocol = object

__all__ = ["AutoHTTPProtocol", "H11Protocol", "HttpToolsProtocol", "LingeringMixIn"]

LOOK = 0.05
"""Seconds between two looks whether all have lingered, once the server shuts down. (uvicorn itself looks every 0.1.)"""


class LingeringMixIn(Terms, Protocol):
    """Connections end lingering, in the background, whoever of uvicorn or its protocols closes them.

        class MyProtocol(lingerx.uvicorn.LingeringMixIn, uvicorn.protocols.http.h11_impl.H11Protocol):
            policy = lingerx.Drain(timeout=10.0)

    Stands before the protocol's class; `uvicorn --http mymodule:MyProtocol`, or `uvicorn.Config(http=MyProtocol)`. For
    asyncio and uvloop, TLS, worker processes, and the websockets that a connection may become. Attributes:

    policy: how connections are closed; None for the closer's own policy.
    closer: where they linger; None for `lingerx.default_closer()`.

    On shutdown uvicorn ends by a signal, without the interpreter's own exit. Hence it waits here, as it does for
    connections, until nothing lingers, for at most the closer's `exit_timeout`, or its own --timeout-graceful-shutdown
    if that is shorter. What still lingers then gets a plain close, by the kernel.

    An answer and its lingering share the policy's `timeout`: set it to more than your slowest download. With
    --limit-concurrency one more background task is let in than without lingerx.

    Raises TypeError or ValueError when a class is made with a policy or closer that cannot be used here.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.wait:
            raise ValueError("an event loop must not wait: wait is for threads")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As ever, but with a transport that lingers when it is closed."""
        rest = _rests.get(self.server_state)
        if rest is None:
            _rests[self.server_state] = rest = _Rest(self.connections, self.closer)
        self.connections.add(rest)
        limit = getattr(self, "limit_concurrency", None)
        if limit is not None:
            self.limit_concurrency = limit + 1  # for uvicorn counts `connections`, and the rest is none
        super().connection_made(LingeringTransport(transport, self.policy, closer=self.closer))


class _Rest:
    # No connection, but stands among a server's connections for all that linger: so uvicorn tells it to shut down, and
    # waits for it.

    def __init__(self, connections: set[Any], closer: Closer | None) -> None:
        self._connections, self._closer = connections, closer

    def shutdown(self, deadline: float | None = None) -> None:
        """Leave when the connections have left and nothing lingers, or at the deadline, which begins when they have."""
        loop = asyncio.get_running_loop()
        try:
            closer = default_closer() if self._closer is None else self._closer
        except (RuntimeError, OSError):  # no fd left for one: nothing can linger in it
            return self._connections.discard(self)
        if len(self._connections) > 1:
            deadline = None
        elif closer.pending == 0 or (deadline is not None and loop.time() >= deadline):
            return self._connections.discard(self)
        elif deadline is None:
            deadline = loop.time() + closer.exit_timeout
        loop.call_later(LOOK, self.shutdown, deadline)
        return None


_rests: weakref.WeakKeyDictionary[ServerState, _Rest] = weakref.WeakKeyDictionary()


class H11Protocol(LingeringMixIn, h11_impl.H11Protocol):
    """uvicorn's protocol on h11, with connections that linger: `--http lingerx.uvicorn:H11Protocol`."""


try:
    from uvicorn.protocols.http import httptools_impl
except ImportError:
    AutoHTTPProtocol: type[asyncio.Protocol] = H11Protocol

    def __getattr__(name: str) -> object:
        if name == "HttpToolsProtocol":
            raise ImportError("lingerx.uvicorn.HttpToolsProtocol needs httptools (pip install httptools)")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

else:

    class HttpToolsProtocol(LingeringMixIn, httptools_impl.HttpToolsProtocol):
        """uvicorn's protocol on httptools, with connections that linger: `--http lingerx.uvicorn:HttpToolsProtocol`."""

    AutoHTTPProtocol = HttpToolsProtocol
