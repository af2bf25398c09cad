"""Closer: what its methods do, count and report. `test_closer_limits` has deadlines, overload and fairness,
`test_closer_lifetime` fork, exit, signals and threads.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack, suppress
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from closers import CloserMaker, assert_adds_up, module_over, nonzero
from conformance import ANSWER, SHORT, Closer, Engine, Graceful, Immediate, facts
from conftest import engine_name
from connections import DEADLINE, SMALL_BUFFERS, Ending, PairMaker, fill, identity, still_open, wait_until
from lingerx import Abort, Background, Drain, Flush, KernelLinger, Outcome, Policy, Report
from peers import Polite, SlowReader, read_to_end, reset, send_unread

if TYPE_CHECKING:
    from lingerx.closer import Closer as BackgroundCloser

LONG = Drain(timeout=DEADLINE)
MORE_THAN_FITS = bytes(range(256)) * (4 << 12)
"""4 MiB: more than the kernel takes with SMALL_BUFFERS."""


def assert_usable(ours: socket.socket, peer: socket.socket) -> None:
    """Both directions still work."""
    ours.sendall(b"to the peer")
    assert peer.recv(100) == b"to the peer"
    peer.sendall(b"to us")
    assert ours.recv(100) == b"to us"


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


def test_two_objects_that_hold_one_fd_are_refused(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers()
    pair = tcp()
    twin = socket.socket(fileno=pair[0].fileno())
    try:
        with pytest.raises(ValueError, match="two socket objects"):
            closer.close_all([pair[0], twin])
        assert_usable(*pair)
    finally:
        twin.detach()


@pytest.mark.parametrize("wrong", ["number", "datagram", "listener"])
def test_one_wrong_socket_and_none_is_touched(closers: CloserMaker, tcp: PairMaker, wrong: str) -> None:
    closer = closers()
    pair = tcp()
    with socket.socket(type=socket.SOCK_DGRAM) as datagram, socket.create_server(("127.0.0.1", 0)) as listener:
        culprit: object = {"number": 7, "datagram": datagram, "listener": listener}[wrong]
        with pytest.raises((TypeError, ValueError)):
            closer.close_all([pair[0], culprit])  # type: ignore[list-item]
        assert listener.fileno() > 2
    assert_usable(*pair)
    assert closer.stats().handed_over == 0


# send_and_close -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_what_the_kernel_takes_at_once(closers: CloserMaker, any_pair: PairMaker, kind: type) -> None:
    closer = closers()
    ours, peer = any_pair()
    with Polite(peer) as client:
        assert closer.send_and_close(ours, kind(ANSWER))
    assert client.ending == Ending(len(ANSWER), None)
    assert closer.join(DEADLINE)
    stats = closer.stats()
    assert nonzero(stats) == {Outcome.PEER_CLOSED: 1}
    assert stats.buffered == 0


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_rest_is_sent_in_the_background(closers: CloserMaker, any_pair: PairMaker, kind: type) -> None:
    """Also when the caller uses its buffer for something else meanwhile."""
    closer = closers()
    ours, peer = any_pair(**SMALL_BUFFERS)
    data = kind(MORE_THAN_FITS)
    assert closer.send_and_close(ours, data)
    if isinstance(data, bytearray):
        data[:] = b"\xff" * len(data)
    del data
    assert 0 < closer.stats().buffered <= len(MORE_THAN_FITS)  # all of it, or the rest
    received = bytearray()
    while piece := peer.recv(1 << 20):
        received += piece
    assert received == MORE_THAN_FITS
    peer.close()
    assert closer.join(DEADLINE)
    assert closer.stats().buffered == 0
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 1}


def test_rest_is_sent_to_a_client_that_writes_before_it_reads(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers()
    ours, peer = tcp(**SMALL_BUFFERS)
    closer.send_and_close(ours, MORE_THAN_FITS)
    peer.sendall(MORE_THAN_FITS)
    assert read_to_end(peer) == Ending(len(MORE_THAN_FITS), None)
    peer.close()
    assert closer.join(DEADLINE)
    assert closer.stats().drained == len(MORE_THAN_FITS)


def test_future_tells_of_the_rest(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers()
    (ours, peer), (silent, _) = tcp(**SMALL_BUFFERS), tcp(**SMALL_BUFFERS)
    future = closer.submit(ours, Drain(timeout=DEADLINE), data=MORE_THAN_FITS)
    lost = closer.submit(silent, Drain(timeout=SHORT), data=MORE_THAN_FITS)
    with SlowReader(peer) as reader:
        assert facts(future.result(DEADLINE)) == (Outcome.PEER_CLOSED, 0, 0, None, True)
    assert reader.ending == Ending(len(MORE_THAN_FITS), None)
    report = lost.result(DEADLINE)
    assert (report.outcome, report.delivered) == (Outcome.TIMED_OUT, False)
    assert report.unacked is not None
    assert 0 < report.unacked <= len(MORE_THAN_FITS)


def test_data_for_a_socket_that_is_closed_already(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers()
    ours, _ = tcp()
    ours.close()
    assert closer.send_and_close(ours, b"answer") is False
    report = closer.submit(ours, data=b"answer").result(0)
    assert (report.outcome, report.unacked, report.delivered) == (Outcome.ALREADY_CLOSED, 6, False)


def test_peer_has_reset_before_we_send(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers()
    ours, peer = tcp()
    reset(peer)
    report = closer.submit(ours, data=ANSWER).result(DEADLINE)
    assert report.outcome is Outcome.PEER_RESET
    assert report.delivered is False


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


def test_callback_that_raises_does_not_stop_the_closer(
    closers: CloserMaker, tcp: PairMaker, caplog: pytest.LogCaptureFixture
) -> None:
    closer = closers()
    (ours, peer), (other, other_peer) = tcp(), tcp()

    def fail(_: Future[Report]) -> None:
        raise LookupError("of the caller's")

    future = closer.submit(ours)
    future.add_done_callback(fail)
    peer.close()
    assert future.result(DEADLINE).outcome is Outcome.PEER_CLOSED
    other_peer.close()
    assert closer.submit(other).result(DEADLINE).outcome is Outcome.PEER_CLOSED
    assert "LookupError" in caplog.text
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


def test_join_waits_as_long_as_it_may_and_takes_sockets_on(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    assert closer.join(0)
    (ours, peer), (other, other_peer) = tcp(), tcp()
    closer.close(ours)
    started = time.perf_counter()
    assert not closer.join(SHORT)
    assert SHORT <= time.perf_counter() - started < 1.0
    assert not closer.join(0)
    peer.close()
    assert closer.join()
    other_peer.close()
    closer.close(other)
    assert closer.join(DEADLINE)


# shutdown -------------------------------------------------------------------------------------------------


def test_shutdown_lets_those_in_flight_finish(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    ours, peer = tcp(**SMALL_BUFFERS)
    sent = fill(ours)
    closer.close(ours)
    with SlowReader(peer, pause=0.001) as reader:
        stats = closer.shutdown(DEADLINE)
    assert reader.ending == Ending(sent, None)
    assert nonzero(stats) == {Outcome.PEER_CLOSED: 1}
    assert stats.pending == 0


def test_shutdown_ends_what_takes_longer_by_its_policy(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    (kept, kept_peer), (lost, lost_peer) = tcp(**SMALL_BUFFERS), tcp(**SMALL_BUFFERS)
    sent, _ = fill(kept), fill(lost)
    known = identity(kept)
    futures = [closer.submit(kept), closer.submit(lost, Drain(timeout=DEADLINE, on_timeout="abort"))]
    stats = closer.shutdown(SHORT)
    assert not still_open(known)
    assert [future.result(0).outcome for future in futures] == [Outcome.TIMED_OUT] * 2
    assert nonzero(stats) == {Outcome.TIMED_OUT: 2}
    assert read_to_end(kept_peer) == Ending(sent, None)
    assert read_to_end(lost_peer).error == errno.ECONNRESET


def test_own_deadlines_hold_during_shutdown(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers()
    ours, _ = tcp()
    future = closer.submit(ours, Drain(timeout=SHORT))
    closer.shutdown(DEADLINE)
    assert future.result(0).elapsed < 1.0


@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
def test_after_shutdown_the_socket_is_untouched(closers: CloserMaker, tcp: PairMaker, used: bool) -> None:
    closer = closers()
    pair = tcp()
    if used:
        other, peer = tcp()
        peer.close()
        closer.close(other)
    closer.shutdown()
    for attempt in (
        lambda: closer.close(pair[0]),
        lambda: closer.close(pair[0], Background()),
        lambda: closer.close_all([pair[0]]),
        lambda: closer.send_and_close(pair[0], b"answer"),
        lambda: closer.submit(pair[0]),
    ):
        with pytest.raises(RuntimeError, match="shut down"):
            attempt()
        assert_usable(*pair)
    assert closer.stats().handed_over == used
    assert closer.join(0)


def test_shutdown_again_keeps_the_first_deadline(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    ours, _ = tcp()
    closer.close(ours)
    first = closer.shutdown(SHORT)
    assert closer.shutdown(DEADLINE) == first


def test_with_block(closers: CloserMaker, tcp: PairMaker) -> None:
    ours, peer = tcp()
    with closers(LONG) as closer:
        closer.close(ours)
        peer.close()
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 1}
    with pytest.raises(RuntimeError):
        closer.close(ours)


def test_with_block_that_raises(closers: CloserMaker, tcp: PairMaker) -> None:
    ours, peer = tcp()
    peer.close()
    known = identity(ours)
    with suppress(LookupError), closers(LONG) as closer:
        closer.close(ours)
        raise LookupError
    assert not still_open(known)


def test_closer_that_was_never_used(closers: CloserMaker) -> None:
    before = threading.active_count()
    with closers():
        assert threading.active_count() == before


# default_closer -------------------------------------------------------------------------------------------


@pytest.fixture
def module(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """lingerx.closer, with no default closer yet."""
    module = module_over(engine_name(engine))
    monkeypatch.setattr(module, "_default", None)
    return module


def test_default_closer_is_the_same_for_all(module: ModuleType, tcp: PairMaker) -> None:
    ours, peer = tcp()
    peer.close()
    found = []
    barrier = threading.Barrier(4)

    def ask() -> None:
        barrier.wait(DEADLINE)
        found.append(module.default_closer())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    closer = module.default_closer()
    try:
        assert set(found) == {closer}
        assert isinstance(closer, module.Closer)
        assert closer.policy == Drain(timeout=30.0, idle_timeout=5.0)
        assert closer.submit(ours).result(DEADLINE).outcome is Outcome.PEER_CLOSED
    finally:
        closer.shutdown(0.0)


# Mistakes -------------------------------------------------------------------------------------------------


def hand_over(closer: BackgroundCloser, method: str, sock: socket.socket, policy: Policy) -> None:
    """By the method of this name."""
    if method == "close":
        closer.close(sock, policy)
    elif method == "submit":
        closer.submit(sock, policy)
    elif method == "close_all":
        closer.close_all([sock], policy)
    else:
        closer.send_and_close(sock, b"answer", policy)


@pytest.mark.parametrize("method", ["close", "send_and_close", "submit", "close_all"])
@pytest.mark.parametrize(
    ("policy", "error"),
    [(Drain, TypeError), (3.0, TypeError), ("drain", TypeError), (KernelLinger(3), ValueError)],
    ids=["class", "number", "text", "kernel_linger"],
)
def test_wrong_policy_and_the_socket_is_untouched(
    closers: CloserMaker, tcp: PairMaker, method: str, policy: Policy, error: type[Exception]
) -> None:
    closer = closers()
    pair = tcp()
    with pytest.raises(error):
        hand_over(closer, method, pair[0], policy)
    assert_usable(*pair)
    assert closer.stats().handed_over == 0


@pytest.mark.parametrize("policy", [Background(), Abort()], ids=["background", "abort"])
def test_data_with_a_policy_that_has_no_deadline_and_the_socket_is_untouched(
    closers: CloserMaker, tcp: PairMaker, policy: Policy
) -> None:
    pair = tcp()
    for closer in (closers(), closers(policy)):
        with pytest.raises(ValueError, match="deadline"):
            closer.send_and_close(pair[0], b"answer", None if closer.policy == policy else policy)
        assert_usable(*pair)


@pytest.mark.parametrize("data", [None, "text", 5, memoryview(b"abcd")[::2]], ids=["none", "text", "number", "strided"])
def test_wrong_data_and_the_socket_is_untouched(closers: CloserMaker, tcp: PairMaker, data: bytes) -> None:
    closer = closers()
    pair = tcp()
    with pytest.raises((TypeError, ValueError)):
        closer.send_and_close(pair[0], data)
    assert_usable(*pair)
    assert closer.stats().handed_over == 0


def test_what_is_no_stream_socket_is_untouched(closers: CloserMaker) -> None:
    closer = closers()
    with socket.socket(type=socket.SOCK_DGRAM) as datagram:
        with pytest.raises(TypeError, match="SOCK_STREAM"):
            closer.close(datagram)
        assert datagram.fileno() > 2
    for wrong in (7, None, "socket"):
        with pytest.raises(TypeError):
            closer.close(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["close", "send_and_close", "submit", "close_all"])
@pytest.mark.parametrize("policy", [LONG, Background()], ids=["drain", "background"])
def test_listening_socket_is_untouched(closers: CloserMaker, stack: ExitStack, method: str, policy: Policy) -> None:
    closer = closers()
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    listener.settimeout(DEADLINE)
    with pytest.raises(ValueError, match=r"listening|deadline"):
        hand_over(closer, method, listener, policy)
    with socket.create_connection(listener.getsockname(), DEADLINE), listener.accept()[0]:
        pass


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"policy": KernelLinger(3)}, ValueError),
        ({"policy": Drain}, TypeError),
        ({"max_pending": 0}, ValueError),
        ({"max_pending": 2.5}, TypeError),
        ({"max_pending": True}, TypeError),
        ({"max_buffered": -1}, ValueError),
        ({"max_buffered": None}, TypeError),
        ({"max_buffered": "1"}, TypeError),
        ({"on_full": "panic"}, ValueError),
        ({"on_full": None}, ValueError),
        ({"collect": -0.1}, ValueError),
        ({"collect": "x"}, TypeError),
        ({"collect": None}, TypeError),
        ({"exit_timeout": -1}, ValueError),
        ({"exit_timeout": "3"}, TypeError),
        ({"exit_timeout": float("nan")}, ValueError),
        ({"unknown": 1}, TypeError),
    ],
    ids=str,
)
def test_wrong_argument_makes_no_closer(
    closers: CloserMaker, options: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        closers(**options)


@pytest.mark.parametrize("timeout", [-1.0, "3", float("nan")], ids=str)
def test_wrong_timeout_does_not_shut_down(closers: CloserMaker, tcp: PairMaker, timeout: float) -> None:
    closer = closers()
    ours, peer = tcp()
    peer.close()
    with pytest.raises((TypeError, ValueError)):
        closer.shutdown(timeout)
    assert closer.submit(ours).result(DEADLINE).outcome is Outcome.PEER_CLOSED
