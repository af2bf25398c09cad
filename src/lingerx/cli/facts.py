"""What `lingerx doctor` finds out, as values, and how a probe is run so that it ends whatever the kernel does.

Here live the words for a finding, the laboratory that a probe works in, and the runner. What is probed stands in
`probes`, which limits are read in `limits`, and nothing here is printed.
"""

from __future__ import annotations

import errno
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

__all__ = ["Finding", "Lab", "Line", "Probe", "as_json", "broken", "note", "ok", "run"]

Word = Literal["ok", "note", "broken"]

HOST = "127.0.0.1"
DEADLINE = 3.0
"""Seconds that a probe may take; the slowest needs half a second, the others a few milliseconds."""

GRACE = 0.5
"""Seconds in which a probe that is late must end by itself, and then once its connections were broken off."""

# Small enough to be filled in a millisecond, and together much less than the answers that `Lab.fill` queues.
OUR_SEND_BUFFER = 256 * 1024
PEER_RECEIVE_BUFFER = 64 * 1024
MOST_TO_FILL = 32 * 1024 * 1024  # a kernel that takes more than this into such buffers has no limit

AGAIN = "Run it again; if it stays so, report it with what `lingerx doctor --json` prints."
NOTHING_TO_DO = "Nothing: lingerx does not depend on it here."


@dataclass(frozen=True)
class Finding:
    """What a probe saw.

    word: "ok"; "note", when something costs time, or can't be known, or is merely good to know; "broken", when
    something that lingerx relies on does not hold. found: one sentence. to_do: what to do about it, "" for ok.
    numbers: the same for machines; None where there is no limit.
    """

    word: Word
    found: str
    to_do: str = ""
    numbers: Mapping[str, int | None] = field(default_factory=dict)


def ok(found: str, **numbers: int | None) -> Finding:
    return Finding("ok", found, "", numbers)


def note(found: str, to_do: str = NOTHING_TO_DO, **numbers: int | None) -> Finding:
    return Finding("note", found, to_do, numbers)


def broken(found: str, to_do: str = AGAIN, **numbers: int | None) -> Finding:
    return Finding("broken", found, to_do, numbers)


@dataclass(frozen=True)
class Line:
    """A finding and what it is about. seconds: how long it took."""

    name: str
    title: str
    finding: Finding
    relied_on: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Probe:
    """Something to try. name: for machines. title: for people, 28 characters at most.

    look: does it, on sockets of the Lab only. relied_on: when it can't be tried, that is broken, not a note.
    linux_only: it asks what other systems answer differently, or not at all.
    """

    name: str
    title: str
    look: Callable[[Lab], Finding]
    relied_on: bool = False
    linux_only: bool = True


class Lab:
    """The sockets of one probe, and its deadline, after which every wait in it ends by TimeoutError.

    A context manager: closes whatever the probe has not closed.
    """

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        self._socks: list[socket.socket] = []

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sock in self._socks:
            sock.close()

    def left(self) -> float:
        """Seconds until the deadline; TimeoutError after it."""
        seconds = self._until - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("the time is up")
        return seconds

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """Two connected TCP sockets with small buffers, ours (accepted) and the peer's; both closed by the Lab."""
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, OUR_SEND_BUFFER)
            listener.bind((HOST, 0))
            listener.listen(1)
            listener.settimeout(self.left())
            peer = socket.socket()
            self._socks.append(peer)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PEER_RECEIVE_BUFFER)
            peer.settimeout(self.left())
            peer.connect(listener.getsockname())
            ours, _ = listener.accept()
            self._socks.append(ours)
            ours.settimeout(self.left())
        return ours, peer

    def fill(self, sock: socket.socket) -> int:
        """Borrows: send until the kernel takes no more; the bytes taken."""
        sent = 0
        sock.settimeout(0.0)
        with suppress(BlockingIOError):
            while sent < MOST_TO_FILL:
                sent += sock.send(bytes(65536))
        sock.settimeout(self.left())
        return sent

    def read_to_end(self, sock: socket.socket) -> tuple[int, str]:
        """Borrows: the bytes read until EOF, and "", or the name of the errno that came instead."""
        received = 0
        while True:
            sock.settimeout(self.left())
            try:
                data = sock.recv(65536)
            except ConnectionError as error:
                return received, errno.errorcode.get(error.errno or 0, str(error))
            if not data:
                return received, ""
            received += len(data)

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Whether it holds within so many seconds, and within the deadline."""
        until = time.monotonic() + min(seconds, self.left())
        while not condition():
            if time.monotonic() >= until:
                return False
            time.sleep(0.001)
        return True

    def break_off(self) -> None:
        """From another thread: whoever waits for one of the sockets waits no longer."""
        for sock in list(self._socks):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def run(probe: Probe, seconds: float = DEADLINE) -> Line:
    """Run one probe in a thread of its own, within so many seconds and a second of grace. Raises nothing.

    What goes wrong is told by the line. A probe that hangs nevertheless is left to its daemon thread.
    """
    started = time.monotonic()
    if probe.linux_only and sys.platform != "linux":
        return Line(probe.name, probe.title, note("not tried here: it asks Linux alone."), probe.relied_on)
    came: list[Finding | Exception] = []
    lab = Lab(seconds)

    def work() -> None:
        try:
            with lab:
                finding = probe.look(lab)
            came.append(finding)
        except Exception as error:
            came.append(error)

    thread = threading.Thread(target=work, name=f"doctor-{probe.name}", daemon=True)
    try:
        thread.start()
        thread.join(seconds + GRACE)
        late = thread.is_alive()
    except RuntimeError as error:  # no thread to be had
        came.append(error)
        late = False
    finally:
        if thread.is_alive():
            lab.break_off()
            thread.join(GRACE)
    finding = _trouble(probe, None if late or not came else came[0], seconds)
    return Line(probe.name, probe.title, finding, probe.relied_on, time.monotonic() - started)


def _trouble(probe: Probe, came: Finding | Exception | None, seconds: float) -> Finding:
    if isinstance(came, Finding):
        return came
    tell = broken if probe.relied_on else note
    if came is None or isinstance(came, TimeoutError):
        return tell(f"could not be tried: it was not over after {seconds:g} s.", AGAIN)
    to_do = AGAIN
    if isinstance(came, OSError) and came.errno in (errno.EMFILE, errno.ENFILE):
        to_do = "Raise the limit of open files (`ulimit -n`), then run it again."
    return tell(f"could not be tried: {type(came).__name__}: {came}", to_do)


def as_json(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """Plain values; seconds as float."""
    return [
        {
            "name": line.name,
            "title": line.title,
            "word": line.finding.word,
            "found": line.finding.found,
            "to_do": line.finding.to_do,
            "numbers": dict(line.finding.numbers),
            "relied_on": line.relied_on,
            "seconds": line.seconds,
        }
        for line in lines
    ]
