"""Samples of a selection: documents that an estimate measures, and those, drawn at random, that it asks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

from schemas.documents import Document, Manifest, Shard
from schemas.errors import ConfigurationError
from schemas.estimates import Size, design_of
from schemas.jobs import Job
from schemas.requests import RunRequest
from schemas.samples import Sample, pick
from schemas.settings import Settings
from tasks import enrichment
from tasks.bulkhead import Bulkhead
from tasks.ledger.runs import Opening

SAMPLE = 50
#: The sample is taken from so many places, spread over the input: files differ, and one begins with its shortest.
PLACES = 10


async def measure(job: Job, manifest: Manifest, bulkhead: Bulkhead, root: Path = Path(".")) -> Size:
    """Read a sample of the documents. Raises what `Bulkhead.read_shard` raises."""
    sizes = [size async for size in _sample(job, manifest, bulkhead, root)]
    return Size(
        documents=manifest.document_count,
        to_send=manifest.document_count - len(manifest.duplicates),
        sampled=len(sizes),
        sampled_bytes=sum(sizes),
    )


@dataclass(frozen=True, slots=True)
class DrawnSample:
    """A sample as it was drawn: the run that asks it, how large the selection is, and the bytes of what is asked."""

    opening: Opening
    sample: Sample
    size: Size
    lengths: tuple[int, ...]

    @property
    def asks(self) -> Size:
        """How large the sample itself is, by its own documents: it has more long ones than there are."""
        asked = len(self.lengths)
        return Size(documents=asked, to_send=asked, sampled=asked, sampled_bytes=sum(self.lengths))


async def draw(job: Job, request: RunRequest, settings: Settings) -> DrawnSample:
    """Draw what `request` asks for. Reads every document, and sends nothing.

    Raises ConfigurationError with all that is wrong, and where no document can be sent.
    """
    if request.sample is None:
        raise AssertionError("a request without a sample draws none")
    async with Bulkhead() as bulkhead:
        whole = await enrichment.plan(bulkhead, job, request.model_copy(update={"sample": None}))
        design = design_of(job, request.sample, is_even=request.is_even)
        sample = await bulkhead.draw(job.input, whole, design, root=request.root)
        if not sample.drawn:
            raise ConfigurationError("no document of this selection can be sent: all are empty, or have no id")
        measured = await measure(job, whole, bulkhead, request.root)
    opening = Opening(
        job, pick(whole, sample), request.selection(job), job.budget.currency, 0, is_simulated=settings.sandbox
    )
    lengths = tuple(design.bytes_of(drawn.weight) for drawn in sample.drawn)
    return DrawnSample(opening, sample, replace(measured, to_send=sample.documents), lengths)


async def _sample(job: Job, manifest: Manifest, bulkhead: Bulkhead, root: Path) -> AsyncIterator[int]:
    """Bytes of each sampled document that can be sent."""
    shards = spread(manifest.shards, PLACES)
    most = -(-SAMPLE // len(shards))
    for shard in shards:
        file = manifest.files[shard.file_no]
        async with aclosing(bulkhead.read_shard(job.input, file, shard, root=root, rows=most)) as blocks:
            for row in await anext(blocks):
                if isinstance(row, Document):
                    yield len(row.text.encode("utf-8", "replace"))


def spread(shards: Sequence[Shard], places: int) -> list[Shard]:
    """At most `places` of the shards, evenly spread, the first among them."""
    count = min(places, len(shards))
    return [shards[len(shards) * place // count] for place in range(count)]
