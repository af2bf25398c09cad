"""Closer: fork. The child gives back what is the parent's and starts afresh, and the parent is not disturbed."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial

import pytest

from closers import LONG, MORE_THAN_FITS, CloserMaker, assert_adds_up, linux, nonzero, outcomes
from conformance import facts
from conftest import open_fds
from connections import DEADLINE, SMALL_BUFFERS, Ending, PairMaker, identity, still_open, wait_until
from lingerx import Drain, Outcome, Report
from peers import Call, read_to_end

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def run_in_child(child: Callable[[], object], write_end: int) -> None:
    """Tell what `child()` returns, as text."""
    try:
        text = str(child())
    except BaseException as error:
        text = repr(error)
    os.write(write_end, text.encode())


def fork_and_look(child: Callable[[], object]) -> str:
    """What `child()` returns in a forked child, as text."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        run_in_child(child, write_end)
        os._exit(0)
    os.close(write_end)
    with open(read_end, encoding="utf-8") as stream:
        text = stream.read()
    os.waitpid(pid, 0)
    return text


class LivingChild:
    """As `fork_and_look`, but the child lives for the length of a with-block. `said` is what it returned."""

    def __init__(self, child: Callable[[], object]) -> None:
        read_end, write_end = os.pipe()
        self._wait, self._leave = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            run_in_child(child, write_end)
            os.close(write_end)
            os.close(self._leave)
            os.read(self._wait, 1)
            os._exit(0)
        os.close(write_end)
        with open(read_end, encoding="utf-8") as stream:
            self.said = stream.read()

    def __enter__(self) -> LivingChild:
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self._pid, signal.SIGKILL)  # a younger sibling holds a copy of the pipe
        os.close(self._leave)
        os.close(self._wait)
        os.waitpid(self._pid, 0)


# CPython 3.12 and later warn when a process that has threads forks.
threads_fork = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")


@forks
@linux
@threads_fork
def test_child_has_no_fd_of_the_parents_sockets(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    pairs = [tcp() for _ in range(5)]
    known = [identity(ours) for ours, _ in pairs]
    closer.close_all(ours for ours, _ in pairs[:4])
    wait_until(lambda: closer.pending == 4)
    closer.close(pairs[4][0])  # which may not have been looked at yet

    def look() -> tuple[int, int, list[bool]]:
        return closer.pending, closer.stats().handed_over, [still_open(each) for each in known]

    assert fork_and_look(look) == str((0, 0, [False] * 5))
    assert closer.pending == 5
    assert all(map(still_open, known))
    for _, peer in pairs:
        peer.setblocking(False)
        assert read_to_end(peer) == Ending(0, None)
        peer.sendall(b"the parent reads on")
        peer.close()
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 5}
    assert closer.stats().drained == 5 * len(b"the parent reads on")


@forks
@linux
@threads_fork
def test_child_has_no_fd_of_sockets_that_were_not_looked_at_yet(closers: CloserMaker, tcp: PairMaker) -> None:
    """One the thread knows, one it has taken and leaves alone until it has collected again, one it will take then."""
    collect = 0.4
    closer = closers(LONG, collect=collect)
    pairs = [tcp() for _ in range(3)]
    known = [identity(ours) for ours, _ in pairs]
    futures = [closer.submit(pairs[0][0])]
    for ours, _ in pairs[1:]:
        time.sleep(collect * 0.75)
        futures.append(closer.submit(ours))
    assert fork_and_look(lambda: (closer.pending, list(map(still_open, known)))) == str((0, [False] * 3))
    assert all(map(still_open, known))
    for _, peer in pairs:
        peer.close()
    assert outcomes(futures) == [Outcome.PEER_CLOSED] * 3


@forks
@threads_fork
def test_fork_aborts_nothing_of_the_parents(closers: CloserMaker, tcp: PairMaker) -> None:
    """Closed in the child by policy, an on_timeout="abort" would reset the parent's connection."""
    closer = closers(Drain(timeout=DEADLINE, on_timeout="abort"))
    ours, peer = tcp(**SMALL_BUFFERS)
    future = closer.submit(ours, data=MORE_THAN_FITS)
    assert fork_and_look(partial(closer.shutdown, 0.0)).startswith("Stats(handed_over=0")
    assert read_to_end(peer) == Ending(len(MORE_THAN_FITS), None)
    peer.close()
    assert facts(future.result(DEADLINE)) == (Outcome.PEER_CLOSED, 0, 0, None, True)


@forks
@threads_fork
@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
def test_child_can_use_its_own(closers: CloserMaker, tcp: PairMaker, used: bool) -> None:
    closer = closers(LONG)
    (ours, peer), (other, other_peer) = tcp(), tcp()
    if used:
        closer.close(ours)
    other_peer.close()

    def use() -> str:
        report = closer.submit(other).result(DEADLINE)
        return f"{report.outcome.value} {closer.shutdown().handed_over} {threading.active_count()}"

    assert fork_and_look(use) == "peer_closed 1 1"
    assert closer.pending == used
    peer.close()
    assert closer.join(DEADLINE)


@forks
@threads_fork
def test_child_of_a_closer_that_was_shut_down(closers: CloserMaker, tcp: PairMaker) -> None:
    """Gunicorn's arbiter forks new workers while it goes down: the child starts afresh."""
    closer = closers()
    ours, peer = tcp()
    peer.close()
    closer.close(ours)
    closer.shutdown()
    other, other_peer = tcp()
    other_peer.close()
    assert fork_and_look(lambda: closer.submit(other).result(DEADLINE).outcome.value) == "peer_closed"


@forks
@linux
@threads_fork
def test_child_of_a_child(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    (ours, _), (other, _) = tcp(), tcp()
    known, known_other = identity(ours), identity(other)
    closer.close(ours)

    def child() -> str:
        closer.close(other)
        seen = fork_and_look(lambda: (closer.pending, still_open(known), still_open(known_other)))
        return f"{seen} {closer.pending} {still_open(known_other)}"

    assert fork_and_look(child) == "(0, False, False) 1 True"


@forks
@linux
@threads_fork
def test_child_has_no_fd_of_sockets_that_still_send(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    pairs = [tcp(**SMALL_BUFFERS) for _ in range(3)]
    known = [identity(ours) for ours, _ in pairs]
    for ours, _ in pairs:
        assert closer.send_and_close(ours, MORE_THAN_FITS)

    def look() -> tuple[list[bool], tuple[int, ...]]:
        return [still_open(each) for each in known], closer.stats()[:4]

    assert fork_and_look(look) == str(([False] * 3, (0, 0, 0, 0)))
    assert closer.stats().buffered == 3 * len(MORE_THAN_FITS)
    for _, peer in pairs:
        assert read_to_end(peer) == Ending(len(MORE_THAN_FITS), None)
        peer.close()
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 3}


@forks
@linux
@threads_fork
def test_forks_while_threads_hand_over_and_the_children_live_on(closers: CloserMaker, unix_pair: PairMaker) -> None:
    """Lost in neither: every peer sees its answer and EOF although children live, who have nothing of it.

    A socket that is open in a child belongs to an object there: nothing is lost between its owner and the closer.
    """
    closer = closers(LONG)
    pairs = [unix_pair() for _ in range(400)]
    known = [identity(ours) for ours, _ in pairs]
    handed = []

    def hand_over(half: int) -> None:
        for place in range(half, len(pairs), 2):
            assert closer.send_and_close(pairs[place][0], b"answer")
            handed.append(place)

    def look() -> str:
        strays = [
            place
            for place, (ours, _) in enumerate(pairs)
            if still_open(known[place]) and (ours.fileno() == -1 or place in returned)
        ]
        return f"{strays} {closer.pending}"

    with ExitStack() as children, Call(partial(hand_over, 0)) as one, Call(partial(hand_over, 1)) as two:
        seen: list[str] = []
        while (one.is_alive() or two.is_alive() or len(seen) < 3) and len(seen) < 25:
            returned = set(handed)
            child = children.enter_context(LivingChild(look))
            seen.append(child.said)
        one.join(DEADLINE)
        two.join(DEADLINE)
        assert set(seen) == {"[] 0"}
        for _, peer in pairs:
            assert read_to_end(peer) == Ending(6, None)
            peer.shutdown(socket.SHUT_WR)  # for the children have copies of the peers' ends
        assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: len(pairs)}
    assert not any(map(still_open, known))
    assert_adds_up(closer.stats())


@forks
@threads_fork
@pytest.mark.parametrize("with_data", [False, True], ids=["silent", "sending"])
def test_fork_by_the_callback_of_a_future(closers: CloserMaker, tcp: PairMaker, with_data: bool) -> None:
    """In the closer's own thread: the child has only that one, and starts another for its own sockets."""
    closer = closers(LONG)
    (ours, peer), (other, other_peer), (fresh, fresh_peer) = tcp(), tcp(**SMALL_BUFFERS), tcp()
    known_other = identity(other)
    fresh_peer.close()
    said: list[str] = []

    def child() -> str:
        seen = closer.pending, still_open(known_other)
        return f"{seen} {closer.submit(fresh).result(DEADLINE).outcome.value} {closer.shutdown().handed_over}"

    left = closer.submit(other, data=MORE_THAN_FITS) if with_data else closer.submit(other)
    done = threading.Event()

    def fork(_: Future[Report]) -> None:
        said.append(fork_and_look(child))
        done.set()

    closer.submit(ours).add_done_callback(fork)
    peer.close()
    assert done.wait(DEADLINE)
    assert said == ["(0, False) peer_closed 1"]
    assert closer.pending == 1
    assert read_to_end(other_peer) == Ending(len(MORE_THAN_FITS) if with_data else 0, None)
    other_peer.close()
    assert left.result(DEADLINE).outcome is Outcome.PEER_CLOSED


@forks
@threads_fork
def test_fork_of_a_thread_that_hands_over_itself(closers: CloserMaker, tcp: PairMaker) -> None:
    """The child's main thread is another one than the parent's."""
    closer = closers(LONG)
    (ours, peer), (other, other_peer) = tcp(), tcp()
    other_peer.close()
    closer.close(ours)
    with Call(lambda: fork_and_look(lambda: closer.submit(other).result(DEADLINE).outcome.value)) as call:
        assert call.result() == "peer_closed"
    peer.close()
    assert closer.join(DEADLINE)
    assert closer.stats().handed_over == 1


@forks
@linux
@threads_fork
def test_futures_of_the_parents_stay_open_in_the_child(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    ours, peer = tcp()
    future = closer.submit(ours)
    assert fork_and_look(lambda: (closer.shutdown(0.0).handed_over, future.done())) == "(0, False)"
    peer.close()
    assert future.result(DEADLINE).outcome is Outcome.PEER_CLOSED


@forks
@linux
@threads_fork
def test_child_frees_its_own_fds(closers: CloserMaker, tcp: PairMaker) -> None:
    """Those of the closer, too: a child that uses it has no more than its parent, and none when it is shut down."""
    before = len(open_fds())
    ours, peer = tcp()
    closer = closers(LONG)
    closer.close(ours)

    def look() -> tuple[int, int]:
        ours, peer = socket.socketpair()
        peer.close()
        closer.submit(ours).result(DEADLINE)
        used = len(open_fds())
        closer.shutdown()
        return used - before, len(open_fds()) - before

    used, left = map(int, fork_and_look(look).strip("()").split(", "))
    assert left == 3, "the peer's end, and the pipe that this is told by"
    assert left < used <= left + 2
    peer.close()
    assert closer.join(DEADLINE)
