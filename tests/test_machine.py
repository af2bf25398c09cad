"""The machine's rules, without sockets: every scenario of the tables, and the sanity of the table itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

import scenarios
import scenarios_limits
import scenarios_turns
from lingerx.report import Outcome
from rehearsal import (
    ACTIONS,
    ANSWERS,
    ECONNRESET,
    ENDS,
    EVENTS,
    SHARPENED,
    STATES,
    TOLD,
    Interpreted,
    Terms,
    drain,
    flush,
    machine,
    number,
    report_of,
)
from scenarios import Ending, Scenario


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """Overrides the one for all: nothing is opened here, and looking for it would take longer than the tests."""


WAYS_INTO = {
    "SENDING": (drain(unsent=5), "BEGUN -> SEND"),
    "HALF_CLOSING": (drain(), "BEGUN -> HALF_CLOSE"),
    "DRAINING": (drain(), scenarios.DRAINING),
    "CONFIRMING": (drain(), scenarios.CONFIRMING),
    "FLUSHING": (flush(), scenarios.FLUSHING),
    "FLUSHING_ON": (flush(), scenarios.FLUSHING_ON),
    "PARTED": (drain(), scenarios.PARTED),
    "LEAVING": (drain(), scenarios.LEAVING),
}

EVERYWHERE = {
    "is_reset": ("RESET 104 -> COUNT; COUNTED 30 -> CLOSE", "PEER_RESET"),
    "breaks": ("BROKEN 5 -> COUNT; COUNTED 30 -> CLOSE", "FAILED"),
    "is_gone": ("GONE 9 -> FORGET", "ALREADY_CLOSED"),
    "is_shed": ("SHEDDING -> COUNT; COUNTED 30 -> CLOSE", "SHED"),
}
"""What may happen in every state but LEAVING, where the outcome stands already."""


def _unacked(state: str) -> int:
    # Of the 30 queued bytes one is the FIN, once we have half-closed; while sending 5 are still in this process.
    return {"SENDING": 35, "HALF_CLOSING": 30, "PARTED": 30}.get(state, 29)


def _everywhere() -> Iterator[Scenario]:
    for state, (terms, way) in WAYS_INTO.items():
        if state == "LEAVING":
            continue
        for name, (script, outcome) in EVERYWHERE.items():
            ending = Ending(
                outcome,
                "lost" if terms.unsent > 0 else "unknown",
                unacked=-1 if outcome == "ALREADY_CLOSED" else _unacked(state),
                error={"PEER_RESET": 104, "FAILED": 5, "ALREADY_CLOSED": 9}.get(outcome, 0),
            )
            yield Scenario(f"{state.lower()}_{name}", terms, f"{way}\n{script}", ending)
    for state in ("DRAINING", "FLUSHING", "PARTED"):
        terms, way = WAYS_INTO[state]
        script = f"{way}\nINPUT 1 -> COUNT; COUNTED 0 -> CLOSE"
        outcome = "ACKED" if state == "FLUSHING" else "BYTE_LIMIT"
        yield Scenario(
            f"{state.lower()}_sees_too_much", terms._replace(max_bytes=0), script, Ending(outcome, "delivered")
        )


ALL = (
    *scenarios.DRAINS,
    *scenarios.FLUSHES,
    *scenarios.SENDS,
    *scenarios.PARTINGS,
    *scenarios_limits.TIMES,
    *scenarios_limits.NO_WAIT,
    *scenarios_limits.BYTES,
    *scenarios_turns.TURNS,
    *scenarios_turns.TIMERS,
    *scenarios_limits.SHARP,
    *_everywhere(),
)

STEP = re.compile(
    r"(?:(\d+) x )?([A-Z_]+)(?: (-?\d+|UNTOLD))?(?: never_sent=(\d+))?(?: @(\d+))? -> ([A-Z_]+)((?: \w+=\S+)*)"
)


class Step(NamedTuple):
    event: str
    amount: int
    never_sent: int
    now: int
    action: str
    fields: dict[str, int]


def _value(text: str) -> int:
    value = 0
    for part in text.split("|"):
        value |= int(part) if part.lstrip("-").isdigit() else number(part)
    return value


def _steps(script: str, now: int) -> Iterator[Step]:
    for text in filter(None, map(str.strip, re.split("[\n;]", script))):
        match = STEP.fullmatch(text)
        assert match, f"this step of a scenario cannot be read: {text!r}"
        times, event, amount, never_sent, at, action, checks = match.groups()
        now = int(at) if at else now
        fields = {name: _value(value) for name, _, value in (check.partition("=") for check in checks.split())}
        for _ in range(int(times or 1)):
            yield Step(event, _value(amount or "0"), int(never_sent or -1), now, action, fields)


def _play(terms: Terms, script: str) -> dict[str, int]:
    """Play a script, insist on every answer, and return the record as it is after it."""
    subject = Interpreted(*terms)
    for place, step in enumerate(_steps(script, terms.now)):
        action = ACTIONS[subject.advance(EVENTS.index(step.event), step.amount, step.now, step.never_sent)]
        state = subject.state()
        assert (action, {name: state[name] for name in step.fields}) == (step.action, step.fields), (place, step, state)
    return subject.state()


@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.name)
def test_scenario(scenario: Scenario) -> None:
    state = _play(scenario.terms, scenario.script)
    report = report_of(state)
    delivered = {True: "delivered", False: "lost", None: "unknown"}[report.delivered]
    seen = Ending(report.outcome.name, delivered, report.drained, state["unacked"], state["error"])  # type: ignore[arg-type]
    assert (seen, STATES[state["state"]]) == (scenario.ending, "CLOSED")


def test_names_of_scenarios_are_unique() -> None:
    names = [scenario.name for scenario in ALL]
    assert sorted(names) == sorted(set(names))


class _Watched(list[int]):
    """A list that remembers which of its places were read."""

    def __init__(self, values: list[int]) -> None:
        super().__init__(values)
        self.read: set[int] = set()

    def __getitem__(self, place: int) -> int:  # type: ignore[override]
        self.read.add(place)
        return super().__getitem__(place)


def test_every_row_is_played_by_some_scenario(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = _Watched(machine.ACTION)
    monkeypatch.setattr(machine, "ACTION", watched)
    for scenario in ALL:
        _play(scenario.terms, scenario.script)
    rows = {row[0] * number("EVENTS") + row[1]: f"{STATES[row[0]]}, {EVENTS[row[1]]}" for row in machine.ROWS}
    assert [name for place, name in rows.items() if place not in watched.read] == []


def test_the_names_used_here_are_the_machine_s_numbers() -> None:
    for names in (STATES, EVENTS, ACTIONS):
        assert [number(name) for name in names] == list(range(len(names)))
    assert (number("STATES"), number("EVENTS")) == (len(STATES), len(EVENTS))


def test_outcomes_have_the_machine_s_codes() -> None:
    assert [number(outcome.name) for outcome in Outcome] == list(range(len(Outcome)))
    assert number("NO_OUTCOME") not in range(len(Outcome))


def test_no_pair_has_two_rows() -> None:
    pairs = [(row[0], row[1]) for row in machine.ROWS]
    assert sorted(pairs) == sorted(set(pairs))


def test_rows_hold_nothing_but_the_machine_s_numbers() -> None:
    outcomes = {*range(len(Outcome)), number("NO_OUTCOME")}
    for state, event, following, action, outcome in machine.ROWS:
        assert state in range(len(STATES) - 1), "nothing happens after CLOSED"
        assert event in range(len(EVENTS))
        assert following in range(len(STATES)) or following == number("GOAL")
        assert action in range(len(ACTIONS))
        assert outcome in outcomes
        # What ends it closes the state, and nothing else does; CLOSE becomes the two others by the sums.
        assert (ACTIONS[action] in ENDS) == (following == number("CLOSED"))
        assert ACTIONS[action] not in ("CLOSE_SHORT", "CLOSE_ABORT", "YIELD")


def _followers(state: int) -> set[int]:
    found = {row[2] for row in machine.ROWS if row[0] == state}
    if number("GOAL") in found:
        found |= {number("DRAINING"), number("FLUSHING")}
    return found - {number("GOAL")}


@pytest.mark.parametrize("state", range(len(STATES) - 1), ids=STATES[:-1])
def test_every_state_comes_to_an_end(state: int) -> None:
    reached: set[int] = set()
    todo = {state}
    while todo:
        reached |= todo
        todo = {follower for one in todo for follower in _followers(one)} - reached
    assert number("CLOSED") in reached


def test_every_answer_to_an_action_has_a_row() -> None:
    """What an engine may tell after an action is known in the state in which the action was asked for."""
    rows = {(STATES[row[0]], EVENTS[row[1]]) for row in machine.ROWS}
    asked = {(row[2], ACTIONS[row[3]]) for row in machine.ROWS if ACTIONS[row[3]] not in ENDS}
    # A turn that is used up, and where the limits lead.
    asked |= {(state, "YIELD") for state, action in asked if action in ("DISCARD", "WAIT")}
    asked |= {(number("FLUSHING"), "COUNT"), (number("LEAVING"), "COUNT")}
    missing = set()
    for state, action in asked:
        states = ("DRAINING", "FLUSHING") if state == number("GOAL") else (STATES[state],)
        for answer in ANSWERS[action]:
            for event in SHARPENED.get(answer, (answer,)):
                missing |= {(one, event) for one in states} - rows
    assert missing == set()


IMPOSSIBLE = sorted(
    {(state, event) for state in STATES for event in TOLD}
    - {(STATES[row[0]], EVENTS[row[1]]) for row in machine.ROWS}
    # These three are told under their own names and looked up under others.
    - {(state, "COUNTED") for state in ("CONFIRMING", "FLUSHING", "FLUSHING_ON", "LEAVING")}
    - {("CLOSED", event) for event in TOLD}
)


@pytest.mark.parametrize(("state", "event"), IMPOSSIBLE)
def test_a_pair_that_cannot_happen_closes_the_socket(state: str, event: str) -> None:
    terms, way = WAYS_INTO[state]
    subject = Interpreted(*terms)
    for step in _steps(way, 0):
        subject.advance(EVENTS.index(step.event), step.amount, step.now, step.never_sent)
    assert STATES[subject.state()["state"]] == state
    action = ACTIONS[subject.advance(EVENTS.index(event), ECONNRESET, 1)]
    after = subject.state()
    assert (action, STATES[after["state"]]) == ("CLOSE", "CLOSED")
    assert report_of(after).outcome is Outcome.FAILED
