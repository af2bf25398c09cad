"""`aclose` of asyncio and uvloop, held to what every closer must do: for a socket and for a transport."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from closers import CloserMaker
from conformance import Closer, Graceful, Immediate
from connections import PairMaker
from event_loops import LOOPS, Begun, Opened, Runner, open_over
from lingerx import Background, Policy, Report
from lingerx.asyncio import aclose


class TestSockets(Graceful, Immediate):
    """A socket that no transport owns."""

    @pytest.fixture
    def closer(self, closers: CloserMaker) -> Closer:
        background, run = closers(), Runner("asyncio")

        async def close(sock: socket.socket, policy: Policy) -> Report:
            return await aclose(sock, policy, closer=background)

        return lambda sock, policy: run(close(sock, policy))


class TestTransports(Graceful, Immediate):
    """A transport, closed before it has read anything: uvloop's reads at once."""

    @pytest.fixture(params=LOOPS)
    def closer(self, request: pytest.FixtureRequest, closers: CloserMaker) -> Closer:
        background, run = closers(), Runner(request.param)

        async def close(sock: socket.socket, policy: Policy) -> Report:
            begun: list[Begun[Report]] = []

            def made(transport: Any) -> None:
                begun.append(Begun(aclose(transport, policy, closer=background)))

            protocol = Opened(made)
            transport = await open_over(sock, protocol)
            report = await begun[0]
            assert protocol.lost == [None]
            assert not protocol.received
            assert transport.is_closing()
            return report

        async def close_again(policy: Policy) -> Report:
            ours, theirs = socket.socketpair()
            with theirs:
                transport = await open_over(ours, Opened())
                await aclose(transport, Background(), closer=background)
                return await aclose(transport, policy, closer=background)

        def closer(sock: socket.socket, policy: Policy) -> Report:
            # There is no transport over a socket that is closed already: one that is closed itself has to do.
            return run(close_again(policy) if sock.fileno() < 0 else close(sock, policy))

        return closer

    def test_nonblocking_flag_of_a_shared_description_is_never_touched(
        self, closer: Closer, any_pair: PairMaker
    ) -> None:
        """Transports set it themselves: asyncio says that a socket must be non-blocking."""
