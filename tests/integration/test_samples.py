"""A sample, drawn over all documents and asked for an estimate, whose answers the run that follows reuses."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.documents import Document
from schemas.errors import ConfigurationError
from schemas.estimates import bound_sample, estimate
from schemas.jobs import Input
from schemas.money import Money
from schemas.pricing import load_price_book
from schemas.samples import Design, Sample, pick
from schemas.work_hours import Asked
from tasks import samples
from tasks.documents import plan, read_shard
from tasks.documents.draws import draw
from tasks.jobs import load_job
from tasks.ledger.backfills import find_evidence
from tasks.ledger.connection import Ledger
from tasks.ledger.history import find_history, find_polled, find_sample
from tasks.ledger.proof import prove
from tests.world import World, make_world, write_documents

NOW = datetime(2026, 9, 26, 0, 10, tzinfo=UTC)
DESIGN = Design(size=20, fixed=100, key="colours")


@pytest.fixture
async def world(tmp_path: Path, ledger_url: str) -> AsyncIterator[World]:
    """400 documents of very different lengths; of them one is empty and two have the id of another."""
    async with make_world(tmp_path, ledger_url) as made:
        random = Random(1)
        texts: list[str | None] = [
            f"document {number} is about a colour " + "and more of it " * int(random.lognormvariate(1, 1.2))
            for number in range(400)
        ]
        texts[7] = " "
        ids: list[str | None] = [f"d{number}" for number in range(400)]
        ids[9] = ids[399] = "d3"
        write_documents(made.root, texts, ids)
        job = made.root / "jobs/colours/job.yaml"
        job.write_text(job.read_text().replace("deadline_s: 5", "deadline_s: 120"))  # none is lost on a busy machine
        yield made


async def tell(world: World, *command: str) -> dict[str, Any]:
    """What the command line says, in this world."""
    environment = os.environ | {
        "FARTHING_DATABASE_URL": world.database_url,
        "FARTHING_SANDBOX": "1",
        "DEEPSEEK_API_KEY": "sk-sandbox-test",
        "DEEPSEEK_BASE_URL": world.settings.base_url,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "farthing", *command, cwd=world.root, env=environment, stdout=asyncio.subprocess.PIPE
    )
    told, _ = await process.communicate()
    found: dict[str, Any] = json.loads(told)
    return found


async def test_the_run_after_an_estimate_costs_what_it_said_and_pays_no_sampled_document_again(
    world: World, ledger: Ledger
) -> None:
    job = load_job("colours", world.root)
    drawn = await samples.draw(job, world.request(sample=50), world.settings)
    assert (drawn.sample.documents, drawn.size.documents, drawn.size.to_send) == (397, 400, 397)
    assert await find_sample(ledger, drawn.opening) is None

    asked, _ = await world.run(sample=50)
    assert (asked.state, asked.documents) == ("done", 50)
    assert await find_sample(ledger, drawn.opening) == asked.run_id
    polled = await find_polled(ledger, asked.run_id, drawn.sample)
    found = estimate(job, drawn.size, load_price_book(), Asked(NOW), polled)
    paid = sum(world.bill().values())
    assert (await prove(ledger, asked.run_id, load_price_book())).proved
    assert (found.level, found.sampled, found.paid and found.paid.pico) == (90, 50, paid)
    assert paid < found.low.pico < found.cost.pico < found.high.pico < 3 * found.cost.pico
    told = await tell(world, "estimate", "colours", "--sample", "--json")
    assert (told["level"], told["sampled"], told["paid_pico"]) == (90, 50, paid)
    assert paid < told["low_pico"] < told["cost_pico"] < told["high_pico"]
    assert sum(world.bill().values()) == paid
    # A few documents of everywhere are no history, and no partition that was begun.
    assert await find_history(ledger, job, is_simulated=True) is None
    assert not (
        await find_evidence(ledger, "colours", ["documents.parquet"], job.prompt_version, is_simulated=True)
    ).covered

    whole, _ = await world.run()
    bill = sum(world.bill().values())
    assert (whole.state, whole.documents) == ("done", 400)
    assert found.low.pico <= bill <= found.high.pico
    states = world.sql(f"SELECT state, of_run_id, count(*) FROM document WHERE run_id = {whole.run_id} GROUP BY 1, 2")
    assert ("reused", asked.run_id, 50) in states
    paid_twice = """
        SELECT d.document_id FROM document d JOIN attempt_intent i USING (run_id, document_no)
        GROUP BY 1 HAVING count(DISTINCT run_id) > 1
    """
    assert world.sql(paid_twice) == []
    assert len(world.bill()) == world.value("SELECT count(*) FROM attempt_intent")

    # Whoever asks again, whenever, is told the same by the same run, or by what it reused.
    again, _ = await world.run(sample=50)
    assert sum(world.bill().values()) == bill
    assert (
        estimate(
            job, drawn.size, load_price_book(), Asked(NOW), await find_polled(ledger, again.run_id, drawn.sample)
        ).cost
        == found.cost
    )


async def test_a_sample_with_giants_costs_what_was_agreed_to(world: World) -> None:
    """It is drawn by size, so that a few giants are all in it: the mean document says nothing of what they cost."""
    texts = [f"document {number} is about a colour" for number in range(500)]
    texts += [f"giant {number} is about a colour " + "and more of it " * 10_000 for number in range(10)]
    write_documents(world.root, texts)
    file = world.root / "jobs/colours/job.yaml"
    file.write_text(re.sub("^budget: .*", "budget: 9 USD", file.read_text(), flags=re.MULTILINE))
    drawn = await samples.draw(load_job("colours", world.root), world.request(sample=20), world.settings)
    assert sum(length > 10**5 for length in drawn.lengths) == 10
    assert drawn.asks.sampled_bytes == sum(drawn.lengths) > 10 * drawn.size.sampled_bytes // drawn.size.sampled * 20
    job = load_job("colours", world.root)
    agreed = estimate(job, drawn.asks, load_price_book(), Asked(NOW))
    most = bound_sample(job, agreed, max(drawn.lengths), load_price_book())
    run, _ = await world.run(sample=20, budget=world.request(sample=20).capped(job, most).budget)
    assert (run.state, run.cap) == ("done", most.pico)
    assert agreed.low.pico < sum(world.bill().values()) < agreed.high.pico < most.pico < job.budget.pico


async def test_a_sample_s_cap_is_what_was_agreed_to_and_pauses_it(world: World) -> None:
    job = load_job("colours", world.root)
    asked = world.request(sample=50).capped(job, Money.parse("0.0015 USD"))
    run, ended = await world.run(sample=50, budget=asked.budget)
    assert (run.state, run.cap) == ("paused", 15 * 10**8)
    assert 0 < sum(world.bill().values()) <= 15 * 10**8
    assert "run the same command with a larger --budget" in ended.advice
    assert world.request(sample=50, budget="2 USD").capped(job, Money.parse("1 USD")).budget == "2 USD"
    assert world.request(sample=50).capped(job, Money.parse("3 USD")).budget is None
    assert world.request(sample=50).capped(replace(job, budget_name="team"), Money.parse("0.1 USD")).budget is None


async def test_a_selection_without_a_document_that_can_be_sent_has_no_sample(world: World) -> None:
    write_documents(world.root, [" ", None])
    with pytest.raises(ConfigurationError, match="no document of this selection can be sent"):
        await samples.draw(load_job("colours", world.root), world.request(sample=50), world.settings)


def read(root: Path, input: Input, sample: Sample) -> list[Document]:
    """The documents that a run of the sample would send."""
    manifest = pick(plan(input, shard_rows=50, root=root), sample)
    shards = (read_shard(input, manifest.files[shard.file_no], shard, root=root) for shard in manifest.shards)
    return [document for shard in shards for document in shard if isinstance(document, Document)]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Three files of 100 rows, of which a filter keeps every second."""
    random = Random(2)
    for file in range(3):
        rows = range(file * 100, file * 100 + 100)
        texts = ["x" * random.randrange(1, 5_000) for _ in rows]
        table = pa.table({"id": [f"d{row}" for row in rows], "text": texts, "kept": [row % 2 for row in rows]})
        pq.write_table(table, tmp_path / f"{file}.parquet", row_group_size=30)
    return tmp_path


@pytest.mark.parametrize("condition", [None, [("kept", "==", 1)]])
def test_a_sample_is_of_all_files_and_of_the_rows_that_the_filter_keeps(
    files: Path, condition: list[tuple[str, str, int]] | None
) -> None:
    input = Input(path="*.parquet", id="id", text="text", filter=condition)
    manifest = plan(input, shard_rows=50, root=files)
    sample = draw(input, manifest, DESIGN, root=files)
    assert sample.documents == manifest.document_count == (150 if condition else 300)
    found = read(files, input, sample)
    assert [DESIGN.weigh(document.text) for document in found] == [each.weight for each in sample.drawn]
    assert len({document.document_id for document in found}) == 20
    assert {int(document.document_id[1:]) // 100 for document in found} == {0, 1, 2}
    assert not condition or all(int(document.document_id[1:]) % 2 for document in found)
    assert draw(input, manifest, DESIGN, root=files) == sample


def test_a_longer_input_keeps_most_of_its_sample(files: Path) -> None:
    """So that the answers of yesterday's sample are reused."""
    input = Input(path="*.parquet", id="id", text="text")
    whole = read(files, input, draw(input, plan(input, shard_rows=50, root=files), DESIGN, root=files))
    (files / "2.parquet").unlink()
    part = read(files, input, draw(input, plan(input, shard_rows=50, root=files), DESIGN, root=files))
    kept = {document.document_id for document in whole} & {document.document_id for document in part}
    assert len(kept) >= 10
