"""send_and_close: the last bytes, read while written, with the FIN on the last segment."""

from __future__ import annotations

import array
import errno
import hashlib
import mmap
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from conformance import SHORT, Engine, facts
from connections import (
    A_LONG_LOOK,
    DEADLINE,
    SMALL_BUFFERS,
    Connection,
    Ending,
    PairMaker,
    TcpState,
    queued_input,
    queued_output,
    segments_in,
    wait_for_reset,
    wait_until,
)
from lingerx import Abort, Background, Drain, Flush, KernelLinger, Outcome, Policy
from peers import Call, Flooding, SlowReader, WritesFirst, read_to_end, reset, send_unread

if TYPE_CHECKING:
    from typing_extensions import Buffer

linux = pytest.mark.skipif(sys.platform != "linux", reason="counts of segments and queues as Linux tells them")

BIG = 16 << 20
BODY = bytes(range(256)) * (BIG // 256)
"""16 MiB: far more than all buffers between here and a client together."""


def read_all(peer: socket.socket) -> bytes:
    """Borrows: every byte up to EOF."""
    pieces = []
    while piece := peer.recv(1 << 20):
        pieces.append(piece)
    return b"".join(pieces)


def mapped(data: bytes) -> mmap.mmap:
    area = mmap.mmap(-1, len(data))
    area[:] = data
    return area


WORDS = b"eight bytes each"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", b""),
        (WORDS, WORDS),
        (bytearray(WORDS), WORDS),
        (memoryview(WORDS), WORDS),
        (memoryview(WORDS)[2:-3], WORDS[2:-3]),
        (memoryview(WORDS)[4:4], b""),
        (memoryview(bytearray(WORDS)).toreadonly(), WORDS),
        (memoryview(WORDS).cast("B", (2, 8)), WORDS),
        (array.array("d", [1.0, 2.0]), array.array("d", [1.0, 2.0]).tobytes()),
        (array.array("H"), b""),
    ],
    ids=[
        "empty",
        "bytes",
        "bytearray",
        "memoryview",
        "slice",
        "empty_slice",
        "readonly",
        "two_dimensions",
        "array",
        "empty_array",
    ],
)
def test_data_of_any_bytes_like_type(engine: Engine, any_pair: PairMaker, data: Buffer, expected: bytes) -> None:
    ours, peer = any_pair()
    report = engine.send_and_close(ours, data, Drain(timeout=0))
    assert report.delivered is not False
    assert read_all(peer) == expected


def test_data_in_a_memory_map_is_let_go_of_afterwards(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp()
    area = mapped(WORDS)
    engine.send_and_close(ours, area, Flush(timeout=DEADLINE))
    assert read_all(peer) == WORDS
    area.close()  # BufferError, if it were still held


def test_data_in_a_bytearray_is_let_go_of_afterwards(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp()
    data = bytearray(WORDS)
    engine.send_and_close(ours, data, Flush(timeout=DEADLINE))
    data.extend(b"more")  # BufferError, if it were still held
    assert read_all(peer) == WORDS


@pytest.mark.parametrize("policy", [Drain(timeout=DEADLINE), Flush(timeout=DEADLINE)], ids=["drain", "flush"])
def test_large_answer_to_a_client_that_writes_first(engine: Engine, any_pair: PairMaker, policy: Policy) -> None:
    """It fills both windows before it reads: who only writes waits for a client that waits for it."""
    ours, peer = any_pair()
    with WritesFirst(peer, BODY) as client:
        report = engine.send_and_close(ours, BODY, policy)
    assert client.ending == Ending(BIG, None)
    if isinstance(policy, Drain):
        assert facts(report) == (Outcome.PEER_CLOSED, BIG, 0, None, True)
    else:  # may be done while the last of the body is still on its way
        assert facts(report) == (Outcome.ACKED, report.drained, 0, None, True)


def test_large_answer_arrives_unchanged(engine: Engine, any_pair: PairMaker) -> None:
    """Partial writes go on where they stopped."""
    ours, peer = any_pair(send_buffer=64 * 1024, receive_buffer=64 * 1024)
    body = BODY[: 1 << 20] + b"the end"
    with Call(lambda: hashlib.sha256(read_all(peer)).digest()) as reading:
        report = engine.send_and_close(ours, body, Flush(timeout=DEADLINE))
        assert reading.result() == hashlib.sha256(body).digest()
    assert facts(report) == (Outcome.ACKED, 0, 0, None, True)


def test_client_half_closes_first_and_reads_slowly(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    send_unread(peer, ours, b"request")
    peer.shutdown(socket.SHUT_WR)
    with SlowReader(peer, pause=0.0002) as reader:
        report = engine.send_and_close(ours, BODY[: 2 << 20], Drain(timeout=DEADLINE))
    assert reader.ending == Ending(2 << 20, None)
    assert facts(report) == (Outcome.PEER_CLOSED, len(b"request"), 0, None, True)


def test_data_behind_what_was_sent_before(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp()
    ours.sendall(b"head, ")
    engine.send_and_close(ours, b"body", Flush(timeout=DEADLINE))
    assert read_all(peer) == b"head, body"


# Segments -------------------------------------------------------------------------------------------------


def segments_for(tcp: PairMaker, close: Callable[[socket.socket], object]) -> int:
    """How many segments the peer receives when `close` sends and half-closes."""
    ours, peer = tcp()
    before = segments_in(peer)
    close(ours)
    read_to_end(peer)
    return segments_in(peer) - before


@linux
@pytest.mark.parametrize("size", [1, 1000, 30_000])
def test_fin_rides_on_the_last_data_segment(engine: Engine, tcp: PairMaker, size: int) -> None:
    data = bytes(size)

    def plainly(ours: socket.socket) -> None:
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)

    assert segments_for(tcp, plainly) == 2
    assert segments_for(tcp, lambda ours: engine.send_and_close(ours, data, Flush(timeout=DEADLINE))) == 1


# Trouble --------------------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("on_timeout", ["background", "abort"])
def test_timeout_while_sending(engine: Engine, tcp: PairMaker, on_timeout: str) -> None:
    """What never left this process is dropped: known to be lost."""
    ours, peer = tcp(**SMALL_BUFFERS)
    policy = Drain(timeout=0.1, on_timeout=on_timeout)  # type: ignore[arg-type]
    report = engine.send_and_close(ours, BODY, policy)
    received, error = read_to_end(peer)
    assert (report.outcome, report.drained, report.delivered) == (Outcome.TIMED_OUT, 0, False)
    assert report.unacked is not None
    if on_timeout == "abort":
        assert error == errno.ECONNRESET
        assert BIG - report.unacked == received
    else:
        assert BIG - report.unacked < received < BIG, "the kernel went on with what it had taken"


def test_idle_while_sending(engine: Engine, tcp: PairMaker) -> None:
    ours, _ = tcp(**SMALL_BUFFERS)
    report = engine.send_and_close(ours, BODY, Drain(timeout=DEADLINE, idle_timeout=SHORT))
    assert (report.outcome, report.delivered) == (Outcome.IDLE, False)


def test_slow_reader_is_not_idle_while_it_takes_our_bytes(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp(send_buffer=16 * 1024, receive_buffer=16 * 1024)
    with SlowReader(peer, piece=16 * 1024, pause=0.002) as reader:
        report = engine.send_and_close(ours, BODY[: 1 << 20], Drain(timeout=DEADLINE, idle_timeout=0.1))
    assert reader.ending == Ending(1 << 20, None)
    assert report.elapsed > 0.1
    assert facts(report) == (Outcome.PEER_CLOSED, 0, 0, None, True)


def test_too_much_input_while_sending(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    with Flooding(peer):
        report = engine.send_and_close(ours, BODY, Drain(timeout=DEADLINE, max_bytes=1000))
    assert (report.outcome, report.drained, report.delivered) == (Outcome.BYTE_LIMIT, 1000, False)


@linux
def test_peer_has_reset_before_a_byte_was_sent(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp()
    reset(peer)
    wait_for_reset(ours)
    report = engine.send_and_close(ours, b"answer")
    assert facts(report) == (Outcome.PEER_RESET, 0, len(b"answer"), errno.ECONNRESET, False)


@linux
def test_peer_resets_while_we_wait_for_room(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    with Call(lambda: engine.send_and_close(ours, BODY, Drain(timeout=DEADLINE))) as call:
        wait_until(lambda: queued_input(peer) > 0)
        call.join(A_LONG_LOOK)
        assert call.is_alive(), call.result()
        received = queued_input(peer)
        reset(peer)
    report = call.result()
    assert (report.outcome, report.drained, report.delivered) == (Outcome.PEER_RESET, 0, False)
    assert report.error in (errno.ECONNRESET, errno.EPIPE)
    assert report.unacked is not None
    assert BIG - received <= report.unacked < BIG


@linux
def test_peer_half_closes_and_then_resets_while_we_wait_for_room(engine: Engine, tcp: PairMaker) -> None:
    """After a FIN recv hides the reset; the next send tells."""
    ours, peer = tcp(**SMALL_BUFFERS)
    side = Connection.of(ours)
    peer.shutdown(socket.SHUT_WR)
    with Call(lambda: engine.send_and_close(ours, BODY, Drain(timeout=DEADLINE))) as call:
        side.wait_for(TcpState.CLOSE_WAIT)
        wait_until(lambda: queued_input(peer) > 0)
        reset(peer)
    report = call.result()
    assert (report.outcome, report.drained, report.delivered) == (Outcome.PEER_RESET, 0, False)


def test_half_closed_by_the_application_before(engine: Engine, tcp: PairMaker) -> None:
    """There is no way to send after SHUT_WR: a failure that is not the peer's doing, and nothing is claimed."""
    ours, peer = tcp()
    ours.shutdown(socket.SHUT_WR)
    report = engine.send_and_close(ours, b"answer", Drain(timeout=DEADLINE))
    assert (report.outcome, report.error) == (Outcome.FAILED, errno.EPIPE)
    assert (report.unacked, report.delivered) == (len(b"answer"), False)
    assert read_to_end(peer) == Ending(0, None)


@linux
def test_unacked_counts_what_the_kernel_took_and_what_it_did_not(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    ours.setblocking(False)
    before = ours.send(bytes(100_000))
    report = engine.send_and_close(ours, BODY, Flush(timeout=0.1, on_timeout="abort"))
    received, _ = read_to_end(peer)
    assert report.unacked == before + BIG - received


@pytest.mark.parametrize("policy", [Background(), Abort(), KernelLinger(1)], ids=lambda p: type(p).__name__)
def test_policy_without_a_deadline_is_refused(engine: Engine, policy: Policy, tcp: PairMaker) -> None:
    ours, peer = tcp()
    with pytest.raises(ValueError, match=r"Drain.*Flush"):
        engine.send_and_close(ours, b"answer", policy)
    ours.sendall(b"usable")
    assert peer.recv(100) == b"usable"
    assert queued_output(ours) <= len(b"usable")


@pytest.mark.parametrize(
    ("data", "error", "sentence"),
    [
        ("text", TypeError, "encode"),
        (None, TypeError, "bytes-like"),
        (3, TypeError, "bytes-like"),
        ([b"a", b"b"], TypeError, "bytes-like"),
        (memoryview(WORDS)[::2], ValueError, r"bytes\(data\)"),
    ],
    ids=["str", "none", "int", "list", "strided"],
)
def test_data_that_cannot_be_sent_is_refused(
    engine: Engine, tcp: PairMaker, data: Buffer, error: type[Exception], sentence: str
) -> None:
    ours, peer = tcp()
    with pytest.raises(error, match=sentence):
        engine.send_and_close(ours, data)
    ours.sendall(b"usable")
    assert peer.recv(100) == b"usable"
