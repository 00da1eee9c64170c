"""What the faults share: where chance begins, how long they go on, and the table of what befell the runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import pytest

from tests.faults import summary
from tests.faults.summary import Tally

#: Fixtures of modules that take seconds: a provider's process, a database, and mostly a run without faults.
SET_UP = {"stage", "shared", "honest", "refusing"}


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in this hook, too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker plays all short tests of a module with a stage, since each worker would set up one of its own.

    Long ones outlast that, and are for whoever is free.
    """
    for item in items:
        if _shares_a_stage(item):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def _shares_a_stage(item: pytest.Item) -> bool:
    is_here = item.path.parent == Path(__file__).parent
    is_placed = any(item.get_closest_marker(name) for name in ("long", "xdist_group"))
    return is_here and not is_placed and not SET_UP.isdisjoint(cast(pytest.Function, item).fixturenames)


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
