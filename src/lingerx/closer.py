"""`Closer`: thousands of lingering sockets off the hot thread. For server loops, which must never wait.

Here live the thread, its start and its end (shutdown, interpreter exit, fork). Handing over, the loop and the
counters are the engine's `Loop`; no system call on a socket is made here.

The thread knows the `Loop` and not the `Closer`: one that nobody holds any more takes no more sockets (its `Intake`
sees to that), finishes what it was given, and then its thread ends.
"""

from __future__ import annotations

import _thread
import atexit
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterable
from types import TracebackType

from . import _arguments
from ._engine import Loop
from ._ledger import LINGER_TIMES, ON_FULL, Stats
from .policy import Drain, Policy, seconds_to_ns
from .report import Outcome, Report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from concurrent.futures import Future
    from typing import Any

    from typing_extensions import Buffer

    from ._ledger import OnFull

__all__ = ["COLLECT", "EXIT_TIMEOUT", "MAX_BUFFERED", "Closer", "Stats", "default_closer"]

COLLECT = 0.003
"""Seconds for which a busy closer collects before it looks. Waking it for every socket would cost a busy server a
fifth of its requests; a few milliseconds of collecting cost nothing (measured)."""
EXIT_TIMEOUT = 3.0
"""Seconds that `shutdown`, a with-block's end and the interpreter's exit give to sockets in flight, unless the closer
was made with another value."""
MAX_BUFFERED = 64 * 1024 * 1024
"""Bytes that a closer keeps for data which the kernel has not taken yet, unless it was made with another value: a
guess."""
MAX_PENDING = 8192
"""Sockets in flight at most where there is no limit on open files (RLIMIT_NOFILE) to take half of: a guess."""

_CALLBACKS = 1.0  # seconds beyond its deadline for which the callbacks of futures may keep a shutdown: a guess


class Closer:
    """Closes sockets in the background, by one thread for all of them.

    policy: for sockets that are handed over without one. Background and Abort are done at once; KernelLinger would
        block and is refused. Default: Drain(timeout=30.0, idle_timeout=5.0), longer than for a blocking close, for
        nobody waits.
    max_pending: sockets in flight at most; None: half of RLIMIT_NOFILE. A burst may exceed it until the thread has
        its next turn (a few milliseconds), but never by more than as much again.
    on_full: what happens beyond that. "shed_oldest": the oldest are closed in the background, as a plain close does.
        "abort_oldest": the oldest are closed with RST. "background": the new one is closed in the background at once.
        Each is counted and reported as SHED.
    max_buffered: bytes that are kept at most for data which the kernel has not taken yet (`send_and_close`). A
        socket whose data does not fit any more is itself SHED, by a plain close or, with "abort_oldest", by RST.
    collect: seconds for which the thread, when it is busy, collects before it looks. A socket that has just come is
        looked at after two of them at most, for by then most peers are done: so late it may be noticed that one is
        done, or at its limits. When nothing happens the thread sleeps.
    exit_timeout: seconds that sockets in flight get when the interpreter exits, and from `shutdown` by default.
    name: of the thread.

    The thread starts with the first socket, blocks all signals, and holds no GIL while it works. After a fork the
    child's closer is empty, and starts a thread of its own when it is used; the parent's sockets stay the parent's.
    When the interpreter exits, all closers together get their `exit_timeout`, then what is still in flight ends by
    its policy's `on_timeout`; os._exit gives them nothing. A closer that nobody holds any more takes no more sockets,
    and finishes those that it has.

    Raises TypeError or ValueError for wrong arguments, OSError where the process has no fd left for it (it needs two).

    Sources: RFC 9293 3.6, epoll(7), fork(2).
    """

    _engine_loop = Loop

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        max_pending: int | None = None,
        on_full: OnFull = "shed_oldest",
        max_buffered: int = MAX_BUFFERED,
        collect: float = COLLECT,
        exit_timeout: float = EXIT_TIMEOUT,
        name: str = "lingerx-closer",
    ) -> None:
        policy = Drain(timeout=30.0, idle_timeout=5.0) if policy is None else policy
        _arguments.check_policy(policy, blocking=False)
        if on_full not in ON_FULL:
            raise ValueError(f"on_full is one of {', '.join(map(repr, ON_FULL))}; got {on_full!r}")
        if not isinstance(name, str):
            raise TypeError(f"name is a string; got {name!r}")
        loop = self._engine_loop(
            policy,
            _half_of_all_fds() if max_pending is None else _arguments.check_count("max_pending", max_pending),
            _arguments.check_count("max_buffered", max_buffered, least=0),
            ON_FULL.index(on_full),
            seconds_to_ns("collect", collect),
            _start,
        )
        loop.exit_timeout = seconds_to_ns("exit_timeout", exit_timeout)
        loop.name = name
        with _listing:
            _loops.add(loop)
        self._loop = loop
        self._intake = intake = loop.intake()
        # The engine's own, without a Python call in between; unless a subclass has something to say.
        if type(self).close is Closer.close:
            vars(self)["close"] = intake.close
        if type(self).send_and_close is Closer.send_and_close:
            vars(self)["send_and_close"] = intake.send_and_close

    def close(self, sock: socket.socket, policy: Policy | None = None) -> None:
        """Half-close now and linger in the background; returns at once.

        sock: as for `lingerx.close`. Taken over: `sock` is as after `sock.detach()`. policy: None for the closer's.

        Costs one system call, shutdown(2); the first close of an fd number costs one more, which tells whether it is
        a listening socket. Of an ssl.SSLSocket close_notify is sent first, as `lingerx.close` does.

        Raises, with the socket untouched, TypeError or ValueError as `lingerx.close` does, also for KernelLinger;
        RuntimeError after `shutdown`, and where no thread can be started. One mistake may come to light too late for
        that: a listening socket under a number that was a connection's is closed, as FAILED.
        """
        self._intake.close(sock, policy)

    def send_and_close(self, sock: socket.socket, data: Buffer, policy: Policy | None = None) -> bool:
        """Send the last bytes and close, in the background: what the kernel does not take now goes out later.

        sock: as for `lingerx.close`, but without TLS. data: any C-contiguous bytes-like object; bytes are kept by
            reference while they are being sent, anything else is copied. policy: Drain or Flush; None for the closer's.

        Returns True when all of `data` was taken, by the kernel or by the closer; False when some of it was dropped:
        there was no room (`max_pending` with on_full="background", `max_buffered`), or nothing could be sent: the
        socket was closed already, not connected, or half-closed, or the peer has reset it.

        Raises as `close` does, and ValueError for an ssl.SSLSocket (call its sendall, then `close`) and for a
        policy without a deadline; TypeError for data that is not bytes-like. The socket is then untouched.
        """
        return self._intake.send_and_close(sock, data, policy)

    def close_all(self, socks: Iterable[socket.socket], policy: Policy | None = None) -> None:
        """As `close`, for each; every argument is checked before any socket is touched."""
        unique = list({id(sock): sock for sock in _arguments.check_many(socks)}.values())
        fds: set[int] = set()
        for sock in unique:
            _arguments.check_unique(_arguments.check_socket(sock), fds)
        if policy is not None:
            _arguments.check_policy(policy, blocking=False)
        for sock in unique:
            self.close(sock, policy)

    def submit(
        self, sock: socket.socket, policy: Policy | None = None, *, data: Buffer | None = None
    ) -> Future[Report]:
        """As `close` (or `send_and_close`, with `data`), for those who want to know: a Future of the Report.

        It cannot be cancelled, for the socket is the closer's already (see `expire`). Its callbacks run in the closer's
        thread (or in this one, when the socket is closed at once), and hold up all others while they do.
        """
        from concurrent.futures import Future  # which most users never need, and which takes long to import

        future: Future[Report] = Future()
        future.set_running_or_notify_cancel()
        report = self._intake.submit(future, sock, data, policy)
        if report is not None:
            future.set_result(report)
        return future

    def expire(self, future: Future[Report]) -> None:
        """End one socket now: as if its deadline had come, by its policy's on_timeout, within milliseconds.

        future: from `submit` of this closer. It gets its Report as ever, mostly TIMED_OUT; one that is done stays as
        it is. For callers that have stopped waiting (a task that was cancelled) and want the fd back.

        Raises TypeError for what is no Future, ValueError for one that is not done and not this closer's.
        """
        from concurrent.futures import Future

        if not isinstance(future, Future):
            raise TypeError(f"future is one that submit of this closer has returned; got {future!r}")
        if not future.done():
            self._intake.expire(future)

    @property
    def policy(self) -> Policy:
        """What happens to sockets that come without a policy."""
        return self._loop.policy

    @property
    def exit_timeout(self) -> float:
        """Seconds that sockets in flight get when the interpreter exits, and from `shutdown` by default."""
        return self._loop.exit_timeout / 1e9

    @property
    def name(self) -> str:
        """Of the thread."""
        return self._loop.name

    @property
    def pending(self) -> int:
        """Sockets in flight."""
        return self.stats().pending

    def stats(self) -> Stats:
        """The counters: cheap, and all of one moment."""
        handed_over, pending, buffered, drained, outcomes, times, total = self._loop.counters()
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
        """Wait until nothing is in flight. More sockets may be handed over meanwhile.

        timeout: seconds; None for as long as the policies of what is in flight allow. Returns whether nothing is; then
        all futures have their reports too. Raises RuntimeError in a future's callback, for the thread that it would
        wait for is its own.
        """
        ns = _arguments.check_timeout("timeout", timeout)
        if threading.current_thread() is self._loop.thread:
            raise RuntimeError("this is the closer's own thread, in a future's callback: it would wait for itself")
        idle = threading.Event()
        call = idle.set
        self._loop.when_idle(call)
        try:
            return idle.wait(None if ns < 0 else min(ns / 1e9, threading.TIMEOUT_MAX))
        finally:
            self._loop.forget(call)

    def shutdown(self, timeout: float | None = None) -> Stats:
        """Take no more sockets, give those in flight `timeout` seconds, then end them by their on_timeout.

        timeout: None for the `exit_timeout`. Of several calls the earliest deadline counts. Returns the final Stats.
        From here on `close` raises RuntimeError and leaves its socket untouched. With thousands in flight the oldest
        end a little earlier, so that the last is not late. In a future's callback it does not wait for the end.
        """
        ns = self._loop.exit_timeout if timeout is None else seconds_to_ns("timeout", timeout)
        self._loop.stop(ns)
        _join(self._loop, time.monotonic_ns() + ns)
        return self.stats()

    def __enter__(self) -> Closer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


def _half_of_all_fds() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return MAX_PENDING
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_PENDING if limit == resource.RLIM_INFINITY else max(1, min(limit // 2, 2**30))


# The thread -----------------------------------------------------------------------------------------------

_loops: weakref.WeakSet[Loop] = weakref.WeakSet()
"""Those of all closers, and of closers that are gone as long as their threads run."""

# Both are reentrant: a signal handler, or the garbage collector, may want what its thread was just asking for. The
# first is held by starters alone: it may happen in the middle of anything else that a socket is handed over and a
# thread is needed.
_starting = threading.RLock()
_listing = threading.RLock()
_this_thread = threading.local()
_being_started: list[Loop] = []
"""Guarded by `_starting`. More than one when the garbage collector comes in between."""


def _start(loop: Loop) -> None:
    gevent: Any = sys.modules.get("gevent.monkey")
    eventlet: Any = sys.modules.get("eventlet.patcher")
    if (gevent and gevent.is_module_patched("_thread")) or (eventlet and eventlet.is_monkey_patched("thread")):
        raise RuntimeError(
            "gevent or eventlet makes greenlets of threads here, and a closer's would hold up all others: "
            "with gevent use lingerx.gevent.Closer; the socket is untouched"
        )
    # By a thread of its own: a signal handler that raises in the middle of Thread.start would leave nobody knows what
    # behind, and handlers run in the main thread only. (The call below has happened, or it has not.)
    if getattr(_this_thread, "is_starter", False):  # the garbage collector has come in between
        _start_here(loop)
        return
    done = _thread.allocate_lock()
    done.acquire()
    trouble: list[BaseException] = []
    _thread.start_new_thread(_starter, (loop, done, trouble))
    done.acquire()
    if trouble:
        raise trouble[0]


def _starter(loop: Loop, done: _thread.LockType, trouble: list[BaseException]) -> None:
    try:
        _this_thread.is_starter = True
        if hasattr(signal, "pthread_sigmask"):  # not on Windows
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # a thread inherits that
        _start_here(loop)
    except BaseException as error:
        trouble.append(error)
    finally:
        done.release()


def _start_here(loop: Loop) -> None:
    with _starting:
        if _exiting:
            raise RuntimeError("the interpreter exits: nobody would wait for a closer; the socket is untouched")
        _at_exit_of_multiprocessing()
        if loop.thread is not None or loop in _being_started:
            return
        _being_started.append(loop)
        try:
            # A daemon: the interpreter must not wait for it before our own, bounded exit has run.
            thread = _Thread(target=loop.run, name=loop.name, daemon=True)
            thread.start()
        finally:
            _being_started.remove(loop)
        loop.thread = thread  # not before: others would count on it, and it might not start


class _Thread(threading.Thread):
    """Can be waited for again after a join() was interrupted: to CPython 3.11 it has ended then (bpo-45274)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # No Event: a signal handler that waits too may come while its thread holds the lock inside of one.
        self._runs = _thread.allocate_lock()
        self._runs.acquire()

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._runs.release()

    def ends_within(self, seconds: float) -> bool:
        """Wait so long; whether it has ended, or is about to."""
        ended = self._runs.acquire(timeout=seconds)
        if ended:
            self._runs.release()
        return ended


def _join(loop: Loop, end: int) -> None:
    with _starting:
        thread = loop.thread
    if thread is not None and thread is not threading.current_thread():
        left = min(max(0.0, (end - time.monotonic_ns()) / 1e9 + _CALLBACKS), threading.TIMEOUT_MAX)
        if not isinstance(thread, _Thread) or thread.ends_within(left):
            thread.join(left)


_default: Closer | None = None


def default_closer() -> Closer:
    """One closer, with the defaults, for all who ask; made when the first one does, and made anew after a shutdown."""
    global _default
    while True:
        closer = _default
        if closer is not None and (_exiting or closer._loop.is_open()):
            return closer
        new = Closer()
        with _listing:
            if _default is closer:  # else somebody else was quicker
                _default = new


# Exit -----------------------------------------------------------------------------------------------------

_exiting = False


@atexit.register
def _at_exit() -> None:
    # Side by side: first all are told, then all are waited for.
    global _exiting
    _exiting = True
    with _listing:
        loops = list(_loops)
    for loop in loops:
        loop.stop(loop.exit_timeout)
    now = time.monotonic_ns()
    for loop in loops:
        _join(loop, now + loop.exit_timeout)


def _at_exit_of_multiprocessing() -> None:
    # A child of multiprocessing leaves by os._exit, without atexit's functions.
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        from multiprocessing.util import Finalize

        Finalize(None, _at_exit, exitpriority=0)


# Fork -----------------------------------------------------------------------------------------------------

_forking: list[Loop] = []


def _before_fork() -> None:
    with _listing:
        _forking[:] = _loops
    for loop in _forking:
        loop.before_fork()


def _after_in_parent() -> None:
    for loop in _forking:
        loop.after_fork_in_parent()
    _forking.clear()


def _after_in_child() -> None:
    global _starting, _listing
    _starting, _listing = threading.RLock(), threading.RLock()  # other threads may have held them
    _being_started.clear()
    for loop in _forking:
        loop.thread = None
        loop.after_fork_in_child()
    _forking.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
