"""Sockets that linger when somebody closes them: what a listener accepts, and what an SSLContext makes."""

from __future__ import annotations

import asyncio
import http.server
import os
import pickle
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import lingerx
from closers import LONG, CloserMaker, nonzero, output_of, start_program
from connections import A_LONG_LOOK, DEADLINE, Ending, Pair, identity, still_open, wait_until
from lingerx import Abort, Background, Drain, Flush, KernelLinger, LingerSocket, LingerSSLSocket, Outcome
from lingerx.closer import Closer
from lingerx.listener import LingerListener
from peers import Call, read_to_end, send_unread
from refusals import ANSWER, GOOD, Refuse, serving, upload

AT_ONCE = 0.5
"""Seconds that a call which does not wait may take, however busy the machine."""


@pytest.fixture
def closer(closers: CloserMaker) -> Closer:
    """One whose policy outlasts every test."""
    return closers(LONG)


@pytest.fixture
def connect(stack: ExitStack, closer: Closer) -> Callable[..., Pair]:
    """Makes (ours, peer) through a listener of `create_server`, with these terms."""

    def make(**terms: Any) -> Pair:
        terms = terms or {"closer": closer}
        with lingerx.create_server(("127.0.0.1", 0), **terms) as listener:
            peer = stack.enter_context(socket.create_connection(listener.getsockname(), DEADLINE))
            return stack.enter_context(listener.accept()[0]), peer

    return make


@pytest.fixture
def default() -> Iterator[Closer]:
    """The default closer, ended afterwards."""
    closer = lingerx.default_closer()
    yield closer
    closer.shutdown(0.0)


def ends(peer: socket.socket) -> Ending:
    """How our stream ended for a peer that has sent something which we never read, and then closed."""
    ending = read_to_end(peer)
    peer.close()
    return ending


# Closing --------------------------------------------------------------------------------------------------


def test_close_half_closes_and_lingers(connect: Callable[..., Pair], closer: Closer) -> None:
    ours, peer = connect()
    assert type(ours) is LingerSocket
    send_unread(peer, ours, b"never read")
    ours.sendall(b"answer")
    ours.close()
    assert (ours.fileno(), closer.pending) == (-1, 1)
    assert ends(peer) == Ending(6, None)
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 1}


def test_with_block_lingers_and_a_second_close_does_nothing(connect: Callable[..., Pair], closer: Closer) -> None:
    ours, peer = connect()
    with ours:
        ours.sendall(b"answer")
    ours.close()
    assert closer.stats().handed_over == 1
    assert ends(peer) == Ending(6, None)


def test_close_waits_for_the_objects_of_makefile(connect: Callable[..., Pair], closer: Closer) -> None:
    ours, peer = connect()
    file = ours.makefile("wb")
    file.write(b"answer")
    ours.close()
    assert closer.stats().handed_over == 0
    file.close()
    assert closer.stats().handed_over == 1
    assert ends(peer) == Ending(6, None)


def test_default_closer_lingers_where_none_was_given(connect: Callable[..., Pair], default: Closer) -> None:
    ours, peer = connect(policy=Drain(timeout=DEADLINE))
    ours.close()
    assert default.pending == 1
    peer.close()
    assert default.join(DEADLINE)


def test_policy_goes_with_the_connection(connect: Callable[..., Pair], closer: Closer) -> None:
    ours, _ = connect(closer=closer, policy=Flush(timeout=DEADLINE))
    ours.close()
    assert closer.join(DEADLINE), "the peer need not close"
    assert nonzero(closer.stats()) == {Outcome.ACKED: 1}


def test_policy_of_one_connection(connect: Callable[..., Pair], closer: Closer) -> None:
    ours, peer = connect()
    assert isinstance(ours, LingerSocket)
    ours.policy = Abort()
    ours.close()
    with pytest.raises(ConnectionResetError):
        peer.recv(1)


def test_wait_lingers_in_the_thread_that_closes(connect: Callable[..., Pair]) -> None:
    ours, peer = connect(wait=True, policy=LONG)
    known = identity(ours)
    with Call(ours.close) as call:
        assert peer.recv(1) == b""
        call.join(A_LONG_LOOK)
        assert call.is_alive()
        assert still_open(known)
        peer.close()


def test_what_is_not_connected_is_closed_at_once(closer: Closer) -> None:
    with LingerSocket() as sock:
        sock.closer = closer
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.NOT_CONNECTED: 1}


def test_what_was_shut_down_both_ways_is_let_go(connect: Callable[..., Pair], closer: Closer) -> None:
    ours, peer = connect()
    ours.sendall(b"answer")
    ours.shutdown(socket.SHUT_RDWR)
    ours.close()
    assert closer.join(DEADLINE), "there is no peer's FIN to wait for"
    assert read_to_end(peer) == Ending(6, None)


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_what_cannot_linger_is_closed_plainly(kind: int, closer: Closer) -> None:
    with LingerSocket(socket.AF_INET, kind) as sock:
        sock.closer = closer
        if kind == socket.SOCK_STREAM:
            sock.listen()
        known = identity(sock)
    assert not still_open(known)
    assert closer.stats().handed_over == 0


def test_closer_was_shut_down(connect: Callable[..., Pair], closer: Closer) -> None:
    ours, peer = connect()
    closer.shutdown()
    ours.close()
    assert peer.recv(1) == b""


@pytest.mark.parametrize(
    ("policy", "wait", "said"),
    [(KernelLinger(1), False, "would block"), (Drain, False, r"write Drain\(\)"), (10.0, True, "policy is one of")],
)
def test_policy_that_cannot_be_used(
    connect: Callable[..., Pair], closer: Closer, policy: Any, wait: bool, said: str
) -> None:
    """A class is refused when it is made; with an object it is too late for an error, but not for a word."""
    ours, peer = connect()
    assert isinstance(ours, LingerSocket)
    ours.policy, ours.wait = policy, wait
    with pytest.warns(RuntimeWarning, match=f"closed plainly: .*{said}"):
        ours.close()
    assert (peer.recv(1), closer.stats().handed_over) == (b"", 0)


def test_collected_unclosed(closer: Closer) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(lingerx.create_server(("127.0.0.1", 0), closer=closer))
        peer = stack.enter_context(socket.create_connection(listener.getsockname(), DEADLINE))
        accepted = [listener.accept()[0]]
        with pytest.warns(ResourceWarning, match="unclosed"):
            accepted.clear()
        assert peer.recv(1) == b""
    assert closer.stats().handed_over == 0


def test_detach_hands_over_the_fd(connect: Callable[..., Pair], closer: Closer) -> None:
    ours, _ = connect()
    with socket.socket(fileno=ours.detach()):
        ours.close()
    assert closer.stats().handed_over == 0


def test_lingerx_s_own_calls_take_it(connect: Callable[..., Pair], closer: Closer) -> None:
    ours, peer = connect()
    peer.close()
    assert lingerx.send_and_close(ours, b"").outcome is Outcome.PEER_CLOSED
    ours.close()
    assert closer.stats().handed_over == 0


# Copies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_copies_the_last_lingers(connect: Callable[..., Pair], closer: Closer, first: int) -> None:
    ours, peer = connect(closer=closer, policy=LONG)
    assert isinstance(ours, LingerSocket)
    with ours.dup() as copy:
        assert (type(copy), copy.policy, copy.closer) == (LingerSocket, LONG, closer)
        copies = [ours, copy]
        copies.pop(first).close()
        assert closer.stats().handed_over == 0
        copies[0].sendall(b"still open")
        assert peer.recv(100) == b"still open"
        copies[0].close()
        assert closer.stats().handed_over == 1


def test_copy_that_went_elsewhere_stays_open(connect: Callable[..., Pair], closer: Closer) -> None:
    ours, peer = connect()
    with socket.socket(fileno=ours.dup().detach()) as elsewhere:
        ours.close()
        elsewhere.sendall(b"still open")
        assert peer.recv(100) == b"still open"
    assert closer.stats().handed_over == 0


def test_pickling_raises(connect: Callable[..., Pair], closer: Closer) -> None:
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(connect()[0])
    with lingerx.create_server(("127.0.0.1", 0)) as listener, pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(listener)


FORK = """
import os, socket
import lingerx

with lingerx.create_server(("127.0.0.1", 0)) as listener:
    peer = socket.create_connection(listener.getsockname())
    ours = listener.accept()[0]
    before = lingerx.create_server(("127.0.0.1", 0))
pid = os.fork()
if pid == 0:
    peer.close()
    os.read(0, 1)  # until our parent has closed its copy
    ours.sendall(b"answer")
    ours.close()
    os._exit(os.system("exit 0"))
ours.close()
os.write(1, b"parent has closed\\n")
assert peer.recv(100) == b"answer"
assert peer.recv(100) == b""
peer.sendall(b"late")  # lingering, the child discards it
peer.close()
assert os.waitpid(pid, 0)[1] == 0
before.close()
print(lingerx.default_closer().stats().handed_over)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_a_fork_the_child_lingers(engine_name: str) -> None:
    command = [sys.executable, "-W", "error", "-c", FORK]
    environment = {**os.environ, "LINGERX_ENGINE": engine_name}
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "parent has closed\n"
        process.stdin.write("!")
        process.stdin.flush()
        assert output_of(process) == "0\n"


# Listeners ------------------------------------------------------------------------------------------------


def test_arguments_of_socket_create_server() -> None:
    with lingerx.create_server(("127.0.0.1", 0), backlog=1, reuse_port=True) as listener:
        assert type(listener) is LingerListener
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
    with pytest.raises(ValueError, match="dualstack_ipv6"):
        lingerx.create_server(("127.0.0.1", 0), dualstack_ipv6=True)


@pytest.mark.parametrize("timeout", [None, 0.0, DEADLINE])
def test_wrapped_listener_is_the_same_socket(timeout: float | None) -> None:
    plain = socket.create_server(("127.0.0.1", 0))
    plain.settimeout(timeout)
    plain.set_inheritable(True)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    known, name, blocking = identity(plain), plain.getsockname(), os.get_blocking(plain.fileno())
    with lingerx.wrap_listener(plain) as listener:
        assert plain.fileno() == -1
        assert (identity(listener), listener.getsockname()) == (known, name)
        assert (listener.gettimeout(), os.get_blocking(listener.fileno())) == (timeout, blocking)
        assert listener.get_inheritable()
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert (listener.family, listener.type) == (plain.family, plain.type)
    assert not still_open(known)


@pytest.mark.parametrize("timeout", [None, 0.0, DEADLINE])
@pytest.mark.parametrize("default_timeout", [None, DEADLINE])
def test_accepted_socket_is_as_ever(
    closer: Closer, stack: ExitStack, timeout: float | None, default_timeout: float | None
) -> None:
    plain = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    listener = stack.enter_context(lingerx.create_server(("127.0.0.1", 0), closer=closer))
    found = []
    socket.setdefaulttimeout(default_timeout)
    stack.callback(socket.setdefaulttimeout, None)
    for each in (plain, listener):
        each.settimeout(timeout)
        peer = stack.enter_context(socket.create_connection(each.getsockname()))
        conn, address = stack.enter_context(each.accept()[0]), peer.getsockname()
        assert conn.getpeername() == address
        state = conn.gettimeout(), os.get_blocking(conn.fileno()), conn.get_inheritable()
        found.append((*state, conn.family, conn.type))  # proto: IPPROTO_TCP, where socket.create_server says 0
    assert found[0] == found[1]


def test_nobody_waits_to_be_accepted(closer: Closer) -> None:
    with lingerx.create_server(("127.0.0.1", 0), closer=closer) as listener:
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_copy_of_a_listener_has_its_terms(closer: Closer) -> None:
    with lingerx.create_server(("127.0.0.1", 0), closer=closer, policy=LONG) as listener, listener.dup() as copy:
        assert (type(copy), copy.closer, copy.policy) == (LingerListener, closer, LONG)


def test_listener_over_a_unix_socket_that_does_not_listen_yet(closer: Closer, tmp_path: Any) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(os.fspath(tmp_path / "s"))
    with lingerx.wrap_listener(sock, closer=closer) as listener, socket.socket(socket.AF_UNIX) as peer:
        listener.listen()
        peer.connect(listener.getsockname())
        listener.accept()[0].close()
        assert peer.recv(1) == b""
    assert closer.join(DEADLINE)
    assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 1}


def test_wrong_arguments_leave_the_listener_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        with pytest.raises(TypeError, match=r"write Drain\(timeout=3\)"):
            lingerx.wrap_listener(sock, policy=3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="would block"):
            lingerx.wrap_listener(sock, policy=KernelLinger(1))
        with pytest.raises(TypeError, match=r"closer is a lingerx\.Closer"):
            lingerx.wrap_listener(sock, closer=LONG)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="pass one of the two"):
            lingerx.wrap_listener(sock, closer=lingerx.Closer(), wait=True)
        assert sock.fileno() >= 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        lingerx.wrap_listener(sock)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, pytest.raises(TypeError, match="SOCK_STREAM"):
        lingerx.wrap_listener(sock)
    with pytest.raises(TypeError, match=r"sock is a socket\.socket object"):
        lingerx.wrap_listener(3)  # type: ignore[arg-type]


def test_subclass_with_wrong_terms_is_not_made() -> None:
    with pytest.raises(ValueError, match="would block"):
        type("Mine", (LingerSocket,), {"policy": KernelLinger(1)})
    type("Mine", (LingerSocket,), {"policy": KernelLinger(1), "wait": True})


# Servers --------------------------------------------------------------------------------------------------


def test_http_server_that_is_given_the_listener(closer: Closer) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), Refuse)
    server.socket = lingerx.wrap_listener(server.socket, closer=closer)
    with serving(server) as address:
        assert [upload(address) for _ in range(3)] == 3 * [GOOD]
    with serving(http.server.HTTPServer(("127.0.0.1", 0), Refuse)) as address:
        assert GOOD not in [upload(address) for _ in range(3)]


class Refusing(asyncio.Protocol):
    """The same server for asyncio."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(ANSWER)
            self.transport.close()


def uploads_to_asyncio(listener: socket.socket, count: int, tls: tuple[ssl.SSLContext, ssl.SSLContext] | None) -> Any:
    ours, client = tls or (None, None)

    async def run() -> Any:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Refusing, sock=listener, ssl=ours)
        async with server:
            address = server.sockets[0].getsockname()
            return [await loop.run_in_executor(None, upload, address, client) for _ in range(count)]

    return asyncio.run(run())


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
def test_asyncio_server(closer: Closer, contexts: tuple[ssl.SSLContext, ssl.SSLContext], encrypted: bool) -> None:
    tls = contexts if encrypted else None
    listener = lingerx.create_server(("127.0.0.1", 0), closer=closer)
    assert uploads_to_asyncio(listener, 3, tls) == 3 * [GOOD]
    assert closer.join(DEADLINE)
    assert closer.stats().handed_over == 3
    assert GOOD not in uploads_to_asyncio(socket.create_server(("127.0.0.1", 0)), 3, tls)


def test_event_loop_does_not_wait_for_silent_peers(closer: Closer, stack: ExitStack) -> None:
    async def run() -> float:
        loop = asyncio.get_running_loop()
        listener = lingerx.create_server(("127.0.0.1", 0), closer=closer)
        address = listener.getsockname()
        async with await loop.create_server(Refusing, sock=listener):
            for _ in range(10):
                stack.enter_context(socket.create_connection(address)).sendall(b"x")
            began = loop.time()
            while closer.pending < 10:
                await asyncio.sleep(0)
            return loop.time() - began

    assert asyncio.run(run()) < AT_ONCE
    assert closer.pending == 10


# TLS ------------------------------------------------------------------------------------------------------


@pytest.fixture
def our_context(contexts: tuple[ssl.SSLContext, ssl.SSLContext], closer: Closer) -> Iterator[ssl.SSLContext]:
    """The server's, whose sockets linger in `closer`."""
    context = contexts[0]
    mine = type("Mine", (LingerSSLSocket,), {"closer": closer})
    context.sslsocket_class = mine
    yield context
    context.sslsocket_class = ssl.SSLSocket


def test_tls_socket_says_goodbye_and_lingers(
    our_context: ssl.SSLContext, contexts: Any, closer: Closer, stack: ExitStack
) -> None:
    with our_context.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True) as listener:
        raw = socket.create_connection(listener.getsockname(), DEADLINE)
        with Call(
            lambda: contexts[1].wrap_socket(raw, server_hostname="localhost", suppress_ragged_eofs=False)
        ) as call:
            ours = stack.enter_context(listener.accept()[0])
        peer = stack.enter_context(call.result())
        assert isinstance(ours, LingerSSLSocket)
        peer.sendall(b"never read")
        ours.sendall(b"answer")
        ours.close()
        assert closer.pending == 1
        assert (peer.recv(100), peer.recv(100)) == (b"answer", b""), "suppress_ragged_eofs=False: with close_notify"
        peer.close()
        assert closer.join(DEADLINE)
    assert closer.stats().handed_over == 1, "the listener was closed plainly"


def test_failed_handshake(our_context: ssl.SSLContext, closer: Closer, stack: ExitStack) -> None:
    listener = stack.enter_context(our_context.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True))
    stack.enter_context(socket.create_connection(listener.getsockname())).sendall(b"GET / HTTP/1.0\r\n\r\n")
    with pytest.raises(ssl.SSLError):
        listener.accept()
    stack.close()
    assert closer.join(DEADLINE)
    assert closer.stats().handed_over == 1


def test_blocking_tls_server(our_context: ssl.SSLContext, contexts: Any) -> None:
    for kind, good in ((our_context.sslsocket_class, True), (ssl.SSLSocket, False)):
        our_context.sslsocket_class = kind
        server = http.server.HTTPServer(("127.0.0.1", 0), Refuse)
        server.socket = our_context.wrap_socket(server.socket, server_side=True)
        with serving(server) as address:
            seen = [upload(address, contexts[1]) for _ in range(3)]
        assert seen == 3 * [GOOD] if good else GOOD not in seen


def test_tls_listener_is_not_wrapped(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    with contexts[0].wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True) as listener:
        with pytest.raises(ValueError, match="sslsocket_class"):
            lingerx.wrap_listener(listener)
        assert listener.fileno() >= 0


# Import and exit ------------------------------------------------------------------------------------------


def test_ssl_is_imported_for_those_who_ask(engine_name: str) -> None:
    program = """
import sys, lingerx, lingerx.listener
assert "ssl" not in sys.modules
assert not hasattr(lingerx, "LingerSSLSockets")
assert lingerx.LingerSSLSocket is lingerx.listener.LingerSSLSocket
print("ssl" in sys.modules)
"""
    with start_program(engine_name, program) as process:
        assert output_of(process) == "True\n"


def test_closed_while_the_interpreter_exits(engine_name: str) -> None:
    program = """
import atexit, socket
ours = []
atexit.register(lambda: [sock.close() for sock in ours])
atexit.register(lambda: ours[1].close())
import lingerx
with lingerx.create_server(("127.0.0.1", 0), policy=lingerx.Flush(timeout=1.0)) as listener:
    peers = [socket.create_connection(listener.getsockname()) for _ in range(2)]
    ours += [listener.accept()[0] for _ in range(2)]
atexit.register(lambda: [print(peer.recv(1)) for peer in peers])
for sock in ours[:1]:
    sock.close()
for peer in peers[1:]:
    peer.sendall(b"x")
ours[1].shutdown(socket.SHUT_WR)
"""
    with start_program(engine_name, program) as process:
        assert output_of(process) == "b''\nb''\n"


def test_background_is_the_plain_close(connect: Callable[..., Pair], closer: Closer) -> None:
    ours, peer = connect(closer=closer, policy=Background())
    ours.close()
    assert peer.recv(1) == b""
    assert nonzero(closer.stats()) == {Outcome.BACKGROUND: 1}


def test_accept_that_is_interrupted_closes_the_connection(
    closer: Closer, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = stack.enter_context(lingerx.create_server(("127.0.0.1", 0), closer=closer))
    peer = stack.enter_context(socket.create_connection(listener.getsockname(), DEADLINE))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LingerSocket, "gettimeout", interrupt)
    with pytest.raises(KeyboardInterrupt):
        listener.accept()
    assert peer.recv(1) == b""
    wait_until(lambda: closer.pending == 0)
