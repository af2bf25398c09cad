"""Real peers: what stands at the other end of a connection that is being closed.

Only peers may live here; no assertion about lingerx, and no import of it. A peer that acts while we close runs on a
thread (`Peer`) that always ends: leaving its with-block stops it, waits for it and raises what it raised. A peer that
acts once is a function. A silent peer, and one that never reads, is the peer's socket left alone.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Generic, TypeVar

from connections import DEADLINE, Ending, Pair, queued_input, wait_until

T = TypeVar("T")


# At once -------------------------------------------------------------------------------------------------


def send_unread(peer: socket.socket, ours: socket.socket, data: bytes) -> None:
    """Borrows: leave `data` from `peer` in the receive queue of `ours`."""
    expected = queued_input(ours) + len(data)
    peer.sendall(data)
    wait_until(lambda: queued_input(ours) == expected)


def read_to_end(sock: socket.socket) -> Ending:
    """Borrows: read until EOF or until the connection is lost."""
    received = 0
    while True:
        try:
            data = sock.recv(65536)
        except ConnectionError as error:
            return Ending(received, error.errno)
        if not data:
            return Ending(received, None)
        received += len(data)


def reset(sock: socket.socket) -> None:
    """Owns: close with SO_LINGER {1, 0}, which sends RST (RFC 9293 3.10.5, ABORT)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


# On a thread ----------------------------------------------------------------------------------------------


class Call(threading.Thread, Generic[T]):
    """A function on a thread of its own, for the length of a with-block; `result()` waits for what it returns."""

    def __init__(self, function: Callable[[], T]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._returned: list[T] = []
        self._raised: BaseException | None = None

    def run(self) -> None:
        try:
            self._returned.append(self._function())
        except BaseException as error:
            self._raised = error

    def result(self) -> T:
        """What the function returned; raises what it raised."""
        self.join(DEADLINE)
        assert not self.is_alive(), f"{self._function} has not ended"
        if self._raised is not None:
            raise self._raised
        return self._returned[0]

    def __enter__(self) -> Call[T]:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.join(DEADLINE)
        if kind is None:
            self.result()


class Peer(threading.Thread):
    """A peer that acts on its own, for the length of a with-block. Owns its socket; `stop` tells it to end.

    `ending` tells how our stream ended for it, once it has read it to the end or was reset.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(daemon=True)
        self.sock = sock
        self.stop = threading.Event()
        self.received = 0
        self.sent = 0
        self.ending: Ending | None = None
        self._raised: BaseException | None = None

    def live(self) -> None:
        """What the peer does; the socket is closed afterwards."""
        raise NotImplementedError

    def run(self) -> None:
        try:
            with self.sock:
                self.live()
        except ConnectionError as error:
            self.ending = Ending(self.received, error.errno)
        except BaseException as error:
            self._raised = error

    def read_to_end(self, piece: int = 65536, pause: float = 0.0) -> None:
        """Read `piece` bytes at a time, `pause` seconds apart, until our stream ends."""
        while data := self.sock.recv(piece):
            self.received += len(data)
            if pause:
                self.stop.wait(pause)
        self.ending = Ending(self.received, None)

    def __enter__(self: P) -> P:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop.set()
        self.join(DEADLINE)
        if kind is None:
            assert not self.is_alive(), f"{self} has not ended"
            if self._raised is not None:
                raise self._raised


P = TypeVar("P", bound=Peer)


class Polite(Peer):
    """Reads all, then closes."""

    def live(self) -> None:
        self.read_to_end()


class SlowReader(Peer):
    """Waits until `when()` holds, reads `piece` bytes at a time, `pause` seconds apart, to the end, then closes.

    `ended_at` is the time (perf_counter) at which it saw EOF.
    """

    def __init__(
        self, sock: socket.socket, piece: int = 65536, pause: float = 0.0, when: Callable[[], bool] | None = None
    ) -> None:
        super().__init__(sock)
        self._piece, self._pause, self._when = piece, pause, when
        self.ended_at = 0.0

    def live(self) -> None:
        if self._when is not None:
            wait_until(self._when)
        self.read_to_end(self._piece, self._pause)
        self.ended_at = time.perf_counter()


class WritesFirst(Peer):
    """The upload client: sends its whole body before it reads a byte, reads all, then closes."""

    def __init__(self, sock: socket.socket, body: bytes) -> None:
        super().__init__(sock)
        self._body = body

    def live(self) -> None:
        self.sock.sendall(self._body)
        self.sent = len(self._body)
        self.read_to_end()


class Dripping(Peer):
    """Sends a byte every so many seconds, until it is told to stop or is reset."""

    def __init__(self, sock: socket.socket, every: float) -> None:
        super().__init__(sock)
        self._every = every

    def live(self) -> None:
        while not self.stop.wait(self._every):
            self.sent += self.sock.send(b"x")


class Flooding(Peer):
    """Sends as fast as it can, until it is told to stop or is reset."""

    def live(self) -> None:
        self.sock.settimeout(0.01)  # to look for `stop` although nobody reads
        chunk = bytes(1 << 20)
        while not self.stop.is_set():
            with suppress(TimeoutError):
                self.sent += self.sock.send(chunk)


# In a process of its own ----------------------------------------------------------------------------------


class FloodingProcess:
    """Floods as `Flooding` does, one connection after the other, but holds neither our interpreter nor our fds.

    For tests about time: a busy thread of ours may hold the interpreter for 5 ms at a time. A context manager.
    """

    _PROGRAM = """if True:
        import socket, sys
        control = socket.socket(fileno=int(sys.argv[1]))
        chunk = bytes(1 << 20)
        while True:
            _, fds, _, _ = socket.recv_fds(control, 1, 1)
            if not fds:
                break
            with socket.socket(fileno=fds[0]) as peer:
                peer.setblocking(True)
                try:
                    while True:
                        peer.send(chunk)
                except ConnectionError:
                    pass
            control.send(b"x")
        """

    def __enter__(self) -> FloodingProcess:
        self._control, theirs = socket.socketpair()
        self._control.settimeout(DEADLINE)
        with theirs:
            program = [sys.executable, "-I", "-S", "-c", self._PROGRAM, str(theirs.fileno())]
            self._process = subprocess.Popen(program, pass_fds=[theirs.fileno()])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait(DEADLINE)

    @contextmanager
    def flood(self, peer: socket.socket, ours: socket.socket) -> Iterator[None]:
        """Owns `peer`, borrows `ours`: from the flood's first bytes on, until it is reset within the block."""
        with peer:
            socket.send_fds(self._control, [b"x"], [peer.fileno()])
        wait_until(lambda: queued_input(ours) > 0)
        yield
        assert self._control.recv(1) == b"x", "the flood has not been stopped"


# Gone -----------------------------------------------------------------------------------------------------


class GoneNetwork:
    """A second network, behind a link that can be taken down: a network namespace and a veth(4) pair.

    Needs root and ip(8). 198.18.0.0/15 is for tests (RFC 2544 C.2.2). A context manager, which cleans up.
    """

    OURS, THEIRS, THEIR_MAC = "198.18.77.1", "198.18.77.2", "02:00:5e:00:53:01"

    def __init__(self) -> None:
        self._namespace = f"lingerx-{os.getpid()}"
        self._near, self._far = f"lx{os.getpid()}n", f"lx{os.getpid()}f"

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    def __enter__(self) -> GoneNetwork:
        self._ip("netns", "add", self._namespace)
        try:
            self._ip("link", "add", self._near, "type", "veth", "peer", self._far, "netns", self._namespace)
            self._ip("addr", "add", f"{self.OURS}/30", "dev", self._near)
            self._ip("link", "set", self._near, "up")
            self._ip("-n", self._namespace, "addr", "add", f"{self.THEIRS}/30", "dev", self._far)
            self._ip("-n", self._namespace, "link", "set", self._far, "address", self.THEIR_MAC, "up")
            # Never asked for again, so that a vanished peer is a time-out, not "no route to host".
            self._ip("neigh", "add", self.THEIRS, "lladdr", self.THEIR_MAC, "nud", "permanent", "dev", self._near)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for arguments in (("link", "del", self._near), ("netns", "del", self._namespace)):
            subprocess.run(["ip", *arguments], check=False, capture_output=True)

    def listener(self) -> socket.socket:
        """A socket that was made over there: only the thread that makes it has to go there (setns(2))."""
        clone_newnet = 0x40000000

        def make() -> socket.socket:
            libc = ctypes.CDLL(None, use_errno=True)
            with open(f"/run/netns/{self._namespace}", encoding="ascii") as namespace:
                if libc.setns(namespace.fileno(), clone_newnet) != 0:
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number))
            return socket.create_server((self.THEIRS, 0))

        with Call(make) as call:
            return call.result()

    def connect(self, stack: ExitStack) -> Pair:
        """Ours here, the peer's over there; `stack` owns both."""
        with self.listener() as listener:
            listener.settimeout(DEADLINE)
            ours = stack.enter_context(socket.create_connection(listener.getsockname(), DEADLINE))
            return ours, stack.enter_context(listener.accept()[0])

    def vanish(self) -> None:
        """From now on nothing comes from over there, and nothing arrives."""
        self._ip("-n", self._namespace, "link", "set", self._far, "down")
