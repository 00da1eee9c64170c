"""How large a selection's documents are: alone responsible for the sample that an estimate measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from schemas.documents import Document, Manifest, Shard
from schemas.estimates import Size
from schemas.jobs import Job
from tasks import documents

SAMPLE = 50
#: The sample is taken from so many places, spread over the input: files differ, and one begins with its shortest.
PLACES = 10


def measure(job: Job, manifest: Manifest, root: Path = Path(".")) -> Size:
    """Read a sample of the documents. Raises what `documents.read_shard` raises."""
    sizes = list(_sample(job, manifest, root))
    return Size(
        documents=manifest.document_count,
        to_send=manifest.document_count - len(manifest.duplicates),
        sampled=len(sizes),
        sampled_bytes=sum(sizes),
    )


def _sample(job: Job, manifest: Manifest, root: Path) -> Iterator[int]:
    """Bytes of each sampled document that can be sent."""
    shards = spread(manifest.shards, PLACES)
    for shard in shards:
        rows = documents.read_shard(job.input, manifest.files[shard.file_no], shard, root=root)
        for row in islice(rows, -(-SAMPLE // len(shards))):
            if isinstance(row, Document):
                yield len(row.text.encode("utf-8", "replace"))


def spread(shards: Sequence[Shard], places: int) -> list[Shard]:
    """At most `places` of the shards, evenly spread, the first among them."""
    count = min(places, len(shards))
    return [shards[len(shards) * place // count] for place in range(count)]
