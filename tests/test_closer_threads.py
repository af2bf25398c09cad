"""Closer: several threads hand over at once, and one of them may shut it down meanwhile."""

from __future__ import annotations

import gc
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from closers import LONG, MORE_THAN_FITS, CloserMaker, assert_adds_up, nonzero, outcomes
from conformance import facts
from connections import DEADLINE, SMALL_BUFFERS, Ending, PairMaker, identity, still_open
from lingerx import Drain, Outcome, Report
from peers import Call, Polite

if TYPE_CHECKING:
    from lingerx import Closer

T = TypeVar("T")
THREADS = 8


def at_once(function: Callable[[int], T]) -> list[T]:
    """What it returns for 0 to 7, each called by a thread of its own, all of which begin together."""
    barrier = threading.Barrier(THREADS)

    def begin(place: int) -> T:
        barrier.wait(DEADLINE)
        return function(place)

    calls = [Call(partial(begin, place)) for place in range(THREADS)]
    for call in calls:
        call.start()
    return [call.result() for call in calls]


def test_eight_threads_hand_over_at_once(closers: CloserMaker, unix_pair: PairMaker) -> None:
    closer = closers(LONG)
    before = threading.active_count()
    pairs = [unix_pair() for _ in range(25 * THREADS)]

    def hand_over(place: int) -> list[Future[Report]]:
        futures = []
        for ours, peer in pairs[place::THREADS]:
            peer.send(b"x")
            peer.close()
            futures.append(closer.submit(ours))
            assert_adds_up(closer.stats())
        return futures

    futures = at_once(hand_over)
    assert threading.active_count() == before + 1
    for future in chain.from_iterable(futures):
        assert facts(future.result(DEADLINE)) == (Outcome.PEER_CLOSED, 1, 0, None, True)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: len(pairs)}
    assert closer.stats().drained == len(pairs)
    assert_adds_up(closer.stats())


def test_eight_threads_by_close_alone(closers: CloserMaker, unix_pair: PairMaker) -> None:
    """No future that would tell: only the counters do."""
    closer = closers(LONG)
    pairs = [unix_pair() for _ in range(50 * THREADS)]
    known = [identity(ours) for ours, _ in pairs]
    for _, peer in pairs:
        peer.send(b"x")
        peer.close()

    def hand_over(place: int) -> None:
        for ours, _ in pairs[place::THREADS]:
            closer.close(ours)

    at_once(hand_over)
    assert closer.join(DEADLINE)
    assert not any(map(still_open, known))
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: len(pairs)}
    assert closer.stats().drained == len(pairs)
    assert_adds_up(closer.stats())


def test_eight_threads_send_and_close(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    pairs = [tcp(**SMALL_BUFFERS) for _ in range(2 * THREADS)]

    def send(place: int) -> list[bool]:
        data = bytearray if place % 2 else bytes
        return [closer.send_and_close(ours, data(MORE_THAN_FITS)) for ours, _ in pairs[place::THREADS]]

    with ExitStack() as peers:
        readers = [peers.enter_context(Polite(peer)) for _, peer in pairs]
        taken = at_once(send)
    assert taken == [[True] * 2] * THREADS
    assert [reader.ending for reader in readers] == [Ending(len(MORE_THAN_FITS), None)] * len(pairs)
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: len(pairs)}
    assert closer.stats().buffered == 0
    assert_adds_up(closer.stats())


@pytest.mark.parametrize("on_full", ["shed_oldest", "background", "abort_oldest"])
def test_eight_threads_hand_over_more_than_it_takes(closers: CloserMaker, unix_pair: PairMaker, on_full: str) -> None:
    closer = closers(LONG, max_pending=20, on_full=on_full)
    pairs = [unix_pair() for _ in range(25 * THREADS)]
    known = [identity(ours) for ours, _ in pairs]
    futures = at_once(lambda place: [closer.submit(ours) for ours, _ in pairs[place::THREADS]])
    stats = closer.shutdown(0.0)
    assert nonzero(stats) == {Outcome.SHED: len(pairs) - 20, Outcome.TIMED_OUT: 20}
    assert outcomes(chain.from_iterable(futures)).count(Outcome.SHED) == len(pairs) - 20
    assert not any(map(still_open, known))
    assert_adds_up(stats)


def test_eight_threads_hand_over_the_same_socket(closers: CloserMaker, unix_pair: PairMaker) -> None:
    closer = closers(LONG)
    for _ in range(10):
        ours, peer = unix_pair()
        peer.close()

        def hand_over(place: int, ours: socket.socket = ours) -> Outcome:
            return closer.submit(ours).result(DEADLINE).outcome

        found = sorted(at_once(hand_over), key=lambda outcome: outcome.value)
        assert found == [Outcome.ALREADY_CLOSED] * (THREADS - 1) + [Outcome.PEER_CLOSED]
    assert_adds_up(closer.stats())


def test_counters_are_of_one_moment_while_threads_hand_over(closers: CloserMaker, unix_pair: PairMaker) -> None:
    closer = closers(LONG)
    pairs = [unix_pair() for _ in range(25 * THREADS)]
    over = threading.Event()

    def look() -> int:
        last = 0
        while not over.is_set():
            stats = closer.stats()
            assert_adds_up(stats)
            assert last <= stats.handed_over <= len(pairs)
            last = stats.handed_over
        return last

    def hand_over(place: int) -> None:
        for ours, peer in pairs[place::THREADS]:
            closer.close(ours)
            peer.close()

    with Call(look):
        try:
            at_once(hand_over)
            assert closer.join(DEADLINE)
        finally:
            over.set()
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: len(pairs)}


@pytest.mark.parametrize("with_data", [False, True], ids=["close", "send_and_close"])
def test_shutdown_while_threads_hand_over(closers: CloserMaker, unix_pair: PairMaker, with_data: bool) -> None:
    """Every socket is either the closer's, and closed, or untouched."""
    closer = closers(Drain(timeout=DEADLINE))
    pairs = [unix_pair() for _ in range(40 * THREADS)]
    known = [identity(ours) for ours, _ in pairs]
    begun = threading.Event()

    def hand_over(place: int) -> int:
        taken = 0
        for ours, _ in pairs[place::THREADS]:
            try:
                if with_data:
                    closer.send_and_close(ours, b"answer")
                else:
                    closer.close(ours)
            except RuntimeError:
                break
            taken += 1
            begun.set()
        return taken

    with Call(lambda: at_once(hand_over)) as call:
        assert begun.wait(DEADLINE)
        stats = closer.shutdown(0.0)
    taken = call.result()
    for place, count in enumerate(taken):
        mine = pairs[place::THREADS]
        assert [ours.fileno() == -1 for ours, _ in mine] == [True] * count + [False] * (len(mine) - count)
        assert [still_open(each) for each in known[place::THREADS]] == [False] * count + [True] * (len(mine) - count)
    assert stats.handed_over == sum(taken)
    assert nonzero(stats) == {Outcome.TIMED_OUT: sum(taken)}
    assert_adds_up(stats)


def test_two_threads_shut_down(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    closer.close(tcp()[0])
    with Call(lambda: closer.shutdown(0.03)) as one, Call(lambda: closer.shutdown(0.03)) as two:
        assert one.result() == two.result()
    assert nonzero(closer.stats()) == {Outcome.TIMED_OUT: 1}


def test_one_thread_for_all_sockets(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    before = threading.active_count()
    for _ in range(10):
        closer.close(tcp()[0])
    assert threading.active_count() == before + 1


@pytest.mark.parametrize("name", [None, "my-closer"], ids=["default", "given"])
def test_thread_has_a_name(closers: CloserMaker, tcp: PairMaker, name: str | None) -> None:
    before = set(threading.enumerate())
    closer = closers(LONG) if name is None else closers(LONG, name=name)
    assert set(threading.enumerate()) == before
    ours, _ = tcp()
    closer.close(ours)
    [thread] = set(threading.enumerate()) - before
    assert thread.name == (name or "lingerx-closer")
    assert thread.daemon
    closer.shutdown(0.0)
    assert not thread.is_alive()


def test_many_closers(closers: CloserMaker, tcp: PairMaker) -> None:
    many = [closers(LONG) for _ in range(20)]
    pairs = [tcp() for _ in many]
    futures = [closer.submit(ours) for closer, (ours, _) in zip(many, pairs, strict=True)]
    for _, peer in pairs:
        peer.close()
    for closer, future in zip(many, futures, strict=True):
        assert future.result(DEADLINE).outcome is Outcome.PEER_CLOSED
        assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 1}


class HandsOver:
    """Garbage that ends by handing over a socket, as a makefile() object of an adapter's socket does."""

    def __init__(self, closer: Closer, sock: socket.socket) -> None:
        self.closer, self.sock, self.me = closer, sock, self

    def __del__(self) -> None:
        self.closer.close(self.sock)


def test_garbage_is_collected_while_the_thread_is_started(
    closers: CloserMaker, unix_pair: PairMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    closer = closers(LONG)
    (first, first_peer), (second, second_peer) = unix_pair(), unix_pair()
    make = threading.Thread.__init__

    def collect_and_make(*arguments: Any, **options: Any) -> None:
        gc.collect()
        make(*arguments, **options)

    HandsOver(closer, second)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "__init__", collect_and_make)
        closer.close(first)
    assert second.fileno() == -1
    first_peer.close()
    second_peer.close()
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 2}


def test_thread_that_cannot_be_started_strands_nobody(
    closers: CloserMaker, unix_pair: PairMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread hands over just then: it must not count on a thread that is still to come."""
    closer = closers(Drain(timeout=DEADLINE))
    (first, _), (second, second_peer) = unix_pair(), unix_pair()
    second_peer.close()
    others: list[Call[None]] = []

    def refuse(_: threading.Thread) -> None:
        patch.undo()
        assert closer._loop.thread is None
        others.append(Call(lambda: closer.close(second)))
        others[0].start()
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            closer.close(first)
    others[0].result()
    assert first.fileno() >= 0
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 1}
