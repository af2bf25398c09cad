"""Twisted, with lingerx's factory around its own: twisted.web over TCP and TLS."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from closers import LONG, MORE_THAN_FITS, CloserMaker, nonzero, output_of, start_program
from connections import A_LONG_LOOK, DEADLINE, Ending, PairMaker, wait_until
from lingerx import Abort, Background, Drain, KernelLinger, Outcome, Policy
from peers import Call, Flooding, Polite, SlowReader, WritesFirst, read_to_end, reset
from refusals import GOOD, UPLOAD

from .kit import (
    FEWER_UPLOADS,
    At,
    BigAnswers,
    Certificate,
    Command,
    RefusedUploads,
    RefusedUploadsOnASlowLink,
    RefusedUploadsOverTls,
    Server,
    SilentClients,
    answered,
    needs,
)
from .links import Link

if find_spec("twisted") is not None:
    from twisted.internet import reactor as _reactor  # noqa: F401  # what it opens, it opens before the first test looks

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = needs("twisted")

PROGRAM = """if True:
    import sys
    port, lingering, kind, *tls = sys.argv[1:]
    if kind:
        import importlib
        importlib.import_module("twisted.internet." + kind).install()
    from twisted.internet import reactor
    from twisted.web import resource, server
    from servers.apps import FRESH, PAGE, REFUSAL_HEAD

    class Fresh(resource.Resource):
        isLeaf = True

        def render_GET(self, request):
            return FRESH

    class Refusing(server.Request):
        def gotLength(self, length):  # twisted.web asks no resource before the whole body is there
            super().gotLength(length)
            if length:
                self.channel.transport.writeSequence([REFUSAL_HEAD, PAGE])
                self.channel.loseConnection()

    site = server.Site(Fresh(), requestFactory=Refusing)
    if lingering == "True":
        import lingerx.twisted
        site = lingerx.twisted.lingering(site)
    if tls:
        from twisted.internet import ssl
        context = ssl.DefaultOpenSSLContextFactory(tls[1], tls[0])
        reactor.listenSSL(int(port), site, context, interface="127.0.0.1")
    else:
        reactor.listenTCP(int(port), site, interface="127.0.0.1")
    reactor.run()
"""


class Twisted(Server):
    packages = ("twisted", "pyopenssl")
    reactor = ""

    def command(self, at: At) -> Command:
        tls = [] if at.tls is None else [str(at.tls.chain), str(at.tls.key)]
        return [sys.executable, "-c", PROGRAM, str(at.port), str(at.lingering), self.reactor, *tls]


class TestTwistedWeb(Twisted, RefusedUploads, RefusedUploadsOnASlowLink, BigAnswers, SilentClients):
    name = "twisted.web"


@needs("OpenSSL")
def test_tls_asks_the_wrapped_factory_what_may_be_spoken() -> None:
    """Browsers and curl offer protocols (ALPN), which a Site chooses from."""
    from twisted.internet.interfaces import IProtocolNegotiationFactory
    from twisted.internet.protocol import Factory
    from twisted.web.server import Site

    from lingerx.twisted import lingering

    site = Site(None)
    assert IProtocolNegotiationFactory.providedBy(lingering(site))
    assert lingering(site).acceptableProtocols() == site.acceptableProtocols()
    assert not IProtocolNegotiationFactory.providedBy(lingering(Factory()))


@needs("OpenSSL")
class TestTwistedWebOverTls(Twisted, RefusedUploadsOverTls):
    name = "twisted.web"


class TestOnAsyncio(Twisted, RefusedUploads):
    uploads = FEWER_UPLOADS
    name, reactor = "twisted.web, asyncio", "asyncioreactor"


class TestOnSelect(Twisted, RefusedUploads):
    uploads = FEWER_UPLOADS
    name, reactor = "twisted.web, select", "selectreactor"


class TestExample(RefusedUploads):
    uploads = FEWER_UPLOADS
    name = "examples/twisted_server.py"
    packages = ("twisted",)
    test_without_the_adapter_answers_are_lost = None  # type: ignore[assignment]
    # Its answer is closed only once most of it has been read: see TestBigAnswers.
    test_sigterm_with_lingering_connections_in_flight = None  # type: ignore[assignment]

    def command(self, at: At) -> Command:
        return [sys.executable, "-X", "dev", EXAMPLES / "twisted_server.py", str(at.port)]

    def page(self, answer: int) -> bytes:
        return b"Nothing can be uploaded here.\n" * 100_000


class TestBigAnswers(Twisted):
    """Of which much is still in this process when the protocol is done."""

    name = "twisted.web"

    @needs("OpenSSL")
    def test_over_tls(self, loopback: Link, certificate: Certificate) -> None:
        with self.serve(loopback, answer=16 << 20, tls=certificate) as served:
            self._all_arrive(served, "raw", 3)

    def test_sigterm_before_they_are_written(self, loopback: Link, stack: ExitStack) -> None:
        with self.serve(loopback, answer=16 << 20) as served:
            clients = [answered(served, stack) for _ in range(2)]
            served.process.terminate()
            assert [client.go_on(served.page) for client in clients] == 2 * [GOOD]
            served.process.wait(self.ends_within)

    def test_sigterm_while_nobody_reads(self, loopback: Link, stack: ExitStack) -> None:
        with self.serve(loopback, answer=16 << 20) as served:
            answered(served, stack)
            served.process.terminate()
            served.process.wait(self.ends_within)


# In this process: one reactor, which never runs, but is iterated --------------------------------------------


class Served:
    """What a server's protocol was told."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.received = b""
        self.reason: Any = None
        self.transport: Any = None
        self.when_lost: Callable[[], object] = lambda: None


@pytest.fixture
def serve(closers: CloserMaker, tcp: PairMaker) -> Callable[..., tuple[Any, Served, socket.socket]]:
    """Connects a client to a protocol of a lingering factory: the closer, what the protocol saw, and the client."""
    from twisted.internet import reactor
    from twisted.internet.interfaces import IHalfCloseableProtocol
    from twisted.internet.protocol import Factory, Protocol
    from zope.interface import directlyProvides

    from lingerx.twisted import lingering

    every: Any = reactor

    def make(policy: Policy | None = None, half_closes: bool = False) -> tuple[Any, Served, socket.socket]:
        served = Served()
        closer = closers(LONG)

        class Recording(Protocol):
            def connectionMade(self) -> None:
                served.transport = self.transport

            def dataReceived(self, data: bytes) -> None:
                served.received += data

            def readConnectionLost(self) -> None:
                served.events.append("read")

            def writeConnectionLost(self) -> None:
                served.events.append("write")

            def connectionLost(self, reason: Any = None) -> None:
                served.events.append("lost")
                served.reason = reason
                served.when_lost()

        def build(_: object) -> Protocol:
            protocol = Recording()
            if half_closes:
                directlyProvides(protocol, IHalfCloseableProtocol)
            return protocol

        factory = Factory()
        factory.buildProtocol = build
        ours, peer = tcp()
        ours.setblocking(False)
        every.adoptStreamConnection(ours.fileno(), ours.family, lingering(factory, policy, closer=closer))
        ours.close()  # the reactor has made a copy
        return closer, served, peer

    return make


def iterate_until(condition: Callable[[], bool]) -> None:
    """Twisted's reactor goes on until this holds."""
    from twisted.internet import reactor

    give_up = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < give_up
        reactor.iterate(0.005)


@contextmanager
def no_complaints() -> Iterator[None]:
    """Nothing in this block makes Twisted log an error."""
    from twisted.python import log

    said: list[Any] = []
    log.addObserver(said.append)
    try:
        yield
    finally:
        log.removeObserver(said.append)
    assert not [event for event in said if event["isError"]]


def lost(served: Served) -> Callable[[], bool]:
    return lambda: "lost" in served.events


@needs("twisted")
class TestOneConnection:
    def test_input_is_thrown_away_and_the_rest_goes_out(self, serve: Any) -> None:
        closer, served, client = serve()
        served.transport.write(MORE_THAN_FITS)
        served.transport.loseConnection()
        with WritesFirst(client, bytes(UPLOAD)) as peer:
            iterate_until(lost(served))
            wait_until(lambda: closer.pending == 0)
        assert peer.ending == Ending(len(MORE_THAN_FITS), None)
        assert served.received == b""
        assert nonzero(closer.stats()) == {Outcome.PEER_CLOSED: 1}
        assert served.events == ["lost"]
        assert "cleanly" in str(served.reason)

    def test_peer_never_reads(self, serve: Any) -> None:
        closer, served, client = serve(Drain(timeout=0.1))
        served.transport.write(10 * MORE_THAN_FITS)
        began = time.monotonic()
        served.transport.loseConnection()
        iterate_until(lost(served))
        assert 0.1 <= time.monotonic() - began < 2.0
        assert nonzero(closer.stats()) == {Outcome.TIMED_OUT: 1}
        assert read_to_end(client).received < 10 * len(MORE_THAN_FITS)

    def test_peer_never_reads_and_is_aborted(self, serve: Any) -> None:
        closer, served, client = serve(Drain(timeout=0.1, on_timeout="abort"))
        served.transport.write(10 * MORE_THAN_FITS)
        served.transport.loseConnection()
        iterate_until(lost(served))
        assert nonzero(closer.stats()) == {Outcome.TIMED_OUT: 1}
        assert read_to_end(client).error == errno.ECONNRESET

    def test_peer_sends_too_much(self, serve: Any) -> None:
        _, served, client = serve(Drain(timeout=DEADLINE, max_bytes=100_000))
        served.transport.write(10 * MORE_THAN_FITS)
        served.transport.loseConnection()
        with Flooding(client):
            iterate_until(lost(served))

    def test_time_that_was_needed_to_write_is_not_given_again(self, serve: Any) -> None:
        closer, served, client = serve(Drain(timeout=0.3))
        served.transport.write(MORE_THAN_FITS)
        began = time.monotonic()
        served.transport.loseConnection()
        with SlowReader(client, 1 << 20, when=lambda: time.monotonic() > began + 0.1):
            iterate_until(lost(served))
        assert closer.join(DEADLINE)

    def test_peer_half_closes_while_we_write(self, serve: Any) -> None:
        closer, served, client = serve()
        served.transport.write(MORE_THAN_FITS)
        served.transport.loseConnection()
        client.shutdown(socket.SHUT_WR)
        for _ in range(10):
            iterate_until(lambda: True)
        with Polite(client) as peer:
            iterate_until(lost(served))
            wait_until(lambda: closer.pending == 0)
        assert peer.ending == Ending(len(MORE_THAN_FITS), None)

    def test_peer_closes_first(self, serve: Any) -> None:
        closer, served, client = serve()
        client.close()
        iterate_until(lost(served))
        assert served.events == ["lost"]
        served.transport.loseConnection()
        assert closer.stats().handed_over == 0

    def test_protocol_that_half_closes_by_itself(self, serve: Any) -> None:
        closer, served, client = serve(half_closes=True)
        served.transport.write(b"hello")
        served.transport.loseWriteConnection()
        iterate_until(lambda: served.events == ["write"])
        assert read_to_end(client) == Ending(5, None)
        client.sendall(b"still heard")
        iterate_until(lambda: served.received == b"still heard")
        client.shutdown(socket.SHUT_WR)
        iterate_until(lambda: served.events == ["write", "read"])
        served.transport.loseConnection()
        assert served.events == ["write", "read", "lost"]
        client.close()
        assert closer.join(DEADLINE)
        assert closer.stats().handed_over == 1

    @pytest.mark.parametrize(
        ("policy", "outcome", "error"),
        [(Background(), Outcome.BACKGROUND, None), (Abort(), Outcome.ABORTED, errno.ECONNRESET)],
    )
    def test_policies_without_a_deadline(self, serve: Any, policy: Policy, outcome: Outcome, error: int | None) -> None:
        closer, served, client = serve(policy)
        served.transport.write(b"hello")
        served.transport.loseConnection()
        iterate_until(lost(served))
        assert read_to_end(client).error == error
        assert nonzero(closer.stats()) == {outcome: 1}

    def test_other_ways_to_lose_a_connection(self, serve: Any) -> None:
        for way in ("stopProducing", "stopConsuming"):
            closer, served, client = serve()
            served.transport.write(MORE_THAN_FITS)
            getattr(served.transport, way)()
            with WritesFirst(client, bytes(UPLOAD)) as peer:
                iterate_until(lost(served))
                wait_until(lambda closer=closer: closer.pending == 0)  # type: ignore[misc]
            assert peer.ending == Ending(len(MORE_THAN_FITS), None)

    def test_abort_connection_is_as_ever(self, serve: Any) -> None:
        closer, served, client = serve()
        served.transport.abortConnection()
        iterate_until(lost(served))
        assert read_to_end(client).error == errno.ECONNRESET
        assert closer.stats().handed_over == 0

    def test_closer_was_shut_down(self, serve: Any) -> None:
        closer, served, client = serve(LONG)
        closer.shutdown()
        served.transport.write(b"hello")
        served.transport.loseConnection()
        iterate_until(lost(served))
        assert read_to_end(client) == Ending(5, None)

    @pytest.mark.parametrize("policy", [LONG, Abort()])
    def test_closed_once_more_when_it_is_lost(self, serve: Any, policy: Policy) -> None:
        closer, served, client = serve(policy)
        served.when_lost = lambda: served.transport.loseConnection()
        client.close()
        with no_complaints():
            iterate_until(lost(served))
        assert closer.stats().handed_over == 0

    def test_reset_while_a_producer_is_waited_for(self, serve: Any) -> None:
        from twisted.internet.interfaces import IPushProducer
        from zope.interface import implementer

        @implementer(IPushProducer)
        class Producer:
            resumeProducing = pauseProducing = stopProducing = lambda _: None

        closer, served, client = serve()
        served.when_lost = lambda: served.transport.unregisterProducer()
        served.transport.registerProducer(Producer(), True)
        served.transport.write(10 * MORE_THAN_FITS)
        served.transport.loseConnection()
        reset(client)
        with no_complaints():
            iterate_until(lost(served))
        assert closer.stats().handed_over == 0

    @needs("OpenSSL")
    def test_tls_by_starttls_ends_by_on_timeout(self, serve: Any, certificate: Certificate) -> None:
        from twisted.internet.ssl import DefaultOpenSSLContextFactory

        closer, served, client = serve(Drain(timeout=0.1))
        served.transport.startTLS(DefaultOpenSSLContextFactory(certificate.key, certificate.chain))
        context = ssl.create_default_context(cafile=certificate.authority)
        with Call(lambda: context.wrap_socket(client, server_hostname="localhost")) as handshake:
            iterate_until(lambda: not handshake.is_alive())
        with handshake.result() as encrypted:
            served.transport.write(b"hello")
            served.transport.loseConnection()  # which the client, who is no reader, does not answer
            iterate_until(lost(served))
            assert encrypted.recv(10) == b"hello"
            assert encrypted.recv(10) == b""
            assert read_to_end(encrypted) == Ending(0, None), "it was reset"
        assert nonzero(closer.stats()) == {Outcome.TIMED_OUT: 1}

    def test_producer_that_is_never_unregistered(self, serve: Any) -> None:
        from twisted.internet.interfaces import IPushProducer
        from zope.interface import implementer

        @implementer(IPushProducer)
        class Producer:
            resumeProducing = pauseProducing = stopProducing = lambda _: None

        closer, served, client = serve()
        served.transport.registerProducer(Producer(), True)
        served.transport.write(b"hello")
        served.transport.loseConnection()
        with Polite(client) as peer:
            iterate_until(lost(served))
            wait_until(lambda: closer.pending == 0)
        assert peer.ending == Ending(5, None)
        assert closer.stats().handed_over == 1

    def test_producer_raises(self, serve: Any) -> None:
        from twisted.internet.interfaces import IPullProducer
        from zope.interface import implementer

        asked: list[None] = []

        @implementer(IPullProducer)
        class Producer:
            def resumeProducing(self) -> None:
                asked.append(None)
                if len(asked) > 1:  # the first is at once
                    raise RuntimeError("nothing to produce")

            def stopProducing(self) -> None:
                pass

        closer, served, _client = serve(Drain(timeout=0.1))
        served.transport.registerProducer(Producer(), False)
        served.transport.write(b"hello")
        served.transport.loseConnection()
        iterate_until(lost(served))
        assert len(asked) == 2
        assert closer.join(DEADLINE)

    @pytest.mark.parametrize("streaming", [True, False])
    def test_producer_goes_on_to_its_end(self, serve: Any, streaming: bool) -> None:
        from twisted.internet.interfaces import IPullProducer, IPushProducer
        from zope.interface import directlyProvides

        closer, served, client = serve()
        pieces = [bytes([letter]) * 300_000 for letter in range(20)]

        class Producer:
            def resumeProducing(self) -> None:
                if pieces:
                    served.transport.write(pieces.pop())
                else:
                    served.transport.unregisterProducer()

            def pauseProducing(self) -> None:
                """By what it is asked."""

            def stopProducing(self) -> None:
                pieces.clear()

        producer = Producer()
        directlyProvides(producer, IPushProducer if streaming else IPullProducer)
        served.transport.registerProducer(producer, streaming)
        if streaming:
            served.transport.write(pieces.pop())  # more than it wants at once: the producer is paused
        served.transport.loseConnection()
        with Polite(client) as peer:
            iterate_until(lost(served))
            wait_until(lambda: closer.pending == 0)
        assert peer.ending == Ending(20 * 300_000, None)


STOPS = """if True:
    import sys
    from twisted.internet import reactor
    from twisted.internet.protocol import Factory, Protocol
    import lingerx.twisted

    class Answers(Protocol):
        def dataReceived(self, data):
            self.transport.write(bytes(int(sys.argv[1])))
            self.transport.loseConnection()
            port.stopListening().addCallback(lambda _: reactor.callLater(0, reactor.stop))

    port = reactor.listenTCP(0, lingerx.twisted.lingering(Factory.forProtocol(Answers)), interface="127.0.0.1")
    print(port.getHost().port, flush=True)
    reactor.run()
"""


def test_reactor_stops_when_no_port_is_left(engine_name: str, stack: ExitStack) -> None:
    size = 5 * len(MORE_THAN_FITS)
    program = start_program(engine_name, STOPS, size)
    assert program.stdout is not None
    address = "127.0.0.1", int(program.stdout.readline())
    client = stack.enter_context(socket.create_connection(address, DEADLINE))
    client.sendall(b"x")
    time.sleep(A_LONG_LOOK)  # the port is closed, and the reactor is told to stop
    assert read_to_end(client) == Ending(size, None)
    client.close()
    output_of(program)


def test_wrong_terms() -> None:
    from twisted.internet.protocol import Factory

    from lingerx.twisted import lingering

    wrong: list[Any] = [(KernelLinger(1), None), (3, None), (None, 3)]
    for policy, closer in wrong:
        with pytest.raises((TypeError, ValueError)):
            lingering(Factory(), policy, closer=closer)


def test_refused_connections() -> None:
    from twisted.internet.protocol import Factory

    from lingerx.twisted import lingering

    factory = Factory()
    factory.buildProtocol = lambda _: None
    assert lingering(factory).buildProtocol(None) is None


def test_it_is_missing() -> None:
    program = "import sys; sys.modules['twisted'] = None; import lingerx.twisted"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    assert "ImportError: lingerx.twisted needs Twisted (pip install 'lingerx[twisted]')" in done.stderr
