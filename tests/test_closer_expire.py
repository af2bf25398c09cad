"""Closer.expire: one socket's deadline is now, for a caller that has stopped waiting."""

from __future__ import annotations

import errno
import gc
import threading
import weakref
from concurrent.futures import Future

import pytest

from closers import LONG, CloserMaker, assert_adds_up, outcomes
from connections import DEADLINE, SMALL_BUFFERS, Ending, PairMaker, identity, still_open, unread_pair
from lingerx import Drain, Outcome, Report
from peers import Call, read_to_end


def test_ends_one_that_waits_for_a_silent_peer(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    ours, peer = tcp()
    known = identity(ours)
    ours.sendall(b"answer")
    future = closer.submit(ours)
    closer.expire(future)
    report = future.result(DEADLINE)
    assert (report.outcome, report.delivered) == (Outcome.TIMED_OUT, True)
    assert report.elapsed < DEADLINE
    assert not still_open(known)
    assert read_to_end(peer) == Ending(len(b"answer"), None)


def test_ends_it_as_its_policy_says(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    ours, peer, sent = unread_pair(tcp)
    future = closer.submit(ours, Drain(timeout=DEADLINE, on_timeout="abort"))
    closer.expire(future)
    assert future.result(DEADLINE).outcome is Outcome.TIMED_OUT
    received, error = read_to_end(peer)
    assert received < sent
    assert error == errno.ECONNRESET


def test_ends_one_that_sleeps_in_the_closer_for_long(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG, collect=0.0)
    (other, gone), (ours, _peer) = tcp(), tcp()
    gone.close()
    future = closer.submit(ours)
    closer.submit(other).result(DEADLINE)  # by now the loop has seen both
    closer.expire(future)
    assert future.result(DEADLINE).outcome is Outcome.TIMED_OUT


def test_what_was_not_sent_yet_is_lost_and_said_to_be(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    ours, _peer = tcp(**SMALL_BUFFERS)
    future = closer.submit(ours, data=bytes(10_000_000))
    closer.expire(future)
    report = future.result(DEADLINE)
    assert (report.outcome, report.delivered) == (Outcome.TIMED_OUT, False)
    assert closer.stats().buffered == 0


def test_others_go_on(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    pairs = [tcp() for _ in range(40)]
    futures = [closer.submit(ours) for ours, _ in pairs]
    for future in futures[::4]:
        closer.expire(future)
    assert outcomes(futures[::4]) == [Outcome.TIMED_OUT] * 10
    assert closer.pending == 30
    for _, peer in pairs:
        peer.close()
    closing = [future for place, future in enumerate(futures) if place % 4]
    assert outcomes(closing) == [Outcome.PEER_CLOSED] * 30


def test_from_many_threads_while_others_hand_over(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    pairs = [tcp() for _ in range(200)]
    futures: list[Future[Report]] = []
    start = threading.Barrier(4)

    def work(mine: int) -> None:
        start.wait(DEADLINE)
        for ours, _ in pairs[mine::4]:
            future = closer.submit(ours)
            futures.append(future)
            closer.expire(future)
            closer.expire(future)  # twice does no harm

    with Call(lambda: work(0)), Call(lambda: work(1)), Call(lambda: work(2)), Call(lambda: work(3)):
        pass
    assert outcomes(futures) == [Outcome.TIMED_OUT] * 200
    assert_adds_up(closer.stats())


def test_one_that_is_done_stays_as_it_is(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    ours, peer = tcp()
    peer.close()
    future = closer.submit(ours)
    report = future.result(DEADLINE)
    closer.expire(future)
    closed = closer.submit(ours)  # there is no fd any more
    closer.expire(closed)
    closer.shutdown()
    closer.expire(future)
    assert future.result(0) is report
    assert closed.result(0).outcome is Outcome.ALREADY_CLOSED


def test_refuses_what_is_not_its_own(closers: CloserMaker, tcp: PairMaker) -> None:
    closer, other = closers(LONG), closers(LONG)
    ours, peer = tcp()
    future = other.submit(ours)
    with pytest.raises(ValueError, match="this closer"):
        closer.expire(future)
    with pytest.raises(ValueError, match="this closer"):
        closer.expire(Future())
    with pytest.raises(TypeError, match="future"):
        closer.expire("future")  # type: ignore[arg-type]
    assert not future.done()
    peer.close()
    assert future.result(DEADLINE).outcome is Outcome.PEER_CLOSED


def test_a_future_that_is_done_is_in_no_circle(closers: CloserMaker, tcp: PairMaker) -> None:
    """Its memory is free as soon as nobody holds it, without the garbage collector."""
    closer = closers(LONG)
    ours, peer = tcp()
    peer.close()
    gc.disable()
    try:
        future = closer.submit(ours)
        future.result(DEADLINE)
        assert closer.join(DEADLINE)
        known = weakref.ref(future)
        del future
        assert known() is None
    finally:
        gc.enable()
