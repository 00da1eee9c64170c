"""Which partitions a backfill runs, and what that may cost: decided from evidence alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from schemas.backfills import Covered, Now, Partition, Standing, State, is_due, price, refuse_dear, split, stand
from schemas.documents import Duplicate, InputFile, Manifest, Shard
from schemas.errors import ConfigurationError
from schemas.estimates import Size, estimate
from schemas.jobs import When
from schemas.money import Currency, Money
from schemas.pricing import load_price_book
from schemas.requests import BackfillRequest
from schemas.work_hours import Asked
from tasks import report
from tasks.backfills import Plan
from tasks.ledger.spend import BackfillRun, Partitions, by_partition
from tasks.live import Pace as Rate
from tasks.live import line
from tests.ledgers import JOB
from tests.unit.test_report import PROGRESS, shown

OFF_PEAK, PEAK = datetime(2026, 11, 25, 5, tzinfo=UTC), datetime(2026, 11, 25, 2, tzinfo=UTC)
FILES = (
    InputFile(0, "t/day=1/a.parquet", 100, "a" * 64, 12, "1"),
    InputFile(1, "t/day=1/b.parquet", 90, "b" * 64, 8, "1"),
)
DAY = Partition("1", FILES, duplicates=2)
SELECTION = {"path": "t/**", "id": "id", "text": "text", "filter": [], "partitions": ["1"], "limit": None}
NOW = Now("sha256:1", {"ladder": ["flash", "pro"]}, SELECTION | {"partitions": []}, {"flash": "v1", "pro": "p1"})


def cover(file: InputFile, **changes: Any) -> Covered:
    usual = Covered(
        path=file.path,
        run_id=7,
        size=file.size,
        sha256=file.sha256,
        rows=file.rows,
        prompt_version=NOW.prompt_version,
        policy=NOW.policy,
        selection=SELECTION,
        backfill_id=None,
        is_at_work=False,
        ended=file.rows,
        dead=0,
        models={"flash": {"v1": file.rows - 1}, "pro": {"p1": 1}},
    )
    return replace(usual, **changes)


def covered(**changes: Any) -> Mapping[str, Covered]:
    """The ledger's word on both files, with something else about the second."""
    first, second = FILES
    return {first.path: cover(first), second.path: cover(second, **changes)}


STATES: dict[str, tuple[Partition, Mapping[str, Covered], State, int]] = {
    "no file is known": (DAY, {}, State.NEVER_RUN, 18),
    "all of it ended": (DAY, covered(), State.DONE, 0),
    "in a run of the whole input": (DAY, covered(selection=SELECTION | {"partitions": []}), State.DONE, 0),
    "some have not ended": (DAY, covered(ended=3), State.UNFINISHED, 5),
    "another run's dead are tried again": (
        DAY,
        covered(ended=3, dead=2, selection=SELECTION | {"partitions": []}),
        State.UNFINISHED,
        7,
    ),
    "a run of the first few": (
        DAY,
        covered(rows=3, ended=3, selection=SELECTION | {"limit": 15}),
        State.UNFINISHED,
        5,
    ),
    "a file is new": (DAY, {FILES[0].path: cover(FILES[0])}, State.CHANGED_TEXT, 18),
    "a file has another size": (DAY, covered(size=91), State.CHANGED_TEXT, 18),
    "a file has other bytes": (DAY, covered(sha256="c" * 64), State.CHANGED_TEXT, 18),
    "other rows pass": (DAY, covered(rows=7, ended=7), State.CHANGED_TEXT, 18),
    "another column is read": (DAY, covered(selection=SELECTION | {"text": "body"}), State.CHANGED_TEXT, 18),
    "another prompt": (DAY, covered(prompt_version="sha256:0"), State.CHANGED_PROMPT, 18),
    "another ladder": (DAY, covered(policy={"ladder": ["pro"]}), State.CHANGED_PROMPT, 18),
    "another prompt, and not finished": (DAY, covered(prompt_version="sha256:0", ended=1), State.CHANGED_PROMPT, 18),
    "another model served some": (
        DAY,
        covered(models={"flash": {"v0": 3, "v1": 4}, "pro": {"p1": 1}}),
        State.CHANGED_MODEL,
        3,
    ),
    "some are dead": (DAY, covered(dead=2), State.DEAD_LETTERS, 2),
    "there is nothing in it": (Partition("1", (replace(FILES[0], rows=0),)), {}, State.EMPTY, 0),
}


@pytest.mark.parametrize("name", STATES)
def test_a_partition_s_state_and_what_a_run_of_it_would_send(name: str) -> None:
    partition, known, state, to_send = STATES[name]
    found = stand(partition, known, NOW)
    assert (found.state, found.to_send) == (state, to_send)
    assert found.documents == partition.documents


def test_a_tier_that_never_served_anything_since_the_prompt_changed_has_no_other_model() -> None:
    assert stand(DAY, covered(), replace(NOW, served={})).state is State.DONE


@pytest.mark.parametrize(
    ("flags", "due"),
    [
        ({}, {State.NEVER_RUN, State.UNFINISHED}),
        ({"changed": True}, set(State) - {State.EMPTY, State.DONE, State.DEAD_LETTERS}),
        ({"dead": True}, {State.NEVER_RUN, State.UNFINISHED, State.DEAD_LETTERS}),
        ({"changed": True, "dead": True}, set(State) - {State.EMPTY, State.DONE}),
    ],
)
def test_what_is_due(flags: dict[str, bool], due: set[State]) -> None:
    asked = {"changed": False, "dead": False} | flags
    assert {state for state in State if is_due(Standing("1", state, 20), **asked)} == due
    assert not any(is_due(Standing("1", state, 20, at_work=7), **asked) for state in State)
    assert all(is_due(Standing("1", state, 20, is_incomplete=True), **asked) for state in State)


def test_a_run_at_work_is_named() -> None:
    standing = stand(DAY, covered(ended=3, is_at_work=True, backfill_id=4), NOW)
    assert (standing.at_work, standing.backfill_id) == (7, 4)


@pytest.mark.parametrize(("ended", "is_incomplete"), [(8, False), (1, True)])
def test_a_run_that_did_not_finish_is_incomplete_whatever_changed_since(ended: int, is_incomplete: bool) -> None:
    standing = stand(DAY, covered(prompt_version="sha256:0", ended=ended), NOW)
    assert (standing.state, standing.is_incomplete) == (State.CHANGED_PROMPT, is_incomplete)


def test_an_input_is_split_into_its_partitions_with_their_duplicates() -> None:
    files = (*FILES, InputFile(2, "t/day=2/a.parquet", 10, "d" * 64, 5, "2"))
    shards = (Shard(0, 0, 0, 12, 0, 12), Shard(1, 1, 0, 8, 12, 8), Shard(2, 2, 0, 3, 20, 3), Shard(3, 2, 3, 2, 23, 2))
    copies = tuple(Duplicate(number, 0, True) for number in (11, 12, 22, 23, 24))
    named = {file.path: str(file.partition) for file in files}
    # Of the second day's three copies of a document of the first, one is the original in a run of that day.
    assert split(Manifest(files, shards, copies), named) == [DAY, Partition("2", files[2:], duplicates=2)]


SAMPLE = Size(25, 25, 10, 4_000)
DUE = [Standing("1", State.NEVER_RUN, 20, to_send=18), Standing("2", State.DEAD_LETTERS, 500, dead=3, to_send=3)]


def test_a_price_is_the_sum_of_the_runs_and_counts_what_is_sent() -> None:
    book = load_price_book()
    found = price(JOB, DUE, SAMPLE, book, PEAK, None)
    each = [estimate(JOB, replace(SAMPLE, documents=n, to_send=n), book, Asked(PEAK)) for n in (18, 3)]
    assert found.by_partition == {"1": each[0].cost, "2": each[1].cost}
    assert found.cost.pico == sum(one.cost.pico for one in each) > found.low.pico
    assert found.high.pico == sum(one.high.pico for one in each)
    assert found.off_peak is not None
    assert found.off_peak.pico * 2 == found.cost.pico
    assert found.expected(When.OFF_PEAK) == found.off_peak
    assert found.expected(When.NOW) == found.cost


def test_nothing_costs_nothing() -> None:
    found = price(JOB, [], SAMPLE, load_price_book(), OFF_PEAK, None)
    assert (found.low.pico, found.cost.pico, found.high.pico, found.off_peak) == (0, 0, 0, None)


def usd(pico: int) -> Money:
    return Money(pico, Currency.USD)


def test_what_is_dearer_than_a_limit_is_refused_with_both_sums() -> None:
    refuse_dear(usd(10**12), usd(10**12), usd(10**12))
    with pytest.raises(ConfigurationError, match=r"\$1\.10 is expected and --if-cheaper-than says \$1\.00"):
        refuse_dear(usd(11 * 10**11), usd(10**12), usd(10**13))
    with pytest.raises(ConfigurationError, match=r"\$1\.10 is expected and the budget has \$1\.00 left"):
        refuse_dear(usd(11 * 10**11), None, usd(10**12))
    with pytest.raises(ConfigurationError, match="never converted"):
        refuse_dear(usd(1), Money(10**12, Currency.CNY), usd(10**12))


def test_the_same_partitions_are_the_same_backfill_however_many_work_on_it() -> None:
    one = BackfillRequest(job="x", partitions=("a", "b"), parallel=3, budget="2 USD")
    assert one.identity() == BackfillRequest(job="x", partitions=("b", "a")).identity()
    assert one.identity() != BackfillRequest(job="x", partitions=("a", "b"), dead=True).identity()


def test_a_plan_says_how_each_partition_stands_and_how_to_run_what_is_left_out() -> None:
    standings = (*DUE, Standing("3", State.CHANGED_TEXT, 7), Standing("4", State.UNFINISHED, 7, ended=3, at_work=9))
    found = Plan(
        job=JOB,
        request=BackfillRequest(job="colours", dead=True),
        standings=standings,
        due=tuple(DUE),
        price=price(JOB, DUE, SAMPLE, load_price_book(), PEAK, None),
        room=JOB.budget,
        unfinished=None,
        over=None,
        gone=("5",),
        now=NOW,
    )
    text = shown(report.plan_table(found))
    for told in (
        "2 of 4 partitions are due",
        "dead letters (3)",
        "unfinished (3 of 7), at work in run 9",
        "1 changed since they were run: --changed runs them again",
        "not in the input any more, and left out: 5",
        "from 12:00 Beijing (04:00 UTC)",
    ):
        assert told in text
    said = report.plan_json(found)
    assert (said["due"], said["to_send"], said["documents"]) == (["1", "2"], 21, 520)
    assert said["cost_pico"] == sum(each["cost_pico"] for each in said["partitions"]) == found.expected.pico


RUN = BackfillRun(1, "1", "superseded", None, 9, 2, 0, 0, 0, 3, 30, 0, "USD", True)


def test_a_partition_came_to_what_its_newest_run_says_and_costs_what_all_of_them_did() -> None:
    again = replace(RUN, run=3, state="done", results=8, reused=2, dead_letters=1, attempts=7, cost_pico=70)
    other = replace(again, run=2, partition="2", unknown_pico=5)
    spent = by_partition([RUN, other, again])
    assert [(each.partition, each.runs, each.state, each.results, each.cost_pico) for each in spent] == [
        ("1", (1, 3), "done", 8, 100),
        ("2", (2,), "done", 8, 70),
    ]
    text = shown(report.partition_table("backfill 1", spent, Currency.USD))
    assert "(170 pico)" in text
    assert "not known to be billed" in text


def test_the_progress_of_a_backfill_counts_its_partitions() -> None:
    progress = replace(PROGRESS, partitions=Partitions(3, 4, 30))
    assert line(progress, Rate()).startswith("backfill 3: 4/30 partitions · ")
    assert line(PROGRESS, Rate()).startswith("run 7: ")
