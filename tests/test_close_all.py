"""close_all: many sockets, one deadline, one report each."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Iterator

import pytest

from conformance import ANSWER, SHORT, Engine, facts
from connections import (
    A_LONG_LOOK,
    DEADLINE,
    SMALL_BUFFERS,
    Connection,
    Ending,
    Pair,
    PairMaker,
    TcpState,
    fill,
    identity,
    still_open,
)
from lingerx import Abort, Background, Drain, Flush, KernelLinger, Outcome, Policy
from peers import Call, Flooding, Polite, read_to_end, reset, send_unread

MANY = 200


def half_silent(tcp: PairMaker, count: int) -> tuple[list[socket.socket], list[Outcome]]:
    """Our sockets, every other peer of which has closed, and the outcomes that a Drain with a deadline has."""
    pairs = [tcp() for _ in range(count)]
    for _, peer in pairs[1::2]:
        peer.close()
    expected = [Outcome.TIMED_OUT, Outcome.PEER_CLOSED] * (count // 2)
    return [ours for ours, _ in pairs], expected


def test_reports_come_in_the_order_of_the_sockets(engine: Engine, tcp: PairMaker) -> None:
    (closed, closing), (silent, _), (resetting, gone), (drained, sender) = tcp(), tcp(), tcp(), tcp()
    closing.close()
    reset(gone)
    send_unread(sender, drained, b"input")
    sender.close()
    reports = engine.close_all([silent, closed, drained, resetting], Drain(timeout=SHORT))
    assert [report.outcome for report in reports] == [
        Outcome.TIMED_OUT,
        Outcome.PEER_CLOSED,
        Outcome.PEER_CLOSED,
        Outcome.PEER_RESET,
    ]
    assert [report.drained for report in reports] == [0, 0, 5, 0]


def test_nothing_to_close(engine: Engine) -> None:
    assert engine.close_all([]) == []
    assert engine.close_all(iter(()), Flush(), timeout=0.0, spread=1.0) == []


def test_takes_any_iterable_once(engine: Engine, tcp: PairMaker) -> None:
    def sockets() -> Iterator[socket.socket]:
        for _ in range(3):
            ours, peer = tcp()
            peer.close()
            yield ours

    assert [report.outcome for report in engine.close_all(sockets())] == [Outcome.PEER_CLOSED] * 3


def test_sockets_of_every_kind_together(
    engine: Engine, tcp: PairMaker, tcp6: PairMaker, unix_pair: PairMaker, unix_stream: PairMaker
) -> None:
    pairs = [make() for make in (tcp, tcp6, unix_pair, unix_stream)]
    for ours, peer in pairs:
        peer.sendall(b"unread")
        ours.sendall(ANSWER)
    with Polite(pairs[0][1]) as a, Polite(pairs[1][1]) as b, Polite(pairs[2][1]) as c, Polite(pairs[3][1]) as d:
        reports = engine.close_all([ours for ours, _ in pairs], Drain(timeout=DEADLINE))
    assert [facts(report) for report in reports] == [(Outcome.PEER_CLOSED, len(b"unread"), 0, None, True)] * 4
    assert [client.ending for client in (a, b, c, d)] == [Ending(len(ANSWER), None)] * 4


@pytest.mark.parametrize("policy", [Drain(timeout=DEADLINE), Background()], ids=["drain", "background"])
def test_socket_that_occurs_twice_is_closed_once(engine: Engine, policy: Policy, tcp: PairMaker) -> None:
    (ours, peer), (other, other_peer) = tcp(), tcp()
    peer.close()
    other_peer.close()
    reports = engine.close_all([ours, other, ours], policy)
    assert [report.outcome for report in reports] == [reports[1].outcome] * 3
    assert reports[0] == reports[2]


def test_two_objects_that_hold_one_fd_are_refused(engine: Engine, tcp: PairMaker) -> None:
    (ours, peer), (other, _) = tcp(), tcp()
    twin = socket.socket(fileno=ours.fileno())
    try:
        with pytest.raises(ValueError, match=r"two socket objects hold fd \d+"):
            engine.close_all([other, ours, twin])
    finally:
        twin.detach()
    ours.sendall(ANSWER)  # still the caller's
    assert peer.recv(len(ANSWER), socket.MSG_WAITALL) == ANSWER


def test_sockets_that_are_closed_already(engine: Engine, tcp: PairMaker) -> None:
    (closed, _), (ours, peer), (detached, _) = tcp(), tcp(), tcp()
    closed.close()
    peer.close()
    with socket.socket(fileno=detached.detach()):
        reports = engine.close_all([closed, ours, detached], Drain(timeout=DEADLINE))
    outcomes = [Outcome.ALREADY_CLOSED, Outcome.PEER_CLOSED, Outcome.ALREADY_CLOSED]
    assert [report.outcome for report in reports] == outcomes


@pytest.mark.parametrize(
    ("policy", "timeout"),
    [(Drain(timeout=0.2), None), (Drain(timeout=DEADLINE), 0.2), (Drain(timeout=0.2), DEADLINE)],
    ids=["policy", "call", "shorter"],
)
def test_one_deadline_for_two_hundred_sockets_half_of_them_silent(
    engine: Engine, tcp: PairMaker, policy: Policy, timeout: float | None
) -> None:
    socks, expected = half_silent(tcp, MANY)
    known = [identity(sock) for sock in socks]
    started = time.perf_counter()
    reports = engine.close_all(socks, policy, timeout=timeout)
    took = time.perf_counter() - started
    assert [report.outcome for report in reports] == expected
    assert all(report.elapsed >= 0.2 for report in reports[::2])
    assert 0.2 <= took < 0.2 + 0.1
    assert not any(map(still_open, known))
    assert {sock.fileno() for sock in socks} == {-1}


def test_flooding_peer_starves_nobody(engine: Engine, tcp: PairMaker) -> None:
    (flooded, flood), *others = [tcp() for _ in range(20)]
    with Flooding(flood):
        for _, peer in others:
            peer.close()
        reports = engine.close_all([flooded, *(ours for ours, _ in others)], Drain(timeout=0.2))
    assert [report.outcome for report in reports] == [Outcome.TIMED_OUT] + [Outcome.PEER_CLOSED] * 19
    assert all(report.elapsed < 0.1 for report in reports[1:])


def test_no_time_for_all_of_them(engine: Engine, tcp: PairMaker) -> None:
    socks, expected = half_silent(tcp, 10)
    reports = engine.close_all(socks, Drain(timeout=DEADLINE), timeout=0)
    assert [report.outcome for report in reports] == expected


def test_kernel_linger_takes_no_longer_than_all_of_them_may(engine: Engine, tcp: PairMaker) -> None:
    """With less than a whole second left nobody can be made to wait by SO_LINGER, which knows no fractions."""
    pairs = [tcp(**SMALL_BUFFERS) for _ in range(3)]
    sent = [fill(ours) for ours, _ in pairs]
    started = time.perf_counter()
    reports = engine.close_all([ours for ours, _ in pairs], KernelLinger(5), timeout=0.9)
    assert time.perf_counter() - started < 1.0
    assert [report.outcome for report in reports] == [Outcome.BACKGROUND] * 3
    assert [read_to_end(peer) for _, peer in pairs] == [Ending(count, None) for count in sent]


def test_abort_resets_all_of_them(engine: Engine, tcp: PairMaker) -> None:
    pairs = [tcp() for _ in range(5)]
    reports = engine.close_all((ours for ours, _ in pairs), Abort())
    assert [report.outcome for report in reports] == [Outcome.ABORTED] * 5
    for _, peer in pairs:
        with pytest.raises(ConnectionResetError):
            peer.recv(1)


# spread ---------------------------------------------------------------------------------------------------


def ends_seen_by(peers: list[socket.socket]) -> list[float]:
    """When each of these saw our FIN, read in their order."""
    times = []
    for peer in peers:
        assert peer.recv(1) == b""
        times.append(time.perf_counter())
    return times


@pytest.mark.parametrize("policy", [Drain(timeout=DEADLINE), Background()], ids=["drain", "background"])
def test_spread_starts_the_closes_one_after_the_other(engine: Engine, policy: Policy, tcp: PairMaker) -> None:
    pairs = [tcp() for _ in range(5)]
    peers = [peer for _, peer in pairs]
    with Call(lambda: ends_seen_by(peers)) as watching:
        started = time.perf_counter()
        with Call(lambda: engine.close_all([ours for ours, _ in pairs], policy, spread=0.2)) as call:
            times = [seen - started for seen in watching.result()]
            for peer in peers:
                peer.close()
    assert {report.drained for report in call.result()} == {0}
    assert all(0.04 * place <= seen for place, seen in enumerate(times)), times
    assert times[-1] < 0.5


def test_limits_of_a_policy_count_from_each_ones_own_start(engine: Engine, tcp: PairMaker) -> None:
    pairs = [tcp() for _ in range(4)]
    reports = engine.close_all([ours for ours, _ in pairs], Drain(timeout=0.1), spread=0.1)
    assert [report.outcome for report in reports] == [Outcome.TIMED_OUT] * 4
    assert all(0.1 <= report.elapsed < 0.2 for report in reports)


def test_the_deadline_holds_for_late_starters_too(engine: Engine, tcp: PairMaker) -> None:
    pairs = [tcp() for _ in range(4)]
    started = time.perf_counter()
    reports = engine.close_all([ours for ours, _ in pairs], Drain(timeout=DEADLINE), timeout=0.1, spread=0.15)
    assert 0.1 <= time.perf_counter() - started < 0.15 + 0.05
    assert [report.outcome for report in reports] == [Outcome.TIMED_OUT] * 4
    assert [read_to_end(peer) for _, peer in pairs] == [Ending(0, None)] * 4


# Mistakes touch nothing -----------------------------------------------------------------------------------


def assert_usable(pairs: Iterable[Pair]) -> None:
    """Both directions of each still work."""
    for ours, peer in pairs:
        ours.sendall(b"to the peer")
        assert peer.recv(100) == b"to the peer"
        peer.sendall(b"to us")
        assert ours.recv(100) == b"to us"


@pytest.mark.parametrize("wrong", ["number", "none", "datagram", "listener"])
def test_one_wrong_socket_and_none_is_touched(engine: Engine, tcp: PairMaker, wrong: str) -> None:
    pairs = [tcp(), tcp()]
    with socket.socket(type=socket.SOCK_DGRAM) as datagram, socket.create_server(("127.0.0.1", 0)) as listener:
        culprit: object = {"number": 7, "none": None, "datagram": datagram, "listener": listener}[wrong]
        with pytest.raises((TypeError, ValueError)):
            engine.close_all([pairs[0][0], culprit, pairs[1][0]])  # type: ignore[list-item]
        assert datagram.fileno() > 2
        assert listener.fileno() > 2
    assert_usable(pairs)


@pytest.mark.parametrize(
    "arguments",
    [
        {"policy": Drain},
        {"policy": 3.0},
        {"timeout": -1},
        {"timeout": "3"},
        {"timeout": float("nan")},
        {"spread": -0.1},
        {"spread": None},
        {"spread": True},
    ],
    ids=str,
)
def test_wrong_argument_and_no_socket_is_touched(engine: Engine, tcp: PairMaker, arguments: dict[str, object]) -> None:
    pairs = [tcp(), tcp()]
    with pytest.raises((TypeError, ValueError), match=next(iter(arguments))):
        engine.close_all([ours for ours, _ in pairs], **arguments)  # type: ignore[arg-type]
    assert_usable(pairs)


def test_iterable_that_raises_and_no_socket_is_touched(engine: Engine, tcp: PairMaker) -> None:
    pairs = [tcp(), tcp()]

    def sockets() -> Iterator[socket.socket]:
        yield pairs[0][0]
        raise LookupError("no more")

    with pytest.raises(LookupError):
        engine.close_all(sockets())
    assert_usable(pairs)


def test_what_is_not_iterable_is_refused(engine: Engine, tcp: PairMaker) -> None:
    pair = tcp()
    with pytest.raises(TypeError):
        engine.close_all(pair[0])  # type: ignore[arg-type]
    assert_usable([pair])


# Many -----------------------------------------------------------------------------------------------------


def test_slow_readers_are_waited_for_together(engine: Engine, tcp: PairMaker) -> None:
    """All have half-closed before the first one has flushed."""
    pairs = [tcp(send_buffer=64 * 1024, receive_buffer=16 * 1024) for _ in range(5)]
    sent = [fill(ours) for ours, _ in pairs]
    sides = [Connection.of(ours) for ours, _ in pairs]
    with Call(lambda: engine.close_all([ours for ours, _ in pairs], Flush(timeout=DEADLINE))) as call:
        for side in sides:
            side.wait_for(TcpState.FIN_WAIT1)
        call.join(A_LONG_LOOK)
        assert call.is_alive(), call.result()
        for (_, peer), count in zip(pairs, sent, strict=True):
            assert read_to_end(peer) == Ending(count, None)
    assert [facts(report) for report in call.result()] == [(Outcome.ACKED, 0, 0, None, True)] * 5
