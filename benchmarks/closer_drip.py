"""Does a closer keep to the limits of sockets whose peers never stop? 10 000 that drip, and one that floods.

    python benchmarks/closer_drip.py [--peers 10000] [--timeout 5] [--spread 1] [--rate 10000] [--flood 200] [--json]

The peers live in another process: each drips a byte now and then, `--rate` bytes a second all together, and one more
sends `--flood` MB a second, until they are cut off. They keep every idle_timeout (every second socket has one) from
ending; so each socket has to end by its timeout, TIMED_OUT, at the same time after its hand-over. They are handed over
within `--spread` seconds, and end within as many: a harder test with 0. How far beyond its timeout each was is told
twice: by the reports, and from outside by how many are pending when.

To reach: at most 50 ms for each, else the exit status is 1. Peers and closer together must stay below one core, or
what is measured is the machine: their shares are printed.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import time
from concurrent.futures import Future

from batches import make_room
from costs import Figure, child, end_after, show, this_script, thread_of, usage

from lingerx import Closer, Drain, Outcome, Report

TICK = 0.001  # seconds between the peers' turns
SAMPLE = 0.005  # seconds between looks from outside
PIECE = bytes(64 * 1024)  # of the flood
MOST_AT_ONCE = 200  # drips in a turn: peers that were held up do not come back as a storm
IDLE_DRIPS = 3  # an idle_timeout is as long as this many drips
OVERSTAY_MS = 50.0
NAME = "closer"


def live_as_peers(port: int, count: int, rate: int, flood: int, seconds: float) -> None:
    """The other process: connects all, waits for a line, drips and floods until its time is over or all are gone."""
    make_room(count + 1)
    socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(count + 1)]
    for sock in socks:
        sock.setblocking(False)
    flooding = socks.pop()
    live = [sock.fileno() for sock in socks]
    print("connected", flush=True)
    sys.stdin.readline()
    start = now = time.monotonic()
    dripped = flooded = place = 0
    while live and now - start < seconds:
        for _ in range(min(MOST_AT_ONCE, int((now - start) * rate) - dripped)):
            place = (place + 1) % len(live)
            try:
                os.write(live[place], b".")
            except BlockingIOError:
                pass
            except ConnectionError:  # cut off
                live[place] = live[-1]
                live.pop()
                if not live:
                    break
        dripped = int((now - start) * rate)
        try:
            while flooded < (now - start) * flood * 1e6:
                flooded += flooding.send(PIECE)
        except BlockingIOError:
            flooded = int((now - start) * flood * 1e6)  # full: it does not catch up
        except ConnectionError:
            flood = 0
        time.sleep(TICK)
        now = time.monotonic()


def cpu_shares(peers: int, until: float) -> dict[str, float]:
    """Of a core, from now on; while nothing ends yet."""

    def both() -> list[int]:
        return [usage(thread_of(NAME)).cpu_ns, usage(peers, peers).cpu_ns]

    start, before = time.monotonic(), both()
    time.sleep(max(0.0, until - start))
    took = time.monotonic() - start
    used = [(now - then) / 1e9 / took for now, then in zip(both(), before, strict=True)]
    return dict(zip(("the closer's thread", "the peers"), used, strict=True))


def watch(closer: Closer, handed: list[float], timeout: float, until: float) -> float:
    """Looks until `until`, or until nothing is pending. Returns the longest overstay seen, in seconds.

    All have the same timeout: of those that are pending the oldest is at least as old as the last `pending`th. The
    clock is read first: while this thread waits for the GIL, what is pending only becomes less.
    """
    longest = 0.0
    while (now := time.monotonic()) < until and (pending := closer.pending):
        longest = max(longest, now - handed[len(handed) - pending] - timeout)
        time.sleep(SAMPLE)
    return longest


def figures(
    reports: list[Report], handed: list[float], timeout: float, from_outside: float, shares: dict[str, float]
) -> list[Figure]:
    overstays = sorted((report.elapsed - timeout) * 1000 for report in reports)
    wrong = sum(report.outcome is not Outcome.TIMED_OUT for report in reports)
    flood = max(report.drained for report in reports)
    hundredth = statistics.quantiles(overstays, n=100)[-1]
    spread = f"(median {statistics.median(overstays):.2f}, 99 of 100 below {hundredth:.2f})"
    return [
        Figure("longest overstay, by the reports", overstays[-1], "ms", OVERSTAY_MS, spread),
        Figure("longest overstay, seen from outside", from_outside * 1000, "ms", OVERSTAY_MS),
        Figure("ended early by", max(0.0, -overstays[0]), "ms", 0.0),
        Figure("not TIMED_OUT", wrong, "sockets", 0),
        Figure("hand-over of all took", (handed[-1] - handed[0]) * 1000, "ms"),
        Figure("flood, drained", flood / 1e6 / timeout, "MB a second"),
        *(Figure(f"CPU of {who}", share * 100, "% of a core") for who, share in shares.items()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Overstays of a closer's sockets whose peers never stop sending.")
    parser.add_argument("--peers", type=int, default=10_000, help="that drip; one more floods")
    parser.add_argument("--timeout", type=float, default=5.0, help="of every socket, in seconds")
    parser.add_argument("--spread", type=float, default=1.0, help="seconds for handing over all; 0: at once")
    parser.add_argument("--rate", type=int, default=10_000, help="drips a second, of all together")
    parser.add_argument("--flood", type=int, default=200, help="MB a second")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    end_after(int(options.timeout) + 60)
    if options.port:
        live_as_peers(options.port, options.peers, options.rate, options.flood, options.timeout + 30.0)
        return
    if options.peers < 2 or options.rate < 1 or options.flood < 0:
        parser.error("--peers is 2 or more, --rate 1 or more, --flood 0 or more")
    if not 0 <= options.spread < options.timeout / 2:
        parser.error("--spread is less than half of --timeout")
    make_room(options.peers + 1)
    idle_timeout = IDLE_DRIPS * options.peers / options.rate
    policies = Drain(timeout=options.timeout), Drain(timeout=options.timeout, idle_timeout=idle_timeout)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        numbers = {"port": listener.getsockname()[1], "peers": options.peers, "rate": options.rate}
        numbers |= {"flood": options.flood, "timeout": options.timeout}
        with (
            child(*this_script(*(f"--{name}={number}" for name, number in numbers.items()))) as peers,
            Closer(max_pending=options.peers + 2, name=NAME) as closer,
        ):
            assert peers.stdin is not None
            socks = [listener.accept()[0] for _ in range(options.peers + 1)]
            peers.stdin.write("go\n")
            peers.stdin.flush()
            handed: list[float] = []
            futures: list[Future[Report]] = []
            began = time.monotonic()
            for number, sock in enumerate(socks):
                if (ahead := began + number * options.spread / len(socks) - time.monotonic()) > TICK:
                    time.sleep(ahead)
                handed.append(time.monotonic())
                futures.append(closer.submit(sock, policies[number % 2]))
            shares = cpu_shares(peers.pid, handed[-1] + options.timeout / 2)
            from_outside = watch(closer, handed, options.timeout, handed[-1] + options.timeout + 10.0)
            reports = [future.result(timeout=10.0) for future in futures]
    lines = figures(reports, handed, options.timeout, from_outside, shares)
    rates = f"{options.rate} drips and {options.flood} MB a second"
    times = f"{options.timeout} s, spread over {options.spread} s"
    about: dict[str, object] = {"peers": f"{options.peers} + 1", "rates": rates, "timeout": times}
    if not show(about, lines, options.json):
        sys.exit(1)


if __name__ == "__main__":
    main()
