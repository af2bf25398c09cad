"""The limits are exact, waiting costs no CPU, and an ACK is seen when it comes.

These are contracts about time, so time is asserted: as a median over many closes, or as CPU time and wake-ups of one
thread, which a busy machine hardly moves. `test_outcomes` has the counts and the outcomes.
"""

from __future__ import annotations

import select
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from conformance import Engine, facts
from connections import (
    DEADLINE,
    SMALL_BUFFERS,
    Connection,
    Ending,
    PairMaker,
    TcpState,
    fill,
    fill_and_settle,
)
from lingerx import Drain, Flush, Outcome, Policy, Report
from peers import Dripping, FloodingProcess, SlowReader, read_to_end, send_unread

if sys.platform != "win32":
    import resource

linux = pytest.mark.skipif(sys.platform != "linux", reason="the ACK wake-up and a thread's own counters are Linux'")

LIMIT = 0.05
EXACT = 0.005
"""Seconds: a 50 ms timeout is 50 ms, within 5 ms."""
TIMES = 20
"""Closes for a median."""


def timed_close(engine: Engine, ours: socket.socket, policy: Policy, expected: Outcome) -> float:
    """Close, and return the seconds that it took."""
    started = time.perf_counter()
    report = engine.close(ours, policy)
    took = time.perf_counter() - started
    assert report.outcome is expected
    assert report.elapsed <= took
    return took


def assert_exact(took: list[float]) -> None:
    """Never early; and the median within 5 ms."""
    assert min(took) >= LIMIT
    assert statistics.median(took) - LIMIT < EXACT


# The three limits -----------------------------------------------------------------------------------------


@pytest.mark.slow  # 20 times 50 ms
@pytest.mark.parametrize("policy", [Drain(timeout=LIMIT), Flush(timeout=LIMIT)], ids=["drain", "flush"])
def test_timeout_against_a_peer_that_never_stops_sending(engine: Engine, policy: Policy, tcp: PairMaker) -> None:
    took = []
    with FloodingProcess() as flooding:
        for _ in range(TIMES):
            ours, peer = tcp(**SMALL_BUFFERS)
            fill(ours)  # what is never read, so that Flush has something to wait for
            with flooding.flood(peer, ours):
                took.append(timed_close(engine, ours, policy, Outcome.TIMED_OUT))
    assert_exact(took)


@pytest.mark.slow  # 20 times 50 ms
@pytest.mark.parametrize("every", [DEADLINE, 0.001], ids=["silent", "dripping"])
def test_timeout_against_a_peer_that_sends_little_or_nothing(engine: Engine, every: float, tcp: PairMaker) -> None:
    took = []
    for _ in range(TIMES):
        ours, peer = tcp()
        with Dripping(peer, every):
            took.append(timed_close(engine, ours, Drain(timeout=LIMIT), Outcome.TIMED_OUT))
    assert_exact(took)


@pytest.mark.slow  # 20 times 50 ms
def test_idle_timeout_of_a_peer_that_falls_silent(engine: Engine, tcp: PairMaker) -> None:
    took = []
    for _ in range(TIMES):
        ours, peer = tcp()
        send_unread(peer, ours, b"then nothing")
        took.append(timed_close(engine, ours, Drain(timeout=DEADLINE, idle_timeout=LIMIT), Outcome.IDLE))
    assert_exact(took)


@pytest.mark.slow  # 20 times 50 ms
def test_timeout_while_sending_to_a_peer_that_never_reads(engine: Engine, tcp: PairMaker) -> None:
    took = []
    for _ in range(TIMES):
        ours, _ = tcp(**SMALL_BUFFERS)
        started = time.perf_counter()
        report = engine.send_and_close(ours, bytes(1 << 20), Drain(timeout=LIMIT))
        took.append(time.perf_counter() - started)
        assert report.outcome is Outcome.TIMED_OUT
    assert_exact(took)


def test_byte_limit_stops_a_flood_long_before_the_timeout(engine: Engine, tcp: PairMaker) -> None:
    limit = (1 << 20) + 1
    took = []
    with FloodingProcess() as flooding:
        for _ in range(TIMES):
            ours, peer = tcp()
            with flooding.flood(peer, ours):
                started = time.perf_counter()
                report = engine.close(ours, Drain(timeout=DEADLINE, max_bytes=limit))
                took.append(time.perf_counter() - started)
            assert (report.outcome, report.drained) == (Outcome.BYTE_LIMIT, limit)
    assert statistics.median(took) < LIMIT


# A timeout of nothing: what can be done without waiting is done --------------------------------------------


def test_no_time_is_enough_for_input_that_is_there(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp()
    send_unread(peer, ours, bytes(50_000))
    peer.close()
    assert facts(engine.close(ours, Drain(timeout=0))) == (Outcome.PEER_CLOSED, 50_000, 0, None, True)


def test_no_time_discards_what_is_there_and_leaves_at_once(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp()
    send_unread(peer, ours, bytes(50_000))
    report = engine.close(ours, Drain(timeout=0))
    assert facts(report) == (Outcome.TIMED_OUT, 50_000, 0, None, True)
    assert report.elapsed < LIMIT
    assert read_to_end(peer) == Ending(0, None), "nothing was unread any more, so there was no reset"


def test_no_time_sends_what_the_kernel_takes(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp()
    report = engine.send_and_close(ours, b"answer", Flush(timeout=0))
    assert report.outcome in (Outcome.ACKED, Outcome.TIMED_OUT), "the ACK may be there at once, or later"
    assert report.delivered is not False
    assert read_to_end(peer) == Ending(len(b"answer"), None)


# Waiting --------------------------------------------------------------------------------------------------


@linux
@pytest.mark.slow  # a median over 100 closes
def test_flush_returns_within_a_millisecond_of_the_ack(engine: Engine, tcp: PairMaker) -> None:
    late = []
    for _ in range(100):
        ours, peer = tcp(**SMALL_BUFFERS)
        side = Connection.of(ours)
        sent = fill(ours)
        with SlowReader(peer, when=lambda side=side: side.state() is TcpState.FIN_WAIT1) as reader:  # type: ignore[misc]
            report = engine.close(ours, Flush(timeout=DEADLINE))
            returned = time.perf_counter()
        assert report.outcome is Outcome.ACKED
        assert reader.ending == Ending(sent, None)
        late.append(returned - reader.ended_at)  # the peer's TCP has ACKed our FIN before its application sees EOF
    assert statistics.median(late) < 0.001


SLOW_READER = """
import socket, sys, time
received = 0
with socket.socket(fileno=int(sys.argv[1])) as sock:
    while data := sock.recv(65536):
        received += len(data)
        time.sleep(0.0002)
print(received)
"""


def start_reader(peer: socket.socket) -> subprocess.Popen[str]:
    fd = peer.fileno()
    command = [sys.executable, "-c", SLOW_READER, str(fd)]
    return subprocess.Popen(command, pass_fds=[fd], stdout=subprocess.PIPE, text=True)


@linux
def test_four_wake_ups_are_enough_for_four_megabytes_to_a_slow_reader(engine: Engine, tcp: PairMaker) -> None:
    """The reader is a process of its own: another thread of ours would make us wait for the interpreter's lock too."""
    ours, peer = tcp(send_buffer=8 << 20, receive_buffer=64 * 1024)
    sent = fill(ours)
    with start_reader(peer) as reader:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        report = engine.close(ours, Flush(timeout=DEADLINE))
        wake_ups = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before
        received, _ = reader.communicate(timeout=DEADLINE)
    assert report.outcome is Outcome.ACKED
    assert int(received) == sent
    assert wake_ups <= 4


# Situations to wait in: each makes one, and returns the call that waits.
Wait = Callable[[float], Report]


def silent(engine: Engine, ours: socket.socket, _: socket.socket) -> Wait:
    return lambda seconds: engine.close(ours, Drain(timeout=seconds))


def silent_among_many(engine: Engine, ours: socket.socket, _: socket.socket) -> Wait:
    return lambda seconds: engine.close_all([ours], Drain(timeout=seconds))[0]


def never_reading(engine: Engine, ours: socket.socket, peer: socket.socket) -> Wait:
    fill_and_settle(ours, peer)
    return lambda seconds: engine.close(ours, Flush(timeout=seconds))


def half_closed_and_never_reading(engine: Engine, ours: socket.socket, peer: socket.socket) -> Wait:
    fill_and_settle(ours, peer)
    peer.shutdown(socket.SHUT_WR)
    return lambda seconds: engine.close(ours, Drain(timeout=seconds))


def half_closed_and_never_reading_among_many(engine: Engine, ours: socket.socket, peer: socket.socket) -> Wait:
    fill_and_settle(ours, peer)
    peer.shutdown(socket.SHUT_WR)
    return lambda seconds: engine.close_all([ours], Flush(timeout=seconds))[0]


def never_reading_while_we_send(engine: Engine, ours: socket.socket, _: socket.socket) -> Wait:
    data = bytes(4 << 20)
    return lambda seconds: engine.send_and_close(ours, data, Drain(timeout=seconds))


def half_closed_while_we_send(engine: Engine, ours: socket.socket, peer: socket.socket) -> Wait:
    data = bytes(4 << 20)
    peer.shutdown(socket.SHUT_WR)
    return lambda seconds: engine.send_and_close(ours, data, Drain(timeout=seconds))


def with_an_error_queue(engine: Engine, ours: socket.socket, _: socket.socket) -> Wait:
    """Time stamps of what was sent lie in the error queue (MSG_ERRQUEUE), and poll says POLLERR as long as they do."""
    so_timestamping, tx_software, software = 37, 1 << 1, 1 << 4  # linux/net_tstamp.h
    ours.setsockopt(socket.SOL_SOCKET, so_timestamping, tx_software | software)
    ours.sendall(b"answer")
    poll = select.poll()
    poll.register(ours, 0)
    assert poll.poll(DEADLINE * 1000) == [(ours.fileno(), select.POLLERR)]
    return lambda seconds: engine.close(ours, Drain(timeout=seconds))


@linux
@pytest.mark.parametrize(
    "situation",
    [
        pytest.param(silent, marks=pytest.mark.slow),  # once, for a whole second
        silent_among_many,
        never_reading,
        half_closed_and_never_reading,
        half_closed_and_never_reading_among_many,
        never_reading_while_we_send,
        half_closed_while_we_send,
        with_an_error_queue,
    ],
    ids=lambda situation: situation.__name__,
)
def test_waiting_costs_no_cpu(
    engine: Engine, tcp: PairMaker, situation: Callable[[Engine, socket.socket, socket.socket], Wait]
) -> None:
    """Nothing that stays true (an end of input, room to write, an error queue) may wake the wait again and again."""
    wait = situation(engine, *tcp(**SMALL_BUFFERS))
    before = time.thread_time()
    report = wait(1.0 if situation is silent else 0.2)
    cpu = time.thread_time() - before
    assert report.outcome is Outcome.TIMED_OUT
    assert cpu < 0.005
