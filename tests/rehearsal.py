"""Drives the machine without sockets: its numbers by name, the two ways to run it, and random engines.

No rule of the machine and no assertion may live here; those are in the tests and in `scenarios`.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

from lingerx.report import Outcome, Report

# Untyped by design (Cython's pure mode), hence Any.
machine: Any = import_module("lingerx._machine")

STATES = (
    "SENDING",
    "HALF_CLOSING",
    "DRAINING",
    "CONFIRMING",
    "FLUSHING",
    "FLUSHING_ON",
    "PARTED",
    "LEAVING",
    "CLOSED",
)
EVENTS = (
    "BEGUN",
    "WOKEN",
    "SENT",
    "NO_ROOM",
    "HALF_CLOSED",
    "UNCONNECTED",
    "INPUT",
    "EMPTY",
    "FIN",
    "COUNTED",
    "NO_ERROR",
    "RESET",
    "BROKEN",
    "GONE",
    "SHEDDING",
    "SENT_ALL",
    "TOO_MUCH",
    "ACKED_ALL",
    "ACKED_DATA",
    "QUEUED",
    "UNCOUNTED",
)
TOLD = EVENTS[: EVENTS.index("SENT_ALL")]
"""The events that an engine may tell; the others are these, sharpened by the machine."""

ACTIONS = (
    "SEND",
    "HALF_CLOSE",
    "DISCARD",
    "COUNT",
    "PROBE",
    "WAIT",
    "YIELD",
    "CLOSE",
    "CLOSE_SHORT",
    "CLOSE_ABORT",
    "FORGET",
)
ENDS = ("CLOSE", "CLOSE_SHORT", "CLOSE_ABORT", "FORGET")

ANSWERS = {
    "SEND": ("SENT", "NO_ROOM", "UNCONNECTED", "RESET", "BROKEN", "GONE"),
    "HALF_CLOSE": ("HALF_CLOSED", "UNCONNECTED", "RESET", "BROKEN", "GONE"),
    "DISCARD": ("INPUT", "EMPTY", "FIN", "UNCONNECTED", "RESET", "BROKEN", "GONE"),
    "COUNT": ("COUNTED", "GONE"),
    "PROBE": ("NO_ERROR", "RESET", "BROKEN", "GONE"),
    "WAIT": ("WOKEN", "SHEDDING"),
    "YIELD": ("WOKEN", "SHEDDING"),
}
"""What an engine may tell after each action that is not an end; the commonest first."""

SHARPENED = {
    "SENT": ("SENT", "SENT_ALL"),
    "INPUT": ("INPUT", "TOO_MUCH"),
    "COUNTED": ("ACKED_ALL", "ACKED_DATA", "QUEUED", "UNCOUNTED"),
}

ECONNRESET = 104  # any errno would do: the machine hands them through


class Terms(NamedTuple):
    """The arguments of `begin`, in its order; times in ns, amounts in bytes."""

    goal: int
    timeout: int = 1000
    idle: int = -1
    max_bytes: int = -1
    abort: int = 0
    short: int = 0
    unsent: int = 0
    local: int = 0
    polled: int = 0
    now: int = 0


def drain(**others: int) -> Terms:
    return Terms(machine.DRAINING, **others)


def flush(**others: int) -> Terms:
    return Terms(machine.FLUSHING, **others)


class Machine(Protocol):
    """One closing, as `lingerx._native.Rehearsal` shows it too."""

    def advance(self, seen: int, amount: int, now: int, never_sent: int = -1) -> int: ...

    def state(self) -> dict[str, int]: ...


class Interpreted:
    """The machine as plain Python."""

    def __init__(self, *terms: int) -> None:
        self.record = SimpleNamespace()
        machine.begin(self.record, *terms)

    def advance(self, seen: int, amount: int, now: int, never_sent: int = -1) -> int:
        self.record.never_sent = min(never_sent, 2)
        action: int = machine.advance(self.record, seen, amount, now)
        return action

    def state(self) -> dict[str, int]:
        want = machine.allowance(self.record)
        return {"want": want, **{name: int(value) for name, value in vars(self.record).items()}}


def number(name: str) -> int:
    value: int = getattr(machine, name)
    return value


def report_of(state: dict[str, int]) -> Report:
    """The report that an engine would make of this record."""
    unacked = None if state["unacked"] < 0 else state["unacked"]
    outcome = tuple(Outcome)[state["outcome"]]
    return Report(outcome, state["drained"], unacked, error=state["error"] or None, lost=bool(state["lost"]))


class Told(NamedTuple):
    """One call of `advance`: what it was told at which record, and what it answered."""

    before: dict[str, int]
    event: str
    amount: int
    now: int
    action: str
    after: dict[str, int]


def random_terms(choose: Random) -> Terms:
    maybe = choose.random
    return Terms(
        goal=choose.choice((machine.DRAINING, machine.FLUSHING)),
        timeout=choose.choice((0, 1, 1000, 3_000_000_000, 10**18)),
        idle=choose.choice((-1, -1, 0, 1, 700, 2_000_000_000)),
        max_bytes=choose.choice((-1, -1, 0, 1, 10, 70_000, 5_000_000)),
        abort=int(maybe() < 0.3),
        short=int(maybe() < 0.3),
        unsent=choose.choice((0, 0, 1, 20, 10_000_000)),
        local=int(maybe() < 0.3),
        polled=int(maybe() < 0.3),
        now=choose.choice((0, 5, 10**15)),
    )


def _random_amount(choose: Random, event: str, state: dict[str, int]) -> int:
    # An engine never sends more than there is, nor discards more than it was told to.
    if event == "SENT":
        return choose.choice((1, max(1, state["unsent"] // 2), max(1, state["unsent"])))
    if event == "INPUT":
        return choose.choice((1, max(1, state["want"] // 2), max(1, state["want"])))
    if event == "COUNTED":
        return choose.choice((-1, 0, 0, 1, 2, 4_000_000))
    return ECONNRESET if event in ("RESET", "BROKEN", "GONE") else 0


def _random_never_sent(choose: Random, event: str, amount: int, state: dict[str, int]) -> int:
    # Known at the last look only, and no more than what is queued.
    if event == "COUNTED" and STATES[state["state"]] == "LEAVING" and amount >= 0:
        return choose.choice((-1, 0, (amount + 1) // 2, amount))
    return -1


def _random_event(choose: Random, action: str) -> str:
    if choose.random() < 0.1:
        return choose.choice(ANSWERS[action])
    return choose.choice(ANSWERS[action][: 3 if action == "DISCARD" else 1])


def _random_time(choose: Random, state: dict[str, int], action: str, now: int) -> int:
    if action not in ("WAIT", "YIELD"):
        return now + choose.choice((0, 0, 1, 40))
    later = (state["wake_at"], state["wake_at"] - 1, state["deadline"], state["deadline"] - 1, now + 1, now + 10**9)
    return max(now, choose.choice(later))


def walk(subject: Machine, choose: Random, now: int, moves: int = 60, nonsense: float = 0.0) -> Iterator[Told]:
    """Let a random engine work until the end or for so many moves.

    Its answers fit the actions, except for the share `nonsense` of them, which may be any event.
    """
    action, event = "", "BEGUN"
    before = subject.state()
    for _ in range(moves):
        if action:
            strange = nonsense > 0.0 and choose.random() < nonsense
            event = choose.choice(TOLD) if strange else _random_event(choose, action)
        now = _random_time(choose, before, action, now)
        amount = _random_amount(choose, event, before)
        never_sent = _random_never_sent(choose, event, amount, before)
        action = ACTIONS[subject.advance(EVENTS.index(event), amount, now, never_sent)]
        after = subject.state()
        yield Told(before, event, amount, now, action, after)
        if action in ENDS:
            return
        before = after
