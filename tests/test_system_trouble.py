"""When the system itself fails us: waits that cannot be made, signals at the wrong moment, exceptions in between.

Each of these once cost a deadline, an fd or a promise.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from contextlib import ExitStack, suppress

import pytest

from conformance import Engine
from connections import DEADLINE, PairMaker
from lingerx import Drain, Flush, Outcome

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks for our epoll descriptor in /proc")


@pytest.mark.skipif(sys.platform == "win32", reason="no interval timers on Windows")
def test_one_alarm_while_the_peer_keeps_us_busy(engine: Engine, tcp: PairMaker) -> None:
    """A signal that comes while we work, and not while we wait, is seen all the same: there is no second one."""

    class Rang(Exception):
        pass

    def ring(*_: object) -> None:
        raise Rang

    def send_without_end(peer: socket.socket) -> None:
        with suppress(OSError):
            while True:
                peer.sendall(b"x" * 200)

    before = signal.signal(signal.SIGALRM, ring)
    try:
        for _ in range(5):
            ours, peer = tcp()
            sender = threading.Thread(target=send_without_end, args=(peer,))
            sender.start()
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            with pytest.raises(Rang):
                engine.close(ours, Drain(timeout=DEADLINE))
            ours.close()  # should it have rung before the call
            sender.join()  # a plain close resets it
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


MORE_THAN_THE_LIMIT = """
    import importlib, resource, socket, sys, time
    from lingerx import Drain, Outcome
    engine = importlib.import_module(sys.argv[1])
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    pairs = []
    for _ in range(100):
        peer = socket.create_connection(listener.getsockname())
        pairs.append((listener.accept()[0], peer))
    resource.setrlimit(resource.RLIMIT_NOFILE, (50, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    cpu = time.thread_time()
    reports = engine.close_all([ours for ours, _ in pairs], Drain(timeout=0.2))
    assert {report.outcome for report in reports} == {Outcome.TIMED_OUT}, reports
    assert max(report.elapsed for report in reports) < 1.0, reports
    assert time.thread_time() - cpu < 0.15, "it span"
"""


@linux_only
def test_neither_epoll_nor_poll_can_be_had(engine_name: str) -> None:
    """More sockets than RLIMIT_NOFILE: epoll is EMFILE and poll(2) EINVAL. The deadline holds, and nobody spins."""
    program = [sys.executable, "-c", textwrap.dedent(MORE_THAN_THE_LIMIT), f"lingerx._{engine_name}"]
    subprocess.run(program, check=True, timeout=20)


@linux_only
def test_somebody_closes_our_epoll_descriptor(engine: Engine, engine_name: str, tcp: PairMaker) -> None:
    """As a library does that closes all fds to become a daemon: it costs the wake-up, not the deadline."""
    if engine_name == "portable":
        pytest.skip("select.epoll cannot let go of a number: the portable engine raises OSError then")
    ours, peer = tcp()
    other, other_peer = tcp()

    over = threading.Event()

    def close_it() -> None:
        while not over.is_set():
            for name in os.listdir("/proc/self/fd"):
                with suppress(OSError):
                    if "eventpoll" in os.readlink(f"/proc/self/fd/{name}"):
                        os.close(int(name))
                        peer.send(b"input")
                        other_peer.send(b"input")
                        return

    closer = threading.Thread(target=close_it)
    closer.start()
    reports = engine.close_all([ours, other], Drain(timeout=0.4))
    over.set()
    closer.join()
    assert [report.outcome for report in reports] == [Outcome.TIMED_OUT] * 2
    assert [report.drained for report in reports] == [5, 5]
    assert all(0.4 <= report.elapsed < 1.0 for report in reports)


def test_exception_between_taking_and_keeping_an_fd(engine: Engine, stack: ExitStack) -> None:
    """The fd has left the caller's object and is not ours yet: it is closed all the same."""

    class Raises(socket.socket):
        def detach(self) -> int:
            if super().detach() >= 0:
                raise KeyboardInterrupt
            return -1

    for close in (engine.close, engine.abort, lambda sock: engine.close_all([sock], Flush())):
        one, peer = socket.socketpair()
        stack.callback(peer.close)
        ours = Raises(fileno=one.detach())
        with pytest.raises(KeyboardInterrupt):
            close(ours)
        assert peer.recv(1) == b"", "it is closed"


@pytest.mark.parametrize("timeout", [None, 0.0, 2.5])
def test_listening_socket_is_given_back_as_it_was(engine: Engine, stack: ExitStack, timeout: float | None) -> None:
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    listener.settimeout(timeout)
    fd, blocking = listener.fileno(), os.get_blocking(listener.fileno())
    socket.setdefaulttimeout(5.0)
    try:
        for close in (engine.close, engine.abort, lambda sock: engine.send_and_close(sock, b"answer")):
            with pytest.raises(ValueError, match="listening"):
                close(listener)
            assert (listener.fileno(), listener.gettimeout(), os.get_blocking(fd)) == (fd, timeout, blocking)
    finally:
        socket.setdefaulttimeout(None)
    stack.enter_context(socket.create_connection(listener.getsockname()))
    listener.settimeout(DEADLINE)
    stack.enter_context(listener.accept()[0])
