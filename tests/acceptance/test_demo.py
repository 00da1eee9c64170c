"""The demo as a user runs it, whole: what it must show, twice, and every command that reads what it left."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
#: How many documents there are, and how many do for a first look: all of them keep two cores busy for a minute.
WHOLE, SHORT = 2_000, 400


@dataclass(frozen=True)
class Home:
    """A sandbox of its own, at a fifth of real time, and how many documents the demo has there."""

    environment: dict[str, str]
    documents: int

    def farthing(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "farthing", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done

    def ask(self, *arguments: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.farthing(*arguments, "--json").stdout)
        return found


@pytest.fixture(scope="module", params=[SHORT, pytest.param(WHOLE, marks=pytest.mark.long)])
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FARTHING_", "PREFECT_"))}
    folder = tmp_path_factory.mktemp("demo")
    made = Home(inherited | {"FARTHING_HOME": str(folder), "FARTHING_TIME_SCALE": "0.2"}, request.param)
    made.farthing("sandbox", "up")  # so that Postgres is not started and stopped for every command below
    yield made
    made.farthing("sandbox", "reset", "--yes")


@pytest.fixture(scope="module")
def demo(home: Home) -> dict[str, Any]:
    return home.ask("demo", *(["--limit", str(SHORT)] if home.documents == SHORT else []))


pytestmark = pytest.mark.xdist_group("demo")


def test_the_demo_finishes_real_documents_and_proves_its_books(home: Home, demo: dict[str, Any]) -> None:
    assert (demo["state"], demo["proved"], demo["is_simulated"]) == ("done", True, True)
    assert demo["results"] + demo["dead_letters"] == demo["documents"] >= home.documents
    assert demo["tiers"]["pro"]["results"] > 0


def test_after_priming_at_least_99_percent_of_the_shared_prefix_hits(demo: dict[str, Any]) -> None:
    assert demo["prefix_hit_rate"] >= 0.99
    assert 0 < demo["priming_pico"] < demo["cost_pico"] // 20


def test_the_audit_equals_the_sandbox_s_own_bill_to_the_last_unit(home: Home, demo: dict[str, Any]) -> None:
    audit, bill = home.ask("audit", str(demo["run"])), home.ask("sandbox", "bill")
    assert (audit["cost_pico"], audit["attempts"], audit["unknown_pico"]) == (bill["cost_pico"], bill["attempts"], 0)
    assert audit["currency"] == bill["currency"]


@pytest.mark.long
def test_the_same_command_again_makes_no_attempt_and_costs_nothing(home: Home, demo: dict[str, Any]) -> None:
    before = home.ask("sandbox", "bill")
    again = home.ask("demo", "--limit", str(demo["documents"]))
    assert (again["attempts"], again["cost_pico"], again["state"]) == (0, 0, "done")
    assert again["reused"] == demo["results"]
    assert home.ask("sandbox", "bill") == before


def test_every_command_that_reads_tells_of_the_run(home: Home, demo: dict[str, Any]) -> None:
    run = str(demo["run"])
    assert home.ask("status", run)["done"] == demo["documents"]
    assert set(home.ask("verify", run)["guarantees"].values()) == {True}
    estimate = home.ask("estimate", "licences")
    assert estimate["low_pico"] <= estimate["cost_pico"] <= estimate["high_pico"]
    assert "SIMULATED" in home.farthing("audit", run).stdout
    assert home.ask("db", "status")


@pytest.mark.long  # test_samples.py has the command, with fewer documents
def test_an_estimate_asks_a_sample_once_and_says_between_which_sums_a_run_is(
    home: Home, demo: dict[str, Any]
) -> None:
    before = home.ask("sandbox", "bill")
    asked = home.farthing("estimate", "obligations", "--sandbox", "--limit", "150", "--sample", "20", "--json")
    found = json.loads(asked.stdout)
    (most,) = re.findall(r"20 documents will be asked, .* expected, (.*) at most", asked.stderr)
    assert home.ask("audit", "obligations")["budget_pico"] == pytest.approx(
        Decimal(most[1:]) * 10**12, rel=Decimal("0.01")
    )
    paid = home.ask("sandbox", "bill")["cost_pico"] - before["cost_pico"]
    assert (found["level"], found["sampled"], found["paid_pico"]) == (90, 20, paid)
    assert 0 < paid < found["low_pico"] < found["cost_pico"] < found["high_pico"]
    again = home.ask("estimate", "obligations", "--sandbox", "--limit", "150", "--sample", "20")
    assert again["paid_pico"] == paid
    assert home.ask("sandbox", "bill")["cost_pico"] - before["cost_pico"] == paid


@pytest.mark.long  # test_prefect.py has a command that pauses at its budget, and random budgets have the cap
def test_a_budget_that_is_too_small_pauses_with_exit_code_3_and_is_never_passed(
    home: Home, demo: dict[str, Any]
) -> None:
    before = home.ask("sandbox", "bill")["cost_pico"]
    done = home.farthing("run", "obligations", "--sandbox", "--budget", "0.01 USD", "--json", code=3)
    assert json.loads(done.stdout)["state"] == "paused"
    assert "--budget" in done.stderr
    assert 0 < home.ask("sandbox", "bill")["cost_pico"] - before <= 10_000_000_000
