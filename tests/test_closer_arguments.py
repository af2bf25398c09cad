"""Closer: a caller's mistake is an exception, and the socket is untouched and still usable afterwards.

Also what is no mistake but leaves it untouched all the same: when there is no thread to be had.
"""

from __future__ import annotations

import errno
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from closers import LONG, CloserMaker, assert_usable, nonzero, outcomes, output_of, start_program
from conformance import ANSWER
from connections import DEADLINE, Ending, PairMaker, identity, still_open
from lingerx import Abort, Background, Drain, Flush, KernelLinger, Outcome, Policy
from peers import read_to_end

if sys.platform != "win32":
    import fcntl
    import resource

if TYPE_CHECKING:
    from lingerx.closer import Closer

HandOver = Callable[["Closer", Any, Any], object]

WITHOUT_DATA: dict[str, HandOver] = {
    "close": lambda closer, sock, policy: closer.close(sock, policy),
    "close_all": lambda closer, sock, policy: closer.close_all([sock], policy),
    "submit": lambda closer, sock, policy: closer.submit(sock, policy),
}
WITH_DATA: dict[str, HandOver] = {
    "send_and_close": lambda closer, sock, policy: closer.send_and_close(sock, b"answer", policy),
    "submit_with_data": lambda closer, sock, policy: closer.submit(sock, policy, data=b"answer"),
}
HAND_OVERS = {**WITHOUT_DATA, **WITH_DATA}

each_way = pytest.mark.parametrize("hand_over", HAND_OVERS.values(), ids=HAND_OVERS)


def assert_untouched(closer: Closer, ours: socket.socket, peer: socket.socket) -> None:
    """The socket is as before, the closer has not seen it, and takes it when it is handed over rightly."""
    assert_usable(ours, peer)
    assert closer.stats().handed_over == 0
    peer.close()
    assert closer.submit(ours, LONG).result(DEADLINE).outcome is Outcome.PEER_CLOSED


# The policy -----------------------------------------------------------------------------------------------


@each_way
@pytest.mark.parametrize(
    ("policy", "error"),
    [(Drain, TypeError), (3.0, TypeError), ("drain", TypeError), (object(), TypeError), (KernelLinger(3), ValueError)],
    ids=["class", "number", "text", "object", "kernel_linger"],
)
def test_wrong_policy(
    closers: CloserMaker, tcp: PairMaker, hand_over: HandOver, policy: object, error: type[Exception]
) -> None:
    closer = closers()
    ours, peer = tcp()
    with pytest.raises(error):
        hand_over(closer, ours, policy)
    assert_untouched(closer, ours, peer)


@pytest.mark.parametrize("hand_over", WITH_DATA.values(), ids=WITH_DATA)
@pytest.mark.parametrize("policy", [Background(), Abort()], ids=["background", "abort"])
@pytest.mark.parametrize("by_default", [False, True], ids=["of_the_call", "of_the_closer"])
def test_data_with_a_policy_that_has_no_deadline(
    closers: CloserMaker, tcp: PairMaker, hand_over: HandOver, policy: Policy, by_default: bool
) -> None:
    closer = closers(policy) if by_default else closers()
    ours, peer = tcp()
    with pytest.raises(ValueError, match="deadline"):
        hand_over(closer, ours, None if by_default else policy)
    assert_untouched(closer, ours, peer)


# The data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "error"),
    [("text", TypeError), (5, TypeError), ([b"list"], TypeError), (memoryview(b"abcd")[::2], ValueError)],
    ids=["text", "number", "list", "strided"],
)
def test_wrong_data(closers: CloserMaker, tcp: PairMaker, data: Any, error: type[Exception]) -> None:
    closer = closers()
    ours, peer = tcp()
    with pytest.raises(error):
        closer.send_and_close(ours, data)
    with pytest.raises(error):
        closer.submit(ours, data=data)
    assert_untouched(closer, ours, peer)


def test_no_data(closers: CloserMaker, tcp: PairMaker) -> None:
    """None is what submit takes for no data; send_and_close was asked to send."""
    closer = closers()
    ours, peer = tcp()
    with pytest.raises(TypeError, match="bytes-like"):
        closer.send_and_close(ours, None)  # type: ignore[arg-type]
    assert_untouched(closer, ours, peer)


def test_wrong_argument_is_told_although_the_socket_is_closed_already(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers()
    ours, _ = tcp()
    ours.close()
    with pytest.raises(ValueError, match="block"):
        closer.close(ours, KernelLinger(3))
    with pytest.raises(TypeError, match="encode"):
        closer.send_and_close(ours, "text")  # type: ignore[arg-type]
    assert closer.stats().handed_over == 0


# The socket -----------------------------------------------------------------------------------------------


@each_way
@pytest.mark.parametrize("wrong", [7, None, "socket", socket.socket], ids=["number", "none", "text", "class"])
def test_what_is_no_socket(closers: CloserMaker, hand_over: HandOver, wrong: object) -> None:
    closer = closers()
    with pytest.raises(TypeError, match=r"socket\.socket"):
        hand_over(closer, wrong, None)
    assert closer.stats().handed_over == 0


@each_way
@pytest.mark.parametrize("policy", [None, Flush(), Drain()], ids=["default", "flush", "drain"])
def test_what_is_no_stream_socket(closers: CloserMaker, hand_over: HandOver, policy: Policy | None) -> None:
    closer = closers()
    with socket.socket(type=socket.SOCK_DGRAM) as datagram:
        with pytest.raises(TypeError, match="SOCK_STREAM"):
            hand_over(closer, datagram, policy)
        datagram.bind(("127.0.0.1", 0))
        assert datagram.sendto(b"to itself", datagram.getsockname()) == 9
        assert datagram.recv(100) == b"to itself"
    assert closer.stats().handed_over == 0


@pytest.mark.slow
@pytest.mark.parametrize("fd", [0, 1, 2])
def test_standard_stream(engine_name: str, tcp: PairMaker, fd: int) -> None:
    ours, peer = tcp()
    program = """
import os, socket, sys
from lingerx.closer import Closer
given, fd, kept = int(sys.argv[1]), int(sys.argv[2]), os.dup(1)
os.dup2(given, fd)
sock = socket.socket(fileno=fd)
closer = Closer()
refused = 0
for attempt in (
    lambda: closer.close(sock),
    lambda: closer.close_all([sock]),
    lambda: closer.submit(sock),
    lambda: closer.send_and_close(sock, b"answer"),
):
    try:
        attempt()
    except ValueError as error:
        refused += "standard stream" in str(error)
sock.sendall(b"still mine")
os.write(kept, str(refused).encode())
os._exit(0)
"""
    with start_program(engine_name, program, ours.fileno(), fd, pass_fds=(ours.fileno(),)) as process:
        ours.close()
        assert output_of(process) == "4"
    assert read_to_end(peer) == Ending(len(b"still mine"), None)


# A socket that listens ------------------------------------------------------------------------------------

_below_the_top = count(1)


def on_a_new_number(sock: socket.socket) -> socket.socket:
    """Owns: the same socket, under a number that no socket in this process has had.

    The native engine asks only once whether a number is that of a listening socket.
    """
    number = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 100_000) - next(_below_the_top)
    with sock:
        return socket.socket(fileno=fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, number))


def assert_listens(listener: socket.socket) -> None:
    """It still takes connections."""
    listener.settimeout(DEADLINE)
    with socket.socket(listener.family) as client:
        client.settimeout(DEADLINE)
        client.connect(listener.getsockname())
        listener.accept()[0].close()


@each_way
@pytest.mark.parametrize("policy", [None, Flush()], ids=["default", "flush"])
def test_listening_socket(closers: CloserMaker, stack: ExitStack, hand_over: HandOver, policy: Policy | None) -> None:
    """Also when it is tried again: a number becomes known by a connection only."""
    closer = closers()
    listener = stack.enter_context(on_a_new_number(socket.create_server(("127.0.0.1", 0))))
    for _ in range(3):
        with pytest.raises(ValueError, match="listening"):
            hand_over(closer, listener, policy)
        assert_listens(listener)
    assert closer.stats().handed_over == 0


@pytest.mark.parametrize("hand_over", WITHOUT_DATA.values(), ids=WITHOUT_DATA)
@pytest.mark.parametrize("policy", [Background(), Abort()], ids=["background", "abort"])
def test_listening_socket_and_a_policy_that_waits_for_nothing(
    closers: CloserMaker, stack: ExitStack, hand_over: HandOver, policy: Policy
) -> None:
    closer = closers()
    listener = stack.enter_context(on_a_new_number(socket.create_server(("127.0.0.1", 0))))
    with pytest.raises(ValueError, match="listening"):
        hand_over(closer, listener, policy)
    assert_listens(listener)


def test_listening_unix_socket(closers: CloserMaker, stack: ExitStack, tmp_path: Path) -> None:
    closer = closers()
    unbound = socket.socket(socket.AF_UNIX)
    unbound.bind(str(tmp_path / "s"))
    unbound.listen()
    listener = stack.enter_context(on_a_new_number(unbound))
    with pytest.raises(ValueError, match="listening"):
        closer.close(listener)
    assert_listens(listener)


def test_listening_socket_under_a_number_that_a_connection_had(
    closers: CloserMaker, engine_name: str, tcp: PairMaker, stack: ExitStack
) -> None:
    """To ask again each time would cost a system call: the native engine closes it then, and says so."""
    closer = closers(LONG)
    ours, peer = tcp()
    peer.close()
    connection = on_a_new_number(ours)
    number = connection.fileno()
    assert closer.submit(connection).result(DEADLINE).outcome is Outcome.PEER_CLOSED
    with socket.create_server(("127.0.0.1", 0)) as original:
        copy = fcntl.fcntl(original, fcntl.F_DUPFD_CLOEXEC, number)
    listener = stack.enter_context(socket.socket(fileno=copy))
    assert listener.fileno() == number
    known = identity(listener)
    if engine_name == "portable":
        with pytest.raises(ValueError, match="listening"):
            closer.submit(listener)
        assert_listens(listener)
    else:
        report = closer.submit(listener).result(DEADLINE)
        assert (report.outcome, report.error) == (Outcome.FAILED, errno.EINVAL)
        assert not still_open(known)


# Several sockets ------------------------------------------------------------------------------------------


def test_two_objects_that_hold_one_fd(closers: CloserMaker, tcp: PairMaker) -> None:
    closer = closers()
    ours, peer = tcp()
    twin = socket.socket(fileno=ours.fileno())
    try:
        with pytest.raises(ValueError, match="two socket objects"):
            closer.close_all([ours, twin])
    finally:
        twin.detach()
    assert_untouched(closer, ours, peer)


@pytest.mark.parametrize("wrong", ["number", "datagram", "listener"])
def test_one_wrong_socket_and_none_is_touched(closers: CloserMaker, tcp: PairMaker, wrong: str) -> None:
    closer = closers()
    ours, peer = tcp()
    with socket.socket(type=socket.SOCK_DGRAM) as datagram, socket.create_server(("127.0.0.1", 0)) as listener:
        culprit: Any = {"number": 7, "datagram": datagram, "listener": listener}[wrong]
        with pytest.raises((TypeError, ValueError)):
            closer.close_all([ours, culprit])
        assert_listens(listener)
    assert_untouched(closer, ours, peer)


def test_what_holds_no_sockets(closers: CloserMaker) -> None:
    with pytest.raises(TypeError, match="iterable"):
        closers().close_all(7)  # type: ignore[arg-type]


# The closer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"policy": KernelLinger(3)}, ValueError),
        ({"policy": Drain}, TypeError),
        ({"max_pending": 0}, ValueError),
        ({"max_pending": -1}, ValueError),
        ({"max_pending": 2**31}, ValueError),
        ({"max_pending": 2.5}, TypeError),
        ({"max_pending": True}, TypeError),
        ({"max_buffered": -1}, ValueError),
        ({"max_buffered": None}, TypeError),
        ({"max_buffered": "1"}, TypeError),
        ({"on_full": "panic"}, ValueError),
        ({"on_full": None}, ValueError),
        ({"on_full": 1}, ValueError),
        ({"collect": -0.1}, ValueError),
        ({"collect": "x"}, TypeError),
        ({"collect": None}, TypeError),
        ({"exit_timeout": -1}, ValueError),
        ({"exit_timeout": "3"}, TypeError),
        ({"exit_timeout": None}, TypeError),
        ({"name": None}, TypeError),
        ({"name": b"closer"}, TypeError),
        ({"exit_timeout": float("nan")}, ValueError),
        ({"unknown": 1}, TypeError),
    ],
    ids=str,
)
def test_wrong_argument_makes_no_closer(
    closers: CloserMaker, options: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        closers(**options)


def test_what_it_was_made_with_can_be_asked(closers: CloserMaker) -> None:
    closer = closers(Drain(timeout=7.0), exit_timeout=0.25, name="mine")
    assert (closer.policy, closer.exit_timeout, closer.name) == (Drain(timeout=7.0), 0.25, "mine")


@pytest.mark.parametrize("timeout", [-1.0, "3", float("nan"), float("inf")], ids=str)
def test_wrong_timeout_does_not_shut_down(closers: CloserMaker, tcp: PairMaker, timeout: Any) -> None:
    closer = closers()
    ours, peer = tcp()
    peer.close()
    with pytest.raises((TypeError, ValueError)):
        closer.shutdown(timeout)
    with pytest.raises((TypeError, ValueError)):
        closer.join(timeout)
    assert closer.submit(ours).result(DEADLINE).outcome is Outcome.PEER_CLOSED


def test_process_that_has_no_fd_left_for_it(closers: CloserMaker) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as probe:
        lowest = probe.fileno()
    try:
        for room in (0, 1):
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + room, hard))
            with pytest.raises(OSError, match="open files") as raised:
                closers()
            assert raised.value.errno == errno.EMFILE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    closers()


# No thread to be had --------------------------------------------------------------------------------------


@each_way
def test_thread_that_cannot_be_started(
    closers: CloserMaker, tcp: PairMaker, monkeypatch: pytest.MonkeyPatch, hand_over: HandOver
) -> None:
    closer = closers(LONG)
    ours, peer = tcp()

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="can't start new thread"):
                hand_over(closer, ours, None)
            assert_usable(ours, peer)
        assert closer.stats().handed_over == 0
    hand_over(closer, ours, None)
    read_to_end(peer)
    peer.close()
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 1}


def test_closer_that_never_had_a_thread_is_shut_down(
    closers: CloserMaker, tcp: PairMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    closer = closers(LONG)
    ours, peer = tcp()

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            closer.close(ours)
        assert closer.shutdown().handed_over == 0
    with pytest.raises(RuntimeError, match="shut down"):
        closer.close(ours)
    assert_usable(ours, peer)


def test_threads_are_greenlets(closers: CloserMaker, tcp: PairMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """eventlet's, of which there is none here: only the question to it is answered."""
    closer = closers(LONG)
    ours, peer = tcp()
    eventlet = ModuleType("eventlet.patcher")
    vars(eventlet)["is_monkey_patched"] = lambda module: module == "thread"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, eventlet.__name__, eventlet)
        with pytest.raises(RuntimeError, match="greenlets"):
            closer.close(ours)
    assert_usable(ours, peer)


def test_threads_that_wait_for_the_same_start(
    closers: CloserMaker, tcp: PairMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first hand-overs come from several threads at once: one thread is started for all of them."""
    closer = closers(LONG)
    pairs = [tcp() for _ in range(4)]
    started: list[threading.Thread] = []
    barrier = threading.Barrier(len(pairs))
    futures = []
    plain = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "lingerx-closer":
            started.append(thread)
        plain(thread)

    def first(sock: socket.socket) -> None:
        barrier.wait(DEADLINE)
        futures.append(closer.submit(sock, data=ANSWER))

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        threads = [threading.Thread(target=first, args=(ours,)) for ours, _ in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
    for _, peer in pairs:
        assert read_to_end(peer) == Ending(len(ANSWER), None)
        peer.close()
    assert outcomes(futures) == [Outcome.PEER_CLOSED] * len(pairs)
    assert len(started) == 1
