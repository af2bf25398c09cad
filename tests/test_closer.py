"""Closer: what close, close_all and submit do, and what it counts.

Mistakes are in `test_closer_arguments`, data in `test_closer_data`, overload in `test_closer_full`, deadlines in
`test_closer_limits`, the end in `test_closer_shutdown`, and what surrounds it in those of fork, exit, signals, threads.
"""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from importlib import import_module

import pytest

from closers import (
    LONG,
    CloserMaker,
    assert_adds_up,
    closer_over,
    nonzero,
)
from conformance import ANSWER, SHORT, Closer, Graceful, Immediate, facts
from connections import DEADLINE, Ending, PairMaker, identity, still_open, wait_until
from lingerx import Abort, Background, Drain, Flush, Outcome, Policy, Report
from lingerx.closer import default_closer
from peers import Call, Polite, read_to_end, reset, send_unread


class TestSubmitting(Graceful, Immediate):
    """submit, held to what every closer must do."""

    @pytest.fixture
    def closer(self, closers: CloserMaker) -> Iterator[Closer]:
        made = [closers()]
        yield lambda sock, policy: made[0].submit(sock, policy).result(DEADLINE)
        made.clear()


class TestSubmittingData(Graceful):
    """submit with data, all of which the kernel has taken at once."""

    @pytest.fixture
    def closer(self, closers: CloserMaker) -> Iterator[Closer]:
        made = [closers()]
        yield lambda sock, policy: made[0].submit(sock, policy, data=b"").result(DEADLINE)
        made.clear()


# close ----------------------------------------------------------------------------------------------------


def test_socket_is_no_longer_the_callers(closers: CloserMaker, any_pair: PairMaker) -> None:
    closer = closers()
    ours, peer = any_pair()
    known = identity(ours)
    assert closer.close(ours) is None  # type: ignore[func-returns-value]
    assert ours.fileno() == -1
    assert still_open(known)
    peer.close()
    wait_until(lambda: not still_open(known))


def test_peer_sees_our_fin_before_close_returns(closers: CloserMaker, any_pair: PairMaker) -> None:
    """The half-close is made by the caller's thread: it does not wait until the closer has collected."""
    closer = closers(LONG, collect=0.1)
    ours, peer = any_pair()
    ours.sendall(ANSWER)
    closer.close(ours)
    peer.setblocking(False)
    assert read_to_end(peer) == Ending(len(ANSWER), None)


def test_peer_gets_every_byte_although_its_input_was_never_read(closers: CloserMaker, any_pair: PairMaker) -> None:
    closer = closers()
    ours, peer = any_pair()
    send_unread(peer, ours, bytes(50_000))
    ours.sendall(ANSWER)
    with Polite(peer) as client:
        closer.close(ours)
    assert client.ending == Ending(len(ANSWER), None)
    assert closer.join(DEADLINE)
    stats = closer.stats()
    assert nonzero(stats) == {Outcome.PEER_CLOSED: 1}
    assert stats.drained == 50_000


def test_policy_of_the_call_wins(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    (first, _), (second, _) = tcp(), tcp()
    closer.close(first, Flush(timeout=DEADLINE))
    closer.close(second, Drain(timeout=SHORT))
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.ACKED: 1, Outcome.TIMED_OUT: 1}


def test_socket_that_is_closed_already(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers()
    ours, _ = tcp()
    ours.close()
    closer.close(ours)
    assert closer.submit(ours).result(0).outcome is Outcome.ALREADY_CLOSED
    assert nonzero(closer.stats()) == {Outcome.ALREADY_CLOSED: 2}
    assert_adds_up(closer.stats())


@pytest.mark.parametrize(
    ("policy", "outcome"), [(Background(), Outcome.BACKGROUND), (Abort(), Outcome.ABORTED)], ids=["background", "abort"]
)
def test_policy_that_waits_for_nothing_is_done_at_once(
    closers: CloserMaker, tcp: PairMaker, policy: Policy, outcome: Outcome
) -> None:
    closer = closers(policy)
    (ours, peer), (other, _) = tcp(), tcp()
    known = identity(ours)
    closer.close(ours)
    assert not still_open(known)
    assert closer.submit(other).result(0).outcome is outcome
    assert read_to_end(peer).error == (None if outcome is Outcome.BACKGROUND else errno.ECONNRESET)
    assert nonzero(closer.stats()) == {outcome: 2}
    assert_adds_up(closer.stats())


def test_subclass_has_the_last_word(closers: CloserMaker, engine_name: str, tcp: PairMaker) -> None:
    base = closer_over(engine_name)
    seen = []

    class Watched(base):  # type: ignore[valid-type, misc]
        def close(self, sock: socket.socket, policy: Policy | None = None) -> None:
            seen.append(sock.fileno())
            super().close(sock, policy)

    (ours, peer), (other, other_peer) = tcp(), tcp()
    numbers = [ours.fileno(), other.fileno()]
    peer.close()
    other_peer.close()
    with Watched(LONG) as closer:
        closer.close(ours)
        closer.close_all([other])
    assert seen == numbers
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 2}


# close_all ------------------------------------------------------------------------------------------------


def test_many_at_once(closers: CloserMaker, any_pair: PairMaker) -> None:
    closer = closers()
    pairs = [any_pair() for _ in range(5)]
    closer.close_all((ours for ours, _ in pairs), Drain(timeout=DEADLINE))
    assert {ours.fileno() for ours, _ in pairs} == {-1}
    assert closer.pending == 5
    for _, peer in pairs:
        assert read_to_end(peer) == Ending(0, None)
        peer.close()
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 5}


def test_socket_that_occurs_twice_is_closed_once(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers()
    ours, peer = tcp()
    peer.close()
    closer.close_all([ours, ours])
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 1}


def test_nothing_to_close(closers: CloserMaker) -> None:
    closer = closers()
    closer.close_all([])
    assert closer.stats().handed_over == 0


# submit ---------------------------------------------------------------------------------------------------


def test_future_is_done_when_the_socket_is_closed(closers: CloserMaker, any_pair: PairMaker) -> None:
    closer = closers()
    ours, peer = any_pair()
    known = identity(ours)
    future = closer.submit(ours)
    assert isinstance(future, Future)
    assert not future.done()
    assert still_open(known)
    peer.sendall(b"input")
    peer.close()
    assert facts(future.result(DEADLINE)) == (Outcome.PEER_CLOSED, 5, 0, None, True)
    assert not still_open(known)


def test_future_cannot_be_cancelled(closers: CloserMaker, tcp: PairMaker) -> None:
    ours, peer = tcp()
    future = closers().submit(ours)
    assert not future.cancel()
    peer.close()
    assert future.result(DEADLINE).outcome is Outcome.PEER_CLOSED


def test_futures_of_many(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers()
    pairs = [tcp() for _ in range(20)]
    futures = [closer.submit(ours, Drain(timeout=0.1)) for ours, _ in pairs]
    for _, peer in pairs[1::2]:
        peer.close()
    assert not wait(futures, DEADLINE).not_done
    expected = [Outcome.TIMED_OUT, Outcome.PEER_CLOSED] * 10
    assert [future.result(0).outcome for future in futures] == expected
    assert_adds_up(closer.stats())


@pytest.mark.parametrize("error", [LookupError, SystemExit])
def test_callback_that_raises_does_not_stop_the_closer(
    closers: CloserMaker,
    tcp: PairMaker,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    """A Future logs an Exception; of anything else (a sys.exit()) threading.excepthook is told."""
    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: told.append(arguments.exc_type))
    closer = closers()
    (ours, peer), (other, other_peer) = tcp(), tcp()

    def fail(_: Future[Report]) -> None:
        raise error("of the caller's")

    future = closer.submit(ours)
    future.add_done_callback(fail)
    peer.close()
    assert future.result(DEADLINE).outcome is Outcome.PEER_CLOSED
    other_peer.close()
    assert closer.submit(other).result(DEADLINE).outcome is Outcome.PEER_CLOSED
    assert ("LookupError" in caplog.text, told) == ((True, []) if error is LookupError else (False, [SystemExit]))
    caplog.clear()  # its traceback holds the closer


def test_callback_hands_the_next_socket_over(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers()
    (ours, peer), (other, other_peer) = tcp(), tcp()
    nested: list[Future[Report]] = []
    done = threading.Event()

    def go_on(_: Future[Report]) -> None:
        nested.append(closer.submit(other))
        done.set()

    closer.submit(ours).add_done_callback(go_on)
    peer.close()
    other_peer.close()
    assert done.wait(DEADLINE)
    assert nested[0].result(DEADLINE).outcome is Outcome.PEER_CLOSED


# stats, pending, join -------------------------------------------------------------------------------------


def test_nothing_was_handed_over(closers: CloserMaker) -> None:
    stats = closers().stats()
    assert (stats.handed_over, stats.pending, stats.buffered, stats.drained) == (0, 0, 0, 0)
    assert set(stats.outcomes) == set(Outcome)
    assert nonzero(stats) == {}
    assert list(stats.linger_times)[-1] == float("inf")
    assert set(stats.linger_times.values()) == {0}
    assert stats.total_linger_time == 0.0


def test_counters_add_up_exactly(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(Drain(timeout=DEADLINE))
    rounds = 4
    pairs = [[tcp() for _ in range(8)] for _ in range(rounds)]
    for (closed, a), (silent, _), (flushed, _), (plain, _), (aborted, _), (lost, d), (again, _), (sent, e) in pairs:
        send_unread(a, closed, b"unread")
        a.close()
        reset(d)
        for sock, policy in (
            (closed, None),
            (silent, Drain(timeout=SHORT)),
            (flushed, Flush(timeout=DEADLINE)),
            (plain, Background()),
            (aborted, Abort()),
            (lost, None),
        ):
            closer.close(sock, policy)
            assert_adds_up(closer.stats())
        again.close()
        closer.close(again)
        e.close()
        closer.send_and_close(sent, b"")
        closer.close(socket.socket())
    assert closer.stats().handed_over == 9 * rounds
    assert closer.join(DEADLINE)
    stats = closer.stats()
    assert_adds_up(stats)
    assert stats.pending == stats.buffered == 0
    assert stats.drained == rounds * len(b"unread")
    assert nonzero(stats) == {
        Outcome.PEER_CLOSED: 2 * rounds,
        Outcome.TIMED_OUT: rounds,
        Outcome.ACKED: rounds,
        Outcome.BACKGROUND: rounds,
        Outcome.ABORTED: rounds,
        Outcome.PEER_RESET: rounds,
        Outcome.ALREADY_CLOSED: rounds,
        Outcome.NOT_CONNECTED: rounds,
    }
    assert rounds * SHORT <= stats.total_linger_time < rounds * 10


def test_histogram_tells_how_long_sockets_lingered(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers()
    pairs = [tcp() for _ in range(3)]
    reports = [closer.submit(ours, Drain(timeout=0.06)).result(DEADLINE) for ours, _ in pairs]
    stats = closer.stats()
    assert sum(count for bound, count in stats.linger_times.items() if bound <= 0.05) == 0
    assert stats.linger_times[0.1] + stats.linger_times[0.5] == 3
    assert stats.total_linger_time == pytest.approx(sum(report.elapsed for report in reports), abs=1e-5)


def test_pending_are_those_that_are_not_closed_yet(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    pairs = [tcp() for _ in range(3)]
    for left, (ours, _) in enumerate(pairs, 1):
        closer.close(ours)
        assert closer.pending == closer.stats().pending == left
    for left, (_, peer) in enumerate(pairs):
        peer.close()
        wait_until(lambda left=left: closer.pending == 2 - left)  # type: ignore[misc]


# default_closer -------------------------------------------------------------------------------------------


@pytest.fixture
def default_over(engine_name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """There is no default closer yet; it will be over this engine, and is shut down after the test."""
    module = import_module("lingerx.closer")
    monkeypatch.setattr(module, "_default", None)
    monkeypatch.setattr(module, "Closer", closer_over(engine_name))
    yield
    if module._default is not None:
        module._default.shutdown(0.0)


@pytest.mark.usefixtures("default_over")
def test_default_closer_is_the_same_for_all(tcp: PairMaker) -> None:
    ours, peer = tcp()
    peer.close()
    barrier = threading.Barrier(4)

    def ask() -> object:
        barrier.wait(DEADLINE)
        return default_closer()

    calls = [Call(ask) for _ in range(4)]
    for call in calls:
        call.start()
    closer = default_closer()
    assert {call.result() for call in calls} == {closer}
    assert closer.policy == Drain(timeout=30.0, idle_timeout=5.0)
    assert closer.exit_timeout == 3.0
    assert closer.submit(ours).result(DEADLINE).outcome is Outcome.PEER_CLOSED


@pytest.mark.usefixtures("default_over")
def test_default_closer_is_made_anew_after_a_shutdown(tcp: PairMaker) -> None:
    (ours, peer), (other, other_peer) = tcp(), tcp()
    peer.close()
    other_peer.close()
    first = default_closer()
    first.close(ours)
    first.shutdown()
    second = default_closer()
    assert second is not first
    assert second.submit(other).result(DEADLINE).outcome is Outcome.PEER_CLOSED
    assert default_closer() is second
