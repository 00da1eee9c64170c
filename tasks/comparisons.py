"""Comparisons: the variants of a job on one sample, who has asked it, and what the ledger has of them.

Nothing is sent in here.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import dataclass, replace
from random import Random

from schemas.attempts import RunId
from schemas.comparisons import Comparison, Poll, compare
from schemas.documents import Document
from schemas.errors import BudgetExhausted, ConfigurationError, InputChanged, UnknownPrice
from schemas.jobs import Job
from schemas.money import Money
from schemas.pricing import PriceBook, load_price_book
from schemas.requests import CompareRequest, RunRequest, name_variant
from schemas.settings import Settings
from tasks import enrichment, samples
from tasks.bulkhead import Bulkhead
from tasks.jobs import load_asked
from tasks.ledger.comparisons import find_shared_count, find_spent, find_variant, require_comparable
from tasks.ledger.connection import Ledger
from tasks.ledger.history import find_sample
from tasks.ledger.leases import USUAL_TIMES
from tasks.ledger.runs import policy
from tasks.samples import DrawnSample

#: The ends of an interval are drawn: whoever asks again is told the same.
_SEED = 0


@dataclass(frozen=True, slots=True)
class Entrant:
    """A variant of the comparison: what asks it, the run that has and is done (None: none), and what it has spent."""

    request: RunRequest
    drawn: DrawnSample
    run_id: RunId | None
    spent: int

    @property
    def job(self) -> Job:
        return self.drawn.opening.job

    @property
    def name(self) -> str:
        return self.job.name if self.request.variant is None else name_variant(self.request.variant)


@dataclass(frozen=True, slots=True)
class Field:
    """Who is compared, on one sample. The first entrant is the job as it stands."""

    request: CompareRequest
    entrants: tuple[Entrant, ...]

    @property
    def missing(self) -> list[Entrant]:
        """Those whose documents are to be asked, all or the rest."""
        return [each for each in self.entrants if each.run_id is None]

    @property
    def spent(self) -> int:
        """What was paid for this comparison so far, in pico units, with what may have been billed."""
        return sum(each.spent for each in self.entrants)

    def capped(self, entrant: Entrant) -> RunRequest:
        """What asks one variant, with what the others leave of the budget. Raises BudgetExhausted.

        A shared budget is not a comparison's to change: its runs draw on it as any run does.
        """
        if entrant.job.budget_name is not None:
            return entrant.request
        whole = entrant.request.cap(entrant.job)
        left = whole.pico - self.spent + entrant.spent
        if left <= 0:
            raise BudgetExhausted(
                f"{whole} were spent before {entrant.name} was asked: give the comparison more with --budget, and "
                "nothing is paid for again"
            )
        return entrant.request.model_copy(update={"budget": Money(left, whole.currency).exact})


def load_entrants(request: CompareRequest) -> list[tuple[RunRequest, Job]]:
    """The jobs that are compared. Raises ConfigurationError where a file is wrong, or two would ask the same."""
    found = [(each, load_asked(each)) for each in request.runs()]
    names: dict[object, str] = {}
    for each, job in found:
        name = "the job as it stands" if each.variant is None else each.variant
        same = (job.prompt_version, repr(policy(job)))
        if same in names:
            raise ConfigurationError(
                f"--variant: {name} asks and judges as {names[same]} does, so that there is nothing to compare"
            )
        names[same] = name
    (_, job), *_ = found
    if job.name in map(name_variant, request.variants):
        raise ConfigurationError(f"--variant: one is called {job.name}, like the job: rename its file")
    return found


async def find_field(request: CompareRequest, settings: Settings) -> Field:
    """Draw the sample, and say which variants have been asked it. Raises ConfigurationError with what is wrong."""
    loaded = load_entrants(request)
    _require_prices(loaded, load_price_book(settings.prices))
    first, job = loaded[0]
    drawn = await samples.draw(job, first, settings)
    async with enrichment.lane_ledger(settings, USUAL_TIMES.once_within_s, pool_size=1) as ledger:
        entrants = [await _find_entrant(ledger, asked, _drawn_for(drawn, asked, job)) for asked, job in loaded]
        await _check_stored(ledger, request, entrants[0], settings)
    return Field(request, tuple(entrants))


def _require_prices(loaded: Iterable[tuple[RunRequest, Job]], book: PriceBook) -> None:
    """Raises UnknownPrice where a variant names a model without a price, before the first one is asked."""
    for asked, job in loaded:
        for tier in job.ladder:
            try:
                book.canonical(tier.model)
            except UnknownPrice as error:
                raise UnknownPrice(f"{asked.variant or job.name}: {tier.name}: {error}") from None


def _drawn_for(drawn: DrawnSample, asked: RunRequest, job: Job) -> DrawnSample:
    """The same sample for another variant: an even draw asks for nothing but documents' ids."""
    return replace(drawn, opening=replace(drawn.opening, job=job, selection=asked.selection(job)))


async def _find_entrant(ledger: Ledger, asked: RunRequest, drawn: DrawnSample) -> Entrant:
    done = await find_sample(ledger, drawn.opening)
    return Entrant(asked, drawn, done, await find_spent(ledger, drawn.opening))


async def look_again(field: Field, settings: Settings) -> Field:
    """The same by what the ledger says now. Nothing is drawn."""
    async with enrichment.lane_ledger(settings, USUAL_TIMES.once_within_s, pool_size=1) as ledger:
        entrants = [await _find_entrant(ledger, each.request, each.drawn) for each in field.entrants]
    return replace(field, entrants=tuple(entrants))


async def _check_stored(ledger: Ledger, request: CompareRequest, first: Entrant, settings: Settings) -> None:
    """Raises ConfigurationError where a run to compare with is another job's, or has had none of the documents."""
    if not request.against:
        return
    digests = await _read_digests(first, request)
    for number in request.against:
        currency = first.drawn.opening.currency
        await require_comparable(ledger, RunId(number), first.job, currency, is_simulated=settings.sandbox)
        if not await find_shared_count(ledger, RunId(number), digests):
            raise ConfigurationError(
                f"--against: run {number} has had none of the {len(digests)} documents that were drawn, as they are "
                "now: draw them from what it has had, with --partition or --limit"
            )


async def _read_digests(first: Entrant, request: CompareRequest) -> list[bytes]:
    manifest = first.drawn.opening.manifest
    found = []
    try:
        async with Bulkhead() as bulkhead:
            for shard in manifest.shards:
                file = manifest.files[shard.file_no]
                reading = bulkhead.read_shard(first.job.input, file, shard, root=request.root)
                async with aclosing(reading) as blocks:
                    async for block in blocks:
                        found += [row.text_digest for row in block if isinstance(row, Document)]
    except InputChanged as error:
        raise ConfigurationError(str(error)) from None
    return found


async def find_comparison(ledger: Ledger, field: Field) -> Comparison:
    """What the variants come to. All of them are done, else ConfigurationError: the input changed meanwhile."""
    runs = [(each.name, each.run_id) for each in field.entrants]
    runs += [(f"run {number}", RunId(number)) for number in field.request.against]
    found = [(name, run_id) for name, run_id in runs if run_id is not None]
    if len(found) < len(runs):
        raise ConfigurationError("the input or a variant changed since it was asked: compare again")
    first = field.entrants[0]
    _, sampled = found[0]
    variants = [await find_variant(ledger, name, run_id, sampled, first.job) for name, run_id in found]
    opening = first.drawn.opening
    poll = Poll(
        first.job.name,
        first.job.agreement,
        first.drawn.sample.documents,
        opening.currency,
        opening.is_simulated,
        tuple(variants),
    )
    return compare(poll, Random(_SEED))  # noqa: S311 (draws weights, guards nothing)


async def conclude(field: Field, settings: Settings) -> Comparison:
    """The same by what the ledger says now."""
    field = await look_again(field, settings)
    async with enrichment.lane_ledger(settings, USUAL_TIMES.once_within_s, pool_size=1) as ledger:
        return await find_comparison(ledger, field)
