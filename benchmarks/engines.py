"""The same job on every engine that can work its lanes, in one run on this machine: `make bench-engines`.

    process      one lane, in the command's own process: what the others are held against
    processes    two lanes, a process each
    workers      two lanes as deployment runs of Prefect's, one on each of two workers
    dask, ray    two lanes as tasks of a cluster of two processes

Each has a ledger and an emulated DeepSeek of its own, whose replies take 0.25 s in the median, and a fixed clock, so
that no tariff begins in between; all have one Prefect server. It ends with an error where results differ, a ledger
does not prove, differs from what was billed, or the provider saw more requests at once than the job allows. Speed is
counted from when every lane had come, since engines need seconds to start one: `start_s` says how many. Prints a
table and writes `benchmarks/results/engines.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.pipeline import prepare
from sandbox import postgres, service
from sandbox.postgres import Server, create_database
from schemas.engines import Engine
from schemas.errors import ConfigurationError
from tasks import engines
from tests.prefect_servers import QUIET, free_port, prefect_server

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/engines.json"
#: Off-peak by the provider's calendar.
CLOCK = "2026-09-26T00:10:00Z"
WITHIN_S = 1800.0
#: Name, engine and lanes of what is measured; the first is what the others are held against.
WAYS = (
    ("process", Engine.PROCESSES, 1),
    ("processes", Engine.PROCESSES, 2),
    ("workers", Engine.WORKERS, 2),
    ("dask", Engine.DASK, 2),
    ("ray", Engine.RAY, 2),
)
#: Since the last lane came: documents, and seconds until the last left. Before: from the run's opening, in seconds.
_SPEED = """
    SELECT count(*), extract(epoch FROM l.ended - l.came)::float, extract(epoch FROM l.came - r.opened_at)::float,
           l.lanes
    FROM run r, document d, (SELECT max(started_at) AS came, max(ended_at) AS ended, count(*) AS lanes FROM lane) l
    WHERE d.recorded_at > l.came GROUP BY r.opened_at, l.came, l.ended, l.lanes
"""
_ANSWERS = """
    SELECT md5(string_agg(concat_ws(' ', document_id, state, tier, answer), ';' ORDER BY document_no)) FROM document
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of the job. `lanes` came, the last `start_s` after the run was opened; `answers` is a digest."""

    lanes: int
    documents_per_s: float
    start_s: float
    wall_s: float
    attempts: int
    cost_pico: int
    most_in_flight: int
    answers: str


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=6_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; the median counts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(render(result))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every measurement, as the JSON that is written. Raises SystemExit where a promise is broken."""
    absent = {name: reason for name, engine, _ in WAYS if (reason := missing(engine))}
    ways = [each for each in WAYS if each[0] not in absent]
    runs: dict[str, list[Measured]] = {name: [] for name, _, _ in ways}
    with ExitStack() as stack:
        ledgers = stack.enter_context(postgres.running(folder, throwaway=True))
        shown = stack.enter_context(prefect(folder / "prefect"))
        for turn in range(options.repeat):
            for name, engine, lanes in ways if turn % 2 else ways[::-1]:  # nobody always goes first
                runs[name].append(work(folder / f"{name}{turn}", engine, lanes, ledgers, shown, options))
    require_alike([each for several in runs.values() for each in several], options.concurrency)
    speed = {name: statistics.median(run.documents_per_s for run in several) for name, several in runs.items()}
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "documents": options.documents,
        "concurrency": options.concurrency,
        "documents_per_s": {name: round(each, 1) for name, each in speed.items()},
        "ratio_to_process": {name: round(each / speed["process"], 3) for name, each in speed.items()},
        "most_in_flight": {name: max(run.most_in_flight for run in several) for name, several in runs.items()},
        "not_installed": absent,
        "runs": {name: [asdict(run) for run in several] for name, several in runs.items()},
    }


def missing(engine: Engine) -> str | None:
    """What to install for this engine. None: nothing."""
    try:
        engines.require(engine)
    except ConfigurationError as error:
        return str(error)
    return None


def require_alike(runs: Sequence[Measured], concurrency: int) -> None:
    """Raises SystemExit where runs ended otherwise, or had more in flight than the job allows."""
    if len({run.answers for run in runs}) != 1:
        raise SystemExit("the results differ between engines")
    if (most := max(run.most_in_flight for run in runs)) > concurrency:
        raise SystemExit(f"{most} requests were in flight, and {concurrency} were allowed")


def render(result: Mapping[str, Any]) -> str:
    """The table for people."""
    titles = ("", "lanes", "documents/s", "ratio", "start s", "most in flight", "attempts", "cost, USD")
    rows = [titles]
    for name, runs in result["runs"].items():
        start_s = statistics.median(run["start_s"] for run in runs)
        speed, ratio = result["documents_per_s"][name], result["ratio_to_process"][name]
        last = runs[-1]
        most, cost = result["most_in_flight"][name], f"{last['cost_pico'] / 10**12:.6f}"
        rows.append((name, last["lanes"], speed, ratio, f"{start_s:.1f}", most, last["attempts"], cost))
    table = ["".join(f"{cell:<11}" if not n else f"{cell!s:>15}" for n, cell in enumerate(row)) for row in rows]
    return "\n".join([*table, *(f"{name:<11}{reason}" for name, reason in result["not_installed"].items())])


def work(
    folder: Path, engine: Engine, lanes: int, ledgers: Server, shown: Mapping[str, str], options: argparse.Namespace
) -> Measured:
    """The job once, over a ledger and a provider of its own."""
    database = create_database(ledgers, folder.name)
    speed = {"reply": 0.25, "tokens": "fast", "cache_build": 0.1, "clock": CLOCK}
    folder.mkdir()
    with service.running(folder, **speed) as endpoint:
        prepare(folder, (endpoint.url, endpoint.api_key, database), options.documents, options.concurrency)
        anchor(folder)
        environment = os.environ | shown
        environment |= {
            "FARTHING_DATABASE_URL": database,
            "FARTHING_HOME": str(folder / "home"),
            "FARTHING_SANDBOX": "1",
            "DEEPSEEK_API_KEY": endpoint.api_key,
            "DEEPSEEK_BASE_URL": endpoint.url,
        }
        with workers(folder, environment, lanes) if engine is Engine.WORKERS else nullcontext():
            wall = time.perf_counter()
            told = command(folder, engine, lanes, environment)
            wall = time.perf_counter() - wall
        billed, status = (ask(endpoint, path) for path in ("bill", "status"))
    if (told["cost_pico"], told["unknown_pico"]) != (billed["cost_pico"], 0):
        raise SystemExit(
            f"{folder.name}: the ledger has {told['cost_pico']} and the bill {billed['cost_pico']} pico-USD"
        )
    with psycopg.connect(database, options="-c search_path=farthing") as ledger:
        done, seconds, start_s, came = ledger.execute(_SPEED).fetchone() or (0, 1.0, 0.0, 0)
        (answers,) = ledger.execute(_ANSWERS).fetchone() or ("",)
    most = max(status["peak_in_flight"].values())
    return Measured(came, done / seconds, start_s, wall, told["attempts"], told["cost_pico"], most, answers)


def anchor(folder: Path) -> None:
    """Let the job name its documents by their whole path: a worker's folder is another one."""
    job = folder / "jobs/bench/job.yaml"
    job.write_text(job.read_text().replace("path: documents.parquet", f"path: {folder}/documents.parquet"))


def command(folder: Path, engine: Engine, lanes: int, environment: Mapping[str, str]) -> dict[str, Any]:
    """`farthing run` to its end; the object that it prints. Raises SystemExit where it is no success."""
    words = ("run", str(folder / "jobs/bench/job.yaml"), "--lanes", str(lanes), "--lanes-on", engine)
    done = subprocess.run(
        [sys.executable, "-m", "farthing", *words, "--json", "--quiet"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=WITHIN_S,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{folder.name}: exit code {done.returncode}\n{done.stderr.decode()}")
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def ask(endpoint: service.Endpoint, path: str) -> dict[str, Any]:
    """What the emulated DeepSeek says of itself."""
    headers = {"Authorization": f"Bearer {endpoint.api_key}"}
    with urllib.request.urlopen(urllib.request.Request(f"{endpoint.url}/sandbox/{path}", headers=headers)) as reply:
        told: dict[str, Any] = json.load(reply)
        return told


@contextmanager
def prefect(home: Path) -> Iterator[Mapping[str, str]]:
    """A Prefect server that knows the pool and a lane's deployment; the environment by which others find it."""
    home.mkdir()
    with prefect_server(home, free_port()) as server:
        shown = {"PREFECT_HOME": str(home / "prefect"), "PREFECT_API_URL": server.url, **QUIET}
        shown["PREFECT_CLIENT_MAX_RETRIES"] = "5"  # as usual: where its SQLite is busy the server answers 503
        for words in (
            ("work-pool", "create", "farthing", "--type", "process"),
            ("--no-prompt", "deploy", "--name", "lane"),
        ):
            made = [sys.executable, "-m", "prefect", *words]
            subprocess.run(made, cwd=ROOT, env=os.environ | shown, check=True, stdout=subprocess.DEVNULL)
        yield shown


@contextmanager
def workers(folder: Path, environment: Mapping[str, str], count: int) -> Iterator[None]:
    """So many of Prefect's workers, each for one lane."""
    words = ("worker", "start", "--pool", "farthing", "--limit", "1", "--name")
    with (folder / "workers.log").open("wb") as log:
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "prefect", *words, f"worker-{number}"],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            for number in range(count)
        ]
    try:
        yield
    finally:
        for worker in started:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


if __name__ == "__main__":
    main()
