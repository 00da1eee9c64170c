"""Simulated lanes, thousands of seeds a minute: whatever goes wrong when, the promise holds and the run gets done."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tests.faults.simulation.clockwork import play
from tests.faults.simulation.invariants import violations
from tests.faults.simulation.line import seams
from tests.faults.simulation.simulation import Simulation
from tests.faults.summary import Tally

#: Seeds in the short form, which every commit plays, and in the long one.
SHORT, LONG = 100, 10_000


@pytest.fixture(autouse=True)
def seam() -> Iterator[None]:
    """No Postgres, no log, and the waits of tenacity out of a generator whose state is put back."""
    before, state = structlog.get_config(), random.getstate()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    with seams():
        yield
    structlog.configure(**before)
    random.setstate(state)


def simulate(seed: int, folder: Path) -> Simulation:
    """Play one seed and check it. A failure names the seed; `make faults SEED=` with it plays it first."""
    random.seed(seed)
    played = Simulation(seed, folder)
    try:
        play(played.run())
        found = violations(played)
    except Exception as error:
        error.add_note(f"seed {seed}: {played.plan}")
        raise
    assert not found, f"seed {seed}: {found[:5]}\n{played.plan}\nstarts: {played.ends}"
    return played


def simulate_many(seeds: range, folder: Path, tally: Tally) -> None:
    faults: Counter[str] = Counter()
    began = time.process_time()
    for seed in seeds:
        faults += simulate(seed, folder / str(seed)).world.faults  # a spill that is left is only its own
    rate = len(seeds) / (time.process_time() - began) * 60
    tally.count("simulated seeds", len(seeds))
    tally.count("simulated faults", faults.total())
    tally.count("simulated kills", sum(times for fault, times in faults.items() if fault.startswith("kill")))
    tally.figure("simulated seeds a minute on one core", f"{rate:,.0f}")


def test_whatever_goes_wrong_when_the_promise_holds(tmp_path: Path, seed: int, tally: Tally) -> None:
    simulate_many(range(seed, seed + SHORT), tmp_path, tally)


@pytest.mark.long
def test_ten_thousand_seeds_break_nothing(tmp_path: Path, seed: int, scale: float, tally: Tally) -> None:
    simulate_many(range(seed + SHORT, seed + SHORT + max(1, int(LONG * scale))), tmp_path, tally)


def test_a_seed_plays_the_same_each_time(tmp_path: Path, seed: int) -> None:
    first, second = (simulate(seed + 7, tmp_path) for _ in range(2))
    assert first.world.model.facts == second.world.model.facts
    assert first.provider.bill == second.provider.bill
