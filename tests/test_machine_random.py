"""What must hold for the machine whatever happens, tried with random engines; and the two machines side by side."""

from __future__ import annotations

from importlib import import_module
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingerx.report import Outcome
from rehearsal import (
    ACTIONS,
    ENDS,
    STATES,
    Interpreted,
    Machine,
    Told,
    drain,
    number,
    random_terms,
    report_of,
    walk,
)

ENOUGH_TURNS = 400
"""Moves after which every random engine has reached its deadline, for it jumps towards it again and again."""

MOST_DISCARDS = number("TURN_BYTES") // number("CALL_COST") + 2
"""Calls of one turn: each costs CALL_COST at least, one passes the mark, and one comes before the first answer."""

SEQUENCES = 20_000


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """Overrides the one for all: nothing is opened here, and looking for it would take longer than the tests."""


class Watch:
    """Holds one closing against the invariants, step by step."""

    def __init__(self) -> None:
        self.discards = 0
        self.missing = 0  # data bytes that the last count found queued
        self.broken = False  # the engine told so

    def check(self, told: Told) -> None:
        after = told.after
        if told.event in ("BEGUN", "WOKEN"):
            self.discards = 0
        if told.event == "COUNTED":
            only_the_fin = told.before["fin_queued"] and told.amount > 0
            self.missing = told.amount - 1 if only_the_fin else max(0, told.amount)
        self.broken = self.broken or told.event in ("RESET", "BROKEN")
        self.check_amounts(told)
        if told.action == "DISCARD":
            self.discards += 1
            assert self.discards <= MOST_DISCARDS, "a turn without end"
        elif told.action == "WAIT":
            assert after["wants"] != 0, "nothing to wait for"
            assert after["budget"] > 0, "there may be more to read"
            assert told.now < after["wake_at"] <= after["deadline"]
            if after["idle"] >= 0:
                assert after["wake_at"] <= after["heard"] + after["idle"]
        elif told.action == "YIELD":
            assert told.now < after["deadline"], "a limit is not kept by yielding"
        self.check_end(told)

    def check_amounts(self, told: Told) -> None:
        after = told.after
        if after["max_bytes"] >= 0:
            assert after["drained"] <= after["max_bytes"]
            assert after["want"] <= after["max_bytes"] - after["drained"]
        assert 0 <= after["want"] <= number("DISCARD_BYTES")
        assert after["drained"] >= told.before["drained"]
        # Whatever the outcome will be: these bytes are not with the peer.
        if (after["unsent"] > 0 or self.missing > 0) and after["unacked"] >= 0:
            assert after["unacked"] > 0

    def check_end(self, told: Told) -> None:
        after = told.after
        ended = told.action in ENDS
        assert ended == (STATES[after["state"]] == "CLOSED")
        if not ended:
            return
        report = report_of(after)
        if after["unsent"] > 0 or self.missing > 0:
            assert report.delivered is not True, "the worst lie"
        if report.outcome is Outcome.PEER_CLOSED and told.event != "GONE":
            assert report.delivered is not False
        if report.outcome is Outcome.ACKED:
            assert report.delivered is True
        if told.event != "GONE":
            self.check_lost(told, report.outcome)
        else:
            assert after["lost"] == (after["unsent"] > 0)
        if told.action == "CLOSE_ABORT":
            assert after["abort"]
        if told.action == "CLOSE_SHORT":
            assert after["short"]
            assert report.outcome is Outcome.ACKED

    def check_lost(self, told: Told, outcome: Outcome) -> None:
        after = told.after
        broken = self.broken or outcome is Outcome.PEER_RESET
        ruined = broken or told.action == "CLOSE_ABORT"
        unread = after["local"] and broken
        if after["lost"]:
            assert after["unsent"] > 0 or unread or (ruined and after["never_sent"] > 0), "what is in flight may arrive"
        else:
            assert after["unsent"] <= 0
            assert not unread
            assert not ruined or after["never_sent"] <= 1  # it may be the FIN


def _compiled(*terms: int) -> Machine:
    name = "lingerx._native"
    try:
        native: Any = import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name != name:
            raise
        pytest.skip("portable build: lingerx._native is not installed")
    subject: Machine = native.Rehearsal(*terms)
    return subject


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_an_engine_that_answers_what_it_was_asked(choose: Random) -> None:
    terms = random_terms(choose)
    watch = Watch()
    for told in walk(Interpreted(*terms), choose, terms.now):
        watch.check(told)


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_an_engine_that_talks_nonsense(choose: Random) -> None:
    terms = random_terms(choose)
    watch = Watch()
    for told in walk(Interpreted(*terms), choose, terms.now, nonsense=0.2):
        watch.check(told)


@pytest.mark.parametrize("seed", range(20))
def test_every_closing_ends(seed: int) -> None:
    choose = Random(seed)
    for _ in range(50):
        terms = random_terms(choose)
        watch = Watch()
        last = ""
        for told in walk(Interpreted(*terms), choose, terms.now, moves=ENOUGH_TURNS):
            watch.check(told)
            last = told.action
        assert last in ENDS, terms


def test_the_portable_engine_s_record_has_a_place_for_everything() -> None:
    record = import_module("lingerx._portable").Closing
    assert vars(Interpreted(*drain()).record).keys() <= set(record.__slots__)


def test_the_two_machines_keep_the_same_record() -> None:
    terms = random_terms(Random(1))
    assert _compiled(*terms).state() == Interpreted(*terms).state()


class Pair:
    """Both machines as one; they must agree on every step."""

    def __init__(self, *terms: int) -> None:
        self.compiled = _compiled(*terms)
        self.interpreted = Interpreted(*terms)

    def advance(self, seen: int, amount: int, now: int, never_sent: int = -1) -> int:
        action = self.interpreted.advance(seen, amount, now, never_sent)
        assert ACTIONS[self.compiled.advance(seen, amount, now, never_sent)] == ACTIONS[action]
        return action

    def state(self) -> dict[str, int]:
        state = self.interpreted.state()
        assert self.compiled.state() == state
        return state


@pytest.mark.slow
@pytest.mark.parametrize("nonsense", [0.0, 0.1], ids=["answers", "nonsense"])
def test_the_two_machines_agree(nonsense: float) -> None:
    choose = Random(f"lingerx {nonsense}")
    ends = dict.fromkeys(ENDS, 0)
    for _ in range(SEQUENCES // 2):
        terms = random_terms(choose)
        *_, last = walk(Pair(*terms), choose, terms.now, moves=25, nonsense=nonsense)
        if last.action in ENDS:
            ends[last.action] += 1
    assert all(ends.values()), f"the random engines never came to some of the ends: {ends}"
