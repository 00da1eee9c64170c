"""Backfills: alone responsible for what state a partition is in, which are due, and what running those may cost.

Pure: what the input holds now and what the ledger says of it come in, and a state comes out. The newest run of the
job that holds a file decides, be it a run of that partition or of the whole input.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from schemas.documents import InputFile, Manifest
from schemas.errors import ConfigurationError
from schemas.estimates import Estimate, History, Size, basis, estimate
from schemas.intervals import LEVEL
from schemas.jobs import Job, When
from schemas.money import Currency, Money
from schemas.pricing import PriceBook
from schemas.work_hours import Asked


class State(StrEnum):
    """How a partition stands. Where several hold, the first of this order counts."""

    EMPTY = "empty"
    NEVER_RUN = "never run"
    CHANGED_TEXT = "changed text"
    CHANGED_PROMPT = "changed prompt"
    UNFINISHED = "unfinished"
    CHANGED_MODEL = "changed model"
    DEAD_LETTERS = "dead letters"
    DONE = "done"


#: Run by default; only with --changed; only with --dead.
USUAL = frozenset({State.NEVER_RUN, State.UNFINISHED})
CHANGED = frozenset({State.CHANGED_TEXT, State.CHANGED_PROMPT, State.CHANGED_MODEL})
DEAD = frozenset({State.DEAD_LETTERS})


class Drift(StrEnum):
    """What becomes of a backfill during which the provider begins to serve another model."""

    PAUSE = "pause"
    GO_ON = "go-on"


@dataclass(frozen=True, slots=True)
class Partition:
    """A slice of the input as it is now. Of its documents, `duplicates` have the id of an earlier one in it."""

    name: str
    files: tuple[InputFile, ...]
    duplicates: int = 0

    @property
    def documents(self) -> int:
        return sum(file.rows for file in self.files)


@dataclass(frozen=True, slots=True)
class Covered:
    """What the ledger says of one file, by the newest run of the job that holds it.

    `rows` is how many of its documents that run has; of those, `ended` have ended, `dead` without a result.
    `models` counts results by tier and by the model that served them. `is_at_work`: a lane of that run lives.
    """

    path: str
    run_id: int
    size: int
    sha256: str
    rows: int
    prompt_version: str
    policy: Mapping[str, Any]
    selection: Mapping[str, Any]
    backfill_id: int | None
    is_at_work: bool
    ended: int
    dead: int
    models: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Now:
    """What a run that began now would be bound to; `served` is the model that served each tier last."""

    prompt_version: str
    policy: Mapping[str, Any]
    selection: Mapping[str, Any]
    served: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Standing:
    """How a partition stands. `to_send` is how many documents a run of it now would pay for, at most.

    `at_work` is a run that works on it now, and `backfill_id` the backfill that this is a part of, if any.
    `is_incomplete`: the newest run of it has documents that have not ended, whatever changed since.
    """

    partition: str
    state: State
    documents: int
    ended: int = 0
    dead: int = 0
    to_send: int = 0
    runs: tuple[int, ...] = ()
    at_work: int | None = None
    backfill_id: int | None = None
    is_incomplete: bool = False

    @property
    def words(self) -> str:
        """The state as people read it: `unfinished (3 of 20)`."""
        match self.state:
            case State.UNFINISHED:
                return f"{self.state} ({self.ended:,} of {self.documents:,})"
            case State.DEAD_LETTERS:
                return f"{self.state} ({self.dead:,})"
            case _:
                return self.state.value


def split(manifest: Manifest, named: Mapping[str, str]) -> list[Partition]:
    """The partitions of an input, in the order of their files; `named` says which one a file is in, by its path."""
    files: dict[str, list[InputFile]] = {}
    of_file = {file.file_no: named[file.path] for file in manifest.files}
    for file in manifest.files:
        files.setdefault(of_file[file.file_no], []).append(file)
    firsts = [shard.first_document_no for shard in manifest.shards]

    def partition_of(document_no: int) -> str:
        return of_file[manifest.shards[bisect_right(firsts, document_no) - 1].file_no]

    duplicates = dict.fromkeys(files, 0)
    seen: set[tuple[str, int]] = set()
    for duplicate in manifest.duplicates:
        mine, original = partition_of(duplicate.document_no), duplicate.of_document_no
        if (mine, original) in seen or partition_of(original) == mine:
            duplicates[mine] += 1
        seen.add((mine, original))  # where the original is elsewhere, the first copy here is one, in a run of its own
    return [Partition(name, tuple(mine), duplicates[name]) for name, mine in files.items()]


def stand(partition: Partition, covered: Mapping[str, Covered], now: Now) -> Standing:
    """The state of a partition, by what the ledger says of its files."""
    known = [covered[file.path] for file in partition.files if file.path in covered]
    state = _state(partition, known, now)
    working = next((each for each in known if each.is_at_work), None)
    return Standing(
        partition.name,
        state,
        partition.documents,
        ended=sum(each.ended for each in known),
        dead=sum(each.dead for each in known),
        to_send=_to_send(partition, known, now, state),
        runs=tuple(sorted({each.run_id for each in known})),
        at_work=None if working is None else working.run_id,
        backfill_id=None if working is None else working.backfill_id,
        is_incomplete=partition.documents > 0 and any(each.ended < each.rows for each in known),
    )


def _state(partition: Partition, known: Sequence[Covered], now: Now) -> State:
    if not partition.documents:
        return State.EMPTY
    if not known:
        return State.NEVER_RUN
    if _is_other_text(partition, known, now):
        return State.CHANGED_TEXT
    if any((each.prompt_version, each.policy) != (now.prompt_version, now.policy) for each in known):
        return State.CHANGED_PROMPT
    if sum(each.ended for each in known) < partition.documents:
        return State.UNFINISHED
    if _by_others(known, now):
        return State.CHANGED_MODEL
    return State.DEAD_LETTERS if any(each.dead for each in known) else State.DONE


def _is_other_text(partition: Partition, known: Sequence[Covered], now: Now) -> bool:
    """Whether a file is new, has other bytes, or was read otherwise. A run of some of its rows is unfinished."""
    files = {file.path: file for file in partition.files}
    return len(known) < len(files) or any(
        (each.size, each.sha256) != (files[each.path].size, files[each.path].sha256)
        or (each.rows != files[each.path].rows and each.selection.get("limit") is None)
        or any(each.selection.get(name) != now.selection.get(name) for name in ("id", "text", "filter"))
        for each in known
    )


def _by_others(known: Sequence[Covered], now: Now) -> int:
    """How many results were served by another model than the one that served their tier last."""
    return sum(
        results
        for each in known
        for tier, models in each.models.items()
        for model, results in models.items()
        if model != now.served.get(tier, model)
    )


def _to_send(partition: Partition, known: Sequence[Covered], now: Now, state: State) -> int:
    fresh = partition.documents - partition.duplicates
    ended, dead = sum(each.ended for each in known), sum(each.dead for each in known)
    match state:
        case State.EMPTY | State.DONE:
            return 0
        case State.UNFINISHED:  # the same run goes on, or another one tries its dead letters again, too
            own = {"partitions": [partition.name], "limit": None}
            is_own = all({name: each.selection.get(name) for name in own} == own for each in known)
            return min(fresh, partition.documents - ended + (0 if is_own else dead))
        case State.CHANGED_MODEL:
            return min(fresh, _by_others(known, now) + dead)
        case State.DEAD_LETTERS:
            return min(fresh, dead)
        case _:
            return fresh


def is_due(standing: Standing, *, changed: bool, dead: bool) -> bool:
    """Whether a backfill runs the partition. One that somebody works on is left to them."""
    wanted = USUAL | (CHANGED if changed else frozenset()) | (DEAD if dead else frozenset())
    return (standing.state in wanted or standing.is_incomplete) and standing.at_work is None


@dataclass(frozen=True, slots=True)
class Price:
    """What the due partitions are expected to cost together, and each by itself, at the instant it was asked for.

    `low` and `high` are as in schemas/estimates.py, `level` included: sums of what each partition may cost, as if all
    came out low, or high, together. `off_peak` is what they cost at off-peak prices, which hold from
    `off_peak_begins`; None where all hours cost the same or nobody knows them. `basis` says where the figures are
    from.
    """

    low: Money
    cost: Money
    high: Money
    off_peak: Money | None
    off_peak_begins: datetime | None
    by_partition: Mapping[str, Money]
    basis: tuple[str, ...]
    level: int | None = None

    def expected(self, when: When) -> Money:
        """The sum that is held against a limit."""
        return self.off_peak if when is When.OFF_PEAK and self.off_peak is not None else self.cost


def price(
    job: Job, due: Sequence[Standing], sample: Size, book: PriceBook, now: datetime, history: History | None
) -> Price:
    """Price a run of each partition. `sample` says how large a document is. Raises UnknownPrice."""
    found = {each.partition: _estimate(job, each, sample, book, now, history) for each in due}
    all_ = list(found.values())
    currency = job.budget.currency
    is_cheaper_later = bool(all_) and all(each.off_peak is not None for each in all_)
    return Price(
        low=_sum([each.low for each in all_], currency),
        cost=_sum([each.cost for each in all_], currency),
        high=_sum([each.high for each in all_], currency),
        off_peak=_sum([each.off_peak.cost for each in all_ if each.off_peak], currency) if is_cheaper_later else None,
        off_peak_begins=next((each.off_peak.begins for each in all_ if each.off_peak), None),
        by_partition={name: each.cost for name, each in found.items()},
        basis=tuple(basis(sample, history)),
        level=None if any(each.level is None for each in all_) else LEVEL,
    )


def _estimate(
    job: Job, standing: Standing, sample: Size, book: PriceBook, now: datetime, history: History | None
) -> Estimate:
    size = Size(standing.to_send, standing.to_send, sample.sampled, sample.sampled_bytes)
    return estimate(job, size, book, Asked(now), history)


def _sum(costs: Sequence[Money], currency: Currency) -> Money:
    return Money(sum(cost.pico for cost in costs), currency)


def refuse_dear(expected: Money, most: Money | None, room: Money) -> None:
    """Raises ConfigurationError where more is expected than may be spent: `most`, if it is given, and the `room` that
    the budget has left. Nothing has been started then.
    """
    if most is not None and most.currency is not expected.currency:
        raise ConfigurationError(
            f"--if-cheaper-than is in {most.currency} and the job in {expected.currency}; sums are never converted"
        )
    if most is not None and expected.pico > most.pico:
        raise ConfigurationError(
            f"{expected} is expected and --if-cheaper-than says {most}: nothing was started; take fewer partitions, "
            "wait for off-peak prices, or say a higher sum"
        )
    if expected.pico > room.pico:
        raise ConfigurationError(
            f"{expected} is expected and the budget has {room} left: nothing was started; take fewer partitions, or "
            "give it more with --budget"
        )
