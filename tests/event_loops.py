"""Event loops for tests: asyncio's and, where it is installed, uvloop's; and transports over sockets of the fixtures.

No assertion about lingerx may live here. What a loop's exception handler hears fails the test.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from importlib import import_module
from typing import Any, Generic, TypeVar

import pytest

from connections import DEADLINE

with suppress(ModuleNotFoundError):
    # libuv opens a pipe for signals with its first loop, starts threads for its first look-up, and keeps both.
    _first = import_module("uvloop").new_event_loop()
    _first.run_until_complete(_first.getaddrinfo("localhost", 80))
    _first.close()

T = TypeVar("T")

LOOPS = ["asyncio", "uvloop"]


def new_loop(kind: str) -> asyncio.AbstractEventLoop:
    """A loop of this kind, in debug mode; skips the test where it is not installed."""
    if kind == "asyncio":
        loop = asyncio.new_event_loop()
    else:
        try:
            loop = import_module("uvloop").new_event_loop()
        except ModuleNotFoundError:
            pytest.skip("uvloop is not installed")
    loop.set_debug(True)
    return loop


class Runner:
    """Runs a coroutine to its end in a loop of its own, as asyncio.run does."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, main: Coroutine[Any, Any, T]) -> T:
        try:
            loop = new_loop(self.kind)
        except BaseException:
            main.close()
            raise
        troubles: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: troubles.append(context))
        try:
            try:
                return loop.run_until_complete(main)
            finally:
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.run_until_complete(loop.shutdown_default_executor())
                loop.close()
        finally:
            if troubles:
                raise AssertionError(troubles)


class Begun(Generic[T]):
    """A coroutine that has gone as far as it could without waiting; await it for the rest."""

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self._coroutine = coroutine
        self._returned: list[T] = []
        self._waits_for: Any = None
        try:
            self._waits_for = coroutine.send(None)
        except StopIteration as stop:
            self._returned.append(stop.value)

    def __await__(self) -> Generator[Any, Any, T]:
        if not self._returned:
            yield self._waits_for
            return (yield from self._coroutine.__await__())
        return self._returned[0]


async def until(condition: Callable[[], bool]) -> None:
    """Return soon after `condition()` holds; AssertionError when it does not within DEADLINE."""
    give_up = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < give_up, f"not so within {DEADLINE} s"
        await asyncio.sleep(0.001)


class Opened(asyncio.Protocol):
    """Calls `made` with its transport before anything is read; keeps what it is told."""

    def __init__(self, made: Callable[[Any], None] = lambda _: None) -> None:
        self._made = made
        self.received = bytearray()
        self.lost: list[Exception | None] = []
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._made(transport)

    def data_received(self, data: bytes) -> None:
        self.received += data

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.append(error)


async def open_over(
    sock: socket.socket, protocol: asyncio.Protocol, tls: ssl.SSLContext | None = None
) -> asyncio.Transport:
    """Owns: a transport of the running loop over a connected socket, server side."""
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock, ssl=tls)
    return transport
