"""Closer: programs that fork: servers, multiprocessing, other people's fork handlers. Each in a process of its own."""

from __future__ import annotations

import os

import pytest

from closers import MORE_THAN_FITS, output_of, start_program
from connections import SMALL_BUFFERS, Ending, PairMaker
from peers import read_to_end

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")]


def test_thread_hands_over_between_our_fork_handler_and_the_fork(engine_name: str) -> None:
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
    with start_program(engine_name, program) as process:
        assert output_of(process) == "0\nTrue 1\n"


def test_multiprocessing_by_fork(engine_name: str) -> None:
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
    with start_program(engine_name, program) as process:
        assert output_of(process) == f"{[('peer_closed', 1)] * 3}\n[0, 0, 0] False\npeer_closed\n"


def test_pre_fork_server(engine_name: str, tcp: PairMaker) -> None:
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
    with start_program(engine_name, program, *fds, len(MORE_THAN_FITS), pass_fds=fds) as process:
        ours.close()
        other.close()
        for each in (other_peer, peer):
            assert read_to_end(each) == Ending(len(MORE_THAN_FITS), None)
            each.close()
        output_of(process)


def test_child_in_which_the_closers_thread_comes_to_its_end(engine_name: str) -> None:
    """A future's callback forks and returns in both: the child has nothing more to do, and ends."""
    program = """
import os, socket, warnings
from lingerx.closer import Closer
warnings.simplefilter("ignore", DeprecationWarning)
closer = Closer()
(ours, peer), (other, other_peer) = socket.socketpair(), socket.socketpair()
children = []
future = closer.submit(ours)
left = closer.submit(other)
future.add_done_callback(lambda _: children.append(os.fork()))
peer.close()
future.result(5.0)
while not children:
    pass
print(os.waitpid(children[0], 0)[1], left.done())
other_peer.close()
print(left.result(5.0).outcome.value, closer.shutdown().handed_over)
"""
    with start_program(engine_name, program) as process:
        assert output_of(process) == "0 False\npeer_closed 2\n"


def test_pool_of_worker_processes(engine_name: str) -> None:
    """As servers do that hold a closer in every worker: each has its own counters and closes all it was given."""
    program = """
import concurrent.futures, multiprocessing, socket, warnings
from lingerx.closer import Closer
warnings.simplefilter("ignore", DeprecationWarning)
closer = Closer()

def work(_):
    ours, peer = socket.socketpair()
    closer.send_and_close(ours, b"answer")
    answer = peer.recv(100) + peer.recv(100)
    peer.close()
    return answer, closer.join(5.0), closer.stats().handed_over >= 1

ours, peer = socket.socketpair()
closer.close(ours)
with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
    print(set(pool.map(work, range(20))))
peer.close()
print(closer.join(5.0), closer.stats().handed_over)
"""
    with start_program(engine_name, program) as process:
        assert output_of(process) == "{(b'answer', True, True)}\nTrue 1\n"
