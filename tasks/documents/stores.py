"""Object stores: alone responsible for how a bucket is reached."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.fs

from schemas.errors import ConfigurationError, Problem
from tasks.documents.faults import first_line


def bucket_url(scheme: str, authority: str, options: str) -> str:
    """The URL of a bucket with its options. Keys have no place in a job file, nor in the ledger it is copied to."""
    user, at, _ = authority.rpartition("@")
    if at and (scheme, user) != ("gs", "anonymous"):
        advice = "remove them, and set the environment's (AWS_PROFILE, …) instead"
        raise ConfigurationError(Problem("input.path", f"holds credentials; {advice}"))
    if scheme == "gs" and "retry_limit_seconds" not in options:  # else an unreachable store hangs 15 minutes
        options = f"{options}&retry_limit_seconds=30".removeprefix("&")
    return f"{scheme}://{authority}" + (f"?{options}" if options else "")


@lru_cache(maxsize=16)
def connect(url: str) -> Any:
    """The file system behind a bucket's URL."""
    try:
        return pa.fs.FileSystem.from_uri(url)[0]
    except (pa.ArrowException, ValueError) as error:
        raise ConfigurationError(
            Problem("input.path", f"{first_line(error)}; see the options of pyarrow's URLs")
        ) from None
