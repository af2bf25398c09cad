"""Who owns the fd: it is closed exactly once, on every path, and nothing else is touched.

That no fd, thread or warning is left is checked after every test of this suite (see conftest). `test_interruptions`
has the signals, `test_arguments` the mistakes that leave a socket with its owner.
"""

from __future__ import annotations

import fcntl
import gc
import os
import resource
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import pytest

from conformance import ANSWER, SHORT, Engine, facts
from connections import (
    DEADLINE,
    SMALL_BUFFERS,
    Ending,
    PairMaker,
    fill,
    identity,
    still_open,
)
from lingerx import Abort, Background, Drain, Flush, KernelLinger, Outcome, Policy, Report
from lingerx._ownership import Hold
from peers import Call, Polite, SlowReader, read_to_end, send_unread

EVERY_POLICY = pytest.mark.parametrize(
    "policy",
    [
        pytest.param(Drain(timeout=0), id="drain_without_time"),
        pytest.param(Drain(timeout=SHORT), id="drain"),
        pytest.param(Flush(timeout=SHORT), id="flush"),
        pytest.param(Flush(timeout=SHORT, on_timeout="abort"), id="flush_or_abort"),
        pytest.param(Flush(timeout=SHORT, reset_after_ack=True), id="flush_and_reset"),
        pytest.param(Background(), id="background"),
        pytest.param(Background(user_timeout=1.0), id="background_on_time"),
        pytest.param(Abort(), id="abort"),
        pytest.param(KernelLinger(1), id="kernel_linger"),
    ],
)


# Closed once ----------------------------------------------------------------------------------------------


@EVERY_POLICY
def test_every_policy_closes_every_kind_of_socket(engine: Engine, any_pair: PairMaker, policy: Policy) -> None:
    ours, peer = any_pair()
    known = identity(ours)
    peer.sendall(b"unread")
    assert engine.close(ours, policy).outcome is not Outcome.ALREADY_CLOSED
    assert ours.fileno() == -1
    assert not still_open(known)


@EVERY_POLICY
def test_second_close_finds_nothing_to_close(engine: Engine, tcp: PairMaker, policy: Policy) -> None:
    ours, peer = tcp()
    peer.close()
    engine.close(ours, Drain(timeout=DEADLINE))
    assert facts(engine.close(ours, policy)) == (Outcome.ALREADY_CLOSED, 0, None, None, None)
    ours.close()


@EVERY_POLICY
def test_number_that_is_reused_afterwards_is_left_alone(engine: Engine, tcp: PairMaker, policy: Policy) -> None:
    ours, peer = tcp()
    fd = ours.fileno()
    peer.close()
    engine.close(ours, policy)
    read_end, write_end = os.pipe()
    os.dup2(read_end, fd)
    try:
        ours.close()
        engine.close(ours, policy)
        del ours
        gc.collect()
        os.write(write_end, b"still open")
        assert os.read(fd, 100) == b"still open"
    finally:
        for number in {fd, read_end, write_end}:
            os.close(number)


def test_engine_keeps_nothing_of_a_socket(engine: Engine, tcp: PairMaker) -> None:
    class Remembered(socket.socket):
        pass

    ours, peer = tcp()
    peer.close()
    socks = [Remembered(fileno=ours.dup().detach()) for _ in range(3)]
    remembered = [weakref.ref(sock) for sock in socks]
    engine.close(socks[0])
    engine.send_and_close(socks[1], b"")
    engine.close_all(socks[2:])
    del socks
    gc.collect()
    assert [ref() for ref in remembered] == [None] * 3


def test_socket_subclass_is_taken_over_without_its_close(engine: Engine, tcp: PairMaker) -> None:
    class Counted(socket.socket):
        closes = 0

        def close(self) -> None:
            self.closes += 1
            super().close()

    ours, peer = tcp()
    sock = Counted(fileno=ours.detach())
    known = identity(sock)
    sock.sendall(ANSWER)
    with Polite(peer) as client:
        assert facts(engine.close(sock)) == (Outcome.PEER_CLOSED, 0, 0, None, True)
    assert client.ending == Ending(len(ANSWER), None)
    assert (sock.fileno(), sock.closes) == (-1, 0)
    assert not still_open(known)


def test_file_objects_of_the_socket_do_not_keep_it_open(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp()
    known = identity(ours)
    reader, writer = ours.makefile("rb"), ours.makefile("wb")
    writer.write(ANSWER)
    writer.flush()
    with Polite(peer) as client:
        assert engine.close(ours).outcome is Outcome.PEER_CLOSED
    assert client.ending == Ending(len(ANSWER), None)
    assert not still_open(known)
    with pytest.raises(OSError, match="Bad file descriptor"):
        reader.read(1)
    reader.close()
    writer.close()
    ours.close()


# Shared with others ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [Drain(timeout=DEADLINE), Flush(timeout=DEADLINE)], ids=["drain", "flush"])
def test_peer_sees_our_fin_although_a_child_process_has_a_copy(
    engine: Engine, any_pair: PairMaker, policy: Policy
) -> None:
    """A dup is to the kernel what an inherited copy is: another descriptor of the same open socket."""
    ours, peer = any_pair()
    ours.sendall(ANSWER)
    with ours.dup() as copy, Polite(peer) as client:
        engine.close(ours, policy)
        client.join(DEADLINE)
        assert client.ending == Ending(len(ANSWER), None)
        assert copy.fileno() > 2


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("default_timeout", [None, 5.0])
def test_nonblocking_flag_stays_as_it_was(
    engine: Engine, tcp: PairMaker, blocking: bool, default_timeout: float | None
) -> None:
    """The flag belongs to the open socket, not to the fd: a copy elsewhere shares it. Looked at while we wait, too."""
    closers: list[Callable[[socket.socket], object]] = [
        lambda sock: engine.close(sock, Drain(timeout=DEADLINE)),
        lambda sock: engine.close_fd(sock.detach(), Drain(timeout=DEADLINE)),
        lambda sock: engine.close_all([sock], Drain(timeout=DEADLINE)),
        lambda sock: engine.send_and_close(sock, b"answer", Drain(timeout=DEADLINE)),
    ]
    for close in closers:
        ours, peer = tcp()
        ours.setblocking(blocking)
        with ours.dup() as copy:
            flags = fcntl.fcntl(copy.fileno(), fcntl.F_GETFL)
            assert bool(flags & os.O_NONBLOCK) is not blocking
            socket.setdefaulttimeout(default_timeout)
            try:
                with Call(partial(close, ours)):
                    assert read_to_end(peer).error is None  # our FIN is out, and we wait
                    assert fcntl.fcntl(copy.fileno(), fcntl.F_GETFL) == flags
                    peer.close()
            finally:
                socket.setdefaulttimeout(None)
            assert fcntl.fcntl(copy.fileno(), fcntl.F_GETFL) == flags


@pytest.mark.parametrize("seconds", [0, 5])
@pytest.mark.parametrize("policy", [Drain(timeout=SHORT), Flush(timeout=SHORT)], ids=["drain", "flush"])
def test_so_linger_of_the_application_neither_blocks_nor_resets(
    engine: Engine, tcp: PairMaker, policy: Policy, seconds: int
) -> None:
    """With it the last close(2) would block for seconds, or destroy what the peer has not read."""
    ours, peer = tcp(**SMALL_BUFFERS)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
    sent = fill(ours)
    started = time.perf_counter()
    assert engine.close(ours, policy).outcome is Outcome.TIMED_OUT
    assert time.perf_counter() - started < 1.0
    assert read_to_end(peer) == Ending(sent, None)


def test_so_linger_of_the_application_does_not_reset_a_peer_that_is_slow_to_close(
    engine: Engine, tcp: PairMaker
) -> None:
    ours, peer = tcp()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ours.sendall(ANSWER)
    assert engine.close(ours, Flush(timeout=DEADLINE)).outcome is Outcome.ACKED
    assert read_to_end(peer) == Ending(len(ANSWER), None)


# No fd left for epoll -------------------------------------------------------------------------------------


@contextmanager
def no_more_fds() -> Iterator[None]:
    """Every further open is EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(0)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 1, hard))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


def test_no_fd_left_and_a_peer_that_stays_silent(engine: Engine, tcp: PairMaker) -> None:
    (ours, peer), (first, _), (second, _) = tcp(), tcp(), tcp()
    with no_more_fds():
        alone = engine.close(ours, Drain(timeout=SHORT))
        together = engine.close_all([first, second], Drain(timeout=SHORT))
    for report in (alone, *together):
        assert facts(report) == (Outcome.TIMED_OUT, 0, 0, None, True)
        assert SHORT <= report.elapsed < 1.0
    assert read_to_end(peer) == Ending(0, None)


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_no_fd_left_and_a_reader_that_stays_open(engine: Engine, tcp: PairMaker, together: bool) -> None:
    """Nothing wakes us for the ACK then; looking again, and soon, has to do."""
    ours, peer = tcp(**SMALL_BUFFERS)
    sent = fill(ours)
    flush = Flush(timeout=DEADLINE)

    def read() -> float:
        assert read_to_end(peer) == Ending(sent, None)
        return time.perf_counter()

    with Call(read) as reading, no_more_fds():
        report = engine.close_all([ours], flush)[0] if together else engine.close(ours, flush)
        returned = time.perf_counter()
    assert facts(report) == (Outcome.ACKED, 0, 0, None, True)
    assert returned - reading.result() < 0.25


def test_no_fd_left_and_much_to_send(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    with SlowReader(peer) as reader, no_more_fds():
        report = engine.send_and_close(ours, bytes(2 << 20), Drain(timeout=DEADLINE))
    assert reader.ending == Ending(2 << 20, None)
    assert facts(report) == (Outcome.PEER_CLOSED, 0, 0, None, True)


@pytest.mark.parametrize("sending", [False, True], ids=["confirming", "sending"])
def test_no_fd_left_and_a_fin_that_must_not_wake_us_again_and_again(
    engine: Engine, tcp: PairMaker, sending: bool
) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    fill(ours)
    peer.shutdown(socket.SHUT_WR)
    data, drain = bytes(1 << 20), Drain(timeout=0.2)
    with no_more_fds():
        before = time.thread_time()
        report = engine.send_and_close(ours, data, drain) if sending else engine.close(ours, drain)
        cpu = time.thread_time() - before
    assert report.outcome is Outcome.TIMED_OUT
    assert cpu < 0.01


# Threads --------------------------------------------------------------------------------------------------


def at_once(functions: list[Callable[[], Report]]) -> list[Report]:
    """What these return, each on a thread of its own, started together."""
    barrier = threading.Barrier(len(functions))

    def run(function: Callable[[], Report]) -> Report:
        barrier.wait(DEADLINE)
        return function()

    calls = [Call(partial(run, function)) for function in functions]
    for call in calls:
        call.start()
    return [call.result() for call in calls]


def test_eight_threads_close_their_own(engine: Engine, any_pair: PairMaker) -> None:
    rounds = 10
    pairs = [any_pair() for _ in range(8 * rounds)]
    for ours, peer in pairs:
        send_unread(peer, ours, b"input")
        peer.close()
    for place in range(0, len(pairs), 8):
        reports = at_once([partial(engine.close, ours) for ours, _ in pairs[place : place + 8]])
        assert [facts(report) for report in reports] == [(Outcome.PEER_CLOSED, 5, 0, None, True)] * 8


def test_eight_threads_wait_together(engine: Engine, tcp: PairMaker) -> None:
    """Nobody holds a lock while it waits."""
    pairs = [tcp() for _ in range(8)]
    started = time.perf_counter()
    reports = at_once([partial(engine.close, ours, Drain(timeout=0.1)) for ours, _ in pairs])
    assert time.perf_counter() - started < 0.4
    assert [report.outcome for report in reports] == [Outcome.TIMED_OUT] * 8


@pytest.mark.parametrize("policy", [Drain(timeout=DEADLINE), Background(), Abort()], ids=["drain", "bg", "abort"])
def test_eight_threads_close_the_same_socket(engine: Engine, tcp: PairMaker, policy: Policy) -> None:
    """One of them closes it; the others find nothing to close, and close nothing else."""
    for _ in range(20):
        ours, peer = tcp()
        peer.close()
        reports = at_once([partial(engine.close, ours, policy) for _ in range(8)])
        others = [report for report in reports if report.outcome is Outcome.ALREADY_CLOSED]
        assert len(others) == 7


def test_another_thread_closes_the_same_object_first(tcp: PairMaker) -> None:
    """The number may be somebody else's by then."""
    ours, peer = tcp()
    hold = Hold(ours, ours.fileno())
    with socket.socket(fileno=ours.detach()) as others:
        with pytest.raises(OSError, match="Bad file descriptor"):
            hold.take()
        hold.give_up()
        peer.sendall(b"still here")
        assert others.recv(100) == b"still here"
