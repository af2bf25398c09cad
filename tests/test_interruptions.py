"""Signals while we wait: a handler that raises ends the wait and closes the fd, one that does not costs no time.

In the main thread only, where Python runs its handlers (signal(3)). The alarms come again and again, for one that
comes between two looks for signals and the wait behind them would only be seen with the next.
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

from conformance import SHORT, Engine, facts
from connections import (
    DEADLINE,
    SMALL_BUFFERS,
    Ending,
    PairMaker,
    TcpState,
    fill,
    identity,
    queued_input,
    still_open,
    tcp_state,
)
from lingerx import Background, Drain, Flush, KernelLinger, Outcome
from peers import FloodingProcess, SlowReader, read_to_end, reset

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no interval timers on Windows")

OFTEN = 0.005
"""Seconds between two alarms."""


class Interrupted(Exception):
    """What a handler raises here."""


@contextmanager
def alarms(handler: Callable[[], None], every: float = OFTEN, first: float = 0.0) -> Iterator[None]:
    """Call `handler` every so many seconds; before the `first` one, another time."""

    def handle(number: int, frame: FrameType | None) -> None:
        handler()

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, first or every, every)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def raise_interrupted() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)  # once is enough
    raise Interrupted


def press_control_c() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.raise_signal(signal.SIGINT)


def once(condition: Callable[[], bool], act: Callable[[], None] = raise_interrupted) -> Callable[[], None]:
    """A handler that does nothing until `condition` holds: an alarm may come before the call has begun."""

    def handler() -> None:
        if condition():
            act()

    return handler


def half_closed(sock: socket.socket) -> bool:
    """Borrows: whether our FIN is on its way."""
    return tcp_state(sock) is not TcpState.ESTABLISHED


# Handlers that raise --------------------------------------------------------------------------------------

Close = Callable[[socket.socket], object]


@pytest.fixture(params=["close", "close_fd", "close_all", "send_and_close", "flush", "flush_all"])
def waiting_close(request: pytest.FixtureRequest, engine: Engine) -> Close:
    """Every call that waits, on every path: for input, for an ACK, for room; alone and with others."""
    ways: dict[str, Close] = {
        "close": lambda sock: engine.close(sock, Drain(timeout=DEADLINE)),
        "close_fd": lambda sock: engine.close_fd(sock.detach(), Drain(timeout=DEADLINE)),
        "close_all": lambda sock: engine.close_all([sock], Drain(timeout=DEADLINE)),
        "send_and_close": lambda sock: engine.send_and_close(sock, b"", Drain(timeout=DEADLINE)),
        "flush": lambda sock: engine.close(sock, Flush(timeout=DEADLINE)),
        "flush_all": lambda sock: engine.close_all([sock], Flush(timeout=DEADLINE)),
    }
    return ways[request.param]


@pytest.mark.parametrize(
    ("act", "error"),
    [(raise_interrupted, Interrupted), (press_control_c, KeyboardInterrupt)],
    ids=["handler", "control_c"],
)
def test_handler_raises_while_we_wait(
    waiting_close: Close, tcp: PairMaker, act: Callable[[], None], error: type[BaseException]
) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    sent = fill(ours)
    known = identity(ours)
    started = time.perf_counter()
    with ours.dup() as copy, alarms(once(lambda: half_closed(copy), act)), pytest.raises(error):
        waiting_close(ours)
    assert time.perf_counter() - started < DEADLINE / 2
    assert ours.fileno() == -1
    assert not still_open(known)
    assert read_to_end(peer) == Ending(sent, None), "the kernel got the rest"


def test_handler_raises_while_the_rest_is_still_to_be_sent(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    known = identity(ours)
    data = bytearray(4 << 20)
    with alarms(once(lambda: queued_input(peer) > 0)), pytest.raises(Interrupted):
        engine.send_and_close(ours, data, Drain(timeout=DEADLINE))
    assert not still_open(known)
    data.append(0)  # BufferError, if it were still held
    received, error = read_to_end(peer)
    assert 0 < received < 4 << 20
    assert error is None


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_handler_raises_while_a_flood_is_discarded(engine: Engine, tcp: PairMaker, together: bool) -> None:
    """There is always more to do at once then, and still signals are seen."""
    ours, peer = tcp()
    known = identity(ours)
    close: Close = (lambda sock: engine.close_all([sock])) if together else engine.close
    with FloodingProcess() as flooding, ours.dup() as copy, flooding.flood(peer, ours):
        started = time.perf_counter()
        with alarms(once(lambda: half_closed(copy))), pytest.raises(Interrupted):
            close(ours)
        assert time.perf_counter() - started < 1.5, "the default would be 3 s"
        assert not still_open(known)
        reset(copy)


def test_handler_raises_and_all_of_many_are_closed(engine: Engine, tcp: PairMaker) -> None:
    pairs = [tcp() for _ in range(10)]
    for _, peer in pairs[::3]:
        peer.close()
    known = [identity(ours) for ours, _ in pairs]
    with pairs[-1][0].dup() as copy, alarms(once(lambda: half_closed(copy))), pytest.raises(Interrupted):
        engine.close_all([ours for ours, _ in pairs], Drain(timeout=DEADLINE))
    assert not any(map(still_open, known))


@pytest.mark.parametrize("policy", [Drain(timeout=DEADLINE), Background()], ids=["drain", "background"])
def test_handler_raises_before_late_starters_have_begun(
    engine: Engine, tcp: PairMaker, policy: Drain | Background
) -> None:
    pairs = [tcp() for _ in range(4)]
    known = [identity(ours) for ours, _ in pairs]
    started = time.perf_counter()
    with alarms(once(lambda: pairs[-1][0].fileno() < 0)), pytest.raises(Interrupted):
        engine.close_all([ours for ours, _ in pairs], policy, spread=DEADLINE)
    assert time.perf_counter() - started < DEADLINE / 4
    assert not any(map(still_open, known))
    assert [read_to_end(peer) for _, peer in pairs] == [Ending(0, None)] * 4


def test_handler_raises_while_the_kernel_lingers(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    sent = fill(ours)
    known = identity(ours)
    started = time.perf_counter()
    with alarms(once(lambda: ours.fileno() < 0)), pytest.raises(Interrupted):
        engine.close(ours, KernelLinger(int(DEADLINE)))
    assert time.perf_counter() - started < DEADLINE / 2
    assert not still_open(known)
    assert read_to_end(peer) == Ending(sent, None)


def test_handler_raises_at_any_moment(engine: Engine, tcp: PairMaker) -> None:
    """Either the socket is untouched, or it is closed."""
    raised = 0
    for microseconds in range(10, 1010, 10):
        ours, peer = tcp()
        known = identity(ours)
        try:
            with alarms(raise_interrupted, first=microseconds * 1e-6):
                engine.close(ours, Drain(timeout=SHORT))
        except Interrupted:
            raised += 1
        assert still_open(known) is (ours.fileno() != -1)
        ours.close()
        peer.close()
    assert raised > 50


# Handlers that do not -------------------------------------------------------------------------------------


class Counter:
    """A handler that only counts."""

    calls = 0

    def __call__(self) -> None:
        self.calls += 1


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
@pytest.mark.parametrize("kind", ["drain", "flush", "sending"])
def test_wait_goes_on_for_the_remaining_time(engine: Engine, tcp: PairMaker, kind: str, together: bool) -> None:
    ours, _ = tcp(**SMALL_BUFFERS)
    count = Counter()
    if kind == "flush":
        fill(ours)
    with alarms(count):
        if kind == "sending":
            report = engine.send_and_close(ours, bytes(4 << 20), Drain(timeout=0.1))
        else:
            policy = Drain(timeout=0.1) if kind == "drain" else Flush(timeout=0.1)
            report = engine.close_all([ours], policy)[0] if together else engine.close(ours, policy)
    assert report.outcome is Outcome.TIMED_OUT
    assert 0.1 <= report.elapsed < 0.2
    assert count.calls >= 5


def test_idle_time_is_not_begun_anew_by_a_signal(engine: Engine, tcp: PairMaker) -> None:
    ours, _ = tcp()
    count = Counter()
    with alarms(count):
        report = engine.close(ours, Drain(timeout=DEADLINE, idle_timeout=0.1))
    assert facts(report) == (Outcome.IDLE, 0, 0, None, True)
    assert 0.1 <= report.elapsed < 0.2
    assert count.calls >= 5


def test_slow_reader_is_waited_for_through_signals(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    sent = fill(ours)
    count = Counter()
    with SlowReader(peer, piece=16 * 1024, pause=0.002) as reader:
        with alarms(count):
            report = engine.close(ours, Flush(timeout=DEADLINE))
        assert facts(report) == (Outcome.ACKED, 0, 0, None, True)
    assert reader.ending == Ending(sent, None)
    assert count.calls >= 3


def test_handler_closes_another_socket_meanwhile(engine: Engine, tcp: PairMaker) -> None:
    """The library may be used where it is being used."""
    (ours, peer), (other, other_peer) = tcp(), tcp()
    other_peer.close()
    outcomes = []

    def close_the_other() -> None:
        outcomes.append(engine.close(other).outcome)
        if len(outcomes) == 2:
            peer.close()

    with alarms(close_the_other):
        report = engine.close(ours, Drain(timeout=DEADLINE))
    assert facts(report) == (Outcome.PEER_CLOSED, 0, 0, None, True)
    assert outcomes[:2] == [Outcome.PEER_CLOSED, Outcome.ALREADY_CLOSED]
