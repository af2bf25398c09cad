"""What TLS has to say before its raw socket lingers: close_notify, and the rest of the data. For both engines.

Only what needs the TLS session may live here; how to close the raw socket is the engines' business, and they are
called for it. Nothing here waits for the peer inside OpenSSL, and O_NONBLOCK is left as it is: it is shared with
every copy of the fd. `ssl` is not imported before somebody else has done so.

How a call into OpenSSL is kept from waiting. CPython tries again for as long as the socket object's timeout
says, and the object cannot be told "not at all" without setting O_NONBLOCK on its fd. So:

- An object that has a timeout has O_NONBLOCK set already: settimeout(0.0) then changes nothing but the object.
- For `unwrap` alone a blocking object will do as well: there CPython does not try again. SO_RCVTIMEO and
  SO_SNDTIMEO of 1 us (socket(7)) let the kernel give up after a tick or two (8 ms at most with 250 Hz).
- `send` and `recv` would be tried again for ever. But the session keeps the number of its fd after `detach`, and
  settimeout(0.0) on the detached object sets the object's timeout and fails only then (EBADF). `unwrap` does want
  an object with an fd, so it is given back before.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ._ownership import attach, blank, drop, take
from ._sockopt import NO_SOCKET
from .policy import Policy, left_of
from .report import Outcome, Report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ssl import SSLSocket
    from typing import TypeGuard

__all__ = ["check_unencrypted", "is_tls", "say_goodbye", "send_and_close"]

# What OpenSSL makes one record of (RFC 8446 5.1): a bigger write is cut up there, with no saying how far it got.
RECORD = 16 * 1024
# Bounds on one turn, as the machine has them: no peer may keep us from looking at the clock. Guesses.
WRITES = 64
READS = 64

RESETS = (errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED, errno.ENOTCONN)
DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)  # none on Windows, where the fd is non-blocking by then

GLANCE = 0.001  # seconds; a guess
LONGEST_POLL = 1_000_000_000  # ms, which an int can hold

READABLE, WRITABLE, BROKEN = 1, 2, 4


def is_tls(sock: socket.socket) -> TypeGuard[SSLSocket]:
    """Whether there is a TLS session to end: an ssl.SSLSocket whose handshake is done. Borrows."""
    ssl = sys.modules.get("ssl")
    return ssl is not None and isinstance(sock, ssl.SSLSocket) and sock.version() is not None


LOOKS_FOR_FD = sys.version_info >= (3, 15)
"""An SSLSocket that was detached cannot write any more ("underlying socket connection gone")."""


def check_unencrypted(sock: socket.socket) -> None:
    """Raises ValueError for an SSLSocket with a session: its data cannot be sent in the background. Borrows.

    The session ends where the fd is taken, and what OpenSSL cannot write now nobody could encrypt later.
    """
    if is_tls(sock):
        raise ValueError(
            "the data of a TLS socket can't be sent in the background: call sock.sendall(data), then close(sock)"
        )


def say_goodbye(sock: SSLSocket) -> None:
    """Send close_notify (RFC 8446 6.1), in one try that does not wait for the peer (10 ms at most). Borrows.

    Nothing happens when it fails.

    For an SSLSocket that is about to be taken: its timeout may be 0.0 afterwards. When a signal handler raises in
    here, the socket is closed in the background and the exception goes on.
    """
    try:
        if sock.gettimeout() is not None or sys.platform == "win32":
            with suppress(OSError):
                sock.settimeout(0.0)
        _unwrap(sock)
    except BaseException:
        drop(take(sock))
        raise


def send_and_close(
    sock: SSLSocket, data: memoryview, policy: Policy, close: Callable[[socket.socket, Policy], Report]
) -> Report:
    """Send `data`, then close_notify, then `close` the raw socket, all under the policy's limits. Owns.

    close: the engine's close for a socket without TLS. It gets a socket object that nobody else knows, and the
        policy with what is left of its limits; it closes whatever happens.

    Input is read and discarded while there is something to send. Only when all of `data` was sent is close_notify
    sent too: an answer that was cut off must not look complete. Of the report: drained counts decrypted bytes up
    to close_notify and raw ones after; unacked counts the raw queue and what of `data` was never sent.
    """
    started = time.monotonic_ns()
    if sys.platform == "win32":
        sock.settimeout(0.0)  # no copies in other processes here, unless share() made them
    fd = sock.fileno()
    raw = blank()
    try:
        sock.detach()
        attach(raw, fd)
        with suppress(OSError):
            sock.settimeout(0.0)
        if LOOKS_FOR_FD:
            blocking = sys.platform != "win32" and os.get_blocking(fd)
            attach(sock, fd)
            sock.settimeout(0.0)
            if blocking:
                os.set_blocking(fd, True)
        sending = _Sending(sock, raw, data, policy, started)
        sending.run()
        if sending.outcome is None:
            if not LOOKS_FOR_FD:
                attach(sock, fd)
            _unwrap(sock)
        take(sock)
        elapsed = time.monotonic_ns() - started if sending.outcome is None else -1
        rest = left_of(policy, elapsed, sending.drained)
    except BaseException as error:
        raw.detach()
        take(sock)
        if isinstance(error, OSError) and error.errno in NO_SOCKET:
            return Report(Outcome.ALREADY_CLOSED, 0, len(data) or None, error=error.errno, lost=len(data) > 0)
        drop(fd)
        raise
    try:
        return sending.merge(close(raw, rest))
    finally:
        drop(raw.detach())  # an exception may have come before the engine took it


class _Sending:
    """The data that is still to be sent through a TLS session, and what came of it. Borrows both sockets."""

    __slots__ = (
        "data",
        "deadline",
        "drained",
        "error",
        "heard",
        "idle",
        "max_bytes",
        "open",
        "outcome",
        "raw",
        "sock",
        "started",
        "stuck",
    )

    def __init__(self, sock: SSLSocket, raw: socket.socket, data: memoryview, policy: Policy, started: int) -> None:
        _, timeout, self.idle, self.max_bytes, *_ = policy._terms
        self.sock = sock
        self.raw = raw
        self.data = data
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

    def run(self) -> None:
        """Send until all of `data` has been taken by the kernel, or `outcome` says why not."""
        import ssl  # the SSLSocket's owner has imported it

        try:
            with _unwaiting(self.raw):
                while not self.turn(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    pass
        except ssl.SSLEOFError:
            self.fail(errno.ECONNRESET)  # so CPython calls every error of a write
        except ssl.SSLError:
            self.fail(errno.EPROTO)  # its own errno is none of the system's
        except OSError as error:
            self.fail(error.errno or errno.EIO)

    def turn(self, want_read: type[OSError], want_write: type[OSError]) -> bool:
        """Wait, then do what can be done at once, within bounds. True: it is over, one way or another."""
        until = self.deadline if self.idle < 0 else min(self.deadline, self.heard + self.idle)
        ready = _wait(self.raw.fileno(), self.wants(), until)
        if ready & BROKEN:
            error = self.raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                self.fail(error)
                return True
            # An error queue (recv(2), MSG_ERRQUEUE) is reported without end, and nothing here reads it.
            time.sleep(GLANCE)
        if ready & READABLE and self.open:
            self.stuck = False
            with suppress(want_read, want_write):
                self.read()
        if ready & WRITABLE and self.outcome is None:
            if not self.data:
                return True  # with room for close_notify
            try:
                self.write()
            except want_read:
                self.stuck = True
            except want_write:
                pass
        return self.is_over()

    def wants(self) -> int:
        return (READABLE if self.open else 0) | (0 if self.stuck and self.open else WRITABLE)

    def read(self) -> None:
        for _ in range(READS):
            if not self.sock.pending() and self.sees_fin():
                self.open = False
                return
            room = len(_WASTE) if self.max_bytes < 0 else min(len(_WASTE), self.max_bytes - self.drained)
            got = self.sock.recv_into(_WASTE, max(room, 1))
            if not got:
                self.open = False  # close_notify: the peer says no more, but may well read on
                return
            if not room:
                self.outcome = Outcome.BYTE_LIMIT
                return
            self.drained += got
            self.heard = time.monotonic_ns()

    def sees_fin(self) -> bool:
        # A session that reads a FIN without a close_notify is dead at once, for writing too. So it must not read it:
        # a peer that has only half-closed its TCP connection still gets its answer.
        try:
            return not self.raw.recv(1, socket.MSG_PEEK | DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return False

    def write(self) -> None:
        for _ in range(WRITES):
            if not self.data:
                return
            sent = self.sock.send(self.data[:RECORD])
            self.data = self.data[sent:]
            self.heard = time.monotonic_ns()

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


def _unwrap(sock: SSLSocket) -> None:
    # Borrows. Two calls of SSL_shutdown: the first sends, the second looks for the peer's close_notify.
    with suppress(OSError, ValueError), _unwaiting(sock):
        sock.unwrap()


# Where discarded input goes. Shared by all threads: nobody ever reads it.
_WASTE = bytearray(64 * 1024)


@contextmanager
def _unwaiting(sock: socket.socket) -> Iterator[None]:
    # Borrows. For the time of the block the kernel waits for this socket for a tick or two only (see the top).
    if sys.platform == "win32" or not os.get_blocking(sock.fileno()):
        yield
        return
    kept: list[tuple[int, bytes]] = []
    try:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            old = sock.getsockopt(socket.SOL_SOCKET, option, 16)
            # struct timeval: two longs, whose size the kernel has just told.
            tick = struct.pack("qq" if len(old) == 16 else "ii", 0, 1)
            sock.setsockopt(socket.SOL_SOCKET, option, tick)
            kept.append((option, old))
        yield
    finally:
        for option, old in kept:
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, old)


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
