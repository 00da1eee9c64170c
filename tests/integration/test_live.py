"""The live view: which of a job's runs it shows."""

from __future__ import annotations

import asyncio
from io import StringIO

from pydantic import SecretStr
from rich.console import Console

from tasks.ledger import runs
from tasks.ledger.connection import Ledger
from tasks.live import View
from tests.ledgers import Hand, opening


async def test_the_view_shows_the_run_of_what_was_asked_for_and_no_other(ledger: Ledger, ledger_url: str) -> None:
    """Both are at work: somebody else's is the newer one."""
    for selection in ({"partitions": [], "sample": 50}, {"partitions": []}):
        await Hand.join(ledger, await runs.open_run(ledger, opening(selection=selection)))
    with View(Console(file=StringIO()), "colours") as view:
        view.follow(SecretStr(ledger_url), selections=[{"sample": 50, "partitions": []}])
        for _ in range(200):
            if view.has_seen_run:
                break
            await asyncio.sleep(0.1)
        assert view.run_id == 1
