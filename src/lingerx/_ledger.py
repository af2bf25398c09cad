"""What a closer is told and what it counts: words and numbers that both engines and `Closer` share. No logic."""

from __future__ import annotations

from .report import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal, NamedTuple

    OnFull = Literal["shed_oldest", "background", "abort_oldest"]
else:
    from ._named_tuple import NamedTuple

__all__ = ["LINGER_TIMES", "ON_FULL", "Stats"]

ON_FULL: tuple[OnFull, ...] = ("shed_oldest", "background", "abort_oldest")
"""What happens beyond `max_pending`. An engine knows them by their places."""

LINGER_TIMES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the histogram of linger times, in seconds; the last bucket, beyond them, has none."""


class Stats(NamedTuple):
    """What a closer has done since it was made, at one moment.

    `handed_over == pending + sum(outcomes.values())`, and the histogram has as many entries as the outcomes.
    """

    handed_over: int
    """Sockets that were handed over."""
    pending: int
    """Sockets that are not closed yet."""
    buffered: int
    """Bytes that are kept for data which is not sent yet."""
    drained: int
    """Bytes of input that were discarded, of closed sockets."""
    outcomes: dict[Outcome, int]
    """Closed sockets by outcome."""
    linger_times: dict[float, int]
    """Closed sockets by the time from hand-over to close: upper bound in seconds (the last is inf) -> sockets."""
    total_linger_time: float
    """Seconds from hand-over to close, summed over all closed sockets."""
