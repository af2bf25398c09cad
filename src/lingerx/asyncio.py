"""asyncio and uvloop: transports whose close() lingers, and a close to wait for.

Public names only; how a transport ends is in `_asyncio_close`. TCP, TLS and UNIX. No task, no system call, and
nothing is done to what is sent or received before close().
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import Any

from ._arguments import check_socket
from ._asyncio_close import Closing, Handed, Tell, socket_of
from ._terms import check_terms
from .closer import Closer, default_closer
from .policy import Drain, Policy
from .report import Outcome, Report

__all__ = ["LingeringTransport", "aclose", "lingering", "lingering_client"]

Protocol = asyncio.BaseProtocol
Connected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


async def aclose(
    what: asyncio.StreamWriter | asyncio.BaseTransport | socket.socket,
    policy: Policy | None = None,
    *,
    closer: Closer | None = None,
) -> Report:
    """Close a connection by a policy, wait for its end without blocking the loop, and say what came of it.

    what: a StreamWriter, a transport of asyncio or uvloop (TCP, TLS, UNIX), or a socket that no transport owns. What
        was written is sent first, while input is read and discarded; then a closer waits for the peer. A transport's
        protocol sees no more data and, when the transport closes, connection_lost.
    policy: any but KernelLinger. Default: Drain(timeout=3.0). Its limits hold for all of it together. With
        Background and data that the kernel has not taken yet, this returns at once and the loop goes on sending, as
        after a plain close; so it does with Background and TLS.
    closer: where it lingers; None for `default_closer()`. Where it was shut down, this is a plain close.

    Returns a Report, when the fd is closed; what is closed, or being closed by lingerx, is ALREADY_CLOSED. A plain
    close() that is under way is waited for, and nobody knows then what it dropped: `delivered` is None at best. At a
    limit, what the kernel has not taken is dropped: `delivered` is then False. Where no fd is left for the copy that
    lingers, the close after the last byte is a plain one: BACKGROUND, with `error` EMFILE. Cancelled: the connection is
    closed at once. The policy and closer of a LingeringTransport are not used here: pass them again.

    Raises TypeError or ValueError, with the connection untouched, for what is none of these and for a wrong policy.

    Sources: RFC 9293 3.6, RFC 8446 6.1; asyncio's "Transports and Protocols".
    """
    policy = Drain() if policy is None else policy
    check_terms(policy, closer, False)
    done = asyncio.get_running_loop().create_future()

    def tell(report: Report) -> None:
        if not done.done():
            done.set_result(report)

    under_way = _begin(what, policy, closer, tell)
    try:
        report: Report = await done
    except asyncio.CancelledError:
        if under_way is not None:
            under_way.expire()
        raise
    return report


def _begin(what: Any, policy: Policy, closer: Closer | None, tell: Tell) -> Closing | Handed | None:
    if isinstance(what, socket.socket):
        if check_socket(what) >= 0:
            return Handed(asyncio.get_running_loop(), what, policy, closer, tell)
    else:
        transport = what.transport if isinstance(what, asyncio.StreamWriter) else what
        if not all(hasattr(transport, name) for name in ("get_extra_info", "set_protocol", "abort")):
            raise TypeError(f"pass a StreamWriter, a transport or a socket; got {what!r}")
        if not isinstance(transport, LingeringTransport):
            transport = LingeringTransport(transport)
        try:
            sock = socket_of(transport)
        except OSError:
            sock = None
        if sock is not None and transport._closing is None:
            return transport._begin(sock, policy, closer, tell)
    tell(Report(Outcome.ALREADY_CLOSED, error=errno.EBADF))
    return None


class LingeringTransport(asyncio.Transport):
    """A transport whose close() lingers; in all else the one that it wraps.

        class Server(asyncio.Protocol):
            def connection_made(self, transport):
                self.transport = lingerx.asyncio.LingeringTransport(transport, lingerx.Drain(timeout=10.0))

    transport: of asyncio or uvloop: TCP, TLS or UNIX. Its protocol stays what it is, so reading costs nothing more.
    policy, closer: attributes, which may be set up to close(). policy: None for the closer's own policy. closer: None
        for `default_closer()`.

    close() returns at once. What was written is sent while input is read and discarded (set_protocol), within the
    policy's limits; then the transport closes, the protocol's connection_lost is called, and a copy of the fd lingers
    in the closer, which costs the loop nothing. For TLS close_notify is sent before. At a limit, what the kernel has
    not taken is dropped, and the connection is closed by `on_timeout`. After close() is_closing() is True, and writes
    are ignored. abort() closes at once, also while close() is under way. Background is the plain close(), Abort is
    RST, which asyncio's own abort() is not.

    Where nobody can linger (the closer was shut down, no fd is left for the copy) the last step is a plain close, and
    nothing is raised. When the loop itself is closed, those that still send are cut off, as ever; the others go on in
    the closer. A transport that the loop closes by itself (after the peer's EOF, an error, `Server.close_clients()`)
    is closed plainly.

    `loop.sendfile` and, in asyncio, `loop.start_tls` take it; uvloop's start_tls does not: give it `wrapped`. What
    start_tls returns, and what a StreamWriter has after its own start_tls(), is a plain transport: wrap it again, or
    end it by `aclose`.

    Raises TypeError or ValueError for a wrong policy or closer.
    """

    __slots__ = ("__weakref__", "_closing", "_keep", "_loop", "_transport", "closer", "policy")

    def __init__(
        self, transport: asyncio.BaseTransport, policy: Policy | None = None, *, closer: Closer | None = None
    ) -> None:
        super().__init__()
        check_terms(policy, closer, False)
        self._transport: Any = transport.wrapped if isinstance(transport, LingeringTransport) else transport
        self._loop = asyncio.get_running_loop()
        self.policy = policy
        self.closer = closer
        self._closing: Closing | None = None
        self._keep: object = None

    @property
    def wrapped(self) -> asyncio.Transport:
        """The transport itself."""
        return self._transport  # type: ignore[no-any-return]

    def close(self) -> None:
        """Close lingering. Returns at once, raises nothing for what the network does, and nothing when called again.

        Raises TypeError or ValueError, with the connection untouched, when `policy` or `closer` was set to a wrong one.
        """
        if self.is_closing():
            return
        check_terms(self.policy, self.closer, False)
        policy = self.policy
        if policy is None:
            try:
                policy = (default_closer() if self.closer is None else self.closer).policy
            except (RuntimeError, OSError):  # no fd left for a closer, which then cannot linger either
                policy = Drain()
        try:
            sock = socket_of(self._transport)
        except (OSError, TypeError):  # closed, or nothing that could linger
            self._transport.close()
        else:
            self._begin(sock, policy, self.closer, None)

    def abort(self) -> None:
        """As ever, also while close() is under way: what is not sent is dropped."""
        if self._closing is not None:
            self._closing.expire()
        else:
            self._transport.abort()

    def _begin(self, sock: Any, policy: Policy, closer: Closer | None, tell: Tell | None) -> Closing:
        self._closing = Closing(self._loop, self._transport, policy, closer, tell, self)
        self._closing.begin(sock)
        return self._closing

    def is_closing(self) -> bool:
        """True from close() on."""
        return self._closing is not None or self._transport.is_closing()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """As ever; ignored after close()."""
        if self._closing is None:
            self._transport.write(data)

    def writelines(self, list_of_data: Any) -> None:
        """As ever; ignored after close()."""
        if self._closing is None:
            self._transport.writelines(list_of_data)

    def write_eof(self) -> None:
        """As ever; ignored after close(), which says so itself."""
        if self._closing is None:
            self._transport.write_eof()

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The protocol that was set, also while close() is under way."""
        protocol: asyncio.BaseProtocol = (
            self._transport.get_protocol() if self._closing is None else self._closing.protocol
        )
        return protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """As ever; after close() it is only told of connection_lost."""
        if self._closing is None:
            self._transport.set_protocol(protocol)
        else:
            self._closing.protocol = protocol

    def pause_reading(self) -> None:
        """As ever; ignored after close()."""
        if self._closing is None:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """As ever; ignored after close()."""
        if self._closing is None:
            self._transport.resume_reading()

    def is_reading(self) -> bool:
        """As ever; False after close()."""
        return self._closing is None and self._transport.is_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As ever."""
        return self._transport.get_extra_info(name, default)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """As ever; ignored after close()."""
        if self._closing is None:
            self._transport.set_write_buffer_limits(high, low)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """As ever."""
        return self._transport.get_write_buffer_limits()  # type: ignore[no-any-return]

    def get_write_buffer_size(self) -> int:
        """As ever."""
        return self._transport.get_write_buffer_size()  # type: ignore[no-any-return]

    def can_write_eof(self) -> bool:
        """As ever."""
        return self._transport.can_write_eof()  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        # What asyncio itself asks its transports for: sendfile, start_tls.
        return getattr(object.__getattribute__(self, "_transport"), name)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._transport!r}>"


class _Opening(asyncio.Protocol):
    """Holds the place of a protocol until there is a transport to wrap."""

    __slots__ = ("_closer", "_policy", "_protocol")

    def __init__(self, protocol: Protocol, policy: Policy | None, closer: Closer | None) -> None:
        self._protocol = protocol
        self._policy = policy
        self._closer = closer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        lingering = LingeringTransport(transport, self._policy, closer=self._closer)
        lingering.set_protocol(self._protocol)
        self._protocol.connection_made(lingering)


def lingering(
    protocol_factory: Callable[[], Protocol], policy: Policy | None = None, *, closer: Closer | None = None
) -> Callable[[], Protocol]:
    """A protocol factory for servers: every transport.close() that its protocols make lingers, in the background.

        server = await loop.create_server(lingerx.asyncio.lingering(Server), "", 8000)

    protocol_factory: makes a Protocol or BufferedProtocol. Its connection_made gets a LingeringTransport.
    policy: any but KernelLinger; None for the closer's own policy: with the default closer
        Drain(timeout=30.0, idle_timeout=5.0). closer: where they linger; None for `default_closer()`.

    For loop.create_server and create_unix_server, with ssl= too, in asyncio and uvloop. (Calls that return a protocol,
    such as create_connection, would return one that only holds its place.)

    Raises TypeError or ValueError for a wrong policy or closer.
    """
    check_terms(policy, closer, False)
    return lambda: _Opening(protocol_factory(), policy, closer)


def lingering_client(
    client_connected_cb: Connected, policy: Policy | None = None, *, closer: Closer | None = None
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]:
    """A callback for asyncio.start_server and start_unix_server: every writer.close() in it lingers, in the background.

        server = await asyncio.start_server(lingerx.asyncio.lingering_client(handle), "", 8000)

    client_connected_cb: a function or coroutine function of a StreamReader and a StreamWriter. A coroutine runs in a
        task, as ever. When it raises, the loop's exception handler is told, and the connection closed, lingering.
    policy, closer: as for `lingering`.

    writer.wait_closed() waits until everything is sent and the transport closed, not for the peer; `await
    aclose(writer)` does. Raises TypeError or ValueError for a wrong policy or closer.
    """
    check_terms(policy, closer, False)

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        transport = LingeringTransport(writer.transport, policy, closer=closer)
        # A writer that is collected closes its transport (CPython 3.12): it lives as long as ours.
        transport._keep = writer
        loop = asyncio.get_running_loop()
        protocol: Any = transport.get_protocol()
        result = client_connected_cb(reader, asyncio.StreamWriter(transport, protocol, reader, loop))
        if asyncio.iscoroutine(result):
            _run(loop, transport, result)

    return connected


_tasks: set[asyncio.Task[Any]] = set()  # the loop itself refers to them weakly


def _run(loop: asyncio.AbstractEventLoop, transport: LingeringTransport, coroutine: Any) -> None:
    def done(task: asyncio.Task[Any]) -> None:
        _tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            loop.call_exception_handler(
                {
                    "message": "Unhandled exception in client_connected_cb",
                    "exception": error,
                    "transport": transport,
                }
            )
        if error is not None or task.cancelled():
            transport.close()

    task = loop.create_task(coroutine)
    _tasks.add(task)
    task.add_done_callback(done)
