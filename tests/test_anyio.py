"""`lingerx.anyio` on asyncio, uvloop and trio, in anyio's own servers and by itself."""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import os
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
from connections import DEADLINE, SMALL_BUFFERS, Ending, PairMaker, identity, still_open
from lingerx import Abort, Background, Drain, KernelLinger, Outcome, Policy, Report
from lingerx.closer import Closer
from peers import Call, Polite, WritesFirst, read_to_end, reset, send_unread
from refusals import ANSWER, GOOD, PAGE, REQUEST, Seen, finish, upload

if sys.platform != "win32":
    import resource

anyio = pytest.importorskip("anyio")
trustme = pytest.importorskip("trustme")

import anyio.lowlevel  # noqa: E402, F811
from anyio.abc import SocketAttribute  # noqa: E402
from anyio.streams.tls import TLSListener, TLSStream  # noqa: E402

import lingerx.anyio  # noqa: E402
from lingerx.anyio import LingeringStream, aclose, lingering, send_and_aclose  # noqa: E402

BIG_PAGE = bytes(range(256)) * (16 << 12)
BIG_ANSWER = b"HTTP/1.0 413 Content Too Large\r\n\r\n" + BIG_PAGE

Main = Callable[[], Awaitable[Any]]
Contexts = tuple[ssl.SSLContext, ssl.SSLContext]


@pytest.fixture
def closer(closers: CloserMaker) -> Closer:
    """One whose policy outlasts every test."""
    return closers(LONG)


@pytest.fixture(scope="module", autouse=True)
def what_uvloop_keeps() -> None:
    """libuv makes a pipe for signals and threads for getaddrinfo, once, and keeps them."""
    if importlib.util.find_spec("uvloop") is not None:
        anyio.run(anyio.getaddrinfo, "127.0.0.1", 0, backend="asyncio", backend_options={"use_uvloop": True})


def runner(backend: str) -> Callable[[Main], Any]:
    """Runs a coroutine function on this backend, but not for ever."""
    if backend != "asyncio" and importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")

    def run(main: Main) -> Any:
        async def bounded() -> Any:
            with anyio.fail_after(2 * DEADLINE):
                return await main()

        if backend == "trio":
            return anyio.run(bounded, backend="trio")
        return anyio.run(bounded, backend="asyncio", backend_options={"use_uvloop": backend == "uvloop"})

    return run


@pytest.fixture(params=["asyncio", "uvloop", "trio"])
def run(request: pytest.FixtureRequest) -> Callable[[Main], Any]:
    """Runs a coroutine function on each backend in turn."""
    return runner(request.param)


@pytest.fixture(params=["asyncio", "trio"])
def run_unhurried(request: pytest.FixtureRequest) -> Callable[[Main], Any]:
    """The same, but not on uvloop, which reads although nobody has asked for it: nobody knows how much."""
    return runner(request.param)


async def streams(ours: socket.socket) -> Any:
    """Owns: as a stream of anyio."""
    unix = ours.family == getattr(socket, "AF_UNIX", None)
    kind = anyio.abc.UNIXSocketStream if unix else anyio.abc.SocketStream
    return await kind.from_socket(ours)


async def in_thread(function: Callable[[], Any]) -> Any:
    """As anyio.to_thread.run_sync, but the thread is gone afterwards."""
    with Call(function) as running:
        while running.is_alive():
            await anyio.sleep(0.002)
    return running.result()


async def tls_pair(ours: socket.socket, peer: socket.socket, contexts: Contexts) -> Any:
    """Owns: our TLSStream, and the peer's SSLSocket."""
    stream = await streams(ours)
    with Call(
        lambda: contexts[1].wrap_socket(peer, server_hostname="localhost", suppress_ragged_eofs=False)
    ) as handshake:
        wrapped = await TLSStream.wrap(stream, server_side=True, ssl_context=contexts[0])
    return wrapped, handshake.result()


# Conformance ----------------------------------------------------------------------------------------------


class TestAclose(Graceful, Immediate):
    """`aclose` of TCP and UNIX streams."""

    # What is handed to anyio is non-blocking ever after, and that is anyio's doing.
    test_nonblocking_flag_of_a_shared_description_is_never_touched = None  # type: ignore[assignment]
    # anyio takes nothing but what is connected.
    test_socket_was_never_connected = test_peer_has_reset_before_us = None  # type: ignore[assignment]

    @pytest.fixture(params=["stream", "lingering_stream"])
    def closer(
        self, request: pytest.FixtureRequest, closers: CloserMaker, run_unhurried: Callable[[Main], Any], tcp: PairMaker
    ) -> AnyCloser:
        background = closers()

        def close(sock: socket.socket, policy: Policy) -> Report:
            async def main() -> Report:
                stream = await streams(sock if sock.fileno() >= 0 else tcp()[0])
                if sock.fileno() < 0:
                    await stream.aclose()
                if request.param == "lingering_stream":
                    stream = LingeringStream(stream)
                return await aclose(stream, policy, closer=background)

            report: Report = run_unhurried(main)
            return report

        return close


# Refusals -------------------------------------------------------------------------------------------------


async def refuse(stream: Any) -> None:
    """413, without a look at the body."""
    await stream.receive(100)
    await stream.send(ANSWER)


async def refuse_and_close(stream: Any) -> None:
    """As handlers of anyio do."""
    async with stream:
        await refuse(stream)


def served(
    run: Callable[[Main], Any],
    handler: Callable[[Any], Awaitable[object]],
    client: Callable[[Any], Seen],
    context: ssl.SSLContext | None = None,
    **options: Any,
) -> Seen:
    """What the client saw of a server of anyio's with this handler."""

    async def main() -> Seen:
        done = anyio.Event()

        async def handle(stream: Any) -> None:
            try:
                await handler(stream)
            finally:
                done.set()

        listener: Any = await anyio.create_tcp_listener(local_host="127.0.0.1")
        address = listener.extra(SocketAttribute.local_address)
        if context is not None:
            listener = TLSListener(listener, context, **options)
        async with listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, handle)
            seen: Seen = await in_thread(lambda: client(address))
            await done.wait()
            tasks.cancel_scope.cancel()
        return seen

    seen: Seen = run(main)
    return seen


def refused_by(run: Callable[[Main], Any], tcp: PairMaker, handler: Callable[[Any], Awaitable[object]]) -> Seen:
    """What the client saw that begins when the handler waits for it. (On asyncio anyio reads ahead before.)"""
    ours, peer = tcp()

    async def main() -> Any:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(handler, await streams(ours))
            await anyio.wait_all_tasks_blocked()
            return await in_thread(lambda: finish(peer, REQUEST, PAGE))

    seen: Seen = run(main)
    return seen


def test_without_lingerx_a_refused_client_loses_the_answer(
    run_unhurried: Callable[[Main], Any], tcp: PairMaker
) -> None:
    assert not refused_by(run_unhurried, tcp, refuse_and_close).whole


@pytest.mark.parametrize("handler", [refuse, refuse_and_close])
def test_refused_client_gets_the_answer(run: Callable[[Main], Any], closer: Closer, handler: Any) -> None:
    assert served(run, lingering(handler, closer=closer), upload) == GOOD
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 1}


def test_refused_client_gets_the_answer_of_a_handler_that_waits_for_the_report(
    run: Callable[[Main], Any], closer: Closer
) -> None:
    reports = []

    async def handler(stream: Any) -> None:
        await refuse(stream)
        reports.append(await aclose(stream, LONG, closer=closer))

    assert served(run, handler, upload) == GOOD
    assert [(report.outcome, report.delivered) for report in reports] == [(Outcome.PEER_CLOSED, True)]


def test_handler_that_fails_lingers_too(run: Callable[[Main], Any], closer: Closer) -> None:
    async def handler(stream: Any) -> None:
        await refuse(stream)
        raise LookupError

    async def quiet(stream: Any) -> None:
        with suppress(LookupError):
            await lingering(handler, closer=closer)(stream)

    assert served(run, quiet, upload) == GOOD


def test_without_lingerx_a_refused_client_loses_the_answer_over_tls(
    run_unhurried: Callable[[Main], Any], contexts: Contexts
) -> None:
    async def handler(stream: Any) -> None:
        with suppress(anyio.BrokenResourceError, ssl.SSLError):
            await refuse_and_close(stream)

    server, client = contexts
    assert not served(run_unhurried, handler, lambda address: upload(address, client), server).whole


@pytest.mark.parametrize("waits", [False, True], ids=["background", "report"])
@pytest.mark.parametrize("standard", [False, True], ids=["https", "close_notify"])
def test_refused_client_gets_the_answer_over_tls(
    run: Callable[[Main], Any], contexts: Contexts, closer: Closer, standard: bool, waits: bool
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

    assert served(run, lingering(handler, closer=closer), uploads, server, standard_compatible=standard) == GOOD
    assert endings == ["close_notify" if standard else "ragged"]
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 1}


# Large answers --------------------------------------------------------------------------------------------


def writes_first(address: Any) -> Seen:
    return finish(socket.create_connection(address, DEADLINE), REQUEST, BIG_PAGE)


def test_large_answer_to_a_client_that_writes_first(run: Callable[[Main], Any], closer: Closer) -> None:
    reports = []

    async def handler(stream: Any) -> None:
        await stream.receive(100)
        reports.append(await send_and_aclose(stream, BIG_ANSWER, LONG, closer=closer))

    assert served(run, handler, writes_first) == GOOD
    assert [(report.outcome, report.delivered) for report in reports] == [(Outcome.PEER_CLOSED, True)]


def test_large_answer_in_the_background(run: Callable[[Main], Any], closer: Closer) -> None:
    taken = []

    async def handler(stream: Any) -> None:
        await stream.receive(100)
        taken.append(await stream.send_and_aclose(BIG_ANSWER))
        taken.append(await stream.send_and_aclose(b"too late"))

    assert served(run, lingering(handler, closer=closer), writes_first) == GOOD
    assert taken == [True, False]


@pytest.mark.slow
def test_without_lingerx_a_large_answer_hangs(run_unhurried: Callable[[Main], Any], tcp: PairMaker) -> None:
    hung = []

    async def handler(stream: Any) -> None:
        async with stream:
            await stream.receive(100)
            with anyio.move_on_after(0.3) as scope:
                await stream.send(BIG_ANSWER)
        hung.append(scope.cancelled_caught)

    refused_by(run_unhurried, tcp, handler)
    assert hung == [True]


def test_everything_that_send_took_is_sent(run: Callable[[Main], Any], closer: Closer, tcp: PairMaker) -> None:
    """asyncio's transport has a buffer of its own; anyio's send waits until it is empty."""
    ours, peer = tcp(**SMALL_BUFFERS)
    size = 4 << 20

    async def main() -> Report:
        stream = await streams(ours)
        await stream.send(bytes(size))
        return await aclose(stream, LONG, closer=closer)

    with Polite(peer) as reader:
        report: Report = run(main)
    assert (report.outcome, report.delivered) == (Outcome.PEER_CLOSED, True)
    assert reader.ending == Ending(size, None)


# Limits and anyio's contract ------------------------------------------------------------------------------


def test_tls_peer_that_says_nothing(
    run: Callable[[Main], Any], contexts: Contexts, closer: Closer, tcp: PairMaker
) -> None:
    """anyio's own aclose would wait for its close_notify for ever."""

    async def main() -> Any:
        stream, sock = await tls_pair(*tcp(), contexts)
        other, other_sock = await tls_pair(*tcp(), contexts)
        with sock, other_sock:
            report = await aclose(stream, Drain(timeout=SHORT), closer=closer)
            assert sock.recv(1) == b"", "close_notify"
            with anyio.move_on_after(10 * SHORT) as scope:
                await other.aclose()
        return report, scope.cancelled_caught

    report, waited = run(main)
    assert report.outcome is Outcome.TIMED_OUT
    assert SHORT <= report.elapsed < 1.0
    assert waited


def test_input_that_was_received_but_not_read_does_not_cost_close_notify(
    run: Callable[[Main], Any], contexts: Contexts, closer: Closer, tcp: PairMaker
) -> None:
    async def main() -> Report:
        stream, sock = await tls_pair(*tcp(), contexts)
        with sock:
            sock.sendall(bytes(30_000))
            await stream.receive(1)
            report = await aclose(stream, Drain(timeout=SHORT), closer=closer)
            assert sock.recv(100) == b"", "close_notify"
        return report

    assert run(main).outcome is Outcome.TIMED_OUT


@pytest.mark.parametrize("policy", [Background(), Abort()], ids=["background", "abort"])
def test_tls_by_a_policy_that_does_not_wait(
    run: Callable[[Main], Any], contexts: Contexts, closer: Closer, tcp: PairMaker, policy: Policy
) -> None:
    async def main() -> Any:
        stream, sock = await tls_pair(*tcp(), contexts)
        return sock, await aclose(stream, policy, closer=closer)

    sock, report = run(main)
    with sock:
        assert report.outcome is (Outcome.BACKGROUND if policy == Background() else Outcome.ABORTED)
        if policy == Background():
            assert sock.recv(100) == b"", "close_notify"


@pytest.mark.parametrize("before", [False, True], ids=["while_it_waits", "before"])
def test_cancelled(run: Callable[[Main], Any], closer: Closer, any_pair: PairMaker, before: bool) -> None:
    ours, peer = any_pair()
    known = identity(ours)

    async def main() -> Any:
        stream = await streams(ours)
        with anyio.CancelScope() as scope:
            if before:
                scope.cancel()
            else:
                scope.deadline = anyio.current_time() + SHORT
            await aclose(stream, LONG, closer=closer)
        return scope.cancelled_caught

    began = time.monotonic()
    assert run(main) is True
    assert time.monotonic() - began < DEADLINE / 2
    assert closer.join(DEADLINE / 2)
    assert not still_open(known)
    assert nonzero(closer.stats()) == {Outcome.TIMED_OUT: 1}
    assert read_to_end(peer) == Ending(0, None)


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("backend", ["asyncio", "uvloop"])
def test_cancelled_by_asyncio(backend: str, turns: int, closer: Closer, tcp: PairMaker) -> None:
    """By Task.cancel(), which no shield of anyio keeps out, at every turn of the loop."""
    ours, peer = tcp()
    known = identity(ours)

    async def main() -> None:
        task = asyncio.ensure_future(aclose(await streams(ours), LONG, closer=closer))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    runner(backend)(main)
    assert closer.join(DEADLINE / 2)
    assert not still_open(known)
    assert nonzero(closer.stats()) == {Outcome.TIMED_OUT: 1}
    assert read_to_end(peer) == Ending(0, None)


@pytest.mark.parametrize("kind", ["tcp", "unix", "tls"])
@pytest.mark.parametrize("how", ["aclose", "lingering_stream"])
def test_tasks_that_are_blocked_in_the_stream_are_told(
    run: Callable[[Main], Any],
    contexts: Contexts,
    closer: Closer,
    tcp: PairMaker,
    unix_pair: PairMaker,
    how: str,
    kind: str,
) -> None:
    told = []

    async def receive(stream: Any) -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await stream.receive(1)
        told.append("receiver")

    async def send(stream: Any) -> None:
        with pytest.raises((anyio.ClosedResourceError, anyio.BrokenResourceError)):
            await stream.send(bytes(8 << 20))
        told.append("sender")

    async def main() -> None:
        ours, sock = (unix_pair if kind == "unix" else tcp)(**SMALL_BUFFERS)
        if kind == "tls":
            stream, sock = await tls_pair(ours, sock, contexts)
            stream.transport_stream = LingeringStream(stream.transport_stream, Drain(timeout=SHORT), closer=closer)
        else:
            stream = LingeringStream(await streams(ours), Drain(timeout=SHORT), closer=closer)
        with sock:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(receive, stream)
                if kind == "unix":  # with both, anyio's own aclose leaves them blocked on uvloop
                    told.append("sender")
                else:
                    tasks.start_soon(send, stream)
                await anyio.wait_all_tasks_blocked()
                if how == "aclose":
                    report = await aclose(stream, Drain(timeout=SHORT), closer=closer)
                    assert report.outcome is Outcome.TIMED_OUT
                else:
                    await anyio.aclose_forcefully(stream)

    run(main)
    assert sorted(told) == ["receiver", "sender"]


def test_closed_twice(run: Callable[[Main], Any], closer: Closer, any_pair: PairMaker) -> None:
    ours, peer = any_pair()
    peer.close()

    async def main() -> None:
        stream = await streams(ours)
        assert (await aclose(stream, closer=closer)).outcome is Outcome.PEER_CLOSED
        assert (await aclose(stream, closer=closer)).outcome is Outcome.ALREADY_CLOSED
        report = await send_and_aclose(stream, b"lost", closer=closer)
        assert (report.outcome, report.unacked, report.delivered) == (Outcome.ALREADY_CLOSED, 4, False)
        await stream.aclose()
        await LingeringStream(stream, closer=closer).aclose()
        with pytest.raises((anyio.ClosedResourceError, anyio.BrokenResourceError)):
            await stream.send(b"x")

    run(main)
    assert closer.stats().handed_over == 1


def test_peer_has_reset_before_us(run: Callable[[Main], Any], closer: Closer, tcp: PairMaker) -> None:
    """asyncio and uvloop may have seen that first, and closed the socket by themselves."""
    ours, peer = tcp()

    async def main() -> Report:
        stream = await streams(ours)
        reset(peer)
        for _ in range(3):
            await anyio.lowlevel.checkpoint()
        return await aclose(stream, closer=closer)

    report: Report = run(main)
    assert report.outcome in (Outcome.PEER_RESET, Outcome.ALREADY_CLOSED)


def test_aclose_forcefully_lingers(run: Callable[[Main], Any], closer: Closer, any_pair: PairMaker) -> None:
    ours, peer = any_pair()
    send_unread(peer, ours, b"never read")

    async def main() -> None:
        stream = LingeringStream(await streams(ours), closer=closer)
        assert stream.extra(SocketAttribute.family) == peer.family
        await stream.send(b"answer")
        await anyio.aclose_forcefully(stream)

    run(main)
    assert closer.pending == 1
    assert read_to_end(peer) == Ending(6, None)
    peer.close()
    assert closer.join(DEADLINE)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no RLIMIT_NOFILE")
def test_no_fd_left_for_the_copy(run: Callable[[Main], Any], closer: Closer, tcp: PairMaker) -> None:
    ours, peer = tcp()

    async def main() -> Report:
        stream = await streams(ours)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with open(os.devnull, "rb") as lowest:
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest.fileno() + 1, hard))
            try:
                return await aclose(stream, closer=closer)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    report: Report = run(main)
    assert (report.outcome, report.error) == (Outcome.FAILED, errno.EMFILE)
    assert read_to_end(peer) == Ending(0, None)


def test_closer_was_shut_down(run: Callable[[Main], Any], closer: Closer, tcp: PairMaker) -> None:
    closer.shutdown()
    ours, peer = tcp()
    other, its_peer = tcp()

    async def main() -> None:
        with pytest.raises(RuntimeError):
            await aclose(await streams(ours), closer=closer)
        await LingeringStream(await streams(other), closer=closer).aclose()

    run(main)
    assert (peer.recv(1), its_peer.recv(1)) == (b"", b"")


def test_default_closer_and_default_policy(run: Callable[[Main], Any], tcp: PairMaker) -> None:
    async def close(sock: socket.socket) -> Report:
        return await aclose(await streams(sock))

    async def handler(stream: Any) -> None:
        await stream.send(b"answer")

    async def handle(sock: socket.socket) -> None:
        await lingering(handler)(await streams(sock))

    default = lingerx.default_closer()
    try:
        ours, peer = tcp()
        ours.sendall(b"answer")
        with Polite(peer) as client:
            report = run(lambda: close(ours))
        assert (report.outcome, client.received) == (Outcome.PEER_CLOSED, 6)
        ours, peer = tcp()
        with WritesFirst(peer, bytes(100_000)) as writer:
            run(lambda: handle(ours))
        assert writer.ending == Ending(6, None)
    finally:
        default.shutdown(1.0)


# Arguments ------------------------------------------------------------------------------------------------


def test_wrong_arguments_leave_the_stream_alone(
    run: Callable[[Main], Any], contexts: Contexts, closer: Closer, tcp: PairMaker
) -> None:
    ours, peer = tcp()

    async def main() -> None:
        async with await streams(ours) as stream:
            for policy, error in ((3.0, TypeError), (Drain, TypeError), (KernelLinger(1), ValueError)):
                wrong: Any = policy
                with pytest.raises(error):
                    await aclose(stream, wrong, closer=closer)
                with pytest.raises(error):
                    await send_and_aclose(stream, b"x", wrong, closer=closer)
                with pytest.raises(error):
                    LingeringStream(stream, wrong, closer=closer)
                with pytest.raises(error):
                    lingering(refuse, wrong, closer=closer)
            with pytest.raises(TypeError, match=r"lingerx\.Closer"):
                await aclose(stream, closer=3)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="bytes-like"):
                await send_and_aclose(stream, "text", closer=closer)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="deadline"):
                await send_and_aclose(stream, b"x", Background(), closer=closer)
            with pytest.raises(ValueError, match="deadline"):
                await LingeringStream(stream, Abort(), closer=closer).send_and_aclose(b"x")
            await stream.send(b"still open")
        tls, sock = await tls_pair(*tcp(), contexts)
        with sock:
            with pytest.raises(ValueError, match="TLS"):
                await send_and_aclose(tls, b"x", closer=closer)
            await tls.send(b"still open")
            assert sock.recv(100) == b"still open"
            await anyio.aclose_forcefully(tls)

    run(main)
    assert peer.recv(100) == b"still open"


def test_what_is_no_stream(run: Callable[[Main], Any], closer: Closer) -> None:
    async def main() -> None:
        with pytest.raises(TypeError, match="SocketStream"):
            await aclose(object(), closer=closer)
        with pytest.raises(TypeError, match="SocketStream"):
            LingeringStream(object(), closer=closer)  # type: ignore[arg-type]
        async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
            with pytest.raises(TypeError, match="SocketStream"):
                await aclose(listener, closer=closer)

    run(main)


def test_anyio_is_missing() -> None:
    program = "import sys; sys.modules['anyio'] = None; import lingerx.anyio"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE)
    assert "ImportError: lingerx.anyio needs anyio, which is not installed: pip install 'lingerx[anyio]'" in done.stderr
    assert "ModuleNotFoundError" in done.stderr, "raised from the original"


def test_anyio_is_too_old() -> None:
    program = """if True:
        import importlib.metadata
        version = importlib.metadata.version
        importlib.metadata.version = lambda name: "4.15.0" if name == "anyio" else version(name)
        import lingerx.anyio"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE)
    assert "ImportError: lingerx.anyio needs anyio 4.16 or newer, and 4.15.0 is installed" in done.stderr


# Cost -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_silent_peers_cost_the_loop_nothing(run: Callable[[Main], Any], closer: Closer, tcp: PairMaker) -> None:
    """The loop's largest gap, and how long a fresh request takes, with 50 peers that are lingered for, and without."""

    async def echo(stream: Any) -> None:
        async with stream:
            await stream.send(await stream.receive(100))

    async def measure() -> tuple[float, float]:
        gaps, requests = [0.0], []

        async def beat() -> None:
            while True:
                began = time.perf_counter()
                await anyio.sleep(0.005)
                gaps.append(time.perf_counter() - began)

        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        address = listener.extra(SocketAttribute.local_address)
        async with listener, anyio.create_task_group() as tasks:
            tasks.start_soon(beat)
            tasks.start_soon(listener.serve, echo)
            for _ in range(40):
                began = time.perf_counter()
                async with await anyio.connect_tcp(*address) as client:
                    await client.send(b"hello")
                    assert await client.receive(100) == b"hello"
                requests.append(time.perf_counter() - began)
                await anyio.sleep(0.005)
            tasks.cancel_scope.cancel()
        return max(gaps), sorted(requests)[len(requests) // 2]

    async def close() -> None:
        await aclose(await streams(tcp()[0]), LONG, closer=closer)

    async def main() -> Any:
        without = await measure()
        async with anyio.create_task_group() as tasks:
            for _ in range(50):
                tasks.start_soon(close)
            while closer.pending < 50:
                await anyio.sleep(0.002)
            with_them = await measure()
            assert closer.pending == 50
            tasks.cancel_scope.cancel()
        return without, with_them

    (gap, request), (gap_with_them, request_with_them) = run(main)
    assert gap_with_them < 5 * gap + 0.1
    assert request_with_them < 5 * request + 0.02


# The example ----------------------------------------------------------------------------------------------

server = test_examples.server
example = pytest.mark.parametrize("server", ["anyio_server.py"], indirect=True)


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
