"""The flow under a real Prefect server: entrypoints load, runs show what they should, deployments deploy."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint

from schemas.requests import LaneRequest, RunRequest
from tests.acceptance.played import Played
from tests.prefect_servers import ROOT, PrefectServer
from tests.world import JOB, PROMPT, SCHEMA, write_days, write_documents

#: One server serves all of these tests, so one worker runs them.
pytestmark = pytest.mark.xdist_group("prefect")
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
#: What the flow that opened a run asks of a lane.
ASKED_OF_A_LANE = {
    "asked": LaneRequest(
        run=RunRequest(job="licences"), run_id=1, mark="run-1-0", prices="sha256:0", provider="sha256:0", number=1
    )
}
AUTOMATIONS = yaml.safe_load((ROOT / "automations.yaml").read_text())["automations"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_every_deployment_loads_strictly_and_takes_its_parameters(
    deployment: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flow file that does not import would deploy all the same, as a placeholder."""
    monkeypatch.chdir(ROOT)
    flow = load_flow_from_entrypoint(deployment["entrypoint"], use_placeholder_flow=False)
    parameters = deployment.get("parameters", ASKED_OF_A_LANE)
    assert flow.validate_parameters(parameters).items() >= parameters.items()


def test_the_readme_s_commands_bring_a_run_from_a_worker_to_its_end(server: PrefectServer, played: Played) -> None:
    assert {found["name"] for found in server.post("deployments/filter")} == {d["name"] for d in DEPLOYMENTS}
    (flow_run,) = server.post("flow_runs/filter", deployments={"name": {"any_": ["enrich"]}})
    assert (flow_run["state_type"], flow_run["parameters"]) == (
        "COMPLETED",
        {"job": "obligations", "limit": 100, "lanes": 2},
    )


def test_a_run_shows_its_steps_shards_report_and_log_and_no_secret(server: PrefectServer, played: Played) -> None:
    keys = ["run-1", "run-1-cost", "run-1-escalations", "run-1-report"]
    found = server.post("artifacts/filter", artifacts={"key": {"any_": keys}})
    artifacts = {artifact["key"]: artifact for artifact in found}
    assert sorted(artifacts) == keys
    assert (artifacts["run-1"]["type"], artifacts["run-1"]["data"]) == ("progress", 100)
    assert artifacts["run-1"]["description"].endswith(" spent · done")
    climbed = json.loads(artifacts["run-1-escalations"]["data"])
    assert climbed[0]["why, to which tier"] == "low confidence → flash-thinking"
    assert "SIMULATED" in artifacts["run-1-report"]["data"]
    assert "flash" in artifacts["run-1-cost"]["data"]

    of_this = {"flow_runs": {"id": {"any_": [artifacts["run-1"]["flow_run_id"]]}}}
    (flow_run,) = server.post("flow_runs/filter", **of_this)
    assert (flow_run["state_type"], flow_run["name"]) == ("COMPLETED", "enrich-obligations")
    tasks = {task["name"]: task for task in server.post("task_runs/filter", **of_this)}
    assert {"lane-1", "lane-2", "shard-00000"} <= tasks.keys()
    assert {"open", "settle"} <= {name.partition("-")[0] for name in tasks}
    assert {task["state_type"] for task in tasks.values()} == {"COMPLETED"}

    lines = [line["message"] for line in wait_for_logs(server, "shard done", flow_run["id"])]
    assert "shard done documents=100 shard=0" in lines, "the page has the instant and the level beside it"
    messages = " ".join(lines)
    everything = json.dumps([flow_run, tasks, artifacts, messages])
    assert "sk-sandbox" not in everything
    assert "postgresql://" not in everything


def wait_for_logs(server: PrefectServer, sought: str, flow_run_id: str) -> list[dict[str, Any]]:
    """Prefect's log lines; they reach the server a moment after the run."""
    lines: list[dict[str, Any]] = []
    for _ in range(50):
        lines = server.post("logs/filter", logs={"flow_run_id": {"any_": [flow_run_id]}})
        if any(sought in line["message"] for line in lines):
            return lines
        time.sleep(0.2)
    raise AssertionError(f"{sought!r} is not in {lines}")


@pytest.mark.long  # test_fleet.py has a lane elsewhere, and test_engines.py several on real workers
def test_a_lane_on_a_worker_is_a_flow_run_of_its_own_and_costs_what_was_billed(
    server: PrefectServer, played: Played
) -> None:
    """The worker is the README's."""
    asked = ("run", "licences", "--limit", "40", "--lanes", "1", "--lanes-on", "workers")
    done = played.farthing(*asked)
    assert (done["state"], done["results"], done["proved"]) == ("done", 40, True)
    assert done["cost_pico"] == sum(played.bill(done["run"]).values()) > 0
    (lane,) = server.post("flow_runs/filter", deployments={"name": {"any_": ["lane"]}})
    assert (lane["state_type"], lane["name"]) == ("COMPLETED", f"run-{done['run']}-lane-1")
    shown = server.post("task_runs/filter", flow_runs={"id": {"any_": [lane["id"]]}})
    assert "shard-00000" in {task["name"] for task in shown}
    told = json.dumps([lane, shown])
    assert "sk-sandbox" not in told
    assert "postgresql://" not in told


AUDIT = "import asyncio, flows.audit; print(asyncio.run(flows.audit.audit('obligations')))"


def test_a_scheduled_audit_shows_what_a_job_cost_and_fails_where_the_ledger_does_not_prove(
    server: PrefectServer, played: Played
) -> None:
    (artifact,) = server.post("artifacts/filter", artifacts={"key": {"any_": ["audit-obligations"]}})
    assert "Where the money went" in artifact["data"]
    assert "Run 1: The ledger proves" in artifact["data"]
    tamper(played.ledger_url, 1)
    try:
        with pytest.raises(AssertionError, match="the ledger does not prove run 1"):
            server.command(sys.executable, "-c", AUDIT, FARTHING_DATABASE_URL=played.ledger_url)
    finally:
        tamper(played.ledger_url, -1)
    flow_runs = server.post("flow_runs/filter", flow_runs={"name": {"any_": ["audit-obligations"]}})
    assert sorted(found["state_type"] for found in flow_runs) == ["COMPLETED", "FAILED"]


def tamper(ledger_url: str, pico: int) -> None:
    """Make each attempt of run 1 dearer, as nobody may who is not the ledger's superuser."""
    with psycopg.connect(ledger_url) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("UPDATE farthing.attempt_outcome SET cost = cost + %s WHERE run_id = 1", [pico])


def test_a_backfill_has_a_task_run_for_each_partition_and_costs_what_was_billed(
    server: PrefectServer, played: Played, tmp_path: Path
) -> None:
    days = [f"2026-01-0{day}" for day in (1, 2, 3)]
    texts = {day: [f"{day}: document {number} is about a colour" for number in range(10)] for day in days}
    job = write_job(tmp_path, {"name: colours": "name: days"})
    job.write_text(write_days(tmp_path, job.read_text(), texts))
    done = played.farthing("backfill", str(job), "--to", days[1], "--yes")
    assert (done["state"], done["proved"], done["documents"], done["results"]) == ("done", True, 20, 20)
    runs = {each["partition"]: each["runs"] for each in done["partitions"]}
    assert list(runs) == days[:2]
    billed = [cost for (run_id,) in runs.values() for cost in played.bill(run_id).values()]
    assert (done["cost_pico"], done["attempts"]) == (sum(billed), len(billed))
    (artifact,) = server.post("artifacts/filter", artifacts={"key": {"any_": [f"backfill-{done['backfill']}"]}})
    assert [row["partition"] for row in json.loads(artifact["data"])] == days[:2]
    of_this = {"flow_runs": {"id": {"any_": [artifact["flow_run_id"]]}}}
    tasks = {task["name"]: task["state_type"] for task in server.post("task_runs/filter", **of_this)}
    assert tasks == dict.fromkeys(days[:2], "COMPLETED")
    for (run_id,) in runs.values():
        wait_for_events(server, f"farthing.run.{run_id}", "farthing.run.done")


def write_job(folder: Path, changes: dict[str, str]) -> Path:
    """The job of the small world, otherwise."""
    text = JOB
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    for name, content in (("job.yaml", text), ("prompt.md", PROMPT), ("answer.schema.json", SCHEMA)):
        (folder / name).write_text(content)
    return folder / "job.yaml"


@pytest.mark.long  # test_herald.py has what is told, and when
def test_automations_hear_of_a_budget_that_is_reached_of_dead_letters_and_of_the_end(
    server: PrefectServer, played: Played, tmp_path: Path
) -> None:
    """The examples are there, and off until somebody turns them on."""
    server.command(sys.executable, "-m", "prefect", "automation", "create", "--from-file", "automations.yaml")
    triggers = {trigger["name"] for deployment in DEPLOYMENTS for trigger in deployment.get("triggers", ())}
    made = {found["name"]: found["enabled"] for found in server.post("automations/filter")}
    assert made == dict.fromkeys(triggers | {each["name"] for each in AUTOMATIONS}, False)

    job = write_job_with_dead_letters(tmp_path)
    reached = ["farthing.budget.reached"]
    example = deepcopy(next(each for each in AUTOMATIONS if each["trigger"]["expect"] == reached))
    example["trigger"]["match"]["farthing.simulated"] = "true"
    automation = server.post("automations/", **example | {"name": "heard", "enabled": True})["id"]
    farthing = [sys.executable, "-m", "farthing", "run", str(job), "--sandbox", "--json", "--budget"]
    for budget, exit_code in (("0.002 USD", 3), ("5 USD", 1)):
        done = subprocess.run([*farthing, budget], cwd=ROOT, env=server.environment, capture_output=True, text=True)
        assert done.returncode == exit_code, done.stderr
    run = json.loads(done.stdout)["run"]
    assert "3 of 43 documents are dead letters, and the job tolerates 1.00%" in done.stderr
    flow_runs = [each for each in server.post("flow_runs/filter") if each["parameters"].get("job") == str(job)]
    assert sorted((each["state_name"], each["state_type"]) for each in flow_runs) == [
        ("DeadLetters", "FAILED"),
        ("Paused", "FAILED"),
    ]

    heard = wait_for_events(server, f"farthing.run.{run}", "farthing.run.done")
    names = [event["event"].removeprefix("farthing.") for event in heard]
    assert sorted(names) == ["budget.reached", "dead_letters.above_tolerance", "run.done", "run.paused"]
    payloads = {event["event"]: event["payload"] for event in heard}
    assert payloads["farthing.run.paused"]["reason"] == "budget"
    assert payloads["farthing.run.paused"]["budget"] == "$0.00200"
    assert payloads["farthing.run.done"]["dead_letters"] == 3
    roles = {related["prefect.resource.role"] for related in heard[0]["related"]}
    assert {"job", "flow", "flow-run"} <= roles
    assert "about a colour" not in json.dumps(heard)
    wait_for_events(server, f"prefect.automation.{automation}", "prefect.automation.triggered")


def write_job_with_dead_letters(folder: Path) -> Path:
    """A job of which three documents have no text, and more than its tolerance end without a result."""
    texts = [None, None, None, *(f"document {number} is about a colour" for number in range(40))]
    write_documents(folder, texts)
    changes = {
        "tolerance: 1": "tolerance: 0.01",
        "name: colours": "name: tombs",
        "documents.parquet": f"{folder}/documents.parquet",
    }
    return write_job(folder, changes)


def wait_for_events(server: PrefectServer, resource: str, awaited: str) -> list[dict[str, Any]]:
    """The events of a resource, once the one that is awaited is among them."""
    events: list[dict[str, Any]] = []
    for _ in range(150):
        events = server.post("events/filter", filter={"resource": {"id": [resource]}})["events"]
        if any(event["event"] == awaited for event in events):
            return events
        time.sleep(0.2)
    raise AssertionError(f"{awaited} is not in {events}")
