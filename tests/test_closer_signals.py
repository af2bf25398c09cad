"""Closer and signals: Python's handlers run in the main thread, may use the closer themselves, and may raise."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from closers import LONG, MORE_THAN_FITS, CloserMaker, assert_adds_up, linux, nonzero, thread_of, thread_status
from connections import DEADLINE, SMALL_BUFFERS, PairMaker, identity, still_open, wait_until
from lingerx import Drain, Outcome
from peers import FloodingProcess, read_to_end
from test_interruptions import Counter, Interrupted, alarms, press_control_c, raise_interrupted

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no interval timers on Windows")


@pytest.fixture(autouse=True)
def alarms_as_before() -> Iterator[None]:
    """Whatever moment an alarm has hit. And the main thread's own signals are never left blocked."""
    before, mask = signal.getsignal(signal.SIGALRM), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    assert signal.pthread_sigmask(signal.SIG_SETMASK, mask) == mask


@linux
def test_thread_blocks_all_signals(closers: CloserMaker, tcp: PairMaker) -> None:
    mine = thread_status(threading.get_native_id(), "SigBlk")
    ours, _ = tcp()
    closer = closers(LONG)
    closer.close(ours)
    thread = thread_of(closer)
    blocked = int(thread_status(thread, "SigBlk"), 16)
    # All but those that cannot be blocked; the C library keeps two of its own (signal(7), 32 and 33) to itself.
    wanted = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    assert [number for number in wanted if not blocked >> (number - 1) & 1] == []
    assert thread_status(threading.get_native_id(), "SigBlk") == mine


def test_signal_to_the_process_is_handled_by_the_main_thread(closers: CloserMaker, tcp: PairMaker) -> None:
    ran_in = []
    done = threading.Event()

    def handle(number: int, frame: object) -> None:
        ran_in.append(threading.current_thread())
        done.set()

    ours, _ = tcp()
    closer = closers(LONG)
    closer.close(ours)
    previous = signal.signal(signal.SIGALRM, handle)
    try:
        os.kill(os.getpid(), signal.SIGALRM)  # to any thread that does not block it
        assert done.wait(DEADLINE)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert ran_in == [threading.main_thread()]
    assert closer.pending == 1


def test_handlers_run_while_the_closer_is_busy(closers: CloserMaker, tcp: PairMaker) -> None:
    """It has a flood to discard and turns without end, and the main thread waits in C for something else."""
    closer = closers(LONG)
    ours, peer = tcp()
    count = Counter()
    with FloodingProcess() as flooding, flooding.flood(peer, ours):
        future = closer.submit(ours, Drain(timeout=0.2, on_timeout="abort"))
        with alarms(count, every=0.005):
            assert future.result(DEADLINE).outcome is Outcome.TIMED_OUT
    assert count.calls >= 10


def test_handler_uses_the_closer_that_is_in_use(closers: CloserMaker, unix_pair: PairMaker) -> None:
    closer = closers(LONG)
    for_handler = [unix_pair() for _ in range(50)]
    pairs = [unix_pair() for _ in range(400)]
    left = list(for_handler)

    def close_another() -> None:
        if left:
            ours, peer = left.pop()
            closer.send_and_close(ours, b"answer")
            assert peer.recv(100) == b"answer"
            peer.close()
            assert_adds_up(closer.stats())

    with alarms(close_another, every=0.0005):
        for ours, peer in pairs:
            closer.close(ours)
            peer.close()
        wait_until(lambda: not left)
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: len(pairs) + len(for_handler)}
    assert_adds_up(closer.stats())


@pytest.mark.slow
def test_handler_shuts_down_the_closer_that_is_in_use(closers: CloserMaker, unix_pair: PairMaker) -> None:
    closer = closers(LONG)
    pairs = [unix_pair() for _ in range(500)]
    known = [identity(ours) for ours, _ in pairs]
    taken = 0

    def shut_down() -> None:
        closer.shutdown(0.0)

    with alarms(shut_down, every=0.0, first=0.002):
        for ours, _ in pairs:
            try:
                closer.close(ours)
            except RuntimeError:
                break
            taken += 1
        wait_until(lambda: not closer._loop.is_open())
    stats = closer.shutdown()
    assert [still_open(each) for each in known] == [False] * taken + [True] * (len(pairs) - taken)
    assert nonzero(stats) == ({Outcome.TIMED_OUT: taken} if taken else {})
    assert_adds_up(stats)


# Handlers that raise --------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [raise_interrupted, press_control_c], ids=["handler", "control_c"])
@pytest.mark.parametrize("way", ["close", "send_and_close", "submit", "close_all"])
def test_handler_raises_at_any_moment_of_a_hand_over(
    closers: CloserMaker, unix_pair: PairMaker, act: Callable[[], None], way: str
) -> None:
    """Either the socket is untouched, or the closer or the kernel has it: closed once, and counted at most once."""
    closer = closers(Drain(timeout=DEADLINE))
    raised = untouched = 0
    rounds = 150
    for microseconds in range(2, 2 + 2 * rounds, 2):
        ours, peer = unix_pair()
        known = identity(ours)
        try:
            with alarms(act, every=0.0, first=microseconds * 1e-6):
                if way == "close":
                    closer.close(ours)
                elif way == "send_and_close":
                    closer.send_and_close(ours, b"answer")
                elif way == "submit":
                    closer.submit(ours)
                else:
                    closer.close_all([ours])
        except (Interrupted, KeyboardInterrupt):
            raised += 1
        if ours.fileno() != -1:
            untouched += 1
            assert still_open(known)
            ours.close()
        ending = read_to_end(peer)  # EOF, whoever has it now
        assert ending.error is None
        assert ending.received in (0, len(b"answer"))
        peer.close()
        wait_until(lambda known=known: not still_open(known))  # type: ignore[misc]
    assert closer.join(DEADLINE)
    stats = closer.stats()
    assert raised > 0
    assert rounds - raised <= stats.handed_over <= rounds - untouched
    assert (stats.pending, stats.buffered) == (0, 0)
    assert_adds_up(stats)


def test_handler_raises_and_what_was_to_be_sent_is_let_go_of(closers: CloserMaker, unix_pair: PairMaker) -> None:
    closer = closers(Drain(timeout=DEADLINE))
    raised = 0
    data = bytearray(MORE_THAN_FITS[: 1 << 20])
    for microseconds in range(5, 1505, 25):
        ours, peer = unix_pair(**SMALL_BUFFERS)
        known = identity(ours)
        try:
            with alarms(raise_interrupted, every=0.0, first=microseconds * 1e-6):
                closer.send_and_close(ours, data)
        except Interrupted:
            raised += 1
        if ours.fileno() != -1:
            ours.close()
        received, error = read_to_end(peer)
        assert error is None
        assert received <= len(data)
        peer.close()
        wait_until(lambda known=known: not still_open(known))  # type: ignore[misc]
        data.append(data.pop())  # BufferError, if it were still held
    assert raised > 0
    assert closer.join(DEADLINE)
    assert closer.stats().buffered == 0
    assert_adds_up(closer.stats())


def test_handler_raises_while_the_first_socket_starts_the_thread(closers: CloserMaker, unix_pair: PairMaker) -> None:
    raised = 0
    for microseconds in range(10, 810, 10):
        closer = closers(LONG)
        ours, peer = unix_pair()
        known = identity(ours)
        try:
            with alarms(raise_interrupted, every=0.0, first=microseconds * 1e-6):
                closer.close(ours)
        except Interrupted:
            raised += 1
        if ours.fileno() != -1:
            closer.close(ours)  # it can be used as ever
        peer.close()
        wait_until(lambda known=known: not still_open(known))  # type: ignore[misc]
        closer.shutdown(0.0)
        assert_adds_up(closer.stats())
        assert closer.pending == 0
    assert raised > 0


def test_control_c_ends_a_join(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    ours, peer = tcp()
    closer.close(ours)
    started = time.perf_counter()
    with alarms(press_control_c, every=0.0, first=0.03), pytest.raises(KeyboardInterrupt):
        closer.join(DEADLINE)
    assert time.perf_counter() - started < DEADLINE / 2
    peer.close()
    assert closer.join(DEADLINE)


def test_control_c_ends_the_wait_of_a_shutdown(closers: CloserMaker, tcp: PairMaker) -> None:
    """The closer is shut down all the same, and its deadline holds."""
    closer = closers(LONG)
    ours, _ = tcp()
    known = identity(ours)
    future = closer.submit(ours)
    with alarms(press_control_c, every=0.0, first=0.02), pytest.raises(KeyboardInterrupt):
        closer.shutdown(0.1)
    assert future.result(DEADLINE).elapsed < 1.0
    assert not still_open(known)
    assert nonzero(closer.shutdown()) == {Outcome.TIMED_OUT: 1}
