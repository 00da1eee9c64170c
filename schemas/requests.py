"""What a person or a schedule asks for: one run of a job over a selection of its input."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from schemas.jobs import Job, When
from schemas.money import Money


class RunRequest(BaseModel):
    """A run as it is asked for. Prefect shows and stores it, so it holds no secret.

    `job` is a name under `jobs/` or a path; `partitions` names slices of the input (none: all of it); `limit`
    takes the first so many documents; `budget` overrides the job's ("25 USD"), and a resumed run without one keeps
    what it had; `lanes` is how many processes work; `when` overrides the job's, for this start of the run only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    job: str = Field(min_length=1)
    partitions: tuple[str, ...] = ()
    limit: int | None = Field(default=None, ge=1)
    budget: str | None = None
    lanes: int = Field(default=1, ge=1, le=64)
    root: Path = Path(".")
    when: When | None = None

    @field_validator("budget")
    @classmethod
    def _check_budget(cls, budget: str | None) -> str | None:
        if budget is not None and Money.parse(budget).pico == 0:
            raise ValueError("a budget of nothing can pay for nothing; write a sum, like `25 USD`")
        return budget

    def cap(self, job: Job) -> Money:
        """The budget of a new run: what was asked for, else the job's own."""
        return Money.parse(self.budget) if self.budget else job.budget

    def hours(self, job: Job) -> When:
        """When attempts may be made: as was asked for, else as the job says."""
        return self.when or job.when

    def selection(self, job: Job) -> dict[str, Any]:
        """Which documents are meant, as plain values: runs of the same selection resume one another."""
        return {
            "path": job.input.path,
            "id": job.input.id,
            "text": job.input.text,
            "filter": [[column, operator, _plain(value)] for column, operator, value in job.input.filter or ()],
            "partitions": sorted(self.partitions),
            "limit": self.limit,
        }


def _plain(value: Any) -> Any:
    """A value of a condition as JSON has it; a date becomes the text that means the same."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value.isoformat() if isinstance(value, date) else value
