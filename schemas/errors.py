"""The errors Farthing raises on purpose, and the exit code that each one means.

    FarthingError
    ├── ConfigurationError   a wrong job, setting or argument           exit 2, nothing was spent
    ├── UnknownPrice         no price row for this model and instant    exit 2, nothing was spent
    ├── LedgerUnavailable    Postgres cannot be reached or is too old   exit 2
    │   └── RunUnsettled     … when a run ended                         exit 3, resumable
    ├── BudgetExhausted      the next reservation does not fit          exit 3, resumable
    ├── ProviderStopped      balance or breaker stopped the run         exit 3, resumable
    │   └── KeyRefused       … or the key; exit 2 if nothing was spent  exit 3, resumable
    ├── RunPaused            a command ends before it has its outcome   exit 3, resumable
    ├── InputUnavailable     the store of the documents does not reply  exit 3, resumable
    ├── InputChanged         a file is not what the run was planned on  (inside a lane: the shard fails)
    │   └── InputUnreadable  it is, and its rows cannot be had          (inside a lane: the shard fails)
    ├── LeaseLost            another lane owns the shard now            (inside a lane)
    └── LedgerMismatch       the ledger does not prove                  exit 4

Every message is one a user can act on: what is wrong, then what to do. None may hold a key, a DSN or
document text (G15).
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import PurePath


class FarthingError(Exception):
    """Base of every error that Farthing raises on purpose."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a file, and where: `job.yaml:7: input.idd: unknown key; did you mean id?`."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class ConfigurationError(FarthingError):
    """A job, a setting or an argument is wrong. Raised before any money moves, with every problem at once."""

    exit_code = 2

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class UnknownPrice(FarthingError):
    """No price row covers this model, currency and instant, so the attempt may not be made."""

    exit_code = 2


class LedgerUnavailable(FarthingError):
    """Postgres cannot be reached, refuses us, or its tables are older than this code."""

    exit_code = 2


class RunUnsettled(LedgerUnavailable):
    """A run ended while Postgres was away; whoever resumes it tells the ledger."""

    exit_code = 3


class BudgetExhausted(FarthingError):
    """The next reservation does not fit under the run's cap."""

    exit_code = 3


class RunPaused(FarthingError):
    """A command ends without what was asked for, after money may have been spent; it goes on when repeated."""

    exit_code = 3


class ProviderStopped(FarthingError):
    """The provider said stop: no balance, or too many failures in a row."""

    exit_code = 3


class KeyRefused(ProviderStopped):
    """The provider refuses the key, or the model for this key, in the middle of a run."""


class InputUnavailable(FarthingError):
    """The disk or object store that holds the documents refuses us or does not reply; the files may be fine."""

    exit_code = 3


class InputChanged(FarthingError):
    """An input file is gone, or not the one in the run's manifest; nothing more is sent for its shard (G1).

    `reason` is what the ledger says of the documents that are lost with it.
    """

    reason = "input_changed"


class InputUnreadable(InputChanged):
    """A file is the manifest's, but its bytes are not the Parquet they should be, or end whoever reads them."""

    reason = "input_unreadable"


class BackfillAtWork(FarthingError):
    """Another process works on a backfill of the same job; two at once would take each other's runs away."""

    exit_code = 3


class LeaseLost(FarthingError):
    """Another lane owns this shard now; what this lane holds may no longer be committed."""


class LedgerMismatch(FarthingError):
    """The ledger's rows do not add up to what they claim."""

    exit_code = 4


class Unforeseen(Exception):
    """A bug of ours or of a library, in the words that are safe to store: its kind and where it was (G15).

    Whatever such an exception says itself may quote a document, a row or an address.
    """

    @classmethod
    def of(cls, error: BaseException) -> Unforeseen:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        places = ", ".join(f"{PurePath(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
        return cls(f"{type(error).__name__} at {places}")
