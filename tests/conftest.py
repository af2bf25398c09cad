"""The fixtures that all tests share, and what must hold after every one of them.

`engine` runs a test once with each engine. The socket fixtures make connected pairs. `nothing_left_behind` fails
any test that leaves an fd, a thread or a warning (pyproject.toml makes warnings errors) behind.
"""

from __future__ import annotations

import gc
import os
import select
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

# What a person's shell, or CI, asks of colours is not what the tests look for in the output of programs.
for _wish in ("FORCE_COLOR", "NO_COLOR", "CLICOLOR_FORCE", "PYTHON_COLORS", "TTY_COMPATIBLE", "COLUMNS"):
    os.environ.pop(_wish, None)

pytest.register_assert_rewrite("closers", "conformance", "connections", "peers", "refusals")

from closers import CloserMaker, closer_over, ended_afterwards  # noqa: E402
from connections import DEADLINE, Pair, PairMaker, connect, unix_socketpair, wait_until  # noqa: E402

if TYPE_CHECKING:
    from types import ModuleType

    from conformance import Engine

FD_TABLE = Path("/proc/self/fd" if sys.platform == "linux" else "/dev/fd")
THREAD_TABLE = Path("/proc/self/task")


def open_fds() -> dict[int, str]:
    """Every open fd of this process, and where the system can tell, which file it is."""
    found = {}
    for name in os.listdir(FD_TABLE) if FD_TABLE.is_dir() else ():
        with suppress(OSError):  # listdir's own is closed by now
            found[int(name)] = os.readlink(FD_TABLE / name) if sys.platform == "linux" else str(os.fstat(int(name)))
    return found


def running_threads() -> set[object]:
    """Every thread: Python's, and where the system can tell, those that Python does not know."""
    threads: set[object] = set(threading.enumerate())
    if THREAD_TABLE.is_dir():
        threads.update(os.listdir(THREAD_TABLE))
    return threads


@pytest.fixture(scope="session", autouse=True)
def only_what_tests_make_is_collected() -> Iterator[None]:
    """What was there before a test need not be looked at after it (see `nothing_left_behind`)."""
    gc.collect()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """After every test: the same open fds, no more threads; and no warning, also of what is collected only now."""
    gc.freeze()
    fds, threads = open_fds(), running_threads()
    yield
    gc.collect()
    assert open_fds() == fds, "fds were left open, or were closed that are not the test's"
    # A thread that was joined may still be on its way out of the kernel. (pytest-timeout's own ends at a failure.)
    wait_until(lambda: running_threads() <= threads)


@pytest.fixture(params=["native", "portable"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each engine in turn."""
    name = f"lingerx._{request.param}"
    try:
        module = import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name != name or request.param == "portable":
            raise
        pytest.skip("portable build: lingerx._native is not installed")
    return cast("Engine", module)


@pytest.fixture
def engine_name(engine: Engine) -> str:
    """The engine's word in LINGERX_ENGINE."""
    return cast("ModuleType", engine).__name__.rpartition("_")[2]


@pytest.fixture
def closers(engine_name: str) -> Iterator[CloserMaker]:
    """Makes closers over each engine in turn, and shuts them down after the test."""
    with ended_afterwards(closer_over(engine_name)) as make:
        yield make


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS for localhost: the server's and the client's."""
    trustme = pytest.importorskip("trustme", reason="trustme makes the certificates")
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(client)
    return server, client


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes whatever a test gives it, whatever came of the test."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def tcp(stack: ExitStack) -> PairMaker:
    """Makes connected (ours, peer) pairs over 127.0.0.1."""
    return partial(connect, stack, socket.AF_INET, ("127.0.0.1", 0))


@pytest.fixture
def tcp6(stack: ExitStack) -> PairMaker:
    """The same over ::1."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"no IPv6 on this machine: {error}")
    return partial(connect, stack, socket.AF_INET6, ("::1", 0))


@pytest.fixture
def unix_pair(stack: ExitStack) -> PairMaker:
    """The same by socketpair(2)."""
    return partial(unix_socketpair, stack)


@pytest.fixture
def unix_stream(stack: ExitStack, tmp_path_factory: pytest.TempPathFactory) -> PairMaker:
    """The same over a listening unix socket."""

    def make(*, send_buffer: int | None = None, receive_buffer: int | None = None) -> Pair:
        path = tmp_path_factory.mktemp("s") / "s"
        return connect(stack, socket.AF_UNIX, str(path), send_buffer, receive_buffer)

    return make


@pytest.fixture(params=["tcp", "tcp6", "unix_pair", "unix_stream"])
def any_pair(request: pytest.FixtureRequest) -> PairMaker:
    """Each kind of stream socket in turn."""
    return cast("Callable[..., Pair]", request.getfixturevalue(request.param))


@pytest.fixture
def refused(stack: ExitStack) -> socket.socket:
    """One whose attempt to connect was refused, which it has not told anybody yet."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    sock = stack.enter_context(socket.socket())
    sock.setblocking(False)
    sock.connect_ex(address)
    select.select([], [sock], [], DEADLINE)
    return sock
