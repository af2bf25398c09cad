"""How a reset shows, or hides, after our half-close. Facts of the kernel only; nothing of lingerx."""

import errno
import select
import socket
from contextlib import ExitStack

import pytest

from .facts import (
    DEADLINE,
    TcpState,
    error_of,
    fill,
    queued_output,
    read_to_end,
    reset,
    send_unread,
    so_error,
    tcp_pair,
    tcp_state,
    wait_for_state,
)


def reset_in_fin_wait2(stack: ExitStack) -> socket.socket:
    """A socket whose every byte and FIN were ACKed, and whose peer then sent RST; `stack` owns it."""
    ours, peer = tcp_pair(stack)
    ours.shutdown(socket.SHUT_WR)
    wait_for_state(ours, TcpState.FIN_WAIT2)
    reset(peer)
    wait_for_state(ours, TcpState.CLOSE)
    return ours


def test_poll_after_a_reset_in_fin_wait2(stack: ExitStack) -> None:
    """After a peer's RST in FIN_WAIT2 poll says IN, ERR, HUP and RDHUP."""
    poll = select.poll()
    poll.register(reset_in_fin_wait2(stack), select.POLLIN | select.POLLRDHUP)
    [(_, events)] = poll.poll(0)
    assert events == select.POLLIN | select.POLLERR | select.POLLHUP | select.POLLRDHUP


def test_recv_first_after_a_reset_tells_it(stack: ExitStack) -> None:
    """After a peer's RST in FIN_WAIT2 the first recv says ECONNRESET and clears SO_ERROR, the next says 0."""
    ours = reset_in_fin_wait2(stack)
    assert error_of(lambda: ours.recv(100)) == errno.ECONNRESET
    assert so_error(ours) == 0
    assert ours.recv(100) == b""


def test_so_error_first_after_a_reset_hides_it_from_recv(stack: ExitStack) -> None:
    """Reading SO_ERROR first clears it and recv then returns 0: a reset looks like EOF."""
    ours = reset_in_fin_wait2(stack)
    assert so_error(ours) == errno.ECONNRESET
    assert ours.recv(100) == b""


def test_input_before_a_reset_is_read_before_the_error(stack: ExitStack) -> None:
    """Input that came before the RST is read first; ECONNRESET comes after the last byte."""
    ours, peer = tcp_pair(stack)
    ours.shutdown(socket.SHUT_WR)
    send_unread(peer, ours)
    reset(peer)
    wait_for_state(ours, TcpState.CLOSE)
    assert ours.recv(100) == b"unread"
    assert error_of(lambda: ours.recv(100)) == errno.ECONNRESET


@pytest.mark.parametrize(
    ("state", "error"),
    [
        (TcpState.CLOSE_WAIT, errno.EPIPE),
        (TcpState.LAST_ACK, errno.ECONNRESET),
        (TcpState.CLOSING, errno.ECONNRESET),
    ],
)
def test_reset_after_a_fin_is_hidden_from_recv_but_not_from_so_error(
    stack: ExitStack, state: TcpState, error: int
) -> None:
    """After a FIN was received a later RST is hidden from recv, which goes on to return 0; SO_ERROR tells it.
    It is EPIPE in CLOSE_WAIT and ECONNRESET once we have half-closed too."""
    ours, peer = tcp_pair(stack)
    fill(ours)
    if state is TcpState.CLOSING:
        ours.shutdown(socket.SHUT_WR)
        peer.shutdown(socket.SHUT_WR)
    else:
        peer.shutdown(socket.SHUT_WR)
        wait_for_state(ours, TcpState.CLOSE_WAIT)
        if state is TcpState.LAST_ACK:
            ours.shutdown(socket.SHUT_WR)
    wait_for_state(ours, state)
    reset(peer)
    wait_for_state(ours, TcpState.CLOSE)
    assert ours.recv(100) == b""
    assert so_error(ours) == error
    assert ours.recv(100) == b""


@pytest.mark.parametrize("half_closed", [False, True])
def test_unacked_bytes_are_still_told_after_a_reset(stack: ExitStack, half_closed: bool) -> None:
    """SIOCOUTQ still tells the un-ACKed bytes after a peer's RST, also after recv has told the error."""
    ours, peer = tcp_pair(stack)
    fill(ours)
    if half_closed:
        ours.shutdown(socket.SHUT_WR)
    before = queued_output(ours)
    reset(peer)
    wait_for_state(ours, TcpState.CLOSE)
    after = queued_output(ours)
    assert 0 < after <= before
    assert error_of(lambda: ours.recv(100)) == errno.ECONNRESET
    assert queued_output(ours) == after


def test_nothing_is_unacked_after_a_reset_in_fin_wait2(stack: ExitStack) -> None:
    """SIOCOUTQ says 0 after a peer's RST when everything had been ACKed before."""
    assert queued_output(reset_in_fin_wait2(stack)) == 0


def connecting_socket(stack: ExitStack) -> socket.socket:
    """A non-blocking socket that stays in SYN_SENT; `stack` owns it.

    Linux drops a SYN to a listener whose accept queue is full; a backlog of 0 has room for one connection.
    """
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
    stack.enter_context(socket.create_connection(listener.getsockname(), DEADLINE))
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    assert poll.poll(DEADLINE * 1000)
    ours = stack.enter_context(socket.socket())
    ours.setblocking(False)
    assert ours.connect_ex(listener.getsockname()) == errno.EINPROGRESS
    if tcp_state(ours) is not TcpState.SYN_SENT:
        pytest.skip("this kernel answers a SYN although the listener's accept queue is full")
    return ours


def test_half_close_while_connecting_succeeds_and_gives_the_connection_up(stack: ExitStack) -> None:
    """shutdown(SHUT_WR) in SYN_SENT returns 0 and gives up at once: recv says ECONNRESET, then ENOTCONN."""
    ours = connecting_socket(stack)
    ours.shutdown(socket.SHUT_WR)
    assert tcp_state(ours) is TcpState.CLOSE
    assert error_of(lambda: ours.recv(100)) == errno.ECONNRESET
    assert error_of(lambda: ours.recv(100)) == errno.ENOTCONN


def test_half_close_of_a_socket_that_was_never_connected_is_refused(stack: ExitStack) -> None:
    """shutdown(SHUT_WR) of a socket that was never connected is ENOTCONN (shutdown(2))."""
    ours = stack.enter_context(socket.socket())
    assert error_of(lambda: ours.shutdown(socket.SHUT_WR)) == errno.ENOTCONN


def test_half_close_after_a_reset_is_refused(stack: ExitStack) -> None:
    """shutdown(SHUT_WR) after a peer's RST is ENOTCONN, and leaves the ECONNRESET for recv to tell."""
    ours, peer = tcp_pair(stack)
    reset(peer)
    wait_for_state(ours, TcpState.CLOSE)
    assert error_of(lambda: ours.shutdown(socket.SHUT_WR)) == errno.ENOTCONN
    ours.settimeout(DEADLINE)
    assert read_to_end(ours).error == errno.ECONNRESET
