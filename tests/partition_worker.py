"""A partition's run in a worker's process: in a module of its own, since that process imports it.

All that this one needs, the server that processes are forked from has imported (tests/faults/child.py).
"""

from __future__ import annotations

import asyncio

from schemas.requests import RunRequest
from schemas.settings import Settings
from tasks import backfills
from tasks.backfills import PartitionEnded
from tasks.ledger.leases import LeaseTimes
from tests.forked_readers import forked_readers

TIMES = LeaseTimes(beat_every_s=0.1, grace_s=0.5)


def work(request: RunRequest, settings: Settings) -> PartitionEnded:
    with forked_readers():
        return asyncio.run(backfills.work_partition(request, settings, TIMES))
