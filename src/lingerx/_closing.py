"""`closing`: a with-block that leaves its socket by a policy. No system call is made here."""

from __future__ import annotations

import socket
from types import TracebackType

from ._arguments import check_policy, check_socket
from ._engine import close
from .policy import Abort, Drain, Policy
from .report import Report

__all__ = ["closing"]


class closing:
    """Leave a with-block by closing the socket: by `policy`, or by `on_error` when the block raises.

    sock: a connected stream socket (socket.socket or ssl.SSLSocket); the block gets it back from `as`.
    policy: how to close when the block ends normally. Default: Drain(timeout=3.0).
    on_error: how to close when the block raises: an answer that was cut off by an error or a time-out is
        better seen as an abort than as complete. Default: Abort().

    After the block `report` holds the Report; before, None. A socket that the block has closed or handed over
    itself is left alone and reported as ALREADY_CLOSED. Exceptions of the block go on.

    Raises TypeError or ValueError for what cannot be closed this way, when it is made, not at the end.
    """

    report: Report | None

    def __init__(self, sock: socket.socket, policy: Policy | None = None, *, on_error: Policy | None = None) -> None:
        self._policy = Drain() if policy is None else check_policy(policy)
        self._on_error = Abort() if on_error is None else check_policy(on_error)
        check_socket(sock)
        self._sock = sock
        self.report = None

    def __enter__(self) -> socket.socket:
        return self._sock

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.report = close(self._sock, self._policy if kind is None else self._on_error)
