"""Closer: more sockets than it takes. Somebody is shed then: the oldest, or the newest, and never silently."""

from __future__ import annotations

import errno
import socket
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from closers import LONG, MORE_THAN_FITS, CloserMaker, assert_adds_up, linux, nonzero, outcomes
from connections import (
    A_LONG_LOOK,
    DEADLINE,
    SMALL_BUFFERS,
    Ending,
    Pair,
    PairMaker,
    fill,
    identity,
    still_open,
    wait_until,
)
from lingerx import Abort, Background, Drain, Outcome, Policy, Report
from peers import read_to_end

if TYPE_CHECKING:
    from lingerx.closer import Closer


# One more than it takes -----------------------------------------------------------------------------------


def three_pending(closers: CloserMaker, tcp: PairMaker, on_full: str) -> tuple[Any, list[Pair], list[Future[Report]]]:
    """A closer that takes three, and three silent ones in it, all of which it has seen."""
    closer = closers(LONG, max_pending=3, on_full=on_full)
    pairs = [tcp(**SMALL_BUFFERS) for _ in range(7)]
    for ours, _ in pairs:
        fill(ours)  # whoever has read our FIN is told of no reset any more
    return closer, pairs, [closer.submit(ours) for ours, _ in pairs[:3]]


@pytest.mark.parametrize("on_full", ["shed_oldest", "abort_oldest"])
def test_oldest_makes_room_for_the_newest(closers: CloserMaker, tcp: PairMaker, on_full: str) -> None:
    closer, pairs, futures = three_pending(closers, tcp, on_full)
    for place, (ours, _) in enumerate(pairs[3:]):
        futures.append(closer.submit(ours))
        report = futures[place].result(DEADLINE)  # the oldest of those that are left
        assert report.outcome is Outcome.SHED
        assert not any(future.done() for future in futures[place + 1 :])
    for _, peer in pairs[:4]:
        assert read_to_end(peer).error == (errno.ECONNRESET if on_full == "abort_oldest" else None)
    for _, peer in pairs[4:]:
        assert read_to_end(peer).error is None
        peer.close()
    assert outcomes(futures) == [Outcome.SHED] * 4 + [Outcome.PEER_CLOSED] * 3
    assert nonzero(closer.stats()) == {Outcome.SHED: 4, Outcome.PEER_CLOSED: 3}
    assert_adds_up(closer.stats())


def test_oldest_is_told_by_the_hand_over_also_where_places_were_used_before(
    closers: CloserMaker, tcp: PairMaker
) -> None:
    closer, pairs, futures = three_pending(closers, tcp, "shed_oldest")
    read_to_end(pairs[1][1])
    pairs[1][1].close()
    assert futures[1].result(DEADLINE).outcome is Outcome.PEER_CLOSED
    futures += [closer.submit(ours) for ours, _ in pairs[3:4]]  # now 0, 2, 3
    futures.append(closer.submit(pairs[4][0]))
    assert futures[0].result(DEADLINE).outcome is Outcome.SHED
    futures.append(closer.submit(pairs[5][0]))
    assert futures[2].result(DEADLINE).outcome is Outcome.SHED
    assert not any(futures[place].done() for place in (3, 4, 5))


def test_newest_is_closed_in_the_background(closers: CloserMaker, tcp: PairMaker) -> None:
    closer, pairs, futures = three_pending(closers, tcp, "background")
    (ours, peer), (other, other_peer) = pairs[3:5]
    known = identity(ours)
    assert closer.submit(ours).result(0).outcome is Outcome.SHED
    assert not still_open(known)
    closer.close(other)
    assert read_to_end(peer).error is None
    assert read_to_end(other_peer).error is None
    assert not any(future.done() for future in futures)
    assert nonzero(closer.stats()) == {Outcome.SHED: 2}
    read_to_end(pairs[0][1])
    pairs[0][1].close()
    assert futures[0].result(DEADLINE).outcome is Outcome.PEER_CLOSED
    last = closer.submit(pairs[5][0])  # there is room again
    assert not last.done()
    assert_adds_up(closer.stats())


@pytest.mark.parametrize("policy", [Background(), Abort()], ids=["background", "abort"])
def test_what_waits_for_nothing_needs_no_room(closers: CloserMaker, tcp: PairMaker, policy: Policy) -> None:
    closer, pairs, futures = three_pending(closers, tcp, "shed_oldest")
    assert closer.submit(pairs[3][0], policy).result(0).outcome is not Outcome.SHED
    assert not any(future.done() for future in futures)


def test_shed_tells_that_data_was_lost(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG, max_pending=1)
    (ours, _), (other, _) = tcp(**SMALL_BUFFERS), tcp()
    lost = closer.submit(ours, data=MORE_THAN_FITS)
    closer.close(other)
    report = lost.result(DEADLINE)
    assert (report.outcome, report.delivered) == (Outcome.SHED, False)
    assert closer.stats().buffered == 0


# Bursts ---------------------------------------------------------------------------------------------------

MOST = 6
"""max_pending here."""


class Burst:
    """Ten times as many silent sockets as it takes, handed over as fast as can be, and in which order they ended."""

    def __init__(self, closer: Closer, tcp: PairMaker) -> None:
        self.pairs = [tcp(**SMALL_BUFFERS) for _ in range(10 * MOST)]
        self.ended: list[int] = []
        self.futures: list[Future[Report]] = []
        for ours, _ in self.pairs:
            fill(ours)  # whoever has read our FIN is told of no reset any more
        for place, (ours, _) in enumerate(self.pairs):
            future = closer.submit(ours)
            future.add_done_callback(partial(self._note, place))
            self.futures.append(future)

    def _note(self, place: int, future: Future[Report]) -> None:
        self.ended.append(place)

    def settle(self, shed: int) -> None:
        """Until so many are closed."""
        wait_until(lambda: len(self.ended) >= shed)

    def open_ones(self) -> list[int]:
        return [place for place, future in enumerate(self.futures) if not future.done()]


def assert_oldest_first(burst: Burst) -> None:
    """But for those that the closer's thread has in its hands, and gives up when it comes round."""
    left = set(range(len(burst.futures)))
    for place in burst.ended:
        left.remove(place)
        assert sum(older < place for older in left) <= 2 * MOST, burst.ended


@pytest.mark.parametrize("on_full", ["shed_oldest", "abort_oldest"])
@pytest.mark.parametrize("collect", [0.0, 0.003, 0.1], ids=["no_collecting", "default", "long_collecting"])
def test_burst_leaves_the_newest(closers: CloserMaker, tcp: PairMaker, on_full: str, collect: float) -> None:
    closer = closers(LONG, max_pending=MOST, on_full=on_full, collect=collect)
    burst = Burst(closer, tcp)
    burst.settle(9 * MOST)
    assert burst.open_ones() == [*range(9 * MOST, 10 * MOST)]
    assert closer.pending == MOST
    assert nonzero(closer.stats()) == {Outcome.SHED: 9 * MOST}
    assert outcomes(burst.futures[: 9 * MOST]) == [Outcome.SHED] * (9 * MOST)
    assert_oldest_first(burst)
    for place, (_, peer) in enumerate(burst.pairs[: 9 * MOST]):
        assert read_to_end(peer).error == (errno.ECONNRESET if on_full == "abort_oldest" else None), place
    for _, peer in burst.pairs[9 * MOST :]:
        assert read_to_end(peer).error is None
        peer.close()
    assert outcomes(burst.futures[9 * MOST :]) == [Outcome.PEER_CLOSED] * MOST
    assert nonzero(closer.stats()) == {Outcome.SHED: 9 * MOST, Outcome.PEER_CLOSED: MOST}
    assert_adds_up(closer.stats())


@pytest.mark.parametrize("on_full", ["shed_oldest", "abort_oldest"])
def test_second_burst_when_it_is_full_already(closers: CloserMaker, tcp: PairMaker, on_full: str) -> None:
    closer = closers(LONG, max_pending=MOST, on_full=on_full)
    first = Burst(closer, tcp)
    first.settle(9 * MOST)
    second = Burst(closer, tcp)
    first.settle(10 * MOST)
    second.settle(9 * MOST)
    assert first.open_ones() == []
    assert second.open_ones() == [*range(9 * MOST, 10 * MOST)]
    assert closer.pending == MOST
    assert nonzero(closer.stats()) == {Outcome.SHED: 19 * MOST}
    assert_oldest_first(first)
    assert_oldest_first(second)
    assert_adds_up(closer.stats())


def test_burst_closes_the_newest_in_the_background(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG, max_pending=MOST, on_full="background")
    burst = Burst(closer, tcp)
    assert burst.ended == [*range(MOST, 10 * MOST)], "each at once, by whoever hands it over"
    assert burst.open_ones() == [*range(MOST)]
    assert outcomes(burst.futures[MOST:]) == [Outcome.SHED] * (9 * MOST)
    for _, peer in burst.pairs[MOST:]:
        assert read_to_end(peer).error is None
    assert nonzero(closer.stats()) == {Outcome.SHED: 9 * MOST}
    assert closer.pending == MOST


@linux
def test_orphan_of_one_that_is_shed_at_once_dies_on_schedule(closers: CloserMaker, tcp: PairMaker) -> None:
    """By the policy's user_timeout, as every socket that is left to the kernel."""
    closer = closers(LONG, max_pending=1, on_full="background")
    (first, _), (ours, _) = tcp(), tcp()
    with ours.dup() as copy:  # which can still be asked when ours is closed
        closer.close(first)
        report = closer.submit(ours, Drain(user_timeout=1.5)).result(0)
        assert report.outcome is Outcome.SHED
        assert copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1500


@pytest.mark.parametrize("on_full", ["shed_oldest", "background", "abort_oldest"])
def test_burst_never_holds_more_than_twice_as_many(closers: CloserMaker, unix_pair: PairMaker, on_full: str) -> None:
    closer = closers(LONG, max_pending=10, on_full=on_full, collect=0.1)
    pairs = [unix_pair() for _ in range(200)]
    most = 0
    for ours, _ in pairs:
        closer.close(ours)
        stats = closer.stats()
        assert_adds_up(stats)
        most = max(most, stats.pending)
    assert most <= (10 if on_full == "background" else 20)
    wait_until(lambda: closer.pending == 10)
    assert nonzero(closer.stats()) == {Outcome.SHED: len(pairs) - 10}


@pytest.mark.parametrize("on_full", ["shed_oldest", "background", "abort_oldest"])
def test_shutdown_right_after_a_burst(closers: CloserMaker, unix_pair: PairMaker, on_full: str) -> None:
    closer = closers(LONG, max_pending=10, on_full=on_full, collect=0.02)
    pairs = [unix_pair() for _ in range(100)]
    futures = [closer.submit(ours) for ours, _ in pairs]
    stats = closer.shutdown(A_LONG_LOOK)
    assert nonzero(stats) == {Outcome.SHED: 90, Outcome.TIMED_OUT: 10}
    expected = [Outcome.SHED] * 90 + [Outcome.TIMED_OUT] * 10
    assert outcomes(futures) == (expected[::-1] if on_full == "background" else expected)
    assert_adds_up(stats)


@pytest.mark.parametrize("on_full", ["shed_oldest", "abort_oldest"])
def test_burst_when_there_is_room_for_one(closers: CloserMaker, unix_pair: PairMaker, on_full: str) -> None:
    closer = closers(LONG, max_pending=1, on_full=on_full)
    pairs = [unix_pair() for _ in range(50)]
    futures = [closer.submit(ours) for ours, _ in pairs]
    wait_until(lambda: closer.pending == 1)
    pairs[-1][1].close()
    assert outcomes(futures) == [Outcome.SHED] * 49 + [Outcome.PEER_CLOSED]


def test_peers_that_have_closed_are_not_shed(closers: CloserMaker, unix_pair: PairMaker) -> None:
    """Those that the closer has room for: it looks at each before it has to choose."""
    closer = closers(LONG, max_pending=50)
    for _ in range(4):
        pairs = [unix_pair() for _ in range(50)]
        for _, peer in pairs:
            peer.close()
        closer.close_all(ours for ours, _ in pairs)
        assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 200}


# Data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_full", ["shed_oldest", "abort_oldest"])
def test_shed_ones_give_their_memory_back(closers: CloserMaker, tcp: PairMaker, on_full: str) -> None:
    closer = closers(LONG, max_pending=2, on_full=on_full)
    pairs = [tcp(**SMALL_BUFFERS) for _ in range(8)]
    futures = [closer.submit(ours, data=MORE_THAN_FITS) for ours, _ in pairs]
    assert outcomes(futures[:6]) == [Outcome.SHED] * 6
    assert [future.result(0).delivered for future in futures[:6]] == [False] * 6
    assert closer.stats().buffered == 2 * len(MORE_THAN_FITS)
    for place, (_, peer) in enumerate(pairs[6:]):
        assert read_to_end(peer) == Ending(len(MORE_THAN_FITS), None), place
        peer.close()
    assert outcomes(futures[6:]) == [Outcome.PEER_CLOSED] * 2
    assert closer.stats().buffered == 0


def test_data_where_the_newest_goes(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG, max_pending=1, on_full="background")
    (ours, _), (short, short_peer), (long, _) = tcp(), tcp(), tcp(**SMALL_BUFFERS)
    closer.close(ours)
    assert closer.send_and_close(short, b"the kernel took it") is True
    assert read_to_end(short_peer) == Ending(18, None)
    assert closer.send_and_close(long, MORE_THAN_FITS) is False
    assert closer.stats()[1:3] == (1, 0)
    assert nonzero(closer.stats()) == {Outcome.SHED: 2}
