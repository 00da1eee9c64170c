"""Which documents a sample holds: alone responsible for drawing it, at random over all of them, in one pass.

Priority sampling (Duffield, Lund, Thorup, "Priority sampling for estimation of arbitrary subset sums", J. ACM 54(6),
2007; the same as Ohlsson's sequential Poisson sampling, J. Official Statistics 14, 1998): a document of weight w with
a random number u in (0, 1] has the priority w/u, and the n largest of all are the sample. It needs no second pass and
holds n + 1 documents. The weight follows what a document costs at the first tier, so that a few that are very long,
and make up much of the bill, are drawn as often as they matter. The random number is made of the document's id: the
same input has the same sample, on every machine, and a longer input keeps most of it, whose answers are reused.

A pilot asks how often something is so, and not what it costs: it is drawn evenly, each document with the same chance
(all weights being 1, the n largest of 1/u are a simple random sample).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from hashlib import blake2b
from heapq import heappush, heappushpop
from typing import NamedTuple

from schemas.documents import Manifest, Shard

#: How many random numbers there are.
_NUMBERS = 2**64


@dataclass(frozen=True, slots=True)
class Design:
    """How to draw: so many documents, each weighing its bytes and `fixed` more, by random numbers of `key`.

    An even draw does not care what they weigh.
    """

    size: int
    fixed: int
    key: str
    is_even: bool = False

    def number(self, document_id: str) -> int:
        """A document's random number, from 1 to 2**64."""
        seen = blake2b(document_id.encode("utf-8", "replace"), digest_size=8, key=self.key.encode()[:64])
        return int.from_bytes(seen.digest(), "big") + 1

    def weigh(self, text: str) -> int:
        return self.fixed + len(text.encode("utf-8", "replace"))

    def bytes_of(self, weight: int) -> int:
        """Of a document that weighs so much."""
        return weight - self.fixed


class Place(NamedTuple):
    """Where a document is: the row of a file of the manifest. Places have the order of the input."""

    file_no: int
    row: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """A document of a sample: its place and its weight."""

    place: Place
    weight: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Documents drawn of a population of `documents` with `weight` together; `drawn` are in the input's order.

    Those of more than `threshold` are all in it; of the others, each was drawn with the chance weight/threshold, or,
    where the draw was even, all with the same.
    """

    documents: int
    weight: int
    threshold: float
    drawn: tuple[Drawn, ...]

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left that was not drawn."""
        return len(self.drawn) == self.documents


@dataclass
class Draw:
    """A sample while it is being drawn. It does not matter in which order documents are offered."""

    size: int
    is_even: bool = False
    _documents: int = 0
    _weight: int = 0
    _kept: list[tuple[float, Place, int]] = field(default_factory=list)

    def offer(self, place: Place, weight: int, number: int) -> bool:
        """One more document of the population, with its random number from 1 to 2**64. False: it is not drawn."""
        self._documents += 1
        self._weight += weight
        entry = ((1 if self.is_even else weight) * _NUMBERS / number, place, weight)
        if len(self._kept) <= self.size:  # one more than is drawn: it is the threshold
            heappush(self._kept, entry)
            return True
        return heappushpop(self._kept, entry) is not entry

    def end(self) -> Sample:
        """The sample of all that was offered."""
        kept = sorted(self._kept, reverse=True)
        threshold = kept[self.size][0] if len(kept) > self.size else 0.0
        drawn = sorted(kept[: self.size], key=lambda entry: entry[1])
        return Sample(
            self._documents, self._weight, threshold, tuple(Drawn(place, weight) for _, place, weight in drawn)
        )


def pick(manifest: Manifest, sample: Sample) -> Manifest:
    """What a run is bound to that sends the sample only: a shard for each document, of the files that hold one."""
    rows: dict[int, int] = {}
    for drawn in sample.drawn:
        rows[drawn.place.file_no] = rows.get(drawn.place.file_no, 0) + 1
    numbers = {file_no: number for number, file_no in enumerate(rows)}
    files = (replace(manifest.files[old], file_no=number, rows=rows[old]) for old, number in numbers.items())
    shards = (
        Shard(number, numbers[drawn.place.file_no], drawn.place.row, 1, number, 1)
        for number, drawn in enumerate(sample.drawn)
    )
    return Manifest(tuple(files), tuple(shards), duplicates=())
