"""What TLS has to say before its raw socket lingers: close_notify, and the rest of the data. For both engines.

Only what needs the TLS session may live here; how to close the raw socket is the engines' business, and they are
called for it. `ssl` is not imported before somebody else has done so.

How OpenSSL is kept from waiting, and from working without end. It reads as long as there is something to read: TLS 1.3
lets a peer send KeyUpdates for ever (RFC 8446 4.6.3), and one call takes all of them. And CPython tries again for as
long as the socket object's timeout says. So for this time OpenSSL does not get the network: under the number of its fd
stands one end of a socketpair (dup2(2)). What it writes there is sent on, and what it may read there comes in small
portions. The connection itself stays as it is, O_NONBLOCK too, which is shared with every copy of it.

Windows has no dup2 for sockets. There the session's own socket is made non-blocking, and OpenSSL is trusted.
"""

from __future__ import annotations

import _socket
import errno
import os
import select
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from ._ownership import Hold, attach, drop, take
from ._sockopt import NO_SOCKET
from .policy import Policy, left_of
from .report import Outcome, Report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ssl import SSLSocket
    from typing import Any, TypeGuard

__all__ = ["check_unencrypted", "is_tls", "say_goodbye", "send_and_close"]

# What OpenSSL makes one record of (RFC 8446 5.1): a bigger write is cut up there, with no saying how far it got.
RECORD = 16 * 1024
# Bounds on one turn, as the machine has them: no peer may keep us from looking at the clock. Guesses. A portion of
# nothing but KeyUpdates takes OpenSSL 4 ms.
WRITES = 64
PORTION = 8 * 1024

ALERTS = (b"\x15\x03", b"\x17\x03")
"""How a record with close_notify begins, by TLS 1.2 and by 1.3 (RFC 5246 6.2.1, RFC 8446 5.2)."""

RESETS = (errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED, errno.ENOTCONN)
DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)  # none on Windows, where the fd is non-blocking by then
NOSIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)

GLANCE = 0.001  # seconds; a guess
LONGEST_POLL = 1_000_000_000  # ms, which an int can hold

READABLE, WRITABLE, BROKEN = 1, 2, 4


def is_tls(sock: socket.socket) -> TypeGuard[SSLSocket]:
    """Whether there is a TLS session to end: an ssl.SSLSocket whose handshake is done. Borrows."""
    ssl = sys.modules.get("ssl")
    return ssl is not None and isinstance(sock, ssl.SSLSocket) and sock.version() is not None


def check_unencrypted(sock: socket.socket) -> None:
    """Raises ValueError for an SSLSocket with a session: its data cannot be sent in the background. Borrows.

    The session ends where the fd is taken, and what OpenSSL cannot write now nobody could encrypt later.
    """
    if is_tls(sock):
        raise ValueError(
            "the data of a TLS socket can't be sent in the background: call sock.sendall(data), then close(sock)"
        )


def say_goodbye(sock: SSLSocket) -> None:
    """Send close_notify (RFC 8446 6.1), in one try that does not wait. Borrows.

    Nothing happens when it fails, nor where the process has no three fds left for it.

    For an SSLSocket that is about to be taken: it has its fd afterwards, but no timeout. When a signal handler raises
    in here, the socket is closed in the background and the exception goes on.
    """
    way = _Way(sock)
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
    way = _Way(sock)
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


class _Way:
    """The way between a TLS session and its connection: `hold` has the fd after `begin`, `sock` only lends its session.

    Whatever comes out of a method, `give_up` closes all that is open.
    """

    __slots__ = ("connection", "hold", "ours", "sent", "sock", "spare", "tail", "theirs")

    def __init__(self, sock: SSLSocket) -> None:
        self.sock = sock
        self.hold = Hold(sock, sock.fileno())
        # Of the C type, which owns its fd at any moment: an exception that comes right then leaves nothing open.
        self.ours: _socket.socket | None = None
        """Our end of the socketpair; None where OpenSSL has the connection itself."""
        self.theirs: _socket.socket | None = None
        """OpenSSL's end, but for its number."""
        self.spare: _socket.socket | None = None
        """Another number for the connection, meanwhile."""
        self.connection: socket.socket | _socket.socket = self.hold.raw
        self.tail = memoryview(b"")
        """What OpenSSL has written and the kernel has not taken yet."""
        self.sent = 0
        """How many bytes the kernel has taken."""

    def begin(self) -> None:
        """Raises OSError, with nothing done, where there is no fd left or none to take (one of NO_SOCKET)."""
        session: Any = vars(self.sock)["_sslobj"]
        # From `take` on another thread that closes `sock` too finds it closed, or only our socketpair.
        if sys.platform == "win32":
            self.hold.take()
        else:
            self.ours, self.theirs = _socket.socketpair()
            self.spare = _socket.socket()
            for each in (self.ours, self.theirs, self.spare):
                each.settimeout(0.0)
            self.hold.take()
            os.dup2(self.hold.fd, self.spare.fileno(), inheritable=False)
            self.connection = self.spare
            os.dup2(self.theirs.fileno(), self.hold.fd, inheritable=False)
        vars(self.sock)["_sslobj"] = session
        attach(self.sock, self.hold.fd)
        self.sock.settimeout(0.0)

    def end(self) -> None:
        """OpenSSL has nothing any more, and the connection its number; harmless when that is so already."""
        if self.hold.raw.fileno() >= 0:
            self.sock.detach()
        if self.connection is self.spare and self.theirs is not None:
            if _are_same(self.hold.fd, self.theirs.fileno()):
                os.dup2(self.spare.fileno(), self.hold.fd, inheritable=False)
            elif not _are_same(self.hold.fd, self.spare.fileno()):  # that other thread
                self.hold.raw.detach()
                self.hold.fd = self.spare.detach()
                attach(self.hold.raw, self.hold.fd)
            self.connection = self.hold.raw
        for each in (self.ours, self.theirs, self.spare):
            if each is not None:
                each.close()

    def give_up(self) -> None:
        """An exception goes on to the caller: the kernel gets the rest at once."""
        try:
            self.end()
        finally:
            self.hold.give_up()
            drop(take(self.sock))  # `end` has left it one only if `hold` has none

    def bring(self) -> bool:
        """A portion of input for OpenSSL, if there is any; False: there will be no more."""
        # A session that reads a FIN without a close_notify is dead at once, for writing too. So it must not read it: a
        # peer that has only half-closed its TCP connection still gets its answer.
        flags = DONTWAIT if self.ours is not None else DONTWAIT | socket.MSG_PEEK
        try:
            portion = self.connection.recv(PORTION, flags)
        except (BlockingIOError, InterruptedError):
            return True
        if portion and self.ours is not None:
            self.ours.sendall(portion)  # for which there is room: OpenSSL has read all that came before
        return bool(portion)

    def send_on(self) -> bool:
        """What OpenSSL has written, to the peer; False: not all of it was taken."""
        while self.ours is not None:
            if not self.tail:
                try:
                    self.tail = memoryview(self.ours.recv(2 * RECORD))
                except BlockingIOError:
                    break
            try:
                sent = self.connection.send(self.tail, DONTWAIT | NOSIGNAL)
            except BlockingIOError:
                return False
            self.tail = self.tail[sent:]
            self.sent += sent
        return True

    def say_goodbye(self) -> None:
        """Send close_notify, if there is room for it."""
        # Two calls of SSL_shutdown: the first writes, the second looks for the peer's close_notify.
        with suppress(OSError, ValueError):
            self.sock.unwrap()
        if self.ours is None:
            return
        with suppress(OSError):
            record = self.ours.recv(2 * RECORD)
            # Where the kernel encrypts (the ULP of tls(7)) OpenSSL has written the bare alert, which must not go out.
            if record.startswith(ALERTS) and int.from_bytes(record[3:5], "big") == len(record) - 5:
                self.connection.send(record, DONTWAIT | NOSIGNAL)


def _are_same(fd: int, other: int) -> bool:
    # Borrows. Whether two numbers stand for one file.
    try:
        return os.path.sameopenfile(fd, other)
    except OSError:
        return False


class _Sending:
    """The data that is still to be sent through a TLS session, and what came of it."""

    __slots__ = (
        *("data", "deadline", "drained", "error", "heard", "idle", "max_bytes", "open", "outcome", "sealed", "started"),
        "stuck",
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

    def run(self, way: _Way) -> None:
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

    def turn(self, way: _Way, want_read: type[OSError], want_write: type[OSError]) -> bool:
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
        if ready & READABLE and self.open:
            self.stuck = False
            self.open = way.bring()
            with suppress(want_read, want_write):
                while self.open and self.outcome is None:
                    self.read(way.sock)
                    if way.ours is None and not way.sock.pending():
                        break
        if ready & WRITABLE and self.outcome is None and self.send_on(way):
            if not self.data:
                return True  # with room for close_notify
            try:
                self.write(way)
            except want_read:
                self.stuck = True
            except want_write:
                pass
        return self.is_over()

    def wants(self) -> int:
        return (READABLE if self.open else 0) | (0 if self.stuck and self.open else WRITABLE)

    def read(self, sock: SSLSocket) -> None:
        room = len(_WASTE) if self.max_bytes < 0 else min(len(_WASTE), self.max_bytes - self.drained)
        got = sock.recv_into(_WASTE, max(room, 1))
        if not got:
            self.open = False  # close_notify: the peer says no more, but may well read on
        elif not room:
            self.outcome = Outcome.BYTE_LIMIT
        else:
            self.drained += got
            self.heard = time.monotonic_ns()

    def write(self, way: _Way) -> None:
        for _ in range(WRITES):
            if not self.data:
                return
            self.sealed = way.sock.send(self.data[:RECORD])
            if not self.send_on(way):
                return

    def send_on(self, way: _Way) -> bool:
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
