"""Servers that linger by a listener of lingerx, its mixin, or its class for TLS; each a program, with and without.

    python -m servers.programs asyncio 8413 [--lingering] [--tls CHAIN KEY]

They serve what `servers.apps` offers, and end by SIGTERM. No assertion may live here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import socket
import socketserver
import ssl
import wsgiref.simple_server
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from typing import Any, NamedTuple

import lingerx
from lingerx.socketserver import LingeringMixIn

from . import apps


class Wanted(NamedTuple):
    """What the command line asks for."""

    port: int
    lingering: bool
    tls: list[str] | None

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    def listener(self) -> socket.socket:
        """A listening socket: lingerx's, or a plain one."""
        create_server: Callable[..., socket.socket] = lingerx.create_server if self.lingering else socket.create_server
        return create_server(self.address, backlog=128)

    def context(self) -> ssl.SSLContext | None:
        """For a server with TLS."""
        if self.tls is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*self.tls)
        return context


# Event loops: the listener ----------------------------------------------------------------------------------


async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        if (await reader.readuntil(b"\r\n\r\n")).startswith(b"POST "):
            writer.write(apps.REFUSAL_HEAD + apps.PAGE)
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(apps.FRESH) + apps.FRESH)
    writer.close()


async def until_sigterm() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()


def serve_asyncio(wanted: Wanted) -> None:
    async def main() -> None:
        server = await asyncio.start_server(refuse, sock=wanted.listener(), ssl=wanted.context())
        await until_sigterm()
        server.close()

    asyncio.run(main())


def serve_uvicorn(wanted: Wanted) -> None:
    import uvicorn

    # After its shutdown uvicorn raises the signal again, for the handler that was there before: one that is Python's,
    # so that the interpreter, and with it the closer, comes to its end.
    chain, key = wanted.tls or (None, None)
    config = uvicorn.Config(apps.asgi, loop="asyncio", log_level="warning", ssl_certfile=chain, ssl_keyfile=key)
    uvicorn.Server(config).run(sockets=[wanted.listener()])


def serve_aiohttp(wanted: Wanted) -> None:
    from aiohttp import web

    async def answer(request: web.Request) -> web.Response:
        if request.method == "POST":
            return web.Response(status=413, body=apps.PAGE, headers={"Connection": "close"})
        return web.Response(body=apps.FRESH)

    async def main() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        # By itself aiohttp reads on for 10 s, up to the end of the body: with that nothing of a body gets lost.
        runner = web.AppRunner(app, access_log=None, lingering_time=0, shutdown_timeout=1)
        await runner.setup()
        await web.SockSite(runner, wanted.listener(), ssl_context=wanted.context()).start()
        await until_sigterm()
        await runner.cleanup()

    asyncio.run(main())


def serve_waitress(wanted: Wanted) -> None:
    import waitress

    # Its own refusal: an app is called only when the whole body has come.
    server = waitress.create_server(apps.wsgi, sockets=[wanted.listener()], max_request_body_size=65536)
    server.run()
    for channel in list(server.active_channels.values()):
        channel.handle_close()
    server.close()


# Threads: the mixin, the listener, and the class for TLS -----------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.wfile.write(apps.REFUSAL_HEAD + apps.PAGE)
        self.close_connection = True

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(apps.FRESH)))
        self.end_headers()
        self.wfile.write(apps.FRESH)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing: only errors are told."""


class QuietWsgiHandler(wsgiref.simple_server.WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing, as above."""


def lingering(base: Any) -> Any:
    """The same class with the mixin before it."""
    return type(f"Lingering{base.__name__}", (LingeringMixIn, base), {})


def run(server: socketserver.BaseServer) -> None:
    with server:
        server.serve_forever(poll_interval=0.1)


def serve_by_mixin(base: type[HTTPServer], wanted: Wanted) -> None:
    """With TLS too: the mixin is given what the listener accepts, an ssl.SSLSocket."""
    server = (lingering(base) if wanted.lingering else base)(wanted.address, Handler)
    if context := wanted.context():
        server.socket = context.wrap_socket(server.socket, server_side=True)
    run(server)


def serve_by_listener(wanted: Wanted) -> None:
    server = ThreadingHTTPServer(wanted.address, Handler)
    if context := wanted.context():
        if wanted.lingering:
            context.sslsocket_class = lingerx.LingerSSLSocket
        server.socket = context.wrap_socket(server.socket, server_side=True)
    elif wanted.lingering:
        server.socket = lingerx.wrap_listener(server.socket)
    run(server)


def serve_wsgiref(wanted: Wanted) -> None:
    base = wsgiref.simple_server.WSGIServer
    server_class = lingering(base) if wanted.lingering else base
    run(wsgiref.simple_server.make_server(*wanted.address, apps.wsgi, server_class, QuietWsgiHandler))


def serve_werkzeug(wanted: Wanted) -> None:
    from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

    class Quiet(WSGIRequestHandler):
        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Nothing, as above."""

    server_class = lingering(ThreadedWSGIServer) if wanted.lingering else ThreadedWSGIServer
    run(server_class(*wanted.address, apps.wsgi, Quiet))


PROGRAMS: dict[str, Callable[[Wanted], None]] = {
    "asyncio": serve_asyncio,
    "uvicorn": serve_uvicorn,
    "aiohttp": serve_aiohttp,
    "waitress": serve_waitress,
    "http.server": lambda wanted: serve_by_mixin(ThreadingHTTPServer, wanted),
    "http.server-serial": lambda wanted: serve_by_mixin(HTTPServer, wanted),
    "http.server-listener": serve_by_listener,
    "wsgiref": serve_wsgiref,
    "werkzeug": serve_werkzeug,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("server", choices=PROGRAMS)
    parser.add_argument("port", type=int)
    parser.add_argument("--lingering", action="store_true")
    parser.add_argument("--tls", nargs=2)
    words = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt, for who has no handler of their own
    with contextlib.suppress(KeyboardInterrupt):
        PROGRAMS[words.server](Wanted(words.port, words.lingering, words.tls))


if __name__ == "__main__":
    main()
