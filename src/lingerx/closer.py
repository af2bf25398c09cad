"""`Closer`: thousands of lingering sockets off the hot thread. For server loops, which must never wait.

Here live the thread, its start and its end (shutdown, interpreter exit, fork). Handing over, the loop and the
counters are the engine's `Loop`; no system call on a socket is made here.
"""

from __future__ import annotations

import atexit
import os
import resource
import signal
import socket
import threading
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _arguments
from ._engine import Loop
from .policy import Drain, Policy, seconds_to_ns
from .report import Outcome, Report

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Closer", "Stats", "default_closer"]

COLLECT = 0.003
"""Seconds for which a busy closer collects before it looks. Waking it for every socket costs a busy server a fifth
of its requests; a few milliseconds of collecting cost nothing (measured)."""
EXIT_TIMEOUT = 3.0
"""Seconds that the interpreter's exit waits for sockets in flight, unless the closer was made with another value."""
MAX_BUFFERED = 64 * 1024 * 1024
"""Bytes of unsent data that a closer keeps, unless it was made with another value: a guess."""

ON_FULL = ("shed_oldest", "background", "abort_oldest")
LINGER_TIMES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0)

_closers: weakref.WeakSet[Closer] = weakref.WeakSet()


class Stats(NamedTuple):
    """What a closer has done since it was made, at one moment: handed_over == pending + sum(outcomes.values())."""

    handed_over: int
    """Sockets."""
    pending: int
    """Sockets that are not closed yet."""
    buffered: int
    """Bytes of data that are kept for sending."""
    drained: int
    """Bytes of input that were discarded."""
    outcomes: dict[Outcome, int]
    """Closed sockets by outcome."""
    linger_times: dict[float, int]
    """Closed sockets by the time from hand-over to close: upper bound in seconds (the last is inf) -> sockets."""
    total_linger_time: float
    """Seconds, summed over all closed sockets."""


class Closer(Loop):
    """Closes sockets in the background, by one thread for all of them.

    policy: for sockets that are handed over without one. Background and Abort are done at once; KernelLinger would
        block and is refused. Default: Drain(timeout=30.0, idle_timeout=5.0), longer than for a blocking close, for
        nobody waits.
    max_pending: sockets in flight at most; None: half of RLIMIT_NOFILE.
    on_full: what happens beyond that: "shed_oldest" closes the oldest in the background, "abort_oldest" aborts it,
        "background" closes the new one in the background at once. Each is counted and reported as SHED.
    max_buffered: bytes of unsent data that are kept at most; what comes beyond is SHED.
    collect: seconds for which the thread, when it is busy, collects before it looks.
    exit_timeout: seconds that the interpreter's exit waits for sockets in flight.
    name: of the thread.

    The thread starts with the first socket, blocks all signals, and holds no GIL while it works. After a fork the
    child's closer is empty, and starts a thread of its own when it is used. Raises TypeError or ValueError for wrong
    arguments.
    """

    def __new__(cls, policy: Policy | None = None, **options: Any) -> Closer:
        return cls._make(policy, **options)

    @classmethod
    def _make(
        cls,
        policy: Policy | None,
        *,
        max_pending: int | None = None,
        on_full: str = "shed_oldest",
        max_buffered: int = MAX_BUFFERED,
        collect: float = COLLECT,
        exit_timeout: float = EXIT_TIMEOUT,
        name: str = "lingerx-closer",
    ) -> Closer:
        policy = Drain(timeout=30.0, idle_timeout=5.0) if policy is None else policy
        _arguments.check_policy(policy, blocking=False)
        if on_full not in ON_FULL:
            raise ValueError(f"on_full is one of {', '.join(map(repr, ON_FULL))}; got {on_full!r}")
        if max_pending is None:
            max_pending = max(1, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 2**30))
        self = super().__new__(
            cls,
            policy,
            _arguments.check_count("max_pending", max_pending),
            _arguments.check_count("max_buffered", max_buffered, least=0),
            ON_FULL.index(on_full),
            seconds_to_ns("collect", collect),
        )
        self._exit_timeout = seconds_to_ns("exit_timeout", exit_timeout)
        self._name = name
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        _closers.add(self)
        return self

    def close_all(self, socks: Iterable[socket.socket], policy: Policy | None = None) -> None:
        """Hand over many; every argument is checked before any socket is touched."""
        socks = list(dict.fromkeys(socks))
        seen: set[int] = set()
        for sock in socks:
            _arguments.check_unique(_arguments.check_socket(sock), seen)
        for sock in socks:
            self.close(sock, policy)

    def submit(
        self, sock: socket.socket, policy: Policy | None = None, *, data: Buffer | None = None
    ) -> Future[Report]:
        """As `close` (or `send_and_close`, with `data`), for those who want to know: a Future of the Report.

        It cannot be cancelled: the socket is the closer's already.
        """
        future: Future[Report] = Future()
        future.set_running_or_notify_cancel()
        report = self._submit(future, sock, data, policy)
        if report is not None:
            future.set_result(report)
        return future

    @property
    def pending(self) -> int:
        """Sockets in flight."""
        return self.stats().pending

    def stats(self) -> Stats:
        """The counters, cheap and consistent."""
        handed_over, pending, buffered, drained, outcomes, times, total = self.counters()
        return Stats(
            handed_over,
            pending,
            buffered,
            drained,
            dict(zip(Outcome, outcomes, strict=True)),
            dict(zip((*LINGER_TIMES, float("inf")), times, strict=True)),
            total / 1e9,
        )

    def join(self, timeout: float | None = None) -> bool:
        """Wait until nothing is in flight, or for `timeout` seconds. Returns whether nothing is. Takes on sockets on."""
        end = None if timeout is None else time.monotonic() + timeout
        while self.pending:
            if end is not None and time.monotonic() >= end:
                return False
            time.sleep(COLLECT)
        return True

    def shutdown(self, timeout: float = EXIT_TIMEOUT) -> Stats:
        """Take no more sockets, give those in flight up to `timeout` seconds, then end them by their on_timeout.

        Returns the final Stats. From here on `close` raises RuntimeError and leaves its socket untouched. May be
        called more than once; the first deadline stands.
        """
        self.stop(seconds_to_ns("timeout", timeout))
        with self._starting:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        return self.stats()

    def __enter__(self) -> Closer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shutdown()

    def _start(self) -> None:
        with self._starting:
            if self.started:
                return
            # A daemon: the interpreter must not wait for it before our own bounded exit has run.
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # inherited by the thread
            try:
                self._thread.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            self.started = True

    def _work(self) -> None:
        self.run()

    def _restart(self) -> None:
        self.after_fork_in_child()
        self._thread = None
        self._starting = threading.Lock()


_default: Closer | None = None
_default_lock = threading.Lock()


def default_closer() -> Closer:
    """One closer for all who ask, made when the first one does."""
    global _default
    with _default_lock:
        if _default is None:
            _default = Closer()
        return _default


def _before_fork() -> None:
    for closer in list(_closers):
        closer.before_fork()


def _after_in_parent() -> None:
    for closer in list(_closers):
        closer.after_fork_in_parent()


def _after_in_child() -> None:
    for closer in list(_closers):
        closer._restart()


@atexit.register
def _at_exit() -> None:
    # One deadline each, side by side: first all are told, then all are waited for.
    closers = list(_closers)
    for closer in closers:
        closer.stop(closer._exit_timeout)
    for closer in closers:
        closer.shutdown(0.0)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
