"""The flow under a real Prefect server: entrypoints load, runs show what they should, deployments deploy."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint

from sandbox import postgres
from sandbox.licences import write_corpus
from tests.world import JOB, PROMPT, SCHEMA, write_documents

ROOT = Path(__file__).parents[2]
#: One server serves all of these tests, so one worker runs them.
pytestmark = pytest.mark.xdist_group("prefect")
_SECTION = (ROOT / "README.md").read_text("utf-8").split("\n## On a schedule\n")[1]
README_S_SCHEDULE = [line.removeprefix("$ ") for line in _SECTION.split("```")[1].splitlines()[1:]]
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
AUTOMATIONS = yaml.safe_load((ROOT / "automations.yaml").read_text())["automations"]


@dataclass(frozen=True)
class Server:
    """A Prefect server of its own, and the environment in which commands use it."""

    url: str
    environment: dict[str, str]

    def post(self, path: str, **wanted: Any) -> Any:
        """What the server has of this kind; `wanted` narrows it, in the words of Prefect's filters."""
        body = json.dumps(wanted).encode()
        request = urllib.request.Request(
            f"{self.url}/{path}", data=body, headers={"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    def command(self, *arguments: str) -> str:
        done = subprocess.run(arguments, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    environment = os.environ | {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "FARTHING_HOME": str(home / "farthing"),
        "FARTHING_TIME_SCALE": "0",
    }
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    (start,) = [line for line in README_S_SCHEDULE if line.startswith("prefect server start")]
    shell = subprocess.Popen(["bash", "-c", f"{start} wait"], cwd=home, env=environment, start_new_session=True)
    try:
        wait_until_healthy(f"{url}/health")
        yield Server(url, environment)
    finally:
        os.killpg(shell.pid, signal.SIGTERM)
        shell.wait(30)


def wait_until_healthy(url: str) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(url):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise AssertionError("the Prefect server did not answer: see fastapi's pin in pyproject.toml")


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_every_deployment_loads_strictly_and_takes_its_parameters(
    deployment: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flow file that does not import would deploy all the same, as a placeholder."""
    monkeypatch.chdir(ROOT)
    flow = load_flow_from_entrypoint(deployment["entrypoint"], use_placeholder_flow=False)
    assert flow.validate_parameters(deployment["parameters"]).items() >= deployment["parameters"].items()


@pytest.fixture(scope="module")
def played(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The README's commands, and the URL of the ledger that they leave.

    All but those that start the server, which is this module's, and activate the environment, which is on.
    """
    own = ("source ", "prefect server start", "export PREFECT_API_URL")
    played = [line for line in README_S_SCHEDULE if not line.startswith(own)]
    assert len(README_S_SCHEDULE) - len(played) == len(own)
    write_corpus(ROOT / "data" / "licences")  # the README's reader has them from `make demo`
    told = tmp_path_factory.mktemp("played") / "told"
    with told.open("wb") as log:
        outputs = {"stdout": log, "stderr": log}
        shell = subprocess.Popen(
            ["bash", "-ec", "\n".join(played)], cwd=ROOT, env=server.environment, start_new_session=True, **outputs
        )
    try:
        assert shell.wait(600) == 0, told.read_text()
        with postgres.running(Path(server.environment["FARTHING_HOME"])) as ledger:
            yield ledger.url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)  # the worker, too
        server.command("farthing", "sandbox", "down", "--force")


def test_the_readme_s_commands_bring_a_run_from_a_worker_to_its_end(server: Server, played: str) -> None:
    assert {found["name"] for found in server.post("deployments/filter")} == {d["name"] for d in DEPLOYMENTS}
    (flow_run,) = server.post("flow_runs/filter", deployments={"name": {"any_": ["enrich"]}})
    assert (flow_run["state_type"], flow_run["parameters"]) == (
        "COMPLETED",
        {"job": "obligations", "limit": 100, "lanes": 2},
    )


def test_a_run_shows_its_steps_shards_report_and_log_and_no_secret(server: Server, played: str) -> None:
    shown = {"key": {"any_": ["run-1", "run-1-cost", "run-1-report"]}}
    artifacts = {artifact["key"]: artifact for artifact in server.post("artifacts/filter", artifacts=shown)}
    assert artifacts.keys() == {"run-1", "run-1-cost", "run-1-report"}
    assert artifacts["run-1"]["type"] == "progress"
    assert "SIMULATED" in artifacts["run-1-report"]["data"]
    assert "flash" in artifacts["run-1-cost"]["data"]

    of_this = {"flow_runs": {"id": {"any_": [artifacts["run-1"]["flow_run_id"]]}}}
    (flow_run,) = server.post("flow_runs/filter", **of_this)
    assert (flow_run["state_type"], flow_run["name"]) == ("COMPLETED", "enrich-obligations")
    tasks = {task["name"]: task for task in server.post("task_runs/filter", **of_this)}
    assert {"lane-1", "lane-2", "shard-00000"} <= tasks.keys()
    assert {"open", "settle"} <= {name.partition("-")[0] for name in tasks}
    assert {task["state_type"] for task in tasks.values()} == {"COMPLETED"}

    messages = " ".join(line["message"] for line in wait_for_logs(server, "shard done", flow_run["id"]))
    everything = json.dumps([flow_run, tasks, artifacts, messages])
    assert "sk-sandbox" not in everything
    assert "postgresql://" not in everything


def wait_for_logs(server: Server, sought: str, flow_run_id: str) -> list[dict[str, Any]]:
    """Prefect's log lines; they reach the server a moment after the run."""
    lines: list[dict[str, Any]] = []
    for _ in range(50):
        lines = server.post("logs/filter", logs={"flow_run_id": {"any_": [flow_run_id]}})
        if any(sought in line["message"] for line in lines):
            return lines
        time.sleep(0.2)
    raise AssertionError(f"{sought!r} is not in {lines}")


AUDIT = "import asyncio, flows.audit; print(asyncio.run(flows.audit.audit('obligations')))"


def test_a_scheduled_audit_shows_what_a_job_cost_and_fails_where_the_ledger_does_not_prove(
    server: Server, played: str
) -> None:
    (artifact,) = server.post("artifacts/filter", artifacts={"key": {"any_": ["audit-obligations"]}})
    assert "Where the money went" in artifact["data"]
    assert "Run 1: The ledger proves" in artifact["data"]
    with psycopg.connect(played) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("UPDATE farthing.attempt_outcome SET cost = cost + 1 WHERE run_id = 1")
    beside = replace(server, environment=server.environment | {"FARTHING_DATABASE_URL": played})
    with pytest.raises(AssertionError, match="the ledger does not prove run 1"):
        beside.command(sys.executable, "-c", AUDIT)
    flow_runs = server.post("flow_runs/filter", flow_runs={"name": {"any_": ["audit-obligations"]}})
    assert sorted(found["state_type"] for found in flow_runs) == ["COMPLETED", "FAILED"]


def test_a_backfill_has_a_task_run_for_each_partition_and_costs_what_was_billed(
    server: Server, tmp_path: Path
) -> None:
    beside = Beside(server, tmp_path)
    beside.farthing("new", "tickets")
    (tmp_path / "data/tickets").mkdir(parents=True)
    partitions = [f"data/tickets/2026-01-0{day}.parquet" for day in (1, 2, 3)]
    for name in partitions:
        texts = [f"{name}: ticket {number}" for number in range(10)]
        pq.write_table(pa.table({"id": [f"{name}-{n}" for n in range(10)], "text": texts}), tmp_path / name)
    beside.farthing("sandbox", "up")
    try:
        listed = beside.farthing("backfill", "tickets", "--sandbox", "--list")
        assert [(each["partition"], each["state"]) for each in listed["partitions"]] == [
            (name, "never run") for name in partitions
        ]
        asked = ("backfill", "tickets", "--sandbox", "--to", "2026-01-02")
        assert "say --yes if you mean it" in beside.farthing(*asked, code=2)["error"]
        done = beside.farthing(*asked, "--yes", "--quiet")
        bill = beside.farthing("sandbox", "bill")
        assert (done["state"], done["proved"], done["documents"], done["results"]) == ("done", True, 20, 20)
        assert (done["cost_pico"], done["attempts"]) == (bill["cost_pico"], bill["attempts"])
        assert [each["partition"] for each in done["partitions"]] == partitions[:2]
        (artifact,) = server.post("artifacts/filter", artifacts={"key": {"any_": ["backfill-1"]}})
        assert [row["partition"] for row in json.loads(artifact["data"])] == partitions[:2]
        of_this = {"flow_runs": {"id": {"any_": [artifact["flow_run_id"]]}}}
        tasks = {task["name"]: task["state_type"] for task in server.post("task_runs/filter", **of_this)}
        assert tasks == dict.fromkeys(partitions[:2], "COMPLETED")
        for run_id in (1, 2):
            wait_for_events(server, f"farthing.run.{run_id}", "farthing.run.done", job="tickets")
    finally:
        beside.farthing("sandbox", "reset", "--yes", "--force")


@dataclass(frozen=True)
class Beside:
    """A folder of its own with a sandbox of its own, whose runs the server shows."""

    server: Server
    folder: Path

    def farthing(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        """The object that a command prints."""
        environment = self.server.environment | {"FARTHING_HOME": str(self.folder / "home"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "farthing", *arguments, "--json"]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def test_automations_hear_of_a_budget_that_is_reached_of_dead_letters_and_of_the_end(
    server: Server, played: str, tmp_path: Path
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

    heard = wait_for_events(server, f"farthing.run.{run}", "farthing.run.done", job="tombs")
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
    (folder / "prompt.md").write_text(PROMPT)
    (folder / "answer.schema.json").write_text(SCHEMA)
    job = JOB.replace("tolerance: 1", "tolerance: 0.01").replace("name: colours", "name: tombs")
    (folder / "job.yaml").write_text(job.replace("documents.parquet", str(folder / "documents.parquet")))
    return folder / "job.yaml"


def wait_for_events(server: Server, resource: str, awaited: str, job: str | None = None) -> list[dict[str, Any]]:
    """The events of a resource, once the one that is awaited is among them; of this job, since each has a ledger."""
    events: list[dict[str, Any]] = []
    for _ in range(150):
        found = server.post("events/filter", filter={"resource": {"id": [resource]}})["events"]
        events = [event for event in found if job is None or event["payload"]["job"] == job]
        if any(event["event"] == awaited for event in events):
            return events
        time.sleep(0.2)
    raise AssertionError(f"{awaited} is not in {events}")
