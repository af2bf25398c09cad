"""What an upload experiment found: values, counts and the verdict.

Here live only pure functions and frozen records: no socket, no thread, no clock, no rendering. So the tests
can forge what clients and reports said, and see the verdict fail.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["FATES", "Cell", "Fate", "Lie", "Row", "Seen", "Served", "as_json", "find_failures", "find_lies"]

Fate = Literal["whole", "truncated", "reset", "timed_out"]

FATES: tuple[Fate, ...] = ("whole", "truncated", "reset", "timed_out")
"""What can become of an answer, as its client sees it. `truncated`: a part of it; `reset`: not one byte."""


@dataclass(frozen=True)
class Seen:
    """One upload as its client saw it.

    received: bytes of the answer, header included. send_error: the errno's name (curl: "exit 55"), or "" when
    every byte of the upload was taken. exit_code: curl's, 0 for the raw client.
    """

    request: int
    fate: Fate
    received: int
    send_error: str = ""
    exit_code: int = 0


@dataclass(frozen=True)
class Served:
    """The same upload as the server's thread saw it.

    handed_over: the whole answer was taken by the kernel (or by lingerx) before the close; only then can a
    report speak for all of it. closing: seconds in the closing call. outcome and delivered: from the report,
    "" and None where there is none. trouble: an exception that came out of the closing call, or "".
    """

    request: int
    handed_over: bool
    closing: float
    outcome: str = ""
    delivered: bool | None = None
    trouble: str = ""


@dataclass(frozen=True)
class Cell:
    """One way to close, tried with one client. stuck: server threads that had not ended when time was up."""

    client: str
    seen: tuple[Seen, ...]
    served: tuple[Served, ...]
    stuck: int = 0

    @property
    def uploads(self) -> int:
        return len(self.seen)

    def count(self, fate: Fate) -> int:
        return sum(one.fate == fate for one in self.seen)

    @property
    def send_errors(self) -> int:
        return sum(bool(one.send_error) for one in self.seen)

    @property
    def lies(self) -> list[Lie]:
        return find_lies(self.served, self.seen)


@dataclass(frozen=True)
class Row:
    """One way to close, tried with every client.

    reports: it answers with a report. lossless: it promises every byte. gentle: it promises besides that no
    client sees an error while it still sends.
    """

    name: str
    cells: tuple[Cell, ...]
    reports: bool = False
    lossless: bool = False
    gentle: bool = False

    @property
    def served(self) -> list[Served]:
        return [one for cell in self.cells for one in cell.served]

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(one.outcome for one in self.served if one.outcome)

    def delivered(self, value: bool | None) -> int:
        return sum(one.delivered is value for one in self.served if one.outcome)

    @property
    def median_closing(self) -> float:
        """Seconds."""
        return statistics.median([one.closing for one in self.served] or [0.0])

    @property
    def longest_closing(self) -> float:
        """Seconds."""
        return max([one.closing for one in self.served], default=0.0)


@dataclass(frozen=True)
class Lie:
    """A report that claimed more than its client got."""

    request: int
    claim: str
    fate: str
    received: int


def find_lies(served: Iterable[Served], seen: Iterable[Seen]) -> list[Lie]:
    """The reports that claim delivery (delivered True, or PEER_CLOSED) of answers that did not arrive whole.

    A claim for which no client can vouch counts as a lie. A server that could not hand over the whole answer
    is left out: the report speaks only for what was handed over.
    """
    clients = {one.request: one for one in seen}
    lies = []
    for one in served:
        if not one.handed_over or not (one.delivered is True or one.outcome == "PEER_CLOSED"):
            continue
        client = clients.get(one.request)
        if client is None:
            lies.append(Lie(one.request, one.outcome, "no client", 0))
        elif client.fate != "whole":
            lies.append(Lie(one.request, one.outcome, client.fate, client.received))
    return lies


def find_failures(rows: Iterable[Row]) -> list[str]:
    """What speaks against lingerx, one plain sentence each; empty when all promises were kept.

    What the ways without a promise lose is the demonstration, not a failure.
    """
    return [sentence for row in rows for cell in row.cells for sentence in _cell_failures(row, cell)]


def _cell_failures(row: Row, cell: Cell) -> list[str]:
    failures = []
    lost = cell.uploads - cell.count("whole")
    if row.lossless and lost:
        outcomes = Counter(one.outcome for one in cell.served if one.outcome)
        said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())) or "no report"
        failures.append(
            f"{row.name} promises every byte, but {lost} of {cell.uploads} answers did not reach the "
            f"{cell.client} client whole (its reports: {said})."
        )
    # Only the raw client shows an error of its own for certain: curl stops sending once it has the answer.
    if row.gentle and cell.client == "raw" and cell.send_errors:
        failures.append(
            f"{row.name} promises that no client is reset while it sends, but {cell.send_errors} of "
            f"{cell.uploads} raw clients had a send error."
        )
    failures += [
        f"A report lied: {row.name} said {lie.claim} of request {lie.request}, but the {cell.client} client "
        f"got {lie.received} bytes ({lie.fate})."
        for lie in cell.lies
    ]
    reported = sum(bool(one.outcome) for one in cell.served)
    if row.reports and reported != cell.uploads:
        failures.append(f"{row.name} gave {reported} reports for {cell.uploads} uploads by {cell.client}.")
    troubles = sorted({one.trouble for one in cell.served if one.trouble})
    failures += [f"{row.name} raised {trouble} ({cell.client} client)." for trouble in troubles]
    if cell.stuck:
        failures.append(f"{row.name} left {cell.stuck} server threads waiting ({cell.client} client).")
    return failures


def as_json(row: Row) -> dict[str, Any]:
    """The row as plain values: counts, and seconds under names that say so."""
    return {
        "name": row.name,
        "reports": row.reports,
        "lossless": row.lossless,
        "gentle": row.gentle,
        "clients": {
            cell.client: {
                "uploads": cell.uploads,
                **{fate: cell.count(fate) for fate in FATES},
                "send_errors": cell.send_errors,
                "send_error_names": dict(Counter(one.send_error for one in cell.seen if one.send_error)),
                "exit_codes": dict(Counter(str(one.exit_code) for one in cell.seen)),
                "lies": [vars(lie) for lie in cell.lies],
            }
            for cell in row.cells
        },
        "outcomes": dict(row.outcomes),
        "delivered": {
            "true": row.delivered(True),
            "false": row.delivered(False),
            "unknown": row.delivered(None),
        },
        "closing_seconds": {"median": row.median_closing, "max": row.longest_closing},
    }
