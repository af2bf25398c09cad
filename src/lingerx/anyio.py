"""Lingering for anyio, on asyncio and on trio: `aclose` waits and tells, `LingeringStream` and `lingering` do not.

Only what anyio's streams need may live here. Their socket cannot be taken away, so a copy of it goes to a closer
after theirs was closed; no system call is made here. Needs the extra `anyio`.

Nothing gets lost between the two: anyio's send() returns when the kernel has taken everything. Only what a send() had
not finished, because it was cancelled or is still waiting in another task, is dropped, as anyio's own aclose does.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ._arguments import check_data, check_fd, check_policy
from ._streams import hand_over, policy_of, report_without, submit
from ._terms import check_terms
from .closer import Closer, default_closer
from .policy import Drain, Policy
from .report import Outcome, Report

try:
    import anyio
    from anyio.abc import ByteStream, SocketAttribute
    from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint
    from anyio.streams.tls import TLSAttribute, TLSStream
except ModuleNotFoundError as missing:
    if missing.name != "anyio":
        raise
    raise ImportError("lingerx.anyio needs anyio, which is not installed: pip install 'lingerx[anyio]'") from missing

# Before 4.16, on asyncio, aclose() half-closed first, for the copy too: what is still to be sent would be lost.
try:
    _version = version("anyio")
except PackageNotFoundError:  # a program that was packed into one file: whoever packed it has seen to that
    _version = "4.16"
if tuple(map(int, re.findall(r"\d+", _version)[:2])) < (4, 16):
    raise ImportError(
        f"lingerx.anyio needs anyio 4.16 or newer, and {_version} is installed: pip install -U 'lingerx[anyio]'"
    )

if TYPE_CHECKING:
    import socket
    from concurrent.futures import Future

    from typing_extensions import Buffer

__all__ = ["LingeringStream", "aclose", "lingering", "send_and_aclose"]


async def aclose(stream: Any, policy: Policy | None = None, *, closer: Closer | None = None) -> Report:
    """Close as the policy says, and wait for what came of it; other tasks go on meanwhile.

    stream: a socket stream of anyio (TCP or UNIX), a LingeringStream, or a TLSStream over one of these. Taken over: it
        is closed from here on, and tasks that are blocked in it get anyio.ClosedResourceError.
    policy: Drain(timeout=3.0) by default. KernelLinger would block and is refused.
    closer: waits in its thread; None for `lingerx.default_closer()`.

    Over TLS close_notify is sent before the half-close, unless the stream is not standard_compatible; input is
    discarded meanwhile, and the policy's deadline counts for all of it. `unacked` counts it too. The
    report speaks of what the kernel was given: what a cancelled send() had not written yet is lost, and not in it.

    Returns the Report; ALREADY_CLOSED for a stream that was closed before, also by asyncio after a reset; FAILED with
    an errno after a plain close where there was no fd left for the copy. When it is cancelled, the policy's
    `on_timeout` is applied at once, and the cancellation goes on. Network trouble is never an exception.

    Raises, with the stream untouched, TypeError or ValueError for what cannot be closed so. RuntimeError when the
    closer was shut down, OSError where the default one finds no fd: the stream is then closed plainly.

    Source: anyio.abc.AsyncResource.aclose; RFC 9293 3.6, RFC 8446 6.1.
    """
    policy = Drain() if policy is None else policy
    check_terms(policy, closer, wait=False)
    return await _close(stream, _check(stream), policy, closer)


async def send_and_aclose(
    stream: Any, data: Buffer, policy: Policy | None = None, *, closer: Closer | None = None
) -> Report:
    """Send the last bytes, then close as `aclose` does, under one deadline: input is discarded all the while.

    A client that sends everything before it reads would block send() for ever, when the answer is larger than what
    the kernels take.

    data: any C-contiguous bytes-like object. policy: Drain or Flush. The rest is as for `aclose`; no TLS.

    Raises as `aclose` does, and ValueError for a TLSStream (call its send, then `aclose`) and for a policy without a
    deadline; TypeError for data that is not bytes-like. The stream is then untouched.
    """
    policy = Drain() if policy is None else policy
    check_terms(policy, closer, wait=False)
    check_policy(policy, deadline=True)
    check_data(data)
    if isinstance(stream, TLSStream):
        raise ValueError(
            "the data of a TLS stream can't be sent in the background: call stream.send(data), then aclose(stream)"
        )
    return await _close(stream, _check(stream), policy, closer, data)


class LingeringStream(ByteStream):
    """A socket stream of anyio whose aclose() lingers in the background.

    stream: a SocketStream of anyio, TCP or UNIX. policy: None for the closer's own: with the default closer
    Drain(timeout=30.0, idle_timeout=5.0). closer: where it lingers; None for `lingerx.default_closer()`. All three
    are attributes; the last two may be set up to the close.

    aclose() hands the socket over and returns after a checkpoint: it lingers in a cancelled scope too, as in
    anyio.aclose_forcefully. Where nobody can linger it is a plain close: the closer was shut down or cannot start, or
    there is no fd left for the copy. Who wants to know what came of it awaits `lingerx.anyio.aclose(stream)`.

    Raises TypeError for another stream, TypeError or ValueError for a policy or closer that cannot be used here.
    """

    def __init__(
        self, stream: anyio.abc.SocketStream, policy: Policy | None = None, *, closer: Closer | None = None
    ) -> None:
        check_terms(policy, closer, wait=False)
        if not isinstance(stream, anyio.abc.SocketStream):
            raise TypeError(f"stream is a SocketStream of anyio (TLS goes over it, not under it); got {stream!r}")
        self.stream = stream
        self.policy = policy
        self.closer = closer

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """As the socket stream does."""
        return await self.stream.receive(max_bytes)

    async def send(self, item: bytes) -> None:
        """As the socket stream does."""
        await self.stream.send(item)

    async def send_eof(self) -> None:
        """As the socket stream does."""
        await self.stream.send_eof()

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """Those of the socket stream."""
        return self.stream.extra_attributes

    async def aclose(self) -> None:
        """Half-close now, and linger in the background."""
        await _close_in_background(self, self)

    async def send_and_aclose(self, data: Buffer) -> bool:
        """Send the last bytes and close, in the background; returns after a checkpoint, however much there is.

        data: as for `send_and_aclose`. Returns True when all of it was taken, by the kernel or by the closer; False
        when some of it was dropped, as `lingerx.Closer.send_and_close` does, or nobody could linger.

        Raises, with the stream untouched, TypeError or ValueError as `send_and_aclose` does.
        """
        check_data(data)
        check_policy(policy_of(self.policy, self.closer), deadline=True)
        return await _close_in_background(self, self, data)


def lingering(
    handler: Callable[[Any], Awaitable[object]], policy: Policy | None = None, *, closer: Closer | None = None
) -> Callable[[Any], Awaitable[None]]:
    """A handler for the serve() of anyio's listeners whose connections linger when they end.

        listener = await anyio.create_tcp_listener(local_port=8000)
        await listener.serve(lingerx.anyio.lingering(handler))

    handler: gets a LingeringStream; from a TLSListener the TLSStream, over a LingeringStream. When it returns or
        raises, the stream is closed in the background, over TLS with close_notify; until then it may do so itself.
    policy, closer: as for LingeringStream.

    Raises TypeError or ValueError for a policy or closer that cannot be used here.
    """
    check_terms(policy, closer, wait=False)

    @wraps(handler)
    async def handle(stream: Any) -> None:
        if isinstance(stream, TLSStream):
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


# Out of anyio's hands -------------------------------------------------------------------------------------


def _check(stream: Any) -> anyio.abc.SocketStream:
    """The socket stream under `stream`, fit to be closed, or closed already. Borrows.

    Raises TypeError or ValueError for what cannot be closed so.
    """
    inner = stream.transport_stream if isinstance(stream, TLSStream) else stream
    if isinstance(inner, LingeringStream):
        inner = inner.stream
    if not isinstance(inner, anyio.abc.SocketStream):
        raise TypeError(
            "stream is a SocketStream of anyio, a lingerx.anyio.LingeringStream, or a TLSStream over one of these; "
            f"got {stream!r}"
        )
    sock = _socket_of(inner)
    if sock is not None:
        check_fd(sock.fileno())
    return inner


def _socket_of(inner: anyio.abc.SocketStream) -> socket.socket | None:
    """What has the fd, for a copy of it; None when it is closed. Borrows."""
    try:
        sock = inner.extra(SocketAttribute.raw_socket)
    except AttributeError:  # uvloop's transports forget their socket, and anyio asks for its peer
        return None
    return sock if sock.fileno() >= 0 else None


async def _take(stream: Any, inner: anyio.abc.SocketStream) -> bytes:
    """Close a stream of which there is a copy; what its TLS session has still to say. One turn of the loop, or three.

    Over TLS that is close_notify, for the closer to send: it reads while it sends. TLSStream.aclose waits for the
    peer's, for ever where the peer says nothing.
    """
    with anyio.CancelScope(shield=True):
        await inner.aclose()
        last = _LastWords()
        if not isinstance(stream, TLSStream):
            return last.sent
        # Who was blocked in the socket has its turn, in any order with ours. Whatever it was in the middle of sending
        # is cut off: the stream is then broken, and close_notify must not follow.
        await cancel_shielded_checkpoint()
        await cancel_shielded_checkpoint()
        transport = stream.transport_stream
        stream.transport_stream = last
        try:
            # Input that was received but not read would be taken for an error (APPLICATION_DATA_AFTER_CLOSE_NOTIFY).
            with suppress(ssl.SSLError):
                while stream.extra(TLSAttribute.ssl_object).read(65536):
                    pass
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, ssl.SSLError):
                await stream.aclose()
        finally:
            stream.transport_stream = transport
    return last.sent


class _LastWords(ByteStream):
    """What stands under a TLSStream while it is closed: it keeps what is sent, and has no input."""

    def __init__(self) -> None:
        self.sent = b""

    async def send(self, item: bytes) -> None:
        self.sent += item

    async def receive(self, max_bytes: int = 65536) -> bytes:
        raise anyio.EndOfStream

    async def send_eof(self) -> None:
        pass

    async def aclose(self) -> None:
        pass


# Into a closer's ------------------------------------------------------------------------------------------


async def _close(
    stream: Any,
    inner: anyio.abc.SocketStream,
    policy: Policy,
    closer: Closer | None,
    data: Buffer | None = None,
) -> Report:
    """Owns. For arguments that were checked."""
    sock = _socket_of(inner)
    if sock is None:
        await _take(stream, inner)  # whoever closed its socket need not have closed the stream
        await checkpoint()
        return report_without(Outcome.ALREADY_CLOSED, data)
    try:
        copy = sock.dup()
    except OSError as error:
        await _take(stream, inner)
        await checkpoint()
        return report_without(Outcome.FAILED, data, error.errno)
    try:
        try:
            goodbye = await _take(stream, inner)
        except BaseException:  # asyncio's own Task.cancel(), which no shield of anyio keeps out
            with suppress(RuntimeError, OSError):
                closer = default_closer() if closer is None else closer
                closer.expire(submit(copy, policy, closer, data))
            raise
        closer = default_closer() if closer is None else closer
        future = submit(copy, policy, closer, data, goodbye=goodbye)
    finally:
        copy.close()  # nothing, when it was handed over
    return await _report_of(future, closer)


async def _close_in_background(stream: Any, transport: LingeringStream, data: Buffer | None = None) -> bool:
    """Owns. Whether all of `data` was taken. A plain close where nobody can linger; a few turns of the loop."""
    inner = transport.stream
    sock, copy = _socket_of(inner), None
    with suppress(OSError):
        copy = None if sock is None else sock.dup()
    goodbye, taken = b"", False
    try:
        goodbye = await _take(stream, inner)
    finally:
        if copy is not None:
            taken = hand_over(copy, transport.policy, transport.closer, data, goodbye=goodbye)
    await checkpoint()
    return taken


async def _report_of(future: Future[Report], closer: Closer) -> Report:
    done = anyio.Event()
    soon = _soon()

    def wake(_: object) -> None:
        with suppress(RuntimeError):  # the loop has ended
            soon(done.set)

    future.add_done_callback(wake)
    try:
        await done.wait()
    except BaseException:
        closer.expire(future)
        raise
    return future.result()


def _soon() -> Callable[[Callable[[], object]], object]:
    """Calls a function in this task's loop; may be called from any thread, and does not wait as anyio's own does."""
    if issubclass(asyncio.CancelledError, anyio.get_cancelled_exc_class()):
        return asyncio.get_running_loop().call_soon_threadsafe
    from trio.lowlevel import current_trio_token

    return current_trio_token().run_sync_soon
