"""What an operator does to runs in Prefect, and what befalls them there: each is paid for once, and goes on.

The books are read by the fault harness's checker, which looks at Postgres and the provider's bill only.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from sandbox.bill import bill_path
from tests.acceptance.played import Played
from tests.faults.checker import Beside, check
from tests.prefect_servers import ROOT, PrefectServer, eventually
from tests.world import JOB, PROMPT, SCHEMA, write_days, write_documents

#: Each takes several flow runs, of seconds each.
pytestmark = [pytest.mark.xdist_group("prefect"), pytest.mark.long]
DOCUMENTS = 100
IN_FLIGHT = 4
AUTOMATIONS = {each["name"]: each for each in yaml.safe_load((ROOT / "automations.yaml").read_text())["automations"]}
COLLISION = "Deployment concurrency limit reached."
#: From its first heartbeat, the only one so soon, until a flow run is taken for gone: after it has been, in a test.
WATCHED_S = 30


@dataclass(frozen=True)
class Operated:
    """A job of its own on the server's sandbox, from the outside."""

    played: Played
    name: str
    path: Path

    @property
    def server(self) -> PrefectServer:
        return self.played.server

    def start(self, deployment: str = "enrich", **parameters: Any) -> str:
        return self.server.start(deployment, job=str(self.path), **parameters)

    def sql(self, query: str) -> list[tuple[Any, ...]]:
        """`query` is about the rows of this job's runs: `mine`."""
        with psycopg.connect(self.played.ledger_url, options="-c search_path=farthing") as connection:
            mine = "WITH mine AS (SELECT run_id FROM run WHERE job = %s) "
            return connection.execute(mine + query, [self.name]).fetchall()

    def value(self, query: str) -> Any:
        return self.sql(query)[0][0]

    @property
    def runs(self) -> list[tuple[Any, ...]]:
        """State and reason of each run on the ledger."""
        return self.sql("SELECT state, reason FROM run JOIN mine USING (run_id) ORDER BY run_id")

    @property
    def unknown(self) -> int:
        return int(self.value("SELECT count(*) FROM attempt_unknown JOIN mine USING (run_id)"))

    @property
    def billed(self) -> list[str]:
        """The attempts that the provider billed, oldest first."""
        return list(self.played.bill(*(run_id for (run_id,) in self.sql("SELECT run_id FROM mine"))))

    def await_some(self, documents: int = 2) -> None:
        """Return once so many have ended; under slow replies, the others have not."""
        eventually(lambda: self.value("SELECT count(*) FROM document JOIN mine USING (run_id)") >= documents)

    def lane(self) -> int:
        """The process of the lane at work: with one lane, the flow run's own."""
        return int(self.value("SELECT pid FROM lane JOIN mine USING (run_id) WHERE ended_at IS NULL"))

    def assert_paid_once(self, unknown: int = 0) -> None:
        """One run, done; the bill is one pass and at most so many attempts of which nobody knows."""
        assert self.runs == [("done", None)]
        assert self.value("SELECT count(*) FROM document JOIN mine USING (run_id)") == DOCUMENTS
        assert self.unknown <= unknown
        home = Path(self.server.environment["FARTHING_HOME"])
        run_id = self.value("SELECT run_id FROM mine")
        assert check(self.played.ledger_url, bill_path(home), Beside(root=ROOT), run_id=run_id) == []


@pytest.fixture
def operated(played: Played, tmp_path: Path) -> Operated:
    """Its documents are like no other test's, or their answers would be reused."""
    name = tmp_path.name.replace("_", "-")
    write_documents(tmp_path, [f"{name}: document {number} is about a colour" for number in range(DOCUMENTS)])
    (tmp_path / "prompt.md").write_text(PROMPT)
    (tmp_path / "answer.schema.json").write_text(SCHEMA)
    job = JOB.replace("documents.parquet", str(tmp_path / "documents.parquet")).replace("colours", name)
    changes = {
        "concurrency: 16": f"concurrency: {IN_FLIGHT}",
        "deadline_s: 5": "deadline_s: 60",
        "rows: 20": "rows: 5",
    }
    for old, new in changes.items():
        assert old in job
        job = job.replace(old, new)
    (tmp_path / "job.yaml").write_text(job)
    return Operated(played, name, tmp_path / "job.yaml")


@pytest.fixture
def worker(played: Played) -> Iterator[Played]:
    """A worker that the test may end; there is one again afterwards."""
    played.kill_worker()
    played.start_worker()
    try:
        yield played
    finally:
        played.kill_worker()
        played.start_worker()


def test_a_retry_in_prefect_goes_on_with_the_same_run_and_of_one_that_is_done_costs_nothing(
    operated: Operated,
) -> None:
    server = operated.server
    operated.path.write_text(operated.path.read_text().replace("budget: 1 USD", "budget: 0.001 USD"))
    flow_run = operated.start()
    assert server.end(flow_run)["state_name"] == "Paused"
    assert operated.runs == [("paused", "budget")]
    assert operated.billed != []

    run_id = operated.value("SELECT run_id FROM mine")
    server.command("farthing", "budget", str(run_id), "1 USD", **operated.played.sandbox)
    retry(server, flow_run)
    assert server.end(flow_run)["state_type"] == "COMPLETED"
    operated.assert_paid_once()

    paid = operated.billed
    retry(server, flow_run)
    assert server.end(flow_run)["state_type"] == "COMPLETED"
    assert operated.billed == paid
    assert server.flow_run(flow_run)["run_count"] == 3


def retry(server: PrefectServer, flow_run_id: str) -> None:
    """As the button of Prefect's page does."""
    server.change_state(flow_run_id, "SCHEDULED", "AwaitingRetry", force=True)


def cancel_in_prefect(operated: Operated, flow_run: str) -> None:
    operated.server.change_state(flow_run, "CANCELLING")


def end_process(operated: Operated, flow_run: str) -> None:
    os.kill(operated.lane(), signal.SIGTERM)


@pytest.mark.parametrize("stop", [cancel_in_prefect, end_process])
def test_a_flow_run_that_is_stopped_drains_and_loses_nothing_and_the_next_start_goes_on(
    stop: Callable[[Operated, str], None], operated: Operated
) -> None:
    with operated.played.slow_replies():
        flow_run = operated.start()
        operated.await_some()
        stop(operated, flow_run)
        assert operated.server.end(flow_run)["state_type"] == "CANCELLED"
    assert operated.runs == [("paused", "interrupted")]
    assert operated.unknown == 0
    assert 2 <= len(operated.billed) < DOCUMENTS
    assert operated.server.end(operated.start())["state_type"] == "COMPLETED"
    operated.assert_paid_once()


def test_a_flow_run_outlives_a_worker_that_is_killed(operated: Operated, worker: Played) -> None:
    with worker.slow_replies():
        flow_run = operated.start()
        operated.await_some()
        worker.kill_worker()
    assert operated.server.end(flow_run)["state_type"] == "COMPLETED"
    operated.assert_paid_once()


def lose_machine(worker: Played, lane: int) -> None:
    """The worker and what it has started end at once."""
    worker.kill_worker()
    os.kill(lane, signal.SIGKILL)


def end_worker(worker: Played, lane: int) -> None:
    """As a supervisor does: a worker of Prefect's kills what it has started, tells nobody, and leaves."""
    worker.worker.send_signal(signal.SIGTERM)
    worker.worker.wait(60)


@pytest.mark.parametrize("lose", [lose_machine, end_worker])
def test_a_flow_run_whose_process_is_gone_is_marked_by_an_automation_and_the_next_start_takes_over(
    lose: Callable[[Played, int], None], operated: Operated, worker: Played
) -> None:
    """Until then it says Running, and another start of its deployment is cancelled."""
    server = operated.server
    with watched(server) as said:
        with worker.slow_replies():
            zombie = operated.start()
            operated.await_some()
            lose(worker, operated.lane())
        collided = server.post(f"flow_runs/{operated.start()}/set_state", state={"type": "PENDING"})  # as workers do
        assert (collided["state"]["type"], collided["state"]["message"]) == ("CANCELLED", COLLISION)
        assert operated.runs == [("running", None)]
        lost = server.end(zombie)
    assert (lost["state_type"], lost["state"]["message"]) == ("CRASHED", said)
    worker.start_worker()
    assert server.end(operated.start())["state_type"] == "COMPLETED"
    operated.assert_paid_once(unknown=IN_FLIGHT)


@contextmanager
def watched(server: PrefectServer) -> Iterator[str]:
    """The example automation, turned on and sooner than any heartbeat; what it says of a process that is gone."""
    automation = deepcopy(AUTOMATIONS["Farthing marks a flow run whose process is gone"])
    automation["trigger"]["within"] = WATCHED_S
    made = server.post("automations/", **automation | {"name": "watched", "enabled": True})
    try:
        yield automation["actions"][0]["message"]
    finally:
        server.delete(f"automations/{made['id']}")


def test_after_a_missed_schedule_one_run_starts_and_the_others_say_why_not(
    operated: Operated, worker: Played
) -> None:
    worker.kill_worker()
    now = datetime.now(UTC)
    due = [f"{now - timedelta(hours=hours):%Y-%m-%dT%H:%M:%SZ}" for hours in (3, 2, 1)]
    missed = [operated.server.start("nightly", due=at, job=str(operated.path), when="now") for at in due]
    worker.start_worker()
    ended = [operated.server.end(flow_run) for flow_run in missed]
    states = sorted(each["state_type"] for each in ended)
    assert states == ["CANCELLED", "CANCELLED", "COMPLETED"]
    assert {each["state"]["message"] for each in ended if each["state_type"] == "CANCELLED"} == {COLLISION}
    operated.assert_paid_once()


def test_two_deployments_of_a_job_at_once_join_in_one_run(operated: Operated) -> None:
    with operated.played.slow_replies(pause_s=2):  # the second has seconds to come up
        first = operated.start()
        operated.await_some()
        second = operated.start("nightly", when="now")
        lanes = "SELECT count(*) FROM lane JOIN mine USING (run_id) WHERE attempts > 0"
        eventually(lambda: operated.value(lanes) == 2)
    for flow_run in (first, second):
        assert operated.server.end(flow_run)["state_type"] == "COMPLETED"
    operated.assert_paid_once()


def test_a_backfill_that_lost_a_process_and_was_cancelled_is_green_after_one_retry_and_cost_one_pass(
    operated: Operated,
) -> None:
    """Thirty partitions over three processes."""
    write_partitions(operated, 30)
    server, played = operated.server, operated.played
    done = "SELECT count(*) FROM run JOIN mine USING (run_id) WHERE state = 'done'"
    with played.slow_replies():
        flow_run = operated.start("backfill", parallel=3)
        eventually(
            lambda: operated.value("SELECT count(*) FROM lane JOIN mine USING (run_id) WHERE attempts > 0") > 2
        )
        os.kill(
            operated.sql("SELECT pid FROM lane JOIN mine USING (run_id) WHERE ended_at IS NULL")[0][0], signal.SIGKILL
        )
        eventually(lambda: operated.value(done) >= 4)
        server.change_state(flow_run, "CANCELLING")
        assert server.end(flow_run)["state_type"] == "CANCELLED"
    assert operated.value(done) < 30
    # Until then its worker would cancel a retry, too.
    eventually(lambda: f"Cancelled flow run 'backfill-{operated.path}'" in played.log.read_text())
    retry(server, flow_run)
    assert server.end(flow_run, 600)["state_type"] == "COMPLETED"
    assert [state for state, _ in operated.runs] == ["done"] * 30
    of_this = {"flow_runs": {"id": {"any_": [flow_run]}}}
    shown = {
        task["name"]: task["state_type"]
        for task in server.post("task_runs/filter", sort="EXPECTED_START_TIME_ASC", **of_this)
    }
    assert set(shown.values()) == {"COMPLETED"}
    assert len(shown) == 30
    assert operated.unknown <= IN_FLIGHT
    home = Path(server.environment["FARTHING_HOME"])
    run_id = operated.value("SELECT max(run_id) FROM mine")  # all draw on one budget, so all are checked
    assert check(played.ledger_url, bill_path(home), Beside(root=ROOT), run_id=run_id) == []


def write_partitions(operated: Operated, partitions: int) -> None:
    """Other documents than the job's, in so many partitions."""
    days = [f"2026-01-{number:02}" for number in range(1, partitions + 1)]
    texts = {day: [f"{operated.name}: document {day}.{n} is about a colour" for n in range(4)] for day in days}
    operated.path.write_text(write_days(operated.path.parent / "days", operated.path.read_text(), texts))
