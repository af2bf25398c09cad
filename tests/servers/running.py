"""A server's process: its start, what it says, and its end.

Nothing of lingerx may live here, and nothing that only one server needs.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from connections import DEADLINE, wait_until

from .links import Link

HERE = Path(__file__).parent
COMPLAINTS = re.compile(r"Warning\b|Traceback|Exception ignored|Fatal Python error")
"""What a server must not say while it runs and ends with lingerx."""


class Running:
    """A server that accepts on `port` of 127.0.0.1, on its link."""

    def __init__(self, process: subprocess.Popen[bytes], output: IO[bytes], link: Link, port: int) -> None:
        self.process = process
        self.link = link
        self.port = port
        self._output = output

    def said(self) -> str:
        """All of its stdout and stderr up to now."""
        return os.pread(self._output.fileno(), 1 << 20, 0).decode(errors="replace")

    def terminate(self) -> None:
        """SIGTERM, to the process that we started."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, within: float = DEADLINE) -> int:
        """Its exit status; AssertionError when it is still there after so many seconds."""
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running {within} s later:\n{self.said()}") from None


@contextmanager
def running(
    command: Sequence[str | Path], link: Link, port: int, env: Mapping[str, str], folder: Path | None = None
) -> Iterator[Running]:
    """Starts a server, waits until it accepts, and leaves nothing of it behind, whatever came of the block.

    folder: where it runs. What the block does not end is killed, with its children.
    """
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "error::ResourceWarning",
        **env,
    }
    with tempfile.TemporaryFile() as output:
        process = link.call(
            lambda: subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
        server = Running(process, output, link, port)
        try:
            wait_until(lambda: _accepts(server), poll=0.01)
            yield server
        finally:
            # The whole group, which is ours: its leader may have left children behind.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(DEADLINE)


def free_port() -> int:
    """One that nobody listens on now, and that no outgoing connection will get (Linux gives those 32768 and more)."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _accepts(server: Running) -> bool:
    status = server.process.poll()
    assert status is None, f"ended with status {status} before it accepted:\n{server.said()}"
    try:
        server.link.call(lambda: socket.create_connection(("127.0.0.1", server.port), DEADLINE).close())
    except OSError:
        return False
    return True
