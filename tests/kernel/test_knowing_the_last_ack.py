"""How to know, and how to wait for, the ACK of our last byte and FIN. Facts of the kernel only."""

import select
import socket
import time
from contextlib import ExitStack

import pytest

from .facts import (
    DEADLINE,
    Ending,
    TcpState,
    bytes_acked,
    fill,
    queued_output,
    read_to_end,
    segments_out,
    send_unread,
    tcp_pair,
    tcp_state,
    wait_for_state,
    wait_until,
)

FEW_WAKEUPS = 4
"""For a whole slow transfer: one at once, one when the send queue has room again, one for the FIN's ACK."""

PIECE = 4096
"""Bytes per read of a slow peer: more than a hundred reads for what `fill` queues."""

DELAYED_ACK = 0.025
"""Seconds. TCP_DELACK_MIN is HZ/25, 40 ms, of which a slow timer tick (HZ=100) may take off a quarter."""

A_LONG_LOOK = 0.05
"""Seconds to look for an event that must not come; the kernel wakes while it handles the ACK: 0 would do."""


def half_closed_with_data_queued(stack: ExitStack) -> tuple[socket.socket, socket.socket, int]:
    """Ours, half-closed with data queued; a peer that has not read yet; the bytes sent. `stack` owns both."""
    ours, peer = tcp_pair(stack)
    sent = fill(ours)
    ours.shutdown(socket.SHUT_WR)
    assert queued_output(ours) > 0
    return ours, peer, sent


def epoll_for(stack: ExitStack, sock: socket.socket, events: int) -> select.epoll:
    """An epoll set with `sock` in it for `events`; `stack` owns the set."""
    epoll = stack.enter_context(select.epoll())
    epoll.register(sock, events)
    return epoll


def acked_and_unacked(sock: socket.socket) -> int:
    """Borrows: what was ever queued. Two readings agree whatever the peer's kernel ACKs between them."""
    while True:
        acked = bytes_acked(sock)
        total = acked + queued_output(sock)
        if acked == bytes_acked(sock):
            return total


def test_fin_counts_as_one_unacked_byte(stack: ExitStack) -> None:
    """SIOCOUTQ after SHUT_WR counts the FIN as one byte."""
    ours, _ = tcp_pair(stack)
    fill(ours)
    before = acked_and_unacked(ours)
    ours.shutdown(socket.SHUT_WR)
    assert acked_and_unacked(ours) == before + 1
    assert queued_output(ours) > 0


def test_unacked_bytes_count_down_to_zero_exactly_when_fin_wait2_begins(stack: ExitStack) -> None:
    """SIOCOUTQ after SHUT_WR counts down to 0; the state in TCP_INFO goes from FIN_WAIT1 to FIN_WAIT2 exactly
    when the FIN, hence every byte, is ACKed."""
    ours, peer, sent = half_closed_with_data_queued(stack)
    counts = []

    def all_acked() -> bool:
        # The state is read between two counts: it must agree with the one before it or with the one after it.
        count, state, later_count = queued_output(ours), tcp_state(ours), queued_output(ours)
        assert state is TcpState.FIN_WAIT2 if count == 0 else later_count == 0 or state is TcpState.FIN_WAIT1
        counts.append(count)
        return count == 0

    received = 0
    while received < sent:
        all_acked()
        received += len(peer.recv(PIECE))
    wait_until(all_acked)
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 2


def test_poll_for_output_is_always_ready_after_half_close(stack: ExitStack) -> None:
    """poll(POLLOUT) after SHUT_WR is always ready, so poll alone cannot wait for the ACK."""
    ours, *_ = half_closed_with_data_queued(stack)
    poll = select.poll()
    poll.register(ours, select.POLLOUT)
    for _ in range(100):
        assert [events for _, events in poll.poll(0)] == [select.POLLOUT]
    assert queued_output(ours) > 0


def test_edge_triggered_epoll_for_output_wakes_when_the_fin_is_acked(stack: ExitStack) -> None:
    """epoll with EPOLLOUT and EPOLLET after SHUT_WR wakes when our FIN is ACKed, with few wakeups for a whole
    slow transfer."""
    ours, peer, sent = half_closed_with_data_queued(stack)
    epoll = epoll_for(stack, ours, select.EPOLLOUT | select.EPOLLET)
    wakeups = received = 0
    while True:
        slow_peer_is_reading = received < sent
        if slow_peer_is_reading:
            received += len(peer.recv(PIECE))
        if epoll.poll(0 if slow_peer_is_reading else DEADLINE):
            wakeups += 1
            if queued_output(ours) == 0:
                break
        else:
            assert slow_peer_is_reading, "everything is read, and the ACK of our FIN woke nobody"
    assert tcp_state(ours) is TcpState.FIN_WAIT2
    wakeups += len(epoll.poll(A_LONG_LOOK))
    assert wakeups <= FEW_WAKEUPS


def test_edge_triggered_epoll_for_output_is_not_disturbed_by_inbound_segments(stack: ExitStack) -> None:
    """While data is queued after SHUT_WR, inbound segments do not wake an epoll with EPOLLOUT and EPOLLET."""
    ours, peer, _ = half_closed_with_data_queued(stack)
    epoll = epoll_for(stack, ours, select.EPOLLOUT | select.EPOLLET)
    wakeups = 0
    for _ in range(50):
        send_unread(peer, ours)
        wakeups += len(epoll.poll(0))
    assert queued_output(ours) > 0
    assert wakeups <= FEW_WAKEUPS


def test_epoll_without_epollout_never_wakes_for_the_ack(stack: ExitStack) -> None:
    """Without EPOLLOUT an edge-triggered epoll never fires for the ACK of our FIN."""
    ours, peer, sent = half_closed_with_data_queued(stack)
    epoll = epoll_for(stack, ours, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
    assert read_to_end(peer).received == sent
    wait_for_state(ours, TcpState.FIN_WAIT2)
    assert epoll.poll(A_LONG_LOOK) == []


def test_epoll_without_epollet_is_always_ready(stack: ExitStack) -> None:
    """Without EPOLLET an epoll with EPOLLOUT fires at once and always after SHUT_WR, ACKed or not."""
    ours, *_ = half_closed_with_data_queued(stack)
    epoll = epoll_for(stack, ours, select.EPOLLOUT)
    for _ in range(100):
        assert [events for _, events in epoll.poll(0)] == [select.EPOLLOUT]
    assert queued_output(ours) > 0


@pytest.mark.parametrize(("flags", "segments"), [(socket.MSG_MORE, 1), (0, 2)], ids=["more", "plain"])
def test_fin_rides_on_the_last_data_after_msg_more(stack: ExitStack, flags: int, segments: int) -> None:
    """send(MSG_MORE) then shutdown(SHUT_WR): last data and FIN in one segment; after a plain send in two."""
    ours, peer = tcp_pair(stack)
    before = segments_out(ours)
    assert ours.send(b"answer", flags) == len(b"answer")
    ours.shutdown(socket.SHUT_WR)
    wait_until(lambda: queued_output(ours) == 0)
    assert segments_out(ours) - before == segments
    assert read_to_end(peer).received == len(b"answer")


def test_a_peer_that_stays_silent_delays_the_ack_of_our_fin(stack: ExitStack) -> None:
    """A Linux peer that neither answers nor closes delays its ACK of our FIN by about 40 ms, even when it has
    read everything: waiting for that ACK costs more than a round trip."""
    ours, peer = tcp_pair(stack)
    started = time.monotonic()
    ours.sendall(b"answer")
    ours.shutdown(socket.SHUT_WR)
    assert read_to_end(peer) == Ending(len(b"answer"), None)
    wait_until(lambda: queued_output(ours) == 0)
    assert time.monotonic() - started > DELAYED_ACK
