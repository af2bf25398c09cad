"""Closer: its end. join, shutdown, with-blocks, and what becomes of one that nobody holds any more."""

from __future__ import annotations

import errno
import gc
import socket
import threading
import time
import weakref
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from closers import (
    LONG,
    MORE_THAN_FITS,
    CloserMaker,
    assert_usable,
    closer_over,
    linux,
    nonzero,
    thread_status,
    wait_until_asleep,
)
from conformance import SHORT
from conftest import open_fds
from connections import DEADLINE, SMALL_BUFFERS, Ending, PairMaker, fill, identity, still_open, wait_until
from lingerx import Background, Drain, Outcome, Report
from peers import Call, SlowReader, read_to_end

if TYPE_CHECKING:
    from lingerx.closer import Stats


# join -----------------------------------------------------------------------------------------------------


def test_join_waits_as_long_as_it_may_and_takes_sockets_on(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    assert closer.join(0)
    (ours, peer), (other, other_peer) = tcp(), tcp()
    closer.close(ours)
    started = time.perf_counter()
    assert closer.join(SHORT) is False
    assert SHORT <= time.perf_counter() - started < 1.0
    assert not closer.join(0)
    peer.close()
    assert closer.join() is True
    other_peer.close()
    closer.close(other)
    assert closer.join(DEADLINE)


def test_several_threads_join(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    ours, peer = tcp()
    closer.close(ours)
    calls = [Call(lambda: closer.join(DEADLINE)) for _ in range(3)]
    for call in calls:
        call.start()
    assert all(call.is_alive() for call in calls)
    peer.close()
    assert [call.result() for call in calls] == [True] * 3


@linux
@pytest.mark.slow
def test_join_does_not_poll(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    ours, peer = tcp()
    closer.close(ours)
    with Call(lambda: closer.join(DEADLINE)) as call:
        assert call.native_id is not None
        wait_until_asleep(call.native_id)
        woken = thread_status(call.native_id, "voluntary_ctxt_switches")
        call.join(0.3)  # to look for something that must not happen
        assert thread_status(call.native_id, "voluntary_ctxt_switches") == woken
        peer.close()
        assert call.result()


def test_when_idle_calls_once_and_from_the_closers_thread(closers: CloserMaker, tcp: PairMaker) -> None:
    """What join stands on."""
    closer = closers(LONG)
    called: list[threading.Thread] = []
    closer._loop.when_idle(lambda: called.append(threading.current_thread()))
    assert called == [threading.current_thread()], "nothing is pending: at once"
    (ours, peer), (other, other_peer) = tcp(), tcp()
    closer.close_all([ours, other])
    closer._loop.when_idle(lambda: called.append(threading.current_thread()))
    peer.close()
    wait_until(lambda: closer.pending == 1)
    assert len(called) == 1
    other_peer.close()
    wait_until(lambda: len(called) == 2)
    assert called[1].name == "lingerx-closer"
    again, again_peer = tcp()
    again_peer.close()
    closer.submit(again).result(DEADLINE)
    assert closer.join(DEADLINE)
    assert len(called) == 2


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


@pytest.mark.parametrize("later", ["longer", "shorter"])
def test_earliest_deadline_of_two_shutdowns_counts(closers: CloserMaker, tcp: PairMaker, later: str) -> None:
    closer = closers(LONG)
    ours, _ = tcp()
    future = closer.submit(ours)
    first, second = (DEADLINE, SHORT) if later == "shorter" else (0.1, DEADLINE)
    with Call(lambda: closer.shutdown(first)) as call:
        wait_until(lambda: not closer._loop.is_open())
        started = time.perf_counter()
        stats = closer.shutdown(second)
        assert time.perf_counter() - started < 1.0
    assert call.result() == stats
    assert nonzero(stats) == {Outcome.TIMED_OUT: 1}
    assert future.result(0).elapsed < 1.0


def test_shutdown_by_the_callback_of_a_future(closers: CloserMaker, tcp: PairMaker) -> None:
    """In the closer's own thread, which cannot wait for itself; the others finish all the same."""
    closer = closers(LONG)
    (ours, peer), (silent, _), (late, _) = tcp(), tcp(), tcp()
    seen: list[Stats] = []
    refused: list[RuntimeError] = []

    def leave(_: Future[Report]) -> None:
        seen.append(closer.shutdown(SHORT))
        try:
            closer.close(late)
        except RuntimeError as error:
            refused.append(error)

    future = closer.submit(silent)
    closer.submit(ours).add_done_callback(leave)
    peer.close()
    assert future.result(DEADLINE).outcome is Outcome.TIMED_OUT
    stats = closer.shutdown()
    assert seen[0].pending == 1
    assert len(refused) == 1
    assert nonzero(stats) == {Outcome.PEER_CLOSED: 1, Outcome.TIMED_OUT: 1}
    assert late.fileno() != -1


def test_shutdown_waits_for_the_callbacks_of_what_it_ended(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    told = []
    closer.submit(tcp()[0]).add_done_callback(lambda future: told.append(future.result(0).outcome))
    closer.shutdown(0.0)
    assert told == [Outcome.TIMED_OUT]


@pytest.mark.slow
def test_shutdown_does_not_wait_for_a_callback_for_ever(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    stop = threading.Event()
    closer.submit(tcp()[0]).add_done_callback(lambda _: stop.wait(DEADLINE))
    started = time.perf_counter()
    stats = closer.shutdown(0.0)
    assert time.perf_counter() - started < DEADLINE / 2
    assert nonzero(stats) == {Outcome.TIMED_OUT: 1}
    stop.set()


def test_shutdown_ends_the_thread_and_frees_its_fds_while_the_object_lives(
    closers: CloserMaker, tcp: PairMaker
) -> None:
    pairs = [tcp() for _ in range(3)]
    fds, threads = open_fds(), threading.active_count()
    closer = closers(LONG)
    closer.close_all(ours for ours, _ in pairs)
    closer.shutdown(0.0)
    assert threading.active_count() == threads
    left = open_fds()
    assert len(left) == len(fds) - len(pairs)
    assert left.items() <= fds.items()
    assert closer.stats().handed_over == len(pairs)


def test_shutdown_frees_the_fds_of_one_that_was_never_used(closers: CloserMaker) -> None:
    fds = open_fds()
    closer = closers()
    closer.shutdown()
    assert open_fds() == fds
    assert closer.stats().handed_over == 0


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


# Garbage --------------------------------------------------------------------------------------------------


def test_closer_that_was_shut_down_is_collected_with_all_it_has(engine_name: str, tcp: PairMaker) -> None:
    kind = closer_over(engine_name)
    fds, threads = len(open_fds()), threading.active_count()
    closer = kind(LONG)
    ours, peer = tcp()
    future = closer.submit(ours)
    peer.close()
    assert future.result(DEADLINE).outcome is Outcome.PEER_CLOSED
    closer.shutdown()
    known = weakref.ref(closer)
    del closer, ours
    gc.collect()
    assert known() is None
    assert (len(open_fds()), threading.active_count()) == (fds, threads)


def test_closer_that_nobody_holds_closes_its_sockets_and_ends(engine_name: str, tcp: PairMaker) -> None:
    """At once: no reference leads back to it, the collector is not needed."""
    before = set(threading.enumerate())
    (ours, peer), (other, _), (long, long_peer) = tcp(), tcp(), tcp(**SMALL_BUFFERS)
    known, known_other, known_long = identity(ours), identity(other), identity(long)
    closer = closer_over(engine_name)(LONG)
    alive = weakref.ref(closer)
    fds = len(open_fds())
    closer.close(ours)
    closer.close(other, Drain(timeout=SHORT))
    assert closer.send_and_close(long, MORE_THAN_FITS)
    future = closer.submit(tcp()[0], Drain(timeout=SHORT))
    del closer
    assert alive() is None
    assert still_open(known)
    peer.close()
    assert read_to_end(long_peer) == Ending(len(MORE_THAN_FITS), None)
    long_peer.close()
    assert future.result(DEADLINE).outcome is Outcome.TIMED_OUT
    wait_until(lambda: not (still_open(known) or still_open(known_other) or still_open(known_long)))
    wait_until(lambda: set(threading.enumerate()) <= before)
    gc.collect()
    assert len(open_fds()) < fds


def test_method_alone_keeps_its_closer(engine_name: str, unix_pair: PairMaker) -> None:
    """As a bound method does: somebody may pass on `closer.close` as a callback, and keep nothing else."""
    before = set(threading.enumerate())
    kind = closer_over(engine_name)
    (ours, peer), (other, other_peer), (third, third_peer) = unix_pair(), unix_pair(), unix_pair()
    close, send_and_close = kind(LONG).close, kind(LONG).send_and_close
    gc.collect()
    close(ours)
    assert send_and_close(other, b"answer")
    kind(LONG).close(third)
    for each in (peer, other_peer, third_peer):
        read_to_end(each)
        each.close()
    del close, send_and_close
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_closer_in_a_circle_of_garbage(engine_name: str, tcp: PairMaker) -> None:
    before = set(threading.enumerate())
    ours, peer = tcp()
    closer = closer_over(engine_name)(LONG)
    future = closer.submit(ours)
    vars(closer)["itself"] = closer
    del closer
    gc.collect()
    peer.close()
    assert future.result(DEADLINE).outcome is Outcome.PEER_CLOSED
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_closer_that_was_never_used_is_collected(engine_name: str) -> None:
    kind = closer_over(engine_name)
    fds = len(open_fds())
    closers = [kind() for _ in range(20)]
    del closers
    gc.collect()
    assert len(open_fds()) == fds


def test_nothing_of_a_socket_is_kept(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)

    class Remembered(socket.socket):
        pass

    ours, _ = tcp()
    sock = Remembered(fileno=ours.detach())
    remembered = weakref.ref(sock)
    closer.close(sock)
    del sock
    gc.collect()
    assert remembered() is None
    assert closer.pending == 1
