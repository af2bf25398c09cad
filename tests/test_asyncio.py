"""`lingerx.asyncio`: refused uploads, what a LingeringTransport is to its protocol, streams and servers."""

from __future__ import annotations

import asyncio
import errno
import io
import socket
import ssl
import sys
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from closers import LONG, CloserMaker, nonzero, output_of, start_program
from connections import A_LONG_LOOK, DEADLINE, SMALL_BUFFERS, Ending, PairMaker
from event_loops import LOOPS, Opened, Runner, open_over, until
from lingerx import Abort, KernelLinger, Outcome
from lingerx.asyncio import LingeringTransport, aclose, lingering, lingering_client
from lingerx.closer import Closer
from peers import Polite, read_to_end
from refusals import GOOD, REQUEST, Seen, finish

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


# Refused uploads ------------------------------------------------------------------------------------------


def page_of(size: int) -> bytes:
    return bytes(range(256)) * (size // 256)


async def serve(way: str, answer: bytes, closer: Closer, where: str, tls: ssl.SSLContext | None) -> Any:
    """A server that answers the first byte of a request, and closes in one of five ways."""
    loop = asyncio.get_running_loop()
    tasks = []

    class Refusing(asyncio.Protocol):
        answered = False

        def connection_made(self, transport: Any) -> None:
            self.transport = LingeringTransport(transport, closer=closer) if way == "wrapper" else transport

        def data_received(self, data: bytes) -> None:
            if self.answered:
                return
            self.answered = True
            self.transport.write(answer)
            if way == "aclose":
                tasks.append(loop.create_task(aclose(self.transport, LONG, closer=closer)))
            else:
                self.transport.close()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.write(answer)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    address: dict[str, Any] = {"path": where} if where else {"host": "127.0.0.1", "port": 0}
    if way == "lingering_client":
        start = asyncio.start_unix_server if where else asyncio.start_server
        return await start(lingering_client(refuse, closer=closer), **address, ssl=tls)
    create = loop.create_unix_server if where else loop.create_server
    return await create(lingering(Refusing, closer=closer) if way == "lingering" else Refusing, **address, ssl=tls)


def upload(kind: str, address: Any, page: bytes, tls: ssl.SSLContext, patience: float) -> Seen:
    sock = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
    sock.settimeout(DEADLINE)
    sock.connect(address)
    if kind == "tls":
        sock = tls.wrap_socket(sock, server_hostname="localhost")
    return finish(sock, REQUEST, page, patience)


def refused(
    run: Runner, way: str, kind: str, size: int, closer: Closer, where: str, contexts: Any, patience: float = DEADLINE
) -> list[Seen]:
    """What three clients saw that wrote 8 MiB before they read an answer of `size`."""
    page = page_of(size)

    async def main() -> list[Seen]:
        loop = asyncio.get_running_loop()
        answer = b"HTTP/1.0 413 Content Too Large\r\n\r\n" + page
        tls = contexts[0] if kind == "tls" else None
        server = await serve(way, answer, closer, where if kind == "unix" else "", tls)
        async with server:
            address = server.sockets[0].getsockname()
            calls = [loop.run_in_executor(None, upload, kind, address, page, contexts[1], patience) for _ in range(3)]
            return [await call for call in calls]

    return run(main())


@pytest.fixture
def where(tmp_path: Any) -> str:
    return str(tmp_path / "s")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["lingering", "wrapper", "lingering_client", "aclose"])
def test_refused_uploads(run: Runner, way: str, kind: str, closer: Closer, where: str, contexts: Any) -> None:
    assert refused(run, way, kind, MIB, closer, where, contexts) == 3 * [GOOD]
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 3}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_refused_uploads_with_an_answer_that_no_kernel_takes_at_once(
    run: Runner, kind: str, closer: Closer, where: str, contexts: Any
) -> None:
    assert refused(run, "lingering", kind, 16 * MIB, closer, where, contexts) == 3 * [GOOD]
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 3}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_without_lingerx(run: Runner, kind: str, closer: Closer, where: str, contexts: Any) -> None:
    seen = refused(run, "plain", kind, MIB, closer, where, contexts, patience=0.5)
    if (run.kind, kind) == ("uvloop", "tls"):
        return  # which reads on while it closes, for up to 30 s
    assert GOOD not in seen


# LingeringTransport ---------------------------------------------------------------------------------------


async def connected(ours: socket.socket, protocol: Opened, **terms: Any) -> LingeringTransport:
    """A LingeringTransport, as a server's factory of `lingering` makes it."""
    await open_over(ours, lingering(lambda: protocol, **terms)())  # type: ignore[arg-type]
    assert isinstance(protocol.transport, LingeringTransport)
    return protocol.transport


def test_protocol_is_told_when_the_transport_closes_not_when_the_peer_does(
    run: Runner, closer: Closer, tcp: PairMaker
) -> None:
    ours, peer = tcp()

    async def main() -> None:
        protocol = Opened()
        transport = await connected(ours, protocol, closer=closer)
        transport.write(b"answer")
        transport.close()
        transport.close()
        assert transport.is_closing()
        assert protocol.lost == []
        await until(lambda: bool(protocol.lost))
        assert closer.pending == 1

    run(main())
    assert read_to_end(peer) == Ending(6, None)
    peer.close()
    assert closer.join(DEADLINE)


def test_the_protocol_is_the_transport_s_own_until_close(run: Runner, closer: Closer, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)

    async def main() -> None:
        protocol, other = Opened(), Opened()
        transport = await connected(ours, protocol, closer=closer)
        assert transport.wrapped.get_protocol() is protocol is transport.get_protocol()
        assert isinstance(transport, asyncio.Transport)
        assert LingeringTransport(transport).wrapped is transport.wrapped
        assert transport.get_extra_info("peername") == peer.getsockname()
        assert repr(transport.wrapped) in repr(transport)
        assert transport.can_write_eof()
        transport.set_write_buffer_limits(high=100, low=10)
        assert transport.get_write_buffer_limits() == (10, 100)
        transport.pause_reading()
        assert not transport.is_reading()
        transport.resume_reading()
        assert transport.is_reading()
        with pytest.raises(AttributeError, match="no_such_thing"):
            transport.no_such_thing  # noqa: B018
        transport.set_protocol(other)
        assert transport.wrapped.get_protocol() is other
        transport.writelines([MORE_THAN_FITS])
        transport.close()
        assert transport.get_write_buffer_size() > 0
        assert not transport.is_reading()
        assert transport.get_protocol() is other
        transport.set_protocol(protocol)
        for late in (transport.pause_reading, transport.resume_reading, transport.write_eof):
            late()
        transport.set_write_buffer_limits()
        transport.write(b"late")
        transport.writelines([b"late"])
        with Polite(peer) as client:
            await until(lambda: bool(protocol.lost))
        assert client.ending == Ending(len(MORE_THAN_FITS), None)
        assert not other.lost
        assert not protocol.received

    run(main())


def test_buffered_protocol(run: Runner, closer: Closer, tcp: PairMaker) -> None:
    ours, peer = tcp()

    class Buffered(asyncio.BufferedProtocol):
        def __init__(self) -> None:
            self.buffer = bytearray(100)
            self.seen = 0

        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def get_buffer(self, sizehint: int) -> bytearray:
            return self.buffer

        def buffer_updated(self, nbytes: int) -> None:
            self.seen += nbytes
            self.transport.write(b"answer")
            self.transport.close()

        def connection_lost(self, error: Exception | None) -> None:
            self.seen += 1000

    async def main() -> None:
        protocol = Buffered()
        await open_over(ours, lingering(lambda: protocol, closer=closer)())  # type: ignore[arg-type]
        peer.sendall(b"request")
        await until(lambda: protocol.seen > 1000)
        assert protocol.buffer[:7] == b"request"

    run(main())
    assert read_to_end(peer) == Ending(6, None)


def test_abort_ends_a_close_that_is_under_way(run: Runner, closer: Closer, tcp: PairMaker) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)

    async def main() -> None:
        protocol = Opened()
        transport = await connected(ours, protocol, closer=closer)
        transport.write(MORE_THAN_FITS)
        transport.close()
        await asyncio.sleep(A_LONG_LOOK)
        assert protocol.lost == []
        transport.abort()
        await until(lambda: bool(protocol.lost))

    run(main())
    assert closer.join(AT_ONCE)
    assert read_to_end(peer).received < len(MORE_THAN_FITS)


def test_abort_and_policies_of_one_connection(run: Runner, closer: Closer, tcp: PairMaker) -> None:
    (first, plain), (second, resets) = tcp(), tcp()

    async def main() -> None:
        protocols = [Opened(), Opened()]
        (await connected(first, protocols[0], closer=closer)).abort()
        transport = await connected(second, protocols[1], closer=closer)
        transport.policy = Abort()
        transport.close()
        await until(lambda: all(protocol.lost for protocol in protocols))

    run(main())
    assert read_to_end(plain) == Ending(0, None)
    assert read_to_end(resets) == Ending(0, errno.ECONNRESET)
    assert nonzero(closer.stats()) == {Outcome.ABORTED: 1}


def test_wrong_policy_or_closer_was_set(run: Runner, closer: Closer, tcp: PairMaker) -> None:
    ours, peer = tcp()

    async def main() -> None:
        protocol = Opened()
        transport = await connected(ours, protocol, closer=closer)
        for name, wrong in (("policy", KernelLinger(1)), ("policy", 3), ("closer", 3)):
            right = getattr(transport, name)
            setattr(transport, name, wrong)
            with pytest.raises((TypeError, ValueError)):
                transport.close()
            assert not transport.is_closing()
            setattr(transport, name, right)
        transport.close()
        await until(lambda: bool(protocol.lost))

    run(main())
    assert read_to_end(peer) == Ending(0, None)


def test_peer_s_end_closes_plainly_and_close_does_nothing_more(run: Runner, closer: Closer, tcp: PairMaker) -> None:
    ours, peer = tcp()

    async def main() -> None:
        protocol = Opened()
        transport = await connected(ours, protocol, closer=closer)
        peer.shutdown(socket.SHUT_WR)
        await until(lambda: bool(protocol.lost))
        assert transport.is_closing()
        transport.close()
        transport.abort()

    run(main())
    assert closer.stats().handed_over == 0


def test_sendfile(closer: Closer, tcp: PairMaker, tmp_path: Any) -> None:
    ours, peer = tcp()
    (tmp_path / "file").write_bytes(page_of(MIB))

    async def main(file: io.BufferedReader) -> None:
        transport = await connected(ours, Opened(), closer=closer)
        assert await asyncio.get_running_loop().sendfile(transport, file) == MIB
        transport.close()

    with Polite(peer) as client, (tmp_path / "file").open("rb") as file:
        Runner("asyncio")(main(file))  # uvloop has no sendfile
    assert client.ending == Ending(MIB, None)


# Streams and servers --------------------------------------------------------------------------------------


def test_stream_writer_is_closed_as_ever(run: Runner, closer: Closer, stack: ExitStack) -> None:
    ends: list[Any] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(4) == b"ping"
        writer.write(b"answer")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        ends.append((writer.is_closing(), closer.pending))

    async def main() -> None:
        server = await asyncio.start_server(lingering_client(handle, closer=closer), "127.0.0.1", 0)
        peer = stack.enter_context(socket.create_connection(server.sockets[0].getsockname(), DEADLINE))
        peer.sendall(b"ping, and more that nobody reads")
        await until(lambda: bool(ends))
        server.close()
        await asyncio.wait_for(server.wait_closed(), AT_ONCE)
        assert ends == [(True, 1)]
        assert read_to_end(peer) == Ending(6, None)

    run(main())


def test_handler_that_raises_is_cancelled_or_is_no_coroutine(closer: Closer, stack: ExitStack) -> None:
    def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        async def answer() -> None:
            kind = await reader.readexactly(1)
            writer.write(b"answer")
            if kind == b"r":
                raise ZeroDivisionError
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(DEADLINE)

        handled.append(writer)
        if len(handled) == 1:
            writer.write(b"answer")
            return writer.close()
        return answer()

    handled: list[asyncio.StreamWriter] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await asyncio.start_server(lingering_client(handle, closer=closer), "127.0.0.1", 0)
        for kind in (b"s", b"r", b"c"):
            peer = stack.enter_context(socket.create_connection(server.sockets[0].getsockname(), DEADLINE))
            peer.sendall(kind + MORE_THAN_FITS[:100_000])
            assert await loop.run_in_executor(None, read_to_end, peer) == Ending(6, None)
        server.close()
        handled.clear()

    with pytest.raises(AssertionError, match=r"Unhandled exception in client_connected_cb.*ZeroDivisionError"):
        Runner("asyncio")(main())
    assert closer.pending == 3


def test_server_closes_while_connections_linger_and_send(run: Runner, closer: Closer, tcp: PairMaker) -> None:
    """wait_closed (asyncio's, from CPython 3.12 on) waits for what is still being sent, and for no lingering peer."""

    class Answering(Opened):
        def data_received(self, data: bytes) -> None:
            self.transport.write(page_of(16 * MIB) if data == b"much" else b"little")
            self.transport.close()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        protocols: list[Answering] = []

        def make() -> Answering:
            protocols.append(Answering())
            return protocols[-1]

        server = await loop.create_server(lingering(make, closer=closer), "127.0.0.1", 0)
        with ExitStack() as stack:
            peers = [
                stack.enter_context(socket.create_connection(server.sockets[0].getsockname(), DEADLINE))
                for _ in range(4)
            ]
            for peer, request in zip(peers, 2 * (b"much", b"little"), strict=True):
                peer.sendall(request)
            await until(
                lambda: sum(each.transport is not None and each.transport.is_closing() for each in protocols) == 4
            )
            server.close()
            readers = [loop.run_in_executor(None, read_to_end, peer) for peer in peers]
            await asyncio.wait_for(server.wait_closed(), DEADLINE)
            if run.kind == "asyncio" and sys.version_info >= (3, 12):
                assert all(protocol.lost == [None] for protocol in protocols)
            assert await asyncio.gather(*readers) == 2 * [Ending(16 * MIB, None), Ending(6, None)]
            assert closer.pending == 4

    run(main())
    assert closer.join(DEADLINE)


def test_loop_ends_while_a_connection_lingers(run: Runner, closer: Closer, tcp: PairMaker) -> None:
    ours, peer = tcp()

    async def main() -> None:
        protocol = Opened()
        transport = await connected(ours, protocol, closer=closer)
        transport.write(b"answer")
        transport.close()
        await until(lambda: bool(protocol.lost))

    run(main())
    assert closer.pending == 1
    assert read_to_end(peer) == Ending(6, None)
    peer.close()
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 1}


PROGRAM_THAT_STOPS = """if True:
    import asyncio, gc, importlib, socket, sys, warnings
    import lingerx, lingerx.asyncio

    async def main():
        ours, peer = socket.socketpair()
        transport, protocol = await asyncio.get_running_loop().connect_accepted_socket(Protocol, ours)
        if "lingering" in sys.argv:
            transport = lingerx.asyncio.LingeringTransport(transport)
        transport.write(bytes(4 << 20))
        transport.close()
        return peer

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport = transport

    loop = importlib.import_module(sys.argv[1]).new_event_loop()
    peer = loop.run_until_complete(main())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.close()
        del loop
        gc.collect()
    peer.settimeout(5)
    received = 0
    while data := peer.recv(65536):
        received += len(data)
    peer.close()
    # Whether the transport's socket warns too depends on which of the two is collected first.
    print(received < 4 << 20, "transport" in [str(each.message).split()[1] for each in caught])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOOPS)
def test_loop_ends_while_a_connection_sends(engine_name: str, kind: str) -> None:
    """It is cut off, and the loop warns of its own transport, both as without lingerx."""
    pytest.importorskip(kind)
    said = []
    for way in ("plain", "lingering"):
        with start_program(engine_name, PROGRAM_THAT_STOPS, kind, way) as process:
            said.append(output_of(process))
    assert said[0] == said[1]
    assert said[0].startswith("True")
