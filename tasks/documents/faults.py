"""What Arrow's errors mean: alone responsible for telling a bad file from a bad store, and for saying so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from schemas.errors import ConfigurationError, InputChanged, InputUnavailable, Problem

#: What Arrow raises for bytes that are not the Parquet they should be: seen by flipping bits of real files.
UNREADABLE = (pa.ArrowException, OSError, UnicodeError, MemoryError)

_SHOWN_CHARACTERS = 300


@contextmanager
def planning_faults() -> Iterator[None]:
    """Before money moves, a store that fails or a file that changes is a wrong configuration."""
    try:
        yield
    except OSError as error:
        raise ConfigurationError(Problem("input.path", _explain_store(error))) from error
    except (InputChanged, InputUnavailable) as error:
        raise ConfigurationError(str(error)) from error


@contextmanager
def reading_faults() -> Iterator[None]:
    """Once a run has begun, a store that fails pauses it."""
    try:
        yield
    except OSError as error:
        raise InputUnavailable(f"{_explain_store(error)}; then resume the run") from error


def _explain_store(error: OSError) -> str:
    return (
        f"the input cannot be read: {first_line(error)}; check the network, the name, and the rights that this "
        "process has (file modes; AWS_PROFILE or AWS_ACCESS_KEY_ID; GOOGLE_APPLICATION_CREDENTIALS)"
    )


def is_stores_fault(error: BaseException) -> bool:
    """Whether the disk or the network failed, not the bytes: Arrow gives an errno, or the store's words."""
    if not isinstance(error, OSError):
        return False
    return error.errno is not None or "AWS Error" in str(error) or "google::cloud::Status" in str(error)


def first_line(error: BaseException) -> str:
    """An Arrow error's first line, which names places and formats but no values of rows."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}…"
