"""What an engine offers: the names, the signatures and the words of its calls, once for both.

Type checkers and editors read these; the engines take their docstrings from here, and a test holds their
signatures against these. No body may live here.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable

from ._status import TcpStatus
from .policy import Policy
from .report import Report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from concurrent.futures import Future
    from threading import Thread

    from typing_extensions import Buffer

OFFERS = (
    "abort",
    "close",
    "close_all",
    "close_fd",
    "get_linger",
    "send_and_close",
    "set_linger",
    "tcp_status",
)


def close(sock: socket.socket, policy: Policy | None = None) -> Report:
    """Close a socket by a policy, and say what came of it.

    sock: a connected stream socket: TCP over IPv4 or IPv6, AF_UNIX, or an ssl.SSLSocket (close_notify is sent
        first, in one try that does not wait). Taken over: whatever happens, it is closed afterwards, and `sock` is as
        after `sock.detach()`. O_NONBLOCK makes no difference and is left as it is. Flush what `sock.makefile()`
        objects still buffer before: nobody but they knows of those bytes.
    policy: Background, Abort, KernelLinger, Flush or Drain. Default: Drain(timeout=3.0).

    Returns a Report. Network trouble is an outcome, never an exception; a socket object that is closed already
    is ALREADY_CLOSED. Blocks no longer than the policy says; the GIL is free meanwhile.

    Raises TypeError or ValueError, with the socket untouched, for what is no connected stream socket object
    (a datagram or listening socket, a bare fd, fd 0 to 2) and for what is no policy. What a signal handler raises
    while this waits goes on to the caller; the socket is then left to the kernel.

    Sources: RFC 9293 3.6 and 3.10.4, RFC 1122 4.2.2.13, RFC 9112 9.6; shutdown(2), close(2), tcp(7).
    """
    raise NotImplementedError


def close_fd(fd: int, policy: Policy | None = None) -> Report:
    """As `close`, for a bare file descriptor that nobody else will close.

    fd: an int above 2, the descriptor of a stream socket, for instance from `sock.detach()`. Taken over.
    policy: as for `close`.

    Returns a Report. Raises TypeError for what is no int or no stream socket; ValueError for 0 to 2, a negative
    number, a listening socket, and a number that is no open socket. Then nothing is closed.
    """
    raise NotImplementedError


def abort(sock: socket.socket) -> Report:
    """Close at once with RST: `close(sock, Abort())`. What the peer has not yet received is lost.

    sock: as for `close`. Returns a Report whose outcome is ABORTED (or ALREADY_CLOSED). Never blocks.
    Raises TypeError or ValueError as `close` does. Sources: RFC 9293 3.10.5 (ABORT), socket(7) SO_LINGER.
    """
    raise NotImplementedError


def close_all(
    socks: Iterable[socket.socket],
    policy: Policy | None = None,
    *,
    timeout: float | None = None,
    spread: float = 0.0,
) -> list[Report]:
    """Close many sockets at the same time, under one deadline.

    socks: any iterable of sockets as for `close`. One that occurs twice is closed once.
    policy: as for `close`; its limits hold for each socket from its own start. KernelLinger blocks for one
        after the other, in whole seconds of what is left of `timeout`; with less than one second left the
        kernel gets the rest at once.
    timeout: seconds for all of them together, from the call; None for the policy's own limits alone.
    spread: seconds over which the closes start, evenly, to spare a network the burst; 0.0 for all at once.

    Returns a list of Reports in the order of `socks`. Raises TypeError or ValueError before any socket is
    touched. What a signal handler raises goes on to the caller; all sockets are then left to the kernel.
    """
    raise NotImplementedError


def send_and_close(sock: socket.socket, data: Buffer, policy: Policy | None = None) -> Report:
    """Send the last bytes and close; the FIN rides on the last segment.

    sock: as for `close`. data: any C-contiguous bytes-like object; may be empty. policy: Drain or Flush, whose
    timeout (seconds) holds for sending and lingering together. Default: Drain(timeout=3.0).

    Input is read and discarded while data is still being sent: a client that writes its whole request before it
    reads would otherwise wait for us as we for it. On TLS the data is encrypted as `sock.send` does, and
    close_notify goes out behind it.

    Returns a Report; `unacked` counts the bytes that were never sent too, and `delivered` is False when any
    were dropped. Raises TypeError or ValueError as `close` does, also for a policy without a deadline, data that is
    not bytes-like and a TLS handshake that is not done; the socket is then untouched. Sources: as `close`; send(2)
    MSG_MORE, MSG_NOSIGNAL.
    """
    raise NotImplementedError


def set_linger(sock: socket.socket, seconds: int) -> None:
    """What a plain `sock.close()` will do with unsent data, as Go's SetLinger: sets SO_LINGER (socket(7)).

    sock: a stream socket, borrowed. seconds: whole seconds. Below 0: off, close returns at once and the kernel
    goes on. 0: close throws the data away and sends RST. 1 to 32767: close waits, up to that long, on
    non-blocking sockets too. None of the three saves an answer when input is unread: use `close`.

    Raises TypeError or ValueError for a wrong argument, OSError when the system refuses.
    """
    raise NotImplementedError


def get_linger(sock: socket.socket) -> int:
    """SO_LINGER as `set_linger` takes it: -1 off, 0 reset, above 0 whole seconds (socket(7)).

    sock: a stream socket, borrowed. Raises TypeError for what is no socket, OSError when the system refuses.
    """
    raise NotImplementedError


def tcp_status(sock: socket.socket) -> TcpStatus:
    """Where a connection stands now: its state, and the bytes unsent, un-ACKed and unread.

    sock: a stream socket, borrowed. Returns a TcpStatus whose fields are None where the platform can't tell, or
    the socket is not TCP. Raises TypeError for what is no socket, OSError for one that is closed.
    Sources: tcp(7) TCP_INFO, SIOCOUTQ, SIOCINQ; RFC 9293 3.3.2.
    """
    raise NotImplementedError


class Loop:
    """What a `Closer` has, and its thread runs: takes sockets over at once, and closes them in `run`.

    policy: for sockets that come without one. max_pending, max_buffered, on_full (its place in ON_FULL), collect (ns):
        as for `Closer`, and checked by it.
    start: called with the loop when a socket comes and `thread` is None; starts a thread that calls `run`.

    Knows nothing of the Closer, which may be gone while the thread still works. Raises OSError without an fd for it.
    """

    policy: Policy
    thread: Thread | None
    name: str
    exit_timeout: int

    def __init__(
        self,
        policy: Policy,
        max_pending: int,
        max_buffered: int,
        on_full: int,
        collect: int,
        start: Callable[[Loop], None],
    ) -> None:
        raise NotImplementedError

    def intake(self) -> Intake:
        """Where sockets are handed over."""
        raise NotImplementedError

    def counters(self) -> tuple[int, int, int, int, tuple[int, ...], tuple[int, ...], int]:
        """Of one moment, in the order of `Stats`: outcomes by their codes, times by bucket, the total in ns."""
        raise NotImplementedError

    def is_open(self) -> bool:
        """Whether it takes sockets."""
        raise NotImplementedError

    def when_idle(self, call: Callable[[], object]) -> None:
        """Call `call` once, as soon as nothing is pending and all futures know: from the thread, or here and now."""
        raise NotImplementedError

    def forget(self, call: Callable[[], object]) -> None:
        """What was given to `when_idle` need not be called any more."""
        raise NotImplementedError

    def run(self) -> None:
        """Until `stop` was called and everything is closed. What the loop itself has opened is closed then."""
        raise NotImplementedError

    def stop(self, timeout: int) -> None:
        """Take no more sockets; those in flight have `timeout` ns, or for -1 what their policies give them.

        Of several calls the earliest deadline counts. Never waits.
        """
        raise NotImplementedError

    def before_fork(self) -> None:
        """Until one of the other two is called, nothing moves."""
        raise NotImplementedError

    def after_fork_in_parent(self) -> None:
        """Go on."""
        raise NotImplementedError

    def after_fork_in_child(self) -> None:
        """The sockets are the parent's: give back the copies of their fds, and start afresh."""
        raise NotImplementedError


class Intake:
    """Hands sockets to a `Loop`, which takes no more when nobody holds its Intake any longer.

    A bound method holds it too, so that `close = closer.close` is all that a hot loop needs to keep.
    """

    def close(self, sock: socket.socket, policy: Policy | None = None) -> None:
        """As `Closer.close`."""
        raise NotImplementedError

    def send_and_close(self, sock: socket.socket, data: Buffer, policy: Policy | None = None) -> bool:
        """As `Closer.send_and_close`."""
        raise NotImplementedError

    def submit(
        self, future: Future[Report], sock: socket.socket, data: Buffer | None, policy: Policy | None
    ) -> Report | None:
        """Hand over; `future` gets the Report, unless it is returned because the socket is closed already."""
        raise NotImplementedError

    def expire(self, future: Future[Report]) -> None:
        """As `Closer.expire`, for a future that `submit` was given."""
        raise NotImplementedError
