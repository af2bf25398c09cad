"""Reports and outcomes as values. No sockets."""

from __future__ import annotations

import copy
import errno
import math
import pickle
from typing import Any

import pytest

import lingerx
from lingerx import Outcome, Report

FIELDS = ("outcome", "drained", "unacked", "elapsed", "error")

SAMPLES = (
    Report(Outcome.PEER_CLOSED, 10, 0, 0.25),
    Report(Outcome.TIMED_OUT, 10, 7, 3.0),
    Report(Outcome.TIMED_OUT, 10, 7, 3.0, lost=True),
    Report(Outcome.PEER_RESET, 0, 7, 0.001, errno.ECONNRESET, lost=True),
    Report(Outcome.BACKGROUND),
)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """Overrides the one for all: nothing is opened here, and looking for it would take longer than the tests."""


def test_the_twelve_outcomes() -> None:
    assert [outcome.name for outcome in Outcome] == [
        "PEER_CLOSED",
        "ACKED",
        "BACKGROUND",
        "ABORTED",
        "PEER_RESET",
        "TIMED_OUT",
        "IDLE",
        "BYTE_LIMIT",
        "SHED",
        "NOT_CONNECTED",
        "ALREADY_CLOSED",
        "FAILED",
    ]


@pytest.mark.parametrize("outcome", Outcome, ids=lambda outcome: outcome.name)
def test_an_outcome_as_a_value(outcome: Outcome) -> None:
    assert outcome.value == outcome.name.lower()
    assert Outcome(outcome.value) is Outcome[outcome.name] is outcome
    assert pickle.loads(pickle.dumps(outcome)) is copy.deepcopy(outcome) is outcome
    assert len({outcome, *Outcome}) == len(Outcome)


@pytest.mark.parametrize("report", SAMPLES, ids=lambda report: f"{report.outcome.name}-{report.delivered}")
class TestValues:
    def test_unpacks_into_its_five_fields(self, report: Report) -> None:
        outcome, drained, unacked, elapsed, error = report
        assert [outcome, drained, unacked, elapsed, error] == [getattr(report, name) for name in FIELDS]
        assert len(report) == 5
        assert Report.__match_args__ == FIELDS

    def test_equal_to_no_other(self, report: Report) -> None:
        assert [other for other in SAMPLES if other == report] == [report]
        assert report != tuple(report)
        assert report != report.outcome

    def test_equal_ones_have_one_hash(self, report: Report) -> None:
        again = Report(*report, lost=report.delivered is False)
        assert {report: "found"}[again] == "found"
        assert len({again, *SAMPLES}) == len(SAMPLES)

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_pickled_and_back(self, report: Report, protocol: int) -> None:
        again = pickle.loads(pickle.dumps(report, protocol))
        assert (again, again.delivered, repr(again)) == (report, report.delivered, repr(report))

    def test_copied(self, report: Report) -> None:
        assert copy.copy(report) == report
        assert copy.deepcopy([report]) == [report]

    def test_nothing_can_be_changed(self, report: Report) -> None:
        for name in (*FIELDS, "delivered", "anything"):
            with pytest.raises(AttributeError):
                setattr(report, name, 1)
            with pytest.raises(AttributeError):
                delattr(report, name)

    def test_prints_all_it_knows(self, report: Report) -> None:
        text = repr(report)
        assert text.startswith(f"Report(outcome={report.outcome}, drained={report.drained}, unacked={report.unacked}, ")
        assert text.endswith(f", error={report.error}, delivered={report.delivered})")
        assert str(report) == text


@pytest.mark.parametrize(
    ("unacked", "lost", "delivered"),
    [
        (0, False, True),
        (0, True, True),  # reset or dropped, but nothing was missing
        (1, False, None),  # left to the kernel
        (1, True, False),
        (None, False, None),
        (None, True, False),
    ],
)
def test_delivered(unacked: int | None, lost: bool, delivered: bool | None) -> None:
    for outcome in Outcome:
        assert Report(outcome, 5, unacked, lost=lost).delivered is delivered


def test_what_is_not_said_is_unknown() -> None:
    report = Report(Outcome.BACKGROUND)
    assert list(report) == [Outcome.BACKGROUND, 0, None, 0.0, None]
    assert report.delivered is None


def test_by_name() -> None:
    report = Report(outcome=Outcome.FAILED, drained=1, unacked=2, elapsed=0.5, error=errno.EIO, lost=True)
    assert list(report) == [Outcome.FAILED, 1, 2, 0.5, errno.EIO]


def test_types_of_the_fields() -> None:
    assert [type(field) for field in SAMPLES[3]] == [Outcome, int, int, float, int]
    assert type(SAMPLES[3].delivered) is bool


@pytest.mark.parametrize("elapsed", [0.0, 1e-9, 0.1, 3.000000001, 1e9])
def test_elapsed_keeps_its_nanoseconds(elapsed: float) -> None:
    assert math.isclose(Report(Outcome.ACKED, elapsed=elapsed).elapsed, elapsed, abs_tol=5e-10, rel_tol=1e-15)


@pytest.mark.parametrize("count", [2**31, 2**62])
def test_counts_beyond_an_int(count: int) -> None:
    report = Report(Outcome.ACKED, drained=count, unacked=count)
    assert (report.drained, report.unacked) == (count, count)


def test_matching() -> None:
    def advise(report: Report) -> str:
        match report:
            case Report(delivered=True):
                return "arrived"
            case Report(Outcome.PEER_RESET, _, unacked):
                return f"reset, {unacked} missing"
            case Report(outcome=Outcome.TIMED_OUT | Outcome.IDLE):
                return "too slow"
            case _:
                return "who knows"

    assert [advise(report) for report in SAMPLES] == [
        "arrived",
        "too slow",
        "too slow",
        "reset, 7 missing",
        "who knows",
    ]


@pytest.mark.parametrize("value", ["acked", 1, None, True, Outcome], ids=repr)
def test_an_outcome_that_is_none(value: Any) -> None:
    with pytest.raises(TypeError, match=r"outcome is a lingerx\.Outcome; got"):
        Report(value)


def test_lost_only_by_name() -> None:
    make: Any = Report
    with pytest.raises(TypeError, match="positional"):
        make(Outcome.ACKED, 0, 0, 0.0, None, True)


def test_they_belong_to_the_package() -> None:
    assert lingerx.Report is Report
    assert lingerx.Outcome is Outcome
