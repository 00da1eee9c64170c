"""Pilots: documents drawn evenly that the first and the last tier have answered both, as the ledger has them.

A pilot chooses a policy, and may later fit a ranking. So its documents must never be among those that certify a cut
of that ranking: a run finds them answered by the last tier already, and a certificate's population has none of them
(`schemas.promises.Plan.piloted`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from schemas.confidence import self_reported
from schemas.jobs import Job
from schemas.money import Currency


@dataclass(frozen=True, slots=True)
class Pair:
    """A document's two answers, None where a tier gave none that is valid, and what is known of the first.

    The costs are of all its attempts at that tier but those that primed the cache; None: not known, or none was made.
    Whether an answer is right, the label says; None: there is none. Tokens are of the attempt that was answered.
    """

    first: Mapping[str, Any] | None
    last: Mapping[str, Any] | None
    confidence: float | None = None
    is_repaired: bool = False
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None
    first_pico: int | None = None
    last_pico: int | None = None
    is_first_right: bool | None = None
    is_last_right: bool | None = None


@dataclass(frozen=True, slots=True)
class Pilot:
    """The pairs of one pilot, drawn of so many `documents` that can be sent. `paid_pico` is what its run has cost."""

    run_id: int
    pairs: tuple[Pair, ...]
    documents: int
    paid_pico: int
    currency: Currency
    is_simulated: bool

    @property
    def others(self) -> int:
        """Documents that were not drawn."""
        return self.documents - len(self.pairs)

    @property
    def first_cost(self) -> Fraction | None:
        """What a document costs at the first tier, in pico units. None: nobody knows."""
        return _mean([pair.first_pico for pair in self.pairs if pair.first_pico is not None])

    @property
    def last_cost(self) -> Fraction | None:
        """What a document costs at the last tier, in pico units. None: nobody knows."""
        return _mean([pair.last_pico for pair in self.pairs if pair.last_pico is not None])

    def share_of_last(self, escalated: Collection[Pair]) -> Fraction | None:
        """What a document costs at the last tier on average if only such documents go there. None: nobody knows."""
        usual = self.last_cost
        if usual is None:
            return None
        costs = (usual if pair.last_pico is None else Fraction(pair.last_pico) for pair in escalated)
        return sum(costs, Fraction(0)) / len(self.pairs)


#: Something about an answer of the first tier by which documents can be ranked, the surest first; None: not known.
Signal = Callable[[Pair], float | None]


def signals(job: Job) -> dict[str, Signal]:
    """The signals that the ledger has, by name; `confidence` is the one that decides in a run."""
    found: dict[str, Signal] = {"confidence": lambda pair: pair.confidence}
    if job.confidence.field is not None:
        found["self-report"] = _self_report(job.confidence.field)
    if job.ladder[0].thinking:
        found["less thinking"] = lambda pair: _minus(pair.reasoning_tokens)
    return found | {
        "shorter answer": lambda pair: _minus(pair.output_tokens),
        "shorter document": lambda pair: _minus(pair.prompt_tokens),
        "not repaired": lambda pair: float(not pair.is_repaired),
    }


def _self_report(field: str) -> Signal:
    def read(pair: Pair) -> float | None:
        value: object = pair.first
        for name in field.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return self_reported(value)

    return read


def _minus(tokens: int | None) -> float | None:
    return None if tokens is None else -float(tokens)


def _mean(values: Collection[int]) -> Fraction | None:
    return Fraction(sum(values), len(values)) if values else None
