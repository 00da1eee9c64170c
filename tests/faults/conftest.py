"""What the faults share: where chance begins, how long they go on, and the table of what befell the runs."""

from __future__ import annotations

import os

import pytest

from tests.faults import summary
from tests.faults.summary import Tally


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Where a test says what it did; the summary adds it up over all tests and workers."""
    return Tally(request.node.user_properties)


@pytest.fixture(scope="session")
def seed() -> int:
    """Where all chance begins: `make faults SEED=n` plays the same faults again."""
    return int(os.environ.get(summary.SEED, "1"))


@pytest.fixture(scope="session")
def scale() -> float:
    """The share of the full counts that a long test plays: `make faults SCALE=0.1` for a first look."""
    return float(os.environ.get(summary.SCALE, "1"))
