"""What becomes of a connection after close has left the rest to the kernel. Facts of the kernel only."""

import errno
import socket
import time
from contextlib import ExitStack

import pytest

from .facts import (
    Addresses,
    Ending,
    TcpState,
    addresses,
    fill,
    read_to_end,
    state_in_table,
    tcp_pair,
    timed_close,
    wait_for_state,
    wait_until,
)

USER_TIMEOUT = 0.3
"""Seconds, from the closing of the peer's window on. The kernel looks at it only when a window probe is due,
and probes come ever more seldom, so the orphan lives longer: here by half a second."""


def seen_from_the_peer(connection: Addresses) -> Addresses:
    return Addresses(connection.remote, connection.local)


def test_plain_close_leaves_fin_wait2_and_then_time_wait(stack: ExitStack) -> None:
    """After a plain close the kernel keeps FIN_WAIT2 until the peer closes too, and then TIME_WAIT."""
    ours, peer = tcp_pair(stack)
    sent = fill(ours)
    connection = addresses(ours)
    timed_close(ours)
    assert read_to_end(peer) == Ending(sent, None)
    wait_until(lambda: state_in_table(connection) is TcpState.FIN_WAIT2)
    peer.close()
    wait_until(lambda: state_in_table(connection) is TcpState.TIME_WAIT)


@pytest.mark.parametrize("acked_first", [False, True], ids=["data-queued", "all-acked"])
def test_negative_linger2_loses_nothing_and_leaves_nothing(stack: ExitStack, acked_first: bool) -> None:
    """TCP_LINGER2 = -1 then close: everything is still delivered, then RST instead of FIN_WAIT2: no orphan
    and no TIME_WAIT; a Linux peer sees all data and EOF."""
    ours, peer = tcp_pair(stack)
    connection = addresses(ours)
    sent = ours.send(b"answer") if acked_first else fill(ours)
    if acked_first:
        ours.shutdown(socket.SHUT_WR)
        wait_for_state(ours, TcpState.FIN_WAIT2)
    ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, -1)
    timed_close(ours)
    assert (state_in_table(connection) is None) is acked_first
    assert read_to_end(peer) == Ending(sent, None)
    wait_until(lambda: state_in_table(connection) is None)
    wait_for_state(peer, TcpState.CLOSE)  # by our RST: the peer itself has not closed yet
    peer.close()
    assert state_in_table(connection) is None
    assert state_in_table(seen_from_the_peer(connection)) is None


@pytest.mark.slow  # the kernel's first two window probes take half a second
def test_user_timeout_bounds_an_orphan_whose_peer_does_not_read(stack: ExitStack) -> None:
    """TCP_USER_TIMEOUT also bounds how long an orphan in FIN_WAIT1 lives; without it the orphan stays. What
    the peer had not received is lost, and it sees ECONNRESET."""
    started = time.monotonic()
    bounded, bounded_peer = tcp_pair(stack)
    unbounded, unbounded_peer = tcp_pair(stack)
    bounded_sent, unbounded_sent = fill(bounded), fill(unbounded)
    bounded.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(USER_TIMEOUT * 1000))
    bounded_connection, unbounded_connection = addresses(bounded), addresses(unbounded)
    timed_close(unbounded)
    timed_close(bounded)
    wait_until(lambda: state_in_table(bounded_connection) is None)
    assert time.monotonic() - started > USER_TIMEOUT
    assert state_in_table(unbounded_connection) is TcpState.FIN_WAIT1
    ending = read_to_end(bounded_peer)
    assert ending.error == errno.ECONNRESET
    assert ending.received < bounded_sent
    assert read_to_end(unbounded_peer) == Ending(unbounded_sent, None)
