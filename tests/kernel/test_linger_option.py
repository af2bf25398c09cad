"""What SO_LINGER does and does not do. Facts of the kernel only; nothing of lingerx."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import FrameType

import pytest

from .facts import (
    DEADLINE,
    LONG_LINGER,
    NO_WAIT,
    Ending,
    TcpState,
    addresses,
    fill,
    queued_output,
    read_to_end,
    send_unread,
    set_linger,
    state_in_table,
    tcp_pair,
    timed_close,
)

# The kernel counts the linger time in jiffies, so a close may return up to two of them (HZ=100: 20 ms) early.
WHOLE_SECOND = 0.98


@contextlib.contextmanager
def repeated_signal(interval: float) -> Iterator[None]:
    """A SIGALRM every `interval` seconds that does nothing; after one that came too early comes another."""

    def ignore(number: int, frame: FrameType | None) -> None:
        pass

    handler = signal.signal(signal.SIGALRM, ignore)
    timer = signal.setitimer(signal.ITIMER_REAL, interval, interval)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


@pytest.mark.slow  # a second, the shortest linger time there is
def test_nonblocking_close_with_data_queued_blocks_for_the_whole_linger_time(stack: ExitStack) -> None:
    """close() of an O_NONBLOCK socket with SO_LINGER and queued data blocks all the same and returns 0; the
    peer later reads every byte and EOF, so there is no RST when the linger time is over."""
    ours, peer = tcp_pair(stack)
    sent = fill(ours)
    set_linger(ours, 1)
    assert not os.get_blocking(ours.fileno())
    assert timed_close(ours) > WHOLE_SECOND
    assert read_to_end(peer) == Ending(sent, None)


def test_linger_close_returns_once_the_peer_has_everything(stack: ExitStack) -> None:
    """A linger close waits for the last ACK, not for the linger time."""
    ours, peer = tcp_pair(stack)
    sent = fill(ours)
    set_linger(ours, LONG_LINGER)
    endings: list[Ending] = []
    reader = threading.Thread(target=lambda: endings.append(read_to_end(peer)))
    reader.start()
    stack.callback(reader.join, DEADLINE)
    assert timed_close(ours) < NO_WAIT
    reader.join(DEADLINE)
    assert endings == [Ending(sent, None)]


def test_linger_close_interrupted_by_a_signal_returns_early_with_success(stack: ExitStack) -> None:
    """A linger close interrupted by a signal returns 0 early: the caller cannot tell, nothing is lost."""
    ours, peer = tcp_pair(stack)
    sent = fill(ours)
    connection = addresses(ours)
    set_linger(ours, LONG_LINGER)
    with repeated_signal(0.05):
        assert timed_close(ours) < NO_WAIT  # os.close neither tries again nor hides an EINTR; there was none
    assert state_in_table(connection) is TcpState.FIN_WAIT1, "the data was still on its way"
    assert read_to_end(peer) == Ending(sent, None)


def test_shutdown_with_linger_set_does_not_block(stack: ExitStack) -> None:
    """shutdown() with SO_LINGER set never blocks, not even on a blocking socket with data queued."""
    ours, peer = tcp_pair(stack)
    sent = fill(ours)
    set_linger(ours, LONG_LINGER)
    os.set_blocking(ours.fileno(), True)
    started = time.monotonic()
    ours.shutdown(socket.SHUT_WR)
    assert time.monotonic() - started < NO_WAIT
    assert queued_output(ours) > 0
    assert read_to_end(peer) == Ending(sent, None)


def test_linger_is_ignored_when_the_process_exits(stack: ExitStack) -> None:
    """SO_LINGER is ignored at process exit: the exit does not wait, and the kernel delivers the rest."""
    ours, peer = tcp_pair(stack)
    sent = fill(ours)
    connection = addresses(ours)
    set_linger(ours, LONG_LINGER)
    program = [sys.executable, "-ISc", "import sys; sys.stdin.read()"]
    child = stack.enter_context(subprocess.Popen(program, stdin=subprocess.PIPE, pass_fds=[ours.fileno()]))
    assert timed_close(ours) < NO_WAIT, "the child still holds a copy"
    assert state_in_table(connection) is TcpState.ESTABLISHED
    started = time.monotonic()
    child.communicate(timeout=DEADLINE)
    assert time.monotonic() - started < NO_WAIT
    assert child.returncode == 0
    assert state_in_table(connection) is TcpState.FIN_WAIT1
    assert read_to_end(peer) == Ending(sent, None)


def test_linger_with_unread_input_resets_at_once(stack: ExitStack) -> None:
    """With SO_LINGER > 0 and unread input, close sends RST at once; the linger time is ignored."""
    ours, peer = tcp_pair(stack)
    send_unread(peer, ours)
    sent = fill(ours)
    set_linger(ours, LONG_LINGER)
    assert timed_close(ours) < NO_WAIT
    ending = read_to_end(peer)
    assert ending.error == errno.ECONNRESET
    assert ending.received < sent


def test_zero_linger_after_half_close_truncates_what_is_queued(stack: ExitStack) -> None:
    """SO_LINGER {1, 0} and close after SHUT_WR with data queued: the peer gets a part, then ECONNRESET."""
    ours, peer = tcp_pair(stack)
    sent = fill(ours)
    connection = addresses(ours)
    ours.shutdown(socket.SHUT_WR)
    set_linger(ours, 0)
    assert timed_close(ours) < NO_WAIT
    assert state_in_table(connection) is None
    ending = read_to_end(peer)
    assert ending.error == errno.ECONNRESET
    assert ending.received < sent
