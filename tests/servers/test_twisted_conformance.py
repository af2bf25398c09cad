"""`lingerx.twisted`, held to what every closer must do: by loseConnection of a transport that has nothing to write."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from closers import closer_over, ended_afterwards
from conformance import Closer, Graceful, Immediate
from connections import DEADLINE, PairMaker, identity, still_open
from lingerx import Drain, Policy, Report

from .kit import needs
from .test_twisted import iterate_until

if find_spec("twisted") is not None:
    from twisted.internet import reactor as _reactor  # noqa: F401  # what it opens, it opens before the first test looks


class NobodyLingers(Exception):
    """The connection was lost before it was handed over."""


@needs("twisted")
class TestTransports(Graceful, Immediate):
    """What a reactor has adopted, closed before it has read anything."""

    @pytest.fixture
    def reporting(self, engine_name: str) -> Iterator[Any]:
        def close(self: Any, sock: socket.socket, policy: Policy | None = None) -> None:
            self.future = self.submit(sock, policy)

        with ended_afterwards(type("Reporting", (closer_over(engine_name),), {"close": close})) as make:
            yield make()

    @pytest.fixture
    def closer(self, reporting: Any) -> Closer:
        from twisted.internet import reactor
        from twisted.internet.protocol import Factory, Protocol

        from lingerx.twisted import lingering

        every: Any = reactor

        def close(sock: socket.socket, policy: Policy) -> Report:
            lost: list[Any] = []
            protocol = Protocol()
            protocol.connectionLost = lost.append
            factory = Factory()
            factory.buildProtocol = lambda _: protocol
            lingers = lingering(factory, policy, closer=reporting)
            transport = every.adoptStreamConnection(sock.fileno(), sock.family, lingers)
            sock.close()  # the reactor has made a copy
            known = identity(transport.getHandle())
            began = time.monotonic()
            protocol.transport.loseConnection()
            iterate_until(lambda: bool(lost))
            assert len(lost) == 1
            if not hasattr(reporting, "future"):
                assert not still_open(known)
                raise NobodyLingers(lost[0])
            report: Report = reporting.future.result(2 * DEADLINE)
            assert not still_open(known)
            # Its time is what the reactor's next turn has left of the policy's: here it is that of both together.
            elapsed, is_lost = time.monotonic() - began, report.delivered is False
            return Report(report.outcome, report.drained, report.unacked, elapsed, report.error, lost=is_lost)

        return close

    # There is no transport over a socket that is closed, was never connected, or is not connected any more: Twisted
    # asks for its peer's address first. A reset that it learns of later it finds itself: see test_twisted.
    test_socket_is_closed_already = None  # type: ignore[assignment]
    test_socket_was_closed_before = None  # type: ignore[assignment]
    test_socket_was_never_connected = None  # type: ignore[assignment]
    test_peer_has_reset_before_us = None  # type: ignore[assignment]

    # Transports set it themselves: every socket of Twisted's is non-blocking.
    test_nonblocking_flag_of_a_shared_description_is_never_touched = None  # type: ignore[assignment]

    # A UNIX socket whose peer has closed is found by Twisted itself, when it writes, and by nobody else.
    @pytest.mark.parametrize("any_pair", ["tcp", "tcp6"], indirect=True)
    def test_peer_has_closed_before_us(self, closer: Closer, any_pair: PairMaker) -> None:
        super().test_peer_has_closed_before_us(closer, any_pair)

    @pytest.mark.parametrize("any_pair", ["tcp", "tcp6"], indirect=True)
    def test_socket_is_closed_when_the_report_is_there(self, closer: Closer, any_pair: PairMaker) -> None:
        super().test_socket_is_closed_when_the_report_is_there(closer, any_pair)

    def test_peer_of_a_unix_socket_has_closed(self, closer: Closer, unix_stream: PairMaker) -> None:
        ours, peer = unix_stream()
        peer.close()
        with pytest.raises(NobodyLingers):
            closer(ours, Drain(timeout=DEADLINE))
