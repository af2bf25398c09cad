"""What it costs a one-thread HTTP server to answer and close, and what the client gets: in turns.

    python benchmarks/http_closer.py [--rounds 7] [--seconds 2] [--counter perf|cpu|valgrind|emulated] [--json]

sendall+close (loses data), the same with inline lingering in Python, with `Closer.close`, and `Closer.send_and_close`;
beside them the same server in C, which closes plainly, and in Go, where it is installed, with a goroutine that drains.
Each way has a fresh server process, pinned to one core; `wrk` (apt-get install wrk) runs on another. Counted is what
all threads of the server use per request: instructions, user and kernel (perf stat), or CPU time where the machine
has no such counter; `--counter valgrind` counts user instructions alone, `--counter emulated` says that the machine's
clock counts instructions (see counted.py). All as ratios to sendall+close, within a round. Lost: a client of our own
uploads more than the server reads, all before it reads; it must get a whole answer.

To reach, in instructions: 0.9 for send_and_close, 1.1 for close; nothing lost.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from compiled import compile_c, compile_go
from costs import Figure, child, end_after, show, this_script
from instructions import COMMANDS, PATTERNS

from lingerx import Closer

FEWEST_ROUNDS = 5
UPLOADS = 10  # per way and round
UPLOAD = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1048576\r\n\r\n" + bytes(1 << 20)
PAGE = b"<html><body>Hello.</body></html>\n" * 8
# More than a client's first receive window, less than what a send buffer takes while nobody reads.
REFUSAL_SIZE = 256 * 1024
LINGER = 2.0  # seconds of the inline way for each recv
CONNECTIONS = 32
WARM_UP = 20 * CONNECTIONS  # requests: the closer's thread runs, Python has specialized its code
UNITS = {
    "perf": "instructions",
    "cpu": "us of CPU",
    "valgrind": "user instr.",
    "emulated": "thousand instructions",
}
# So that a turn of the closer serves about as many requests as without valgrind, which makes the server slow.
SLOW_COLLECT = 0.15

Leave = Callable[[socket.socket, bytes], object]


def sendall_close(sock: socket.socket, answer: bytes) -> None:
    sock.sendall(answer)
    sock.close()


def inline(sock: socket.socket, answer: bytes) -> None:
    sock.sendall(answer)
    try:
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(LINGER)
        while sock.recv(65536):
            pass
    except OSError:
        pass
    sock.close()


def closer_close(closer: Closer) -> Leave:
    def leave(sock: socket.socket, answer: bytes) -> None:
        sock.sendall(answer)
        close(sock)

    close = closer.close
    return leave


WAYS: dict[str, Callable[[Closer], Leave]] = {
    "sendall+close": lambda closer: sendall_close,
    "inline": lambda closer: inline,
    "close": closer_close,
    "send_and_close": lambda closer: closer.send_and_close,
}
LIMITS = {"close": 1.1, "send_and_close": 0.9}


# The server -------------------------------------------------------------------------------------------------


def respond(request: bytes) -> bytes:
    if request.startswith(b"POST"):
        status, body = b"413 Content Too Large", bytes(REFUSAL_SIZE)
    else:
        status, body = b"200 OK", PAGE
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (status, len(body), body)


def serve(way: str, requests: int, slow: bool) -> None:
    """Prints its port, and at each SIGUSR1 how many it served and its CPU time in ns; ends after `requests`."""
    served = 0

    def tell(number: int, frame: object) -> None:
        os.write(1, f"{served} {time.process_time_ns()}\n".encode())

    signal.signal(signal.SIGUSR1, tell)
    end_after(600)  # nobody may be left to kill it
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        closer = Closer(collect=SLOW_COLLECT) if slow else Closer()
        leave = WAYS[way](closer)
        print(listener.getsockname()[1], flush=True)
        while served != requests:
            sock, _ = listener.accept()
            try:
                leave(sock, respond(sock.recv(65536)))
            except OSError:  # the client has gone
                sock.close()
            served += 1
        os._exit(0)


# The clients ------------------------------------------------------------------------------------------------


def drive(port: int, seconds: float, core: int, pid: int, counter: str) -> tuple[int | None, int]:
    """Runs wrk. Returns the instructions of process `pid` meanwhile (None without perf), and wrk's socket errors."""
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds:g}s", f"http://127.0.0.1:{port}/"]
    if core >= 0:
        command = ["taskset", "-c", str(core), *command]
    if counter == "perf":
        command = ["perf", "stat", "-e", "instructions", "-x,", "-p", str(pid), "--", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
    if done.returncode != 0:
        sys.exit(f"http_closer: wrk failed:\n{done.stdout}{done.stderr}")
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", done.stdout)
    found = sum(map(int, re.findall(r"^(\d+),[^,]*,instructions(?!:u)", done.stderr, re.MULTILINE)))
    return found or None, sum(map(int, errors.groups())) if errors else 0


def upload(port: int) -> bool:
    """Whether a client that writes its whole body before it reads gets the whole answer."""
    received = 0
    with socket.create_connection(("127.0.0.1", port), timeout=10.0) as sock:
        with suppress(ConnectionError):  # what came before the reset may still be read
            sock.sendall(UPLOAD)
        with suppress(ConnectionError):
            while data := sock.recv(65536):
                received += len(data)
    return received == len(respond(b"POST"))


def fetch(port: int, requests: int) -> None:
    """Small requests, CONNECTIONS at once, until there were `requests`."""

    def some(count: int) -> None:
        for _ in range(count):
            with socket.create_connection(("127.0.0.1", port), timeout=60.0) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                while sock.recv(65536):
                    pass

    clients = [threading.Thread(target=some, args=(requests // CONNECTIONS,)) for _ in range(CONNECTIONS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()


# What is counted --------------------------------------------------------------------------------------------


class Found(dict[str, list[float]]):
    """Per request, of every round, by way; and what was lost in all rounds."""

    def __init__(self, ways: Iterable[str]) -> None:
        super().__init__({way: [] for way in ways})
        self.rates: dict[str, list[float]] = {way: [] for way in self}
        self.whole = dict.fromkeys(self, 0)
        self.errors = dict.fromkeys(self, 0)


def compiled_servers(folder: Path) -> dict[str, list[str]]:
    """The commands of those in other languages, by what they do."""
    pages = [folder / "answer", folder / "refusal"]
    for page, method in zip(pages, (b"GET", b"POST"), strict=True):
        page.write_bytes(respond(method))
    files = list(map(str, pages))
    servers = {"C: send+close": [str(compile_c("http_loop.c", folder)), *files]}
    go = compile_go(folder)
    if go is not None:
        servers["Go: goroutine drains"] = [str(go), "serve", *files]
    return servers


def one_round(way: str, command: list[str], counter: str, seconds: float, found: Found) -> None:
    server, client = cores()
    pinned = ["taskset", "-c", str(server)] if server >= 0 else []
    with child(*pinned, *command) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())

        def told() -> list[int]:
            process.send_signal(signal.SIGUSR1)
            assert process.stdout is not None
            return [int(number) for number in process.stdout.readline().split()]

        fetch(port, WARM_UP)
        before = told()
        count, errors = drive(port, seconds, client, process.pid, counter)
        served, ns = (now - then for now, then in zip(told(), before, strict=True))
        found[way].append((count or 0) / served if counter == "perf" else ns / served / 1000)
        found.rates[way].append(served / seconds)
        found.errors[way] += errors
        found.whole[way] += sum(upload(port) for _ in range(UPLOADS))


def user_instructions(way: str) -> float:
    """Per request, by valgrind: a run with many requests, less one with few."""
    totals = []
    few, many = 10 * CONNECTIONS, 60 * CONNECTIONS
    for requests in (few, many):
        command = [*COMMANDS["valgrind"], *this_script("--serve", way, "--requests", requests, "--slow")]
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            try:
                fetch(int(process.stdout.readline()), requests)
                _, errors = process.communicate(timeout=60)
            finally:
                process.kill()
        totals.append(sum(map(int, re.findall(PATTERNS["valgrind"], errors))))
    return (totals[1] - totals[0]) / (many - few)


def cores() -> tuple[int, int]:
    """For the server and for the client; -1 where there is only one."""
    all_of_them = sorted(os.sched_getaffinity(0))
    return (all_of_them[0], all_of_them[-1]) if len(all_of_them) > 1 else (-1, -1)


def perf_works() -> bool:
    """Counts it instructions, and those of the kernel too?"""
    if shutil.which("perf") is None:
        return False
    done = subprocess.run(["perf", "stat", "-e", "instructions", "-x,", "true"], capture_output=True, text=True)
    return re.search(r"^\d+,[^,]*,instructions(?!:u)", done.stderr, re.MULTILINE) is not None


def figures(found: Found, counter: str, rounds: int) -> list[Figure]:
    lines = []
    for way, values in found.items():
        ratios = sorted(value / plain for value, plain in zip(values, found["sendall+close"], strict=True))
        more = f"(ratios {ratios[0]:.3f} to {ratios[-1]:.3f}; {statistics.median(values):,.1f} {UNITS[counter]})"
        if found.rates[way]:
            more += f" {statistics.median(found.rates[way]):,.0f} requests/s"
        # The figures to reach are instructions, of user and kernel together.
        limit = LIMITS.get(way) if counter in ("perf", "emulated") else None
        lines.append(Figure(f"{way}: cost, of sendall+close", statistics.median(ratios), "", limit, more))
    if counter != "valgrind":
        for way in found:
            lost = rounds * UPLOADS - found.whole[way]
            more = f"of {rounds * UPLOADS}; {found.errors[way]} errors seen by wrk"
            lines.append(Figure(f"{way}: answers lost", lost, "", 0 if way in LIMITS else None, more))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost per request of a one-thread HTTP server, by way to close.")
    parser.add_argument("--rounds", type=int, default=7, help=f"at least {FEWEST_ROUNDS}; valgrind makes one")
    parser.add_argument("--seconds", type=int, default=2, help="of wrk, per way and round")
    parser.add_argument("--counter", choices=UNITS, help="default: perf where it counts user and kernel, else cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--requests", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--slow", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.requests, options.slow)
    if options.rounds < FEWEST_ROUNDS or options.seconds < 1:
        parser.error(f"--rounds is {FEWEST_ROUNDS} or more, --seconds 1 or more")
    counter = options.counter or ("perf" if perf_works() else "cpu")
    if counter == "perf" and not perf_works():
        sys.exit("http_closer: perf is missing, or does not count instructions of user and kernel here")
    if counter != "valgrind" and shutil.which("wrk") is None:
        sys.exit("http_closer: needs wrk (Debian: apt-get install wrk)")
    rounds = 1 if counter == "valgrind" else options.rounds
    end_after(120 + rounds * 2 * len(WAYS) * (options.seconds + 15))
    servers = {way: this_script("--serve", way) for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="lingerx-http-") as folder:
        if counter != "valgrind":
            servers |= compiled_servers(Path(folder))
        found = Found(servers)
        for _ in range(rounds):
            for way, command in servers.items():
                if counter == "valgrind":
                    found[way].append(user_instructions(way))
                else:
                    one_round(way, command, counter, options.seconds, found)
    pinned = "server and client on a core each" if cores()[0] >= 0 else "ONE CORE for server and client"
    about: dict[str, object] = {"counter": UNITS[counter], "rounds": rounds, "cores": pinned}
    show(about, figures(found, counter, rounds), options.json)


if __name__ == "__main__":
    main()
