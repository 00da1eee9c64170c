"""A job and its variants on a real ledger and the emulated DeepSeek: the same documents, each paid for once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from fractions import Fraction
from pathlib import Path
from statistics import median_low
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sandbox.bill import bill_path, read_lines
from schemas.comparisons import Comparison
from schemas.errors import BudgetExhausted, ConfigurationError, UnknownPrice
from schemas.pricing import load_price_book
from schemas.requests import CompareRequest
from tasks import artifacts, comparisons, steps
from tasks.comparisons import Entrant, Field
from tasks.jobs import load_job
from tasks.ledger.connection import Ledger
from tasks.ledger.history import find_history
from tasks.ledger.proof import prove
from tests.integration.test_samples import tell
from tests.world import PROMPT, World, make_world

DOCUMENTS = 50


@pytest.fixture
async def world(tmp_path: Path, ledger_url: str) -> AsyncIterator[World]:
    """200 documents, two of three with a label, and two variants: a longer prompt, and the last tier alone."""
    async with make_world(tmp_path, ledger_url) as made:
        columns = {
            "id": [f"d{number}" for number in range(200)],
            "text": [f"document {number} is about a colour {'and more ' * (number % 7)}" for number in range(200)],
            "label": ["red" if number % 3 else None for number in range(200)],
        }
        pq.write_table(pa.table(columns), tmp_path / "documents.parquet", row_group_size=50)
        folder = tmp_path / "jobs/colours"
        text = (folder / "job.yaml").read_text().replace("text: text}", "text: text, label: label}")
        (folder / "job.yaml").write_text(text.replace("deadline_s: 5", "deadline_s: 120") + "measure: colour\n")
        (folder / "b.md").write_text(PROMPT + "Think twice of each. " * 200)
        (folder / "strong.yaml").write_text("ladder: [pro]\ntiers: {pro: {max_tokens: 200}}\n")
        yield made


def asked(world: World, *variants: str, **more: Any) -> CompareRequest:
    return CompareRequest(job="colours", variants=variants, sample=DOCUMENTS, root=world.root, **more)


async def ask(world: World, field: Field, entrant: Entrant) -> int:
    """As the flow does: the run of one entrant, from open to settled; returns its number."""
    request = (await comparisons.look_again(field, world.settings)).capped(entrant)
    run, _ = await world.run(**request.model_dump(exclude={"job", "root"}))
    assert run.state == "done"
    return run.run_id


async def compare(world: World, request: CompareRequest) -> Comparison:
    field = await comparisons.find_field(request, world.settings)
    for entrant in field.missing:
        await ask(world, field, entrant)
    return await comparisons.conclude(field, world.settings)


async def test_variants_answer_the_same_documents_and_differ_by_what_the_bill_and_the_answers_say(
    world: World, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked(world, "b.md", "strong.yaml")
    found = await compare(world, request)
    assert [each.variant.name for each in found.figures] == ["colours", "b", "strong"]
    assert (found.documents, found.sampled) == (200, DOCUMENTS)
    runs = [each.variant.run_id for each in found.figures]
    ids = [world.sql(f"SELECT document_id FROM document WHERE run_id = {run} ORDER BY document_no") for run in runs]
    assert ids[0] == ids[1] == ids[2]
    for run_id in runs:
        assert (await prove(ledger, run_id, load_price_book())).proved  # type: ignore[arg-type]  # a run's number
    assert len(set(world.sql("SELECT prompt_version FROM run"))) == 3
    for figures in found.figures:
        assert figures.variant.paid_pico == sum(line["cost_pico"] for line in lines_of(world, figures.variant.run_id))
        assert figures.pico is not None
        assert figures.pico.mean == warm_mean(world, figures.variant.run_id)
    _holds_what_the_answers_say(found, world)
    assert await find_history(ledger, load_job("colours", world.root), is_simulated=True) is None

    # Asked again, by whoever, it pays nothing and says the same.
    bill = world.bill()
    assert await compare(world, request) == found
    told = await tell(
        world,
        "compare",
        "colours",
        "--sample",
        f"{DOCUMENTS}",
        "--variant",
        "b.md",
        "--variant",
        "strong.yaml",
        "--json",
    )
    assert [each["run"] for each in told["variants"]] == runs
    assert told["notes"] == list(found.notes)
    # An earlier run is held against it by what it was answered and paid.
    older = await compare(world, asked(world, against=(runs[2],)))
    assert [each.variant.name for each in older.figures] == ["colours", f"run {runs[2]}"]
    assert older.figures[1].right == found.figures[2].right
    assert older.differences[0].agreement == found.differences[1].agreement
    assert world.bill() == bill
    published: list[str] = []
    monkeypatch.setattr(artifacts, "acreate_markdown_artifact", _keep(published))
    field = await comparisons.find_field(request, world.settings)
    await artifacts.show_comparison(field, world.settings)
    assert "Each two compared" in published[0]


def _keep(published: list[str]) -> Any:
    async def publish(markdown: str, **_: str) -> None:
        published.append(markdown)

    return publish


def lines_of(world: World, run_id: int) -> list[dict[str, Any]]:
    """What the provider billed of a run, by the attempt keys that the ledger has of it."""
    keys = {key for (key,) in world.sql(f"SELECT provider_id FROM attempt_outcome WHERE run_id = {run_id}")}
    return [line for line in read_lines(bill_path(world.root)) if line["provider_id"] in keys]


def warm_mean(world: World, run_id: int) -> Fraction:
    """A document's mean cost by the provider's own lines, what primed the cache as if it had found the prefix."""
    primed = {
        key
        for (key,) in world.sql(
            "SELECT provider_id FROM attempt_outcome JOIN attempt_intent USING (run_id, document_no, attempt_no) "
            f"WHERE run_id = {run_id} AND purpose = 'priming'"
        )
    }
    assert primed
    lines, total = lines_of(world, run_id), 0
    for line in lines:
        others = [each for each in lines if each["model"] == line["model"] and each["provider_id"] not in primed]
        usual = median_low(each["hit"] for each in others) if others else 0
        warm = (
            max(line["hit"], min(usual, line["hit"] + line["miss"])) if line["provider_id"] in primed else line["hit"]
        )
        miss = line["hit"] + line["miss"] - warm
        total += warm * line["hit_pico"] + miss * line["miss_pico"] + line["output"] * line["output_pico"]
    return Fraction(total, DOCUMENTS)


def _holds_what_the_answers_say(found: Comparison, world: World) -> None:
    """The results by the superuser's own query, compared and counted in here."""
    answers: list[dict[int, str]] = []
    for figures in found.figures:
        rows = world.sql(
            f"SELECT document_no, answer ->> 'colour' FROM document WHERE run_id = {figures.variant.run_id}"
        )
        answers.append(dict(rows))
    job = found.figures[0].variant.run_id
    labelled = [number for (number,) in world.sql(f"SELECT document_no FROM label WHERE run_id = {job}")]
    assert 20 < len(labelled) < DOCUMENTS
    rights = [[said[number] == "red" for number in labelled] for said in answers]
    for figures, right in zip(found.figures, rights, strict=True):
        assert figures.right is not None
        assert (figures.right.count, figures.right.of) == (sum(right), len(labelled))
    places = {"colours": 0, "b": 1, "strong": 2}
    for each in found.differences:
        first, second = places[each.first], places[each.second]
        agreeing = sum(answers[first][number] == answers[second][number] for number in answers[0])
        assert each.agreement is not None
        assert each.agreement.count == agreeing
        assert each.better == sum(b and not a for a, b in zip(rights[first], rights[second], strict=True))
        assert each.worse == sum(a and not b for a, b in zip(rights[first], rights[second], strict=True))
    assert found.differences[1].agreement is not None
    assert found.differences[1].agreement.count < DOCUMENTS  # the last tier alone does say something else


async def test_a_comparison_that_was_cut_off_goes_on_and_pays_what_was_missing(world: World, ledger: Ledger) -> None:
    request = asked(world, "b.md", budget="0.5 USD")
    field = await comparisons.find_field(request, world.settings)
    assert [each.name for each in field.missing] == ["colours", "b"]
    first = await ask(world, field, field.entrants[0])
    seen = await comparisons.find_field(request, world.settings)
    assert ([each.name for each in seen.missing], seen.spent) == (["b"], sum(world.bill().values()))

    capped = seen.capped(seen.missing[0])
    assert capped.cap(field.entrants[1].job).pico == 5 * 10**11 - seen.spent
    chosen = capped.model_dump(exclude={"job", "root"})
    run = await world.open(**chosen)
    before = len(world.bill())
    working = asyncio.create_task(world.work(run, **chosen))
    while len(world.bill()) < before + 10:
        await asyncio.sleep(0.01)
    working.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await working
    on, _ = await world.run(**chosen)
    assert (on.run_id, on.state, on.run_id != first) == (run.run_id, "done", True)
    twice = f"""
        SELECT count(*) FROM (SELECT document_no FROM attempt WHERE run_id = {run.run_id} AND verdict IS NOT NULL
                              GROUP BY document_no, tier, purpose HAVING count(*) > 1) x
    """
    assert world.value(twice) == 0
    found = await comparisons.conclude(seen, world.settings)
    paid = sum(each.variant.paid_pico for each in found.figures)
    assert paid >= sum(world.bill().values())  # what was in flight may have been billed, and counts
    assert (await prove(ledger, run.run_id, load_price_book())).proved

    poor = await comparisons.find_field(asked(world, "b.md", "strong.yaml", budget="0.0001 USD"), world.settings)
    with pytest.raises(BudgetExhausted, match="were spent before strong was asked"):
        poor.capped(poor.missing[0])


@pytest.mark.parametrize(
    ("file", "text", "error", "message"),
    [
        ("c.md", " \n", ConfigurationError, r"jobs/colours/c.md:1: the prompt is empty"),
        ("c.md", "Say {{text}}", ConfigurationError, "is not replaced by anything"),
        ("c.md", PROMPT, ConfigurationError, "c.md asks and judges as the job as it stands does"),
        ("colours.md", "Say it in JSON", ConfigurationError, "one is called colours, like the job"),
        ("c.yaml", "budget: 9 USD\n", ConfigurationError, "c.yaml:1: budget: is the job's, for all its variants"),
        ("c.yaml", "tiers: {flash: {max_token: 9}}", ConfigurationError, "c.yaml:1: .*did you mean max_tokens"),
        ("c.yaml", "ladder: [flash, slow]", ConfigurationError, "c.yaml:1: ladder.*unknown tier 'slow'"),
        ("c.yaml", "escalate: {target: 0.9, delta: 0.1}", ConfigurationError, "has a promise"),
        ("c.yaml", "tiers: {flash: {model: gpt-9}}", UnknownPrice, "c.yaml: flash: .*gpt-9"),
        ("c.yaml", "prompt: none.md", ConfigurationError, "none.md cannot be read"),
    ],
)
async def test_a_variant_that_is_none_is_one_clear_error_before_anything_is_asked(
    world: World, file: str, text: str, error: type[Exception], message: str
) -> None:
    (world.root / "jobs/colours" / file).write_text(text)
    with pytest.raises(error, match=message):
        await steps.comparisons.find_field(asked(world, file), world.settings)
    assert world.bill() == {}
    assert world.sql("SELECT run_id FROM run") == []


async def test_what_is_no_run_to_compare_with_is_refused_before_anything_is_asked(world: World) -> None:
    other, _ = await world.run(limit=3)
    bill = world.bill()
    with pytest.raises(ConfigurationError, match="there is no run 99"):
        await comparisons.find_field(asked(world, against=(99,)), world.settings)
    far = CompareRequest(job="colours", against=(other.run_id,), sample=10, root=world.root)
    with pytest.raises(ConfigurationError, match="has had none of the 10 documents"):
        await comparisons.find_field(far, world.settings)
    with pytest.raises(ValueError, match="with 1 to 5 variants"):
        asked(world)
    with pytest.raises(ValueError, match="two variants are called b"):
        asked(world, "b.md", "other/b.yaml")
    assert world.bill() == bill
