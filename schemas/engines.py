"""Where the lanes of a run work. They know one another by the ledger only, so it is all the same to them."""

from __future__ import annotations

from enum import StrEnum


class Engine(StrEnum):
    """What gives a lane a process: this machine, Prefect's workers, or a Dask or Ray cluster."""

    PROCESSES = "processes"
    WORKERS = "workers"
    DASK = "dask"
    RAY = "ray"
