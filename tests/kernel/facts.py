"""Asks the kernel about a socket, and makes the sockets to ask about.

Only what the kernel facts need may live here: nothing of lingerx, no assertion about what is true. The one
wait is `wait_until`: it looks again and again, and gives up at a deadline that only a failing test reaches.
"""

import ctypes
import enum
import errno
import fcntl
import os
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import NamedTuple

import pytest

if sys.platform != "linux":
    pytest.skip("these are facts about the Linux kernel; other kernels differ", allow_module_level=True)

DEADLINE = 10.0
"""Seconds until a test gives up; far more than a busy machine needs, so reaching it means: not so."""

LONG_LINGER = 10
"""Seconds. Whatever must not wait for the linger time is given this one, and `NO_WAIT` to be done."""

NO_WAIT = 5.0
"""Seconds. A call done within half of LONG_LINGER has not waited for it, however busy the machine is."""

# Small enough to be filled in a millisecond, and together much less than the answers that `fill` queues.
OUR_SEND_BUFFER = 256 * 1024
PEER_RECEIVE_BUFFER = 64 * 1024


class TcpState(enum.IntEnum):
    """The numbers of include/net/tcp_states.h, as TCP_INFO and /proc/net/tcp tell them."""

    ESTABLISHED = 1
    SYN_SENT = 2
    SYN_RECV = 3
    FIN_WAIT1 = 4
    FIN_WAIT2 = 5
    TIME_WAIT = 6
    CLOSE = 7
    CLOSE_WAIT = 8
    LAST_ACK = 9
    LISTEN = 10
    CLOSING = 11


class Ending(NamedTuple):
    """How a stream ended for its reader: bytes read, then EOF (`error` is None) or an errno."""

    received: int
    error: int | None


class Addresses(NamedTuple):
    """Both ends of a TCP connection over IPv4; what is left to find it by once its fd is closed."""

    local: tuple[str, int]
    remote: tuple[str, int]


def wait_until(condition: Callable[[], bool], deadline: float = DEADLINE) -> None:
    """Return as soon as `condition()` holds; AssertionError when it does not within `deadline` seconds."""
    give_up = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < give_up, f"not so within {deadline} s"
        time.sleep(0.0005)


def error_of(call: Callable[[], object]) -> int | None:
    """The errno that `call` fails with; None when it succeeds."""
    try:
        call()
    except OSError as error:
        return error.errno
    return None


def tcp_pair(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    """Two connected TCP sockets, ours (non-blocking) and the peer's (timeout DEADLINE); `stack` owns both."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PEER_RECEIVE_BUFFER)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        listener.settimeout(DEADLINE)
        ours = stack.enter_context(socket.socket())
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, OUR_SEND_BUFFER)
        ours.settimeout(DEADLINE)
        ours.connect(listener.getsockname())
        ours.setblocking(False)
        peer, _ = listener.accept()
        stack.enter_context(peer)
        peer.settimeout(DEADLINE)
        # Nagle would hold the peer's second message back until our delayed ACK of the first one.
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return ours, peer


def fill(sock: socket.socket) -> int:
    """Borrows a non-blocking socket: send until it refuses more than the peer takes; the bytes accepted."""
    sent = 0
    with suppress(BlockingIOError):
        while True:
            sent += sock.send(bytes(65536))
    return sent


def send_unread(peer: socket.socket, ours: socket.socket, data: bytes = b"unread") -> None:
    """Borrows: leave `data` from `peer` in the receive queue of `ours`."""
    expected = queued_input(ours) + len(data)
    peer.sendall(data)
    wait_until(lambda: queued_input(ours) == expected)


def read_to_end(sock: socket.socket) -> Ending:
    """Borrows a blocking socket: read until EOF or until the connection is lost."""
    received = 0
    while True:
        try:
            data = sock.recv(65536)
        except ConnectionError as error:
            return Ending(received, error.errno)
        if not data:
            return Ending(received, None)
        received += len(data)


def set_linger(sock: socket.socket, seconds: int) -> None:
    """Borrows: SO_LINGER on, struct linger {int l_onoff; int l_linger;} of socket(7), whole seconds only."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))


def timed_close(sock: socket.socket) -> float:
    """Owns: one bare close(2), never tried again; the seconds it took. OSError if it does not return 0."""
    fd = sock.detach()
    started = time.monotonic()
    os.close(fd)
    return time.monotonic() - started


def reset(sock: socket.socket) -> None:
    """Owns: close with SO_LINGER {1, 0}, which sends RST (RFC 9293 3.10.5, ABORT)."""
    set_linger(sock, 0)
    timed_close(sock)


def queued_output(sock: socket.socket) -> int:
    """Borrows: SIOCOUTQ of tcp(7), the bytes that are not yet ACKed, sent or not."""
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0])


def queued_input(sock: socket.socket) -> int:
    """Borrows: SIOCINQ of tcp(7), the bytes that recv would find."""
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0])


def tcp_state(sock: socket.socket) -> TcpState:
    """Borrows: tcpi_state, the first byte of TCP_INFO."""
    return TcpState(_tcp_info(sock)[0])


def wait_for_state(sock: socket.socket, state: TcpState) -> None:
    """Borrows: wait until TCP_INFO tells `state`."""
    wait_until(lambda: tcp_state(sock) is state)


def bytes_acked(sock: socket.socket) -> int:
    """Borrows: tcpi_bytes_acked, how far the peer's ACKs have come (Linux 4.1)."""
    return int(struct.unpack_from("Q", _tcp_info(sock), 120)[0])


def segments_out(sock: socket.socket) -> int:
    """Borrows: tcpi_segs_out (Linux 4.2) less tcpi_total_retrans: every segment, also ACKs and FIN, once."""
    info = _tcp_info(sock)
    return int(struct.unpack_from("I", info, 136)[0] - struct.unpack_from("I", info, 100)[0])


def _tcp_info(sock: socket.socket) -> bytes:
    # The front of struct tcp_info in linux/tcp.h, which only ever grows at its end.
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 140)


def so_error(sock: socket.socket) -> int:
    """Borrows: read SO_ERROR, which clears it (socket(7))."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def addresses(sock: socket.socket) -> Addresses:
    """Borrows: where to find this connection in the kernel's table later."""
    return Addresses(sock.getsockname(), sock.getpeername())


def state_in_table(connection: Addresses) -> TcpState | None:
    """The state of a connection that may have no fd any more, from /proc/net/tcp; None when it is gone."""
    ends = [_as_in_table(host, port) for host, port in connection]
    with open("/proc/net/tcp", encoding="ascii") as table:
        for line in table:
            fields = line.split()
            if fields[1:3] == ends:
                return TcpState(int(fields[3], 16))
    return None


def _as_in_table(host: str, port: int) -> str:
    return f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}"


_libc = ctypes.CDLL(None, use_errno=True)
_libc.recv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.recv.restype = ctypes.c_ssize_t


def discard(sock: socket.socket, size: int) -> int:
    """Borrows: recv(fd, NULL, size, MSG_TRUNC | MSG_DONTWAIT), which Python cannot say; bytes discarded."""
    discarded = int(_libc.recv(sock.fileno(), None, size, socket.MSG_TRUNC | socket.MSG_DONTWAIT))
    if discarded < 0:
        number = ctypes.get_errno()
        raise OSError(number, errno.errorcode[number])
    return discarded
