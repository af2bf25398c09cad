"""What is left to the kernel, and what of it remains: orphans, TIME_WAIT, and what a peer still gets."""

from __future__ import annotations

import errno
import sys

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
    fill,
    unread_pair,
)
from lingerx import Background, Drain, Flush, KernelLinger, Outcome, Policy
from peers import Call, read_to_end, send_unread

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="states as Linux tells them")


# Background, KernelLinger, Abort --------------------------------------------------------------------------


def test_background_with_unread_input_never_claims_delivery(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp()
    ours.sendall(b"answer")
    send_unread(peer, ours, b"unread")
    report = engine.close(ours, Background())
    assert report.outcome is Outcome.BACKGROUND
    assert report.delivered in (None, False)


def test_background_undoes_an_abortive_so_linger(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    engine.set_linger(ours, 0)
    sent = fill(ours)
    engine.close(ours, Background())
    assert read_to_end(peer) == Ending(sent, None)


def test_kernel_linger_blocks_until_the_peer_has_read_and_knows_no_more(engine: Engine, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    side = Connection.of(ours)
    sent = fill(ours)
    with Call(lambda: engine.close(ours, KernelLinger(int(DEADLINE)))) as call:
        side.wait_for(TcpState.FIN_WAIT1)
        call.join(A_LONG_LOOK)
        assert call.is_alive(), call.result()
        assert read_to_end(peer) == Ending(sent, None)
    assert facts(call.result()) == (Outcome.BACKGROUND, 0, None, None, None)
    assert call.result().elapsed >= A_LONG_LOOK


def test_abort_is_the_same_as_close_by_abort(engine: Engine, tcp: PairMaker) -> None:
    ours, peer, sent = unread_pair(tcp)
    report = engine.abort(ours)
    assert report.outcome is Outcome.ABORTED
    assert report.delivered is not True
    received, error = read_to_end(peer)
    assert (received < sent, error) == (True, errno.ECONNRESET)


# reset_after_ack ------------------------------------------------------------------------------------------


def test_reset_after_ack_leaves_nothing_behind_and_loses_nothing(engine: Engine, tcp: PairMaker) -> None:
    """(When the peer's FIN was quicker than our close, TIME_WAIT has begun, and no option ends it.)"""
    ours, peer = tcp(**SMALL_BUFFERS)
    side = Connection.of(ours)
    sent = fill(ours)
    with Call(lambda: read_to_end(peer)) as reading:
        report = engine.close(ours, Flush(timeout=DEADLINE, reset_after_ack=True))
    assert facts(report) == (Outcome.ACKED, 0, 0, None, True)
    assert side.state() is None
    assert reading.result() == Ending(sent, None)


def test_flush_leaves_the_usual_wait_behind_when_nobody_asked_for_less(engine: Engine, tcp: PairMaker) -> None:
    """What `reset_after_ack` spares, and only that."""
    ours, peer = tcp()
    side = Connection.of(ours)
    assert engine.close(ours, Flush(timeout=DEADLINE)).outcome is Outcome.ACKED
    assert side.state() in (TcpState.FIN_WAIT2, TcpState.TIME_WAIT)
    peer.close()


# user_timeout ---------------------------------------------------------------------------------------------


@pytest.mark.slow  # the first probe of a closed window comes after 200 ms
@pytest.mark.parametrize(
    "policy",
    [Background(user_timeout=0.1), Drain(timeout=SHORT, user_timeout=0.1), Flush(timeout=SHORT, user_timeout=0.1)],
    ids=["background", "drain", "flush"],
)
def test_user_timeout_ends_what_is_left_to_the_kernel(engine: Engine, policy: Policy, tcp: PairMaker) -> None:
    ours, _, _ = unread_pair(tcp)
    side = Connection.of(ours)
    engine.close(ours, policy)
    assert side.state() is TcpState.FIN_WAIT1
    side.wait_for(None)


@pytest.mark.slow  # proves that something lasts: the same 0.2 s and more that the test above needs
def test_without_user_timeout_the_kernel_goes_on(engine: Engine, tcp: PairMaker) -> None:
    (plain, _, _), (timed, _, _) = unread_pair(tcp), unread_pair(tcp)
    plain_side, timed_side = Connection.of(plain), Connection.of(timed)
    engine.close(plain, Background())
    engine.close(timed, Background(user_timeout=0.1))
    timed_side.wait_for(None)
    assert plain_side.state() is TcpState.FIN_WAIT1
