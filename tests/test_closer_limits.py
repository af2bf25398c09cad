"""Closer: deadlines, overload, fairness, and what it costs when there is nothing to do."""

from __future__ import annotations

import errno
import resource
import sys
import time
from concurrent.futures import Future, wait
from typing import Any

import pytest

from closers import SCHEDULING, CloserMaker, assert_adds_up, nonzero, thread_ids, thread_status, wait_until_asleep
from conformance import SHORT
from connections import A_LONG_LOOK, DEADLINE, SMALL_BUFFERS, Ending, Pair, PairMaker, fill, identity, still_open
from lingerx import Abort, Background, Drain, Flush, Outcome, Policy, Report
from peers import Dripping, FloodingProcess, Polite, SlowReader, read_to_end

LONG = Drain(timeout=DEADLINE)
MORE_THAN_FITS = bytes(4 << 20)

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def outcomes(futures: list[Future[Report]]) -> list[Outcome]:
    """In the order of the futures, once all are done."""
    assert not wait(futures, DEADLINE).not_done
    return [future.result(0).outcome for future in futures]


# Deadlines ------------------------------------------------------------------------------------------------


def test_deadline_counts_from_the_hand_over(closers: CloserMaker, tcp: PairMaker) -> None:
    """Not from when the closer's thread, which is collecting, first looks at the socket."""
    closer = closers(Drain(timeout=0.1), collect=0.08)
    pairs = [tcp() for _ in range(5)]
    started = time.perf_counter()
    futures = [closer.submit(ours) for ours, _ in pairs]
    assert outcomes(futures) == [Outcome.TIMED_OUT] * 5
    assert time.perf_counter() - started < 0.1 + 0.08 + SCHEDULING
    assert all(future.result(0).elapsed >= 0.1 for future in futures)


def test_every_socket_has_its_own_deadline(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers()
    times = [0.12, 0.04, 0.08, 0.0, 0.16, 0.02]
    pairs = [tcp() for _ in times]
    futures = [closer.submit(ours, Drain(timeout=time)) for time, (ours, _) in zip(times, pairs, strict=True)]
    assert outcomes(futures) == [Outcome.TIMED_OUT] * len(times)
    for allowed, future in zip(times, futures, strict=True):
        assert allowed <= future.result(0).elapsed < allowed + SCHEDULING


def test_a_shorter_deadline_wakes_a_closer_that_sleeps_until_a_longer_one(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    (slow, _), (quick, _) = tcp(), tcp()
    before = thread_ids()
    closer.close(slow)
    if sys.platform == "linux":
        [thread] = thread_ids() - before
        wait_until_asleep(thread)
    report = closer.submit(quick, Drain(timeout=SHORT)).result(DEADLINE)
    assert SHORT <= report.elapsed < SHORT + SCHEDULING
    assert closer.pending == 1


def test_peer_sends_nothing_for_too_long(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(Drain(timeout=DEADLINE, idle_timeout=0.05))
    (silent, _), (dripped, peer) = tcp(), tcp()
    with Dripping(peer, 0.01):
        dripping = closer.submit(dripped, Drain(timeout=0.15, idle_timeout=0.1))
        report = closer.submit(silent).result(DEADLINE)
        assert report.outcome is Outcome.IDLE
        assert 0.05 <= report.elapsed < 0.05 + SCHEDULING
        assert dripping.result(DEADLINE).outcome is Outcome.TIMED_OUT


def make_room_for(count: int) -> None:
    """Raise RLIMIT_NOFILE so that there is room for `count` more fds, or skip."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512
    if soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"RLIMIT_NOFILE is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@pytest.mark.slow
@pytest.mark.parametrize("on_timeout", ["background", "abort"])
def test_shutdown_is_over_in_time_with_a_thousand_sockets(
    closers: CloserMaker, tcp: PairMaker, on_timeout: Any
) -> None:
    """Half of their peers are silent, the others close at some moment meanwhile."""
    count = 1000
    make_room_for(2 * count)
    closer = closers(Drain(timeout=DEADLINE, on_timeout=on_timeout), max_pending=2 * count)
    pairs = [tcp() for _ in range(count)]
    known = [identity(ours) for ours, _ in pairs]
    closer.close_all(ours for ours, _ in pairs)
    for _, peer in pairs[1::2]:
        peer.close()
    started = time.perf_counter()
    stats = closer.shutdown(0.2)
    took = time.perf_counter() - started
    assert 0.2 <= took < 0.2 + SCHEDULING
    assert nonzero(stats) == {Outcome.TIMED_OUT: count // 2, Outcome.PEER_CLOSED: count // 2}
    assert not any(map(still_open, known))
    assert_adds_up(stats)


@pytest.mark.slow
def test_two_thousand_deadlines(closers: CloserMaker, unix_pair: PairMaker) -> None:
    count = 2000
    make_room_for(2 * count)
    closer = closers(max_pending=count)
    pairs = [unix_pair() for _ in range(count)]
    futures = [
        closer.submit(ours, Drain(timeout=0.1 + 0.4 * (place * 7919 % count) / count))
        for place, (ours, _) in enumerate(pairs)
    ]
    assert outcomes(futures) == [Outcome.TIMED_OUT] * count
    for place, future in enumerate(futures):
        allowed = 0.1 + 0.4 * (place * 7919 % count) / count
        assert allowed <= future.result(0).elapsed < allowed + SCHEDULING
    assert nonzero(closer.stats()) == {Outcome.TIMED_OUT: count}


# More than it takes ---------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("on_full", ["shed_oldest", "abort_oldest"])
def test_many_more_than_it_takes_at_once(closers: CloserMaker, unix_pair: PairMaker, on_full: str) -> None:
    """Faster than the closer looks: then the newest may be shed too, but no more than had to be."""
    closer = closers(LONG, max_pending=10, on_full=on_full, collect=0.02)
    pairs = [unix_pair() for _ in range(100)]
    futures = [closer.submit(ours) for ours, _ in pairs]
    assert closer.pending <= 20
    stats = closer.shutdown(A_LONG_LOOK)
    assert stats.handed_over == len(pairs)
    assert stats.outcomes[Outcome.SHED] == len(pairs) - 10
    assert outcomes(futures).count(Outcome.SHED) == len(pairs) - 10
    assert_adds_up(stats)


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


# max_buffered ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_full", ["shed_oldest", "background", "abort_oldest"])
def test_more_data_than_is_kept(closers: CloserMaker, tcp: PairMaker, on_full: str) -> None:
    closer = closers(LONG, max_buffered=len(MORE_THAN_FITS), on_full=on_full)
    (ours, peer), (other, _), (third, third_peer), (fourth, _) = (tcp(**SMALL_BUFFERS) for _ in range(4))
    kept = closer.submit(ours, data=MORE_THAN_FITS)
    assert closer.stats().buffered == len(MORE_THAN_FITS)
    report = closer.submit(other, data=MORE_THAN_FITS).result(DEADLINE)
    assert (report.outcome, report.delivered) == (Outcome.SHED, False)
    assert closer.send_and_close(fourth, MORE_THAN_FITS) is False
    with Polite(third_peer) as client:  # what the kernel takes at once needs no memory
        assert closer.submit(third, data=b"short").result(DEADLINE).outcome is Outcome.PEER_CLOSED
    assert client.ending == Ending(5, None)
    assert closer.stats().buffered == len(MORE_THAN_FITS)
    with SlowReader(peer) as reader:
        assert kept.result(DEADLINE).outcome is Outcome.PEER_CLOSED
    assert reader.ending == Ending(len(MORE_THAN_FITS), None)
    assert closer.stats().buffered == 0
    assert nonzero(closer.stats()) == {Outcome.SHED: 2, Outcome.PEER_CLOSED: 2}


def test_no_data_is_kept_at_all(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG, max_buffered=0)
    (ours, peer), (other, _) = tcp(), tcp(**SMALL_BUFFERS)
    assert closer.send_and_close(ours, b"short")
    assert read_to_end(peer) == Ending(5, None)
    assert not closer.send_and_close(other, MORE_THAN_FITS)


# Fairness -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_flooding_peer_delays_nobody(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    flooded, flood = tcp()
    others = [tcp() for _ in range(100)]
    with FloodingProcess() as process, process.flood(flood, flooded):
        future = closer.submit(flooded, Drain(timeout=0.3, on_timeout="abort"))
        silent = [closer.submit(ours, Drain(timeout=0.1)) for ours, _ in others[:50]]
        closing = [closer.submit(ours) for ours, _ in others[50:]]
        for _, peer in others[50:]:
            peer.close()
        assert outcomes(closing) == [Outcome.PEER_CLOSED] * 50
        assert outcomes(silent) == [Outcome.TIMED_OUT] * 50
        assert future.result(DEADLINE).outcome is Outcome.TIMED_OUT
        assert max(each.result(0).elapsed for each in closing) < SCHEDULING
        assert max(each.result(0).elapsed for each in silent) < 0.1 + SCHEDULING
        assert future.result(0).elapsed < 0.3 + SCHEDULING
        assert future.result(0).drained > 0


# Nothing to do --------------------------------------------------------------------------------------------


@linux
@pytest.mark.slow
@pytest.mark.parametrize("pending", [0, 20])
def test_idle_closer_does_not_wake(closers: CloserMaker, tcp: PairMaker, pending: int) -> None:
    """Neither when it is empty nor when those in flight are silent, their deadlines far away."""
    before = thread_ids()
    closer = closers(Drain(timeout=60.0))
    done, peer = tcp()
    peer.close()
    pairs = [tcp() for _ in range(pending)]
    closer.close_all([done, *(ours for ours, _ in pairs)], Drain(timeout=60.0))
    [thread] = thread_ids() - before
    wait_until_asleep(thread)
    woken = int(thread_status(thread, "voluntary_ctxt_switches"))
    time.sleep(0.3)  # to look for something that must not happen
    assert int(thread_status(thread, "voluntary_ctxt_switches")) == woken
    assert closer.pending == pending


@linux
def test_busy_closer_is_not_woken_for_every_socket(closers: CloserMaker, tcp: PairMaker) -> None:
    before = thread_ids()
    closer = closers(Flush(timeout=DEADLINE), collect=0.02)
    pairs = [tcp() for _ in range(200)]
    for _, peer in pairs:
        peer.close()
    closer.close(pairs[0][0])
    [thread] = thread_ids() - before
    for ours, _ in pairs[1:]:
        closer.close(ours)
    assert closer.join(DEADLINE)
    assert int(thread_status(thread, "voluntary_ctxt_switches")) < 40
