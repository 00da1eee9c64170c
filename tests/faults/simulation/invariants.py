"""What must hold after a simulated run, decided from the model's rows, the provider's bill and the order of facts.

No code of the product decides anything here. Each invariant yields what breaks it; the names are the design's
(ledger.md, "Guarantees" and "Fault matrix").
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from schemas.records import Lease
from tests.faults.simulation.model import Key
from tests.faults.simulation.provider import COLOURS
from tests.faults.simulation.simulation import Simulation

#: Signals after which nobody knows whether the attempt was billed.
UNKNOWN = ("failed", "lost", "malformed")
#: Verdicts that buy one more attempt on the same tier, once each.
AMENDED = ("invalid_answer", "blank", "truncated")
INTERRUPTED_AT_MOST = 3


def violations(played: Simulation) -> list[str]:
    """Every broken invariant of a simulation that came to its end."""
    found = [f"{invariant.__name__}: {what}" for invariant in INVARIANTS for what in invariant(played)]
    return [*played.world.problems, *found]


def one_ending_per_document(s: Simulation) -> Iterator[str]:
    """G2: and it is the right one: nobody was asked about what cannot be asked, and answers are their document's."""
    model = s.world.model
    for number in range(s.plan.documents):
        ending = model.documents.get((1, number))
        if ending is None:
            yield f"document {number} did not end"
        elif ending.state == "result" and ending.answer != {"colour": COLOURS[number % len(COLOURS)]}:
            yield f"document {number} is {ending.answer}"
        elif ending.document_id not in (f"d{number}", "") or (ending.document_id == "") != (
            ending.reason == "input_changed"
        ):
            yield f"document {number} is called {ending.document_id!r}"
        if number in s.plan.unfit | s.plan.twins and any(key[1] == number for key in model.intents):
            yield f"document {number} needed no attempt and got one"
    if len(model.documents) > s.plan.documents:
        yield f"{len(model.documents)} endings of {s.plan.documents} documents"


def bill_has_rows(s: Simulation) -> Iterator[str]:
    """G4, G7, G8: nothing is billed without an intent, known costs are the bill's, others are within their bounds.

    What was charged for a model that nobody asked for has no bound, and its reply may have been lost.
    """
    model = s.world.model
    for key in s.provider.bill.keys() - model.intents.keys():
        yield f"attempt {key} was billed and never intended"
    for key, (intent, _) in model.intents.items():
        charged, outcome = s.provider.bill.get(key), model.outcomes.get(key)
        billed = charged.cost if charged else 0
        is_bounded = charged is None or charged.model == charged_for(intent.tier)
        if outcome is not None and outcome.cost is not None:
            if outcome.cost != billed:
                yield f"attempt {key} is booked at {outcome.cost} and billed at {billed}"
        elif key not in model.unknowns:
            yield f"attempt {key} is open at the end"
        elif is_bounded and billed > model.unknowns[key]:
            yield f"attempt {key} was billed {billed}, its bound is {model.unknowns[key]}"
        if is_bounded and billed > intent.reserved:
            yield f"attempt {key} was billed {billed} of {intent.reserved} reserved"


def charged_for(tier: str) -> str:
    """The model that a tier asks for. Another one may cost more than was reserved: then the run stops."""
    return {"flash": "deepseek-flash", "pro": "deepseek-v4-pro"}[tier]


def surplus(s: Simulation) -> int:
    """What models that nobody asked for charged above what was reserved."""
    bill = s.provider.bill
    return sum(max(0, bill[k].cost - i.reserved) for k, (i, _) in s.world.model.intents.items() if k in bill)


def budget_holds(s: Simulation) -> Iterator[str]:
    """G9: granted is what the attempts took, each grant had what was taken from it, and it is all closed."""
    model = s.world.model
    taken: Counter[int] = Counter()
    for key, (intent, _) in model.intents.items():
        outcome = model.outcomes.get(key)
        is_known = outcome is not None and outcome.cost is not None
        taken[intent.grant_id] += outcome.cost if outcome and is_known else model.unknowns.get(key, 0)  # type: ignore[operator]  # known
    for number, grant in model.grants.items():
        if not grant.closes or grant.closes[-1] != taken[number]:
            yield f"grant {number} was closed by {grant.closes}, its attempts took {taken[number]}"
        if taken[number] > grant.amount + surplus(s):
            yield f"grant {number} of {grant.amount} had {taken[number]} taken"
    (budget,) = model.budgets.values()
    if budget.granted != sum(taken.values()):
        yield f"granted is {budget.granted}, the attempts took {sum(taken.values())}"
    if budget.granted > s.highest_cap + surplus(s):
        yield f"granted is {budget.granted} of {s.highest_cap}"


def reservations_fit(s: Simulation) -> Iterator[str]:
    """G9 at every moment: what was reserved out of a grant and not yet given back never passed its amount."""
    model, out = s.world.model, Counter[int]()
    for fact in s.world.model.facts:
        if fact.what == "intent":
            intent, _ = model.intents[_key(fact.key)]
            out[intent.grant_id] += intent.reserved
            if out[intent.grant_id] > model.grants[intent.grant_id].amount + surplus(s):
                yield f"attempt {fact.key} brings its grant to {out[intent.grant_id]}"
        elif fact.what == "outcome":
            key = _key(fact.key)
            intent, outcome = model.intents[key][0], model.outcomes[key]
            if outcome.cost is not None:
                out[intent.grant_id] -= intent.reserved - outcome.cost


def only_owners_intend(s: Simulation) -> Iterator[str]:
    """G10, and G5: an intent is its shard's owner's, for a document that had neither ended nor been answered."""
    model = s.world.model
    owners: dict[int, tuple[int, int | None]] = {}
    ended: set[int] = set()
    accepted: dict[int, int] = {}
    claimed_at: dict[Lease, int] = {}
    for instant, fact in enumerate(model.facts):
        if isinstance(fact.key, Lease):
            owners[fact.key.shard_no] = fact.key.epoch, fact.lane_id
            claimed_at[fact.key] = instant
        elif fact.what == "ending" and isinstance(fact.key, int):
            ended.add(fact.key)
        elif fact.what == "outcome" and model.outcomes[_key(fact.key)].verdict == "accepted":
            accepted.setdefault(_key(fact.key)[1], instant)
        elif fact.what == "intent":
            key = _key(fact.key)
            lease = model.intents[key][0].lease
            if owners[lease.shard_no] != (lease.epoch, fact.lane_id):
                yield f"attempt {key} by lane {fact.lane_id} under {lease}, which was {owners[lease.shard_no]}'s"
            if key[1] in ended:
                yield f"attempt {key} of a document that had ended"
            if key[1] in accepted and accepted[key[1]] < claimed_at[lease]:
                yield f"attempt {key} of a document whose answer had been paid for"


def paid_again_for_a_reason(s: Simulation) -> Iterator[str]:
    """G5, G6: two retries of what may have been billed, and no more answers per tier than the ladder allows."""
    model = s.world.model
    tried: dict[tuple[int, str], list[Key]] = defaultdict(list)
    unknown: Counter[int] = Counter()
    for key, (intent, _) in model.intents.items():
        tried[key[1], intent.tier].append(key)
        outcome = model.outcomes.get(key)
        unknown[key[1]] += outcome is None or outcome.reply.signal.value in UNKNOWN
    for number, times in unknown.items():
        if times > 3:
            yield f"document {number} was sent again after {times} unknowns"
    for (number, tier), keys in tried.items():
        outcomes = [model.outcomes[key] for key in keys if key in model.outcomes]
        verdicts = Counter(outcome.verdict.value for outcome in outcomes if outcome.verdict is not None)
        again = sum(min(1, verdicts[verdict]) for verdict in AMENDED)
        late = sum(1 for key in keys if key in model.unknowns)
        interrupted = sum(1 for outcome in outcomes if outcome.reply.signal == "interrupted")
        if verdicts.total() > 1 + again + late:
            yield f"document {number} was answered {dict(verdicts)} at {tier}"
        if interrupted > INTERRUPTED_AT_MOST + late:
            yield f"document {number} was interrupted {interrupted} times at {tier}"


def in_flight_within_limit(s: Simulation) -> Iterator[str]:
    """G12: no lane had more requests at a tier at once than its share of the highest ceiling that was ever said.

    Nor had all of them together more than that, but for those that were taken for dead. Where there were ever more
    lanes than places, one may have had all that the others had no use for.
    """
    for model, peak in s.provider.together.items():
        if peak > s.highest_ceiling:
            yield f"{peak} requests were at {model} at once, of {s.highest_ceiling}"
    may_have_all = s.plan.are_strangers or s.world.model.was_crowded
    share = s.highest_ceiling if may_have_all else -(-s.highest_ceiling // s.plan.lanes)
    for (lane_id, model), peak in s.provider.peaks.items():
        if peak > share:
            yield f"lane {lane_id} had {peak} requests at {model} at once, and may have {share}"


def nothing_is_left(s: Simulation) -> Iterator[str]:
    """Every shard is done or failed, every lane has ended, no reply waits on disk."""
    model = s.world.model
    for row in model.runs[1].shards:
        if row.state not in ("done", "failed"):
            yield f"shard {row.shard.shard_no} is {row.state}"
    for number, lane in model.lanes.items():
        if lane.ended_because is None:
            yield f"lane {number} has not ended"


def _key(said: object) -> Key:
    assert isinstance(said, tuple)
    return said


INVARIANTS = (
    one_ending_per_document,
    bill_has_rows,
    budget_holds,
    reservations_fit,
    only_owners_intend,
    paid_again_for_a_reason,
    in_flight_within_limit,
    nothing_is_left,
)
