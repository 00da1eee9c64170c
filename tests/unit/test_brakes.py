"""The brakes of a lane: the retry budget and the breaker, on a clock of the test's own."""

from __future__ import annotations

import pytest

from schemas.attempts import Signal
from schemas.brakes import Breaker, RetryBudget


def test_retries_empty_the_budget_and_successes_fill_it() -> None:
    budget = RetryBudget(capacity=20, trickle_per_s=0.5, _level=20)
    assert [budget.take(Signal.RATE_LIMITED, 0) for _ in range(4)] == [0, 0, 0, 0]
    assert budget.take(Signal.RATE_LIMITED, 0) == 10  # 5 are missing, half a one comes each second
    for _ in range(5):
        budget.succeed()
    assert budget.take(Signal.RATE_LIMITED, 0) == 0


def test_a_retry_that_may_be_billed_twice_takes_twice_as_much() -> None:
    budget = RetryBudget(capacity=20, _level=20)
    assert [budget.take(Signal.LOST, 0) for _ in range(3)] == [0, 0, 10]


def test_what_a_storm_turned_away_comes_back_as_fast_as_it_is_answered() -> None:
    budget = RetryBudget(capacity=20, _level=20)
    for _ in range(1000):
        assert budget.take(Signal.RATE_LIMITED, 0) == 0
        budget.succeed(is_answered_retry=True)
    for _ in range(3):
        assert budget.take(Signal.LOST, 0) == 0
        budget.succeed(is_answered_retry=True)  # half of it: what was lost may be paid twice
    assert budget.take(Signal.LOST, 0) == 5


def test_a_retry_that_comes_to_nothing_gives_back_no_more_than_any_reply() -> None:
    budget, made = RetryBudget(capacity=20, _level=20), 0
    while budget.take(Signal.INTERRUPTED, 0) == 0:
        budget.succeed()  # it was billed, and is no answer
        made += 1
    assert made == 4


def test_the_trickle_lets_a_lane_find_out_that_the_provider_is_back() -> None:
    budget = RetryBudget(capacity=20, _level=0)
    assert budget.take(Signal.UNAVAILABLE, 0) == 5
    assert budget.take(Signal.UNAVAILABLE, 4) == 1
    assert budget.take(Signal.UNAVAILABLE, 5) == 0


def test_the_budget_never_holds_more_than_its_capacity() -> None:
    budget = RetryBudget(capacity=10, _level=10)
    for _ in range(100):
        budget.succeed()
    assert [budget.take(Signal.RATE_LIMITED, 1e6) == 0 for _ in range(3)] == [True, True, False]


def test_one_failure_after_another_for_thirty_seconds_opens_the_breaker() -> None:
    breaker = Breaker()
    for second in range(30):
        breaker.note(Signal.NOT_SENT, second)
        assert breaker.wait_s(second) == 0
    breaker.note(Signal.NOT_SENT, 30)
    assert breaker.wait_s(30) == 5
    assert breaker.reason(31) == "the provider has not answered for 31 s"


def test_a_reply_in_between_keeps_the_breaker_closed() -> None:
    breaker = Breaker()
    for second in range(0, 100, 10):
        breaker.note(Signal.UNAVAILABLE, second)
        breaker.note(Signal.ANSWERED, second + 5)
    assert breaker.reason(100) is None


@pytest.mark.parametrize("signal", [Signal.RATE_LIMITED, Signal.REJECTED, Signal.INTERRUPTED])
def test_whoever_objects_is_there(signal: Signal) -> None:
    breaker = Breaker()
    breaker.note(Signal.UNAVAILABLE, 0)
    for second in range(1, 1000):
        breaker.note(signal if second % 60 else Signal.UNAVAILABLE, second)
        assert breaker.wait_s(second) == 0
    assert breaker.verdict(1000) != "provider_down"


def test_an_objection_closes_an_open_breaker() -> None:
    breaker = Breaker()
    for second in (0, 40):
        breaker.note(Signal.UNAVAILABLE, second)
    assert breaker.wait_s(40) > 0
    breaker.note(Signal.RATE_LIMITED, 45)
    assert breaker.wait_s(45) == 0


def test_a_malformed_reply_is_no_proof_that_the_provider_is_there() -> None:
    breaker = Breaker()
    for second in (0, 31):
        breaker.note(Signal.UNAVAILABLE, second)
        breaker.note(Signal.MALFORMED, second)
    assert breaker.reason(31) is not None


def test_an_objection_does_not_close_a_breaker_that_malformed_replies_opened() -> None:
    breaker = Breaker()
    for _ in range(5):
        breaker.note(Signal.MALFORMED, 10)
    breaker.note(Signal.RATE_LIMITED, 15)
    assert breaker.reason(15) == "the provider has not answered for 5 s"


def test_an_open_breaker_lets_one_probe_through_at_a_time_and_closes_on_its_answer() -> None:
    breaker = Breaker()
    breaker.note(Signal.NOT_SENT, 0)
    breaker.note(Signal.NOT_SENT, 40)
    assert breaker.wait_s(44) == 1
    assert breaker.wait_s(45) == 0
    assert breaker.wait_s(45) == 5
    breaker.note(Signal.ANSWERED, 46)
    assert (breaker.wait_s(46), breaker.reason(46)) == (0, None)


def test_five_malformed_replies_in_a_minute_open_the_breaker_and_slower_ones_do_not() -> None:
    breaker = Breaker()
    for second in range(0, 100, 20):
        breaker.note(Signal.MALFORMED, second)
        assert breaker.reason(second) is None
    breaker.note(Signal.MALFORMED, 81)
    assert breaker.reason(81) is None
    breaker.note(Signal.MALFORMED, 82)  # the fifth since 40
    assert breaker.reason(82) is not None


def test_a_breaker_that_malformed_replies_opened_closes_for_good_on_an_answer() -> None:
    breaker = Breaker()
    for _ in range(5):
        breaker.note(Signal.MALFORMED, 10)
    assert breaker.wait_s(10) > 0
    breaker.note(Signal.ANSWERED, 15)
    assert breaker.reason(15) is None
    breaker.note(Signal.ANSWERED, 16)
    assert (breaker.reason(16), breaker.wait_s(16)) == (None, 0)


def test_a_breaker_open_for_too_long_stops_the_run() -> None:
    breaker = Breaker()
    breaker.note(Signal.NOT_SENT, 0)
    breaker.note(Signal.NOT_SENT, 30)
    assert breaker.verdict(630) is None
    assert breaker.verdict(631) == "provider_down"


def test_twenty_rejections_in_a_row_stop_the_run() -> None:
    breaker = Breaker()
    for _ in range(19):
        breaker.note(Signal.REJECTED, 0)
    breaker.note(Signal.RATE_LIMITED, 0)  # says nothing about our requests
    assert breaker.verdict(0) is None
    breaker.note(Signal.REJECTED, 0)
    assert breaker.verdict(0) == "requests_rejected"


def test_an_answer_breaks_the_row_of_rejections() -> None:
    breaker = Breaker()
    for _ in range(19):
        breaker.note(Signal.REJECTED, 0)
    breaker.note(Signal.ANSWERED, 0)
    breaker.note(Signal.REJECTED, 0)
    assert breaker.verdict(0) is None


@pytest.mark.parametrize(("rejected", "stops"), [(2, False), (3, True)])
def test_more_than_one_rejection_in_a_hundred_of_at_least_two_hundred_stops_the_run(
    rejected: int, stops: bool
) -> None:
    breaker = Breaker()
    for number in range(200):
        breaker.note(Signal.REJECTED if number < rejected else Signal.ANSWERED, 0)
        assert number == 199 or breaker.verdict(0) is None
    assert (breaker.verdict(0) == "requests_rejected") is stops


@pytest.mark.parametrize("signal", [Signal.UNAUTHORISED, Signal.NO_BALANCE])
def test_a_refusal_of_the_account_stops_the_run_at_once(signal: Signal) -> None:
    breaker = Breaker()
    breaker.note(Signal.ANSWERED, 0.0)
    assert breaker.verdict(0.0) is None
    breaker.note(signal, 1.0)
    breaker.note(Signal.ANSWERED, 1.1)  # it was on its way before
    assert breaker.verdict(1.2) == signal.value
