"""How input can be discarded without a copy, and how AF_UNIX differs. Facts of the kernel only."""

import errno
import socket
from contextlib import ExitStack

from .facts import DEADLINE, discard, error_of, queued_input, send_unread, tcp_pair

INPUT = bytes(range(250)) * 100


def unix_pair(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    """Two connected AF_UNIX stream sockets, ours and the peer's; `stack` owns both."""
    ours, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    stack.enter_context(ours)
    stack.enter_context(peer)
    ours.setblocking(False)
    return ours, peer


def test_tcp_discards_into_a_null_buffer(stack: ExitStack) -> None:
    """recv(fd, NULL, n, MSG_TRUNC) on TCP discards the next n bytes in the kernel (tcp(7)), and no more."""
    ours, peer = tcp_pair(stack)
    send_unread(peer, ours, INPUT)
    assert discard(ours, 1001) == 1001
    assert queued_input(ours) == len(INPUT) - 1001
    assert ours.recv(3) == INPUT[1001:1004]
    assert discard(ours, 1 << 20) == len(INPUT) - 1004
    assert queued_input(ours) == 0


def test_tcp_discard_tells_empty_from_eof(stack: ExitStack) -> None:
    """A discarding recv says EAGAIN when there is nothing, and 0 at EOF, as any other recv does."""
    ours, peer = tcp_pair(stack)
    assert error_of(lambda: discard(ours, 100)) == errno.EAGAIN
    send_unread(peer, ours)
    peer.shutdown(socket.SHUT_WR)
    assert discard(ours, 100) == len(b"unread")
    ours.settimeout(DEADLINE)
    assert ours.recv(1) == b""
    assert discard(ours, 100) == 0


def test_unix_refuses_a_null_buffer_and_consumes_nothing(stack: ExitStack) -> None:
    """On AF_UNIX recv(fd, NULL, n, MSG_TRUNC) is EFAULT and nothing is consumed: it needs a real buffer."""
    ours, peer = unix_pair(stack)
    peer.sendall(b"unread")
    assert error_of(lambda: discard(ours, 100)) == errno.EFAULT
    assert ours.recv(100) == b"unread"


def test_unix_peer_that_closes_with_unread_data_is_seen_as_a_reset(stack: ExitStack) -> None:
    """On AF_UNIX a peer that closes with unread data gives ECONNRESET on recv, even after our half-close."""
    ours, peer = unix_pair(stack)
    ours.sendall(b"answer")
    ours.shutdown(socket.SHUT_WR)
    peer.close()
    assert error_of(lambda: ours.recv(100)) == errno.ECONNRESET


def test_unix_peer_that_has_read_everything_is_seen_as_eof(stack: ExitStack) -> None:
    """On AF_UNIX a peer that has read everything before it closes gives EOF."""
    ours, peer = unix_pair(stack)
    ours.sendall(b"answer")
    assert peer.recv(100) == b"answer"
    peer.close()
    assert ours.recv(100) == b""
