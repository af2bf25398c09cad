"""hypercorn: a `Config` whose connections linger, in workers that run on asyncio's own event loop.

Only how hypercorn gets its listening sockets lives here; what they accept is the listener's. No system call is made.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Iterator

from ._terms import check_terms
from .closer import Closer
from .listener import LingerListener, wrap_listener
from .policy import Policy

try:
    import hypercorn.config
except ImportError as missing:
    raise ImportError("lingerx.hypercorn needs hypercorn (pip install 'lingerx[hypercorn]')") from missing

__all__ = ["Config"]


class Config(hypercorn.config.Config):
    """As hypercorn's Config, but connections linger when hypercorn closes them: in the background, with TLS too.

        config = Config.from_mapping(bind="0.0.0.0:8000", policy=lingerx.Drain(timeout=10.0))
        asyncio.run(hypercorn.asyncio.serve(app, config))

    policy: how connections are closed; None for the closer's own policy.
    closer: where they linger; None for `lingerx.default_closer()`. hypercorn sends its Config to worker processes,
        which a Closer cannot follow: for them set it in a subclass that stands in a module of its own.

    `hypercorn.run.run(config)` starts worker processes. The command line takes no Config, but sets every name of its
    configuration module (`hypercorn -c python:module app:app`) on a plain one, methods too. So this works there, when
    whatever the sockets depend on is told to both (bind, insecure_bind, certfile, keyfile, workers, umask, user,
    group):

        bind, workers = "0.0.0.0:8000", 2
        create_sockets = lingerx.hypercorn.Config.from_mapping(bind=bind, workers=workers).create_sockets

    Without effect, and without harm: worker_class "uvloop", whose loop accepts by itself; "trio", which takes nothing
    but plain sockets; HTTP/3. On SIGTERM connections in flight have the closer's `exit_timeout`; but of several workers
    hypercorn kills the rest as soon as the first has ended, with all that lingers there.

    Raises TypeError or ValueError when the sockets are made with a policy or closer that cannot be used here.

    Source: hypercorn's "Configuration" and "API usage" (hypercorn 0.18).
    """

    policy: Policy | None = None
    closer: Closer | None = None

    def create_sockets(self) -> hypercorn.config.Sockets:
        """As ever; called by hypercorn, in the worker or in its parent."""
        check_terms(self.policy, self.closer, False)
        sockets = super().create_sockets()
        return hypercorn.config.Sockets(
            _Listeners(sockets.secure_sockets, self), _Listeners(sockets.insecure_sockets, self), sockets.quic_sockets
        )


class _Listeners(list[socket.socket]):
    # Plain sockets, as they must be to be sent to a worker process or given to trio, until an asyncio loop asks.

    def __init__(self, socks: Iterable[socket.socket], config: Config) -> None:
        super().__init__(socks)
        self._config = config

    def __iter__(self) -> Iterator[socket.socket]:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return super().__iter__()
        policy, closer = self._config.policy, self._config.closer
        for index, sock in enumerate(super().__iter__()):
            if not isinstance(sock, LingerListener):
                self[index] = wrap_listener(sock, policy=policy, closer=closer)
        return super().__iter__()
