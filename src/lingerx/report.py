"""What came of it: the outcomes and the report, values that compare, print and unpack.

Here live only these two types; nothing in this file touches a socket or imports another lingerx module. The
very same file runs as plain Python and, with the types of `report.pxd`, as a compiled module whose Report is
a small C object.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

__all__ = ["Outcome", "Report"]


class Outcome(enum.Enum):
    """How a close ended. In the order of the codes in `_machine`, which a test compares."""

    PEER_CLOSED = "peer_closed"
    """The peer's FIN was seen and every data byte was ACKed. (After the application's own SHUT_RD its input reads as
    ended too: then nobody knows whether there was a FIN.)"""
    ACKED = "acked"
    """Every byte and our FIN were ACKed; the peer may still be open."""
    BACKGROUND = "background"
    """Left to the kernel, as a plain close does; nobody knows more."""
    ABORTED = "aborted"
    """RST was sent, as asked for."""
    PEER_RESET = "peer_reset"
    """The peer reset the connection (RST; a send to it failed with EPIPE)."""
    TIMED_OUT = "timed_out"
    """The total deadline came first."""
    IDLE = "idle"
    """The peer sent nothing for as long as `idle_timeout` allows."""
    BYTE_LIMIT = "byte_limit"
    """The peer sent more than `max_bytes`."""
    SHED = "shed"
    """Given up before its limits, to make room for newer ones."""
    NOT_CONNECTED = "not_connected"
    """There was no connection to close, or not any more."""
    ALREADY_CLOSED = "already_closed"
    """There was no open socket to close; nothing was touched."""
    FAILED = "failed"
    """The network or the system failed; `error` says how."""


OUTCOMES = tuple(Outcome)


class Report:
    """What came of one close. Immutable; unpacks into its five fields, in this order:

    outcome: Outcome.
    drained: bytes of input that were discarded (on TLS: of the raw stream, after close_notify was sent).
    unacked: data bytes (without the FIN) that the peer's TCP had not ACKed at the end, or None where the
        platform or the policy cannot tell. Counts bytes that never left this process too.
    elapsed: seconds from the call to the end; 0.0 for Background and Abort, which never wait and read no clock.
    error: an errno that explains FAILED, PEER_RESET or ALREADY_CLOSED, else None.

    lost: the un-ACKed bytes are known never to arrive (the connection was reset, or they were dropped here).
    """

    __slots__ = ("_code", "_drained", "_elapsed_ns", "_error", "_lost", "_unacked")
    __match_args__ = ("outcome", "drained", "unacked", "elapsed", "error")

    def __init__(
        self,
        outcome: Outcome,
        drained: int = 0,
        unacked: int | None = None,
        elapsed: float = 0.0,
        error: int | None = None,
        *,
        lost: bool = False,
    ) -> None:
        if not isinstance(outcome, Outcome):
            raise TypeError(f"outcome is a lingerx.Outcome; got {outcome!r}")
        self._code = OUTCOMES.index(outcome)
        self._drained = drained
        self._unacked = -1 if unacked is None else unacked
        self._elapsed_ns = round(elapsed * 1e9)
        self._error = 0 if error is None else error
        self._lost = lost

    @property
    def outcome(self) -> Outcome:
        """How it ended."""
        return OUTCOMES[self._code]

    @property
    def drained(self) -> int:
        """Bytes of input that were discarded."""
        return self._drained

    @property
    def unacked(self) -> int | None:
        """Data bytes that the peer's TCP had not ACKed at the end, or None where that is unknown."""
        return None if self._unacked < 0 else self._unacked

    @property
    def elapsed(self) -> float:
        """Seconds from the call to the end."""
        return self._elapsed_ns / 1e9

    @property
    def error(self) -> int | None:
        """An errno, or None."""
        return self._error or None

    @property
    def delivered(self) -> bool | None:
        """True: every data byte was ACKed by the peer's TCP. False: known lost. None: can't know.

        ACKed means: it reached the peer's machine. No transport can say that an application has read it. AF_UNIX has
        no ACKs: there it means that all of it reached the peer's queue, and that the peer was not seen to close with
        some of it unread. (That error is told once: not here, when the application has met with it before.)
        """
        if self._unacked == 0:
            return True
        return False if self._lost else None

    def __iter__(self) -> Iterator[object]:
        return iter((self.outcome, self.drained, self.unacked, self.elapsed, self.error))

    def __len__(self) -> int:
        return 5

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Report):
            return NotImplemented
        return tuple(self) == tuple(other) and self.delivered is other.delivered

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return (
            f"Report(outcome={self.outcome}, drained={self.drained}, unacked={self.unacked}, "
            f"elapsed={self.elapsed:.6f}, error={self.error}, delivered={self.delivered})"
        )

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (tuple(self), bool(self._lost))


def _rebuild(fields: tuple[object, ...], lost: bool) -> Report:
    return Report(*fields, lost=lost)  # type: ignore[arg-type]
