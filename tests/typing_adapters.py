"""A user's program that uses every public name of the adapters to other people's servers and loops.

It is not run: type checkers read it, with this project's settings, for not all of these servers have types.
(`typing_program.py` is the same for all that needs no other package.)
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable
from typing import Any

import anyio.abc
import cheroot.wsgi
import trio
import uvicorn
from twisted.internet.interfaces import IProtocolFactory

import lingerx
import lingerx.anyio
import lingerx.asyncio
import lingerx.cheroot
import lingerx.gevent
import lingerx.gunicorn
import lingerx.hypercorn
import lingerx.trio
import lingerx.twisted
import lingerx.uvicorn
import lingerx.wsgi


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(3)
    report: lingerx.Report = await lingerx.asyncio.aclose(writer)
    print(report.delivered)


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        lingerer = lingerx.asyncio.LingeringTransport(transport, lingerx.Flush())
        lingerer.write(b"hello")
        lingerer.close()


async def on_asyncio(sock: socket.socket, closer: lingerx.Closer) -> lingerx.Report:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lingerx.asyncio.lingering(Echo, lingerx.Drain(timeout=10.0)), "", 8000)
    server.close()
    await asyncio.start_server(lingerx.asyncio.lingering_client(handle, closer=closer), "", 8000)
    return await lingerx.asyncio.aclose(sock, lingerx.Flush(), closer=closer)


async def answer(stream: lingerx.trio.LingeringStream) -> None:
    await stream.send_all(b"answer")
    whole: bool = await stream.send_and_aclose(b"bye")
    print(whole)


async def on_trio(stream: trio.SocketStream) -> list[lingerx.Report]:
    listeners = [lingerx.trio.LingeringListener(listener) for listener in await trio.open_tcp_listeners(8000)]
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, answer, listeners)
        await nursery.start(trio.serve_tcp, lingerx.trio.lingering(answer), 8000)
    return [await lingerx.trio.aclose(stream), await lingerx.trio.send_and_aclose(stream, b"bye", lingerx.Drain())]


async def reply(stream: lingerx.anyio.LingeringStream) -> None:
    await stream.send(b"answer")
    await stream.aclose()


async def on_anyio(stream: anyio.abc.SocketStream, closer: lingerx.Closer) -> list[lingerx.Report]:
    listener = await anyio.create_tcp_listener(local_port=8000)
    await listener.serve(lingerx.anyio.lingering(reply, lingerx.Drain(), closer=closer))
    return [await lingerx.anyio.aclose(stream), await lingerx.anyio.send_and_aclose(stream, bytearray(b"bye"))]


class Uploads(lingerx.uvicorn.H11Protocol):
    policy = lingerx.Drain(timeout=10.0)


class FastUploads(lingerx.uvicorn.HttpToolsProtocol):
    policy = None


class Mixed(lingerx.uvicorn.LingeringMixIn):
    closer = lingerx.Closer()


def on_asgi(app: Any) -> lingerx.hypercorn.Config:
    uvicorn.run(app, http=Uploads)
    uvicorn.run(app, http=lingerx.uvicorn.AutoHTTPProtocol)
    config = lingerx.hypercorn.Config()
    config.policy = lingerx.Drain(timeout=10.0)
    config.closer = None
    return config


class Sync(lingerx.gunicorn.SyncWorker):
    policy = lingerx.Flush()


class Threads(lingerx.gunicorn.ThreadWorker):
    exit_timeout = 1.5


WORKERS: list[type[lingerx.gunicorn.LingeringMixIn]] = [Sync, Threads]
# There when they are asked for, and when what they need is installed.
print(lingerx.gunicorn.GeventWorker, lingerx.gunicorn.AsgiWorker)


class Connection(lingerx.cheroot.Connection):
    wait = True


def hello(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("200 OK", [])
    return [environ["REQUEST_METHOD"].encode()]


def on_wsgi() -> None:
    app = lingerx.wsgi.LingeringMiddleware(hello, policy=lingerx.Drain(), closer=None, wait=False)
    server = cheroot.wsgi.Server(("", 8000), app)
    server.ConnectionClass = Connection


def on_twisted(factory: IProtocolFactory) -> lingerx.twisted.LingeringFactory:
    print(lingerx.twisted.LingeringProtocol)
    return lingerx.twisted.lingering(factory, lingerx.Drain(), closer=lingerx.default_closer())


class Greeter(lingerx.gevent.StreamServer):
    policy = lingerx.Drain()


def on_gevent() -> list[lingerx.gevent.LingeringMixIn]:
    closer: lingerx.gevent.Closer = lingerx.gevent.default_closer()
    closer.shutdown(timeout=0)
    return [Greeter(("", 8000)), lingerx.gevent.WSGIServer(("", 8000), hello)]


def refused(sock: socket.socket) -> None:
    lingerx.asyncio.aclose(sock, 3.0)  # type: ignore[arg-type, unused-coroutine]
    lingerx.asyncio.lingering(Echo, policy=lingerx.Drain)  # type: ignore[arg-type]
    lingerx.trio.LingeringStream(sock)  # type: ignore[arg-type]
    lingerx.twisted.lingering(sock, closer=sock)  # type: ignore[arg-type]
