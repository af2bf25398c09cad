"""What lingering peers cost an event loop: as good as nothing, compared with the same server without lingerx."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from closers import CloserMaker
from connections import DEADLINE
from event_loops import LOOPS, Opened, Runner, until
from lingerx import Drain
from lingerx.asyncio import lingering

PEERS = 50
HEARTBEAT = 0.005
REQUESTS = 30
SLACK = 0.05
"""Seconds that a busy machine may add to anything: a guess."""


class Answering(Opened):
    def data_received(self, data: bytes) -> None:
        self.transport.write(b"answer")
        self.transport.close()


async def measure(factory: Callable[[], asyncio.BaseProtocol], stack: ExitStack) -> tuple[float, float]:
    """Seconds: the largest gap of a heartbeat, and the median of fresh requests, while answered peers stay silent."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(factory, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    gaps: list[float] = []

    async def beat() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(HEARTBEAT)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    heart = asyncio.ensure_future(beat())
    for _ in range(PEERS):
        stack.enter_context(socket.create_connection(address, DEADLINE)).sendall(b"x")
    await until(lambda: len(gaps) > 10)
    latencies = []
    for _ in range(REQUESTS):
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"x")
        assert await reader.read() == b"answer"
        latencies.append(time.perf_counter() - began)
        writer.close()
    heart.cancel()
    server.close()
    return max(gaps), sorted(latencies)[REQUESTS // 2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOOPS)
def test_silent_peers(kind: str, closers: CloserMaker, stack: ExitStack) -> None:
    run, closer = Runner(kind), closers(Drain(timeout=60.0))
    plain_gap, plain_latency = run(measure(Answering, stack))
    gap, latency = run(measure(lingering(Answering, closer=closer), stack))
    assert closer.pending >= PEERS
    assert gap < 5 * plain_gap + SLACK, (gap, plain_gap)
    assert latency < 5 * plain_latency + SLACK, (latency, plain_latency)
