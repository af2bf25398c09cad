"""The policies as values, and the sentences that wrong arguments get. No sockets."""

from __future__ import annotations

import copy
import math
import pickle
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

import lingerx
from lingerx import Abort, Background, Drain, Flush, KernelLinger, Policy, policy_from_linger

KINDS: tuple[type[Policy], ...] = (Background, Abort, KernelLinger, Flush, Drain)

SAMPLES: tuple[Policy, ...] = (
    Background(),
    Background(user_timeout=20.0),
    Abort(),
    KernelLinger(3),
    Flush(),
    Flush(0.25, max_bytes=10, on_timeout="abort", user_timeout=5, reset_after_ack=True),
    Drain(),
    Drain(10, idle_timeout=1.5, max_bytes=0, on_timeout="abort", user_timeout=0.001),
)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """Overrides the one for all: nothing is opened here, and looking for it would take longer than the tests."""


@pytest.mark.parametrize("policy", SAMPLES, ids=repr)
class TestValues:
    def test_equal_to_itself_made_again(self, policy: Policy) -> None:
        assert eval(repr(policy), vars(lingerx)) == policy

    def test_equal_to_no_other(self, policy: Policy) -> None:
        assert [other for other in SAMPLES if other == policy] == [policy]
        assert policy != repr(policy)

    def test_equal_ones_have_one_hash(self, policy: Policy) -> None:
        again = eval(repr(policy), vars(lingerx))
        assert {policy: "found"}[again] == "found"
        assert len({policy, again, *SAMPLES}) == len(SAMPLES)

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_pickled_and_back(self, policy: Policy, protocol: int) -> None:
        again = pickle.loads(pickle.dumps(policy, protocol))
        assert (type(again), again, repr(again)) == (type(policy), policy, repr(policy))

    def test_copied(self, policy: Policy) -> None:
        assert copy.copy(policy) == policy
        assert copy.deepcopy([policy]) == [policy]

    def test_nothing_can_be_changed(self, policy: Policy) -> None:
        for name in (*policy.__match_args__, "_terms", "anything"):
            with pytest.raises(AttributeError, match=f"make another {type(policy).__name__}"):
                setattr(policy, name, 1)
            with pytest.raises(AttributeError, match="cannot be changed"):
                delattr(policy, name)
        assert policy in SAMPLES

    def test_it_has_no_dict(self, policy: Policy) -> None:
        assert not hasattr(policy, "__dict__")

    def test_its_terms_are_plain_integers(self, policy: Policy) -> None:
        assert [type(term) for term in policy._terms] == [int] * 7

    def test_its_attributes_are_its_arguments(self, policy: Policy) -> None:
        arguments = {name: getattr(policy, name) for name in policy.__match_args__}
        assert type(policy)(**arguments) == policy


def test_defaults() -> None:
    assert Background().user_timeout is None
    assert (Flush().timeout, Flush().max_bytes, Flush().on_timeout) == (3.0, None, "background")
    assert (Flush().user_timeout, Flush().reset_after_ack) == (None, False)
    assert (Drain().timeout, Drain().idle_timeout, Drain().max_bytes) == (3.0, None, None)
    assert (Drain().on_timeout, Drain().user_timeout) == ("background", None)


def test_how_they_print() -> None:
    assert [repr(policy) for policy in (Abort(), KernelLinger(3), Background(1.5))] == [
        "Abort()",
        "KernelLinger(seconds=3)",
        "Background(user_timeout=1.5)",
    ]
    assert repr(Drain(2)) == (
        "Drain(timeout=2.0, idle_timeout=None, max_bytes=None, on_timeout='background', user_timeout=None)"
    )


def test_the_first_argument_may_be_given_by_place() -> None:
    assert Drain(2) == Drain(timeout=2.0)
    assert Flush(2) == Flush(timeout=2.0)
    assert Background(4) == Background(user_timeout=4)
    assert KernelLinger(4) == KernelLinger(seconds=4)


@pytest.mark.parametrize("kind", [Drain, Flush])
def test_the_others_only_by_name(kind: Any) -> None:
    with pytest.raises(TypeError, match="positional"):
        kind(3.0, 1.0)


def test_matching() -> None:
    def describe(policy: Policy) -> str:
        match policy:
            case Drain(timeout, idle):
                return f"drain {timeout} {idle}"
            case Flush(reset_after_ack=True):
                return "flush, no TIME_WAIT"
            case KernelLinger(seconds):
                return f"kernel {seconds}"
            case Background(None):
                return "background"
            case Abort():
                return "abort"
            case _:
                return "other"

    policies = (Drain(1, idle_timeout=2), Flush(reset_after_ack=True), KernelLinger(7), Background(), Abort(), Flush())
    assert [describe(policy) for policy in policies] == [
        "drain 1.0 2",
        "flush, no TIME_WAIT",
        "kernel 7",
        "background",
        "abort",
        "other",
    ]


@pytest.mark.parametrize("value", [0, 0.0, 1, 0.05, Fraction(1, 20), Decimal("0.05"), 1e9, 10**9])
def test_numbers_that_are_seconds(value: Any) -> None:
    assert Drain(value).timeout == float(value)
    assert Drain(value)._terms[1] == round(float(value) * 10**9)
    assert Flush(timeout=value)._terms[1] == Drain(timeout=value)._terms[1]
    assert Drain(idle_timeout=value)._terms[2] == round(float(value) * 10**9)


def test_fifty_milliseconds_are_fifty_milliseconds() -> None:
    assert Drain(0.05)._terms[1] == 50_000_000
    assert Drain(0.1 + 0.2)._terms[1] == 300_000_000


def test_a_user_timeout_is_rounded_up_to_milliseconds() -> None:
    # TCP_USER_TIMEOUT 0 means the system's own: far more than what was asked for.
    assert [Background(value)._terms[5] for value in (1e-9, 0.001, 0.0011, 2)] == [1, 1, 2, 2000]


NO_NUMBERS: tuple[Any, ...] = (None, True, False, "3", b"3", [], object(), 3j)
NOT_WITHIN = (-1, -0.001, math.nan, math.inf, -math.inf, 1e10)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_a_timeout_that_is_no_number(value: Any) -> None:
    for kind in (Drain, Flush):
        with pytest.raises(TypeError, match=r"timeout is a number of seconds, such as 3\.0; got"):
            kind(value)


@pytest.mark.parametrize("value", NOT_WITHIN, ids=repr)
def test_a_timeout_that_is_no_length_of_time(value: float) -> None:
    for kind in (Drain, Flush):
        with pytest.raises(ValueError, match="timeout is a number of seconds from 0 to 1000000000; got"):
            kind(value)


def test_a_timeout_that_no_float_can_hold() -> None:
    for kind in (Drain, Flush):
        with pytest.raises(ValueError, match="timeout is a number of seconds from 0 to 1000000000; got"):
            kind(10**400)


@pytest.mark.parametrize("value", NO_NUMBERS[1:], ids=repr)
def test_other_times_that_are_no_numbers(value: Any) -> None:
    with pytest.raises(TypeError, match=r"idle_timeout is a number of seconds, .* or None for no idle limit; got"):
        Drain(idle_timeout=value)
    for kind in (Background, Drain, Flush):
        with pytest.raises(TypeError, match=r"user_timeout is a number of seconds, .* or None for the system's own"):
            kind(user_timeout=value)


@pytest.mark.parametrize("value", NOT_WITHIN, ids=repr)
def test_other_times_that_are_no_lengths_of_time(value: float) -> None:
    with pytest.raises(ValueError, match=r"idle_timeout is a number of seconds from 0 .* or None for no idle limit"):
        Drain(idle_timeout=value)
    for kind in (Background, Drain, Flush):
        with pytest.raises(ValueError, match=r"user_timeout is .* or None for the system's own"):
            kind(user_timeout=value)


@pytest.mark.parametrize("value", [0, 0.0, 2_147_484], ids=repr)
def test_a_user_timeout_that_the_kernel_cannot_hold(value: float) -> None:
    with pytest.raises(ValueError, match="user_timeout is more than 0 and at most 2147483 seconds"):
        Background(value)


@pytest.mark.parametrize("value", [True, 1.0, "10", b"10", math.nan], ids=repr)
def test_a_byte_limit_that_is_no_whole_number(value: Any) -> None:
    for kind in (Drain, Flush):
        with pytest.raises(TypeError, match="max_bytes is a whole number of bytes, or None for no limit; got"):
            kind(max_bytes=value)


@pytest.mark.parametrize("value", [-1, 2**63])
def test_a_byte_limit_out_of_range(value: int) -> None:
    for kind in (Drain, Flush):
        with pytest.raises(ValueError, match=r"max_bytes is 0 or more \(below 2\*\*63\), or None"):
            kind(max_bytes=value)


@pytest.mark.parametrize("value", ["linger", "ABORT", "", None, True, b"abort", Abort(), []], ids=repr)
def test_an_unknown_on_timeout(value: Any) -> None:
    for kind in (Drain, Flush):
        with pytest.raises(ValueError, match="on_timeout is 'background' or 'abort'; got"):
            kind(on_timeout=value)


@pytest.mark.parametrize("value", [0, 1, None, "yes"], ids=repr)
def test_a_reset_after_ack_that_is_no_bool(value: Any) -> None:
    with pytest.raises(TypeError, match="reset_after_ack is True or False; got"):
        Flush(reset_after_ack=value)


@pytest.mark.parametrize("value", [0, 0.0, -0.0], ids=repr)
def test_a_kernel_linger_of_nothing_points_to_abort(value: Any) -> None:
    with pytest.raises(ValueError, match=r"destroys data and sends RST: if that is meant, use Abort\(\)"):
        KernelLinger(value)


@pytest.mark.parametrize("value", [-1, 1.5, 0.5, 32768, 40000, math.nan, math.inf, -math.inf], ids=repr)
def test_a_kernel_linger_that_no_kernel_takes(value: Any) -> None:
    with pytest.raises(ValueError, match=r"whole number from 1 to 32767 .*Flush\(timeout=\.\.\.\) takes fractions"):
        KernelLinger(value)


@pytest.mark.parametrize("value", [None, True, "3", 3j, []], ids=repr)
def test_a_kernel_linger_that_is_no_number(value: Any) -> None:
    with pytest.raises(TypeError, match="seconds is a whole number, such as 3; got"):
        KernelLinger(value)


def test_a_whole_float_is_a_whole_number() -> None:
    assert KernelLinger(3.0) == KernelLinger(3)  # type: ignore[arg-type]
    assert repr(KernelLinger(3.0)) == "KernelLinger(seconds=3)"  # type: ignore[arg-type]
    assert KernelLinger(32767).seconds == 32767


def test_the_base_is_no_policy() -> None:
    with pytest.raises(TypeError, match="Background, Abort, KernelLinger, Flush, Drain; Policy is only their base"):
        Policy()


@pytest.mark.parametrize("kind", [Policy, *KINDS])
def test_none_of_them_can_be_subclassed(kind: type[Policy]) -> None:
    with pytest.raises(TypeError, match="closed set, known to the engines"):
        type("Mine", (kind,), {})


@pytest.mark.parametrize("kind", [Background, Abort])
def test_a_timeout_for_those_that_never_wait(kind: Any) -> None:
    with pytest.raises(TypeError, match="timeout"):
        kind(timeout=3.0)


@pytest.mark.parametrize(
    ("seconds", "policy"),
    [(-1, Background()), (-100, Background()), (0, Abort()), (1, KernelLinger(1)), (32767, KernelLinger(32767))],
)
def test_policy_from_linger(seconds: int, policy: Policy) -> None:
    assert policy_from_linger(seconds) == policy


@pytest.mark.parametrize("value", [None, True, False, 3.0, 0.0, "3"], ids=repr)
def test_policy_from_linger_of_no_whole_number(value: Any) -> None:
    with pytest.raises(TypeError, match="seconds is a whole number: below 0 off, 0 reset, above 0 seconds; got"):
        policy_from_linger(value)


def test_policy_from_linger_beyond_every_kernel() -> None:
    with pytest.raises(ValueError, match="from 1 to 32767"):
        policy_from_linger(32768)
