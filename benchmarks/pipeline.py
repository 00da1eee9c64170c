"""The whole pipeline against the bare openai client, in one run on this machine: `make bench`.

    floor       AsyncOpenAI with its aiohttp backend, raw `post`, nothing else: what any client of openai pays
    pipeline    Parquet → render → reserve → intent → call → judge → price → outcome and result in Postgres
    pairs       the pipeline, and the pipeline whose requests leave while their intents are on the way to Postgres,
                in short turns, each first as often as the other: the price of G4, with a 95 % interval of its median
    efficiency  documents × latency / (places × wall), 2,500 in flight, a median of 2 s, 1 % of replies 20× slower

Replies take 0.25 s in the median, with jitter: at none at all, requests would come in convoys and understate
everyone (design: performance.md). Each runs in a process of its own on core 0, the emulated DeepSeek on core 1; CPU
is that process's alone. Prefect is left out: it costs per shard, not per document (design: prefect.md). Prints a
table and writes `benchmarks/results/pipeline.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "pipeline.json"
PREFIX_BYTES, TEXT_BYTES = 1_000, 2_000
JOB = """\
name: bench
input: {{path: documents.parquet, id: id, text: text}}
prompt: prompt.md
answer: answer.schema.json
ladder: [flash]
tiers: {{flash: {{max_tokens: 64}}}}
concurrency: {concurrency}
budget: 1000 USD
shard_rows: 1000
"""
SCHEMA = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}


@dataclass(frozen=True, slots=True)
class Measured:
    """One measured process: what it did, and what it took."""

    documents: int
    cpu_s: float
    wall_s: float
    peak_mb: float
    mean_latency_s: float

    @property
    def cpu_s_per_1000(self) -> float:
        return 1000 * self.cpu_s / self.documents


@dataclass(frozen=True, slots=True)
class Place:
    """Where a measured process finds its job, its model and its ledger."""

    root: Path
    base_url: str
    api_key: str
    database_url: str
    documents: int
    concurrency: int


@dataclass(frozen=True, slots=True)
class Taken:
    """What the work itself took, without start-up: CPU and wall seconds, and the mean latency of a request."""

    cpu_s: float
    wall_s: float
    mean_latency_s: float = 0.0


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=6_000)
    parser.add_argument("--concurrency", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=5, help="runs of each; the median counts")
    parser.add_argument("--pairs", type=int, default=24, help="turns with and without intent first; at least 6")
    parser.add_argument("--pair-documents", type=int, default=2_000)
    parser.add_argument("--efficiency-documents", type=int, default=40_000, help="0 leaves that part out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(render(result))


def measure(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every measurement, as the JSON that is written."""
    floors, lanes, pairs = [], [], []
    with Sandboxed(root, reply=0.25) as provider:
        for turn in range(options.repeat):
            place = prepare(root / f"turn{turn}", provider, options.documents, options.concurrency)
            floors.append(in_process(floor, place))
            lanes.append(in_process(lane, place))
        for turn in range(options.pairs):
            pairs.append(measure_pair(root / f"pair{turn}", provider, options, is_early_first=turn % 2 == 0))
    kept = [early.wall_s / first.wall_s for first, early in pairs]
    floor_cpu = statistics.median(run.cpu_s_per_1000 for run in floors)
    lane_cpu = statistics.median(run.cpu_s_per_1000 for run in lanes)
    result: dict[str, Any] = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "documents": options.documents,
        "concurrency": options.concurrency,
        "cpu_s_per_1000": round(lane_cpu, 3),
        "floor_cpu_s_per_1000": round(floor_cpu, 3),
        "ratio_to_floor": round(lane_cpu / floor_cpu, 3),
        "floor_requests_per_s": round(statistics.median(run.documents / run.wall_s for run in floors), 1),
        "documents_per_s": round(statistics.median(run.documents / run.wall_s for run in lanes), 1),
        "intent_first": round(statistics.median(kept), 4),
        "intent_first_interval": [round(end, 4) for end in median_interval(kept)],
        "pair_documents": options.pair_documents,
        "peak_mb": round(max(run.peak_mb for run in lanes), 1),
        "runs": {
            name: [asdict(run) for run in runs]
            for name, runs in (
                ("floor", floors),
                ("pipeline", lanes),
                ("intent_first", [first for first, _ in pairs]),
                ("early", [early for _, early in pairs]),
            )
        },
    }
    if options.efficiency_documents:
        result["efficiency_2500"] = round(measure_efficiency(root, options.efficiency_documents), 4)
    return result


def measure_pair(
    root: Path, provider: tuple[str, str, str], options: argparse.Namespace, *, is_early_first: bool
) -> tuple[Measured, Measured]:
    """The same documents with intent first, and sent early: nobody always goes first."""
    works = [lane, early_lane]
    measured = {}
    for work in reversed(works) if is_early_first else works:
        place = prepare(
            root.with_name(f"{root.name}-{work.__name__}"), provider, options.pair_documents, options.concurrency
        )
        measured[work] = in_process(work, place)
    return measured[lane], measured[early_lane]


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Where the median lies, whatever the law of the values, with that confidence; the narrowest pair of values.

    Between the k-th least and the k-th most it lies with probability 1 - 2 P(fewer than k heads in n throws)
    (Conover, Practical Nonparametric Statistics, 3.2). Raises ValueError where there are too few.
    """
    ordered, count = sorted(values), len(values)
    tail, depth = 0.0, 0
    while tail + math.comb(count, depth) / 2**count <= (1 - level) / 2:
        tail += math.comb(count, depth) / 2**count
        depth += 1
    if not depth:
        raise ValueError(f"{count} values are too few for an interval of {level:.0%}")
    return ordered[depth - 1], ordered[-depth]


def measure_efficiency(root: Path, documents: int) -> float:
    """Mean latency × documents / (places × wall): 1 means that no place was ever idle."""
    with Sandboxed(root / "slow", reply=2, slow=0.01) as provider:
        place = prepare(root / "efficiency", provider, documents, 2_500)
        run = in_process(lane, place)
        return run.mean_latency_s * documents / (2_500 * run.wall_s)


def render(result: dict[str, Any]) -> str:
    """The table for people."""
    rows = [
        ("bare openai client (aiohttp, raw post), CPU-s per 1,000", result["floor_cpu_s_per_1000"]),
        ("whole pipeline with its ledger, CPU-s per 1,000", result["cpu_s_per_1000"]),
        ("pipeline / bare client", result["ratio_to_floor"]),
        ("bare client, requests per second on one core", result["floor_requests_per_s"]),
        ("documents per second, one lane on one core", result["documents_per_s"]),
        ("throughput that intent first leaves, of sending early", result["intent_first"]),
        ("  its median lies, with 95 %, within", "{} to {}".format(*result["intent_first_interval"])),
        ("peak memory of the lane, MB", result["peak_mb"]),
        ("efficiency with 2,500 in flight at 2 s", result.get("efficiency_2500", "not measured")),
    ]
    return "\n".join(f"{name:<60}{value:>18}" for name, value in rows)


# The world around what is measured


class Sandboxed:
    """A private Postgres and an emulated DeepSeek whose replies take `reply` seconds in the median."""

    def __init__(self, home: Path, *, reply: float, slow: float = 0.0) -> None:
        self._home, self._reply, self._slow = home, reply, slow

    def __enter__(self) -> tuple[str, str, str]:
        from contextlib import ExitStack

        from sandbox import postgres, service

        self._home.mkdir(parents=True, exist_ok=True)
        self._stack = ExitStack()
        server = self._stack.enter_context(postgres.running(self._home, throwaway=True))
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {max(before)})  # inherited by the emulator: it gets a core of its own
        try:
            endpoint = self._stack.enter_context(
                service.running(self._home, reply=self._reply, slow=self._slow, tokens="fast", cache_build=0.1)
            )
        finally:
            os.sched_setaffinity(0, before)
        return endpoint.url, endpoint.api_key, server.url

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def prepare(root: Path, provider: tuple[str, str, str], documents: int, concurrency: int) -> Place:
    """Write the documents and the job, and migrate the ledger."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pydantic import SecretStr

    from tasks.ledger.upgrades import upgrade

    job = root / "jobs" / "bench"
    job.mkdir(parents=True)
    words = "the quick brown fox jumps over the lazy dog while it rains in the old harbour "
    body = words * (TEXT_BYTES // len(words))
    texts = [f"document {number} of {root.name}: {body}" for number in range(documents)]
    table = pa.table({"id": [f"d{number}" for number in range(documents)], "text": texts})
    pq.write_table(table, root / "documents.parquet", row_group_size=2_000)
    (job / "job.yaml").write_text(JOB.format(concurrency=concurrency))
    (job / "prompt.md").write_text(("Answer in JSON what the text is about. " + words * 20)[:PREFIX_BYTES])
    (job / "answer.schema.json").write_text(json.dumps(SCHEMA))
    url, key, database = provider
    upgrade(SecretStr(database))
    return Place(root, url, key, database, documents, concurrency)


def in_process(work: Callable[[Place], Coroutine[Any, Any, Taken]], place: Place) -> Measured:
    """Run `work` in a fresh process on core 0."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, place, sender))
    process.start()
    sender.close()  # so that a child that fails is the end of the pipe, and not a wait for ever
    try:
        measured: Measured = receiver.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"the measured process ended with exit code {process.exitcode}") from None
    process.join()
    return measured


def _child(work: Callable[[Place], Coroutine[Any, Any, Taken]], place: Place, sender: Any) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ |= {
        "FARTHING_DATABASE_URL": place.database_url,
        "DEEPSEEK_API_KEY": place.api_key,
        "DEEPSEEK_BASE_URL": place.base_url,
        "FARTHING_SANDBOX": "1",
    }
    taken = asyncio.run(work(place))
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sender.send(Measured(place.documents, taken.cpu_s, taken.wall_s, peak_kb / 1024, taken.mean_latency_s))


async def lane(place: Place) -> Taken:
    """One lane over all documents, from its first claim to its last commit."""
    from schemas.requests import RunRequest
    from schemas.settings import Settings
    from tasks import enrichment
    from tasks.logs import configure

    configure()
    latencies = watch_latency()
    settings, request = Settings(), RunRequest(job="bench", root=place.root)
    run = await enrichment.open_run(request, settings)
    cpu, wall = time.process_time(), time.perf_counter()
    ended = await enrichment.work_lane(request, settings, run)
    taken = Taken(time.process_time() - cpu, time.perf_counter() - wall, statistics.fmean(latencies))
    settled = await enrichment.settle_run(settings, run, [ended])
    if settled.state != "done":
        raise RuntimeError(f"the run ended {settled.state}: {ended}")
    return taken


async def early_lane(place: Place) -> Taken:
    """The same lane, whose requests do not wait until their intents are durable. It would lose track in a crash."""
    send_early()
    return await lane(place)


async def floor(place: Place) -> Taken:
    """As many requests of the same size through openai's own client, and nothing else."""
    import httpx2
    import openai

    bodies = [
        {
            "model": "deepseek-flash",
            "messages": [
                {"role": "system", "content": "json " + "x" * PREFIX_BYTES},
                {"role": "user", "content": f"{number} " + "y" * TEXT_BYTES},
            ],
            "thinking": {"type": "disabled"},
            "max_tokens": 64,
            "response_format": {"type": "json_object"},
            "logprobs": True,
        }
        for number in range(place.documents)
    ]
    waiting = iter(bodies)
    limits = httpx2.Limits(max_connections=place.concurrency, max_keepalive_connections=place.concurrency)
    backend = openai.DefaultAioHttpClient(limits=limits, timeout=httpx2.Timeout(60))
    async with openai.AsyncOpenAI(
        base_url=place.base_url, api_key=place.api_key, max_retries=0, http_client=backend
    ) as client:

        async def post_on() -> None:
            for body in waiting:
                await client.post("/chat/completions", body=body, cast_to=httpx2.Response)

        cpu, wall = time.process_time(), time.perf_counter()
        await asyncio.gather(*(post_on() for _ in range(place.concurrency)))
        return Taken(time.process_time() - cpu, time.perf_counter() - wall)


def send_early() -> None:
    """From now on a permit is given at once, and the intent is committed meanwhile."""
    from tasks.climbs import Climber
    from tasks.ledger.attempts import Permit, Permitted

    intend, underway = Climber._intend, set[asyncio.Task[Permit]]()

    async def permit_at_once(self: Climber, *details: Any) -> Permit:
        task = asyncio.ensure_future(intend(self, *details))
        underway.add(task)
        task.add_done_callback(underway.discard)
        return Permitted()

    Climber._intend = permit_at_once  # type: ignore[method-assign]  # a planted fault, in this process only


def watch_latency() -> list[float]:
    """Seconds of every request from now on, as the lane waits for it: a reply's own Date has whole seconds only."""
    from tasks.completions import Completions

    latencies: list[float] = []
    complete = Completions.complete

    async def watched(self: Completions, call: Any) -> Any:
        start = time.perf_counter()
        reply = await complete(self, call)
        latencies.append(time.perf_counter() - start)
        return reply

    Completions.complete = watched  # type: ignore[method-assign]  # a stopwatch, in this process only
    return latencies


if __name__ == "__main__":
    main()
