"""Reconciliation: our ledger against the provider's statement, and what the difference says of unknown attempts.

Both are compared by UTC day, model, bucket, price and, where the statement has the ones we send, `user_id`. An export
is a sum over attempts: what it has beyond the known ones is, together and to the token, what the unknown ones of that
day and price were billed. Which of them it was it cannot say, so each gets a share by what was reserved for it.
Shares add up to the export exactly, and none is above its bound. A day of a model is closed whole or not at all:
while a line of it differs that unknown attempts cannot explain, nobody knows what they were billed. A reply that
comes late overrides its attempt's share; what the shares of the others are off by then is a correction.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from itertools import accumulate, pairwise

from schemas.attempts import Usage
from schemas.errors import UnknownPrice
from schemas.money import Currency
from schemas.pricing import Price, PriceBook
from schemas.statements import Bucket, Statement

#: An attempt was billed within so much before and after the instant that we have for it: clocks differ a little, and
#: the provider may work ten minutes before it begins, and on without us.
EARLY, LATE = timedelta(minutes=1), timedelta(minutes=15)


class Status(StrEnum):
    """How a line of the ledger and one of the statement compare. `unknown`: unknown attempts can explain it."""

    MATCHED = "matched"
    OURS_ONLY = "ours only"
    THEIRS_ONLY = "theirs only"
    DIFFERS = "amount differs"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """What a line is about. `user_id` is empty where the statement does not tell requests apart by it."""

    day: date
    model: str
    user_id: str
    bucket: Bucket
    price_pico: int


@dataclass(frozen=True, slots=True)
class Match:
    """Tokens of one line: what our ledger has booked, and what the provider's statement says."""

    key: Key
    ours: int
    theirs: int
    status: Status

    @property
    def missing(self) -> int:
        """Tokens that the statement has and the ledger has not; negative the other way round."""
        return self.theirs - self.ours

    @property
    def off_pico(self) -> int:
        """The same in pico units of money."""
        return self.missing * self.key.price_pico


@dataclass(frozen=True, slots=True)
class BookedTokens:
    """What the ledger booked on a day by one price row, for one `user_id`."""

    day: date
    user_id: str
    price: str
    model: str
    prices: Usage
    tokens: Usage


@dataclass(frozen=True, slots=True)
class Unsettled:
    """An attempt of unknown cost. `placed_at` is about when, by the provider's clock."""

    run: int
    document_no: int
    attempt_no: int
    user_id: str
    model: str
    bound_pico: int
    placed_at: datetime
    is_open: bool

    @property
    def window(self) -> tuple[datetime, datetime]:
        """From when to when it can have been billed."""
        return self.placed_at - EARLY, self.placed_at + LATE


@dataclass(frozen=True, slots=True)
class Closing:
    """What closes an unknown attempt: its tokens at a price row, and the evidence in words."""

    of: Unsettled
    price: Price
    tokens: Usage
    billed_on: date
    evidence: str

    @property
    def amount_pico(self) -> int:
        return self.price.cost(self.tokens)


@dataclass(frozen=True, slots=True)
class Shared:
    """What an export told of a run's attempts of a day and price that no late reply overrode, with corrections.

    `bound_pico` is what those can have cost at most; `is_overridden`: a late reply overrode another one.
    """

    run: int
    user_id: str
    day: date
    price: str
    tokens: Usage
    bound_pico: int
    is_overridden: bool


@dataclass(frozen=True, slots=True)
class Correction:
    """What the shares of a run's attempts of a day and price are off by together, since a reply told of another one.

    Its tokens may be negative.
    """

    run: int
    price: Price
    tokens: Usage
    billed_on: date
    evidence: str

    @property
    def amount_pico(self) -> int:
        return self.price.cost(self.tokens)


@dataclass(frozen=True)
class Reconciliation:
    """All lines, what the statement proves, and why the other unknown attempts stay (`left`, by reason).

    A reason with no attempts is why something is not corrected.
    `others_pico` is what the statement has of a `user_id` that the ledger never sent. Of the days that are `doubtful`
    attempts shared what an export told, a late reply of one of them showed that it was shared otherwise, and the
    statement does not say how.
    """

    matches: tuple[Match, ...]
    closings: tuple[Closing, ...]
    left: Mapping[str, tuple[Unsettled, ...]]
    others_pico: int
    is_by_user: bool
    doubtful: tuple[date, ...] = ()
    corrections: tuple[Correction, ...] = ()

    @property
    def bookable(self) -> tuple[Closing | Correction, ...]:
        """What the statement proves, each a row to be booked."""
        return (*self.closings, *self.corrections)

    @property
    def corrected_pico(self) -> int:
        """What the corrections book, which may be negative."""
        return sum(each.amount_pico for each in self.corrections)

    @property
    def ours_pico(self) -> int:
        return sum(each.ours * each.key.price_pico for each in self.matches)

    @property
    def theirs_pico(self) -> int:
        return sum(each.theirs * each.key.price_pico for each in self.matches)

    @property
    def closed_pico(self) -> int:
        """What the closings book."""
        return sum(each.amount_pico for each in self.closings)

    @property
    def is_clean(self) -> bool:
        """Whether every line is matched, or explained by attempts that are known to be unknown."""
        return all(each.status in (Status.MATCHED, Status.UNKNOWN) for each in self.matches)


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where an attempt can have been billed: a day, for a user, at one price row."""

    day: date
    user_id: str
    price: Price

    @property
    def group(self) -> tuple[date, str, str]:
        """What is closed whole or not at all."""
        return self.day, self.price.model, self.user_id

    @property
    def keys(self) -> tuple[Key, Key, Key]:
        prices = zip(Bucket, (self.price.hit_pico, self.price.miss_pico, self.price.output_pico), strict=True)
        hit, miss, output = (Key(self.day, self.price.model, self.user_id, bucket, price) for bucket, price in prices)
        return hit, miss, output


def reconcile(
    booked: Sequence[BookedTokens],
    unsettled: Sequence[Unsettled],
    statement: Statement,
    book: PriceBook,
    currency: Currency,
    days: Collection[date],
    *,
    is_complete: bool = False,
    is_alone: bool = False,
    shared: Sequence[Shared] = (),
) -> Reconciliation:
    """Compare these days of the ledger with the statement, and say what it closes.

    `is_complete`: its user knows that it has all there is of them, beyond its first and last row. `is_alone`: that
    nothing but this ledger used the account. Else what a statement has beyond the known ones may be of another
    program, and closes nothing, unless it is of our `user_id` or of one API key. `shared` is what exports have told
    of these days before.
    """
    own = {each.user_id for each in booked} | {each.user_id for each in unsettled}
    is_by_user = any(each.user_id in own for each in statement.used)
    theirs, others_pico = _sum_theirs(statement, book, days, own if is_by_user else None)
    ours = _sum_ours(booked, days, is_by_user=is_by_user)
    gaps = {key: theirs.get(key, 0) - ours.get(key, 0) for key in sorted({*ours, *theirs})}
    terms = _Terms(statement, book, currency, days, is_by_user, is_complete, is_alone)
    proved, left = _close(gaps, unsettled, _reopen(shared, terms), terms)
    closings = tuple(each for each in proved if isinstance(each, Closing))
    explained = {key for each in closings for key in _Slot(each.billed_on, terms.user(each.of), each.price).keys}
    if proved and not terms.is_ours:
        left = {**left, _WHOSE: tuple(closing.of for closing in closings)}
        proved, closings = (), ()
    matches = (
        Match(key, ours.get(key, 0), theirs.get(key, 0), _judge(key, ours, theirs, key in explained)) for key in gaps
    )
    made = tuple(matches)
    corrections = tuple(each for each in proved if isinstance(each, Correction))
    doubtful = _doubt(made, corrections, shared, terms)
    return Reconciliation(made, closings, left, others_pico, is_by_user, doubtful, corrections)


_NOTHING = Usage(0, 0, 0)
_WHOSE = (
    "the export does not say whether what it has beyond the known ones is theirs or another program's: --key NAME "
    "takes the API key that only this ledger uses, --alone says that nothing else used the account on these days"
)


@dataclass(frozen=True, slots=True)
class _Terms:
    """What a statement is held against."""

    statement: Statement
    book: PriceBook
    currency: Currency
    days: Collection[date]
    is_by_user: bool
    is_complete: bool
    is_alone: bool

    @property
    def is_ours(self) -> bool:
        """Whether nobody else's tokens are among those that are compared."""
        return self.is_by_user or self.statement.key is not None or self.is_alone

    @property
    def source(self) -> str:
        """The files, and what was said of them that they do not say themselves."""
        key = [] if self.statement.key is None else [f"API key {self.statement.key}"]
        alone = ["said to be of this ledger alone"] if self.is_alone else []
        complete = ["said to be complete"] if self.is_complete else []
        return ", ".join([*self.statement.sources, *key, *alone, *complete])

    def user(self, of: Unsettled | BookedTokens | Shared) -> str:
        return of.user_id if self.is_by_user else ""

    def has_all_of(self, day: date) -> bool:
        """Whether nothing of that day can come with a later export."""
        start = datetime(day.year, day.month, day.day, tzinfo=UTC)
        ends = start + timedelta(days=1) + LATE
        return self.is_complete or (self.statement.since <= start and ends <= self.statement.until)


def _reopen(shared: Sequence[Shared], terms: _Terms) -> dict[_Slot, list[Shared]]:
    """What was shared where a late reply showed that it was shared otherwise, the shares of all runs together."""
    prices = {price.name: price for price in terms.book.rows()}
    found: dict[_Slot, list[Shared]] = {}
    for each in shared:
        if each.price in prices and each.day in terms.days:
            found.setdefault(_Slot(each.day, terms.user(each), prices[each.price]), []).append(each)
    return {slot: shares for slot, shares in found.items() if any(each.is_overridden for each in shares)}


def _doubt(
    matches: Sequence[Match], corrections: Sequence[Correction], shared: Sequence[Shared], terms: _Terms
) -> tuple[date, ...]:
    """Days on which what a late reply overrode lies where lines differ, and no correction says by what."""
    users = {each.run: terms.user(each) for each in shared}
    odd = {(each.key.day, each.key.model, each.key.user_id) for each in matches if each.status is not Status.MATCHED}
    odd -= {(each.billed_on, each.price.model, users[each.run]) for each in corrections}
    overridden = (each for each in shared if each.is_overridden)
    # The model by the price's name, for the book may have that price no more.
    return tuple(sorted({x.day for x in overridden if (x.day, x.price.partition("/")[0], terms.user(x)) in odd}))


def _sum_ours(booked: Iterable[BookedTokens], days: Collection[date], *, is_by_user: bool) -> dict[Key, int]:
    found: dict[Key, int] = {}
    for each in booked:
        for bucket, price, tokens in _buckets(each.prices, each.tokens):
            if tokens and each.day in days:
                key = Key(each.day, each.model, each.user_id if is_by_user else "", bucket, price)
                found[key] = found.get(key, 0) + tokens
    return found


def _buckets(prices: Usage, tokens: Usage) -> Iterator[tuple[Bucket, int, int]]:
    yield Bucket.HIT, prices.hit, tokens.hit
    yield Bucket.MISS, prices.miss, tokens.miss
    yield Bucket.OUTPUT, prices.output, tokens.output


def _sum_theirs(
    statement: Statement, book: PriceBook, days: Collection[date], own: Collection[str] | None
) -> tuple[dict[Key, int], int]:
    """The statement's tokens by line, and what is none of ours in pico units."""
    found: dict[Key, int] = {}
    others = 0
    for used in statement.used:
        if used.period.day not in days:
            continue
        if own is not None and used.user_id not in own:
            others += used.tokens * used.price_pico
            continue
        user = "" if own is None else used.user_id
        key = Key(used.period.day, _canonical(used.model, book), user, used.bucket, used.price_pico)
        found[key] = found.get(key, 0) + used.tokens
    return found, others


def _canonical(model: str, book: PriceBook) -> str:
    """The name that prices are kept under; a model nobody knows keeps its own, and matches nothing."""
    try:
        return book.canonical(model)
    except UnknownPrice:
        return model


def _judge(key: Key, ours: Mapping[Key, int], theirs: Mapping[Key, int], is_explained: bool) -> Status:
    if ours.get(key, 0) == theirs.get(key, 0):
        return Status.MATCHED
    if is_explained:
        return Status.UNKNOWN
    if key not in theirs:
        return Status.OURS_ONLY
    return Status.DIFFERS if key in ours else Status.THEIRS_ONLY


class _Left:
    """The attempts that stay unknown, by the reason why, and the days, models and users that they may be of."""

    def __init__(self) -> None:
        self.by_reason: dict[str, list[Unsettled]] = {}
        self.touched: set[tuple[date, str, str]] = set()

    def add(self, why: str, attempts: Iterable[Unsettled]) -> None:
        self.by_reason.setdefault(why, []).extend(attempts)


def _close(
    gaps: Mapping[Key, int], unsettled: Sequence[Unsettled], reopened: Mapping[_Slot, Sequence[Shared]], terms: _Terms
) -> tuple[tuple[Closing | Correction, ...], Mapping[str, tuple[Unsettled, ...]]]:
    """What is proved of every day and model that adds up."""
    left = _Left()
    proved: list[tuple[_Slot, Closing | Correction]] = []
    rest = {key: gap for key, gap in gaps.items() if gap}
    placed = _place(unsettled, gaps, terms, left)
    for slot in dict.fromkeys([*placed, *reopened]):
        missing = Usage(*(rest.get(key, 0) for key in slot.keys))
        before = reopened.get(slot, ()) if missing != _NOTHING else ()
        made = _divide(slot, missing, placed.get(slot, ()), before, terms)
        if isinstance(made, str):
            left.add(made, placed.get(slot, ()))
            continue
        for key in slot.keys:  # another row of that day may have the same price for a bucket
            rest.pop(key, None)
        proved += [(slot, each) for each in made]
    differing = {(key.day, key.model, key.user_id) for key in rest}
    for groups, why in (
        (differing, "the export and the ledger differ on that day by what they cannot explain"),
        (left.touched, "others that stay unknown may have been billed on that day, too"),
    ):
        if kept := [each for slot, each in proved if slot.group in groups]:
            left.add(why, [each.of for each in kept if isinstance(each, Closing)])
            proved = [(slot, each) for slot, each in proved if slot.group not in groups]
    told = {why: tuple(attempts) for why, attempts in left.by_reason.items()}
    return tuple(each for _, each in proved), told


def _divide(
    slot: _Slot, missing: Usage, attempts: Sequence[Unsettled], before: Sequence[Shared], terms: _Terms
) -> list[Closing | Correction] | str:
    """What is missing, with what was shared `before`, as shares of all that no reply came of; or why it cannot be."""
    if before and not terms.has_all_of(slot.day):  # what a part of a day says, the next export would take back
        return (
            f"the shares of attempts of {slot.day} are off, since a reply came late, and the export may not have all "
            "of that day, which is corrected as a whole: export again, or say --complete if it has all"
        )
    whole = Usage(
        *(sum(each) for each in zip(*(map(_counts, [missing, *(one.tokens for one in before)])), strict=True))
    )
    bounds = [*(each.bound_pico for each in attempts), *(each.bound_pico for each in before)]
    shares = _share(whole, bounds, slot.price)
    if isinstance(shares, str):
        return shares
    evidence = _evidence(slot, missing, len(attempts), terms.source)
    made: list[Closing | Correction] = [
        Closing(of, slot.price, tokens, slot.day, evidence)
        for of, tokens in zip(attempts, shares[: len(attempts)], strict=True)
    ]
    for each, share in zip(before, shares[len(attempts) :], strict=True):
        if (
            off := Usage(*(now - was for now, was in zip(_counts(share), _counts(each.tokens), strict=True)))
        ) != _NOTHING:
            made.append(
                Correction(each.run, slot.price, off, slot.day, _correction_evidence(slot, missing, terms.source))
            )
    return made


def _counts(tokens: Usage) -> tuple[int, int, int]:
    return tokens.hit, tokens.miss, tokens.output


def _place(
    unsettled: Sequence[Unsettled], gaps: Mapping[Key, int], terms: _Terms, left: _Left
) -> dict[_Slot, list[Unsettled]]:
    """Each attempt where it can have been billed; of two such places where most is missing yet."""
    candidates = []
    for attempt in sorted(unsettled, key=lambda each: (each.run, each.document_no, each.attempt_no)):
        found = _find_slots(attempt, terms)
        if why := _refuse(attempt, terms) or (None if found else "no price is known for when they were"):
            left.add(why, [attempt])
            left.touched |= {(slot.day, slot.price.model, slot.user_id) for slot in found}
        else:
            candidates.append((attempt, found))
    room = {slot: _missing_pico(slot, gaps) for _, found in candidates for slot in found}
    placed: dict[_Slot, list[Unsettled]] = {}
    for attempt, found in sorted(candidates, key=lambda each: len(each[1])):
        slot = max(found, key=lambda each: room[each])
        room[slot] -= attempt.bound_pico
        placed.setdefault(slot, []).append(attempt)
    return placed


def _refuse(attempt: Unsettled, terms: _Terms) -> str | None:
    """Why the statement can say nothing about it."""
    start, end = attempt.window
    since, until = terms.statement.since, terms.statement.until
    if attempt.is_open:
        return (
            "their run is not over, and replies may come yet: resume it, or let it end. Where another took its "
            "place, --close ends its dead lanes first, with a login that is a member of farthing_lane, too"
        )
    if not {start.date(), end.date()} <= set(terms.days):
        return "they may be of the next month: reconcile their run by its number, with the exports of both months"
    if terms.is_complete or (since <= start and end <= until):
        return None
    return (
        f"the export is sure to have all of {since:%Y-%m-%d %H:%M} to {until:%Y-%m-%d %H:%M} UTC, for its last row "
        "may not have been over, and they may be of another hour: export again, or say --complete if it has all"
    )


def _find_slots(attempt: Unsettled, terms: _Terms) -> list[_Slot]:
    """Where it can have been billed, the likeliest first."""
    found: dict[_Slot, None] = {}
    for instant in (attempt.placed_at, *attempt.window):
        try:
            price = terms.book.at(attempt.model, terms.currency, instant)
        except UnknownPrice:
            continue
        found[_Slot(instant.astimezone(UTC).date(), terms.user(attempt), price)] = None
    return list(found)


def _missing_pico(slot: _Slot, gaps: Mapping[Key, int]) -> int:
    return slot.price.cost(Usage(*(gaps.get(key, 0) for key in slot.keys)))


def _share(missing: Usage, bounds: Sequence[int], price: Price) -> list[Usage] | str:
    """Tokens for each bound, which add up to what is missing; or why they cannot be theirs."""
    if min(missing.hit, missing.miss, missing.output) < 0:
        return "the export has fewer tokens of that day and price than the ledger knows of"
    if price.cost(missing) > sum(bounds):
        return "the export has more of that day and price than they can have cost: others use the account (--key)"
    buckets = [_split(tokens, bounds) for tokens in (missing.hit, missing.miss, missing.output)]
    shares = [Usage(*tokens) for tokens in zip(*buckets, strict=True)]
    if any(price.cost(share) > bound for share, bound in zip(shares, bounds, strict=True)):
        return "their shares of what the export has would be above their bounds"
    return shares


def _split(tokens: int, weights: Sequence[int]) -> list[int]:
    """Whole numbers that add up to `tokens`, in proportion to the weights."""
    total = max(1, sum(weights))
    ends = [0, *(tokens * so_far // total for so_far in accumulate(weights))]
    return [end - start for start, end in pairwise(ends)]


def _evidence(slot: _Slot, missing: Usage, attempts: int, source: str) -> str:
    of = f" of {slot.user_id}" if slot.user_id else ""
    tokens = f"{missing.hit} hit, {missing.miss} miss and {missing.output} output tokens"
    what = tokens if missing != _NOTHING else "nothing"
    shared = "" if attempts == 1 else f", shared by {attempts} attempts in proportion to what was reserved"
    return f"{source}: on {slot.day} (UTC){of} at {slot.price.name} {what} beyond the known{shared}"


def _correction_evidence(slot: _Slot, missing: Usage, source: str) -> str:
    of = f" of {slot.user_id}" if slot.user_id else ""
    return (
        f"{source}: on {slot.day} (UTC){of} at {slot.price.name} {missing.hit} hit, {missing.miss} miss and "
        f"{missing.output} output tokens beyond the known, since a late reply overrode a share that an export had "
        "told; all of it shared anew in proportion to what was reserved"
    )
