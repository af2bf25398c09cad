"""Closer: its thread and its end. Fork, exit of the interpreter, signals, many threads, garbage.

Programs run in a process of their own, over the engine under test; their peers are out here and must get every byte.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
import time
import weakref
from concurrent.futures import Future
from functools import partial
from itertools import chain

import pytest

from closers import (
    CloserMaker,
    assert_adds_up,
    module_over,
    nonzero,
    output_of,
    start_program,
    thread_ids,
    thread_status,
)
from conformance import SHORT, Engine, facts
from conftest import engine_name, open_fds
from connections import DEADLINE, SMALL_BUFFERS, Ending, PairMaker, identity, still_open, wait_until
from lingerx import Drain, Outcome, Report
from peers import Call, read_to_end

LONG = Drain(timeout=DEADLINE)
MORE_THAN_FITS = 4 << 20

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

PRELUDE = """
import os, signal, socket, sys, threading, time
from lingerx import Drain
from lingerx.closer import Closer, default_closer

sock = socket.socket(fileno=int(sys.argv[1]))
data = bytes(int(sys.argv[2]))
"""


# Interpreter exit -----------------------------------------------------------------------------------------


def run_with_a_late_reader(
    engine: Engine, ours: socket.socket, peer: socket.socket, program: str, code: int = 0
) -> tuple[Ending, float]:
    """What the peer, who reads only when the program is on its way out, saw, and seconds from then to the exit.

    The program says "leaving" when it has handed its socket over.
    """
    process = start_program(
        engine_name(engine), PRELUDE + program, ours.fileno(), MORE_THAN_FITS, pass_fds=(ours.fileno(),)
    )
    with process:
        ours.close()
        assert process.stdout is not None
        assert process.stdout.readline() == "leaving\n", output_of(process)
        started = time.perf_counter()
        ending = read_to_end(peer)
        peer.close()
        output_of(process, code)
        return ending, time.perf_counter() - started


WAYS_OUT = {
    "end_of_the_program": ("", 0),
    "sys_exit": ("sys.exit(3)", 3),
    "exception": ("raise LookupError", 1),
    "keyboard_interrupt": ("signal.raise_signal(signal.SIGINT)", -signal.SIGINT),
    "sys_exit_in_a_thread": (
        "thread = threading.Thread(target=sys.exit, args=(3,))\nthread.start()\nthread.join()",
        0,
    ),
    "daemon_thread_runs_on": ("threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", 0),
    "daemon_thread_waits_for_the_future": (
        "threading.Thread(target=future.result, daemon=True).start()",
        0,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS_OUT)
def test_interpreter_exits_and_the_peer_gets_every_byte(engine: Engine, tcp: PairMaker, way: str) -> None:
    last, code = WAYS_OUT[way]
    ours, peer = tcp(**SMALL_BUFFERS)
    program = f"""
closer = Closer()
future = closer.submit(sock, data=data)
print("leaving", flush=True)
{last}
"""
    ending, took = run_with_a_late_reader(engine, ours, peer, program, code)
    assert ending == Ending(MORE_THAN_FITS, None)
    assert took < 3.0


@pytest.mark.slow
def test_interpreter_exits_with_closers_that_nobody_holds(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    program = """
Closer().send_and_close(sock, data)
print("leaving", flush=True)
"""
    assert run_with_a_late_reader(engine, ours, peer, program)[0] == Ending(MORE_THAN_FITS, None)


@pytest.mark.slow
def test_default_closer_flushes_at_exit(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    program = """
default_closer().send_and_close(sock, data)
print("leaving", flush=True)
"""
    assert run_with_a_late_reader(engine, ours, peer, program)[0] == Ending(MORE_THAN_FITS, None)


@pytest.mark.slow
def test_exit_handler_of_the_application_hands_over(engine: Engine, tcp: PairMaker) -> None:
    """Handlers run in reverse order: those registered after the import run before ours."""
    ours, peer = tcp(**SMALL_BUFFERS)
    program = """
import atexit
closer = Closer()
@atexit.register
def leave():
    closer.send_and_close(sock, data)
    print("leaving", flush=True)
"""
    assert run_with_a_late_reader(engine, ours, peer, program)[0] == Ending(MORE_THAN_FITS, None)


@pytest.mark.slow
def test_exit_waits_no_longer_than_it_may(engine: Engine, tcp: PairMaker) -> None:
    """Three closers, one silent peer each: one bound for all. What was queued arrives all the same."""
    pairs = [tcp() for _ in range(3)]
    fds = [ours.fileno() for ours, _ in pairs]
    program = """
import socket, sys, time
from lingerx import Drain
from lingerx.closer import Closer
for fd in sys.argv[1:]:
    sock = socket.socket(fileno=int(fd))
    sock.sendall(b"answer")
    Closer(Drain(timeout=60.0), exit_timeout=0.3).close(sock)
print(time.monotonic(), flush=True)
"""
    with start_program(engine_name(engine), program, *fds, pass_fds=tuple(fds)) as process:
        for ours, _ in pairs:
            ours.close()
        leaving = float(output_of(process))
        assert 0.3 <= time.monotonic() - leaving < 0.3 * 3
    for _, peer in pairs:
        assert read_to_end(peer) == Ending(len(b"answer"), None)


@pytest.mark.slow
def test_os_exit_leaves_what_is_queued_to_the_kernel(engine: Engine, tcp: PairMaker) -> None:
    """Nothing of Python's runs then; the half-close was made by the caller, so the peer has an answer and its end."""
    ours, peer = tcp()
    program = """
sock.sendall(bytes(1000))
closer = Closer()
closer.close(sock)
print("leaving", flush=True)
os._exit(7)
"""
    ending, took = run_with_a_late_reader(engine, ours, peer, program, 7)
    assert ending == Ending(1000, None)
    assert took < 3.0


@pytest.mark.slow
def test_hand_over_while_the_interpreter_exits_leaves_the_socket_usable(engine: Engine, tcp: PairMaker) -> None:
    """A handler registered before the import runs after ours: the closer is shut down by then."""
    ours, peer = tcp()
    program = f"""
import atexit
@atexit.register
def too_late():
    try:
        closer.close(sock)
    except RuntimeError:
        sock.sendall(b"still mine")
{PRELUDE.replace("import os, signal, socket, sys, threading, time", "import socket, sys")}
closer = Closer()
"""
    with start_program(engine_name(engine), program, ours.fileno(), 0, pass_fds=(ours.fileno(),)) as process:
        ours.close()
        output_of(process)
    assert read_to_end(peer) == Ending(len(b"still mine"), None)


# Fork -----------------------------------------------------------------------------------------------------


def fork_and_look(child: object) -> str:
    """What `child()` returns in a forked child, as text."""
    assert callable(child)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = str(child())
        except BaseException as error:
            text = repr(error)
        os.write(write_end, text.encode())
        os._exit(0)
    os.close(write_end)
    with open(read_end, encoding="utf-8") as stream:
        text = stream.read()
    os.waitpid(pid, 0)
    return text


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
@threads_fork
def test_fork_aborts_nothing_of_the_parents(closers: CloserMaker, tcp: PairMaker) -> None:
    """Closed in the child by policy, an on_timeout="abort" would reset the parent's connection."""
    closer = closers(Drain(timeout=DEADLINE, on_timeout="abort"))
    ours, peer = tcp(**SMALL_BUFFERS)
    future = closer.submit(ours, data=bytes(MORE_THAN_FITS))
    assert fork_and_look(partial(closer.shutdown, 0.0)).startswith("Stats(handed_over=0")
    assert read_to_end(peer) == Ending(MORE_THAN_FITS, None)
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
def test_forks_while_threads_hand_over(closers: CloserMaker, unix_pair: PairMaker) -> None:
    """Sockets handed over during a fork are lost in neither: the parent's end, and no child keeps them open."""
    closer = closers(LONG)
    pairs = [unix_pair() for _ in range(200)]
    for _, peer in pairs:
        peer.sendall(b"x")
    stop = threading.Event()

    def hand_over() -> None:
        for ours, peer in pairs:
            closer.close(ours)
            peer.close()
        stop.set()

    with Call(hand_over):
        count = 0
        while not stop.is_set() or count < 5:
            assert fork_and_look(lambda: closer.pending) == "0"
            count += 1
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: len(pairs)}
    assert closer.stats().drained == len(pairs)
    assert_adds_up(closer.stats())


@forks
@pytest.mark.slow
def test_thread_hands_over_between_our_fork_handler_and_the_fork(engine: Engine) -> None:
    """Handlers that were registered before ours run after it, with the interpreter free for other threads."""
    program = """
import os, socket, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
preparing, handed = threading.Event(), threading.Event()

def other_handler():
    preparing.set()
    handed.wait(0.1)

os.register_at_fork(before=other_handler)
from lingerx.closer import Closer

closer = Closer()
ours, peer = socket.socketpair()

def hand_over():
    preparing.wait()
    closer.close(ours)
    handed.set()

thread = threading.Thread(target=hand_over)
thread.start()
pid = os.fork()
if pid == 0:
    os._exit(closer.pending)
print(os.waitpid(pid, 0)[1], flush=True)
thread.join()
peer.close()
print(closer.join(5.0), closer.stats().handed_over)
"""
    with start_program(engine_name(engine), program) as process:
        assert output_of(process) == "0\nTrue 1\n"


@forks
@pytest.mark.slow
def test_multiprocessing_by_fork(engine: Engine) -> None:
    """Its children end by os._exit, without atexit: what they hand over is theirs to shut down."""
    program = """
import multiprocessing, os, socket, sys, warnings
from lingerx import Drain
from lingerx.closer import Closer

warnings.simplefilter("ignore", DeprecationWarning)
closer = Closer(Drain(timeout=5.0))

def work(results):
    ours, peer = socket.socketpair()
    peer.close()
    with closer:
        outcome = closer.submit(ours).result(5.0).outcome.value
    results.put((outcome, closer.stats().handed_over))

context = multiprocessing.get_context("fork")
results = context.Queue()
ours, peer = socket.socketpair()
future = closer.submit(ours)
workers = [context.Process(target=work, args=(results,)) for _ in range(3)]
for worker in workers:
    worker.start()
print(sorted(results.get(timeout=5.0) for _ in workers))
for worker in workers:
    worker.join()
print([worker.exitcode for worker in workers], future.done())
peer.close()
print(future.result(5.0).outcome.value)
"""
    with start_program(engine_name(engine), program) as process:
        assert output_of(process) == f"{[('peer_closed', 1)] * 3}\n[0, 0, 0] False\npeer_closed\n"


@forks
@pytest.mark.slow
def test_pre_fork_server(engine: Engine, tcp: PairMaker) -> None:
    """The closer is made before the fork, and used by both; each flushes its own at its exit."""
    (ours, peer), (other, other_peer) = tcp(**SMALL_BUFFERS), tcp(**SMALL_BUFFERS)
    program = """
import os, socket, sys, warnings
from lingerx.closer import Closer
warnings.simplefilter("ignore", DeprecationWarning)
parents, childs = (socket.socket(fileno=int(fd)) for fd in sys.argv[1:3])
closer = Closer()
closer.send_and_close(parents, bytes(int(sys.argv[3])))
if pid := os.fork():
    childs.close()
    sys.exit(os.waitpid(pid, 0)[1])
closer.send_and_close(childs, bytes(int(sys.argv[3])))
"""
    fds = ours.fileno(), other.fileno()
    with start_program(engine_name(engine), program, *fds, MORE_THAN_FITS, pass_fds=fds) as process:
        ours.close()
        other.close()
        for each in (other_peer, peer):
            assert read_to_end(each) == Ending(MORE_THAN_FITS, None)
            each.close()
        output_of(process)


# Signals and the thread -----------------------------------------------------------------------------------


@linux
def test_thread_blocks_all_signals(closers: CloserMaker, tcp: PairMaker) -> None:
    before = thread_ids()
    mine = thread_status(threading.get_native_id(), "SigBlk")
    ours, _ = tcp()
    closers(LONG).close(ours)
    [thread] = thread_ids() - before
    blocked = int(thread_status(thread, "SigBlk"), 16)
    # All but those that cannot be blocked; the C library keeps two of its own (signal(7), 32 and 33) to itself.
    wanted = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    assert [number for number in wanted if not blocked >> (number - 1) & 1] == []
    assert thread_status(threading.get_native_id(), "SigBlk") == mine


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_python_handlers_run_in_the_main_thread(closers: CloserMaker, tcp: PairMaker) -> None:
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


@pytest.mark.parametrize("name", [None, "my-closer"], ids=["default", "given"])
def test_thread_has_a_name(closers: CloserMaker, tcp: PairMaker, name: str | None) -> None:
    before = set(threading.enumerate())
    closer = closers(LONG) if name is None else closers(LONG, name=name)
    assert set(threading.enumerate()) == before
    ours, _ = tcp()
    closer.close(ours)
    [thread] = set(threading.enumerate()) - before
    assert thread.name == (name or "lingerx-closer")
    assert thread.daemon
    closer.shutdown(0.0)
    assert not thread.is_alive()


def test_one_thread_for_all_sockets(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    before = threading.active_count()
    for _ in range(10):
        closer.close(tcp()[0])
    assert threading.active_count() == before + 1


# Many threads ---------------------------------------------------------------------------------------------


def test_eight_threads_hand_over_at_once(closers: CloserMaker, unix_pair: PairMaker) -> None:
    closer = closers(LONG)
    before = threading.active_count()
    each = 25
    pairs = [unix_pair() for _ in range(8 * each)]
    futures: list[list[Future[Report]]] = [[] for _ in range(8)]
    barrier = threading.Barrier(8)

    def hand_over(place: int) -> None:
        barrier.wait(DEADLINE)
        for ours, peer in pairs[place::8]:
            peer.send(b"x")
            peer.close()
            futures[place].append(closer.submit(ours))
            assert_adds_up(closer.stats())

    calls = [Call(partial(hand_over, place)) for place in range(8)]
    for call in calls:
        call.start()
    for call in calls:
        call.result()
    assert threading.active_count() == before + 1
    for future in chain.from_iterable(futures):
        assert facts(future.result(DEADLINE)) == (Outcome.PEER_CLOSED, 1, 0, None, True)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: len(pairs)}
    assert closer.stats().drained == len(pairs)


def test_eight_threads_hand_over_the_same_socket(closers: CloserMaker, unix_pair: PairMaker) -> None:
    closer = closers(LONG)
    for _ in range(10):
        ours, peer = unix_pair()
        peer.close()
        barrier = threading.Barrier(8)

        def hand_over(barrier: threading.Barrier = barrier, ours: socket.socket = ours) -> Outcome:
            barrier.wait(DEADLINE)
            return closer.submit(ours).result(DEADLINE).outcome

        calls = [Call(hand_over) for _ in range(8)]
        for call in calls:
            call.start()
        outcomes = [call.result() for call in calls]
        assert sorted(outcomes, key=lambda outcome: outcome.value) == [Outcome.ALREADY_CLOSED] * 7 + [
            Outcome.PEER_CLOSED
        ]
    assert_adds_up(closer.stats())


def test_shutdown_while_threads_hand_over(closers: CloserMaker, unix_pair: PairMaker) -> None:
    """Every socket is either the closer's, and closed, or untouched."""
    closer = closers(Drain(timeout=DEADLINE))
    pairs = [unix_pair() for _ in range(200)]
    known = [identity(ours) for ours, _ in pairs]
    begun = threading.Event()

    def hand_over() -> int:
        for place, (ours, _) in enumerate(pairs):
            try:
                closer.close(ours)
            except RuntimeError:
                return place
            begun.set()
        return len(pairs)

    with Call(hand_over) as call:
        assert begun.wait(DEADLINE)
        closer.shutdown(0.0)
    taken = call.result()
    assert [still_open(each) for each in known] == [False] * taken + [True] * (len(pairs) - taken)
    assert closer.stats().handed_over == taken
    assert closer.pending == 0


def test_two_threads_shut_down(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers(LONG)
    closer.close(tcp()[0])
    with Call(lambda: closer.shutdown(SHORT)) as one, Call(lambda: closer.shutdown(SHORT)) as two:
        assert one.result() == two.result()
    assert nonzero(closer.stats()) == {Outcome.TIMED_OUT: 1}


# Garbage --------------------------------------------------------------------------------------------------


def test_closer_that_was_shut_down_is_collected_with_all_it_has(engine: Engine, tcp: PairMaker) -> None:
    module = module_over(engine_name(engine))
    fds, threads = len(open_fds()), threading.active_count()
    closer = module.Closer(LONG)
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


def test_closer_that_nobody_holds_closes_its_sockets_and_ends(engine: Engine, tcp: PairMaker) -> None:
    module = module_over(engine_name(engine))
    before = set(threading.enumerate())
    (ours, peer), (other, _) = tcp(), tcp()
    known, known_other = identity(ours), identity(other)
    closer = module.Closer(LONG)
    alive = weakref.ref(closer)
    closer.close(ours)
    closer.close(other, Drain(timeout=SHORT))
    del closer
    gc.collect()
    peer.close()
    try:
        wait_until(lambda: not still_open(known) and not still_open(known_other))
        wait_until(lambda: set(threading.enumerate()) <= before, deadline=1.0)
    finally:
        if (left := alive()) is not None:
            left.shutdown(0.0)


def test_closer_that_was_never_used_is_collected(engine: Engine) -> None:
    module = module_over(engine_name(engine))
    fds = len(open_fds())
    closers = [module.Closer() for _ in range(20)]
    del closers
    gc.collect()
    assert len(open_fds()) == fds


def test_many_closers(closers: CloserMaker, tcp: PairMaker) -> None:
    many = [closers(LONG) for _ in range(20)]
    pairs = [tcp() for _ in many]
    futures = [closer.submit(ours) for closer, (ours, _) in zip(many, pairs, strict=True)]
    for _, peer in pairs:
        peer.close()
    for closer, future in zip(many, futures, strict=True):
        assert future.result(DEADLINE).outcome is Outcome.PEER_CLOSED
        assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 1}


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
        assert reading.result() == Ending(MORE_THAN_FITS, None)
    peer.close()
    future.result(DEADLINE)
    gc.collect()
    assert remembered() is None
