"""`lingerx.trio`, in trio's own servers and by itself."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

import test_examples
from closers import LONG, CloserMaker, nonzero
from conformance import SHORT, Graceful, Immediate
from conformance import Closer as AnyCloser
from connections import DEADLINE, SMALL_BUFFERS, Ending, PairMaker, fill, identity, still_open
from lingerx import Abort, Background, Drain, KernelLinger, Outcome, Policy, Report
from lingerx.closer import Closer
from peers import Call, Polite, WritesFirst, read_to_end, send_unread
from refusals import ANSWER, GOOD, REQUEST, Seen, finish, upload

trio = pytest.importorskip("trio")
trustme = pytest.importorskip("trustme")

import trio.testing  # noqa: E402, F811

import lingerx.trio  # noqa: E402
from lingerx.trio import LingeringListener, LingeringStream, aclose, lingering, send_and_aclose  # noqa: E402

A_PROBE = 0.5
"""Seconds: what is left of a peer's window is filled 200 ms and more after all else (RFC 9293 3.8.6.1)."""

BIG_PAGE = bytes(range(256)) * (16 << 12)
BIG_ANSWER = b"HTTP/1.0 413 Content Too Large\r\n\r\n" + BIG_PAGE


@pytest.fixture
def closer(closers: CloserMaker) -> Closer:
    """One whose policy outlasts every test."""
    return closers(LONG)


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    """In trio, but not for ever."""

    async def bounded() -> Any:
        with trio.fail_after(2 * DEADLINE):
            return await main()

    return trio.run(bounded)


def streams(ours: socket.socket) -> Any:
    """Owns: as a trio.SocketStream; in trio only."""
    return trio.SocketStream(trio.socket.from_stdlib_socket(ours))


def unread_lingering(tcp: PairMaker, closer: Closer) -> tuple[LingeringStream, socket.socket]:
    """A stream with input that nobody reads, and its peer; in trio only."""
    ours, peer = tcp()
    send_unread(peer, ours, b"never read")
    return LingeringStream(streams(ours), closer=closer), peer


# Conformance ----------------------------------------------------------------------------------------------


class Closing(Graceful, Immediate):
    """What is handed to trio is non-blocking ever after, and that is trio's doing."""

    test_nonblocking_flag_of_a_shared_description_is_never_touched = None  # type: ignore[assignment]

    @pytest.fixture(params=["socket", "stream", "lingering_stream"])
    def closer(self, request: pytest.FixtureRequest, closers: CloserMaker) -> AnyCloser:
        background = closers()

        def close(sock: socket.socket, policy: Policy) -> Report:
            async def main() -> Report:
                if sock.fileno() < 0:
                    ours = trio.socket.socket()
                    ours.close()
                else:
                    ours = trio.socket.from_stdlib_socket(sock)
                if request.param != "socket":
                    ours = trio.SocketStream(ours)
                if request.param == "lingering_stream":
                    ours = LingeringStream(ours)
                return await aclose(ours, policy, closer=background)

            report: Report = run(main)
            return report

        return close


class TestAclose(Closing):
    """`aclose` of everything that has a socket."""


# Refusals -------------------------------------------------------------------------------------------------


async def refuse(stream: Any) -> None:
    """413, without a look at the body, and it is closed by whoever called this."""
    raw = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    with suppress(AttributeError):
        # Else send_all would wait until no more than 16 KiB are unsent, and so for a client that does not read.
        raw.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NOTSENT_LOWAT, 0x7FFFFFFF)
    await stream.receive_some(100)
    await stream.send_all(ANSWER)


def served(handler: Callable[[Any], Awaitable[object]], client: Callable[[Any], Seen], **tls: Any) -> Seen:
    """What the client saw of a server of trio's with this handler."""

    async def main() -> Seen:
        done = trio.Event()

        async def handle(stream: Any) -> None:
            try:
                await handler(stream)
            finally:
                done.set()

        serve: Any = trio.serve_tcp if not tls else trio.serve_ssl_over_tcp
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(lambda **status: serve(handle, 0, host="127.0.0.1", **tls, **status))
            listener = listeners[0] if not tls else listeners[0].transport_listener
            seen: Seen = await in_thread(lambda: client(listener.socket.getsockname()))
            await done.wait()
            nursery.cancel_scope.cancel()
        return seen

    seen: Seen = run(main)
    return seen


async def in_thread(function: Callable[[], Any]) -> Any:
    """As trio.to_thread.run_sync, but the thread is gone afterwards."""
    done, token = trio.Event(), trio.lowlevel.current_trio_token()

    def call() -> Any:
        try:
            return function()
        finally:
            token.run_sync_soon(done.set)

    with Call(call) as running:
        await done.wait()
    return running.result()


def test_without_lingerx_a_refused_client_loses_the_answer() -> None:
    assert not served(refuse, upload).whole


def test_refused_client_gets_the_answer(closer: Closer) -> None:
    assert served(lingering(refuse, closer=closer), upload) == GOOD
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 1}


def test_refused_client_gets_the_answer_of_a_handler_that_waits_for_the_report(closer: Closer) -> None:
    reports = []

    async def handler(stream: Any) -> None:
        await refuse(stream)
        reports.append(await aclose(stream, LONG, closer=closer))

    assert served(handler, upload) == GOOD
    assert [(report.outcome, report.delivered) for report in reports] == [(Outcome.PEER_CLOSED, True)]
    assert reports[0].drained > len(REQUEST) // 2


def test_handler_that_fails_lingers_too(closer: Closer) -> None:
    async def handler(stream: Any) -> None:
        await refuse(stream)
        raise LookupError

    @lingering_quietly
    async def quiet(stream: Any) -> None:
        await lingering(handler, closer=closer)(stream)

    assert served(quiet, upload) == GOOD


def lingering_quietly(handler: Callable[[Any], Awaitable[object]]) -> Callable[[Any], Awaitable[None]]:
    """trio.serve_tcp would end at the first exception."""

    async def handle(stream: Any) -> None:
        with suppress(LookupError):
            await handler(stream)

    return handle


def test_without_lingerx_a_refused_client_loses_the_answer_over_tls(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    server, client = contexts
    assert not served(refuse, lambda address: upload(address, client), ssl_context=server).whole


@pytest.mark.parametrize("waits", [False, True], ids=["background", "report"])
@pytest.mark.parametrize("https_compatible", [False, True], ids=["close_notify", "https_compatible"])
def test_refused_client_gets_the_answer_over_tls(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], closer: Closer, https_compatible: bool, waits: bool
) -> None:
    server, client = contexts
    endings: list[object] = []

    def uploads(address: Any) -> Seen:
        with socket.create_connection(address, DEADLINE) as raw:
            sock = client.wrap_socket(raw, server_hostname="localhost", suppress_ragged_eofs=False)
            with sock:
                sock.sendall(REQUEST)
                answer = bytearray()
                try:
                    while data := sock.recv(262144):
                        answer += data
                    endings.append("close_notify")
                except ssl.SSLError:
                    endings.append("ragged")
        return Seen(bytes(answer) == ANSWER, True)

    async def handler(stream: Any) -> None:
        await refuse(stream)
        if waits:
            assert (await aclose(stream, LONG, closer=closer)).outcome is Outcome.PEER_CLOSED

    terms = {"ssl_context": server, "https_compatible": https_compatible}
    assert served(lingering(handler, closer=closer), uploads, **terms) == GOOD
    assert endings == ["ragged" if https_compatible else "close_notify"]
    assert closer.join(DEADLINE)
    assert closer.stats().outcomes[Outcome.PEER_CLOSED] == 1


def test_lingering_listener_under_tls(contexts: tuple[ssl.SSLContext, ssl.SSLContext], closer: Closer) -> None:
    """trio closes by force, without close_notify; the client has the whole answer all the same."""
    server, client = contexts

    async def main() -> Seen:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        address = listeners[0].socket.getsockname()
        lingerers = [trio.SSLListener(LingeringListener(listener, closer=closer), server) for listener in listeners]
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda **status: trio.serve_listeners(refuse, lingerers, **status))
            seen: Seen = await in_thread(lambda: upload(address, client))
            nursery.cancel_scope.cancel()
        return seen

    assert run(main) == GOOD
    assert closer.stats().handed_over == 1


# Large answers --------------------------------------------------------------------------------------------


def writes_first(address: Any) -> Seen:
    return finish(socket.create_connection(address, DEADLINE), REQUEST, BIG_PAGE)


def test_large_answer_to_a_client_that_writes_first(closer: Closer) -> None:
    reports = []

    async def handler(stream: Any) -> None:
        await stream.receive_some(100)
        reports.append(await send_and_aclose(stream, BIG_ANSWER, LONG, closer=closer))

    assert served(handler, writes_first) == GOOD
    assert [(report.outcome, report.delivered) for report in reports] == [(Outcome.PEER_CLOSED, True)]


def test_large_answer_in_the_background(closer: Closer) -> None:
    taken = []

    async def handler(stream: Any) -> None:
        await stream.receive_some(100)
        taken.append(await stream.send_and_aclose(BIG_ANSWER))
        taken.append(await stream.send_and_aclose(b"too late"))

    assert served(lingering(handler, closer=closer), writes_first) == GOOD
    assert taken == [True, False]


def test_without_lingerx_a_large_answer_hangs() -> None:
    hung = []

    async def handler(stream: Any) -> None:
        with trio.move_on_after(0.3) as scope:
            await stream.send_all(BIG_ANSWER)
        hung.append(scope.cancelled_caught)

    served(handler, lambda address: upload(address))
    assert hung == [True]


# Limits ---------------------------------------------------------------------------------------------------


async def tls_pair(ours: socket.socket, peer: socket.socket, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> Any:
    """Owns: our trio.SSLStream, and the peer's SSLSocket."""
    stream = trio.SSLStream(streams(ours), contexts[0], server_side=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.do_handshake)
        sock = await in_thread(
            lambda: contexts[1].wrap_socket(peer, server_hostname="localhost", suppress_ragged_eofs=False)
        )
    return stream, sock


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["silent", "full"])
def test_tls_peer_that_does_not_read_is_waited_for_until_the_deadline(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], closer: Closer, tcp: PairMaker, full: bool
) -> None:
    """With "full" there is no room for close_notify."""
    ours, peer = tcp(**SMALL_BUFFERS)

    async def main() -> Report:
        with ours.dup() as copy:
            stream, sock = await tls_pair(ours, peer, contexts)
            copy.settimeout(0)  # as trio's
            while full and fill(copy):
                await trio.sleep(A_PROBE)
        with sock:
            return await aclose(stream, Drain(timeout=SHORT), closer=closer)

    report: Report = run(main)
    assert report.outcome is Outcome.TIMED_OUT
    assert SHORT <= report.elapsed < 1.0
    if full:
        assert report.delivered is False, "close_notify was not sent"


@pytest.mark.slow
def test_without_lingerx_a_tls_peer_that_does_not_read_is_waited_for_without_limit(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], tcp: PairMaker
) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)

    async def main() -> Any:
        with ours.dup() as copy:
            stream, sock = await tls_pair(ours, peer, contexts)
            copy.settimeout(0)  # as trio's
            while fill(copy):
                await trio.sleep(A_PROBE)
        with sock, trio.move_on_after(10 * SHORT) as scope:
            await stream.aclose()
        return scope.cancelled_caught

    assert run(main) is True


def test_tls_handshake_that_was_never_done(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], closer: Closer, tcp: PairMaker
) -> None:
    ours, peer = tcp()

    async def main() -> Report:
        stream = trio.SSLStream(streams(ours), contexts[0], server_side=True)
        report = await aclose(stream, Drain(timeout=SHORT), closer=closer)
        with pytest.raises((trio.ClosedResourceError, trio.BrokenResourceError)):
            await stream.receive_some(1)
        return report

    assert run(main).outcome is Outcome.TIMED_OUT
    assert read_to_end(peer) == Ending(0, None)


def test_input_that_was_received_but_not_read_does_not_cost_close_notify(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], closer: Closer, tcp: PairMaker
) -> None:
    server, client = contexts
    ours, peer = tcp()

    def polite() -> bytes:
        with client.wrap_socket(peer, server_hostname="localhost", suppress_ragged_eofs=False) as sock:
            sock.sendall(bytes(30_000))
            return sock.recv(100)

    async def main() -> Report:
        stream = trio.SSLStream(streams(ours), server, server_side=True)
        with Call(polite) as client_side:
            await stream.receive_some(1)
            report = await aclose(stream, LONG, closer=closer)
            assert client_side.result() == b""
        return report

    assert run(main).outcome is Outcome.PEER_CLOSED


@pytest.mark.parametrize("policy", [Background(), Abort()], ids=["background", "abort"])
def test_tls_by_a_policy_that_does_not_wait(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], closer: Closer, tcp: PairMaker, policy: Policy
) -> None:
    ours, peer = tcp()

    async def main() -> Any:
        stream, sock = await tls_pair(ours, peer, contexts)
        return sock, await aclose(stream, policy, closer=closer)

    sock, report = run(main)
    with sock:
        assert report.outcome is (Outcome.BACKGROUND if policy == Background() else Outcome.ABORTED)
        if policy == Background():
            assert sock.recv(100) == b"", "close_notify"


# trio's contract ------------------------------------------------------------------------------------------


def test_lingering_stream_is_what_trio_calls_a_half_closeable_stream(closer: Closer, tcp: PairMaker) -> None:
    """By a policy that does not linger: else the peer is not told at once that nobody reads any more."""

    async def make() -> Any:
        return [LingeringStream(streams(sock), Background(), closer=closer) for sock in tcp()]

    async def main() -> None:
        await trio.testing.check_half_closeable_stream(make, None)

    run(main)


@pytest.mark.parametrize("before", [False, True], ids=["while_it_waits", "before"])
def test_cancelled(closer: Closer, tcp: PairMaker, before: bool) -> None:
    ours, peer = tcp()
    known = identity(ours)

    async def main() -> Any:
        stream = streams(ours)
        with trio.CancelScope() as scope:
            if before:
                scope.cancel()
            else:
                scope.deadline = trio.current_time() + SHORT
            await aclose(stream, LONG, closer=closer)
        return scope.cancelled_caught

    began = time.monotonic()
    assert run(main) is True
    assert time.monotonic() - began < DEADLINE / 2
    assert closer.join(DEADLINE / 2)
    assert not still_open(known)
    assert nonzero(closer.stats()) == {Outcome.TIMED_OUT: 1}
    assert read_to_end(peer) == Ending(0, None)


@pytest.mark.parametrize("tls", [False, True], ids=["tcp", "tls"])
@pytest.mark.parametrize("how", ["aclose", "lingering_stream"])
def test_tasks_that_are_blocked_in_the_stream_are_told(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], closer: Closer, tcp: PairMaker, how: str, tls: bool
) -> None:
    ours, peer = tcp(**SMALL_BUFFERS)
    told = []

    async def receive(stream: Any) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive_some(1)
        told.append("receiver")

    async def send(stream: Any) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(bytes(8 << 20))
        told.append("sender")

    async def main() -> None:
        stream: Any
        if tls:
            stream, sock = await tls_pair(ours, peer, contexts)
            stream.transport_stream = LingeringStream(stream.transport_stream, Drain(timeout=SHORT), closer=closer)
        else:
            stream, sock = LingeringStream(streams(ours), Drain(timeout=SHORT), closer=closer), peer
        with sock:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive, stream)
                nursery.start_soon(send, stream)
                await trio.testing.wait_all_tasks_blocked(0.01)
                if how == "aclose":
                    report = await aclose(stream, Drain(timeout=SHORT), closer=closer)
                    assert report.outcome is Outcome.TIMED_OUT
                else:
                    await trio.aclose_forcefully(stream)

    run(main)
    assert sorted(told) == ["receiver", "sender"]


def test_closed_twice(closer: Closer, tcp: PairMaker) -> None:
    ours, peer = tcp()
    peer.close()

    async def main() -> None:
        stream = streams(ours)
        assert (await aclose(stream, closer=closer)).outcome is Outcome.PEER_CLOSED
        assert (await aclose(stream, closer=closer)).outcome is Outcome.ALREADY_CLOSED
        report = await send_and_aclose(stream, b"lost", closer=closer)
        assert (report.outcome, report.unacked, report.delivered) == (Outcome.ALREADY_CLOSED, 4, False)
        await stream.aclose()
        await LingeringStream(stream, closer=closer).aclose()
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"x")

    run(main)
    assert closer.stats().handed_over == 1


def test_closed_twice_over_tls(contexts: tuple[ssl.SSLContext, ssl.SSLContext], closer: Closer, tcp: PairMaker) -> None:
    ours, peer = tcp()
    peer.close()

    async def main() -> None:
        stream = trio.SSLStream(streams(ours), contexts[0], server_side=True)
        await stream.transport_stream.aclose()
        for _ in range(2):
            assert (await aclose(stream, closer=closer)).outcome is Outcome.ALREADY_CLOSED
        await stream.aclose()

    run(main)


def test_aclose_forcefully_lingers(closer: Closer, tcp: PairMaker) -> None:
    async def main() -> Any:
        stream, peer = unread_lingering(tcp, closer)
        await stream.send_all(b"answer")
        await trio.aclose_forcefully(stream)
        assert stream.socket.fileno() == -1
        return peer

    peer = run(main)
    assert closer.pending == 1
    assert read_to_end(peer) == Ending(6, None)
    peer.close()
    assert closer.join(DEADLINE)


def test_closer_was_shut_down(closer: Closer, tcp: PairMaker) -> None:
    closer.shutdown()
    ours, peer = tcp()
    known = identity(ours)

    async def main() -> Any:
        stream, other = unread_lingering(tcp, closer)
        await stream.aclose()
        with pytest.raises(RuntimeError):
            await aclose(streams(ours), closer=closer)
        return other

    other = run(main)
    assert not still_open(known)
    assert peer.recv(1) == b""
    with pytest.raises(ConnectionResetError):
        other.recv(1)


def test_default_closer_and_default_policy(tcp: PairMaker) -> None:
    default = lingerx.default_closer()
    try:
        ours, peer = tcp()
        ours.sendall(b"answer")
        with Polite(peer) as client:
            report = run(lambda: aclose(streams(ours)))
        assert (report.outcome, client.received) == (Outcome.PEER_CLOSED, 6)
        ours, peer = tcp()
        with WritesFirst(peer, bytes(100_000)) as writer:
            run(lambda: lingering(_send_answer)(streams(ours)))
        assert writer.ending == Ending(6, None)
    finally:
        default.shutdown(1.0)


async def _send_answer(stream: Any) -> None:
    await stream.send_all(b"answer")


# Arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "error"),
    [(3.0, TypeError), (Drain, TypeError), (KernelLinger(1), ValueError)],
    ids=["number", "class", "kernel_linger"],
)
def test_wrong_policy_leaves_the_stream_alone(
    closer: Closer, tcp: PairMaker, policy: Any, error: type[Exception]
) -> None:
    ours, peer = tcp()

    async def main() -> None:
        async with streams(ours) as stream:
            with pytest.raises(error):
                await aclose(stream, policy, closer=closer)
            with pytest.raises(error):
                await send_and_aclose(stream, b"x", policy, closer=closer)
            with pytest.raises(error):
                LingeringStream(stream, policy, closer=closer)
            with pytest.raises(error):
                lingering(refuse, policy, closer=closer)
            await stream.send_all(b"still open")

    run(main)
    assert peer.recv(100) == b"still open"


def test_wrong_arguments_leave_the_stream_alone(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], closers: CloserMaker, closer: Closer, tcp: PairMaker
) -> None:
    ours, peer = tcp()
    hasty = closers(Background())

    async def main() -> None:
        async with streams(ours) as stream:
            with pytest.raises(TypeError, match=r"lingerx\.Closer"):
                await aclose(stream, closer=3)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="bytes-like"):
                await send_and_aclose(stream, "text", closer=closer)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="deadline"):
                await send_and_aclose(stream, b"x", Background(), closer=closer)
            tls = trio.SSLStream(stream, contexts[0], server_side=True)
            with pytest.raises(ValueError, match="TLS"):
                await send_and_aclose(tls, b"x", closer=closer)
            lingerer = LingeringStream(stream, Abort(), closer=closer)
            with pytest.raises(ValueError, match="deadline"):
                await lingerer.send_and_aclose(b"x")
            with pytest.raises(ValueError, match="deadline"):
                await LingeringStream(stream, closer=hasty).send_and_aclose(b"x")
            with pytest.raises(TypeError, match="bytes-like"):
                await lingerer.send_and_aclose("x")  # type: ignore[arg-type]
            await stream.send_all(b"still open")

    run(main)
    assert peer.recv(100) == b"still open"


def test_what_is_no_stream(closer: Closer) -> None:
    async def main() -> None:
        with pytest.raises(TypeError, match=r"trio\.SocketStream"):
            await aclose(object(), closer=closer)
        with pytest.raises(TypeError, match=r"trio\.SocketStream"):
            LingeringStream(object(), closer=closer)  # type: ignore[arg-type]
        with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as sock, pytest.raises(TypeError, match="SOCK_STREAM"):
            await aclose(sock, closer=closer)
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listener:
            with pytest.raises(ValueError, match="listening"):
                await aclose(listener.socket, closer=closer)

    run(main)


def test_trio_is_missing() -> None:
    program = "import sys; sys.modules['trio'] = None; import lingerx.trio"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE)
    assert "ImportError: lingerx.trio needs trio, which is not installed: pip install 'lingerx[trio]'" in done.stderr
    assert "ModuleNotFoundError" in done.stderr, "raised from the original"


# Cost -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_silent_peers_cost_the_loop_nothing(closer: Closer, tcp: PairMaker) -> None:
    """The loop's largest gap, and how long a fresh request takes, with 50 peers that are lingered for, and without."""

    async def echo(stream: Any) -> None:
        await stream.send_all(await stream.receive_some(100))

    async def measure() -> tuple[float, float]:
        gaps, requests = [0.0], []
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        name = listeners[0].socket.getsockname()

        async def beat() -> None:
            while True:
                began = time.perf_counter()
                await trio.sleep(0.005)
                gaps.append(time.perf_counter() - began)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(beat)
            await nursery.start(lambda **status: trio.serve_listeners(echo, listeners, **status))
            for _ in range(40):
                began = time.perf_counter()
                async with await trio.open_tcp_stream(*name) as client:
                    await client.send_all(b"hello")
                    assert await client.receive_some(100) == b"hello"
                requests.append(time.perf_counter() - began)
                await trio.sleep(0.005)
            nursery.cancel_scope.cancel()
        return max(gaps), sorted(requests)[len(requests) // 2]

    async def main() -> tuple[tuple[float, float], tuple[float, float]]:
        without = await measure()
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(lambda: aclose(streams(tcp()[0]), LONG, closer=closer))
            await trio.testing.wait_all_tasks_blocked()
            assert closer.pending == 50
            with_them = await measure()
            assert closer.pending == 50
            nursery.cancel_scope.cancel()
        return without, with_them

    (gap, request), (gap_with_them, request_with_them) = run(main)
    assert gap_with_them < 5 * gap + 0.1
    assert request_with_them < 5 * request + 0.02


# The example ----------------------------------------------------------------------------------------------

server = test_examples.server
example = pytest.mark.parametrize("server", ["trio_server.py"], indirect=True)


@example
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to handle")
@pytest.mark.parametrize(
    "test",
    [
        test_examples.test_clients_that_write_everything_before_they_read,
        test_examples.test_clients_that_say_nothing_or_go_away,
    ],
)
def test_example(test: Callable[..., None], server: Any, stack: Any) -> None:
    test(server, stack)


@example
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to handle")
def test_example_ends(server: Any) -> None:
    test_examples.test_sigterm_while_nothing_happens(server)
