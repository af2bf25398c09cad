"""TLS: close_notify goes out before the raw socket lingers, the rest of the data goes through the session, and all of
it stays within one deadline and leaves O_NONBLOCK alone.

The peers are real: `ssl` clients that take no EOF for an end unless a close_notify came before it. Raw sockets are
closed elsewhere; here only what TLS adds is tested.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Protocol

import pytest

from closers import output_of, start_program
from connections import A_LONG_LOOK, DEADLINE, Ending, PairMaker, identity, queued_input, still_open, wait_until
from lingerx import Abort, Background, Drain, Flush, Outcome, Policy, _tls_way, closing
from peers import Call, Polite, WritesFirst, reset

if TYPE_CHECKING:
    from closers import CloserMaker
    from conformance import Engine

if sys.platform != "win32":
    import resource

trustme = pytest.importorskip("trustme", reason="trustme makes the certificates")

posix = pytest.mark.skipif(sys.platform == "win32", reason="on Windows nobody shares O_NONBLOCK with us")

SHORT = 0.03
"""Seconds: a limit that is meant to be reached."""
IN_TIME = 0.5
"""Seconds until something that has reached it must be over, however busy the machine."""

ANSWER = bytes(range(256)) * 256
MORE_THAN_FITS = bytes(32 << 20)
"""More than the kernel takes while the peer does not read."""

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
TIMEOUTS = [None, DEADLINE, 0.0]
"""Of our socket object: blocking, with O_NONBLOCK and a time, with O_NONBLOCK and none."""


class TlsPairMaker(Protocol):
    """The fixture `tls`."""

    def __call__(
        self, *, version: ssl.TLSVersion = ..., timeout: float | None = ..., handshake: bool = ...
    ) -> tuple[ssl.SSLSocket, ssl.SSLSocket]: ...


@pytest.fixture
def tls(tcp: PairMaker, stack: ExitStack, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> TlsPairMaker:
    """Makes connected (ours, peer) pairs: the server's end and the client's, which wants to see a close_notify."""

    def make(
        *, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3, timeout: float | None = None, handshake: bool = True
    ) -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
        server, client = contexts
        server.maximum_version = version
        raw_ours, raw_peer = tcp()
        raw_ours.settimeout(DEADLINE)
        ours = server.wrap_socket(raw_ours, server_side=True, do_handshake_on_connect=False)
        stack.enter_context(ours)
        peer = client.wrap_socket(
            raw_peer, server_hostname="localhost", do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        stack.enter_context(peer)
        if handshake:
            with Call(peer.do_handshake):
                ours.do_handshake()
        ours.settimeout(timeout)
        return ours, peer

    return make


def read_all(peer: ssl.SSLSocket) -> int:
    """Borrows: bytes until close_notify; SSLEOFError when the stream ends without one."""
    received = 0
    while data := peer.recv(65536):
        received += len(data)
    return received


# close_notify ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
@pytest.mark.parametrize("timeout", TIMEOUTS)
@pytest.mark.parametrize("policy", [Drain(timeout=DEADLINE), Flush(timeout=DEADLINE), Background()], ids=repr)
def test_peer_sees_close_notify(
    engine: Engine, tls: TlsPairMaker, version: ssl.TLSVersion, timeout: float | None, policy: Policy
) -> None:
    ours, peer = tls(version=version, timeout=timeout)
    known = identity(ours)
    ours.sendall(ANSWER) if timeout != 0.0 else ours.send(ANSWER)
    with Polite(peer) as polite:
        report = engine.close(ours, policy)
    assert polite.ending == Ending(len(ANSWER), None)
    assert report.delivered is (None if policy == Background() else True)
    assert report.error is None
    assert ours.fileno() == -1
    assert not still_open(known)


def test_peer_has_said_goodbye_first(engine: Engine, tls: TlsPairMaker) -> None:
    ours, peer = tls()
    peer.settimeout(0.0)
    with suppress(ssl.SSLWantReadError):
        peer.unwrap()
    peer.settimeout(DEADLINE)
    ours.sendall(ANSWER)

    def read() -> int:
        received = 0
        with peer, suppress(ssl.SSLZeroReturnError):  # close_notify, where we have sent ours
            while data := peer.recv(65536):
                received += len(data)
        return received

    with Call(read) as call:
        report = engine.send_and_close(ours, ANSWER)
    assert call.result() == 2 * len(ANSWER)
    assert (report.outcome, report.delivered) == (Outcome.PEER_CLOSED, True)


def test_unread_input_costs_nothing(engine: Engine, tls: TlsPairMaker) -> None:
    ours, peer = tls()
    peer.sendall(bytes(300_000))
    ours.sendall(ANSWER)
    with Polite(peer) as polite:
        report = engine.close(ours)
    assert polite.ending == Ending(len(ANSWER), None)
    assert report.outcome is Outcome.PEER_CLOSED
    assert report.delivered is True


def test_abort_says_no_goodbye(engine: Engine, tls: TlsPairMaker) -> None:
    ours, peer = tls()
    assert engine.abort(ours).outcome is Outcome.ABORTED
    # A reset; CPython tells of it in either way, by the version of OpenSSL.
    with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):
        read_all(peer)


def test_handshake_that_was_not_done(engine: Engine, tls: TlsPairMaker) -> None:
    ours, peer = tls(handshake=False)
    with socket.socket(fileno=peer.detach()) as raw:
        assert engine.close(ours, Flush()).outcome is Outcome.ACKED
        raw.settimeout(DEADLINE)
        assert raw.recv(1) == b""


def test_many_at_once(engine: Engine, tls: TlsPairMaker, tcp: PairMaker) -> None:
    pairs = [tls(version=version, timeout=timeout) for version in VERSIONS for timeout in TIMEOUTS]
    plain, plain_peer = tcp()
    with ExitStack() as peers:
        polite = [peers.enter_context(Polite(peer)) for _, peer in pairs]
        polite.append(peers.enter_context(Polite(plain_peer)))
        reports = engine.close_all([ours for ours, _ in pairs] + [plain], Drain(timeout=DEADLINE), timeout=DEADLINE)
    assert [report.outcome for report in reports] == [Outcome.PEER_CLOSED] * 7
    assert [peer.ending for peer in polite] == [Ending(0, None)] * 7


def test_with_block(engine: Engine, tls: TlsPairMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingerx._closing.close", engine.close)
    ours, peer = tls()
    with Polite(peer) as polite, closing(ours) as same:
        same.sendall(ANSWER)
    assert polite.ending == Ending(len(ANSWER), None)


def test_with_block_that_raises(engine: Engine, tls: TlsPairMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingerx._closing.close", engine.close)
    ours, peer = tls()
    with pytest.raises(ZeroDivisionError), closing(ours):
        raise ZeroDivisionError
    with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):
        read_all(peer)


# The rest of the data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
@pytest.mark.parametrize("timeout", TIMEOUTS)
@pytest.mark.parametrize("size", [0, 1, 64 << 10, 4 << 20])
@pytest.mark.parametrize("policy", [Drain(timeout=DEADLINE), Flush(timeout=DEADLINE)], ids=["drain", "flush"])
def test_rest_of_the_data_arrives(
    engine: Engine, tls: TlsPairMaker, version: ssl.TLSVersion, timeout: float | None, size: int, policy: Policy
) -> None:
    ours, peer = tls(version=version, timeout=timeout)
    with Polite(peer) as polite:
        report = engine.send_and_close(ours, bytes(size), policy)
    assert polite.ending == Ending(size, None)
    assert report.outcome in (Outcome.PEER_CLOSED, Outcome.ACKED)
    assert report.delivered is True


def test_data_arrives_as_it_was(engine: Engine, tls: TlsPairMaker) -> None:
    ours, peer = tls()

    def read() -> bytes:
        received = b""
        while data := peer.recv(65536):
            received += data
        return received

    with Call(read) as call:
        engine.send_and_close(ours, memoryview(ANSWER).cast("I"), Flush())
    assert call.result() == ANSWER


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_client_that_writes_everything_before_it_reads(
    engine: Engine, tls: TlsPairMaker, version: ssl.TLSVersion, timeout: float | None
) -> None:
    ours, peer = tls(version=version, timeout=timeout)
    body = bytes(8 << 20)
    with WritesFirst(peer, body) as client:
        report = engine.send_and_close(ours, bytes(4 << 20), Drain(timeout=DEADLINE))
    assert client.ending == Ending(4 << 20, None)
    assert report.outcome is Outcome.PEER_CLOSED
    assert report.delivered is True
    assert report.drained >= len(body) - (64 << 10), "of what was read while sending, the plain bytes are counted"


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
def test_peer_that_half_closed_without_a_goodbye_gets_its_answer(
    engine: Engine, tls: TlsPairMaker, version: ssl.TLSVersion
) -> None:
    ours, peer = tls(version=version)
    with socket.socket(fileno=os.dup(peer.fileno())) as raw:
        raw.shutdown(socket.SHUT_WR)
    with Polite(peer) as polite:
        report = engine.send_and_close(ours, bytes(4 << 20))
    assert polite.ending == Ending(4 << 20, None)
    assert report.outcome is Outcome.PEER_CLOSED
    assert report.delivered is True


# Limits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_silent_peer(engine: Engine, tls: TlsPairMaker, timeout: float | None) -> None:
    ours, peer = tls(timeout=timeout)
    report = engine.close(ours, Drain(timeout=SHORT))
    assert report.outcome is Outcome.TIMED_OUT
    assert SHORT <= report.elapsed < IN_TIME
    assert read_all(peer) == 0


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_peer_that_never_reads(engine: Engine, tls: TlsPairMaker, timeout: float | None) -> None:
    ours, peer = tls(timeout=timeout)
    report = engine.send_and_close(ours, MORE_THAN_FITS, Drain(timeout=SHORT))
    assert report.outcome is Outcome.TIMED_OUT
    assert SHORT <= report.elapsed < IN_TIME
    assert report.delivered is False
    assert report.unacked is not None
    assert report.unacked > len(MORE_THAN_FITS) // 2
    with pytest.raises(ssl.SSLEOFError):
        read_all(peer)  # an answer that was cut off does not look complete


def test_no_time_at_all(engine: Engine, tls: TlsPairMaker) -> None:
    ours, peer = tls()
    report = engine.send_and_close(ours, ANSWER, Drain(timeout=0))
    assert report.outcome in (Outcome.TIMED_OUT, Outcome.PEER_CLOSED)
    assert report.elapsed < IN_TIME
    assert read_all(peer) == len(ANSWER)


def test_limit_that_aborts(engine: Engine, tls: TlsPairMaker) -> None:
    ours, peer = tls()
    report = engine.send_and_close(ours, MORE_THAN_FITS, Drain(timeout=SHORT, on_timeout="abort"))
    assert (report.outcome, report.delivered) == (Outcome.TIMED_OUT, False)
    with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):
        read_all(peer)


def test_idle_limit_while_sending(engine: Engine, tls: TlsPairMaker) -> None:
    ours, _peer = tls()
    report = engine.send_and_close(ours, MORE_THAN_FITS, Drain(timeout=DEADLINE, idle_timeout=SHORT))
    assert (report.outcome, report.delivered) == (Outcome.IDLE, False)
    assert report.elapsed < DEADLINE / 2


def test_byte_limit_while_sending(engine: Engine, tls: TlsPairMaker) -> None:
    ours, peer = tls()
    peer.sendall(bytes(10_001))
    report = engine.send_and_close(ours, MORE_THAN_FITS, Drain(timeout=DEADLINE, max_bytes=10_000))
    assert (report.outcome, report.delivered) == (Outcome.BYTE_LIMIT, False)
    assert report.drained == 10_000


def test_peer_resets_while_we_send(engine: Engine, tls: TlsPairMaker) -> None:
    ours, peer = tls()

    def read_some_and_reset() -> None:
        peer.recv(1)
        reset(peer)

    with Call(read_some_and_reset):
        report = engine.send_and_close(ours, MORE_THAN_FITS, Drain(timeout=DEADLINE))
    assert report.outcome is Outcome.PEER_RESET
    assert report.error is not None
    assert report.delivered is False


# Ownership ------------------------------------------------------------------------------------------------

Way = Callable[["Engine", ssl.SSLSocket], object]

WAYS: dict[str, Way] = {
    "close": lambda engine, ours: engine.close(ours, Drain(timeout=SHORT)),
    "close_all": lambda engine, ours: engine.close_all([ours], Drain(timeout=SHORT)),
    "send_and_close": lambda engine, ours: engine.send_and_close(ours, MORE_THAN_FITS, Drain(timeout=SHORT)),
    "abort": lambda engine, ours: engine.abort(ours),
    "background": lambda engine, ours: engine.close(ours, Background()),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    """Every call that takes a TLS socket over."""
    return WAYS[request.param]


def options(sock: socket.socket) -> tuple[bytes, bytes]:
    """Borrows: SO_RCVTIMEO and SO_SNDTIMEO, struct timeval each."""
    receive = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16)
    return receive, sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16)


@posix
@pytest.mark.parametrize("timeout", [None, DEADLINE])
@pytest.mark.parametrize("default", [None, DEADLINE])
def test_copy_of_the_socket_is_as_before(
    engine: Engine, way: Way, tls: TlsPairMaker, timeout: float | None, default: float | None
) -> None:
    ours, _peer = tls(timeout=timeout)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 77, 0))
    with socket.socket(fileno=os.dup(ours.fileno())) as copy:
        before = options(copy)
        socket.setdefaulttimeout(default)
        try:
            way(engine, ours)
        finally:
            socket.setdefaulttimeout(None)
        assert os.get_blocking(copy.fileno()) is (timeout is None)
        assert options(copy) == before


@posix
def test_copy_of_the_socket_never_sees_another_mode(engine: Engine, way: Way, tls: TlsPairMaker) -> None:
    ours, _peer = tls(timeout=None)
    with socket.socket(fileno=os.dup(ours.fileno())) as copy:
        over, looking = threading.Event(), threading.Event()

        def always_blocking() -> bool:
            while os.get_blocking(copy.fileno()):
                looking.set()
                if over.is_set():
                    return True
            return False

        with Call(always_blocking) as look:
            looking.wait(DEADLINE)
            way(engine, ours)
            over.set()
        assert look.result()


def test_old_object_cannot_write_to_the_next_socket_of_that_number(
    engine: Engine, way: Way, tls: TlsPairMaker, stack: ExitStack
) -> None:
    ours, _peer = tls()
    number = ours.fileno()
    way(engine, ours)
    pair = [stack.enter_context(sock) for sock in socket.socketpair()]
    fresh, other = sorted(pair, key=lambda sock: sock.fileno() != number)
    if fresh.fileno() != number:
        os.dup2(fresh.fileno(), number)
        stack.callback(os.close, number)
    with pytest.raises(OSError, match=r"\[Errno 9\]|closed|gone"):
        ours.send(b"not for you")
    other.settimeout(A_LONG_LOOK)
    with pytest.raises(TimeoutError):
        other.recv(1)


class Interrupted(Exception):
    """What the handler raises here."""


@posix
@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_handler_raises_while_we_send(engine: Engine, tls: TlsPairMaker, timeout: float | None) -> None:
    ours, peer = tls(timeout=timeout)
    known = identity(ours)

    def handle(*_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise Interrupted

    before = signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, SHORT)
        with pytest.raises(Interrupted):
            engine.send_and_close(ours, MORE_THAN_FITS, Drain(timeout=DEADLINE))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ours.fileno() == -1
    assert not still_open(known)
    with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):
        read_all(peer)


INTERRUPTIONS = """
import gc, itertools, os, socket, ssl, sys, threading, warnings
import lingerx, trustme

warnings.simplefilter("ignore")  # the garbage collector may have to close what nobody has had yet, and says so
authority = trustme.CA()
server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
authority.issue_cert("localhost").configure_cert(server)
authority.configure_trust(client)

class Interrupted(Exception):
    pass

def pair(listener=socket.create_server(("127.0.0.1", 0))):
    there = socket.create_connection(listener.getsockname())
    here, _ = listener.accept()
    shaking = threading.Thread(target=lambda: client.wrap_socket(there, server_hostname="localhost").close())
    shaking.start()
    ours = server.wrap_socket(here, server_side=True)
    shaking.join()
    return ours

def interrupted_at(moment, call):
    passed = itertools.count(1)
    def trace(frame, event, _):
        frame.f_trace_opcodes = True
        if event == "opcode" and next(passed) == moment:
            sys.settrace(None)
            raise Interrupted
        return trace
    try:
        sys.settrace(trace)
        call()
    except Interrupted:
        return True
    finally:
        sys.settrace(None)
    return False

def fds():
    gc.collect()
    return set(os.listdir("/dev/fd"))

for call in (lambda: lingerx.close(ours), lambda: lingerx.send_and_close(ours, bytes(1000))):
    ours = pair()
    ours.close()
    for moment in itertools.count(1, 23):  # an odd number: other moments of other loops
        before = fds()
        ours = pair()
        interrupted = interrupted_at(moment, call)
        ours.close()  # should it have come before the call had begun
        assert fds() == before, moment
        if not interrupted:
            break
    assert moment > 300, moment
"""


@posix
@pytest.mark.slow
def test_exception_at_any_moment(engine_name: str) -> None:
    """What a signal handler raises between any two steps comes out, and the fd is closed, once."""
    with start_program(engine_name, INTERRUPTIONS) as process:
        output_of(process)


# Apart from the network -----------------------------------------------------------------------------------


@posix
def test_openssl_reads_nothing_at_goodbye(engine: Engine, tls: TlsPairMaker) -> None:
    """A peer may send KeyUpdates without end, and one call of OpenSSL takes all that are there."""
    ours, peer = tls()
    peer.sendall(ANSWER)
    wait_until(lambda: queued_input(ours) > len(ANSWER))
    unread = queued_input(ours)
    report = engine.close(ours, Drain(timeout=SHORT))
    assert (report.outcome, report.drained) == (Outcome.TIMED_OUT, unread)
    assert read_all(peer) == 0, "close_notify came all the same"


@posix
def test_openssl_reads_small_portions_while_it_sends(tls: TlsPairMaker) -> None:
    ours, peer = tls()
    peer.sendall(ANSWER)
    wait_until(lambda: queued_input(ours) > len(ANSWER))
    way = _tls_way.Way(ours)
    way.begin()
    connection = socket.socket(fileno=os.dup(way.connection.fileno()))
    with connection:
        before = queued_input(connection)
        assert way.bring()
        assert before - queued_input(connection) == _tls_way.PORTION
    way.give_up()


@posix
def test_another_thread_closes_the_socket_meanwhile(tls: TlsPairMaker, stack: ExitStack) -> None:
    """It closes our end of a socketpair. Whoever gets that number next is left alone."""
    ours, _ = tls()
    _, inode = identity(ours)
    way = _tls_way.Way(ours)
    way.begin()
    number = ours.fileno()
    ours.close()
    stranger, friend = socket.socketpair()
    stack.enter_context(stranger)
    stack.enter_context(friend)
    assert number in (stranger.fileno(), friend.fileno())
    way.end()
    now = identity(way.hold.raw)
    assert now == (now[0], inode)
    way.give_up()
    assert not still_open(now)
    stranger.sendall(b"here")
    assert friend.recv(100) == b"here"


@posix
@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])
def test_another_thread_shuts_the_socket_down_while_we_send(engine: Engine, tls: TlsPairMaker, how: int) -> None:
    """The session is gone for it, but not for us: nothing goes out in clear, and the call ends in its time."""
    ours, peer = tls(timeout=DEADLINE)
    with Call(lambda: engine.send_and_close(ours, MORE_THAN_FITS, Drain(timeout=IN_TIME))) as sending:
        received = len(peer.recv(1))
        ours.shutdown(how)
        with suppress(ssl.SSLEOFError, ConnectionResetError):  # never "wrong version number", as in clear it would be
            received += read_all(peer)
        peer.close()
    report = sending.result()
    if how == socket.SHUT_RD:  # which nobody needs
        assert received == len(MORE_THAN_FITS)
    else:
        assert report.outcome in (Outcome.FAILED, Outcome.PEER_RESET)
        assert report.delivered is False


def test_no_data_in_clear_before_the_handshake_is_done(engine: Engine, tls: TlsPairMaker) -> None:
    ours, _ = tls(handshake=False)
    with pytest.raises(ValueError, match="handshake"):
        engine.send_and_close(ours, b"secret")
    assert ours.fileno() >= 0


@posix
@pytest.mark.parametrize("way", ["send_and_close", "close"])
def test_no_fd_is_left(engine: Engine, tls: TlsPairMaker, way: str) -> None:
    ours, peer = tls(timeout=DEADLINE)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as taken:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 1, limits[1]))
        taken.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        with suppress(OSError):
            while True:
                taken.callback(os.close, os.dup(0))
        report = engine.close(ours, Flush()) if way == "close" else engine.send_and_close(ours, ANSWER)
    expected = (Outcome.ACKED, None, True) if way == "close" else (Outcome.FAILED, errno.EMFILE, False)
    assert (report.outcome, report.error, report.delivered) == expected
    with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):
        read_all(peer)


# In the background ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS, ids=["tls1.2", "tls1.3"])
@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_background_closer_says_goodbye_before_it_returns(
    closers: CloserMaker, tls: TlsPairMaker, version: ssl.TLSVersion, timeout: float | None
) -> None:
    closer = closers(Drain(timeout=DEADLINE))
    ours, peer = tls(version=version, timeout=timeout)
    ours.settimeout(DEADLINE)
    ours.sendall(ANSWER)
    ours.settimeout(timeout)
    future = closer.submit(ours)
    assert ours.fileno() == -1
    assert read_all(peer) == len(ANSWER)  # an EOF without a close_notify would raise
    peer.close()
    assert future.result(DEADLINE).outcome is Outcome.PEER_CLOSED


def test_background_closer_aborts_without_a_goodbye(closers: CloserMaker, tls: TlsPairMaker) -> None:
    ours, peer = tls()
    closers().close(ours, Abort())
    with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):
        peer.recv(1)


@pytest.mark.parametrize("way", ["send_and_close", "submit"])
@pytest.mark.parametrize("data", [ANSWER, b""], ids=["some", "none"])
def test_background_closer_takes_no_data_for_a_session(
    closers: CloserMaker, tls: TlsPairMaker, way: str, data: bytes
) -> None:
    """It could never be encrypted later; the session is untouched, and the sentence says what to do."""
    closer = closers(Drain(timeout=DEADLINE))
    ours, peer = tls()
    with pytest.raises(ValueError, match="sendall"):
        closer.send_and_close(ours, data) if way == "send_and_close" else closer.submit(ours, data=data)
    assert closer.stats().handed_over == 0
    peer.sendall(b"question")
    assert ours.recv(100) == b"question"
    ours.sendall(ANSWER)
    closer.close(ours)
    assert read_all(peer) == len(ANSWER)
    peer.close()
    assert closer.join(DEADLINE)


def test_background_closer_after_its_shutdown_says_no_goodbye(closers: CloserMaker, tls: TlsPairMaker) -> None:
    closer = closers(Drain(timeout=DEADLINE))
    closer.shutdown()
    ours, peer = tls()
    with pytest.raises(RuntimeError, match="shut down"):
        closer.close(ours)
    ours.sendall(ANSWER)
    assert len(peer.recv(len(ANSWER))) > 0


def test_background_closer_takes_a_session_that_was_unwrapped(closers: CloserMaker, tls: TlsPairMaker) -> None:
    closer = closers(Drain(timeout=DEADLINE))
    ours, peer = tls()
    with Call(peer.unwrap) as call:
        plain = ours.unwrap()
    assert closer.send_and_close(plain, b"in the clear")
    with call.result() as raw:
        assert raw.recv(100) == b"in the clear"
    assert closer.join(DEADLINE)


def test_background_closer_and_sessions_of_many_threads(closers: CloserMaker, tls: TlsPairMaker) -> None:
    closer = closers(Drain(timeout=DEADLINE))
    pairs = [tls() for _ in range(4)]
    calls = [Call(lambda ours=ours: closer.submit(ours)) for ours, _ in pairs]  # type: ignore[misc]
    for call in calls:
        call.start()
    futures = [call.result() for call in calls]
    for _, peer in pairs:
        assert read_all(peer) == 0
        peer.close()
    assert [future.result(DEADLINE).outcome for future in futures] == [Outcome.PEER_CLOSED] * 4
