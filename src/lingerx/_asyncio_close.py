"""How a transport of asyncio or uvloop ends lingering: flush while reading on, close, and hand a copy to a closer.

`Closing` is the transport's protocol from close() on; `lingerx.asyncio` says who gets one. Only the methods of
transports are used, and callbacks of the loop: no task, and no system call. Two names are not public, for TLS alone,
both in `_below`; where they are gone, TLS ends as the loop does it by itself, but within the policy's limits.

The copy is made first, for it keeps the connection alive when the transport closes its own fd. The transport cannot be
half-closed itself: asyncio and uvloop have no write_eof for TLS, and close() stops reading.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ._engine import close
from .closer import Closer, default_closer
from .policy import Abort, Background, Drain, Flush, Policy, left_of
from .report import Outcome, Report

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["Closing", "Handed", "Tell", "socket_of"]

Tell = Callable[[Report], None]
"""What hears of a Report, in the loop."""

GLANCE = 10_000_000
"""ns between two looks at what nobody tells: whether close_notify found room in the kernel. A guess."""


class Handed:
    """A socket that was handed to a closer; `tell` hears what came of it. Where nobody lingers it is closed plainly.

    closer: None for the default one. sock: owned from here on.
    """

    __slots__ = ("closer", "future")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        policy: Policy,
        closer: Closer | None,
        tell: Tell | None,
    ) -> None:
        self.future: Future[Report] | None = None
        try:
            self.closer = default_closer() if closer is None else closer
            if tell is None:
                self.closer.close(sock, policy)
                return
            self.future = self.closer.submit(sock, policy)
        except (RuntimeError, OSError):  # shut down, or no thread or fd for a new one: `sock` is untouched
            report = close(sock, policy if isinstance(policy, Abort) else Background())
            if tell is not None:
                tell(report)
            return

        def done(future: Future[Report]) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(tell, future.result())

        self.future.add_done_callback(done)

    def expire(self) -> None:
        """Close it now."""
        if self.future is not None:
            self.closer.expire(self.future)


class Closing(asyncio.Protocol):
    """One transport on its way out. `begin` starts it; `tell` hears of the Report, once the fd is closed.

    policy: any but KernelLinger. closer: None for the default one. keep: what must live until the transport is closed.
    """

    __slots__ = (
        "_below",
        "_closer",
        "_copy",
        "_drained",
        "_dropped",
        "_error",
        "_handed",
        "_heard",
        "_keep",
        "_known",
        "_lingers",
        "_loop",
        "_outcome",
        "_parting",
        "_policy",
        "_sent",
        "_started",
        "_tell",
        "_timer",
        "_tls",
        "_transport",
        "_unsent",
        "protocol",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        transport: Any,
        policy: Policy,
        closer: Closer | None,
        tell: Tell | None,
        keep: object = None,
    ) -> None:
        self._copy: socket.socket | None = None
        self._loop = loop
        self._transport = transport
        self._below: Any = None
        self._policy = policy
        self._closer = closer
        self._tell = tell
        self._keep = keep
        self.protocol = transport.get_protocol()
        """Whose connection_lost is called at the end."""
        self._tls = transport.get_extra_info("sslcontext") is not None
        self._lingers = isinstance(policy, (Drain, Flush))
        self._parting = False
        """The transport closes by itself now: after it has sent the rest, if there is any."""
        self._sent = False
        """The kernel has taken all, but perhaps close_notify."""
        self._outcome: Outcome | None = None
        """What kept the rest from being sent."""
        self._error: int | None = None
        self._drained = 0
        self._unsent = 0
        self._dropped = 0
        """Bytes that never left this process, so far as is known."""
        self._known = True
        self._started = self._heard = time.monotonic_ns()
        self._timer: asyncio.TimerHandle | None = None
        self._handed: Handed | None = None

    def begin(self, sock: Any) -> None:
        """From here on the transport is closing, and whatever happens its fd and our copy get closed.

        sock: what `socket_of` found.
        """
        transport = self._transport
        try:
            self._copy = sock.dup()
            _copies.add(self._copy)
        except OSError as error:  # most likely EMFILE: the last step will be a plain close
            self._error = error.errno
        transport.set_protocol(self)
        if isinstance(self._policy, Abort):
            self._drop()
        elif transport.is_closing():  # somebody's close is under way, or an abort, which has dropped who knows what
            self._parting, self._known = True, False
            if self._lingers:
                self._tick()
            else:
                self._say(Report(Outcome.BACKGROUND))
        elif not self._lingers:
            self._parting = True
            transport.close()
            if self._tls or transport.get_write_buffer_size():
                self._say(Report(Outcome.BACKGROUND))  # left to the loop, as a plain close leaves it
        else:
            self._flush()

    def expire(self) -> None:
        """Close at once."""
        if self._handed is not None:
            self._handed.expire()
        elif self._outcome is None:
            self._give_up(Outcome.TIMED_OUT)

    # The transport's protocol -----------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._drained += len(data)
        self._heard = time.monotonic_ns()
        if 0 <= self._policy._terms[3] < self._drained:
            self._give_up(Outcome.BYTE_LIMIT)

    def eof_received(self) -> bool:
        if self._tls:
            self._parting = True  # a TLS transport sends the rest and closes now, whatever we say
        return not self._tls

    def pause_writing(self) -> None:
        # TLS transports tell of a buffer that stays empty by turns.
        self.resume_writing()

    def resume_writing(self) -> None:
        # Not at once: asyncio is in the middle of a write, and would call connection_lost twice.
        self._loop.call_soon(self._look)

    def connection_lost(self, error: Exception | None) -> None:
        self._stop_timer()
        if not self._transport.is_closing():  # only TLS of CPython 3.10, which would warn that it was not closed
            self._transport.close()
        protocol, keep = self.protocol, self._keep
        self.protocol = self._transport = self._below = self._keep = None
        if self._outcome is None and self._known and not self._sent:
            if error is not None:
                self._broke(error)
            elif self._lingers:  # closed or aborted by somebody else, or TLS saw the peer's end
                self._known = False
        try:
            protocol.connection_lost(error)
        finally:
            del protocol, keep
            self._hand_over()

    # Steps ------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        # Input is read and discarded as long as there is something to send: a client that writes its whole request
        # before it reads would otherwise wait for us as we for it.
        if self._tls:
            self._below = _below(self._transport)
            self._transport.resume_reading()  # input that was decrypted and not taken would break the session's end
        if not self._left():
            self._part()
            return
        for each in (self._below, self._transport):
            if each is not None:
                each.set_write_buffer_limits(high=0)  # so that we are told when it is empty
        self._transport.resume_reading()
        self._tick()

    def _left(self) -> int:
        # Bytes that the kernel has not taken yet. A TLS transport tells of those that it has not passed on.
        if self._below is None:
            return self._transport.get_write_buffer_size()  # type: ignore[no-any-return]
        left: int = self._below.get_write_buffer_size()
        if not _TELLS_FOR_BELOW:
            with suppress(AttributeError):  # asyncio's TLS transport, closed twice
                left += self._transport.get_write_buffer_size()
        return left

    def _look(self) -> None:
        # Where somebody else closes or aborts, an empty buffer says nothing, and connection_lost comes by itself.
        under = self._transport if self._below is None else self._below
        if under is not None and self._outcome is None and not under.is_closing() and not self._left():
            self._part()

    def _part(self) -> None:
        # Nothing is left, as far as we can see.
        self._sent = self._below is not None or not self._tls
        if not self._parting:
            self._parting = True
            self._transport.close()
            if not self._tls:
                # connection_lost comes right now. Or never: CPython 3.12 stumbles over writelines([b""]).
                self._loop.call_soon(self._tick)
                return
        # TLS has sent close_notify and waits for the peer's. Our copy does that better.
        if self._below is not None and not self._left():
            self._abort()
        else:
            self._tick()

    def _tick(self) -> None:
        # Now and then, until the transport is closed: the limits, and what nobody tells.
        self._stop_timer()
        if self._transport is None or self._outcome is not None:
            return
        now = time.monotonic_ns()
        left = self._left()
        if left != self._unsent:
            self._unsent, self._heard = left, now
        _, timeout, idle, *_ = self._policy._terms
        until = self._started + timeout
        if idle >= 0:
            until = min(until, self._heard + idle)
        if now >= until:
            self._give_up(Outcome.TIMED_OUT if now >= self._started + timeout else Outcome.IDLE)
            return
        if self._parting and self._below is not None:
            if not left:
                self._abort()
                return
            until = min(until, now + GLANCE)
        self._timer = self._loop.call_later((until - now) / 1e9, self._tick)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self, outcome: Outcome) -> None:
        if self._outcome is None and self._transport is not None:
            self._outcome = outcome
            self._drop()

    def _drop(self) -> None:
        self._dropped = self._left()
        if self._tls and self._below is None:
            self._known = False
        self._abort()

    def _abort(self) -> None:
        self._transport.abort()
        if self._below is not None:  # asyncio's TLS transport has forgotten it when it was closed twice
            self._below.abort()

    def _broke(self, error: Exception) -> None:
        # While there was something to send.
        reset = isinstance(error, ConnectionError)
        self._outcome = Outcome.PEER_RESET if reset else Outcome.FAILED
        self._error = errno.EPROTO
        if isinstance(error, OSError) and (reset or not self._tls):  # the errno of an SSLError is none of the system's
            self._error = error.errno
        self._dropped, self._known = 1, False

    def _hand_over(self) -> None:
        # Owns the copy.
        copy, self._copy = self._copy, None
        if copy is None:
            self._merge(Report(Outcome.BACKGROUND))
            return
        _copies.discard(copy)
        policy = self._policy
        if self._lingers:
            elapsed = -1 if self._outcome is not None else time.monotonic_ns() - self._started
            policy = left_of(policy, elapsed, self._drained)
        self._handed = Handed(self._loop, copy, policy, self._closer, None if self._tell is None else self._merge)

    def _merge(self, closed: Report) -> None:
        # One report for both parts.
        self._handed = None
        outcome = closed.outcome
        if self._outcome is not None and outcome is not Outcome.PEER_RESET:
            outcome = self._outcome
        self._say(
            Report(
                outcome,
                self._drained + closed.drained,
                None if closed.unacked is None or not self._known else closed.unacked + self._dropped,
                (time.monotonic_ns() - self._started) / 1e9 if self._lingers else 0.0,
                self._error if closed.error is None else closed.error,
                lost=self._dropped > 0 or closed.delivered is False,
            )
        )

    def _say(self, report: Report) -> None:
        tell, self._tell = self._tell, None
        if tell is not None:
            tell(report)

    def __del__(self) -> None:
        if self._copy is not None:  # the loop was closed before the transport
            _copies.discard(self._copy)
            close(self._copy, Background())


_copies: set[socket.socket] = set()
"""Kept here too, so that the garbage collector does not finalize them before their `Closing`."""


def socket_of(transport: Any) -> Any:
    """The socket that a transport shows. Raises OSError (EBADF) when there is none any more, TypeError for one that
    never had a stream socket."""
    try:
        sock = transport.get_extra_info("socket")
    except AttributeError:  # asyncio's TLS transport, closed twice
        sock = None
    ended = transport.is_closing() or (_TELLS_FOR_BELOW and transport.get_extra_info("sslcontext") is not None)
    if sock is None and not ended:
        raise TypeError(f"there is no socket under this transport, so no peer to linger for: {transport!r}")
    if transport.get_extra_info("pipe") is not None:  # uvloop shows a socket for that too
        raise TypeError(f"this is a pipe's transport, where there is no peer to linger for: {transport!r}")
    if sock is None or sock.fileno() < 0:
        raise OSError(errno.EBADF, "the transport is closed")
    if sock.type != socket.SOCK_STREAM:
        raise TypeError(f"lingering is for stream sockets, where there is a FIN to wait for; got {transport!r}")
    return sock


_TELLS_FOR_BELOW = sys.version_info < (3, 11)
"""asyncio's TLS transport tells the size of the buffer below as its own."""


def _below(transport: Any) -> Any:
    """The transport under a TLS one, which alone knows what the kernel has not taken yet; None: not found.

    Not public: two attributes of asyncio's; uvloop has a name for its TLS protocol, which refers to what we want.
    """
    hidden = transport.get_extra_info("uvloop.sslproto")
    if hidden is None:
        return getattr(getattr(transport, "_ssl_protocol", None), "_transport", None)
    found = [each for each in gc.get_referents(hidden) if hasattr(each, "get_write_buffer_size")]
    [below] = [each for each in found if each is not transport] if len(found) == 2 else [None]
    return below
