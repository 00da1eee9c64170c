"""A pilot on a real ledger and the emulated DeepSeek: both tiers answer each drawn document, once and for good."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.calibrations import Calibration
from schemas.errors import ConfigurationError, Unforeseen
from schemas.estimates import bound_sample, estimate, expect_pilot
from schemas.pricing import load_price_book
from schemas.promises import Promise
from schemas.work_hours import Asked
from tasks import artifacts, samples, steps
from tasks.jobs import load_job
from tasks.ledger.connection import Ledger
from tasks.ledger.history import find_history, find_sample
from tasks.ledger.pilots import find_pilot
from tasks.ledger.proof import prove
from tasks.ledger.whatif import find_past
from tasks.pilots import find_calibration, recall_calibration
from tests.integration.test_samples import NOW, tell
from tests.ledgers import sql
from tests.world import World, make_world

DOCUMENTS = 150
USUAL = Promise.parse("0.95", "0.05")


@pytest.fixture
async def world(tmp_path: Path, ledger_url: str) -> AsyncIterator[World]:
    """Documents of which every third has a label; a pilot's tiers are the ends of a ladder of three."""
    async with make_world(tmp_path, ledger_url) as made:
        columns = {
            "id": [f"d{number}" for number in range(DOCUMENTS)],
            "text": [
                f"document {number} is about a colour {'and more ' * (number % 7)}" for number in range(DOCUMENTS)
            ],
            "label": ["red" if number % 3 == 0 else None for number in range(DOCUMENTS)],
        }
        pq.write_table(pa.table(columns), tmp_path / "documents.parquet", row_group_size=50)
        file = tmp_path / "jobs/colours/job.yaml"
        text = file.read_text().replace("text: text}", "text: text, label: label}") + "measure: colour\n"
        text = text.replace("[flash, pro]", "[flash, flash-thinking, pro]").replace(
            "deadline_s: 5", "deadline_s: 120"
        )
        file.write_text(text)
        yield made


def pilot_of(world: World, **asked: Any) -> dict[str, Any]:
    return {"sample": 60, "is_pilot": True} | asked


async def read(world: World, ledger: Ledger, run_id: Any) -> Calibration:
    job = world.request(**pilot_of(world)).adapt(load_job("colours", world.root))
    drawn = await samples.draw(job, world.request(**pilot_of(world)), world.settings)
    return await find_calibration(ledger, job, drawn, run_id, USUAL)


async def test_a_pilot_asks_both_ends_of_the_ladder_and_says_what_its_rows_say(world: World, ledger: Ledger) -> None:
    asked = world.request(**pilot_of(world))
    job = asked.adapt(load_job("colours", world.root))
    drawn = await samples.draw(job, asked, world.settings)
    expected = expect_pilot(job, drawn.asks, load_price_book(), Asked(NOW))
    most = bound_sample(
        job, estimate(job, drawn.asks, load_price_book(), Asked(NOW)), max(drawn.lengths), load_price_book()
    )

    run, _ = await world.run(**pilot_of(world))
    bill = sum(world.bill().values())
    assert (run.state, run.documents) == ("done", 60)
    assert (await prove(ledger, run.run_id, load_price_book())).proved
    assert 0.5 * expected.pico < bill < 2 * expected.pico < most.pico
    entered = """
        SELECT tier, reason, count(*) FROM attempt_intent WHERE purpose IN ('answer', 'priming')
        AND reason = 'calibration' OR attempt_no = 1 GROUP BY 1, 2 ORDER BY 1
    """
    told = {(tier, reason): count for tier, reason, count in world.sql(entered)}
    assert told.keys() == {("flash", None), ("pro", "calibration")}
    assert told["flash", None] == 60
    assert told["pro", "calibration"] >= 57  # the others had no valid answer, and climbed as in any run

    found = await read(world, ledger, run.run_id)
    _holds_what_the_rows_say(found, world)
    past = await find_past(ledger, run.run_id, load_price_book(), Decimal("0.9"))
    unsure = world.sql("""
        SELECT count(*) FROM attempt_intent i WHERE tier = 'pro' AND purpose IN ('answer', 'priming') AND NOT EXISTS (
            SELECT FROM answer a JOIN attempt_intent f USING (run_id, document_no, attempt_no)
            WHERE a.document_no = i.document_no AND f.tier = 'flash' AND coalesce(a.confidence >= 0.9, false))
    """)[0][0]
    assert 0 < sum(each.documents for each in past.groups if each.rung) == unsure < told["pro", "calibration"]
    assert found.pilot.documents == DOCUMENTS
    assert found.pilot.paid_pico == bill
    assert [each.name for each in found.signals][:1] == ["confidence"]
    assert found == await recall_calibration(asked, world.settings, run.run_id, USUAL)
    assert await find_history(ledger, job, is_simulated=True) is None  # a pilot is no history of the job


def _holds_what_the_rows_say(found: Calibration, world: World) -> None:
    """Both answers by the superuser's own query, compared and counted in here."""
    rows = world.sql("""
        SELECT a.answer ->> 'colour', CASE d.state WHEN 'result' THEN d.answer ->> 'colour' END, a.confidence, l.label
        FROM document d
        LEFT JOIN (SELECT DISTINCT ON (document_no) a.* FROM answer a JOIN attempt_intent i
                   USING (run_id, document_no, attempt_no) WHERE i.tier = 'flash' AND a.answer IS NOT NULL
                   ORDER BY document_no, attempt_no DESC) a USING (run_id, document_no)
        LEFT JOIN label l USING (run_id, document_no)
    """)
    assert len(rows) == 60
    assert found.agreement.count == sum(first == last for first, last, *_ in rows if first and last)
    right = [(first == "red", last == "red") for first, last, _, label in rows if label]
    assert found.labels is not None
    assert (found.labels.first.count, found.labels.first.of) == (sum(first for first, _ in right), len(right))
    assert (found.labels.better, found.labels.worse) == (right.count((False, True)), right.count((True, False)))
    assert sorted(c for _, _, c, _ in rows if c) == sorted(p.confidence for p in found.pilot.pairs if p.confidence)
    costs = dict(
        world.sql("""
        SELECT tier, avg(cost_pico)
        FROM (SELECT tier, sum(cost_pico) AS cost_pico FROM attempt
              WHERE purpose <> 'priming' GROUP BY tier, document_no) x
        GROUP BY tier
    """)
    )
    for tier, mean in (("flash", found.pilot.first_cost), ("pro", found.pilot.last_cost)):
        assert isinstance(mean, Fraction)
        assert float(mean) == pytest.approx(float(costs[tier]))


async def test_a_pilot_is_paid_for_once_and_the_run_that_follows_reuses_it(world: World, ledger: Ledger) -> None:
    first, _ = await world.run(**pilot_of(world))
    bill = world.bill()
    again, _ = await world.run(**pilot_of(world))
    assert (again.state, again.run_id != first.run_id, world.bill()) == ("done", True, bill)
    assert (await read(world, ledger, again.run_id)).agreement == (await read(world, ledger, first.run_id)).agreement
    told = await tell(world, "calibrate", "colours", "--sample", "60", "--json")
    assert (told["run"], told["sampled"], told["documents"], told["paid_pico"]) == (again.run_id, 60, DOCUMENTS, 0)
    assert [each["name"] for each in told["policies"]][:2] == ["flash only", "pro only"]
    assert world.bill() == bill

    whole, _ = await world.run()
    assert whole.state == "done"
    reused = world.sql(f"SELECT count(*) FROM document WHERE run_id = {whole.run_id} AND state = 'reused'")
    assert reused == [(60,)]
    # What the cheap tier alone had answered is no pilot's: it asks both.
    more, _ = await world.run(**pilot_of(world, sample=120))
    assert (await prove(ledger, more.run_id, load_price_book())).proved
    answers = world.sql(f"SELECT count(*) FROM attempt_intent WHERE run_id = {more.run_id} AND tier = 'pro'")
    assert answers[0][0] > 30


async def test_what_another_rule_measured_or_nobody_has_any_more_is_asked_again(world: World, ledger: Ledger) -> None:
    asked = pilot_of(world, sample=10)
    await world.run(**asked)
    bill = sum(world.bill().values())
    file = world.root / "jobs/colours/job.yaml"
    file.write_text(file.read_text().replace("signal: logprobs", "signal: validators"))
    other, _ = await world.run(**asked)
    assert world.sql("SELECT count(DISTINCT prompt_version) FROM run") == [(1,)]
    assert sum(world.bill().values()) > 1.5 * bill
    assert world.sql(f"SELECT count(*) FROM document WHERE run_id = {other.run_id} AND state = 'reused'") == [(0,)]

    job = world.request(**asked).adapt(load_job("colours", world.root))
    drawn = await samples.draw(job, world.request(**asked), world.settings)
    assert await find_sample(ledger, drawn.opening) == other.run_id
    again, _ = await world.run(**asked)  # reuses it all
    assert await find_sample(ledger, drawn.opening) == again.run_id
    sql(world.database_url, "UPDATE document SET answer = NULL; UPDATE answer SET answer = NULL, content = ''")
    assert await find_sample(ledger, drawn.opening) is None
    anew, _ = await world.run(**asked)
    assert await find_sample(ledger, drawn.opening) == anew.run_id
    assert (await find_pilot(ledger, anew.run_id, job, DOCUMENTS)).last_cost is not None


async def test_a_pilot_that_was_cut_short_goes_on(world: World, ledger: Ledger) -> None:
    run, ended = await world.run(**pilot_of(world, budget="0.004 USD"))
    assert (run.state, ended.reason) == ("paused", "budget")
    assert 0 < sum(world.bill().values()) <= 4 * 10**9
    on, _ = await world.run(**pilot_of(world, budget="1 USD"))
    assert (on.run_id, on.state) == (run.run_id, "done")
    _holds_what_the_rows_say(await read(world, ledger, on.run_id), world)


async def test_the_flow_asks_nothing_twice_and_fails_where_it_cannot_publish(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "Settings", lambda: world.settings)
    asked = world.request(**pilot_of(world, sample=10))
    assert await steps.recall_pilot(asked) is None
    run, _ = await world.run(**pilot_of(world, sample=10))
    told = await steps.recall_pilot(asked)
    assert told == {"run_id": run.run_id, "state": "done", "reason": run.reason, "advice": ""}
    published = AsyncMock(side_effect=[None, RuntimeError("a word of Prefect's server")])
    monkeypatch.setattr(artifacts, "acreate_markdown_artifact", published)
    await artifacts.show_calibration(asked, run.run_id, USUAL, world.settings)
    assert published.call_args.kwargs["key"] == f"run-{run.run_id}-calibration"
    with pytest.raises(Unforeseen):
        await artifacts.show_calibration(asked, run.run_id, USUAL, world.settings)


async def test_a_ladder_of_one_tier_has_nothing_to_compare(world: World) -> None:
    file = world.root / "jobs/colours/job.yaml"
    file.write_text(
        re.sub("^ladder: .*", "ladder: [flash]", file.read_text(), flags=re.MULTILINE).replace(
            ", pro: {max_tokens: 100, deadline_s: 120}", ""
        )
    )
    with pytest.raises(ConfigurationError, match="has one tier, and a pilot compares two"):
        await world.open(**pilot_of(world))
