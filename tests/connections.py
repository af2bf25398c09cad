"""Connections to close, and questions to the kernel about them.

Nothing that acts on its own (that is `peers`) and nothing of lingerx may live here. The one wait is `wait_until`.
"""

from __future__ import annotations

import enum
import errno
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest

if sys.platform != "win32":
    import fcntl
    import termios

DEADLINE = 10.0
"""Seconds until a test gives up; far more than a busy machine needs, so reaching it means that something is wrong."""

A_LONG_LOOK = 0.03
"""Seconds to look for something that must not happen; what would do it needs microseconds."""

SMALL_BUFFERS = {"send_buffer": 256 * 1024, "receive_buffer": 64 * 1024}
"""For `tcp(**SMALL_BUFFERS)`: filled within a millisecond, and still far more than a peer's window."""

Pair = tuple[socket.socket, socket.socket]
"""Ours and the peer's."""


class PairMaker(Protocol):
    """The fixtures `tcp`, `tcp6`, `unix_pair` and `unix_stream`: make a connected pair, close it after the test."""

    def __call__(self, *, send_buffer: int | None = None, receive_buffer: int | None = None) -> Pair: ...


class Ending(NamedTuple):
    """How a stream ended for its reader: bytes read, then EOF (`error` is None) or an errno."""

    received: int
    error: int | None


class TcpState(enum.IntEnum):
    """The numbers of include/net/tcp_states.h, as TCP_INFO and /proc/net/tcp tell them."""

    ESTABLISHED = 1
    SYN_SENT = 2
    FIN_WAIT1 = 4
    FIN_WAIT2 = 5
    TIME_WAIT = 6
    CLOSE = 7
    CLOSE_WAIT = 8
    LAST_ACK = 9
    LISTEN = 10
    CLOSING = 11


def wait_until(condition: Callable[[], bool], deadline: float = DEADLINE, poll: float = 0.0005) -> None:
    """Return as soon as `condition()` holds; AssertionError when it does not within `deadline` seconds.

    poll: seconds between two looks.
    """
    give_up = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < give_up, f"not so within {deadline} s"
        time.sleep(poll)


# Connections ----------------------------------------------------------------------------------------------


def connect(
    stack: ExitStack,
    family: int,
    address: tuple[str, int] | str,
    send_buffer: int | None = None,
    receive_buffer: int | None = None,
) -> Pair:
    """Ours (accepted, blocking) and the peer's (bounded by DEADLINE); `stack` owns both.

    send_buffer: bytes for our SO_SNDBUF; receive_buffer: for the peer's SO_RCVBUF, which also stops it from growing.
    """
    with socket.socket(family) as listener:
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        listener.bind(address)
        listener.listen(1)
        listener.settimeout(DEADLINE)
        peer = stack.enter_context(socket.socket(family))
        if receive_buffer is not None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        peer.settimeout(DEADLINE)
        peer.connect(listener.getsockname())
        ours = stack.enter_context(listener.accept()[0])
        return ours, peer


def unix_socketpair(stack: ExitStack, send_buffer: int | None = None, receive_buffer: int | None = None) -> Pair:
    """As `connect`, by socketpair(2). (A unix socket's receive buffer plays no part, see unix(7).)"""
    ours, peer = map(stack.enter_context, socket.socketpair(socket.AF_UNIX))
    if send_buffer is not None:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    peer.settimeout(DEADLINE)
    return ours, peer


def fill(ours: socket.socket) -> int:
    """Borrows: send until the kernel takes no more, to a peer that never reads; the bytes taken."""
    timeout = ours.gettimeout()
    ours.settimeout(0)
    sent = 0
    try:
        while True:
            sent += ours.send(bytes(65536))
    except BlockingIOError:
        return sent
    finally:
        ours.settimeout(timeout)


def fill_and_settle(ours: socket.socket, peer: socket.socket) -> int:
    """As `fill`, then wait until what the peer's kernel has is ACKed, which may take 40 ms (RFC 1122 4.2.3.2)."""
    sent = fill(ours)
    wait_until(lambda: sent - queued_output(ours) == queued_input(peer))
    return sent


def unread_pair(tcp: PairMaker) -> tuple[socket.socket, socket.socket, int]:
    """Ours, a peer that never reads, and the bytes sent, far more than its kernel takes."""
    ours, peer = tcp(**SMALL_BUFFERS)
    return ours, peer, fill_and_settle(ours, peer)


def lacking(sent: int, peer: socket.socket) -> int:
    """Borrows: how many of the bytes sent to it a peer that never reads has not got, and so not ACKed.

    Ask late: what is left of its window is filled by a probe, 200 ms and more after all else (RFC 9293 3.8.6.1).
    """
    return sent - queued_input(peer)


# Questions to the kernel ----------------------------------------------------------------------------------


def queued_output(sock: socket.socket) -> int:
    """Borrows: SIOCOUTQ of tcp(7), the bytes that are not yet ACKed, sent or not."""
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0])


def queued_input(sock: socket.socket) -> int:
    """Borrows: SIOCINQ of tcp(7), the bytes that recv would find."""
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0])


def wait_for_reset(ours: socket.socket) -> None:
    """Borrows: wait until a peer's RST has arrived, without reading the error."""
    poll = select.poll()
    poll.register(ours, 0)  # POLLERR and POLLHUP are always told
    assert poll.poll(DEADLINE * 1000), "no RST"


def tcp_state(sock: socket.socket) -> TcpState:
    """Borrows: tcpi_state, the first byte of TCP_INFO."""
    if sys.platform != "linux":
        pytest.skip("TCP_INFO tells the state on Linux")
    return TcpState(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0])


def segments_in(sock: socket.socket) -> int:
    """Borrows: tcpi_segs_in, every segment that came in (linux/tcp.h, since Linux 4.2)."""
    offset = 140
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, offset + 4)
    return int(struct.unpack_from("I", info, offset)[0])


class Connection(NamedTuple):
    """One side of a TCP connection as the kernel's table tells it, also when no fd belongs to it any more."""

    local: int
    remote: int

    @classmethod
    def of(cls, sock: socket.socket) -> Connection:
        """Borrows: this socket's side."""
        return cls(sock.getsockname()[1], sock.getpeername()[1])

    def state(self) -> TcpState | None:
        """Its state, from /proc/net/tcp and tcp6; None when the kernel has forgotten it."""
        if sys.platform != "linux":
            pytest.skip("there is no /proc/net/tcp")
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            for line in Path(table).read_text("ascii").splitlines()[1:]:
                fields = line.split()
                ports = tuple(int(end.rpartition(":")[2], 16) for end in fields[1:3])
                if ports == self:
                    return TcpState(int(fields[3], 16))
        return None

    def wait_for(self, *states: TcpState | None) -> None:
        """Wait until its state is one of these."""
        wait_until(lambda: self.state() in states)


def identity(sock: socket.socket) -> tuple[int, int]:
    """Borrows: the fd and what tells this open file from a later one of the same number."""
    return sock.fileno(), os.fstat(sock.fileno()).st_ino


def still_open(known: tuple[int, int]) -> bool:
    """Whether that very file is still open in this process under that number."""
    fd, inode = known
    try:
        return os.fstat(fd).st_ino == inode
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        return False
