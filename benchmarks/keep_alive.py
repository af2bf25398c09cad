"""What lingerx costs a server on connections that stay open: requests per second, and CPU time per request.

    python benchmarks/keep_alive.py [--servers uvicorn-h11,asyncio] [--rounds 7] [--seconds 2] [--json]

Nothing is closed meanwhile, so it should cost nothing: what is measured is what an adapter leaves in the way of every
request. Each server of the table whose package is installed runs with lingerx and without, in turns within a round,
each time as a fresh process, pinned to one core; the client runs on another: `wrk` (apt-get install wrk) or, where
that is missing, threads of Python, which are slow and say so. Ratios are of two runs of the same round; CPU time is
that of all threads and children of the server. A ratio of 1.0 is the goal; what the machine's noise leaves of it is
seen in the spread.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from costs import Figure, child, end_after, show, this_script, wait_until

FEWEST_ROUNDS = 5
CONNECTIONS = 16
WARM_UP = 1  # seconds
PAGE = b"<html><body>Hello.</body></html>\n" * 8
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(PAGE)


# What is served ---------------------------------------------------------------------------------------------


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    fields = [(b"content-type", b"text/html"), (b"content-length", b"%d" % len(PAGE))]
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await send({"type": "http.response.body", "body": PAGE})


def wsgi(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/html"), ("Content-Length", str(len(PAGE)))])
    return [PAGE]


def serve_http_server(port: int, lingering: bool) -> None:
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    from lingerx.socketserver import LingeringMixIn

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # one write per answer

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(PAGE)))
            self.end_headers()
            self.wfile.write(PAGE)

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # wrk leaves by RST

    class Lingering(LingeringMixIn, Server):
        pass

    (Lingering if lingering else Server)(("127.0.0.1", port), Handler).serve_forever()


def serve_asyncio(port: int, lingering: bool) -> None:
    import asyncio

    class Answering(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self.transport = transport
            self.head = b""

        def data_received(self, data: bytes) -> None:
            self.head += data
            while b"\r\n\r\n" in self.head:
                self.head = self.head.partition(b"\r\n\r\n")[2]
                self.transport.write(HEAD + PAGE)

    async def main() -> None:
        factory: Callable[[], asyncio.BaseProtocol] = Answering
        if lingering:
            from lingerx.asyncio import lingering as with_lingerx

            factory = with_lingerx(Answering)
        server = await asyncio.get_running_loop().create_server(factory, "127.0.0.1", port)
        await server.serve_forever()

    asyncio.run(main())


def serve_listener(port: int, lingering: bool) -> None:
    import asyncio

    import lingerx

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(HEAD + PAGE)
        except (asyncio.IncompleteReadError, ConnectionError):  # wrk leaves by RST
            writer.close()

    async def main() -> None:
        listener = socket.create_server(("127.0.0.1", port))
        server = await asyncio.start_server(answer, sock=lingerx.wrap_listener(listener) if lingering else listener)
        await server.serve_forever()

    asyncio.run(main())


class Kind(NamedTuple):
    """A server: what it needs, and its command, by port and whether with lingerx."""

    needs: tuple[str, ...]
    command: Callable[[int, bool], list[str]]


def uvicorn(parser: str, loop: str) -> Kind:
    protocol = {"h11": "H11Protocol", "httptools": "HttpToolsProtocol"}[parser]

    def command(port: int, lingering: bool) -> list[str]:
        http = f"lingerx.uvicorn:{protocol}" if lingering else parser
        words = ["uvicorn", "--port", str(port), "--http", http, "--loop", loop, "--lifespan", "off"]
        words += ["--log-level", "warning", "--no-access-log", "--app-dir", str(Path(__file__).parent)]
        return [sys.executable, "-m", *words, "keep_alive:asgi"]

    return Kind(("uvicorn", parser) + (("uvloop",) if loop == "uvloop" else ()), command)


def gunicorn(port: int, lingering: bool) -> list[str]:
    words = ["gunicorn", "-b", f"127.0.0.1:{port}", "--threads", str(CONNECTIONS), "--log-level", "warning"]
    words += ["--keep-alive", "60", "--chdir", str(Path(__file__).parent)]
    kind = "lingerx.gunicorn.ThreadWorker" if lingering else "gthread"
    return [sys.executable, "-m", *words, "-k", kind, "keep_alive:wsgi"]


HERE = {"http.server": serve_http_server, "asyncio": serve_asyncio, "asyncio-listener": serve_listener}


def here(name: str) -> Kind:
    def command(port: int, lingering: bool) -> list[str]:
        return this_script("--serve", name, "--port", port, *["--lingering"] * lingering)

    return Kind((), command)


SERVERS = {
    "uvicorn-h11": uvicorn("h11", "asyncio"),
    "uvicorn-httptools": uvicorn("httptools", "asyncio"),
    "uvicorn-httptools-uvloop": uvicorn("httptools", "uvloop"),
    "gunicorn-gthread": Kind(("gunicorn",), gunicorn),
    **{name: here(name) for name in HERE},
}


# The client -------------------------------------------------------------------------------------------------


def drive(port: int, seconds: int, core: int) -> int:
    """How many requests were answered in that time."""
    if shutil.which("wrk") is None:
        return drive_slowly(port, seconds)
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", f"http://127.0.0.1:{port}/"]
    if core >= 0:
        command = ["taskset", "-c", str(core), *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
    count = re.search(r"(\d+) requests in", done.stdout)
    if done.returncode != 0 or count is None or re.search(r"Socket errors|Non-2xx", done.stdout):
        sys.exit(f"keep_alive: wrk says:\n{done.stdout}{done.stderr}")
    return int(count[1])


def drive_slowly(port: int, seconds: int) -> int:
    counts: list[int] = []
    end = time.monotonic() + seconds

    def ask() -> None:
        count = 0
        with socket.create_connection(("127.0.0.1", port), timeout=60.0) as sock:
            while time.monotonic() < end:
                sock.sendall(REQUEST)
                answer = b""
                while not answer.endswith(PAGE):
                    answer += sock.recv(65536)
                count += 1
        counts.append(count)

    clients = [threading.Thread(target=ask) for _ in range(CONNECTIONS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return sum(counts)


# What is measured -------------------------------------------------------------------------------------------


class Run(NamedTuple):
    rate: float  # requests per second
    cpu: float  # us of CPU per request


def family(pid: int) -> Iterator[int]:
    """A process and those that its main thread has started, and so on."""
    yield pid
    for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield from family(int(each))


def cpu_ns(pid: int) -> int:
    # The clock of another process, as clock_getcpuclockid(3) makes its number; threads that have ended count too.
    return sum(time.clock_gettime_ns(~each << 3 | 2) for each in family(pid))


@contextmanager
def started(kind: Kind, lingering: bool, core: int) -> Iterator[tuple[int, int]]:
    """Its port and its process."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    command = kind.command(port, lingering)
    with child(*(["taskset", "-c", str(core), *command] if core >= 0 else command)) as process:

        def accepts() -> bool:
            if process.poll() is not None:
                sys.exit(f"keep_alive: {' '.join(command)} ended with {process.returncode}")
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            except OSError:
                return False
            return True

        wait_until(accepts)
        try:
            yield port, process.pid
        finally:
            for pid in reversed(list(family(process.pid))):
                os.kill(pid, 9)


def run(kind: Kind, lingering: bool, seconds: int) -> Run:
    all_of_them = sorted(os.sched_getaffinity(0))
    server, client = (all_of_them[0], all_of_them[-1]) if len(all_of_them) > 1 else (-1, -1)
    with started(kind, lingering, server) as (port, pid):
        drive(port, WARM_UP, client)
        before, began = cpu_ns(pid), time.monotonic()
        count = drive(port, seconds, client)
        return Run(count / (time.monotonic() - began), (cpu_ns(pid) - before) / count / 1000)


def figures(name: str, found: dict[bool, list[Run]]) -> Iterator[Figure]:
    pairs = list(zip(found[True], found[False], strict=True))
    for what, unit, index in (("CPU time", "us per request", 1), ("rate", "requests/s", 0)):
        ratios = sorted(lingering[index] / plain[index] for lingering, plain in pairs)
        medians = [statistics.median(run[index] for run in found[lingering]) for lingering in (True, False)]
        more = f"(ratios {ratios[0]:.3f} to {ratios[-1]:.3f}; medians {medians[0]:,.1f} and {medians[1]:,.1f} {unit})"
        yield Figure(f"{name}: {what}, of plain", statistics.median(ratios), more=more)


def main() -> None:
    parser = argparse.ArgumentParser(description="What lingerx costs servers on connections that stay open.")
    parser.add_argument("--servers", default=",".join(SERVERS), help=f"of {', '.join(SERVERS)}; default: all")
    parser.add_argument("--rounds", type=int, default=7, help=f"at least {FEWEST_ROUNDS}")
    parser.add_argument("--seconds", type=int, default=2, help="of the client, per server, way and round")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--serve", choices=HERE, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--lingering", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        end_after(600)  # nobody may be left to kill it
        HERE[options.serve](options.port, options.lingering)
    names = options.servers.split(",")
    if not set(names) <= SERVERS.keys():
        parser.error(f"--servers is some of {', '.join(SERVERS)}")
    if options.rounds < FEWEST_ROUNDS or options.seconds < 1:
        parser.error(f"--rounds is {FEWEST_ROUNDS} or more, --seconds 1 or more")
    skipped = {name for name in names if not all(map(find_spec, SERVERS[name].needs))}
    end_after(60 + options.rounds * len(names) * 2 * (options.seconds + 15))
    shown: list[Figure] = []
    for name in (name for name in names if name not in skipped):
        found: dict[bool, list[Run]] = {True: [], False: []}
        for number in range(options.rounds):
            for lingering in (number % 2 == 0, number % 2 != 0):
                found[lingering].append(run(SERVERS[name], lingering, options.seconds))
        shown += figures(name, found)
    about: dict[str, object] = {"rounds": options.rounds, "connections": CONNECTIONS}
    about["client"] = "wrk" if shutil.which("wrk") else "Python, SLOW"
    about["cores"] = "server and client on a core each" if len(os.sched_getaffinity(0)) > 1 else "ONE for both"
    if skipped:
        about["not installed"] = ", ".join(sorted(skipped))
    show(about, shown, options.json)


if __name__ == "__main__":
    main()
