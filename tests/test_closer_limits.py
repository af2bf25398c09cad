"""Closer: deadlines, fairness, and what it costs when there is nothing to do."""

from __future__ import annotations

import math
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import pytest

from closers import (
    LONG,
    SCHEDULING,
    CloserMaker,
    assert_adds_up,
    linux,
    make_room_for,
    nonzero,
    outcomes,
    overstay,
    thread_of,
    thread_status,
    wait_until_asleep,
)
from conformance import SHORT
from connections import DEADLINE, PairMaker, identity, still_open
from lingerx import Drain, Flush, Outcome
from lingerx._portable_handed import Bell
from peers import Call, Dripping, FloodingProcess

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
    closer.close(slow)
    if sys.platform == "linux":
        wait_until_asleep(thread_of(closer))
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


@pytest.mark.slow
@pytest.mark.parametrize("on_timeout", ["background", "abort"])
def test_shutdown_is_over_in_time_with_a_thousand_sockets(
    closers: CloserMaker, engine_name: str, tcp: PairMaker, on_timeout: Any
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
    assert 0.2 <= took < 0.2 + overstay(engine_name)
    assert nonzero(stats) == {Outcome.TIMED_OUT: count // 2, Outcome.PEER_CLOSED: count // 2}
    assert not any(map(still_open, known))
    assert_adds_up(stats)


@pytest.mark.slow
def test_two_thousand_deadlines(closers: CloserMaker, engine_name: str, unix_pair: PairMaker) -> None:
    """In no order: whoever is next is never the one that came next."""
    count = 2000
    make_room_for(2 * count)
    closer = closers(max_pending=count)
    pairs = [unix_pair() for _ in range(count)]
    allowed = [0.2 + 0.4 * (place * 7919 % count) / count for place in range(count)]
    futures = [closer.submit(ours, Drain(timeout=timeout)) for timeout, (ours, _) in zip(allowed, pairs, strict=True)]
    assert outcomes(futures) == [Outcome.TIMED_OUT] * count
    overstayed = [future.result(0).elapsed - timeout for timeout, future in zip(allowed, futures, strict=True)]
    assert min(overstayed) >= 0
    assert max(overstayed) < overstay(engine_name)
    assert nonzero(closer.stats()) == {Outcome.TIMED_OUT: count}


@pytest.mark.slow
def test_idle_limits_of_many_that_drip(closers: CloserMaker, engine_name: str, unix_pair: PairMaker) -> None:
    """A byte that comes puts the idle limit off, and never the other one."""
    count = 200
    closer = closers()
    pairs = [unix_pair() for _ in range(count)]
    futures = [
        closer.submit(ours, Drain(timeout=0.3, idle_timeout=0.1 if place % 2 else None))
        for place, (ours, _) in enumerate(pairs)
    ]
    over = threading.Event()
    dripped = [peer for place, (_, peer) in enumerate(pairs) if place % 4 < 2]  # half of either kind

    def drip() -> None:
        while not over.wait(0.02):
            for peer in dripped:
                with suppress(OSError):
                    peer.send(b"x")

    with Call(drip):
        found = outcomes(futures)
        over.set()
    assert found == [Outcome.TIMED_OUT, Outcome.TIMED_OUT, Outcome.TIMED_OUT, Outcome.IDLE] * (count // 4)
    for future in futures:
        limit = 0.1 if future.result(0).outcome is Outcome.IDLE else 0.3
        assert limit <= future.result(0).elapsed < limit + overstay(engine_name)


# Fairness -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_flooding_peer_delays_nobody(closers: CloserMaker, engine_name: str, tcp: PairMaker) -> None:
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
        assert not future.done()
        assert outcomes(silent) == [Outcome.TIMED_OUT] * 50
        assert future.result(DEADLINE).outcome is Outcome.TIMED_OUT
        room = overstay(engine_name)
        assert max(each.result(0).elapsed for each in closing) < room
        assert max(each.result(0).elapsed for each in silent) < 0.1 + room
        assert future.result(0).elapsed < 0.3 + room
        assert future.result(0).drained > 0


def test_hundreds_that_are_done_at_once_wait_for_one_collecting(closers: CloserMaker, unix_pair: PairMaker) -> None:
    """However many events the loop takes from the kernel in one go."""
    collect = 0.3
    closer = closers(LONG, collect=collect)
    make_room_for(1000)
    pairs = [unix_pair() for _ in range(400)]
    closer.close_all(ours for ours, _ in pairs)
    time.sleep(3 * collect)  # now all of them are watched
    for _, peer in pairs:
        peer.close()
    assert closer.join(4 * collect)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 400}


# Nothing to do --------------------------------------------------------------------------------------------


@linux
@pytest.mark.slow
@pytest.mark.parametrize("pending", [0, 20])
def test_idle_closer_does_not_wake(closers: CloserMaker, tcp: PairMaker, pending: int) -> None:
    """Neither when it is empty nor when those in flight are silent, their deadlines far away."""
    closer = closers(Drain(timeout=60.0))
    done, peer = tcp()
    peer.close()
    pairs = [tcp() for _ in range(pending)]
    closer.close_all([done, *(ours for ours, _ in pairs)], Drain(timeout=60.0))
    thread = thread_of(closer)
    wait_until_asleep(thread)
    woken = int(thread_status(thread, "voluntary_ctxt_switches"))
    time.sleep(0.3)  # to look for something that must not happen
    assert int(thread_status(thread, "voluntary_ctxt_switches")) == woken
    assert closer.pending == pending


@linux
def test_busy_closer_is_not_woken_for_every_socket(
    closers: CloserMaker, tcp: PairMaker, engine_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rings: list[bool] = []
    ring = Bell.ring

    def count(bell: Bell, crowd_waits: bool) -> None:
        rings.append(crowd_waits)
        ring(bell, crowd_waits)

    monkeypatch.setattr(Bell, "ring", count)
    best = math.inf
    for _ in range(3):  # where this thread is kept waiting meanwhile, the closer runs out of work
        rings.clear()
        closer = closers(Flush(timeout=DEADLINE), collect=0.02)
        pairs = [tcp() for _ in range(200)]
        for _, peer in pairs:
            peer.close()
        closer.close(pairs[0][0])
        thread = thread_of(closer)
        for ours, _ in pairs[1:]:
            closer.close(ours)
        assert closer.join(DEADLINE)
        # Of the portable engine's thread the system can tell nothing: it waits for the GIL every now and then.
        woken = len(rings) if engine_name == "portable" else int(thread_status(thread, "voluntary_ctxt_switches"))
        best = min(best, woken)
    assert 0 < best < 40
