"""Every outcome but SHED, each brought about by a real peer, with the exact counts and the truth about delivery.

What holds for every closer is in `conformance`; here is the fine print of the engines. BACKGROUND and ABORTED, which
leave the rest to the kernel, are in `test_orphans`.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from conformance import SHORT, Engine, facts
from connections import (
    A_LONG_LOOK,
    DEADLINE,
    SMALL_BUFFERS,
    Connection,
    Ending,
    PairMaker,
    TcpState,
    lacking,
    queued_output,
    tcp_state,
    unread_pair,
    wait_for_reset,
    wait_until,
)
from lingerx import Abort, Background, Drain, Flush, KernelLinger, Outcome, Policy
from peers import Call, Dripping, GoneNetwork, read_to_end, reset, send_unread

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts and states as Linux tells them")

PATIENT: list[Policy] = [Drain(timeout=DEADLINE), Flush(timeout=DEADLINE)]
BOTH = pytest.mark.parametrize("policy", PATIENT, ids=["drain", "flush"])
BIG = bytes(4 << 20)
"""More than any send buffer takes at once."""


# PEER_CLOSED, ACKED ---------------------------------------------------------------------------------------


def test_peer_closed_before_the_call_with_nothing_to_read(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp()
    ours.sendall(b"answer")
    assert peer.recv(100) == b"answer"
    peer.close()
    assert facts(engine.close(ours)) == (Outcome.PEER_CLOSED, 0, 0, None, True)


def test_flush_says_acked_when_the_peer_has_closed_too(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp()
    send_unread(peer, ours, b"bye")
    peer.close()
    assert facts(engine.close(ours, Flush(timeout=DEADLINE))) == (Outcome.ACKED, 3, 0, None, True)


def test_half_closed_before_by_the_application(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp()
    ours.sendall(b"answer")
    ours.shutdown(socket.SHUT_WR)
    with Call(lambda: engine.close(ours)) as call:
        assert read_to_end(peer) == Ending(len(b"answer"), None)
        call.join(A_LONG_LOOK)
        assert call.is_alive(), call.result()
        peer.close()
    assert facts(call.result()) == (Outcome.PEER_CLOSED, 0, 0, None, True)


def test_closed_by_both_sides_before_the_call(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp()
    side = Connection.of(ours)
    ours.sendall(b"answer")
    ours.shutdown(socket.SHUT_WR)
    assert read_to_end(peer) == Ending(len(b"answer"), None)
    peer.close()
    side.wait_for(TcpState.TIME_WAIT)
    assert facts(engine.close(ours)) == (Outcome.NOT_CONNECTED, 0, 0, None, True)


@pytest.mark.parametrize("reads", [False, True], ids=["closes", "reads_late"])
def test_drain_is_not_done_while_a_byte_is_unacked(engine: Engine, tcp: PairMaker, reads: bool) -> None:
    """The peer's FIN alone proves nothing: `delivered is True` with a byte missing is the worst bug of all."""
    ours, peer, sent = unread_pair(tcp)
    peer.shutdown(socket.SHUT_WR)
    side = Connection.of(ours)
    with Call(lambda: engine.close(ours, Drain(timeout=DEADLINE))) as call:
        side.wait_for(TcpState.LAST_ACK)
        call.join(A_LONG_LOOK)
        assert call.is_alive(), call.result()
        if reads:
            assert read_to_end(peer) == Ending(sent, None)
        else:
            unacked = lacking(sent, peer)
            peer.close()  # with input unread: RST
    if reads:
        assert facts(call.result()) == (Outcome.PEER_CLOSED, 0, 0, None, True)
    else:
        assert facts(call.result()) == (Outcome.PEER_RESET, 0, unacked, errno.ECONNRESET, False)


def test_flush_without_a_wait_sees_what_is_acked_already(engine: Engine, tcp: PairMaker) -> None:
    ours, _ = tcp()
    ours.sendall(b"answer")
    ours.shutdown(socket.SHUT_WR)
    wait_until(lambda: queued_output(ours) == 0)
    assert facts(engine.close(ours, Flush(timeout=0))) == (Outcome.ACKED, 0, 0, None, True)


# PEER_RESET -----------------------------------------------------------------------------------------------


@BOTH
def test_peer_resets_while_we_wait_for_its_acks(engine: Engine, policy: Policy, tcp: PairMaker) -> None:
    ours, peer, sent = unread_pair(tcp)
    side = Connection.of(ours)
    with Call(lambda: engine.close(ours, policy)) as call:
        side.wait_for(TcpState.FIN_WAIT1)
        unacked = lacking(sent, peer)
        reset(peer)
    assert facts(call.result()) == (Outcome.PEER_RESET, 0, unacked, errno.ECONNRESET, False)


@BOTH
def test_peer_resets_after_its_fin_while_data_is_unacked(engine: Engine, policy: Policy, tcp: PairMaker) -> None:
    """After a FIN recv goes on to say EOF, reset or not."""
    ours, peer, sent = unread_pair(tcp)
    peer.shutdown(socket.SHUT_WR)
    side = Connection.of(ours)
    with Call(lambda: engine.close(ours, policy)) as call:
        side.wait_for(TcpState.LAST_ACK)
        unacked = lacking(sent, peer)
        reset(peer)
    assert facts(call.result()) == (Outcome.PEER_RESET, 0, unacked, errno.ECONNRESET, False)


@BOTH
def test_peer_has_read_everything_and_resets_before_its_ack(engine: Engine, policy: Policy, tcp: PairMaker) -> None:
    """Not ACKed is not lost: the peer has it all."""

    def unacked_reset() -> socket.socket | None:
        ours, peer = tcp()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)  # its ACKs are delayed by 40 ms (tcp(7))
        ours.sendall(b"answer")
        assert peer.recv(100) == b"answer"
        reset(peer)
        wait_for_reset(ours)
        return ours if queued_output(ours) > 0 else None  # on a busy machine the ACK may have been quicker

    ours = next(filter(None, (unacked_reset() for _ in range(100))))
    assert facts(engine.close(ours, policy)) == (Outcome.PEER_RESET, 0, len(b"answer"), errno.ECONNRESET, None)


def test_peer_resets_behind_its_input(engine: Engine, tcp: PairMaker) -> None:
    """The input before the RST counts, and SO_ERROR is not read before recv, which would then say EOF."""
    ours, peer = tcp()
    side = Connection.of(ours)
    with Call(lambda: engine.close(ours, Drain(timeout=DEADLINE))) as call:
        side.wait_for(TcpState.FIN_WAIT2)
        peer.sendall(b"input")
        reset(peer)
    assert facts(call.result()) == (Outcome.PEER_RESET, 5, 0, errno.ECONNRESET, True)


@BOTH
@pytest.mark.parametrize("consumer", ["recv", "SO_ERROR"])
def test_peer_has_reset_and_the_application_has_read_the_error(
    engine: Engine, policy: Policy, tcp: PairMaker, consumer: str
) -> None:
    ours, peer, sent = unread_pair(tcp)
    unacked = lacking(sent, peer)
    reset(peer)
    wait_for_reset(ours)
    if consumer == "recv":
        with pytest.raises(ConnectionResetError):
            ours.recv(1)
    else:
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET
    report = engine.close(ours, policy)
    assert report.outcome is Outcome.PEER_RESET
    assert (report.drained, report.unacked, report.delivered) == (0, unacked, False)


def test_peer_has_reset_when_all_was_acked_and_the_application_has_read_the_error(
    engine: Engine, tcp: PairMaker
) -> None:
    ours, peer = tcp()
    ours.sendall(b"answer")
    assert peer.recv(100) == b"answer"
    wait_until(lambda: queued_output(ours) == 0)
    reset(peer)
    wait_for_reset(ours)
    with pytest.raises(ConnectionResetError):
        ours.recv(1)
    assert facts(engine.close(ours)) == (Outcome.NOT_CONNECTED, 0, 0, None, True)


def test_local_peer_closes_before_it_has_read_everything(engine: Engine, unix_pair: PairMaker) -> None:
    """Linux then says ECONNRESET (unix(7)); nobody knows how much it had read."""
    ours, peer = unix_pair()
    ours.sendall(b"answer")
    peer.close()
    report = engine.close(ours)
    assert report.outcome is Outcome.PEER_RESET
    assert (report.drained, report.unacked, report.delivered) == (0, None, False)


# TIMED_OUT, IDLE, BYTE_LIMIT ------------------------------------------------------------------------------


@BOTH
def test_unacked_at_the_deadline_is_what_the_peer_lacks(engine: Engine, policy: Policy, tcp: PairMaker) -> None:
    ours, peer, sent = unread_pair(tcp)
    report = engine.close(ours, type(policy)(timeout=SHORT))
    assert facts(report) == (Outcome.TIMED_OUT, 0, lacking(sent, peer), None, None)
    assert read_to_end(peer) == Ending(sent, None), "left to the kernel, nothing is lost"


@BOTH
def test_abort_at_the_deadline_destroys_exactly_the_unacked(engine: Engine, policy: Policy, tcp: PairMaker) -> None:
    ours, peer, sent = unread_pair(tcp)
    report = engine.close(ours, type(policy)(timeout=SHORT, on_timeout="abort"))
    received, error = read_to_end(peer)
    assert error == errno.ECONNRESET
    assert facts(report) == (Outcome.TIMED_OUT, 0, sent - received, None, False)


def test_abort_at_the_deadline_when_everything_was_acked(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp()
    side = Connection.of(ours)
    ours.sendall(b"answer")
    report = engine.close(ours, Drain(timeout=SHORT, on_timeout="abort"))
    assert facts(report) == (Outcome.TIMED_OUT, 0, 0, None, True)
    assert side.state() is None
    assert peer.recv(100) == b"answer"


def test_dripping_peer_is_not_idle(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp()
    with Dripping(peer, every=0.005) as drip:
        report = engine.close(ours, Drain(timeout=0.2, idle_timeout=0.1))
    assert facts(report) == (Outcome.TIMED_OUT, report.drained, 0, None, True)
    assert 0 < report.drained <= drip.sent


@pytest.mark.parametrize(
    ("limit", "sent"), [(0, 0), (0, 1), (5, 5), (5, 6), (3 << 20, 3 << 20), (3 << 20, (3 << 20) + 1)]
)
def test_byte_limit_of_drain_is_exact(engine: Engine, tcp: PairMaker, limit: int, sent: int) -> None:
    ours, peer = tcp()
    ours.sendall(b"answer")
    # One byte too many is answered by RST.
    with Call(lambda: engine.close(ours, Drain(timeout=DEADLINE, max_bytes=limit))) as call, suppress(OSError):
        peer.sendall(bytes(sent))
        peer.shutdown(socket.SHUT_WR)
    expected = Outcome.BYTE_LIMIT if sent > limit else Outcome.PEER_CLOSED
    assert facts(call.result()) == (expected, min(sent, limit), 0, None, True)


@pytest.mark.parametrize(("limit", "sent"), [(0, 0), (0, 1), (5, 5), (5, 6)])
def test_byte_limit_of_flush_is_exact(engine: Engine, tcp: PairMaker, limit: int, sent: int) -> None:
    ours, peer, answer = unread_pair(tcp)
    send_unread(peer, ours, bytes(sent))
    side = Connection.of(ours)
    with Call(lambda: engine.close(ours, Flush(timeout=DEADLINE, max_bytes=limit))) as call:
        if sent > limit:
            assert facts(call.result()) == (Outcome.BYTE_LIMIT, limit, lacking(answer, peer), None, None)
            return
        side.wait_for(TcpState.FIN_WAIT1)
        assert read_to_end(peer) == Ending(answer, None)
    assert facts(call.result()) == (Outcome.ACKED, sent, 0, None, True)


def test_abort_at_the_byte_limit(engine: Engine, tcp: PairMaker) -> None:
    ours, peer, sent = unread_pair(tcp)
    send_unread(peer, ours, b"too much")
    report = engine.close(ours, Drain(timeout=DEADLINE, max_bytes=3, on_timeout="abort"))
    received, error = read_to_end(peer)
    assert facts(report) == (Outcome.BYTE_LIMIT, 3, sent - received, None, False)
    assert error == errno.ECONNRESET


def test_silent_peer_is_within_a_byte_limit_of_nothing(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp()
    assert facts(engine.close(ours, Drain(timeout=SHORT, max_bytes=0))) == (Outcome.TIMED_OUT, 0, 0, None, True)
    assert peer.recv(1) == b""


# NOT_CONNECTED, ALREADY_CLOSED ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
def test_fresh_socket_is_not_connected(engine: Engine, family: int) -> None:
    with socket.socket(family) as ours:
        assert facts(engine.close(ours)) == (Outcome.NOT_CONNECTED, 0, None, None, None)
        assert ours.fileno() == -1


@pytest.fixture
def connecting(stack: ExitStack) -> socket.socket:
    """A socket that waits for a listener's answer: Linux drops a SYN when the accept queue (here of one) is full."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
    stack.enter_context(socket.create_connection(listener.getsockname(), DEADLINE))
    wait_until(lambda: bool(select.select([listener], [], [], 0)[0]))
    ours = stack.enter_context(socket.socket())
    ours.setblocking(False)
    assert ours.connect_ex(listener.getsockname()) == errno.EINPROGRESS
    if tcp_state(ours) is not TcpState.SYN_SENT:
        pytest.skip("this kernel answers a SYN although the listener's accept queue is full")
    return ours


@BOTH
def test_connecting_socket_is_not_connected(engine: Engine, policy: Policy, connecting: socket.socket) -> None:
    """It is no peer's reset, though recv says ECONNRESET after the half-close."""
    assert facts(engine.close(connecting, policy)) == (Outcome.NOT_CONNECTED, 0, None, None, None)


def test_bytes_for_a_fresh_socket_are_known_to_be_lost(engine: Engine) -> None:
    with socket.socket() as ours:
        report = engine.send_and_close(ours, b"answer")
    assert report.outcome is Outcome.NOT_CONNECTED
    assert report.delivered is False


def test_bytes_for_a_closed_socket_object_are_known_to_be_lost(engine: Engine, tcp: PairMaker) -> None:
    ours, _ = tcp()
    ours.close()
    report = engine.send_and_close(ours, b"answer")
    assert report.outcome is Outcome.ALREADY_CLOSED
    assert (report.unacked, report.delivered) == (len(b"answer"), False)


@pytest.mark.parametrize("policy", [*PATIENT, Background(), Abort(), KernelLinger(1)], ids=lambda p: type(p).__name__)
def test_detached_socket_is_left_to_its_new_owner(engine: Engine, policy: Policy, tcp: PairMaker) -> None:
    ours, peer = tcp()
    fd = ours.detach()
    assert engine.close(ours, policy).outcome is Outcome.ALREADY_CLOSED
    with socket.socket(fileno=fd) as owned:
        owned.sendall(b"untouched")
    assert read_to_end(peer) == Ending(len(b"untouched"), None)


@pytest.mark.parametrize("policy", [*PATIENT, Background(), Abort(), KernelLinger(1)], ids=lambda p: type(p).__name__)
def test_fd_that_somebody_else_closed_is_not_closed_again(engine: Engine, policy: Policy, tcp: PairMaker) -> None:
    ours, _ = tcp()
    os.close(ours.fileno())
    report = engine.close(ours, policy)
    ours.detach()
    assert facts(report) == (Outcome.ALREADY_CLOSED, 0, None, errno.EBADF, None)


@pytest.mark.parametrize("policy", [*PATIENT, Background(), Abort(), KernelLinger(1)], ids=lambda p: type(p).__name__)
def test_file_that_got_the_number_stays_open(engine: Engine, policy: Policy, tcp: PairMaker) -> None:
    ours, _ = tcp()
    fd = ours.fileno()
    read_end, write_end = os.pipe()
    try:
        os.dup2(read_end, fd)  # closes the socket, and gives its number away at once
        report = engine.close(ours, policy)
        ours.detach()
        os.write(write_end, b"still open")
        assert os.read(fd, 100) == b"still open"
    finally:
        for number in (fd, read_end, write_end):
            os.close(number)
    assert facts(report) == (Outcome.ALREADY_CLOSED, 0, None, errno.ENOTSOCK, None)


# FAILED ---------------------------------------------------------------------------------------------------


@pytest.fixture
def gone_network() -> Iterator[GoneNetwork]:
    """A network whose link can be taken down."""
    if os.geteuid() != 0:
        pytest.skip("a peer that vanishes needs a network namespace, and that needs root")
    try:
        network = GoneNetwork().__enter__()
    except (OSError, subprocess.CalledProcessError) as refusal:
        pytest.skip(f"no network namespaces here: {getattr(refusal, 'stderr', '') or refusal}")
    with ExitStack() as stack:
        stack.push(network)
        yield network


@pytest.mark.slow  # the kernel's timers: the first retransmission alone comes after 200 ms
@BOTH
def test_peer_is_gone_and_the_kernel_gives_up(
    engine: Engine, policy: Policy, gone_network: GoneNetwork, stack: ExitStack
) -> None:
    ours, _ = gone_network.connect(stack)
    ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 100)
    gone_network.vanish()
    ours.sendall(b"answer")
    # What is in flight may have arrived, and only its ACK been lost: nothing is known.
    assert facts(engine.close(ours, policy)) == (Outcome.FAILED, 0, len(b"answer"), errno.ETIMEDOUT, None)


# Sending --------------------------------------------------------------------------------------------------


def test_peer_resets_while_we_send(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    with Call(lambda: engine.send_and_close(ours, BIG, Drain(timeout=DEADLINE))) as call:
        received = len(peer.recv(65536))
        reset(peer)
    report = call.result()
    assert (report.outcome, report.delivered) == (Outcome.PEER_RESET, False)
    assert report.error in (errno.ECONNRESET, errno.EPIPE)
    assert report.unacked is not None
    assert 0 < report.unacked <= len(BIG) - received


# Connections that never were, or are over ------------------------------------------------------------------


@BOTH
def test_refused_and_the_application_has_read_the_error(engine: Engine, policy: Policy, refused: socket.socket) -> None:
    """The SYN in its queue is no byte of ours, and nobody has reset anything."""
    assert refused.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED
    assert engine.tcp_status(refused).unacked == 0
    assert facts(engine.close(refused, policy)) == (Outcome.NOT_CONNECTED, 0, 0, None, True)


@BOTH
def test_data_for_a_connection_that_was_refused(engine: Engine, policy: Policy, refused: socket.socket) -> None:
    refused.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    assert facts(engine.send_and_close(refused, b"abc", policy)) == (Outcome.NOT_CONNECTED, 0, 3, None, False)


@BOTH
def test_data_for_a_connection_that_both_sides_have_ended(engine: Engine, policy: Policy, tcp: PairMaker) -> None:
    """Nothing was reset: the application has closed its side before, and then there was more to say."""
    ours, peer = tcp()
    ours.shutdown(socket.SHUT_WR)
    peer.close()
    wait_until(lambda: tcp_state(ours) in (TcpState.TIME_WAIT, TcpState.CLOSE))
    assert facts(engine.send_and_close(ours, b"abc", policy)) == (Outcome.NOT_CONNECTED, 0, 3, None, False)


def test_no_data_for_a_socket_that_is_closed(engine: Engine, tcp: PairMaker) -> None:
    ours, _ = tcp()
    ours.close()
    assert facts(engine.send_and_close(ours, b"")) == (Outcome.ALREADY_CLOSED, 0, None, None, None)
