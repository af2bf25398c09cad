"""What TLS has to say before its raw socket lingers: close_notify, and the rest of the data. For both engines.

Only what needs the TLS session may live here; how to close the raw socket is the engines' business, and they are
called for it. `ssl` is not imported before somebody else has done so.

How OpenSSL is kept from waiting, and from working without end: see `_tls_way.py`.
"""

from __future__ import annotations

import errno
import select
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from ._ownership import attach, take
from ._sockopt import NO_SOCKET
from ._tls_way import RECORD, Way
from .policy import Policy, left_of
from .report import Outcome, Report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ssl import SSLSocket
    from typing import Any, TypeGuard

__all__ = ["check_unencrypted", "encrypts", "is_tls", "say_goodbye", "send_and_close"]

# A bound on one turn, as the machine has them: a guess.
WRITES = 64

RESETS = (errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED, errno.ENOTCONN)
GLANCE = 0.001  # seconds; a guess
LONGEST_POLL = 1_000_000_000  # ms, which an int can hold

READABLE, WRITABLE, BROKEN = 1, 2, 4
"""What `_wait` saw. An error of the connection is all three."""


def is_tls(sock: socket.socket) -> TypeGuard[SSLSocket]:
    """Whether there is a TLS session to end: an ssl.SSLSocket whose handshake is done. Borrows."""
    return _has_session(sock) and sock.version() is not None


def encrypts(sock: socket.socket) -> TypeGuard[SSLSocket]:
    """As `is_tls`, for somebody who has data. Borrows.

    Raises ValueError in the middle of a handshake: nothing can be encrypted yet, and nothing may go out in clear.
    """
    if not _has_session(sock):
        return False
    if sock.version() is None:
        raise ValueError(
            f"the TLS handshake is not done, and data must not go out in clear; close it without: {sock!r}"
        )
    return True


def _has_session(sock: socket.socket) -> TypeGuard[SSLSocket]:
    ssl = sys.modules.get("ssl")
    return ssl is not None and isinstance(sock, ssl.SSLSocket) and vars(sock).get("_sslobj") is not None


def check_unencrypted(sock: socket.socket) -> None:
    """Raises ValueError for an SSLSocket with a session: its data cannot be sent in the background. Borrows.

    The session ends where the fd is taken, and what OpenSSL cannot write now nobody could encrypt later.
    """
    if _has_session(sock):
        raise ValueError(
            "the data of a TLS socket can't be sent in the background: call sock.sendall(data), then close(sock)"
        )


def say_goodbye(sock: SSLSocket) -> None:
    """Send close_notify (RFC 8446 6.1), in one try that does not wait. Borrows.

    Nothing happens when it fails, nor where the process has no three fds left for it.

    For an SSLSocket that is about to be taken: it has its fd afterwards, but no timeout. When a signal handler raises
    in here, the socket is closed in the background and the exception goes on.
    """
    way = Way(sock)
    try:
        with suppress(OSError):
            way.begin()
            way.say_goodbye()
        way.end()
        if way.hold.raw.fileno() >= 0:
            attach(sock, way.hold.fd)
            way.hold.raw.detach()
    except BaseException:
        way.give_up()
        raise


def send_and_close(
    sock: SSLSocket, data: memoryview, policy: Policy, close: Callable[[socket.socket, Policy], Report]
) -> Report:
    """Send `data`, then close_notify, then `close` the raw socket, all under the policy's limits. Owns.

    close: the engine's close for a socket without TLS. It gets a socket object that nobody else knows, and the
        policy with what is left of its limits; it closes whatever happens.

    Input is read and discarded while there is something to send. Only when all of `data` was sent is close_notify
    sent too: an answer that was cut off must not look complete. Of the report: drained counts decrypted bytes up
    to close_notify and raw ones after; unacked counts the raw queue and what of `data` was never sent. Where the
    process has no three fds left nothing can be sent: FAILED, and all of `data` is lost.
    """
    sending = _Sending(data, policy, time.monotonic_ns())
    way = Way(sock)
    try:
        try:
            way.begin()
            sending.run(way)
            if sending.outcome is None:
                way.say_goodbye()
        except OSError as error:
            sending.fail(error.errno or errno.EIO)
        way.end()
        if way.hold.raw.fileno() < 0:
            way.hold.take()
        take(sock)  # it has none, but the session must end
        elapsed = time.monotonic_ns() - sending.started if sending.outcome is None else -1
        rest = left_of(policy, elapsed, sending.drained)
    except BaseException as error:
        way.give_up()
        if isinstance(error, OSError) and error.errno in NO_SOCKET:
            return Report(Outcome.ALREADY_CLOSED, 0, len(data) or None, error=error.errno, lost=len(data) > 0)
        raise
    try:
        return sending.merge(close(way.hold.raw, rest))
    finally:
        way.hold.give_up()  # an exception may have come before the engine took it


class _Sending:
    """The data that is still to be sent through a TLS session, and what came of it."""

    __slots__ = (
        *("data", "deadline", "drained", "error", "heard", "idle", "jammed", "max_bytes", "open", "outcome"),
        *("sealed", "started", "stuck"),
    )

    def __init__(self, data: memoryview, policy: Policy, started: int) -> None:
        _, timeout, self.idle, self.max_bytes, *_ = policy._terms
        self.data = data
        """What the kernel has not taken yet, as far as is known."""
        self.sealed = 0
        """How many bytes of it OpenSSL has."""
        self.started = self.heard = started
        self.deadline = started + timeout
        self.drained = 0
        self.error: int | None = None
        self.outcome: Outcome | None = None
        """What kept `data` from being sent; None: nothing did."""
        self.open = True
        """Input may still come."""
        self.stuck = False
        """OpenSSL has to read before it can write."""
        self.jammed = False
        """OpenSSL has to write before it can read."""

    def run(self, way: Way) -> None:
        """Send until all of `data` has been taken by the kernel, or `outcome` says why not."""
        import ssl  # the SSLSocket's owner has imported it

        try:
            while not self.turn(way, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                pass
        except ssl.SSLEOFError:
            self.fail(errno.ECONNRESET)  # so CPython calls every error of a write
        except ssl.SSLError:
            self.fail(errno.EPROTO)  # its own errno is none of the system's
        except OSError as error:
            self.fail(error.errno or errno.EIO)

    def turn(self, way: Way, want_read: type[OSError], want_write: type[OSError]) -> bool:
        """Wait, then do what can be done at once, within bounds. True: it is over, one way or another."""
        until = self.deadline if self.idle < 0 else min(self.deadline, self.heard + self.idle)
        ready = _wait(way.connection.fileno(), self.wants(), until)
        if ready & BROKEN:
            error = way.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                self.fail(error)
                return True
            # An error queue (recv(2), MSG_ERRQUEUE) is reported without end, and nothing here reads it.
            time.sleep(GLANCE)
        try:
            if ready & READABLE and self.open and not self.jammed:
                self.stuck = False
                self.open = way.bring()
                self.read_all(way)
            if ready & WRITABLE and self.outcome is None and self.send_on(way):
                if self.jammed:
                    self.jammed = False
                    self.read_all(way)
                elif not self.data:
                    return True  # with room for close_notify
                else:
                    self.write(way)
        except want_read:
            self.stuck = True
            if not self.open:  # and nothing more will come
                self.fail(errno.ECONNRESET)
        except want_write:
            pass
        return self.is_over()

    def wants(self) -> int:
        reads = self.open and not self.jammed
        return (READABLE if reads else 0) | (0 if self.stuck and reads else WRITABLE)

    def read_all(self, way: Way) -> None:
        """What OpenSSL has been brought."""
        import ssl

        try:
            while self.open and self.outcome is None:
                self.read(way.session)
                if way.ours is None and not way.session.pending():
                    break
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLWantWriteError:
            self.jammed = True

    def read(self, session: Any) -> None:
        room = len(_WASTE) if self.max_bytes < 0 else min(len(_WASTE), self.max_bytes - self.drained)
        got = session.read(max(room, 1), _WASTE)
        if not got:
            self.open = False  # close_notify: the peer says no more, but may well read on
        elif not room:
            self.outcome = Outcome.BYTE_LIMIT
        else:
            self.drained += got
            self.heard = time.monotonic_ns()

    def write(self, way: Way) -> None:
        for _ in range(WRITES):
            if not self.data:
                return
            self.sealed = way.session.write(self.data[:RECORD])
            if not self.send_on(way):
                return

    def send_on(self, way: Way) -> bool:
        before = way.sent
        try:
            if not way.send_on():
                return False
        finally:
            if way.sent > before or (way.ours is None and self.sealed > 0):
                self.heard = time.monotonic_ns()
        self.data = self.data[self.sealed :]
        self.sealed = 0
        return True

    def is_over(self) -> bool:
        if self.outcome is not None:
            return True
        now = time.monotonic_ns()
        late = now >= self.deadline
        if not late and (self.idle < 0 or now - self.heard < self.idle):
            return False
        if self.data:
            self.outcome = Outcome.TIMED_OUT if late else Outcome.IDLE
        return True  # without data there is nothing that failed: the engine looks at the same limits

    def fail(self, error: int) -> None:
        self.outcome = Outcome.PEER_RESET if error in RESETS else Outcome.FAILED
        self.error = error

    def merge(self, closed: Report) -> Report:
        """One report for both parts."""
        outcome, error, unacked = closed.outcome, closed.error, closed.unacked
        lost = closed.delivered is False
        if self.outcome is not None and outcome is not Outcome.ALREADY_CLOSED:
            reset = self.outcome in (Outcome.PEER_RESET, Outcome.FAILED)
            lost = lost or len(self.data) > 0  # what is in flight when a connection breaks may have arrived
            if unacked is not None:
                unacked += len(self.data)
            # A reset that the engine has seen since says more than our own limit.
            if reset or closed.outcome is not Outcome.PEER_RESET:
                outcome, error = self.outcome, self.error
        elapsed = (time.monotonic_ns() - self.started) / 1e9
        return Report(outcome, self.drained + closed.drained, unacked, elapsed, error, lost=lost)


# Where discarded input goes. Shared by all threads: nobody ever reads it.
_WASTE = bytearray(64 * 1024)


def _wait(fd: int, wants: int, until: int) -> int:
    # Borrows. Waits for what `wants` says, until `until` (rounded up); says what is the case. An error is all three.
    left = max(0, until - time.monotonic_ns())
    if not hasattr(select, "poll"):
        reading, writing = [fd] if wants & READABLE else [], [fd] if wants & WRITABLE else []
        readable, writable, failed = select.select(reading, writing, [fd], left / 1e9)
        return (READABLE if readable else 0) | (WRITABLE if writable else 0) | (BROKEN if failed else 0)
    poll = select.poll()
    poll.register(fd, (select.POLLIN if wants & READABLE else 0) | (select.POLLOUT if wants & WRITABLE else 0))
    ready = 0
    for _, seen in poll.poll(min(-(-left // 1_000_000), LONGEST_POLL)):
        if seen & ~select.POLLOUT:
            ready |= READABLE
        if seen & ~select.POLLIN:
            ready |= WRITABLE
        if seen & select.POLLERR:
            ready |= BROKEN
    return ready
