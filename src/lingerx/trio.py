"""Lingering for trio: `aclose` waits and tells, `LingeringStream` and `lingering` close in the background.

Only what trio's streams and sockets need may live here. A socket leaves trio's hands by `notify_closing` and
`detach`, and goes to a closer; no system call is made here. Needs the extra `trio`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any

from ._arguments import check_data, check_fd, check_policy
from ._ownership import Hold
from ._streams import hand_over, policy_of, report_without, submit
from ._terms import check_terms
from .closer import Closer, default_closer
from .policy import Drain, Policy
from .report import Outcome, Report

try:
    import trio
except ModuleNotFoundError as missing:
    if missing.name != "trio":
        raise
    raise ImportError("lingerx.trio needs trio, which is not installed: pip install 'lingerx[trio]'") from missing

if TYPE_CHECKING:
    import socket
    from concurrent.futures import Future

    from typing_extensions import Buffer

__all__ = ["LingeringListener", "LingeringStream", "aclose", "lingering", "send_and_aclose"]


async def aclose(stream: Any, policy: Policy | None = None, *, closer: Closer | None = None) -> Report:
    """Close as the policy says, and wait for what came of it; other tasks go on meanwhile.

    stream: a trio.SocketStream, a trio socket, a LingeringStream, or a trio.SSLStream over one of the first and last.
        Taken over: it is closed from here on, and tasks that are blocked in it get trio.ClosedResourceError.
    policy: Drain(timeout=3.0) by default. KernelLinger would block and is refused.
    closer: waits in its thread; None for `lingerx.default_closer()`.

    Over TLS close_notify is sent before the half-close, unless the stream is https_compatible or its handshake was
    not done; input is discarded meanwhile, and the policy's deadline counts for all of it. `unacked` counts it too. The
    report speaks of what the kernel was given: what a cancelled send_all() had not written yet is lost, and not in it.

    Returns the Report; ALREADY_CLOSED for a stream that was closed before. When it is cancelled, the policy's
    `on_timeout` is applied at once, and trio.Cancelled goes on. Network trouble is never an exception.

    Raises, with the stream untouched, TypeError or ValueError for what cannot be closed so. RuntimeError when the
    closer was shut down, OSError where the default one finds no fd: the stream is then closed plainly.

    Source: trio.abc.AsyncResource.aclose; RFC 9293 3.6, RFC 8446 6.1.
    """
    policy = Drain() if policy is None else policy
    check_terms(policy, closer, wait=False)
    return await _close(stream, _check(stream), policy, closer)


async def send_and_aclose(
    stream: Any, data: Buffer, policy: Policy | None = None, *, closer: Closer | None = None
) -> Report:
    """Send the last bytes, then close as `aclose` does, under one deadline: input is discarded all the while.

    A client that sends everything before it reads would block send_all for ever, when the answer is larger than what
    the kernels take.

    data: any C-contiguous bytes-like object. policy: Drain or Flush. The rest is as for `aclose`; no TLS.

    Raises as `aclose` does, and ValueError for a trio.SSLStream (call its send_all, then `aclose`) and for a policy
    without a deadline; TypeError for data that is not bytes-like. The stream is then untouched.
    """
    policy = Drain() if policy is None else policy
    check_terms(policy, closer, wait=False)
    check_policy(policy, deadline=True)
    check_data(data)
    if isinstance(stream, trio.SSLStream):
        raise ValueError(
            "the data of a TLS stream can't be sent in the background: call stream.send_all(data), then aclose(stream)"
        )
    return await _close(stream, _check(stream), policy, closer, data)


class LingeringStream(trio.abc.HalfCloseableStream):
    """A trio.SocketStream whose aclose() lingers in the background, for servers that close by themselves.

    stream: the trio.SocketStream. policy: None for the closer's own: with the default closer
    Drain(timeout=30.0, idle_timeout=5.0). closer: where it lingers; None for `lingerx.default_closer()`. All three
    are attributes; the last two may be set up to the close.

    aclose() hands the socket over and returns after a checkpoint: it lingers in a cancelled scope too, as in
    trio.aclose_forcefully. Where nobody can linger it is a plain close: the closer was shut down or cannot start.
    Who wants to know what came of it awaits `lingerx.trio.aclose(stream)`.

    Raises TypeError for another stream, TypeError or ValueError for a policy or closer that cannot be used here.
    """

    def __init__(
        self, stream: trio.SocketStream, policy: Policy | None = None, *, closer: Closer | None = None
    ) -> None:
        check_terms(policy, closer, wait=False)
        if not isinstance(stream, trio.SocketStream):
            raise TypeError(f"stream is a trio.SocketStream (TLS goes over it, not under it); got {stream!r}")
        self.stream = stream
        self.policy = policy
        self.closer = closer

    @property
    def socket(self) -> trio.socket.SocketType:
        """Of the stream, as trio.SocketStream has it."""
        return self.stream.socket

    @property
    def setsockopt(self) -> Callable[..., None]:
        """That of trio.SocketStream."""
        return self.stream.setsockopt

    @property
    def getsockopt(self) -> Callable[..., Any]:
        """That of trio.SocketStream."""
        return self.stream.getsockopt

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As trio.SocketStream does."""
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """As trio.SocketStream does."""
        await self.stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """As trio.SocketStream does."""
        await self.stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """As trio.SocketStream does."""
        return await self.stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        """Half-close now, and linger in the background."""
        if self.socket.fileno() >= 0:
            hand_over(_take(self.socket), self.policy, self.closer)
        await trio.lowlevel.checkpoint()

    async def send_and_aclose(self, data: Buffer) -> bool:
        """Send the last bytes and close, in the background; returns after a checkpoint, however much there is.

        data: as for `send_and_aclose`. Returns True when all of it was taken, by the kernel or by the closer; False
        when some of it was dropped, as `lingerx.Closer.send_and_close` does, or the closer was shut down.

        Raises, with the stream untouched, TypeError or ValueError as `send_and_aclose` does.
        """
        check_data(data)
        check_policy(policy_of(self.policy, self.closer), deadline=True)
        taken = self.socket.fileno() >= 0 and hand_over(_take(self.socket), self.policy, self.closer, data)
        await trio.lowlevel.checkpoint()
        return taken


class LingeringListener(trio.abc.Listener[LingeringStream]):
    """A listener whose connections are LingeringStreams, for trio.serve_listeners and under a trio.SSLListener.

    listener: of trio.SocketStreams, such as those of trio.open_tcp_listeners. policy, closer: as for LingeringStream.

    A trio.SSLStream that is closed forcefully sends no close_notify, which is what trio.serve_listeners does when a
    handler returns: give it `lingering(handler)`, or close with `lingerx.trio.aclose(stream)`.
    """

    def __init__(
        self,
        listener: trio.abc.Listener[trio.SocketStream],
        policy: Policy | None = None,
        *,
        closer: Closer | None = None,
    ) -> None:
        check_terms(policy, closer, wait=False)
        self.listener = listener
        self.policy = policy
        self.closer = closer

    async def accept(self) -> LingeringStream:
        """As the listener does, but the connection lingers when it is closed."""
        return LingeringStream(await self.listener.accept(), self.policy, closer=self.closer)

    async def aclose(self) -> None:
        """As the listener does: connections have nothing to do with it."""
        await self.listener.aclose()


def lingering(
    handler: Callable[[Any], Awaitable[object]], policy: Policy | None = None, *, closer: Closer | None = None
) -> Callable[[Any], Awaitable[None]]:
    """A handler for trio.serve_tcp, serve_ssl_over_tcp or serve_listeners whose connections linger when they end.

        await trio.serve_tcp(lingerx.trio.lingering(handler), 8000)

    handler: gets a LingeringStream; over TLS the trio.SSLStream, over a LingeringStream. When it returns or raises,
        the stream is closed in the background, over TLS with close_notify; until then it may do so itself.
    policy, closer: as for LingeringStream.

    Raises TypeError or ValueError for a policy or closer that cannot be used here.
    """
    check_terms(policy, closer, wait=False)

    @wraps(handler)
    async def handle(stream: Any) -> None:
        if isinstance(stream, trio.SSLStream):
            transport = stream.transport_stream = wrap(stream.transport_stream)
        else:
            transport = stream = wrap(stream)
        try:
            await handler(stream)
        finally:
            await _close_in_background(stream, transport)

    def wrap(stream: Any) -> LingeringStream:
        return stream if isinstance(stream, LingeringStream) else LingeringStream(stream, policy, closer=closer)

    return handle


# Out of trio's hands --------------------------------------------------------------------------------------


def _check(stream: Any) -> trio.socket.SocketType:
    """The trio socket under `stream`, open and fit to be closed, or closed already. Borrows.

    Raises TypeError or ValueError for what cannot be closed so.
    """
    inner = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    if isinstance(inner, LingeringStream):
        inner = inner.stream
    if isinstance(inner, trio.SocketStream):
        inner = inner.socket
    if not isinstance(inner, trio.socket.SocketType):
        raise TypeError(
            "stream is a trio.SocketStream, a trio socket, a lingerx.trio.LingeringStream, or a trio.SSLStream over a "
            f"stream of these; got {stream!r}"
        )
    if inner.type != trio.socket.SOCK_STREAM:
        raise TypeError(f"only stream sockets (SOCK_STREAM) have a FIN to wait for; close this one itself: {inner!r}")
    if inner.fileno() >= 0:
        check_fd(inner.fileno())
    return inner


@trio.lowlevel.enable_ki_protection
def _take(sock: trio.socket.SocketType) -> socket.socket:
    """Owns: the fd of an open trio socket, in an object that nobody else knows. Who is blocked in it is woken."""
    trio.lowlevel.notify_closing(sock)
    hold = Hold(None, sock.detach())
    try:
        hold.take()
    except BaseException:
        hold.give_up()
        raise
    return hold.raw


class _NoInput(Exception):
    """There is nothing more to read for a TLS session that ends."""


class _LastWords(trio.abc.Stream):
    """What stands under a trio.SSLStream while it is closed: it keeps what is sent, and has no input."""

    def __init__(self) -> None:
        self.sent = b""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += data

    async def wait_send_all_might_not_block(self) -> None:
        pass

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        raise _NoInput

    async def aclose(self) -> None:
        pass


async def _goodbye(stream: trio.SSLStream[Any]) -> bytes:
    """Close a TLS stream whose socket was taken; what it would have sent, for the closer to send: close_notify.

    The closer reads while it sends. SSLStream.aclose does not: with a peer that sends everything before it reads it
    would wait for ever.
    """
    transport = stream.transport_stream
    last = _LastWords()
    with trio.CancelScope(shield=True):  # nothing in here waits
        # Who was blocked in the socket has its turn, in any order with ours. Whatever it was in the middle of sending
        # is cut off: the stream is then broken, and close_notify must not follow.
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        stream.transport_stream = last
        try:
            stream.version()
            # Input that was received but not read would be taken for an error (APPLICATION_DATA_AFTER_CLOSE_NOTIFY).
            with suppress(_NoInput, trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
                while await stream.receive_some():
                    pass
            await stream.aclose()
        except trio.NeedHandshakeError:  # there is no session to end, and no time to begin one
            await trio.aclose_forcefully(stream)
        finally:
            stream.transport_stream = transport
    return last.sent


# Into a closer's ------------------------------------------------------------------------------------------


async def _close(
    stream: Any, sock: trio.socket.SocketType, policy: Policy, closer: Closer | None, data: Buffer | None = None
) -> Report:
    """Owns. For arguments that were checked."""
    tls = isinstance(stream, trio.SSLStream)
    if sock.fileno() < 0:
        if tls:
            await _goodbye(stream)  # whoever closed its socket need not have closed the stream
        await trio.lowlevel.checkpoint()
        return report_without(Outcome.ALREADY_CLOSED, data)
    taken = _take(sock)
    try:
        goodbye = await _goodbye(stream) if tls else b""
        closer = default_closer() if closer is None else closer
        future = submit(taken, policy, closer, data, goodbye=goodbye)
    finally:
        taken.close()  # nothing, when it was handed over
    return await _report_of(future, closer)


async def _close_in_background(stream: Any, transport: LingeringStream) -> None:
    """Owns. For what a handler leaves behind: a checkpoint or a few, also in a cancelled scope."""
    if not isinstance(stream, trio.SSLStream):
        await transport.aclose()
        return
    taken = _take(transport.socket) if transport.socket.fileno() >= 0 else None
    goodbye = b""
    try:
        goodbye = await _goodbye(stream)
    finally:
        if taken is not None:
            hand_over(taken, transport.policy, transport.closer, goodbye=goodbye)


async def _report_of(future: Future[Report], closer: Closer) -> Report:
    done = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def wake(_: object) -> None:
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(done.set)

    future.add_done_callback(wake)
    try:
        await done.wait()
    except BaseException:
        closer.expire(future)
        raise
    return future.result()
