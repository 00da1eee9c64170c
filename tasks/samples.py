"""How large a selection's documents are: alone responsible for the sample that an estimate measures."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path

from schemas.documents import Document, Manifest, Shard
from schemas.estimates import Size
from schemas.jobs import Job
from tasks.bulkhead import Bulkhead

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
