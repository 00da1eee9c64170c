"""What keeps the promise of a run, and proves later that it was kept by the rule: alone responsible for the cut.

The order of all documents is frozen first, then the sample is drawn, then Pro answers it, then the cut follows.
`escalate: {target, delta}` decides by this. The proof that the promise holds is in docs/guarantee.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from hashlib import sha256
from itertools import pairwise
from typing import Any

from schemas.promises import Plan, allowance, draw


@dataclass(frozen=True, slots=True)
class Candidate:
    """A document with the first tier's answer; without a confidence the answer was invalid."""

    document: str
    confidence: float | None


def freeze(candidates: Iterable[Candidate], salt: bytes) -> list[Candidate]:
    """The order: surest first, invalid answers last, ties by chance that the salt decided beforehand."""
    return sorted(candidates, key=lambda one: (*_unsureness(one), sha256(salt + one.document.encode()).digest()))


def _unsureness(one: Candidate) -> tuple[bool, float]:
    return one.confidence is None, -(one.confidence or 0.0)


@dataclass
class OrderDigest:
    """What names an order, while its documents go by: it need not be in memory."""

    _digest: Any = field(default_factory=sha256)

    def add(self, document: str) -> None:
        encoded = document.encode()
        self._digest.update(len(encoded).to_bytes(4, "big") + encoded)  # so that no two orders are the same bytes

    @property
    def name(self) -> str:
        return f"sha256:{self._digest.hexdigest()}"


def order_hash(documents: Iterable[str]) -> str:
    """What names an order; it is stored before the first document of the sample is sent."""
    digest = OrderDigest()
    for document in documents:
        digest.add(document)
    return digest.name


class Fate(StrEnum):
    """What becomes of a first answer that waits; of those that climb, the reason."""

    WAIT = "wait"
    SAMPLE = "certified_sample"
    ACCEPT = "accept"
    ESCALATE = "not_certified"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a waiting document stands: its rank once the order is frozen, and the cut once there is one."""

    rank: int | None = None
    is_sampled: bool = False
    cut: int | None = None

    @property
    def fate(self) -> Fate:
        if self.is_sampled:
            return Fate.SAMPLE
        if self.cut is None:
            return Fate.WAIT
        is_above = self.rank is not None and self.rank < self.cut
        return Fate.ACCEPT if is_above else Fate.ESCALATE


#: What a run's one finding is about: an answer differs where any of its fields that are compared does.
WHOLE = "answer"


@dataclass(frozen=True, slots=True)
class Finding:
    """The ranks, from 0, of sampled documents on which the tiers disagree: about one field, or WHOLE answers.

    A document for which the last tier gave no answer is a disagreement.
    """

    field: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Subject:
    """What was certified: these models in this order with this prompt version. Any change voids the certificate."""

    models: tuple[str, ...]
    prompt_version: str


@dataclass(frozen=True, slots=True)
class Certificate:
    """How one run was cut, with all that is needed to check it: ranks below `cut` keep the first tier's answer.

    `score_at_cut` is the confidence of the first document that was not accepted, None where all were; it is for
    people and decides nothing. `tail` is rounded up; None: nothing was accepted.
    """

    plan: Plan
    subject: Subject
    order: str
    seed: str
    findings: tuple[Finding, ...]
    tail: Decimal | None
    cut: int
    score_at_cut: float | None

    @property
    def disagreements(self) -> int:
        """Sampled documents on which the tiers disagree about some field."""
        return len({rank for one in self.findings for rank in one.ranks})


def certify(
    planned: Plan,
    subject: Subject,
    order: str,
    seed: bytes,
    findings: Sequence[Finding],
    score_at_cut: float | None,
    risk: Decimal | None,
) -> Certificate:
    """The certificate of a sample that was drawn with this seed, from the order of this hash, and answered.

    `risk` is the plan's, which takes long and is known before.
    """
    cut = find_cut(planned, findings)
    return Certificate(planned, subject, order, seed.hex(), tuple(findings), risk, cut, score_at_cut)


def find_cut(planned: Plan, findings: Sequence[Finding]) -> int:
    """How many of the order's first documents are accepted: the rank of disagreement c + 1, for the worst field."""
    if len(findings) != planned.fields:
        raise ValueError(f"the plan is for {planned.fields} fields, and there are findings about {len(findings)}")
    passed = planned.allowance
    if passed is None:
        return 0
    return min(one.ranks[passed] if len(one.ranks) > passed else planned.population for one in findings)


def check(certificate: Certificate, order: str, subject: Subject) -> list[str]:
    """What does not hold of a certificate, recomputed from its own figures; nothing where all of it does.

    `order` is the hash of the order as it is found now, `subject` what would answer now.
    """
    return [*_check_sample(certificate), *_check_cut(certificate), *_check_void(certificate, order, subject)]


def _check_void(certificate: Certificate, order: str, subject: Subject) -> Iterator[str]:
    if order != certificate.order:
        yield f"the order is {order}, and {certificate.order} was certified"
    if subject != certificate.subject:
        yield "the models or the prompt version are not those that were certified: ask for a new certificate"


def _check_sample(certificate: Certificate) -> Iterator[str]:
    planned = certificate.plan
    sample = set(draw(bytes.fromhex(certificate.seed), planned.population, planned.size))
    for one in certificate.findings:
        if not sample.issuperset(one.ranks):
            yield f"{one.field}: a disagreement has a rank that the seed does not draw"
        if any(rank >= after for rank, after in pairwise(one.ranks)):
            yield f"{one.field}: the ranks of disagreements are not in order, each once"


def _check_cut(certificate: Certificate) -> Iterator[str]:
    planned = certificate.plan
    each = planned.promise.shared_by(planned.fields)
    passed = allowance(planned.population, planned.allowed, planned.size, each.delta)
    if passed != planned.allowance:
        yield f"the sample allows {passed} disagreements above the cut, not {planned.allowance}"
    if len(certificate.findings) != planned.fields:
        yield f"there are findings about {len(certificate.findings)} of {planned.fields} fields"
    elif find_cut(planned, certificate.findings) != certificate.cut:
        yield f"the cut is at {find_cut(planned, certificate.findings)}, not at {certificate.cut}"
    if certificate.tail != planned.risk:
        yield f"the chance to fail is not {certificate.tail}"
