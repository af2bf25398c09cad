"""The with-block `lingerx.closing`, with the engine that this installation runs."""

from __future__ import annotations

import socket
from typing import Any

import pytest

import lingerx
from conformance import ANSWER, SHORT, facts
from connections import DEADLINE, SMALL_BUFFERS, Ending, PairMaker, fill, identity, still_open
from lingerx import Abort, Background, Drain, Flush, Outcome, Report
from peers import Polite, read_to_end, send_unread


class Trouble(Exception):
    """What a block raises here."""


def answer_in_a_block(closing: lingerx.closing, answer: bytes, error: type[BaseException]) -> None:
    """Send what there is of an answer, and raise."""
    with closing as sock:
        sock.sendall(answer)
        raise error


def report_of(closing: lingerx.closing) -> Report:
    """The report, which must be there."""
    assert closing.report is not None
    return closing.report


def test_block_ends_normally(tcp: PairMaker) -> None:
    ours, peer = tcp()
    known = identity(ours)
    send_unread(peer, ours, b"unread")
    with Polite(peer) as client:
        with lingerx.closing(ours, Drain(timeout=DEADLINE)) as sock:
            assert sock is ours
            sock.sendall(ANSWER)
        assert not still_open(known)
    assert client.ending == Ending(len(ANSWER), None)


def test_report_is_there_after_the_block_and_not_before(tcp: PairMaker) -> None:
    ours, peer = tcp()
    peer.close()
    closing = lingerx.closing(ours, Drain(timeout=DEADLINE))
    assert closing.report is None
    with closing:
        assert closing.report is None
    assert facts(report_of(closing)) == (Outcome.PEER_CLOSED, 0, 0, None, True)


def test_policy_is_the_one_that_was_asked_for(tcp: PairMaker) -> None:
    ours, peer = tcp()
    closing = lingerx.closing(ours, Flush(timeout=DEADLINE))
    with closing as sock:
        sock.sendall(ANSWER)
    assert facts(report_of(closing)) == (Outcome.ACKED, 0, 0, None, True)
    assert read_to_end(peer) == Ending(len(ANSWER), None)


def test_policy_is_drain_when_nobody_asks_for_another(tcp: PairMaker) -> None:
    ours, peer = tcp()
    send_unread(peer, ours, b"request")
    peer.close()
    closing = lingerx.closing(ours)
    with closing:
        pass
    assert facts(report_of(closing)) == (Outcome.PEER_CLOSED, len(b"request"), 0, None, True)


def test_block_raises_and_the_peer_is_reset(tcp: PairMaker) -> None:
    """An answer that was cut off must not look complete."""
    ours, peer = tcp()
    known = identity(ours)
    closing = lingerx.closing(ours)
    with pytest.raises(Trouble):
        answer_in_a_block(closing, b"half an ans", Trouble)
    assert report_of(closing).outcome is Outcome.ABORTED
    assert not still_open(known)
    assert peer.recv(100) == b"half an ans"
    with pytest.raises(ConnectionResetError):
        peer.recv(100)


@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_on_error_holds_for_whatever_a_block_raises(tcp: PairMaker, error: type[BaseException]) -> None:
    ours, peer = tcp()
    closing = lingerx.closing(ours, Abort(), on_error=Flush(timeout=DEADLINE))
    with pytest.raises(error):
        answer_in_a_block(closing, ANSWER, error)
    assert report_of(closing).outcome is Outcome.ACKED
    assert read_to_end(peer) == Ending(len(ANSWER), None)


def test_network_trouble_at_the_end_is_no_exception(tcp: PairMaker) -> None:
    ours, _ = tcp(**SMALL_BUFFERS)
    closing = lingerx.closing(ours, Drain(timeout=SHORT))
    with closing as sock:
        fill(sock)
    assert report_of(closing).outcome is Outcome.TIMED_OUT


@pytest.mark.parametrize("raises", [False, True])
def test_socket_was_closed_within_the_block(tcp: PairMaker, raises: bool) -> None:
    ours, _ = tcp()
    closing = lingerx.closing(ours)
    try:
        with closing as sock:
            sock.close()
            if raises:
                raise Trouble
    except Trouble:
        assert raises
    assert report_of(closing).outcome is Outcome.ALREADY_CLOSED


def test_socket_was_handed_over_within_the_block(tcp: PairMaker) -> None:
    ours, peer = tcp()
    with lingerx.closing(ours) as sock:
        handed_over = socket.socket(fileno=sock.detach())
    with handed_over:
        handed_over.sendall(b"still open")
        assert peer.recv(100) == b"still open"


def test_return_from_within_the_block(tcp: PairMaker) -> None:
    ours, peer = tcp()

    def answer() -> str:
        with lingerx.closing(ours, Flush(timeout=DEADLINE)) as sock:
            sock.sendall(ANSWER)
            return "returned"

    assert answer() == "returned"
    assert read_to_end(peer) == Ending(len(ANSWER), None)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"policy": Drain}, TypeError, r"write Drain\(\)"),
        ({"policy": 3.0}, TypeError, r"Drain\(timeout=3\.0\)"),
        ({"on_error": Abort}, TypeError, r"write Abort\(\)"),
        ({"on_error": "abort"}, TypeError, "policy is one of"),
    ],
    ids=["policy_class", "number", "on_error_class", "on_error_name"],
)
def test_mistake_is_told_when_it_is_made(
    tcp: PairMaker, arguments: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    ours, peer = tcp()
    with pytest.raises(error, match=sentence):
        lingerx.closing(ours, **arguments)
    ours.sendall(b"usable")
    assert peer.recv(100) == b"usable"


def test_what_cannot_be_closed_this_way_is_told_before_the_block() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(ValueError, match="listening"):
            lingerx.closing(listener)
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
    with pytest.raises(TypeError, match="close_fd"):
        lingerx.closing(7)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", [Drain(timeout=DEADLINE), Background()], ids=["drain", "background"])
def test_block_may_be_entered_again_to_no_effect(tcp: PairMaker, policy: Drain | Background) -> None:
    ours, peer = tcp()
    peer.close()
    closing = lingerx.closing(ours, policy)
    with closing:
        pass
    with closing:
        pass
    assert report_of(closing).outcome is Outcome.ALREADY_CLOSED
