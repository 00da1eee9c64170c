"""What a pilot says about a job: how often its tiers agree, what its signals are worth, and which policy is cheapest.

Pure: everything follows from a pilot's pairs. A threshold that held in the pilot promises nothing, since it was
chosen by the very documents that speak for it; which policies do promise something says `Standing`. Sums are what the
pilot's documents were booked at, times the documents: at other hours they are others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from enum import StrEnum
from fractions import Fraction
from itertools import accumulate

from schemas.agreement import Rule
from schemas.jobs import Job
from schemas.pilots import Pair, Pilot, signals
from schemas.promises import Plan, Promise, caution, plan
from schemas.signals import Scored, Share, accept, auc, bound_share, brier, tied
from schemas.tails import binomial
from schemas.thresholds import streaming_threshold

#: The targets that signals are compared at.
TARGETS = (Fraction(90, 100), Fraction(95, 100), Fraction(99, 100))
#: One of two tiers is called better where chance alone would say so of one or the other in 1 of 20 cases at most.
_DOUBT = Fraction(1, 40)
_NONE = Fraction(0)
#: Where the last tier is right no more than this more often, hardly anything is bought by it.
_SMALL = 0.02
#: The signals that are probabilities, and can be held to what came.
_PROBABILITIES = ("confidence", "self-report")
#: A text field that differs more often than this is hardly compared by what it means.
_FREE = Fraction(1, 2)


@dataclass(frozen=True, slots=True)
class SignalWorth:
    """What one signal is worth: of so many `answers` that have it, and how many documents it accepts at each target.

    `accepted` are those in the order of TARGETS. The others as in schemas/signals.py.
    """

    name: str
    answers: int
    auc: Fraction | None
    accepted: tuple[int, ...]
    brier: float | None
    tied: Fraction | None


class Standing(StrEnum):
    """What is known of whether a policy meets the target."""

    ALL = "all are the last tier's"
    PROMISED = "promised for this run"
    PROMISED_ALIKE = "promised for documents like these"
    HELD = "held in the pilot, no promise"
    FAILED = "not met in the pilot"


@dataclass(frozen=True, slots=True)
class Policy:
    """A way to run the job: what to write, documents at the last tier, and the cost of all that the pilot left.

    `escalated` and `pico` are expected; `agreement` is the share of documents of the pilot that would have got the
    last tier's answer. `pico` None: nobody knows.
    """

    name: str
    setting: str
    escalated: int
    pico: int | None
    agreement: Fraction
    standing: Standing


@dataclass(frozen=True, slots=True)
class Labelled:
    """How often a tier is right by the labels: on `better` documents only the last is, on `worse` only the first."""

    first: Share
    last: Share
    better: int
    worse: int

    @property
    def most(self) -> float:
        """How much more often the last tier may be right at most, as far as these labels bound it (LEVEL)."""
        return bound_share(self.better, self.first.of).high - bound_share(self.worse, self.first.of).low

    @property
    def gain(self) -> bool | None:
        """Whether the last tier is the better one; None: these labels do not tell (exact sign test)."""
        if self._is_unlikely(self.worse):
            return True
        return False if self._is_unlikely(self.better) else None

    def _is_unlikely(self, fewer: int) -> bool:
        apart = self.better + self.worse
        return bool(apart) and binomial(apart, Fraction(1, 2), fewer).is_within(_DOUBT)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What follows from a pilot for a promise. `differing` is by field, of documents with both answers.

    Policies are priced for the documents that are `left`, but for one of the last tier alone, which reuses nothing.
    `unanswered` counts documents without a valid answer of the first and of the last tier: these count as differing.
    """

    job: str
    ladder: tuple[str, ...]
    promise: Promise
    pilot: Pilot
    left: int
    agreement: Share
    unanswered: tuple[int, int]
    differing: Mapping[str, int]
    signals: tuple[SignalWorth, ...]
    policies: tuple[Policy, ...]
    labels: Labelled | None
    notes: tuple[str, ...]

    @property
    def cheapest_that_held(self) -> Policy | None:
        """Of the policies that met the target in the pilot, and may promise nothing. None: nobody knows the costs."""
        return _cheapest(each for each in self.policies if each.standing is not Standing.FAILED)

    @property
    def cheapest_promised(self) -> Policy | None:
        """Of those that promise the target. None: nobody knows what they cost."""
        return _cheapest(each for each in self.policies if each.standing not in (Standing.FAILED, Standing.HELD))


def _cheapest(policies: Iterable[Policy]) -> Policy | None:
    """The first of the cheapest."""
    costs = {each.pico: each for each in reversed(list(policies)) if each.pico is not None}
    return costs[min(costs)] if costs else None


def calibrate(job: Job, pilot: Pilot, promise: Promise) -> Calibration:
    """What the pilot says. It has at least one document, and its job at least two tiers."""
    case = _Case(job, pilot, promise, tuple(_judge(job, pair) for pair in pilot.pairs))
    labels = _compare_labels(pilot)
    policies = tuple(_policies(case)) if case.left else ()
    both = [pair for pair in pilot.pairs if pair.first is not None and pair.last is not None]
    fields = [job.agreement.differing(pair.first, pair.last) for pair in both]
    differing = {name: sum(name in each for each in fields) for name in job.agreement.fields}
    notes = (
        *_ladder_notes(job, labels, pilot),
        *_policy_notes(case, policies),
        *_field_notes(job, differing, len(both)),
    )
    return Calibration(
        job=job.name,
        ladder=tuple(tier.name for tier in job.ladder),
        promise=promise,
        pilot=pilot,
        left=case.left,
        agreement=bound_share(sum(each.agrees for each in case.judged), len(case.judged)),
        unanswered=(
            sum(pair.first is None for pair in pilot.pairs),
            sum(pair.last is None for pair in pilot.pairs),
        ),
        differing=differing,
        signals=tuple(_signal_worths(job, case.judged)),
        policies=policies,
        labels=labels,
        notes=notes,
    )


@dataclass(frozen=True, slots=True)
class _Judged:
    """A pair, and the fields on which its answers differ: all where a tier gave none."""

    pair: Pair
    differing: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        return not self.differing

    @property
    def is_valid(self) -> bool:
        return self.pair.first is not None

    @property
    def sureness(self) -> float:
        """As `escalate: {below}` has it: without a number an answer is below no threshold."""
        return math.inf if self.pair.confidence is None else self.pair.confidence


def _judge(job: Job, pair: Pair) -> _Judged:
    return _Judged(pair, job.agreement.differing(pair.first, pair.last))


@dataclass(frozen=True, slots=True)
class _Case:
    """What policies are compared for."""

    job: Job
    pilot: Pilot
    promise: Promise
    judged: tuple[_Judged, ...]

    @property
    def ends(self) -> str:
        """What a job file has to say besides, where tiers lie between the two that a pilot asks; "": nothing."""
        first, last = self.job.ladder[0].name, self.job.ladder[-1].name
        return f"ladder: [{first}, {last}]\n" if len(self.job.ladder) > 2 else ""

    @property
    def left(self) -> int:
        """Documents that a run has to pay for: with another ladder the pilot's, too, since it reuses none of it."""
        return self.pilot.documents if self.ends else self.pilot.others

    @property
    def valid(self) -> list[Scored]:
        return [Scored(each.sureness, each.agrees) for each in self.judged if each.is_valid]

    @property
    def planned(self) -> Plan:
        """As a run plans its certificate: what has the last tier's answer already is not drawn from."""
        climbing = self.of_left(sum(not each.is_valid for each in self.judged))
        documents = self.pilot.documents
        piloted = documents - self.left + climbing
        return plan(self.promise, documents, piloted=piloted)

    def of_left(self, count: int) -> int:
        """How many of the documents that are left such are expected to be, of which the pilot has so many."""
        return math.ceil(Fraction(self.left * count, len(self.judged)))

    def cost(
        self, escalated: Iterable[_Judged], sampled: Iterable[_Judged] = (), share: Fraction = _NONE
    ) -> int | None:
        """Of the documents that are left, in pico units, where such go to the last tier, and a share of others."""
        first = self.pilot.first_cost
        last = self.pilot.share_of_last([each.pair for each in escalated])
        drawn = self.pilot.share_of_last([each.pair for each in sampled])
        if first is None or last is None or drawn is None:
            return None
        return math.ceil(self.left * (first + last + share * drawn))


def _signal_worths(job: Job, judged: Sequence[_Judged]) -> Iterator[SignalWorth]:
    for name, read in signals(job).items():
        values = [(read(each.pair), each.agrees) for each in judged if each.is_valid]
        scored = [Scored(value, agrees) for value, agrees in values if value is not None]
        if scored:
            allowed = [math.floor((1 - target) * len(judged)) for target in TARGETS]
            accepted = tuple(accept(scored, most).count for most in allowed)
            held = brier(scored) if name in _PROBABILITIES else None
            yield SignalWorth(name, len(scored), auc(scored), accepted, held, tied(scored))


def _policies(case: _Case) -> Iterator[Policy]:
    pilot, promise = case.pilot, case.promise
    first, last = case.job.ladder[0].name, case.job.ladder[-1].name
    yield _by_threshold(f"{first} only", Decimal(0), case)
    yield Policy(
        name=f"{last} only",
        setting=f"ladder: [{last}]",
        escalated=pilot.documents,  # the pilot's too: another ladder reuses none of its answers
        pico=None if pilot.last_cost is None else math.ceil(pilot.documents * pilot.last_cost),
        agreement=Fraction(1),
        standing=Standing.ALL,
    )
    found = accept(case.valid, promise.allowed(len(case.judged))).least
    # No threshold parts answers without a number from those that are entirely sure.
    if found is not None and not (found == math.inf and any(1 <= each.score < math.inf for each in case.valid)):
        yield _by_threshold("threshold that held", _at_most(found, case.valid), case)
    wrong = [each.score for each in case.valid if not each.agrees]
    above = streaming_threshold(wrong, len(case.judged), promise)
    if above < 1:
        below = _just_above(above, case.valid)
        yield _by_threshold("threshold for daily runs", below, case, Standing.PROMISED_ALIKE)
    yield _certified(case)


def _by_threshold(name: str, below: Decimal, case: _Case, standing: Standing | None = None) -> Policy:
    escalated = [each for each in case.judged if not each.is_valid or each.sureness < float(below)]
    wrong = sum(not each.agrees for each in case.judged) - sum(not each.agrees for each in escalated)
    held = Standing.HELD if wrong <= case.promise.allowed(len(case.judged)) else Standing.FAILED
    return Policy(
        name=name,
        setting=f"{case.ends}escalate: {{below: {below}}}",
        escalated=case.of_left(len(escalated)),
        pico=case.cost(escalated),
        agreement=1 - Fraction(wrong, len(case.judged)),
        standing=standing or held,
    )


def _certified(case: _Case) -> Policy:
    """As the pilot lets expect: where the sample's disagreements would lie if they were spread like the pilot's."""
    planned = case.planned
    invalid = [each for each in case.judged if not each.is_valid]
    ranked = sorted(filter(lambda each: each.is_valid, case.judged), key=_rank, reverse=True)
    kept = _expect_cut(ranked, planned)
    sampled = Fraction(planned.size, max(1, planned.population))
    beyond = (planned.population - planned.size) * Fraction(len(ranked) - kept, max(1, len(ranked)))
    wrong = (1 - sampled) * sum(not each.agrees for each in ranked[:kept])
    target, delta = (Decimal(part.numerator) / part.denominator for part in (case.promise.target, case.promise.delta))
    return Policy(
        name="certified target",
        setting=f"{case.ends}escalate: {{target: {target}, delta: {delta}}}",
        escalated=case.of_left(len(invalid)) + math.ceil(planned.size + beyond),
        pico=case.cost([*invalid, *ranked[kept:]], ranked[:kept], sampled),
        agreement=1 - wrong / len(case.judged),
        standing=Standing.ALL if planned.allowance is None else Standing.PROMISED,
    )


def _rank(each: _Judged) -> tuple[bool, float]:
    """Without a number last, as a certificate has them."""
    return each.pair.confidence is not None, each.pair.confidence or 0.0


def _expect_cut(ranked: Sequence[_Judged], planned: Plan) -> int:
    """How many of the pilot's valid answers, best first, would be accepted."""
    if planned.allowance is None:
        return 0
    if not planned.size:  # every answer may differ
        return len(ranked)
    passed = Fraction((planned.allowance + 1) * len(ranked), planned.size)
    wrong = accumulate(int(not each.agrees) for each in ranked)
    return next((rank for rank, count in enumerate(wrong) if count >= passed), len(ranked))


def _at_most(score: float, valid: Sequence[Scored]) -> Decimal:
    """The shortest threshold that accepts this score, and none that is lower."""
    if score == math.inf:  # only answers without a number
        return Decimal(1)
    lower = max((each.score for each in valid if each.score < score), default=-math.inf)
    exact = Decimal(repr(score))
    return next(each for each in _shorter(exact, ROUND_FLOOR) if lower < float(each) <= score)


def _just_above(score: float, valid: Sequence[Scored]) -> Decimal:
    """The shortest threshold that is above this score, and accepts every higher one."""
    if score == -math.inf:
        return Decimal(0)
    higher = min((each.score for each in valid if each.score > score), default=1.0)
    exact = Decimal(repr(math.nextafter(score, math.inf)))
    return next(each for each in _shorter(exact, ROUND_CEILING) if score < float(each) <= max(higher, float(exact)))


def _shorter(exact: Decimal, rounding: str) -> Iterator[Decimal]:
    for places in range(2, 18):
        yield exact.quantize(Decimal(1).scaleb(-places), rounding)
    yield exact


def _compare_labels(pilot: Pilot) -> Labelled | None:
    told = [
        (pair.is_first_right, pair.is_last_right)
        for pair in pilot.pairs
        if pair.is_first_right is not None and pair.is_last_right is not None
    ]
    if not told:
        return None
    return Labelled(
        first=bound_share(sum(first for first, _ in told), len(told)),
        last=bound_share(sum(last for _, last in told), len(told)),
        better=told.count((False, True)),
        worse=told.count((True, False)),
    )


def _ladder_notes(job: Job, labels: Labelled | None, pilot: Pilot) -> Iterator[str]:
    """Whether the labels say that the last tier earns its money."""
    first, last = job.ladder[0].name, job.ladder[-1].name
    if len(job.ladder) > 2:
        between = ", ".join(tier.name for tier in job.ladder[1:-1])
        yield f"a pilot asks {first} and {last}, and says nothing of {between}: the policies do without"
    if labels is None:
        return
    apart = f"on {labels.better} documents only {last} is right, on {labels.worse} only {first}"
    match labels.gain:
        case True:
            yield f"by the labels {last} is better than {first}: {apart}"
        case False:
            cheap, dear = pilot.first_cost, pilot.last_cost
            more = ", and costs more" if cheap is not None and dear is not None and dear > cheap else ""
            yield f"by the labels {last} is worse than {first}{more}: {apart}; write `ladder: [{first}]`"
        case None if labels.most <= _SMALL:
            yield (
                f"by the labels {last} is right at most {labels.most * 100:.1f} % more often than {first}: {apart}; "
                f"the ladder hardly earns its money, and `ladder: [{first}]` is about as good"
            )
        case None:
            yield (
                f"these {labels.first.of} labels do not tell whether {last} is better than {first}: {apart}; it may "
                f"be right up to {labels.most * 100:.1f} % more often: label more documents"
            )


def _policy_notes(case: _Case, policies: Sequence[Policy]) -> Iterator[str]:
    if not policies:
        yield "the pilot asked every document: nothing is left to choose a policy for"
        return
    if any(each.standing is Standing.HELD for each in policies):
        yield (
            "a threshold that held in a pilot fails in a fifth to a half of runs, since the pilot is as likely to "
            "flatter as not; what is promised fails in no more than the delta"
        )
    if all(each.standing is not Standing.PROMISED_ALIKE for each in policies):
        yield "the pilot is too small, or the signal too weak, for a threshold that promises something for daily runs"
    if told := caution(case.planned):
        yield told


def _field_notes(job: Job, differing: Mapping[str, int], both: int) -> Iterator[str]:
    for name, rule in job.agreement.rules:
        if rule is Rule.TEXT and both and Fraction(differing[name], both) > _FREE:
            yield (
                f"{name} differs in {differing[name]} of {both}: free text hardly ever agrees word by word; "
                f"`match: {{{name}: ignore}}` leaves it out, and costs no new pilot"
            )
