"""Closer: the last bytes, sent in the background while input is discarded, and the memory that is kept for them."""

from __future__ import annotations

import errno
import gc
import os
import socket
import sys
import weakref
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

from closers import LONG, MORE_THAN_FITS, CloserMaker, assert_adds_up, nonzero
from conformance import SHORT, facts
from connections import DEADLINE, SMALL_BUFFERS, Ending, PairMaker, identity, still_open, wait_until
from lingerx import Drain, Flush, Outcome
from peers import Call, Polite, SlowReader, WritesFirst, read_to_end, reset

ANSWER = bytes(range(256)) * 40


# What is sent -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, partial(array, "H")], ids=str)
def test_what_the_kernel_takes_at_once(
    closers: CloserMaker, any_pair: PairMaker, kind: Callable[[bytes], bytes]
) -> None:
    closer = closers()
    ours, peer = any_pair()
    data = kind(ANSWER)
    with Polite(peer) as client:
        assert closer.send_and_close(ours, data)
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


@pytest.mark.slow
def test_client_that_writes_its_whole_body_before_it_reads(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    ours, peer = tcp()
    body, answer = bytes(8 << 20), bytes(16 << 20)
    with WritesFirst(peer, body) as client:
        assert closer.send_and_close(ours, answer)
        assert closer.join(DEADLINE)
    assert client.ending == Ending(len(answer), None)
    stats = closer.stats()
    assert stats.drained == len(body)
    assert stats.buffered == 0
    assert nonzero(stats) == {Outcome.PEER_CLOSED: 1}


def test_flush_sends_the_rest_too(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers()
    ours, peer = tcp(**SMALL_BUFFERS)
    future = closer.submit(ours, Flush(timeout=DEADLINE), data=MORE_THAN_FITS)
    assert read_to_end(peer) == Ending(len(MORE_THAN_FITS), None)
    assert facts(future.result(DEADLINE)) == (Outcome.ACKED, 0, 0, None, True)


def test_many_rests_at_once(closers: CloserMaker, unix_pair: PairMaker) -> None:
    closer = closers(LONG)
    pairs = [unix_pair(**SMALL_BUFFERS) for _ in range(8)]
    assert all(closer.send_and_close(ours, MORE_THAN_FITS) for ours, _ in pairs)
    assert closer.stats().buffered == 8 * len(MORE_THAN_FITS)
    with ExitStack() as peers:
        readers = [peers.enter_context(Polite(peer)) for _, peer in pairs]
    assert [reader.ending for reader in readers] == [Ending(len(MORE_THAN_FITS), None)] * 8
    assert closer.join(DEADLINE)
    assert closer.stats().buffered == 0
    assert_adds_up(closer.stats())


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


def closed_elsewhere(ours: socket.socket, _: socket.socket) -> None:
    os.close(ours.fileno())


def half_closed(ours: socket.socket, _: socket.socket) -> None:
    ours.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("before", [closed_elsewhere, half_closed, lambda _, peer: reset(peer)], ids=str)
def test_nothing_can_be_sent_any_more(
    closers: CloserMaker, tcp: PairMaker, before: Callable[[socket.socket, socket.socket], None]
) -> None:
    closer = closers()
    ours, peer = tcp()
    before(ours, peer)
    assert closer.send_and_close(ours, b"answer") is False
    assert ours.fileno() == -1


def test_was_never_connected(closers: CloserMaker) -> None:
    closer = closers()
    assert closer.send_and_close(socket.socket(), b"answer") is False
    assert closer.send_and_close(socket.socket(), b"") is True


def test_peer_has_reset_before_we_send(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers()
    ours, peer = tcp()
    reset(peer)
    report = closer.submit(ours, data=ANSWER).result(DEADLINE)
    assert report.outcome is Outcome.PEER_RESET
    assert report.delivered is False


def test_peer_resets_while_the_rest_is_sent(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    ours, peer = tcp(**SMALL_BUFFERS)
    future = closer.submit(ours, data=MORE_THAN_FITS)
    peer.recv(1)
    reset(peer)
    report = future.result(DEADLINE)
    assert (report.outcome, report.delivered) == (Outcome.PEER_RESET, False)
    assert closer.stats().buffered == 0


@pytest.mark.parametrize("on_timeout", ["background", "abort"])
def test_rest_is_lost_at_the_end(closers: CloserMaker, tcp: PairMaker, on_timeout: Any) -> None:
    closer = closers(Drain(timeout=DEADLINE, on_timeout=on_timeout))
    ours, peer = tcp(**SMALL_BUFFERS)
    future = closer.submit(ours, data=MORE_THAN_FITS)
    assert closer.shutdown(0.0).buffered == 0
    report = future.result(0)
    assert (report.outcome, report.delivered) == (Outcome.TIMED_OUT, False)
    received, error = read_to_end(peer)
    assert received < len(MORE_THAN_FITS)
    assert error == (errno.ECONNRESET if on_timeout == "abort" else None)


# What is kept ---------------------------------------------------------------------------------------------


def references(data: object) -> int:
    gc.collect()
    return sys.getrefcount(data)


def test_bytes_are_kept_by_reference_and_let_go_of(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    data = bytes(len(MORE_THAN_FITS))
    nobody_elses = references(data)
    (ours, peer), (other, other_peer) = tcp(**SMALL_BUFFERS), tcp()
    other_peer.close()
    closer.submit(other, data=b"short").result(DEADLINE)
    future = closer.submit(ours, data=data)
    assert references(data) == nobody_elses + 1
    assert read_to_end(peer) == Ending(len(data), None)
    peer.close()
    assert future.result(DEADLINE).outcome is Outcome.PEER_CLOSED
    assert references(data) == nobody_elses


def test_bytes_that_the_kernel_took_are_not_kept(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    data = bytes(100)
    nobody_elses = references(data)
    ours, _ = tcp()
    closer.send_and_close(ours, data)
    assert references(data) == nobody_elses
    assert closer.stats()[1:3] == (1, 0)


@pytest.mark.parametrize("whole", [False, True], ids=["a_part_of_it", "all_of_it"])
def test_what_the_caller_may_change_is_copied(closers: CloserMaker, unix_pair: PairMaker, whole: bool) -> None:
    """Also a view of it, and nothing of it is held: a bytearray that is held cannot grow."""
    closer = closers(LONG)
    ours, peer = unix_pair(**SMALL_BUFFERS)
    data = bytearray(MORE_THAN_FITS)
    closer.send_and_close(ours, data if whole else memoryview(data)[: len(data) // 2])
    data.append(0)
    data[:] = bytes(len(data))
    received = bytearray()
    while piece := peer.recv(1 << 20):
        received += piece
    assert received == (MORE_THAN_FITS if whole else MORE_THAN_FITS[: len(MORE_THAN_FITS) // 2])
    peer.close()
    assert closer.join(DEADLINE)


def test_data_is_let_go_of_when_it_was_sent(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)

    class Kept(bytearray):
        pass

    data = Kept(MORE_THAN_FITS)
    remembered = weakref.ref(data)
    ours, peer = tcp(**SMALL_BUFFERS)
    future = closer.submit(ours, data=data)
    del data
    with Call(lambda: read_to_end(peer)) as reading:
        assert reading.result() == Ending(len(MORE_THAN_FITS), None)
    peer.close()
    future.result(DEADLINE)
    gc.collect()
    assert remembered() is None


# max_buffered ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_full", ["shed_oldest", "background", "abort_oldest"])
def test_more_data_than_is_kept(closers: CloserMaker, tcp: PairMaker, on_full: str) -> None:
    closer = closers(LONG, max_buffered=len(MORE_THAN_FITS), on_full=on_full)
    (ours, peer), (other, other_peer), (third, third_peer), (fourth, _) = (tcp(**SMALL_BUFFERS) for _ in range(4))
    known, known_fourth = identity(other), identity(fourth)
    kept = closer.submit(ours, data=MORE_THAN_FITS)
    assert closer.stats().buffered == len(MORE_THAN_FITS)
    report = closer.submit(other, data=MORE_THAN_FITS).result(DEADLINE)
    assert (report.outcome, report.delivered) == (Outcome.SHED, False)
    assert closer.send_and_close(fourth, MORE_THAN_FITS) is False
    wait_until(lambda: not still_open(known) and not still_open(known_fourth))
    received, error = read_to_end(other_peer)
    assert received < len(MORE_THAN_FITS)
    assert error == (errno.ECONNRESET if on_full == "abort_oldest" else None)
    with Polite(third_peer) as client:  # what the kernel takes at once needs no memory
        assert closer.submit(third, data=b"short").result(DEADLINE).outcome is Outcome.PEER_CLOSED
    assert client.ending == Ending(5, None)
    assert closer.stats().buffered == len(MORE_THAN_FITS)
    with SlowReader(peer) as reader:
        assert kept.result(DEADLINE).outcome is Outcome.PEER_CLOSED
    assert reader.ending == Ending(len(MORE_THAN_FITS), None)
    assert closer.stats().buffered == 0
    assert nonzero(closer.stats()) == {Outcome.SHED: 2, Outcome.PEER_CLOSED: 2}
    assert_adds_up(closer.stats())


def test_there_is_room_again_when_data_was_sent(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG, max_buffered=len(MORE_THAN_FITS))
    for _ in range(3):
        ours, peer = tcp(**SMALL_BUFFERS)
        assert closer.send_and_close(ours, MORE_THAN_FITS) is True
        assert read_to_end(peer) == Ending(len(MORE_THAN_FITS), None)
        peer.close()
        assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 3}


def test_one_byte_more_than_is_kept(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG, max_buffered=len(MORE_THAN_FITS) - 1)
    ours, _ = tcp(**SMALL_BUFFERS)
    assert closer.send_and_close(ours, MORE_THAN_FITS) is False
    assert closer.join(DEADLINE)
    assert closer.stats().buffered == 0


def test_no_data_is_kept_at_all(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG, max_buffered=0)
    (ours, peer), (other, _) = tcp(), tcp(**SMALL_BUFFERS)
    assert closer.send_and_close(ours, b"short")
    assert read_to_end(peer) == Ending(5, None)
    assert not closer.send_and_close(other, MORE_THAN_FITS)


# What a connection says only once --------------------------------------------------------------------------


def test_error_that_is_told_only_once(closers: CloserMaker, refused: socket.socket) -> None:
    report = closers().submit(refused, data=b"answer").result(DEADLINE)
    assert (report.outcome, report.error, report.delivered) == (Outcome.FAILED, errno.ECONNREFUSED, False)


# Memory of a future ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [SHORT, DEADLINE])
def test_data_does_not_live_as_long_as_the_future(closers: CloserMaker, tcp: PairMaker, timeout: float) -> None:
    """Sent, or given up: nobody but the caller holds it afterwards."""
    closer = closers(Drain(timeout=timeout))
    ours, peer = tcp(**SMALL_BUFFERS)
    data = bytes(len(MORE_THAN_FITS))
    before = sys.getrefcount(data)
    future = closer.submit(ours, data=data)
    if timeout == DEADLINE:
        read_to_end(peer)
        peer.close()
    assert future.result(DEADLINE).outcome is (Outcome.TIMED_OUT if timeout == SHORT else Outcome.PEER_CLOSED)
    assert closer.join(DEADLINE)
    wait_until(lambda: sys.getrefcount(data) == before)
    del future
