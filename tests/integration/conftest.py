"""What tests of the ledger share: a migrated database, opened as a lane opens it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tasks.ledger.connection import Ledger
from tests.ledgers import lane_ledger


@pytest.fixture
async def ledger(ledger_url: str) -> AsyncIterator[Ledger]:
    """A fresh ledger, in the role of a lane."""
    async with lane_ledger(ledger_url) as opened:
        yield opened
