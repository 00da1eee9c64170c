"""One job on every engine that can work its lanes: the same results for the same bill, also if a process is killed.

The engines are real: Prefect's server and two of its workers, a Dask and a Ray cluster of two processes. DeepSeek is
emulated in this process, the checker is the fault harness's.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sandbox.bill import bill_path
from sandbox.latency import Latency, Pace
from sandbox.postgres import Server, create_database
from sandbox.tariff import FLASH, PRO
from tests.faults.checker import Answered, Beside, check, results
from tests.prefect_servers import QUIET, PrefectServer, free_port, prefect_server
from tests.world import World, make_world, write_days

ROOT = Path(__file__).parents[2]
DOCUMENTS = 400
#: Requests in flight at each tier, over all lanes, as the job says.
CEILING = 16
PAUSED, UNREACHABLE = 3, 2
WITHIN_S = 600.0
#: Every process that an engine starts says so on its stdout; only the command's own is for the outcome.
NOISE = """import os, sys
if "farthing" not in sys.orig_argv:
    os.write(1, b"a process has something to say\\n")
"""
pytestmark = [pytest.mark.long, pytest.mark.xdist_group("prefect")]


def needs(extra: str, module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(module) is None, reason=f"needs the extra: pip install 'farthing[{extra}]'")


ELSEWHERE = [
    pytest.param("workers"),
    pytest.param("dask", marks=needs("dask", "prefect_dask")),
    pytest.param("ray", marks=needs("ray", "prefect_ray")),
]


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A server that knows the pool and how a lane is started."""
    with prefect_server(tmp_path_factory.mktemp("prefect"), free_port()) as server:
        for command in (
            ("work-pool", "create", "farthing", "--type", "process", "--overwrite"),
            ("--no-prompt", "deploy", "--name", "lane"),
        ):
            made = subprocess.run(
                [sys.executable, "-m", "prefect", *command],
                cwd=ROOT,
                env=environment_of(server),
                capture_output=True,
                text=True,
            )
            assert made.returncode == 0, made.stdout + made.stderr
        yield server


def environment_of(server: PrefectServer) -> dict[str, str]:
    prefect = {"PREFECT_HOME": str(server.home / "prefect"), "PREFECT_API_URL": server.url, **QUIET}
    patient = {"PREFECT_CLIENT_MAX_RETRIES": "5"}  # as usual: where its SQLite is busy the server answers 503
    return os.environ | prefect | patient | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def baseline(postgres: Server, template: str, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Answered]:
    """How each document ends without any engine: in one lane of this process."""
    url = create_database(postgres, f"baseline_{os.getpid()}", template=template)

    async def work() -> int:
        async with make_world(tmp_path_factory.mktemp("baseline"), url, DOCUMENTS) as world:
            return (await world.run())[0].run_id

    return results(url, asyncio.run(work()))


@dataclass
class Site:
    """A world whose runs are started by commands, and shown by a Prefect server."""

    world: World
    prefect: PrefectServer

    @property
    def environment(self) -> dict[str, str]:
        """What a command and a worker are told, by which they find the same ledger and provider."""
        settings = self.world.settings
        assert settings.database_url is not None
        assert settings.api_key is not None
        return environment_of(self.prefect) | {
            "FARTHING_DATABASE_URL": settings.database_url.get_secret_value(),
            "FARTHING_SANDBOX": "1",
            "FARTHING_WORKERS_WITHIN_S": str(WITHIN_S),
            "FARTHING_TIME_SCALE": "0",
            "FARTHING_HOME": str(self.world.root / "home"),
            "DEEPSEEK_API_KEY": settings.api_key.get_secret_value(),
            "DEEPSEEK_BASE_URL": settings.base_url,
        }

    @property
    def job(self) -> Path:
        return self.world.root / "jobs/colours/job.yaml"

    def command(
        self, on: str, lanes: int, **environment: str
    ) -> AbstractAsyncContextManager[asyncio.subprocess.Process]:
        """`farthing run`, as in `type`."""
        return self.type("run", str(self.job), "--lanes", str(lanes), "--lanes-on", on, **environment)

    @asynccontextmanager
    async def type(self, *words: str, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
        """A command in a terminal of its own, so that Ctrl-C there reaches what it started, too."""
        noise = self.world.root / "noise"
        noise.mkdir(exist_ok=True)
        (noise / "sitecustomize.py").write_text(NOISE)
        environment = {"PYTHONPATH": f"{noise}:{ROOT}"} | environment
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "farthing", *words, "--json", "--quiet"),
            cwd=ROOT,  # where the workers' folder is, too
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    async def run(self, on: str, lanes: int, **environment: str) -> dict[str, Any]:
        """The object that the command prints when it ends, with its exit code."""
        async with self.command(on, lanes, **environment) as process:
            return await told(process)

    @asynccontextmanager
    async def workers(self, count: int = 2) -> AsyncIterator[list[subprocess.Popen[bytes]]]:
        """Machines, each with a worker of Prefect's that takes one lane."""
        words = ("worker", "start", "--pool", "farthing", "--limit", "1", "--name")
        started = []
        for number in range(count):
            with (self.world.root / f"worker-{number}.log").open("wb") as log:
                command = [sys.executable, "-m", "prefect", *words, f"machine-{number}"]
                outputs = {"stdout": log, "stderr": log}
                started.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=self.environment | {"COLUMNS": "200"},
                        start_new_session=True,
                        **outputs,
                    )
                )
        try:
            yield started
        finally:
            for worker in started:
                with suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()

    @asynccontextmanager
    async def engine(self, on: str) -> AsyncIterator[list[subprocess.Popen[bytes]]]:
        """What has to be there before the command: of workers, two."""
        if on != "workers":
            yield []
            return
        async with self.workers() as started:
            yield started

    def flow_runs(self) -> list[dict[str, Any]]:
        """The lanes of this ledger as Prefect has them, the oldest first."""
        found = self.prefect.post("flow_runs/filter", flow_runs={"name": {"like_": "-lane-"}})
        shown = {
            row[0] for row in self.world.sql("SELECT detail->>'shown_as' FROM run_event WHERE kind = 'lane_shown'")
        }
        return sorted((each for each in found if each["id"] in shown), key=lambda each: each["created"])

    def violations(self, baseline: Mapping[str, Answered]) -> list[str]:
        """What the checker finds; I9 is about seconds, and of this provider each is none."""
        peak = self.world.server.house.account.peak
        beside = Beside(
            root=self.world.root,
            baseline=baseline,
            peaks={model: (peak[model], CEILING) for model in (FLASH, PRO)},
            canaries=["sk-sandbox"],
        )
        found = check(self.world.database_url, bill_path(self.world.root), beside)
        return [str(each) for each in found if each.invariant != "I9"]


async def told(process: asyncio.subprocess.Process) -> dict[str, Any]:
    stdout, stderr = await asyncio.wait_for(process.communicate(), WITHIN_S)
    assert stdout, stderr.decode()
    found: dict[str, Any] = json.loads(stdout)
    return found | {"code": process.returncode, "stderr": stderr.decode()}


async def until(is_so: Callable[[], bool], process: asyncio.subprocess.Process) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not is_so():
        assert time.monotonic() < deadline
        assert process.returncode is None, await process.communicate()
        await asyncio.sleep(0.1)


@pytest.fixture
async def site(tmp_path: Path, ledger_url: str, prefect: PrefectServer) -> AsyncIterator[Site]:
    async with make_world(tmp_path, ledger_url, DOCUMENTS) as world:
        job = tmp_path / "jobs/colours/job.yaml"
        anywhere = f"path: {tmp_path}/documents.parquet"  # a worker's folder is another one
        patient = job.read_text().replace("deadline_s: 5", "deadline_s: 120")
        job.write_text(patient.replace("path: documents.parquet", anywhere))
        yield Site(world, prefect)


def take(world: World, seconds: float) -> None:
    """A reply takes so long from now on."""
    world.server.house.latency = Latency(Pace(1.0, reply_s=seconds), seed=1)


def count_living(world: World) -> int:
    return int(world.value("SELECT count(*) FROM lane WHERE ended_at IS NULL"))


async def all_at_work(world: World, lanes: int, process: asyncio.subprocess.Process) -> None:
    """Little is done until every lane has come, which takes a while: a worker looks for it every ten seconds."""
    take(world, 3.0)
    await until(lambda: count_living(world) == lanes, process)
    take(world, 0.5)
    await until(lambda: world.value("SELECT min(done) FROM lane") > 20, process)


@pytest.mark.parametrize(
    ("on", "lanes"),
    [
        pytest.param("processes", 1),
        pytest.param("processes", 2),
        *(pytest.param(*p.values, 2, marks=p.marks) for p in ELSEWHERE),
    ],
)
async def test_on_every_engine_a_run_ends_alike_costs_what_was_billed_and_keeps_to_its_ceiling(
    on: str, lanes: int, site: Site, baseline: Mapping[str, Answered]
) -> None:
    async with site.engine(on), site.command(on, lanes) as process:
        await all_at_work(site.world, lanes, process)
        done = await told(process)
    assert (done["code"], done["state"], done["proved"]) == (0, "done", True), done["stderr"]
    if on == "dask" or (on, lanes) == ("processes", 2):  # Ray keeps it in its logs
        assert "a process has something to say" in done["stderr"]
    assert site.violations(baseline) == []
    assert (done["cost_pico"], done["unknown_pico"]) == (sum(site.world.bill().values()), 0)
    assert site.world.value("SELECT count(*) FROM lane") == lanes


@pytest.mark.parametrize("on", ELSEWHERE)
async def test_where_a_process_is_killed_the_others_end_the_run_and_nothing_is_paid_twice(
    on: str, site: Site, baseline: Mapping[str, Answered]
) -> None:
    """Of a worker its machine is gone: nobody is left to tell Prefect. Dask and Ray start the lane again."""
    async with site.engine(on) as machines, site.command(on, 2) as process:
        await all_at_work(site.world, 2, process)
        lane_id, pid = site.world.sql("SELECT lane_id, pid FROM lane ORDER BY lane_id LIMIT 1")[0]
        for doomed in [*(each.pid for each in machines if each.pid in ancestors(pid)), pid]:
            os.kill(doomed, signal.SIGKILL)
        done = await told(process)
    assert (done["code"], done["proved"]) == (0, True), done["stderr"]
    assert site.violations(baseline) == []
    lanes = dict(site.world.sql("SELECT lane_id, ended_because FROM lane"))
    assert [each for each, why in lanes.items() if why == "died"] == [lane_id]
    assert len(lanes) == (2 if on == "workers" else 3)
    unknown = site.world.value("SELECT count(*) FROM attempt_unknown")
    assert unknown <= CEILING
    if on == "workers":
        assert sorted(each["state_type"] for each in site.flow_runs()) == ["COMPLETED", "CRASHED"]


@pytest.mark.parametrize("on", ELSEWHERE)
async def test_a_backfill_works_there_too_and_a_partition_whose_machine_is_gone_is_taken_up_again(
    on: str, site: Site
) -> None:
    """By the one machine that is left, after its own: nobody gives up the wait for it meanwhile."""
    world, days = site.world, [f"2026-01-0{day}" for day in (1, 2, 3)]
    texts = {day: [f"{day}: document {number} is about a colour" for number in range(60)] for day in days}
    site.job.write_text(write_days(world.root, site.job.read_text(), texts))
    take(world, 3.0)
    words = ("backfill", str(site.job), "--parallel", "2", "--lanes-on", on, "--yes")
    async with site.engine(on) as machines, site.type(*words) as process:
        await until(lambda: world.value("SELECT count(*) FROM lane WHERE attempts > 3") == 2, process)
        lane_id, pid = world.sql("SELECT lane_id, pid FROM lane ORDER BY lane_id LIMIT 1")[0]
        for doomed in [*(each.pid for each in machines if each.pid in ancestors(pid)), pid]:
            os.kill(doomed, signal.SIGKILL)
        take(world, 0.3)
        done = await told(process)
    assert (done["code"], done["state"], done["proved"], done["results"]) == (0, "done", True, 180), done["stderr"]
    assert world.sql("SELECT lane_id FROM lane WHERE ended_because = 'died'") == [(lane_id,)]
    peak = world.server.house.account.peak
    beside = Beside(root=world.root, peaks={model: (peak[model], CEILING) for model in (FLASH, PRO)})
    assert [
        str(each) for each in check(world.database_url, bill_path(world.root), beside) if each.invariant != "I9"
    ] == []
    assert world.value("SELECT count(*) FROM attempt_unknown") <= CEILING
    if on == "workers":
        assert sorted(each["state_type"] for each in site.flow_runs()) == ["COMPLETED"] * 3 + ["CRASHED"]


def ancestors(pid: int) -> list[int]:
    """The processes that this one descends from."""
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found


@pytest.mark.parametrize("on", ELSEWHERE)
async def test_ctrl_c_pauses_the_run_its_lanes_drain_and_the_same_command_goes_on(
    on: str, site: Site, baseline: Mapping[str, Answered]
) -> None:
    async with site.engine(on):
        async with site.command(on, 2) as process:
            await all_at_work(site.world, 2, process)
            os.killpg(process.pid, signal.SIGINT)
            paused = await told(process)
        assert (paused["code"], paused["reason"], paused["unknown_pico"]) == (PAUSED, "interrupted", 0), paused[
            "stderr"
        ]
        assert 0 < paused["results"] < DOCUMENTS
        done = await site.run(on, 2)
    assert (done["code"], done["proved"], done["unknown_pico"]) == (0, True, 0), done["stderr"]
    assert site.violations(baseline) == []


async def test_after_a_pause_the_same_command_goes_on_though_the_lanes_still_drain(
    site: Site, baseline: Mapping[str, Answered]
) -> None:
    """So does the command that was paused, which looks on until the lanes have left."""
    world = site.world
    async with site.workers(), site.command("workers", 2) as process:
        await all_at_work(world, 2, process)
        take(world, 30.0)
        await asyncio.sleep(2)
        pause = [sys.executable, "-m", "farthing", "pause", "1"]
        subprocess.run(pause, cwd=ROOT, env=site.environment, check=True, capture_output=True)
        async with site.command("workers", 2) as again:
            await until(lambda: world.value("SELECT state FROM run") == "running", again)
            assert count_living(world) == 2
            take(world, 0.5)
            ended = [await told(again), await told(process)]
    assert [(each["code"], each["proved"], each["unknown_pico"]) for each in ended] == [(0, True, 0)] * 2, ended
    assert site.violations(baseline) == []


@asynccontextmanager
async def without_slots(on: str, port: int) -> AsyncIterator[str]:
    """A cluster that is up and has nobody to work; its address."""
    words = {
        "dask": ("distributed.cli.dask_scheduler", "--no-dashboard", "--port", str(port)),
        "ray": (
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            "--num-cpus=0",
            f"--port={port}",
            "--disable-usage-stats",
        ),
    }
    outputs = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    cluster = subprocess.Popen([sys.executable, "-m", *words[on]], start_new_session=True, **outputs)
    try:
        yield f"tcp://127.0.0.1:{port}" if on == "dask" else f"127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(cluster.pid, signal.SIGTERM)
        cluster.wait()


@pytest.mark.parametrize("on", ELSEWHERE[1:])
async def test_without_a_slot_in_the_cluster_a_run_ends_and_says_so_and_ctrl_c_ends_the_wait(
    on: str, site: Site
) -> None:
    world = site.world
    async with without_slots(on, free_port()) as address:
        there = {"FARTHING_CLUSTER": address, "RAY_AUTH_MODE": "token"}  # as `ray start` has it unless told otherwise
        async with asyncio.timeout(WITHIN_S):
            absent: dict[str, Any] = {"code": UNREACHABLE}
            while absent["code"] == UNREACHABLE:  # until it is up
                absent = await site.run(on, 2, FARTHING_WORKERS_WITHIN_S="2", **there)
        assert (absent["code"], absent["reason"]) == (PAUSED, "no_slot"), absent
        assert f"no slot of the {on} cluster" in absent["advice"]
        async with site.command(on, 2, **there) as process:
            await until(lambda: world.value("SELECT state FROM run") == "running", process)
            await asyncio.sleep(5)
            os.killpg(process.pid, signal.SIGINT)
            interrupted = await told(process)
        assert (interrupted["code"], interrupted["reason"]) == (PAUSED, "interrupted"), interrupted
    assert world.bill() == {}
    done = await site.run(on, 2)
    assert (done["code"], done["proved"]) == (0, True), done["stderr"]


async def test_without_a_worker_a_run_says_what_to_start_and_goes_on_once_that_is_done(site: Site) -> None:
    absent = await site.run("workers", 2, FARTHING_WORKERS_WITHIN_S="1")
    assert (absent["code"], absent["reason"]) == (PAUSED, "no_worker")
    assert absent["advice"].startswith("no worker took a lane within 1 s")  # what to do is as Prefect sees the pool
    assert site.world.bill() == {}
    async with site.workers():
        done = await site.run("workers", 2)
    assert (done["code"], done["proved"]) == (0, True), done["stderr"]
    shown = site.flow_runs()
    assert {each["state_type"] for each in shown} == {"COMPLETED"}  # one, if it was done before the other was up
    logs = site.prefect.post("logs/filter", logs={"flow_run_id": {"any_": [each["id"] for each in shown]}})
    everything = json.dumps([shown, logs])
    assert site.world.database_url not in everything
    assert "sk-sandbox" not in everything
