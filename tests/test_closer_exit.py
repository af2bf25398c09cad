"""Closer: the interpreter exits with sockets in flight. Bounded, and nothing is lost that the bound allows.

Programs run in a process of their own, over the engine under test; their peers are out here and must get every byte.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from multiprocessing import get_all_start_methods
from pathlib import Path

import pytest

from closers import output_of, start_program
from connections import DEADLINE, SMALL_BUFFERS, Ending, PairMaker
from peers import Call, read_to_end

SIZE = 4 << 20
"""Bytes: more than the kernel takes with SMALL_BUFFERS."""

PRELUDE = """
import os, signal, socket, sys, threading, time
from lingerx import Drain
from lingerx.closer import Closer, default_closer

sock = socket.socket(fileno=int(sys.argv[1]))
data = bytes(int(sys.argv[2]))
"""


# Interpreter exit -----------------------------------------------------------------------------------------


def run_with_a_late_reader(
    engine_name: str, ours: socket.socket, peer: socket.socket, program: str, code: int = 0
) -> tuple[Ending, float]:
    """What the peer, who reads only when the program is on its way out, saw, and seconds from then to the exit.

    The program says "leaving" when it has handed its socket over.
    """
    process = start_program(engine_name, PRELUDE + program, ours.fileno(), SIZE, pass_fds=(ours.fileno(),))
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
    "sys_exit_while_a_thread_runs_on": (
        "threading.Thread(target=time.sleep, args=(0.2,)).start()\nsys.exit(3)",
        3,
    ),
    "daemon_thread_runs_on": ("threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", 0),
    "daemon_thread_waits_for_the_future": (
        "threading.Thread(target=future.result, daemon=True).start()",
        0,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS_OUT)
def test_interpreter_exits_and_the_peer_gets_every_byte(engine_name: str, tcp: PairMaker, way: str) -> None:
    last, code = WAYS_OUT[way]
    ours, peer = tcp(**SMALL_BUFFERS)
    program = f"""
closer = Closer()
future = closer.submit(sock, data=data)
print("leaving", flush=True)
{last}
"""
    ending, took = run_with_a_late_reader(engine_name, ours, peer, program, code)
    assert ending == Ending(SIZE, None)
    assert took < 3.0


@pytest.mark.slow
def test_interpreter_exits_with_closers_that_nobody_holds(engine_name: str, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    program = """
closer = Closer()
closer.send_and_close(sock, data)
del closer
print("leaving", flush=True)
"""
    assert run_with_a_late_reader(engine_name, ours, peer, program)[0] == Ending(SIZE, None)


@pytest.mark.slow
def test_default_closer_flushes_at_exit(engine_name: str, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    program = """
default_closer().send_and_close(sock, data)
print("leaving", flush=True)
"""
    assert run_with_a_late_reader(engine_name, ours, peer, program)[0] == Ending(SIZE, None)


@pytest.mark.slow
def test_exit_handler_of_the_application_hands_over(engine_name: str, tcp: PairMaker) -> None:
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
    assert run_with_a_late_reader(engine_name, ours, peer, program)[0] == Ending(SIZE, None)


@pytest.mark.slow
def test_exit_waits_no_longer_than_it_may(engine_name: str, tcp: PairMaker) -> None:
    """Three closers, one silent peer each: one bound for all. What was queued arrives all the same."""
    pairs = [tcp() for _ in range(3)]
    fds = [ours.fileno() for ours, _ in pairs]
    program = """
import socket, sys, time
from lingerx import Drain
from lingerx.closer import Closer
closers = [Closer(Drain(timeout=60.0), exit_timeout=0.3) for _ in sys.argv[1:]]
for closer, fd in zip(closers, sys.argv[1:]):
    sock = socket.socket(fileno=int(fd))
    sock.sendall(b"answer")
    closer.close(sock)
print(time.monotonic(), flush=True)
"""
    with start_program(engine_name, program, *fds, pass_fds=tuple(fds)) as process:
        for ours, _ in pairs:
            ours.close()
        leaving = float(output_of(process))
        assert 0.3 <= time.monotonic() - leaving < 0.3 * 3
    for _, peer in pairs:
        assert read_to_end(peer) == Ending(len(b"answer"), None)


@pytest.mark.slow
def test_os_exit_leaves_what_is_queued_to_the_kernel(engine_name: str, tcp: PairMaker) -> None:
    """Nothing of Python's runs then; the half-close was made by the caller, so the peer has an answer and its end."""
    ours, peer = tcp()
    program = """
sock.sendall(bytes(1000))
closer = Closer()
closer.close(sock)
print("leaving", flush=True)
os._exit(7)
"""
    ending, took = run_with_a_late_reader(engine_name, ours, peer, program, 7)
    assert ending == Ending(1000, None)
    assert took < 3.0


@pytest.mark.slow
def test_hand_over_while_the_interpreter_exits_leaves_the_socket_usable(engine_name: str, tcp: PairMaker) -> None:
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
    with start_program(engine_name, program, ours.fileno(), 0, pass_fds=(ours.fileno(),)) as process:
        ours.close()
        output_of(process)
    assert read_to_end(peer) == Ending(len(b"still mine"), None)


@pytest.mark.slow
def test_daemon_thread_hands_over_until_the_very_end(engine_name: str) -> None:
    """What it handed over arrives whole; what it was about to when everything ended has not begun."""
    program = """
import socket, sys, threading
from lingerx.closer import Closer
closer = Closer()
answer = bytes(50_000)
many = threading.Event()

def serve():
    for count in range(1_000_000):
        sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
        try:
            closer.send_and_close(sock, answer)
        except RuntimeError:  # the interpreter is on its way out
            sock.close()
            break
        if count == 50:
            many.set()

threading.Thread(target=serve, daemon=True).start()
many.wait()
"""
    endings: list[Ending] = []
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        over = threading.Event()
        listener.settimeout(0.01)

        def read_all() -> None:
            while True:
                try:
                    peer = listener.accept()[0]
                except TimeoutError:
                    if over.is_set():
                        return
                    continue
                with peer:
                    peer.settimeout(DEADLINE)
                    endings.append(read_to_end(peer))

        with Call(read_all):
            try:
                with start_program(engine_name, program, listener.getsockname()[1]) as process:
                    output_of(process)
            finally:
                over.set()
    assert endings.count(Ending(50_000, None)) >= 50
    assert set(endings) <= {Ending(50_000, None), Ending(0, None)}


@pytest.mark.slow
def test_exit_while_the_closer_is_being_given_more_than_it_takes(engine_name: str) -> None:
    program = """
import socket
from lingerx.closer import Closer
closer = Closer(max_pending=5, exit_timeout=0.2)
peers = []
for _ in range(200):
    ours, peer = socket.socketpair()
    peers.append(peer)
    closer.close(ours)
"""
    started = time.perf_counter()
    with start_program(engine_name, program) as process:
        output_of(process)
    assert time.perf_counter() - started < 3.0


# Children of multiprocessing ------------------------------------------------------------------------------

EXIT_CODES = {"sys_exit": 3, "exception": 1}

WORKER = """
import multiprocessing, socket, sys, threading, warnings
from lingerx.closer import Closer, default_closer

warnings.simplefilter("ignore", DeprecationWarning)

def leave(sock, how):
    closer = default_closer() if how == "default" else Closer()
    closer.send_and_close(sock, bytes({size}))
    print("leaving", flush=True)
    if how == "sys_exit":
        sys.exit(3)
    if how == "exception":
        raise LookupError

def main():
    sock = socket.socket(fileno=int(sys.argv[2]))
    context = multiprocessing.get_context(sys.argv[1])
    before = Closer()
    busy, silent = socket.socketpair()
    before.close(busy)  # the parent has a closer that works, and a child of fork inherits it
    child = context.Process(target=leave, args=(sock, sys.argv[3]))
    child.start()
    sock.close()
    child.join()
    silent.close()
    print(child.exitcode, before.join(5.0))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["return", "sys_exit", "exception", "default"])
@pytest.mark.parametrize("method", [method for method in ("fork", "spawn") if method in get_all_start_methods()])
def test_child_of_multiprocessing_leaves_and_the_peer_gets_every_byte(
    engine_name: str, tcp: PairMaker, tmp_path: Path, method: str, how: str
) -> None:
    """Such a child ends by os._exit, without what atexit would do."""
    ours, peer = tcp(**SMALL_BUFFERS)
    (tmp_path / "worker.py").write_text(WORKER.format(size=SIZE), encoding="utf-8")
    program = "import sys; sys.path.insert(0, sys.argv[4]); import worker; worker.main()"
    arguments = method, ours.fileno(), how, tmp_path
    with start_program(engine_name, program, *arguments, pass_fds=(ours.fileno(),)) as process:
        ours.close()
        assert process.stdout is not None
        assert process.stdout.readline() == "leaving\n", output_of(process)
        assert read_to_end(peer) == Ending(SIZE, None)
        peer.close()
        assert output_of(process) == f"{EXIT_CODES.get(how, 0)} True\n"


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in ("fork", "spawn") if method in get_all_start_methods()])
def test_child_of_multiprocessing_waits_no_longer_than_it_may(
    engine_name: str, tcp: PairMaker, tmp_path: Path, method: str
) -> None:
    ours, peer = tcp()
    worker = WORKER.format(size=10).replace("else Closer()", "else Closer(exit_timeout=0.2)")
    (tmp_path / "worker.py").write_text(worker, encoding="utf-8")
    program = "import sys; sys.path.insert(0, sys.argv[4]); import worker; worker.main()"
    arguments = method, ours.fileno(), "return", tmp_path
    with start_program(engine_name, program, *arguments, pass_fds=(ours.fileno(),)) as process:
        ours.close()
        assert process.stdout is not None
        assert process.stdout.readline() == "leaving\n", output_of(process)
        started = time.perf_counter()
        assert output_of(process) == "0 True\n"
        assert time.perf_counter() - started < 2.0
    assert read_to_end(peer) == Ending(10, None)
