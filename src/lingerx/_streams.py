"""How a socket that was taken from an async stream goes to a closer: what `trio` and `anyio` share.

Only what needs no event loop may live here; no system call is made here.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from ._arguments import check_data
from ._terms import warn_of_terms
from .closer import Closer, default_closer
from .policy import Drain, Flush, Policy
from .report import Outcome, Report

if TYPE_CHECKING:
    from concurrent.futures import Future

    from typing_extensions import Buffer

__all__ = ["hand_over", "policy_of", "report_without", "submit"]


def policy_of(policy: Policy | None, closer: Closer | None) -> Policy:
    """What `hand_over` would go by."""
    return (default_closer() if closer is None else closer).policy if policy is None else policy


def submit(
    sock: socket.socket, policy: Policy, closer: Closer, data: Buffer | None = None, *, goodbye: bytes = b""
) -> Future[Report]:
    """Owns: as Closer.submit, but a socket that the closer refuses is closed plainly.

    goodbye: the last words of a TLS session, instead of `data`; not for a blocking socket.
    """
    try:
        return closer.submit(sock, policy, data=_now_or_later(sock, policy, goodbye) if goodbye else data)
    finally:
        sock.close()  # nothing, when the closer has it


def hand_over(
    sock: socket.socket,
    policy: Policy | None,
    closer: Closer | None,
    data: Buffer | None = None,
    *,
    goodbye: bytes = b"",
) -> bool:
    """Owns: in the background, or by a plain close where nobody can linger. Returns whether all of `data` was taken.

    The arguments are those of `submit`; a policy or closer of None means the closer's own, and the default one.
    """
    try:
        closer = default_closer() if closer is None else closer
        if goodbye:
            data = _now_or_later(sock, policy_of(policy, closer), goodbye)
        if data is not None:
            return closer.send_and_close(sock, data, policy)
        closer.close(sock, policy)
        return True
    except (TypeError, ValueError):
        warn_of_terms(policy, closer, False)
        return False
    except (RuntimeError, OSError):
        return False
    finally:
        sock.close()  # nothing, when the closer has it


def report_without(outcome: Outcome, data: Buffer | None, error: int | None = None) -> Report:
    """What came of it when no socket could be handed over: all of `data` is lost."""
    lost = 0 if data is None else check_data(data).nbytes
    return Report(outcome, 0, lost or None, error=error, lost=lost > 0)


def _now_or_later(sock: socket.socket, policy: Policy, goodbye: bytes) -> bytes | None:
    # Borrows. What the closer has to send. It cannot where the policy has no deadline: there one try is made now.
    if isinstance(policy, (Drain, Flush)):
        return goodbye
    with suppress(OSError):
        sock.send(goodbye)
    return None
