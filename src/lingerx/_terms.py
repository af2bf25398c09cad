"""How objects that close sockets by themselves do so: what nearly all adapters share.

The terms, their check, and which side of a fork we are on. No system call is made here.
"""

from __future__ import annotations

import os
import socket
import warnings

from ._arguments import check_policy
from ._engine import close
from .closer import Closer, default_closer
from .policy import Policy

__all__ = ["Terms", "came_of_a_fork_since", "check_terms", "has_forked_since", "last_fork", "warn_of_terms"]


def check_terms(policy: object, closer: object, wait: bool) -> None:
    """Raises TypeError for what is no policy or no Closer, ValueError for what does not go together."""
    if policy is not None:
        check_policy(policy, blocking=wait)
    if closer is not None and not isinstance(closer, Closer):
        raise TypeError(f"closer is a lingerx.Closer, or None for the default one; got {closer!r}")
    if closer is not None and wait:
        raise ValueError("with wait=True the thread that closes lingers itself, without a closer: pass one of the two")


def warn_of_terms(policy: object, closer: object, wait: bool) -> None:
    """Where a close may raise nothing: a warning if these terms, which were set on an object, are wrong.

    Else it was the socket with which nobody can linger, and there is nothing to say.
    """
    try:
        check_terms(policy, None if wait else closer, wait)  # who has forked waits in spite of a closer
    except (TypeError, ValueError) as error:
        warnings.warn(f"a connection was closed plainly: {error}", RuntimeWarning, stacklevel=3)


class Terms:
    """By which policy to close, and who waits meanwhile. Attributes of a class, or of an object of it.

    policy: None for the closer's own (with `wait`, for Drain(timeout=3.0)).
    closer: lingers in the background; None for `default_closer()`.
    wait: True to linger in the thread that closes, without a closer.
    """

    policy: Policy | None = None
    closer: Closer | None = None
    wait: bool = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_terms(cls.policy, cls.closer, cls.wait)

    def _take_terms_of(self, other: Terms) -> None:
        self.policy, self.closer, self.wait = other.policy, other.closer, other.wait

    def _linger(self, sock: socket.socket, wait: bool) -> None:
        # Owns, or leaves `sock` untouched where nobody can linger: no stream, no thread or fd left for a closer, or
        # one that was shut down, be it at exit. Then the plain close that comes next has to do.
        wait = wait or self.wait
        try:
            if wait:
                close(sock, self.policy)
            else:
                (default_closer() if self.closer is None else self.closer).close(sock, self.policy)
        except (TypeError, ValueError):
            warn_of_terms(self.policy, self.closer, wait)
        except (RuntimeError, OSError):
            pass


# Forks ----------------------------------------------------------------------------------------------------

_last_fork = 0


def last_fork() -> int:
    """The number of the fork that this process made last, or, negative, of the one that it came of since."""
    return _last_fork


def has_forked_since(mark: int) -> bool:
    """Whether another process got a copy of every socket that was there at `mark`, a `last_fork()`."""
    return _last_fork > 0 and _last_fork != mark


def came_of_a_fork_since(mark: int) -> bool:
    """Whether this process is the one that got the copies."""
    return _last_fork < 0 and _last_fork != mark


def _after_in_parent() -> None:
    global _last_fork
    _last_fork = abs(_last_fork) + 1


def _after_in_child() -> None:
    global _last_fork
    _last_fork = -abs(_last_fork) - 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_parent=_after_in_parent, after_in_child=_after_in_child)
