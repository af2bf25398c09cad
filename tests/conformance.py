"""What every closer must do, whatever it is built on: the engines' functions, the background closer, the adapters.

A closer is a callable (socket, policy) -> Report that owns the socket from the call on and has closed it when the
report is there. To hold one to this, subclass these classes in a test module and define a fixture `closer`:

    class TestMyCloser(Graceful, Immediate):
        @pytest.fixture
        def closer(self) -> Closer: ...

Only what holds for every closer may live here, by real peers; the fine print of an engine is in `test_outcomes`.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from connections import (
    A_LONG_LOOK,
    DEADLINE,
    SMALL_BUFFERS,
    Connection,
    Ending,
    PairMaker,
    TcpState,
    fill,
    identity,
    lacking,
    still_open,
    unread_pair,
    wait_for_reset,
)
from lingerx import Abort, Background, Drain, Flush, Outcome, Policy, Report, TcpStatus
from peers import Call, Flooding, Polite, SlowReader, WritesFirst, read_to_end, reset, send_unread

if TYPE_CHECKING:
    from typing_extensions import Buffer

Closer = Callable[[socket.socket, Policy], Report]

ANSWER = b"HTTP/1.1 413 Content Too Large\r\nconnection: close\r\n\r\n" + b"too large\n" * 1000
UPLOAD = bytes(300_000)
SHORT = 0.03
"""Seconds: a limit that is meant to be reached."""


class Engine(Protocol):
    """What `lingerx._offers` says that an engine offers, as a type."""

    def close(self, sock: socket.socket, policy: Policy | None = None) -> Report: ...
    def close_fd(self, fd: int, policy: Policy | None = None) -> Report: ...
    def abort(self, sock: socket.socket) -> Report: ...
    def close_all(
        self,
        socks: Iterable[socket.socket],
        policy: Policy | None = None,
        *,
        timeout: float | None = None,
        spread: float = 0.0,
    ) -> list[Report]: ...
    def send_and_close(self, sock: socket.socket, data: Buffer, policy: Policy | None = None) -> Report: ...
    def set_linger(self, sock: socket.socket, seconds: int) -> None: ...
    def get_linger(self, sock: socket.socket) -> int: ...
    def tcp_status(self, sock: socket.socket) -> TcpStatus: ...


if TYPE_CHECKING:
    from lingerx import _offers

    _the_same: Engine = _offers


def facts(report: Report) -> tuple[Any, ...]:
    """All of a report that does not depend on the clock: outcome, drained, unacked, error, delivered."""
    return report.outcome, report.drained, report.unacked, report.error, report.delivered


def close_soon(closer: Closer, sock: socket.socket, policy: Policy) -> Call[Report]:
    """The closer on a thread: for what the peer does, or what must not happen, meanwhile."""
    return Call(lambda: closer(sock, policy))


class Graceful:
    """What a closer must do by Flush and Drain."""

    def test_peer_gets_every_byte_although_its_input_was_never_read(self, closer: Closer, any_pair: PairMaker) -> None:
        ours, peer = any_pair()
        send_unread(peer, ours, UPLOAD[:50_000])
        ours.sendall(ANSWER)
        with Polite(peer) as client:
            report = closer(ours, Drain(timeout=DEADLINE))
        assert client.ending == Ending(len(ANSWER), None)
        assert facts(report) == (Outcome.PEER_CLOSED, 50_000, 0, None, True)

    def test_peer_gets_every_byte_although_it_writes_its_whole_body_first(
        self, closer: Closer, any_pair: PairMaker
    ) -> None:
        ours, peer = any_pair()
        ours.sendall(ANSWER)
        with WritesFirst(peer, 30 * UPLOAD) as client:
            report = closer(ours, Drain(timeout=DEADLINE))
        assert client.ending == Ending(len(ANSWER), None)
        assert facts(report) == (Outcome.PEER_CLOSED, 30 * len(UPLOAD), 0, None, True)

    def test_peer_has_closed_before_us(self, closer: Closer, any_pair: PairMaker) -> None:
        ours, peer = any_pair()
        peer.sendall(b"bye")
        peer.close()
        assert facts(closer(ours, Drain(timeout=DEADLINE))) == (Outcome.PEER_CLOSED, 3, 0, None, True)

    def test_flush_does_not_wait_for_a_peer_that_stays_open(self, closer: Closer, tcp: PairMaker) -> None:
        ours, peer = tcp()
        ours.sendall(ANSWER)
        report = closer(ours, Flush(timeout=DEADLINE))
        assert facts(report) == (Outcome.ACKED, 0, 0, None, True)
        assert report.elapsed < DEADLINE / 2
        assert read_to_end(peer) == Ending(len(ANSWER), None)

    def test_flush_waits_for_a_slow_reader(self, closer: Closer, tcp: PairMaker) -> None:
        ours, peer = tcp(**SMALL_BUFFERS)
        sent = fill(ours)
        with SlowReader(peer, pause=0.001) as reader:
            report = closer(ours, Flush(timeout=DEADLINE))
            assert facts(report) == (Outcome.ACKED, 0, 0, None, True)
        assert reader.ending == Ending(sent, None)

    @pytest.mark.parametrize("policy", [Drain(timeout=DEADLINE), Flush(timeout=DEADLINE)], ids=["drain", "flush"])
    def test_peer_that_half_closes_first_and_reads_late_is_waited_for(
        self, closer: Closer, policy: Policy, tcp: PairMaker
    ) -> None:
        """Its FIN says nothing about our bytes: a client may half-close right after its request."""
        ours, peer = tcp(**SMALL_BUFFERS)
        sent = fill(ours)
        peer.shutdown(socket.SHUT_WR)
        side = Connection.of(ours)
        with close_soon(closer, ours, policy) as call:
            side.wait_for(TcpState.LAST_ACK)
            call.join(A_LONG_LOOK)
            assert call.is_alive(), call.result()
            assert read_to_end(peer) == Ending(sent, None)
        expected = Outcome.PEER_CLOSED if isinstance(policy, Drain) else Outcome.ACKED
        assert facts(call.result()) == (expected, 0, 0, None, True)

    def test_peer_stays_silent(self, closer: Closer, any_pair: PairMaker) -> None:
        ours, peer = any_pair()
        ours.sendall(ANSWER)
        report = closer(ours, Drain(timeout=SHORT))
        assert facts(report) == (Outcome.TIMED_OUT, 0, 0, None, True)
        assert SHORT <= report.elapsed < 1.0
        assert read_to_end(peer) == Ending(len(ANSWER), None)

    def test_peer_never_reads_until_the_limit_and_is_left_to_the_kernel(self, closer: Closer, tcp: PairMaker) -> None:
        ours, peer, sent = unread_pair(tcp)
        report = closer(ours, Drain(timeout=SHORT))
        assert facts(report) == (Outcome.TIMED_OUT, 0, lacking(sent, peer), None, None)
        assert read_to_end(peer) == Ending(sent, None)

    def test_peer_never_reads_until_the_limit_and_is_aborted(self, closer: Closer, tcp: PairMaker) -> None:
        ours, peer, sent = unread_pair(tcp)
        report = closer(ours, Drain(timeout=SHORT, on_timeout="abort"))
        received, error = read_to_end(peer)
        assert facts(report) == (Outcome.TIMED_OUT, 0, sent - received, None, False)
        assert received < sent
        assert error == errno.ECONNRESET

    def test_peer_sends_nothing_for_too_long(self, closer: Closer, any_pair: PairMaker) -> None:
        ours, peer = any_pair()
        peer.sendall(b"then nothing")
        report = closer(ours, Drain(timeout=DEADLINE, idle_timeout=SHORT))
        assert facts(report) == (Outcome.IDLE, len(b"then nothing"), 0, None, True)
        assert SHORT <= report.elapsed < 1.0

    def test_peer_never_stops_sending(self, closer: Closer, any_pair: PairMaker) -> None:
        ours, peer = any_pair()
        with Flooding(peer) as flood:
            report = closer(ours, Drain(timeout=SHORT))
        assert report.outcome is Outcome.TIMED_OUT
        assert SHORT <= report.elapsed < 1.0
        assert 0 < report.drained <= flood.sent

    @pytest.mark.parametrize("excess", [0, 1])
    def test_peer_sends_up_to_the_byte_limit_or_one_more(
        self, closer: Closer, any_pair: PairMaker, excess: int
    ) -> None:
        ours, peer = any_pair()
        limit = 20_000
        peer.sendall(bytes(limit + excess))
        peer.shutdown(socket.SHUT_WR)
        report = closer(ours, Drain(timeout=DEADLINE, max_bytes=limit))
        expected = Outcome.BYTE_LIMIT if excess else Outcome.PEER_CLOSED
        assert facts(report) == (expected, limit, 0, None, True)

    def test_peer_has_reset_before_us(self, closer: Closer, tcp: PairMaker) -> None:
        ours, peer, sent = unread_pair(tcp)
        unacked = lacking(sent, peer)
        reset(peer)
        wait_for_reset(ours)
        report = closer(ours, Drain(timeout=DEADLINE))
        assert facts(report) == (Outcome.PEER_RESET, 0, unacked, errno.ECONNRESET, False)

    def test_peer_resets_while_its_input_is_discarded(self, closer: Closer, tcp: PairMaker) -> None:
        ours, peer = tcp()
        ours.sendall(ANSWER)
        with close_soon(closer, ours, Drain(timeout=DEADLINE)) as call:
            assert read_to_end(peer) == Ending(len(ANSWER), None)
            reset(peer)
        assert facts(call.result()) == (Outcome.PEER_RESET, 0, 0, errno.ECONNRESET, True)

    @pytest.mark.parametrize("policy", [Drain(timeout=SHORT), Flush(timeout=SHORT)], ids=["drain", "flush"])
    def test_socket_was_never_connected(self, closer: Closer, policy: Policy) -> None:
        with socket.socket() as ours:
            assert facts(closer(ours, policy)) == (Outcome.NOT_CONNECTED, 0, None, None, None)
            assert ours.fileno() == -1

    @pytest.mark.parametrize("timeout", [None, 0.0, 5.0], ids=["blocking", "nonblocking", "timeout"])
    def test_waits_whatever_the_timeout_of_the_socket(
        self, closer: Closer, timeout: float | None, tcp: PairMaker
    ) -> None:
        ours, peer = tcp()
        ours.settimeout(timeout)
        side = Connection.of(ours)
        with close_soon(closer, ours, Drain(timeout=DEADLINE)) as call:
            side.wait_for(TcpState.FIN_WAIT2)
            call.join(A_LONG_LOOK)
            assert call.is_alive(), call.result()
            peer.close()
        assert call.result().outcome is Outcome.PEER_CLOSED

    def test_nonblocking_flag_of_a_shared_description_is_never_touched(
        self, closer: Closer, any_pair: PairMaker
    ) -> None:
        ours, peer = any_pair()
        peer.close()
        ours.setblocking(True)
        with ours.dup() as copy:
            closer(ours, Drain(timeout=DEADLINE))
            assert os.get_blocking(copy.fileno())

    def test_peer_sees_the_end_although_a_copy_is_open_elsewhere(self, closer: Closer, any_pair: PairMaker) -> None:
        ours, peer = any_pair()
        with ours.dup():
            ours.sendall(ANSWER)
            with Polite(peer) as client:
                assert closer(ours, Drain(timeout=DEADLINE)).outcome is Outcome.PEER_CLOSED
            assert client.ending == Ending(len(ANSWER), None)

    def test_socket_is_closed_when_the_report_is_there(self, closer: Closer, any_pair: PairMaker) -> None:
        ours, peer = any_pair()
        known = identity(ours)
        peer.close()
        closer(ours, Drain(timeout=DEADLINE))
        assert ours.fileno() == -1
        assert not still_open(known)

    def test_socket_is_closed_already(self, closer: Closer, tcp: PairMaker) -> None:
        ours, _ = tcp()
        ours.close()
        report = closer(ours, Drain(timeout=DEADLINE))
        assert report.outcome is Outcome.ALREADY_CLOSED
        assert report.drained == 0


class Immediate:
    """What a closer must do by Background and Abort, when it offers them."""

    def test_background_leaves_the_rest_to_the_kernel(self, closer: Closer, tcp: PairMaker) -> None:
        ours, peer = tcp(**SMALL_BUFFERS)
        known = identity(ours)
        sent = fill(ours)
        assert facts(closer(ours, Background())) == (Outcome.BACKGROUND, 0, None, None, None)
        assert ours.fileno() == -1
        assert not still_open(known)
        assert read_to_end(peer) == Ending(sent, None)

    def test_background_claims_nothing_when_input_was_unread(self, closer: Closer, tcp: PairMaker) -> None:
        ours, peer = tcp(**SMALL_BUFFERS)
        sent = fill(ours)
        send_unread(peer, ours, b"unread")
        report = closer(ours, Background())
        assert report.outcome is Outcome.BACKGROUND
        assert report.delivered is not True
        received, error = read_to_end(peer)
        assert received < sent
        assert error == errno.ECONNRESET

    def test_abort_resets(self, closer: Closer, tcp: PairMaker) -> None:
        ours, peer = tcp(**SMALL_BUFFERS)
        known = identity(ours)
        sent = fill(ours)
        report = closer(ours, Abort())
        assert report.outcome is Outcome.ABORTED
        assert report.delivered is not True
        assert ours.fileno() == -1
        assert not still_open(known)
        received, error = read_to_end(peer)
        assert received < sent
        assert error == errno.ECONNRESET

    @pytest.mark.parametrize("policy", [Background(), Abort()], ids=["background", "abort"])
    def test_socket_was_closed_before(self, closer: Closer, policy: Policy, tcp: PairMaker) -> None:
        ours, _ = tcp()
        ours.close()
        assert closer(ours, policy).outcome is Outcome.ALREADY_CLOSED
