"""`lingering(factory)`: a factory for Twisted whose connections linger, whenever a protocol calls loseConnection().

Twisted flushes, reading on meanwhile; then the fd goes to a closer. No system call is made here: only what protocols,
factories and transports of Twisted offer in public.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ._terms import check_terms
from .closer import Closer, default_closer
from .policy import Abort, Drain, Flush, Policy, left_of

try:
    from twisted.internet.defer import Deferred
    from twisted.internet.error import ConnectionDone
    from twisted.internet.interfaces import (
        IHalfCloseableProtocol,
        IProtocolNegotiationFactory,
        IPullProducer,
        IReadWriteDescriptor,
        ISSLTransport,
    )
    from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
    from twisted.python.failure import Failure
    from zope.interface import alsoProvides, implementer
except ImportError as missing:
    raise ImportError("lingerx.twisted needs Twisted (pip install 'lingerx[twisted]')") from missing

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.internet.interfaces import IAddress, IProtocolFactory

__all__ = ["LingeringFactory", "LingeringProtocol", "lingering"]

LONGEST_FLUSH = 30.0
"""Seconds for the rest of the data where the policy has no deadline: what the default closer gives."""


def lingering(
    factory: IProtocolFactory, policy: Policy | None = None, *, closer: Closer | None = None, reactor: Any = None
) -> LingeringFactory:
    """A factory whose connections linger when they are closed by loseConnection().

        endpoint.listen(lingerx.twisted.lingering(Site(root)))

    factory: makes the protocols, which know nothing of it: a twisted.web Site, or any other, of clients too.
    policy: how connections are closed; None for the closer's own policy.
    closer: where they linger; None for `lingerx.default_closer()`.
    reactor: None for Twisted's own.

    From loseConnection() on, input is read and thrown away until the transport has written all it has: a client that
    sends its whole request before it reads gets an answer of any size. Then the socket goes to the closer, which
    half-closes, and the protocol's connectionLost is called. The policy's `timeout` and `max_bytes` hold for both
    parts together; where one is reached before all is written, the rest is lost. (`idle_timeout` counts once all is
    written.) Where the policy has no deadline, that is 30 s. abortConnection() is as ever. Set `timeout` to more than
    what your slowest download takes after loseConnection().

    With TLS (`reactor.listenSSL`, "ssl:" endpoints, startTLS) Twisted itself waits for the peer's close_notify; here
    it gets an end, and input is thrown away meanwhile: Flush is as Drain then.

    When the reactor stops, connections that have something left to write get the closer's `exit_timeout` first.

    Raises TypeError or ValueError for a policy or closer that cannot be used here.

    Sources: Twisted's docs, ITransport.loseConnection, IPullProducer, IWriteDescriptor, IHalfCloseableProtocol.
    """
    return LingeringFactory(factory, policy, closer, reactor)


@implementer(IHalfCloseableProtocol)
class LingeringProtocol(ProtocolWrapper):
    """Stands between a transport and a protocol: for the one it is the protocol, for the other the transport."""

    factory: LingeringFactory
    disconnecting: int = 0

    _policy: Policy
    _started = 0
    _drained = 0
    _half_closed = False
    _lost = False
    _timer: Any = None

    # For the protocol ------------------------------------------------------------------------------------

    def loseConnection(self) -> None:
        """Linger, once all that was written has gone out."""
        if self.disconnecting or self._lost:
            return
        self.disconnecting = 1
        self._policy = self.factory._its_policy()
        self._started = time.monotonic_ns()
        if isinstance(self._policy, Abort):
            self._give_up()
            return
        if not self._is_bare():
            self._wait()
            self.transport.loseConnection()
        elif self._half_closed:
            self._hand_over()
        else:
            self.transport.pauseProducing()  # what has come in is the closer's, mostly
            self._timer = self.factory._clock().callLater(0, self._flush)  # the transport may be busy: it has called us

    def pauseProducing(self) -> None:
        """As ever, until the connection is closing."""
        if not self.disconnecting:
            self.transport.pauseProducing()

    def stopProducing(self) -> None:
        """The same as loseConnection, as ever."""
        self.loseConnection()

    def stopConsuming(self) -> None:
        """The producer has gone, as ever: what it wrote still goes out."""
        self.unregisterProducer()
        self.loseConnection()

    def unregisterProducer(self) -> None:
        """As ever; a connection that is closing has waited for this."""
        super().unregisterProducer()
        if self.disconnecting and self._is_bare() and not (self._half_closed or self._lost):
            self.factory._clock().callLater(0, self._flush)

    # For the transport -----------------------------------------------------------------------------------

    def dataReceived(self, data: bytes) -> None:
        if not self.disconnecting:
            super().dataReceived(data)
            return
        self._drained += len(data)
        limit = self._policy._terms[3]
        if 0 <= limit < self._drained and self._timer is not None:
            self._time_is_up()

    def writeConnectionLost(self) -> None:
        """All has been written, and the write side is shut down."""
        self._half_closed = True
        if self.disconnecting:
            self._hand_over()
        elif IHalfCloseableProtocol.providedBy(self.wrappedProtocol):
            self.wrappedProtocol.writeConnectionLost()

    def readConnectionLost(self) -> None:
        """The peer has half-closed."""
        if self.disconnecting:
            return  # it may well read on
        if IHalfCloseableProtocol.providedBy(self.wrappedProtocol):
            self.wrappedProtocol.readConnectionLost()
        else:
            self.transport.connectionLost(Failure(ConnectionDone()))  # as Twisted does

    def connectionLost(self, reason: Any = None) -> None:
        self._lost = True  # a protocol that is told may well close once more
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        super().connectionLost(reason)

    # Steps -----------------------------------------------------------------------------------------------

    def _is_bare(self) -> bool:
        # A transport over a socket and nothing else, that writes when it is told to.
        transport = self.transport
        return (
            IReadWriteDescriptor.providedBy(transport)
            and not isinstance(transport, ProtocolWrapper)
            and not ISSLTransport.providedBy(transport)
        )

    def _wait(self) -> None:
        has_deadline = isinstance(self._policy, (Drain, Flush))
        timeout = self._policy._terms[1] / 1e9 if has_deadline else LONGEST_FLUSH
        self._timer = self.factory._clock().callLater(timeout, self._time_is_up)
        self.transport.resumeProducing()  # a client that writes first reads only when we have read

    def _flush(self) -> None:
        # A reactor writes when the kernel has room, which may take long when there is nothing to write at all.
        if self._lost:
            return
        if self._timer is not None and not self._timer.active():
            self._timer = None  # it was this call
        try:
            _AllWritten.ask(self.transport, self._hand_over)
        except RuntimeError:  # the protocol has a producer: Twisted knows when that counts
            self.transport.loseWriteConnection()
        trouble = None
        try:
            trouble = self.transport.doWrite()
        finally:  # a producer may raise
            if trouble:
                self.transport.connectionLost(Failure(trouble))
            elif self._timer is None and not self._lost:
                self._wait()

    def _hand_over(self) -> None:
        policy = self._policy
        if isinstance(policy, (Drain, Flush)):
            policy = left_of(policy, time.monotonic_ns() - self._started, self._drained)
        self.transport.pauseProducing()  # out of the reactor, as long as it has the fd
        self.factory._hand_over(self.transport.getHandle(), policy)
        # What loseConnection() does now that all is written, but that asks the reactor twice as often to forget a
        # transport without an fd, which it has to look for among all others.
        self.transport.connectionLost(Failure(ConnectionDone()))

    def _time_is_up(self) -> None:
        if self._timer.active():
            self._timer.cancel()
        self._timer = None
        self._give_up()

    def _give_up(self) -> None:
        # What the transport has not written is lost. What the kernel has, goes by the policy.
        policy = self._policy
        transport = self.transport
        while isinstance(transport, ProtocolWrapper):
            transport = transport.transport
        self.transport.abortConnection()  # out of the reactor; our connectionLost comes a little later
        if isinstance(policy, (Drain, Flush)):
            policy = left_of(policy, -1, self._drained)
        self.factory._hand_over(transport.socket, policy)  # getHandle() is OpenSSL's after startTLS


@implementer(IPullProducer)
class _AllWritten:
    """A producer of nothing: it is asked for more when all is written."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call

    @classmethod
    def ask(cls, transport: Any, call: Callable[[], object]) -> None:
        """Have `call` called when `transport` has written all. RuntimeError when it has another producer."""
        producer = cls(lambda: None)
        transport.registerProducer(producer, False)  # which asks at once, whatever is written
        producer._call = call

    def resumeProducing(self) -> None:
        self._call()

    def stopProducing(self) -> None:
        """The connection is lost, which our protocol is told too."""


class LingeringFactory(WrappingFactory):
    """What `lingering` returns; `protocol` makes what stands between."""

    protocol = LingeringProtocol
    noisy = False

    def __init__(
        self,
        factory: IProtocolFactory,
        policy: Policy | None = None,
        closer: Closer | None = None,
        reactor: Any = None,
    ) -> None:
        check_terms(policy, closer, wait=False)
        super().__init__(factory)
        if IProtocolNegotiationFactory.providedBy(factory):  # TLS asks the outermost one what may be spoken (ALPN)
            self.acceptableProtocols = factory.acceptableProtocols
            alsoProvides(self, IProtocolNegotiationFactory)
        self.policy, self.closer = policy, closer
        self._reactor = reactor
        self._trigger: Any = None
        self._empty: Deferred[None] | None = None

    def buildProtocol(self, addr: IAddress | None) -> LingeringProtocol | None:
        """As the wrapped factory's, None for a refusal included."""
        protocol = self.wrappedFactory.buildProtocol(addr)
        return None if protocol is None else self.protocol(self, protocol)

    def registerProtocol(self, p: LingeringProtocol) -> None:
        super().registerProtocol(p)
        # Not by the ports: connections may outlive them, and some never came by one.
        if self._trigger is None:
            self._trigger = self._clock().addSystemEventTrigger("before", "shutdown", self._before_shutdown)

    def unregisterProtocol(self, p: LingeringProtocol) -> None:
        super().unregisterProtocol(p)
        if self._trigger is not None and not self.protocols:
            self._clock().removeSystemEventTrigger(self._trigger)
            self._trigger = None
        if self._empty is not None and not self._closing():
            self._empty.callback(None)
            self._empty = None

    def _closing(self) -> bool:
        return any(each.disconnecting for each in self.protocols)

    def _before_shutdown(self) -> Deferred[None] | None:
        # The reactor would cut off what has not been written yet.
        self._trigger = None
        if not self._closing():
            return None
        self._empty = empty = Deferred()
        seconds = self._its_closer().exit_timeout
        empty.addTimeout(seconds, self._clock(), onTimeoutCancel=lambda *_: None)
        return empty

    def _clock(self) -> Any:
        if self._reactor is None:
            from twisted.internet import reactor

            self._reactor = reactor
        return self._reactor

    def _its_closer(self) -> Closer:
        return default_closer() if self.closer is None else self.closer

    def _its_policy(self) -> Policy:
        return self._its_closer().policy if self.policy is None else self.policy

    def _hand_over(self, sock: Any, policy: Policy) -> None:
        # Owns, or leaves `sock` to the transport's own close, where nobody can linger.
        with suppress(TypeError, ValueError, RuntimeError, OSError):
            self._its_closer().close(sock, policy)
