"""Runs that keep a promise, over an emulated DeepSeek: the phases, what they leave, and what verify says of it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from schemas.attempts import RunId
from schemas.documents import Document, Unfit, UnfitDocument
from schemas.errors import ConfigurationError
from schemas.pricing import load_price_book
from tasks import enrichment
from tasks.bulkhead import Bulkhead
from tasks.ledger import certification, runs
from tasks.ledger.connection import Role, opened
from tasks.ledger.proof import prove
from tests.ledgers import sql
from tests.world import JOB, PROMPT, World, make_world

BELOW = "escalate: {below: 0.6}"
PROMISE = "escalate: {target: 0.9, delta: 0.05}"
FEW, MANY = 60, 400
#: So many runs of so many documents, each with a lot of its own.
LOTS, EACH = 10, 2_000

Seeded = Callable[[int], None]


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> Seeded:
    """The lot of a number: what is otherwise drawn from the system."""

    def seed(number: int) -> None:
        drawn = iter(range(1_000))
        monkeypatch.setattr(
            certification, "token_bytes", lambda _size: hashlib.sha256(f"{number} {next(drawn)}".encode()).digest()
        )

    seed(1)
    return seed


@pytest.fixture
async def world(tmp_path: Path, ledger_url: str, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with make_world(tmp_path, ledger_url, documents=getattr(request, "param", FEW)) as made:
        say(made, PROMISE)
        yield made


def say(world: World, escalate: str) -> None:
    (world.root / "jobs" / "colours" / "job.yaml").write_text(
        JOB.replace(BELOW, escalate).replace("budget: 1 USD", "budget: 25 USD")
    )


async def disproved(world: World, run_id: int) -> dict[str, tuple[str, ...]]:
    async with opened(SecretStr(world.database_url), Role.LANE, pool_size=1) as ledger:
        found = await prove(ledger, RunId(run_id), load_price_book())
    assert "G18" in found.evidence
    return {name: each.violations for name, each in found.evidence.items() if each.violations}


async def kept_but_different(world: World, run_id: int) -> int:
    """How many answers of the run the last tier would have given otherwise: it is asked about all of them here."""
    say(world, "escalate: {below: 1}")
    run, _ = await world.run()
    different = f"""
        SELECT count(*) FROM result mine JOIN result pro USING (document_no)
        WHERE mine.run_id = {run_id} AND pro.run_id = {run.run_id} AND pro.tier = 'pro' AND mine.answer <> pro.answer
    """
    assert world.value(f"SELECT count(*) FROM result WHERE run_id = {run.run_id} AND tier = 'pro'") > MANY * 0.98
    return int(world.value(different))


@pytest.mark.parametrize("world", [MANY], indirect=True)
async def test_a_run_keeps_its_promise_and_says_by_what(world: World, seeded: Seeded) -> None:
    run, ended = await world.run()
    assert (run.state, ended.reason) == ("done", "done")
    assert await disproved(world, run.run_id) == {}
    documents, piloted, size, cut = world.sql("SELECT documents, piloted, size, cut FROM certificate")[0]
    tiers = dict(world.sql("SELECT tier, count(*) FROM document WHERE state = 'result' GROUP BY tier"))
    accepted = world.value(f"SELECT count(*) FROM ranked WHERE rank < {cut} AND NOT is_sampled")
    assert tiers == {"flash": accepted, "pro": documents - accepted}
    assert 0 < accepted < documents - piloted - size + 1  # the cut accepted some, and not all
    reasons = dict(world.sql("SELECT reason, count(DISTINCT document_no) FROM attempt WHERE tier = 'pro' GROUP BY 1"))
    assert reasons["certified_sample"] == size
    assert await kept_but_different(world, run.run_id) <= documents // 10


async def test_what_other_runs_accepted_is_a_first_answer_and_no_proof(world: World, seeded: Seeded) -> None:
    say(world, BELOW)
    earlier, _ = await world.run()
    accepted = world.value("SELECT count(*) FROM document WHERE tier = 'flash'")
    assert accepted > FEW / 2
    say(world, PROMISE)
    run, _ = await world.run()
    assert await disproved(world, run.run_id) == {}
    assert world.value(f"SELECT count(*) FROM attempt WHERE run_id = {run.run_id} AND tier = 'flash'") == 0
    held = world.value(f"SELECT count(*) FROM held WHERE run_id = {run.run_id} AND of_run_id = {earlier.run_id}")
    piloted = world.value("SELECT piloted FROM certificate")
    assert (held, piloted) == (accepted, FEW - accepted)
    kept = world.sql(
        f"SELECT count(*) FROM document JOIN ranked USING (run_id, document_no) JOIN certified c USING (run_id)"
        f" WHERE run_id = {run.run_id} AND state = 'reused' AND rank < cut AND NOT is_sampled"
    )
    climbed = world.value(f"SELECT count(DISTINCT document_no) FROM attempt WHERE run_id = {run.run_id}")
    assert kept[0][0] + climbed == held
    assert climbed > 0
    one = f"run_id = {earlier.run_id} AND document_no = (SELECT min(document_no) FROM document WHERE tier = 'flash')"
    sql(world.database_url, f"UPDATE attempt_outcome SET served_model = 'flash-5' WHERE {one}")
    void = (await disproved(world, run.run_id))["G18"]
    assert any("void: flash was served by" in each and "flash-5" in each for each in void), void


async def test_each_phase_of_a_large_run_has_postgres_count_what_it_reads(
    world: World, seeded: Seeded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "MANY_DOCUMENTS", FEW)
    run = await world.open()
    await world.work(run)
    counted = "SELECT last_analyze BETWEEN frozen_at AND certified_at FROM certificate, pg_stat_user_tables"
    assert world.value(f"{counted} WHERE relname = 'ranked'")
    assert world.value("SELECT analyze_count FROM pg_stat_user_tables WHERE relname = 'held'") == 2


async def test_a_sampled_document_that_the_last_tier_does_not_answer_disagrees(world: World, seeded: Seeded) -> None:
    world.plan_mishaps({"kind": "content_filter", "model": "deepseek-v4-pro"})
    run, _ = await world.run()
    assert run.state == "done"
    allowance, cut, findings = world.sql("SELECT allowance, cut, findings FROM certificate")[0]
    ranks = [rank for (rank,) in world.sql("SELECT rank FROM ranked WHERE is_sampled ORDER BY rank")]
    assert findings == {"answer": ranks}
    assert cut == ranks[allowance]
    assert world.value("SELECT count(*) FROM dead_letter") == FEW - world.value(
        f"SELECT count(*) FROM ranked WHERE rank < {cut} AND NOT is_sampled"
    )
    assert await disproved(world, run.run_id) == {}


async def test_a_shard_is_claimed_anew_while_what_showed_its_last_phase_has_yet_to_end(
    world: World, seeded: Seeded
) -> None:
    async def slowly(_name: str, work: Callable[[], Awaitable[None]]) -> None:
        await work()
        await asyncio.sleep(0.5)  # as Prefect may take to say that a task run is completed

    run = await world.open()
    ended = await enrichment.work_lane(world.request(), world.settings, run, slowly)
    settled = await enrichment.settle_run(world.settings, run, [ended])
    assert settled.state == "done"
    assert world.value("SELECT max(lease_epoch) FROM shard") <= 3  # once for each phase, and never from itself
    assert await disproved(world, run.run_id) == {}


async def test_a_document_that_can_be_read_no_more_ends_though_its_first_answer_waits(
    world: World, seeded: Seeded, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, seen = Bulkhead.read_shard, set[int]()

    async def read_once(*of: Any, **named: Any) -> AsyncIterator[Sequence[Document | UnfitDocument]]:
        async for block in read(*of, **named):
            again = [
                UnfitDocument(d.document_no, d.document_id, Unfit.NULL_ID) for d in block if d.document_no in seen
            ]
            seen.update(d.document_no for d in block)
            yield again or block

    monkeypatch.setattr(Bulkhead, "read_shard", read_once)
    run = await world.open()
    async with asyncio.timeout(60):
        ended = await world.work(run)
    assert (await enrichment.settle_run(world.settings, run, [ended])).state == "done"
    assert world.value("SELECT count(*) FROM dead_letter") == world.value("SELECT count(*) FROM ranked")
    assert await disproved(world, run.run_id) == {}


async def test_a_run_with_a_promise_cannot_be_done_by_an_instant(world: World) -> None:
    with pytest.raises(ConfigurationError, match="--finish-by cannot tell"):
        await world.open(finish_by="2026-09-28T00:00Z")
    assert world.value("SELECT count(*) FROM run") == 0


TAMPERED = {
    "a rank": ("UPDATE ranked SET rank = rank + 1000 WHERE rank = 3", "its confidence says 3"),
    "the sample": ("UPDATE ranked SET is_sampled = NOT is_sampled WHERE rank < 9", "its sample is not the one that"),
    "a pilot": ("UPDATE frozen_order SET documents = documents + 100, piloted = piloted + 100",
                "documents without a place have an answer"),
    "the order": ("UPDATE frozen_order SET order_digest = 'sha256:0'", "was certified"),
    "the cut": ("UPDATE certified SET cut = cut + 1", "the cut is at"),
    "a finding": ("""UPDATE certified SET findings = '{"answer": []}'""", "its disagreements are not those of the"),
    "the allowance": ("UPDATE frozen_order SET allowance = allowance + 1", "the sample allows"),
    "an answer": ("""UPDATE document SET tier = 'flash', attempt_no = 1 WHERE document_no = (
                       SELECT document_no FROM ranked WHERE is_sampled LIMIT 1)""",
                  "keeps its first answer, and was drawn"),
    "a model": ("""UPDATE attempt_outcome SET served_model = 'deepseek-v5-pro' WHERE document_no = (
                     SELECT document_no FROM ranked WHERE is_sampled LIMIT 1) AND served_model = 'deepseek-v4-pro'""",
                "void: pro was served by deepseek-v4-pro and deepseek-v5-pro"),
    "the sample's time": ("UPDATE frozen_order SET frozen_at = now()", "intended before the order was frozen"),
}  # fmt: skip


async def test_verify_names_what_was_tampered_with(world: World, seeded: Seeded) -> None:
    run, _ = await world.run()
    tables = ("ranked", "frozen_order", "certified", "document", "attempt_outcome")
    sql(world.database_url, ";".join(f"CREATE TABLE kept_{name} AS TABLE {name}" for name in tables))
    for what, (change, told) in TAMPERED.items():
        sql(world.database_url, change)
        broken = await disproved(world, run.run_id)
        assert any(told in each for each in broken["G18"]), (what, broken)
        for name in reversed(tables):
            sql(world.database_url, f"DELETE FROM {name}")
        for name in tables:
            sql(world.database_url, f"INSERT INTO {name} SELECT * FROM kept_{name}")
    assert await disproved(world, run.run_id) == {}


@pytest.mark.long
@pytest.mark.parametrize("world", [EACH], indirect=True)
async def test_over_many_lots_the_promise_fails_no_more_often_than_it_says(world: World, seeded: Seeded) -> None:
    """Whatever the prompt says, the sandbox answers a document the same: ten runs differ in their lots only.

    Each may fail with a chance of 0.05: more than three of ten fail with one of 0.1 %.
    """
    pro = await answers_of(world, 0, "escalate: {below: 1}")
    assert sum(tier == "pro" for tier, _ in pro.values()) > EACH * 0.97
    failed, kept = 0, 0
    for number in range(1, LOTS + 1):
        seeded(number)
        found = await answers_of(world, number, "escalate: {target: 0.95, delta: 0.05}")
        kept += sum(tier == "flash" for tier, _ in found.values())
        failed += sum(answer != pro[name][1] for name, (_, answer) in found.items() if name in pro) > EACH // 20
    assert failed <= 3
    assert kept > LOTS * EACH * 0.2  # it paid


async def answers_of(world: World, number: int, escalate: str) -> dict[str, tuple[str, object]]:
    """Tier and answer by document, of a run with a prompt that was never asked."""
    say(world, escalate)
    (world.root / "jobs" / "colours" / "prompt.md").write_text(f"{PROMPT}\nScene {number}.\n")
    run, _ = await world.run()
    assert run.state == "done"
    if "target" in escalate:
        assert await disproved(world, run.run_id) == {}
    rows = world.sql(f"SELECT document_id, tier, answer FROM result WHERE run_id = {run.run_id}")
    return {name: (tier, answer) for name, tier, answer in rows}
