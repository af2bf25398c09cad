"""When close sends RST, what that destroys, and what half-close does instead. Facts of the kernel only."""

import errno
import socket
from contextlib import ExitStack

from .facts import (
    Ending,
    TcpState,
    addresses,
    discard,
    error_of,
    fill,
    queued_input,
    read_to_end,
    reset,
    send_unread,
    state_in_table,
    tcp_pair,
    tcp_state,
    timed_close,
    wait_for_state,
    wait_until,
)


def test_plain_close_with_unread_input_resets_and_purges_the_answer(stack: ExitStack) -> None:
    """Plain close() with unread input sends RST; what we had queued is purged (RFC 1122 4.2.2.13)."""
    ours, peer = tcp_pair(stack)
    send_unread(peer, ours)
    sent = fill(ours)
    connection = addresses(ours)
    timed_close(ours)
    assert state_in_table(connection) is None
    ending = read_to_end(peer)
    assert ending.error == errno.ECONNRESET
    assert ending.received < sent


def test_input_that_arrives_after_plain_close_resets_and_purges_the_answer(stack: ExitStack) -> None:
    """After a plain close() a single byte of later input is answered by RST; what we had queued is purged."""
    ours, peer = tcp_pair(stack)
    sent = fill(ours)
    connection = addresses(ours)
    timed_close(ours)
    assert state_in_table(connection) is TcpState.FIN_WAIT1
    peer.sendall(b"x")
    wait_for_state(peer, TcpState.CLOSE)
    assert state_in_table(connection) is None
    ending = read_to_end(peer)
    assert ending.error == errno.ECONNRESET
    assert ending.received < sent


def test_input_that_arrives_after_half_close_harms_nothing(stack: ExitStack) -> None:
    """After SHUT_WR input is taken as before, and once it is discarded a close resets nothing: the cure."""
    ours, peer = tcp_pair(stack)
    sent = fill(ours)
    ours.shutdown(socket.SHUT_WR)
    send_unread(peer, ours)
    assert discard(ours, 100) == len(b"unread")
    timed_close(ours)
    assert read_to_end(peer) == Ending(sent, None)


def test_bytes_received_before_the_reset_stay_readable(stack: ExitStack) -> None:
    """Bytes the peer's kernel had already received when the RST comes are still readable on a Linux peer."""
    ours, peer = tcp_pair(stack)
    ours.sendall(b"answer")
    wait_until(lambda: queued_input(peer) == len(b"answer"))
    reset(ours)
    wait_for_state(peer, TcpState.CLOSE)
    assert peer.recv(100) == b"answer"
    assert error_of(lambda: peer.recv(100)) == errno.ECONNRESET


def test_shut_rd_discards_nothing_and_close_still_resets(stack: ExitStack) -> None:
    """SHUT_RD discards nothing, input keeps arriving, and a later close with input unread still resets."""
    ours, peer = tcp_pair(stack)
    send_unread(peer, ours, b"before")
    ours.shutdown(socket.SHUT_RD)
    assert queued_input(ours) == len(b"before")
    send_unread(peer, ours, b"after")
    assert ours.recv(100) == b"beforeafter"
    send_unread(peer, ours)
    sent = fill(ours)
    timed_close(ours)
    ending = read_to_end(peer)
    assert ending.error == errno.ECONNRESET
    assert ending.received < sent


def test_shut_rdwr_says_eof_at_once_and_resets_on_later_input(stack: ExitStack) -> None:
    """After SHUT_RDWR recv says EOF although the peer has not closed, and later input is answered by RST."""
    ours, peer = tcp_pair(stack)
    sent = fill(ours)
    ours.shutdown(socket.SHUT_RDWR)
    assert ours.recv(100) == b""
    assert tcp_state(peer) is TcpState.ESTABLISHED
    peer.sendall(b"x")
    wait_for_state(peer, TcpState.CLOSE)
    ending = read_to_end(peer)
    assert ending.error == errno.ECONNRESET
    assert ending.received < sent


def test_close_with_a_copy_open_sends_no_fin_but_half_close_does(stack: ExitStack) -> None:
    """While a dup'd copy of the fd is open close sends no FIN; shutdown(SHUT_WR) on any copy does."""
    ours, peer = tcp_pair(stack)
    copy = stack.enter_context(ours.dup())
    timed_close(ours)
    assert tcp_state(copy) is TcpState.ESTABLISHED
    copy.sendall(b"still here")
    assert peer.recv(100) == b"still here"
    second_copy = stack.enter_context(copy.dup())
    second_copy.shutdown(socket.SHUT_WR)
    assert read_to_end(peer) == Ending(0, None)
    wait_for_state(copy, TcpState.FIN_WAIT2)
