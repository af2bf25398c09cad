"""`aclose` of asyncio and uvloop: limits while there is something to send, cancellation, and what goes wrong."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from typing import Any

import pytest

import lingerx
from closers import LONG, CloserMaker, nonzero
from connections import A_LONG_LOOK, DEADLINE, SMALL_BUFFERS, Ending, PairMaker, identity, still_open
from event_loops import LOOPS, Opened, Runner, open_over
from lingerx import Abort, Background, Drain, Flush, KernelLinger, Outcome, Report
from lingerx.asyncio import LingeringTransport, aclose, lingering, lingering_client
from lingerx.closer import Closer
from peers import Flooding, Polite, WritesFirst, read_to_end, reset

MIB = 1 << 20
MORE_THAN_FITS = bytes(4 * MIB)
"""More than the kernel takes with SMALL_BUFFERS."""
SHORT = 0.03
"""Seconds: a limit that is meant to be reached."""
AT_ONCE = 1.0
"""Seconds that what does not wait may take, however busy the machine."""
KINDS = ["tcp", "unix", "tls"]


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Runner:
    """Each kind of loop in turn."""
    return Runner(request.param)


@pytest.fixture
def closer(closers: CloserMaker) -> Closer:
    """One whose policy outlasts every test."""
    return closers(LONG)


# Limits while there is something to send ------------------------------------------------------------------


async def closed_while_sending(
    ours: socket.socket, closer: Closer, policy: lingerx.Policy, tls: ssl.SSLContext | None = None
) -> tuple[Report, Opened]:
    protocol = Opened()
    transport = await open_over(ours, protocol, tls)
    transport.write(MORE_THAN_FITS)
    return await aclose(transport, policy, closer=closer), protocol


@pytest.mark.parametrize("on_timeout", ["background", "abort"])
def test_peer_that_never_reads(run: Runner, closer: Closer, tcp: PairMaker, on_timeout: Any) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    known = identity(ours)
    report, protocol = run(closed_while_sending(ours, closer, Drain(timeout=SHORT, on_timeout=on_timeout)))
    assert not still_open(known)
    assert protocol.lost == [None]
    received, error = read_to_end(peer)
    assert report.outcome is Outcome.TIMED_OUT
    assert report.delivered is False
    assert SHORT <= report.elapsed < AT_ONCE
    assert error == (errno.ECONNRESET if on_timeout == "abort" else None)
    assert report.unacked is not None
    assert report.unacked >= len(MORE_THAN_FITS) - received > 0


def test_peer_that_never_reads_nor_sends_for_too_long(run: Runner, closer: Closer, unix_pair: PairMaker) -> None:
    ours, _ = unix_pair()
    policy = Drain(timeout=DEADLINE, idle_timeout=SHORT)
    report, _ = run(closed_while_sending(ours, closer, policy))
    assert (report.outcome, report.delivered) == (Outcome.IDLE, False)
    assert SHORT <= report.elapsed < AT_ONCE


def test_peer_that_sends_too_much_and_never_reads(run: Runner, closer: Closer, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    with Flooding(peer):
        report, _ = run(closed_while_sending(ours, closer, Drain(timeout=DEADLINE, max_bytes=MIB)))
    assert (report.outcome, report.delivered) == (Outcome.BYTE_LIMIT, False)
    assert MIB <= report.drained < 3 * MIB


def test_peer_that_resets_while_we_send(run: Runner, closer: Closer, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)

    async def main() -> tuple[Report, Opened]:
        asyncio.get_running_loop().call_later(SHORT, reset, peer)
        return await closed_while_sending(ours, closer, LONG)

    report, protocol = run(main())
    assert (report.outcome, report.unacked, report.delivered) == (Outcome.PEER_RESET, None, False)
    assert report.error in (errno.ECONNRESET, errno.EPIPE)
    assert isinstance(protocol.lost[0], ConnectionError)


@pytest.mark.parametrize("policy", [LONG, Flush(timeout=DEADLINE)], ids=["drain", "flush"])
def test_one_report_for_all_of_it(run: Runner, closer: Closer, tcp: PairMaker, policy: Any) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    with WritesFirst(peer, bytes(3 * MIB)) as client:
        report, protocol = run(closed_while_sending(ours, closer, policy))
    assert client.ending == Ending(len(MORE_THAN_FITS), None)
    assert (report.outcome, report.unacked, report.error) in (
        (Outcome.PEER_CLOSED, 0, None),
        (Outcome.ACKED, 0, None),
    )
    assert len(protocol.received) + report.drained == 3 * MIB


def test_peer_that_half_closes_first_and_reads_late(run: Runner, closer: Closer, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    peer.shutdown(socket.SHUT_WR)

    class KeptOpen(Opened):
        def eof_received(self) -> bool:
            return True

    async def main() -> Report:
        protocol = KeptOpen()
        transport = await open_over(ours, protocol)
        transport.write(MORE_THAN_FITS)
        task = asyncio.ensure_future(aclose(transport, LONG, closer=closer))
        await asyncio.sleep(A_LONG_LOOK)
        assert not task.done()
        with Polite(peer) as client:
            report = await task
        assert client.ending == Ending(len(MORE_THAN_FITS), None)
        return report

    report = run(main())
    assert (report.outcome, report.delivered) == (Outcome.PEER_CLOSED, True)


def test_transport_that_never_closes_by_itself(run: Runner, closer: Closer, tcp: PairMaker) -> None:
    """asyncio's, from CPython 3.12 on, for want of an end to an empty piece; the others just close."""
    ours, peer = tcp()
    known = identity(ours)

    async def main() -> Report:
        transport = await open_over(ours, Opened())
        transport.writelines([b"answer", b""])
        return await aclose(transport, Drain(timeout=SHORT), closer=closer)

    assert run(main()).outcome is Outcome.TIMED_OUT
    assert not still_open(known)
    assert read_to_end(peer) == Ending(6, None)


# Immediate policies ---------------------------------------------------------------------------------------


def test_abort_drops_what_is_not_sent_and_resets(run: Runner, closer: Closer, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    report, _ = run(closed_while_sending(ours, closer, Abort()))
    assert (report.outcome, report.delivered) == (Outcome.ABORTED, False)
    assert read_to_end(peer).error == errno.ECONNRESET


def test_background_leaves_the_rest_to_the_loop(run: Runner, closer: Closer, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)

    async def main() -> None:
        report, protocol = await closed_while_sending(ours, closer, Background(user_timeout=5.0))
        assert (tuple(report), protocol.lost) == ((Outcome.BACKGROUND, 0, None, 0.0, None), [])
        with Polite(peer) as client:
            while client.ending is None:
                await asyncio.sleep(0.001)
        assert client.ending == Ending(len(MORE_THAN_FITS), None)

    run(main())


# aclose ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sending", [False, True], ids=["lingering", "sending"])
def test_cancelled(run: Runner, closer: Closer, tcp: PairMaker, sending: bool) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    known = identity(ours)

    async def main() -> None:
        transport = await open_over(ours, Opened())
        if sending:
            transport.write(MORE_THAN_FITS)
        task = asyncio.ensure_future(aclose(transport, LONG, closer=closer))
        await asyncio.sleep(A_LONG_LOOK)
        assert closer.pending == (0 if sending else 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    assert closer.join(AT_ONCE), "its policy would have waited longer"
    assert not still_open(known)
    assert read_to_end(peer).error is None
    assert nonzero(closer.stats()) == {Outcome.TIMED_OUT: 1}


def test_cancelled_while_a_bare_socket_lingers(run: Runner, closer: Closer, tcp: PairMaker) -> None:
    ours, _ = tcp()

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(aclose(ours, LONG, closer=closer), SHORT)

    run(main())
    assert closer.join(AT_ONCE)


def test_default_policy_and_closer(run: Runner, tcp: PairMaker) -> None:
    ours, peer = tcp()
    peer.close()
    try:
        assert run(aclose(ours)).outcome is Outcome.PEER_CLOSED
        assert lingerx.default_closer().stats().handed_over == 1
    finally:
        lingerx.default_closer().shutdown(0.0)


class NoFdLeft:
    """A transport's socket in a process that has reached RLIMIT_NOFILE."""

    type = socket.SOCK_STREAM

    def fileno(self) -> int:
        return 3

    def dup(self) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


class Transparent:
    """Somebody's own transport around another, as a library may have it; its socket has no fd to spare."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return NoFdLeft() if name == "socket" else self._transport.get_extra_info(name, default)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


@pytest.mark.parametrize("data", [b"answer", MORE_THAN_FITS], ids=["little", "much"])
def test_no_fd_left_for_the_copy(run: Runner, closer: Closer, tcp: PairMaker, data: bytes) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    known = identity(ours)

    async def main() -> Report:
        transport = Transparent(await open_over(ours, Opened()))
        transport.write(data)
        return await aclose(transport, LONG, closer=closer)  # type: ignore[arg-type]

    with WritesFirst(peer, bytes(MIB)) as client:
        report = run(main())
    assert tuple(report)[:1] + tuple(report)[2:3] + tuple(report)[4:] == (Outcome.BACKGROUND, None, errno.EMFILE)
    assert client.ending is not None
    assert not still_open(known)
    assert closer.stats().handed_over == 0


def test_closer_was_shut_down(run: Runner, closer: Closer, tcp: PairMaker) -> None:
    closer.shutdown()
    (ours, peer), (bare, other), (third, last) = tcp(), tcp(), tcp()

    async def main() -> None:
        report = await aclose(await open_over(ours, Opened()), closer=closer)
        assert report.outcome is Outcome.BACKGROUND
        assert (await aclose(bare, closer=closer)).outcome is Outcome.BACKGROUND
        protocol = Opened()
        LingeringTransport(await open_over(third, protocol), closer=closer).close()
        while not protocol.lost:
            await asyncio.sleep(0)

    run(main())
    assert [read_to_end(each) for each in (peer, other, last)] == 3 * [Ending(0, None)]


def test_closing_already(run: Runner, closer: Closer, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)

    async def main() -> None:
        transport = LingeringTransport(await open_over(ours, Opened()), Drain(timeout=DEADLINE), closer=closer)
        transport.write(MORE_THAN_FITS)
        transport.close()
        report = await aclose(transport, closer=closer)
        assert tuple(report) == (Outcome.ALREADY_CLOSED, 0, None, 0.0, errno.EBADF)
        transport.abort()

    run(main())
    assert closer.join(AT_ONCE)
    peer.close()


def test_plain_close_is_under_way(run: Runner, closer: Closer, tcp: PairMaker) -> None:
    """It may never end by itself; here it does, and nobody can know whether something was dropped before."""
    ours, _ = tcp(**SMALL_BUFFERS)

    async def main() -> Report:
        transport = await open_over(ours, Opened())
        transport.write(MORE_THAN_FITS)
        transport.close()
        return await aclose(transport, Drain(timeout=SHORT), closer=closer)

    report = run(main())
    assert (report.outcome, report.delivered) == (Outcome.TIMED_OUT, False)


def test_plain_close_is_under_way_and_is_to_go_on(run: Runner, closer: Closer, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)

    async def main() -> tuple[Report, Ending]:
        transport = await open_over(ours, Opened())
        transport.write(MORE_THAN_FITS)
        transport.close()
        report = await aclose(transport, Background(), closer=closer)
        return report, await asyncio.to_thread(read_to_end, peer)

    report, ending = run(main())
    assert report.outcome is Outcome.BACKGROUND
    assert ending == Ending(len(MORE_THAN_FITS), None)


def test_pipes_are_refused(run: Runner) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        reads, writes = os.pipe()
        with os.fdopen(reads, "rb") as source, os.fdopen(writes, "wb") as sink:
            into, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, sink)
            out, _ = await loop.connect_read_pipe(asyncio.Protocol, source)
            for transport in (into, out):
                with pytest.raises(TypeError):
                    await aclose(transport)
                assert not transport.is_closing()
                transport.close()
            await asyncio.sleep(0)

    run(main())


def test_wrong_arguments_leave_the_connection_alone(run: Runner, closer: Closer, tcp: PairMaker) -> None:
    ours, peer = tcp()

    async def main() -> None:
        transport = await open_over(ours, Opened())
        for what in (transport, peer):
            with pytest.raises(ValueError, match="would block"):
                await aclose(what, KernelLinger(1))
            with pytest.raises(TypeError, match=r"write Drain\(timeout=3\)"):
                await aclose(what, 3)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match=r"closer is a lingerx\.Closer"):
                await aclose(what, closer=LONG)  # type: ignore[arg-type]
        for wrong in (3, None, peer.fileno(), Opened()):
            with pytest.raises(TypeError, match="pass a StreamWriter, a transport or a socket"):
                await aclose(wrong)  # type: ignore[arg-type]
        for make in (lingering, lingering_client, lambda _, policy: LingeringTransport(transport, policy)):
            with pytest.raises(ValueError, match="would block"):
                make(Opened, KernelLinger(1))  # type: ignore[arg-type]
        loop = asyncio.get_running_loop()
        datagrams, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, ("127.0.0.1", 0))
        with pytest.raises(TypeError, match="for stream sockets"):
            await aclose(datagrams)
        datagrams.close()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            with pytest.raises(ValueError, match="listening"):
                await aclose(listener)
            assert listener.fileno() >= 0
        transport.write(b"still open")
        assert not transport.is_closing()
        await aclose(transport, Flush(timeout=DEADLINE), closer=closer)

    run(main())
    assert read_to_end(peer) == Ending(10, None)
