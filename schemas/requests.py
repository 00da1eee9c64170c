"""What a person or a schedule asks for: one run of a job over a selection of its input."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from schemas.backfills import Drift
from schemas.engines import Engine
from schemas.errors import ConfigurationError
from schemas.finish_by import FinishBy
from schemas.jobs import Escalate, Job, When
from schemas.money import Money
from schemas.settings import Settings


def _check_sum(given: str | None) -> str | None:
    if given is not None and Money.parse(given).pico == 0:
        raise ValueError("a budget of nothing can pay for nothing; write a sum, like `25 USD`")
    return given


def _check_limit(given: str | None) -> str | None:
    if given is not None and Money.parse(given).pico == 0:
        raise ValueError("nothing is cheaper than that; write a sum, like `25 USD`")
    return given


def _check_finish_by(given: str | None) -> str | None:
    if given is not None:
        FinishBy.parse(given)
    return given


#: An instant or a time of every day, as a user writes it.
FinishByText = Annotated[str | None, AfterValidator(_check_finish_by)]
#: Sums of money as a user writes them.
Sum = Annotated[str | None, AfterValidator(_check_sum)]
Limit = Annotated[str | None, AfterValidator(_check_limit)]


#: How many documents a sample may have: fewer say nothing, and each is a shard of its own.
MIN_SAMPLE, MAX_SAMPLE = 10, 1000
#: How many documents a pilot has where nobody says.
USUAL_PILOT = 200


class RunRequest(BaseModel):
    """A run as it is asked for. Prefect shows and stores it, so it holds no secret.

    `job` is a name under `jobs/` or a path; `partitions` names slices of the input (none: all of it); `limit`
    takes the first so many documents; `budget` overrides the job's ("25 USD"), and a resumed run without one keeps
    what it had; `lanes` is how many processes work, and `lanes_on` where (default: what the environment says);
    `when` overrides the job's, for this start of the run only. `finish_by` (an instant, or a time of every day, with
    its zone) lets it wait for off-peak prices, and pay peak prices only as it must to be done by then. `backfill` is
    the number of the backfill that the run is a part of, whose budget it draws on. `sample` takes so many documents,
    drawn at random, for an estimate of what all of them cost, or as a pilot: each is answered by the first and the
    last tier. Or, with `is_compared`, to compare the job as it stands, or that of the file `variant`, with others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    job: str = Field(min_length=1)
    partitions: tuple[str, ...] = ()
    limit: int | None = Field(default=None, ge=1)
    budget: Sum = None
    lanes: int = Field(default=1, ge=1, le=64)
    lanes_on: Engine | None = None
    root: Path = Path(".")
    when: When | None = None
    finish_by: FinishByText = None
    backfill: int | None = None
    sample: int | None = Field(default=None, ge=MIN_SAMPLE, le=MAX_SAMPLE)
    is_pilot: bool = False
    is_compared: bool = False
    variant: str | None = None

    @property
    def is_even(self) -> bool:
        """Whether the sample gives each document the same chance: it is asked how often something is so."""
        return self.is_pilot or self.is_compared

    def adapt(self, job: Job) -> Job:
        """The job as this request runs it. Raises ConfigurationError where a pilot of it has nothing to compare."""
        if self.is_compared and job.promise is not None:
            raise ConfigurationError(
                f"{job.name} has a promise, which is about all documents of a run, so that a sample says nothing of "
                "what it takes: compare with a threshold, like `escalate: {below: 0.85}`"
            )
        if self.is_pilot and len(job.ladder) < 2:
            raise ConfigurationError(
                f"the ladder of {job.name} has one tier, and a pilot compares two: write `ladder: [flash, pro]`"
            )
        return replace(job, is_pilot=True, escalate=Escalate()) if self.is_pilot else job

    def cap(self, job: Job) -> Money:
        """The budget of a new run: what was asked for, else the job's own."""
        return Money.parse(self.budget) if self.budget else job.budget

    def capped(self, job: Job, most: Money) -> RunRequest:
        """The same with a cap of `most`, where nobody asked for another and the job's own is not lower.

        A shared budget is not this run's to change.
        """
        if self.budget is not None or job.budget_name is not None or not 0 < most.pico < job.budget.pico:
            return self
        return self.model_copy(update={"budget": most.exact})

    @model_validator(mode="after")
    def _pilots_a_sample(self) -> Self:
        if self.is_even and self.sample is None:
            raise ValueError("a pilot is a sample: say of how many documents")
        if self.variant is not None and not self.is_compared:
            raise ValueError("a variant is compared with its job: no run of the job is one")
        return self

    @model_validator(mode="after")
    def _waits_if_it_has_time(self) -> Self:
        if self.finish_by and self.when is When.NOW:
            raise ValueError(
                "a run that works at any hour finishes as soon as it can: leave --finish-by or --now out"
            )
        return self

    def hours(self, job: Job) -> When:
        """When attempts may be made: as was asked for, else as the job says."""
        return self.when or (When.OFF_PEAK if self.finish_by else job.when)

    def due(self, now: datetime) -> datetime | None:
        """When the run is to be done, for somebody who asks now by the provider's clock. None: nobody said."""
        return FinishBy.parse(self.finish_by).after(now) if self.finish_by else None

    def settled(self, now: datetime) -> RunRequest:
        """The same with an instant to finish by in place of a time of every day: all lanes mean the same day."""
        due = self.due(now)
        return self if due is None else self.model_copy(update={"finish_by": due.isoformat()})

    def engine(self, settings: Settings) -> Engine:
        """Where the lanes work: as was asked for, else as the environment says."""
        return self.lanes_on or settings.lanes_on

    def selection(self, job: Job) -> dict[str, Any]:
        """Which documents are meant, as plain values: runs of the same selection resume one another."""
        drawn: dict[str, Any] = {} if self.sample is None else {"sample": self.sample}
        drawn |= {"pilot": True} if self.is_pilot else {}
        drawn |= {"variant": self.variant} if self.is_compared else {}
        return drawn | {
            "path": job.input.path,
            "id": job.input.id,
            "text": job.input.text,
            "filter": [[column, operator, _plain(value)] for column, operator, value in job.input.filter or ()],
            "partitions": sorted(self.partitions),
            "limit": self.limit,
        }


class LaneRequest(BaseModel):
    """A lane that is to work elsewhere on a run that is open. Prefect shows and stores it, so it holds no secret.

    `mark` is what only that run of that ledger is called, `prices` the digest of the book that it was opened by, and
    `provider` that of the address that it sends to.
    Where ledger and provider are, the lane's own environment says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: RunRequest
    run_id: int
    mark: str
    prices: str
    provider: str
    number: int


def spell_command(job: str, selection: Mapping[str, Any], *, is_simulated: bool) -> str:
    """The command that resumes the run of a selection, as a shell takes it."""
    asks = {"variant": "compare", "pilot": "calibrate", "sample": "estimate"}
    words = ["farthing", next((command for key, command in asks.items() if key in selection), "run"), job]
    if "variant" in selection:  # whichever others it is compared with
        words += ["--variant", selection["variant"] or "FILE"]
    for partition in selection.get("partitions", ()):
        words += ["--partition", partition]
    if selection.get("limit") is not None:
        words += ["--limit", str(selection["limit"])]
    if "sample" in selection:
        words += ["--sample", str(selection["sample"])]
    return shlex.join(words + ["--sandbox"] * is_simulated)


def _plain(value: Any) -> Any:
    """A value of a condition as JSON has it; a date becomes the text that means the same."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value.isoformat() if isinstance(value, date) else value


class BackfillRequest(BaseModel):
    """A backfill as it is asked for: one run for each partition of a job's input that is due.

    `partitions` are names or globs, `first` and `last` bound them, both included. Partitions never run or unfinished
    are due; with `changed` those whose text, prompt or model is another by now, with `dead` those with dead letters.
    Nothing starts where more than `if_cheaper_than` or the `budget` is expected; the budget holds for all runs
    together (default: the job's). `parallel` of them go at a time, and `lanes_on` says where (default: what the
    environment says).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    job: str = Field(min_length=1)
    first: str | None = None
    last: str | None = None
    partitions: tuple[str, ...] = ()
    changed: bool = False
    dead: bool = False
    if_cheaper_than: Limit = None
    parallel: int = Field(default=2, ge=1, le=64)
    lanes_on: Engine | None = None
    budget: Sum = None
    when: When | None = None
    when_model_changes: Drift = Drift.PAUSE
    root: Path = Path(".")

    @property
    def most(self) -> Money | None:
        """The sum above which nothing starts."""
        return Money.parse(self.if_cheaper_than) if self.if_cheaper_than else None

    def cap(self, job: Job) -> Money:
        """What all runs together may cost, as `RunRequest.cap`."""
        return Money.parse(self.budget) if self.budget else job.budget

    def hours(self, job: Job) -> When:
        """When attempts may be made, as `RunRequest.hours`."""
        return self.when or job.when

    def engine(self, settings: Settings) -> Engine:
        """Where the partitions are worked on, as `RunRequest.engine`."""
        return self.lanes_on or settings.lanes_on

    def identity(self) -> dict[str, Any]:
        """Which partitions are meant, as plain values: the same is the same backfill, which is resumed."""
        return {
            "first": self.first,
            "last": self.last,
            "partitions": sorted(self.partitions),
            "changed": self.changed,
            "dead": self.dead,
        }

    def run(self, partition: str | None = None, backfill: int | None = None) -> RunRequest:
        """The run of one partition. Without one: what any of them is, but for that."""
        return RunRequest(
            job=self.job,
            partitions=() if partition is None else (partition,),
            budget=self.budget,
            root=self.root,
            when=self.when,
            backfill=backfill,
        )


#: How many variants and runs a job is compared with: the more there are, the more pairs chance can mislead.
MOST_VARIANTS = 5


class CompareRequest(BaseModel):
    """A comparison as it is asked for: a job as it stands, and `variants` of it, on one sample of its input.

    A variant is a file: another prompt, or YAML with those of the job's own keys that it changes. `against` are runs
    of the job that were paid for. `budget` caps what all of it costs, also over several starts (default: the job's).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    job: str = Field(min_length=1)
    variants: tuple[str, ...] = ()
    against: tuple[Annotated[int, Field(ge=1)], ...] = ()
    sample: int = Field(default=USUAL_PILOT, ge=MIN_SAMPLE, le=MAX_SAMPLE)
    partitions: tuple[str, ...] = ()
    limit: int | None = Field(default=None, ge=1)
    budget: Sum = None
    root: Path = Path(".")
    when: When | None = None

    @model_validator(mode="after")
    def _compares_something(self) -> Self:
        if not 1 <= len(self.variants) + len(self.against) <= MOST_VARIANTS:
            raise ValueError(
                f"a job is compared with 1 to {MOST_VARIANTS} variants of it, or runs: name them with --variant FILE "
                "and --against RUN"
            )
        names = [*map(name_variant, self.variants), *self.against]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two variants are called {twice[0]}: rename the file of one, or leave it out")
        return self

    def runs(self) -> list[RunRequest]:
        """What is asked, the job as it stands first."""
        return [
            RunRequest(
                job=self.job,
                partitions=self.partitions,
                limit=self.limit,
                budget=self.budget,
                root=self.root,
                when=self.when,
                sample=self.sample,
                is_compared=True,
                variant=variant,
            )
            for variant in (None, *self.variants)
        ]


def name_variant(variant: str) -> str:
    """What a variant is called: its file, without folders and what kind of file it is."""
    return Path(variant).stem
