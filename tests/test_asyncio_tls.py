"""TLS over asyncio and uvloop: close_notify goes out behind the answer, then the raw connection lingers."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from closers import LONG, CloserMaker, nonzero
from connections import A_LONG_LOOK, DEADLINE, PairMaker
from event_loops import LOOPS, Opened, Runner, open_over, until
from lingerx import Abort, Background, Drain, Flush, Outcome, Policy, Report
from lingerx._asyncio_close import _below
from lingerx.asyncio import LingeringTransport, aclose, lingering_client
from lingerx.closer import Closer
from peers import Call, read_to_end, reset

MIB = 1 << 20
MUCH = 16 * MIB
SHORT = 0.05
AT_ONCE = 1.0
"""Seconds that what does not wait may take, however busy the machine."""


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Runner:
    """Each kind of loop in turn."""
    return Runner(request.param)


@pytest.fixture
def closer(closers: CloserMaker) -> Closer:
    """One whose policy outlasts every test."""
    return closers(LONG)


class Shaken:
    """Both ends of a TLS connection: a transport of ours and a blocking peer that tells a FIN from close_notify."""

    transport: asyncio.Transport
    protocol: Opened
    peer: ssl.SSLSocket


async def shake(pair: tuple[socket.socket, socket.socket], contexts: Any, stack: ExitStack) -> Shaken:
    ours, raw = pair
    raw.settimeout(DEADLINE)
    loop = asyncio.get_running_loop()
    both = Shaken()
    both.protocol = Opened()

    def wrap() -> ssl.SSLSocket:
        wrapped: ssl.SSLSocket = contexts[1].wrap_socket(raw, server_hostname="localhost", suppress_ragged_eofs=False)
        return wrapped

    peer = loop.run_in_executor(None, wrap)
    both.transport = await open_over(ours, both.protocol, contexts[0])
    both.peer = stack.enter_context(await peer)
    return both


def receive(peer: ssl.SSLSocket) -> int:
    """Bytes up to close_notify; ssl.SSLEOFError for an end without one."""
    received = 0
    while data := peer.recv(65536):
        received += len(data)
    return received


@pytest.mark.parametrize("size", [1, MIB, pytest.param(MUCH, marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", [LONG, Flush(timeout=DEADLINE)], ids=["drain", "flush"])
def test_close_notify_comes_behind_the_last_byte(
    run: Runner, closer: Closer, tcp: PairMaker, contexts: Any, stack: ExitStack, size: int, policy: Policy
) -> None:
    async def main() -> Report:
        both = await shake(tcp(), contexts, stack)

        def write_first() -> int:
            if isinstance(policy, Flush):
                return receive(both.peer)  # and neither sends (that may be answered by RST) nor closes
            both.peer.sendall(bytes(8 * MIB))
            received = receive(both.peer)
            both.peer.close()
            return received

        both.transport.write(bytes(size))
        with Call(write_first) as call:
            report = await aclose(both.transport, policy, closer=closer)
            assert both.protocol.lost == [None]
            assert call.result() == size
        return report

    report = run(main())
    assert report.outcome is (Outcome.PEER_CLOSED if isinstance(policy, Drain) else Outcome.ACKED)
    assert (report.unacked, report.error, report.delivered) == (0, None, True)


def test_transport_under_tls_is_found(run: Runner, tcp: PairMaker, contexts: Any, stack: ExitStack) -> None:
    """Its names are not public. Without them TLS would end as the loop does it by itself, and lose answers."""

    async def main() -> None:
        both = await shake(tcp(), contexts, stack)
        below = _below(both.transport)
        both.transport.write(bytes(MUCH))
        assert below.get_write_buffer_size() > MIB
        both.transport.abort()
        await until(lambda: bool(both.protocol.lost))

    run(main())


@pytest.mark.parametrize("peer_closes", [False, True])
def test_transport_under_tls_is_not_found(
    run: Runner,
    closer: Closer,
    tcp: PairMaker,
    contexts: Any,
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    peer_closes: bool,
) -> None:
    monkeypatch.setattr("lingerx._asyncio_close._below", lambda _: None)

    async def main() -> Report:
        both = await shake(tcp(), contexts, stack)
        both.transport.write(b"answer")

        def receive_and_close() -> None:
            assert receive(both.peer) == 6
            if peer_closes:
                both.peer.close()

        with Call(receive_and_close):
            return await aclose(both.transport, LONG if peer_closes else Drain(timeout=SHORT), closer=closer)

    report = run(main())
    if peer_closes:
        assert (report.outcome, report.delivered) == (Outcome.PEER_CLOSED, None)
    else:
        assert (report.outcome, report.delivered) == (Outcome.TIMED_OUT, None)


def test_silent_peer_costs_the_loop_nothing(
    run: Runner, closer: Closer, tcp: PairMaker, contexts: Any, stack: ExitStack
) -> None:
    """Left to itself TLS would wait for the peer's close_notify in the loop, for 30 s."""

    async def main() -> None:
        both = await shake(tcp(), contexts, stack)
        transport = LingeringTransport(both.transport, closer=closer)
        transport.write(b"answer")
        transport.close()
        await until(lambda: bool(both.protocol.lost))
        assert closer.pending == 1
        assert receive(both.peer) == 6
        with socket.socket(fileno=both.peer.detach()) as raw:
            assert raw.recv(1) == b"", "a FIN comes behind close_notify"
            assert closer.pending == 1

    run(main())
    assert closer.join(DEADLINE)


def test_peer_that_never_reads(run: Runner, closer: Closer, tcp: PairMaker, contexts: Any, stack: ExitStack) -> None:
    async def main() -> Report:
        both = await shake(tcp(), contexts, stack)
        both.transport.write(bytes(MUCH))
        report = await aclose(both.transport, Drain(timeout=SHORT), closer=closer)
        assert both.protocol.lost == [None]
        with pytest.raises(ssl.SSLEOFError):  # what was cut off does not look complete
            receive(both.peer)
        return report

    report = run(main())
    assert (report.outcome, report.delivered) == (Outcome.TIMED_OUT, False)
    assert SHORT <= report.elapsed < AT_ONCE


def test_peer_that_says_goodbye_first_and_reads_late(
    run: Runner, closer: Closer, tcp: PairMaker, contexts: Any, stack: ExitStack
) -> None:
    async def main() -> Report:
        both = await shake(tcp(), contexts, stack)
        both.transport.write(bytes(4 * MIB))
        task = asyncio.ensure_future(aclose(both.transport, LONG, closer=closer))
        await asyncio.sleep(A_LONG_LOOK)

        def goodbye() -> int:
            raw = both.peer
            with suppress(ssl.SSLError, OSError):
                raw.settimeout(A_LONG_LOOK)
                raw.unwrap()  # sends close_notify, then sees data
            raw.settimeout(DEADLINE)
            received = 0
            with socket.socket(fileno=raw.detach()) as bare:
                bare.settimeout(DEADLINE)
                while data := bare.recv(65536):
                    received += len(data)
            return received

        with Call(goodbye) as call:
            report = await task
            assert call.result() > 3 * MIB
        return report

    report = run(main())
    assert report.outcome is Outcome.PEER_CLOSED
    assert report.delivered is not False


def test_peer_that_resets_while_we_send(
    run: Runner, closer: Closer, tcp: PairMaker, contexts: Any, stack: ExitStack
) -> None:
    async def main() -> Report:
        both = await shake(tcp(), contexts, stack)
        both.transport.write(bytes(MUCH))
        asyncio.get_running_loop().call_later(SHORT, reset, both.peer)
        return await aclose(both.transport, LONG, closer=closer)

    report = run(main())
    assert (report.outcome, report.unacked, report.delivered) == (Outcome.PEER_RESET, None, False)
    assert report.error in (errno.ECONNRESET, errno.EPIPE)


@pytest.mark.parametrize("close_notify", [False, True])
def test_peer_that_ends_then_takes_what_the_kernel_has_and_resets(
    run: Runner, closer: Closer, tcp: PairMaker, contexts: Any, stack: ExitStack, close_notify: bool
) -> None:
    """The kernel's queue is empty then, and says nothing of what the transport has dropped."""

    async def main() -> Report:
        both = await shake(tcp(), contexts, stack)
        both.transport.write(bytes(MUCH))
        task = asyncio.ensure_future(aclose(both.transport, LONG, closer=closer))
        await asyncio.sleep(0)
        both.peer.settimeout(SHORT)
        if close_notify:
            with suppress(OSError):
                both.peer.unwrap()
        else:
            both.peer.shutdown(socket.SHUT_WR)
        await asyncio.sleep(A_LONG_LOOK)
        raw = socket.socket(fileno=both.peer.detach())
        raw.settimeout(SHORT)
        received = 0
        with suppress(TimeoutError, socket.timeout):  # here the loop stands still
            while True:
                received += len(raw.recv(MIB))
        assert received < MUCH
        reset(raw)
        return await task

    report = run(main())
    assert (report.outcome, report.unacked, report.delivered) == (Outcome.PEER_RESET, None, False)


@pytest.mark.parametrize("what", ["close", "close twice", "abort", "abort at once"])
def test_somebody_else_closes_while_we_send(
    run: Runner, closer: Closer, tcp: PairMaker, contexts: Any, stack: ExitStack, what: str
) -> None:
    """asyncio's own transport forgets the connection when it is closed twice; the limits hold all the same."""

    async def main() -> Report:
        both = await shake(tcp(), contexts, stack)
        both.transport.write(bytes(MUCH))
        task = asyncio.ensure_future(aclose(both.transport, Drain(timeout=SHORT), closer=closer))
        await asyncio.sleep(0 if what == "abort at once" else SHORT / 5)
        if what.startswith("abort"):
            both.transport.abort()
        else:
            for _ in range(2 if what == "close twice" else 1):
                both.transport.close()
        report = await task
        assert both.protocol.lost == [None]
        return report

    report = run(main())
    assert report.outcome is Outcome.TIMED_OUT
    assert report.delivered is not True
    assert report.elapsed < AT_ONCE


def test_closed_by_the_peer_already(
    run: Runner, closer: Closer, tcp: PairMaker, contexts: Any, stack: ExitStack
) -> None:
    async def main() -> Report:
        both = await shake(tcp(), contexts, stack)
        both.peer.close()
        await until(lambda: bool(both.protocol.lost))
        report = await aclose(both.transport, LONG, closer=closer)
        both.transport.close()  # CPython 3.10 warns otherwise
        return report

    assert run(main()).outcome is Outcome.ALREADY_CLOSED


def test_cancelled_while_sending(run: Runner, closer: Closer, tcp: PairMaker, contexts: Any, stack: ExitStack) -> None:
    async def main() -> None:
        both = await shake(tcp(), contexts, stack)
        both.transport.write(bytes(MUCH))
        task = asyncio.ensure_future(aclose(both.transport, LONG, closer=closer))
        await asyncio.sleep(A_LONG_LOOK)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: bool(both.protocol.lost))

    run(main())
    assert closer.join(AT_ONCE)


def test_abort_and_background(run: Runner, closer: Closer, tcp: PairMaker, contexts: Any, stack: ExitStack) -> None:
    async def main() -> None:
        both = await shake(tcp(), contexts, stack)
        assert (await aclose(both.transport, Abort(), closer=closer)).outcome is Outcome.ABORTED
        with socket.socket(fileno=both.peer.detach()) as raw:
            assert read_to_end(raw).error == errno.ECONNRESET
        both = await shake(tcp(), contexts, stack)
        both.transport.write(b"answer")
        assert (await aclose(both.transport, Background(), closer=closer)).outcome is Outcome.BACKGROUND
        assert receive(both.peer) == 6
        both.peer.close()
        await until(lambda: bool(both.protocol.lost))

    run(main())
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.ABORTED: 1, Outcome.BACKGROUND: 1}


def test_input_that_the_protocol_did_not_want(
    run: Runner, closer: Closer, tcp: PairMaker, contexts: Any, stack: ExitStack
) -> None:
    """Decrypted or not, it waits in the TLS transport when reading is paused, and must not break the goodbye."""

    async def main() -> Report:
        both = await shake(tcp(), contexts, stack)
        both.transport.pause_reading()
        both.peer.sendall(bytes(100_000))
        await asyncio.sleep(A_LONG_LOOK)
        both.transport.write(b"answer")

        def finish() -> int:
            received = receive(both.peer)
            both.peer.close()
            return received

        with Call(finish) as call:
            report = await aclose(both.transport, LONG, closer=closer)
            assert call.result() == 6
        return report

    report = run(main())
    assert (report.outcome, report.delivered) == (Outcome.PEER_CLOSED, True)


def test_start_tls_over_a_lingering_transport(
    run: Runner, closer: Closer, tcp: PairMaker, contexts: Any, stack: ExitStack
) -> None:
    async def main() -> Report:
        ours, raw = tcp()
        loop = asyncio.get_running_loop()
        protocol = Opened()
        transport = LingeringTransport(await open_over(ours, protocol), closer=closer)
        with Call(lambda: contexts[1].wrap_socket(raw, server_hostname="localhost")) as call:
            # (uvloop looks for its own classes.)
            below = transport.wrapped if run.kind == "uvloop" else transport
            encrypted = await loop.start_tls(below, protocol, contexts[0], server_side=True)
            assert encrypted is not None
            while call.is_alive():
                await asyncio.sleep(0.001)
            peer = stack.enter_context(call.result())
        over = LingeringTransport(encrypted, closer=closer)
        over.write(bytes(MIB))

        def finish() -> int:
            peer.sendall(bytes(8 * MIB))
            received = receive(peer)
            peer.close()
            return received

        with Call(finish) as call_2:
            report = await aclose(over, LONG, closer=closer)
            assert call_2.result() == MIB
        return report

    report = run(main())
    assert (report.outcome, report.delivered) == (Outcome.PEER_CLOSED, True)


def test_stream_writer(run: Runner, closer: Closer, contexts: Any, stack: ExitStack) -> None:
    """More input than a StreamReader takes: it has paused its transport."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        await asyncio.sleep(A_LONG_LOOK)
        writer.write(bytes(MIB))
        writer.close()
        await writer.wait_closed()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await asyncio.start_server(
            lingering_client(refuse, closer=closer), "127.0.0.1", 0, limit=100, ssl=contexts[0]
        )
        raw = socket.create_connection(server.sockets[0].getsockname(), DEADLINE)

        def write_first() -> int:
            with contexts[1].wrap_socket(raw, server_hostname="localhost", suppress_ragged_eofs=False) as peer:
                peer.sendall(bytes(8 * MIB))
                return receive(peer)

        assert await loop.run_in_executor(None, write_first) == MIB
        server.close()
        await server.wait_closed()

    run(main())
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 1}
