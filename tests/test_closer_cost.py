"""Closer: what a hand-over costs in system calls, and a pending socket in memory. (Times are in benchmarks/.)"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from closers import linux, output_of, start_program

if sys.platform != "win32":
    import resource

pytestmark = [pytest.mark.slow, linux]


# System calls ---------------------------------------------------------------------------------------------

CALLS = 100

MARKED = """
import fcntl, os, socket, sys
from lingerx import Drain
from lingerx.closer import Closer

way, calls = sys.argv[1], int(sys.argv[2])

def at(number, sock):
    with sock:
        return socket.socket(fileno=fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, number))

def marked(word):
    # Busy for as long as all of this takes: it is not woken for every socket.
    closer = Closer(Drain(timeout=60.0), collect=5.0)
    hand_over = {
        "close": closer.close,
        "send_and_close": lambda sock: closer.send_and_close(sock, b"answer"),
    }[way]
    pairs = [socket.socketpair() for _ in range(calls)]
    pairs = [(at(500 + place, ours), peer) for place, (ours, peer) in enumerate(pairs)]
    first, first_peer = socket.socketpair()
    closer.close(first)  # which starts the thread
    os.access("/begin/" + word, 0)
    for ours, peer in pairs:
        hand_over(ours)
    os.access("/end/" + word, 0)
    closer.shutdown(0.0)

marked("new_numbers")
marked("used_numbers")
os._exit(0)
"""

MEMORY = {"brk", "mmap", "munmap", "mremap", "madvise"}
"""What malloc may do at any time."""


def strace() -> str:
    """Its path; skips where it is missing or may not trace."""
    path = shutil.which("strace")
    if path is None:
        pytest.skip("strace is not installed")
    tried = subprocess.run([path, "-o", "/dev/null", "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"strace may not trace here: {tried.stderr.strip()}")
    return path


def calls_between(log: str, word: str) -> Counter[str]:
    """Which system calls the thread that made the marks made between them."""
    lines = [line.split(maxsplit=1) for line in log.splitlines()]
    [begin] = [place for place, (_, call) in enumerate(lines) if f'"/begin/{word}"' in call]
    [end] = [place for place, (_, call) in enumerate(lines) if f'"/end/{word}"' in call]
    thread = lines[begin][0]
    names = (call.partition("(")[0] for who, call in lines[begin + 1 : end] if who == thread)
    return Counter(name for name in names if name.isidentifier() and name not in MEMORY)


@pytest.mark.parametrize("way", ["close", "send_and_close"])
def test_hand_over_is_one_system_call(engine_name: str, tmp_path: Path, way: str) -> None:
    """On the common path, which is that of a number that was seen before; a new one costs one question more."""
    log = tmp_path / "log"
    wrapper = [strace(), "-f", "-qq", "-o", str(log)]
    with start_program(engine_name, MARKED, way, CALLS, wrapper=wrapper) as process:
        output_of(process)
    new, used = (calls_between(log.read_text("utf-8"), word) for word in ("new_numbers", "used_numbers"))
    wanted = {"shutdown": CALLS} if way == "close" else {"shutdown": CALLS, "sendto": CALLS}
    if engine_name == "native":
        for counted in (new, used):
            # Its lock, in the rare moment in which the thread takes in what was handed over.
            assert counted.pop("futex", 0) <= 2
        assert used == wanted
        assert new == {**wanted, "getsockopt": CALLS}
    else:
        # Python's socket objects ask for family and type, and the interpreter is handed over now and then.
        assert {name: used[name] for name in wanted} == wanted
        assert used.keys() <= {*wanted, "getsockopt", "getsockname", "getpeername", "fcntl", "ioctl", "futex"}


def test_listening_is_asked_about_once_for_each_number(engine_name: str, tmp_path: Path) -> None:
    if engine_name == "portable":
        pytest.skip("the portable engine always asks")
    program = """
import os, socket
from lingerx.closer import Closer
for word in ("first", "second", "third"):
    closer = Closer()
    ours, peer = socket.socketpair()
    peer.close()
    os.access("/begin/" + word, 0)
    closer.close(ours)
    os.access("/end/" + word, 0)
    closer.join(5.0)
    closer.shutdown()
os._exit(0)
"""
    log = tmp_path / "log"
    with start_program(engine_name, program, wrapper=[strace(), "-f", "-qq", "-o", str(log)]) as process:
        output_of(process)
    counts = [calls_between(log.read_text("utf-8"), word)["getsockopt"] for word in ("first", "second", "third")]
    assert counts == [1, 0, 0]


# Memory ---------------------------------------------------------------------------------------------------

PENDING = """
import gc, socket, statistics, sys
from lingerx import Drain
from lingerx.closer import Closer

count = int(sys.argv[1])
# Their peers are in the queues of listeners that accept nobody: they need no fds.
BACKLOG = 2000
listeners = [socket.create_server(("127.0.0.1", 0), backlog=BACKLOG + 1) for _ in range(-(-2 * count // BACKLOG))]
addresses = [listener.getsockname() for listener in listeners for _ in range(BACKLOG)]

def resident():
    # Not from statm, which is off by up to some hundred KiB since Linux 6.2 (proc(5)).
    gc.collect()
    with open("/proc/self/smaps_rollup") as file:
        return 1024 * int(next(line for line in file if line.startswith("Rss:")).split()[1])

closer = Closer(Drain(timeout=60.0), max_pending=2 * count)

def fill(places):
    for place in places:
        sock = socket.socket()
        sock.connect(addresses[place])
        closer.close(sock)

STEPS = 5
marks = [round(count + step * count / STEPS) for step in range(STEPS + 1)]
fill(range(count))
before = resident()
costs = []
for begin, end in zip(marks, marks[1:]):
    fill(range(begin, end))
    after = resident()
    costs.append((after - before) / (end - begin))
    before = after
assert closer.pending == 2 * count, closer.stats()
closer.shutdown(0.0)
# Each step pays for its sockets; now and then one pays also for an inbox that was never as full before.
print(statistics.median(costs))
"""

OURS = 400
"""Fds that a Python program needs beside its sockets: far more than it does."""


def test_memory_of_a_pending_socket(engine_name: str) -> None:
    """RSS on the way from 10 000 to 20 000 pending, or as many as the limit allows; the peers' ends are no fds."""
    if engine_name == "portable":
        pytest.skip("a socket is several Python objects there, about 1.5 KB")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 20_000 + OURS if hard == resource.RLIM_INFINITY else min(20_000 + OURS, hard)
    count = (most - OURS) // 2
    if count < 4000:
        pytest.skip(f"RLIMIT_NOFILE is {hard}: too few sockets to tell their memory from a page or two")
    if int(Path("/proc/sys/net/core/somaxconn").read_text("ascii")) < 2001:
        pytest.skip("net.core.somaxconn is below 2001")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    try:
        process = start_program(engine_name, PENDING, count)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with process:
        assert float(output_of(process)) <= 128
