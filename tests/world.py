"""A small world for a lane: a job, its documents, an emulated DeepSeek in this process and a migrated ledger."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
from aiohttp import web
from pydantic import SecretStr

from sandbox.bill import bill_path, read_lines
from sandbox.deepseek import DeepSeek, build, read_options, start
from schemas.requests import RunRequest
from schemas.settings import Settings
from tasks import enrichment
from tasks.lanes import Ended
from tasks.ledger.runs import Run
from tests.forked_readers import forked_readers

#: Flash off-peak: 0.003 / 0.15 / 0.60 USD per 1M tokens; Pro off-peak: 0.022 / 0.66 / 1.98.
CLOCK = "2026-09-26T00:10:00Z"
JOB = """\
name: colours
input: {path: documents.parquet, id: id, text: text}
prompt: prompt.md
answer: answer.schema.json
ladder: [flash, pro]
escalate: {below: 0.6}
confidence: {signal: logprobs, fields: [colour]}
tiers: {flash: {max_tokens: 100, deadline_s: 5}, pro: {max_tokens: 100, deadline_s: 5}}
concurrency: 16
budget: 1 USD
shard_rows: 20
tolerance: 1
"""
SCHEMA = """{"type": "object", "properties": {"colour": {"enum": ["red", "green", "blue"], "type": "string"}},
 "required": ["colour"], "additionalProperties": false}"""
PROMPT = "Say in JSON which colour the document is about.\n" + "Think of red, of green, and of blue. " * 60


@dataclass
class World:
    """One test's world. `sql` looks at the ledger as its superuser, past every view and role."""

    root: Path
    server: DeepSeek
    settings: Settings
    database_url: str

    async def open(self, **request: Any) -> Run:
        return await enrichment.open_run(self.request(**request), self.settings)

    async def work(self, run: Run, **request: Any) -> Ended:
        return await enrichment.work_lane(self.request(**request), self.settings, run)

    async def run(self, **request: Any) -> tuple[Run, Ended]:
        """Open, work with one lane, settle."""
        run = await self.open(**request)
        ended = await self.work(run, **request)
        return await enrichment.settle_run(self.settings, run, [ended]), ended

    def request(self, **request: Any) -> RunRequest:
        return RunRequest(job="colours", root=self.root, **request)

    def sql(self, query: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database_url, options="-c search_path=farthing") as connection:
            return connection.execute(query).fetchall()

    def value(self, query: str) -> Any:
        return self.sql(query)[0][0]

    def bill(self) -> dict[str, int]:
        """What the provider billed, by attempt key: its own file, its own arithmetic."""
        return {line["attempt"]: line["cost_pico"] for line in read_lines(bill_path(self.root))}

    def plan_mishaps(self, *rules: dict[str, Any]) -> None:
        self.server.mishaps.clear()
        self.server.mishaps.add(list(rules))


def write_documents(root: Path, texts: Sequence[str | None], ids: Sequence[str | None] | None = None) -> None:
    ids = ids or [f"d{number}" for number in range(len(texts))]
    table = pa.table({"id": pa.array(ids, pa.string()), "text": pa.array(texts, pa.string())})
    pq.write_table(table, root / "documents.parquet", row_group_size=10)


def write_days(root: Path, job: str, texts: Mapping[str, Sequence[str]]) -> str:
    """Write documents in partitions that are days; returns the job file's text, with those as its input."""
    for day in texts:
        folder = root / f"day={day}"
        folder.mkdir(parents=True)
        write_documents(folder, texts[day], [f"{day}-{number}" for number in range(len(texts[day]))])
    reading = f"input: {{path: '{root}/*/documents.parquet', id: id, text: text, partition: day}}"
    return re.sub("^input: .*", reading, job, flags=re.MULTILINE)


@asynccontextmanager
async def make_world(root: Path, ledger_url: str, documents: int = 60) -> AsyncIterator[World]:
    """A world over a migrated database."""
    job = root / "jobs" / "colours"
    job.mkdir(parents=True)
    (job / "job.yaml").write_text(JOB)
    (job / "prompt.md").write_text(PROMPT)
    (job / "answer.schema.json").write_text(SCHEMA)
    write_documents(root, [f"document {number} is about a colour" for number in range(documents)])
    server = build(read_options([f"--home={root}", "--time-scale=0", f"--clock={CLOCK}", "--cache-build=0"]))
    runner = await start(server.app())
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    settings = Settings(
        database_url=SecretStr(ledger_url),
        DEEPSEEK_API_KEY=SecretStr("sk-sandbox-test"),
        DEEPSEEK_BASE_URL=f"http://127.0.0.1:{runner.addresses[0][1]}",
        sandbox=True,
        time_scale=0.0,
    )
    try:
        with forked_readers():
            yield World(root, server, settings, ledger_url)
    finally:
        await runner.cleanup()
        server.house.bill.close()
