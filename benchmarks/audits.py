"""How long an audit takes of a big ledger: `make bench-audits`, with `ATTEMPTS=10000000` for a really big one.

    a run     nine tenths of all attempts, in one run that is done
    a job     the rest, in twenty runs of another job
    ledger    all of it

Each is audited by the command that people type, from its start to its exit, and by the function behind it, and the
one run by a report page, too; then the stored sums are taken away, the same is read from the rows, and both must say
the same (`--stored` leaves that out: of ten million attempts it takes most of an hour). The plans of all that is
asked about the one run are in the JSON: whatever reads a table of attempts or documents, and how. The ledger is made
up (`benchmarks.big_ledgers`) in a Postgres of its own. Writes `benchmarks/results/audits.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
from pydantic import SecretStr
from sqlalchemy import event

from benchmarks.big_ledgers import fill
from sandbox import postgres
from tasks.ledger import spend
from tasks.ledger.connection import Role, opened
from tasks.ledger.upgrades import upgrade

RESULTS = Path(__file__).parent / "results" / "audits.json"
RUNS, REPEAT = 20, 3
SCOPES: dict[str, dict[str, Any]] = {"run": {"run": 1}, "job": {"job": "nightly"}, "ledger": {}}
#: A table of which a big run has a row for each attempt or document.
BIG = ("attempt_intent", "attempt_outcome", "attempt_unknown", "answer", "document", "label")
#: More of the dearest documents than are stored.
MANY = 1000


def main() -> None:
    """Make the ledger, measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attempts", type=int, default=500_000)
    parser.add_argument(
        "--home", type=Path, help="keep the ledger there, and measure it again if it is there already"
    )
    parser.add_argument("--stored", action="store_true", help="only what is read from stored sums")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = options.home or Path(folder)
        with postgres.running(home, throwaway=options.home is None, durable=False) as server:
            result = measure(server.url, options.attempts, only_stored=options.stored)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(render(result))


def measure(url: str, attempts: int, *, only_stored: bool) -> dict[str, Any]:
    """Every measurement, as the JSON that is written."""
    upgrade(SecretStr(url))
    settled = {} if _count(url, "run") else _make(url, attempts)
    stored = {name: asyncio.run(audited(url, **scope)) for name, scope in SCOPES.items()}
    commands = {name: command(url, scope) for name, scope in SCOPES.items()}
    plans = asyncio.run(explain(url))
    result = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "attempts": _count(url, "attempt_intent"),
        "runs": _count(url, "run"),
        "settle_s": settled,
        "sums_bytes": _size(url, "run_sums"),
        "attempts_bytes": sum(_size(url, table) for table in BIG),
        "command_s": commands,
        "command_top_s": {"stored": command(url, SCOPES["run"], "--top", "50")},
        "page": page(url),
        "audit_s": {name: seconds for name, (seconds, _) in stored.items()},
        "seq_scans_of_a_run": sorted(
            {read for plan in plans for read in plan["reads"] if read.startswith("Seq Scan")}
        ),
        "plans": plans,
    }
    return result if only_stored else result | measure_rows(url, {name: said for name, (_, said) in stored.items()})


def measure_rows(url: str, stored: dict[str, Any]) -> dict[str, Any]:
    """The same without stored sums, and whether it is the same."""
    from_rows_s = command(url, SCOPES["run"], "--top", str(MANY), repeat=1)
    sql(url, "DELETE FROM run_sums")
    rows = {name: asyncio.run(audited(url, repeat=1, **scope)) for name, scope in SCOPES.items()}
    began = time.perf_counter()
    sql(url, "SELECT sum_up(run_id) FROM run")
    return {
        "sum_up_s": round(time.perf_counter() - began, 2),
        "command_top_from_rows_s": from_rows_s,
        "audit_by_rows_s": {name: seconds for name, (seconds, _) in rows.items()},
        "is_same": {name: stored[name] == said for name, (_, said) in rows.items()},
    }


def page(url: str) -> dict[str, float]:
    """Seconds that the report page of the one run takes, by the command, and its bytes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.html"
        seconds = command(url, SCOPES["run"], "--html", str(file))
        return {"s": seconds, "bytes": file.stat().st_size}


def render(result: dict[str, Any]) -> str:
    """The table for people."""
    lines = [f"{result['attempts']:,} attempts in {result['runs']} runs", ""]
    lines.append(f"{'seconds':<10}{'farthing audit':>16}{'the audit in it':>18}{'from rows':>12}{'the same':>10}")
    for name in SCOPES:
        from_rows = f"{result['audit_by_rows_s'][name]:.2f}" if "is_same" in result else "–"
        is_same = str(result["is_same"][name]) if "is_same" in result else "–"
        took = f"{result['command_s'][name]:>16.2f}{result['audit_s'][name]:>18.3f}"
        lines.append(f"{name:<10}{took}{from_rows:>12}{is_same:>10}")
    made = result["page"]
    lines += [
        "",
        f"the 50 dearest documents of the run, stored: {result['command_top_s']['stored']:.2f} s",
        f"its report page: {made['s']:.2f} s, {made['bytes']:,} bytes",
        f"stored sums: {result['sums_bytes']:,} bytes beside {result['attempts_bytes']:,}",
        f"sequential scans for the one run: {', '.join(result['seq_scans_of_a_run']) or 'none'}",
    ]
    if "is_same" in result:
        lines.append(
            f"adding up: {result['sum_up_s']:.1f} s; the {MANY} dearest documents, from rows: "
            f"{result['command_top_from_rows_s']:.2f} s"
        )
    return "\n".join(lines)


async def audited(url: str, *, repeat: int = REPEAT, **scope: Any) -> tuple[float, dict[str, Any]]:
    """Seconds of an audit in the median, and what it says."""
    async with opened(SecretStr(url), Role.AUDITOR, pool_size=1) as ledger:
        took = []
        for _ in range(repeat):
            began = time.perf_counter()
            found = await spend.audit(ledger, **scope)
            took.append(time.perf_counter() - began)
    return round(statistics.median(took), 3), found.to_json()


def command(url: str, scope: dict[str, Any], *options: str, repeat: int = REPEAT) -> float:
    """Seconds that `farthing audit` takes, in the median, from start to exit."""
    told = [sys.executable, "-m", "farthing", "audit", *map(str, scope.values()), *options, "--json"]
    took = []
    for _ in range(repeat):
        began = time.perf_counter()
        subprocess.run(told, env=os.environ | {"FARTHING_DATABASE_URL": url}, check=True, capture_output=True)
        took.append(time.perf_counter() - began)
    return round(statistics.median(took), 2)


async def explain(url: str) -> list[dict[str, Any]]:
    """Of every query of the audit of the one run: what it asks, milliseconds, and the big tables that it read."""
    asked: list[tuple[str, Any]] = []
    async with opened(SecretStr(url), Role.AUDITOR, pool_size=1) as ledger:

        @event.listens_for(ledger.engine.sync_engine, "before_cursor_execute")
        def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
            asked.append((statement, parameters))

        await spend.audit(ledger, **SCOPES["run"])
    with psycopg.connect(url, options="-c search_path=farthing", cursor_factory=psycopg.ClientCursor) as connection:
        connection.execute("SET ROLE farthing_auditor")
        return list(_explain_all(connection, asked))


def _explain_all(connection: psycopg.Connection, asked: Sequence[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each as it was asked: under the settings that the audit made for it."""
    for statement, parameters in asked:
        if statement.startswith("SET LOCAL"):
            connection.execute(statement)
        elif statement.lstrip().startswith(("SELECT", "WITH")):
            yield _explain(connection, statement, parameters)


def _explain(connection: psycopg.Connection, statement: str, parameters: Any) -> dict[str, Any]:
    (plans,) = connection.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters).fetchone() or ([],)
    (plan,) = plans
    views = re.findall(r"FROM (\w+)", statement)
    return {
        "of": views[-1] if views else "",
        "ms": round(plan["Planning Time"] + plan["Execution Time"], 1),
        "reads": sorted(set(_reads(plan["Plan"]))),
    }


def _reads(node: dict[str, Any]) -> Iterator[str]:
    """`Index Scan attempt_outcome` and the like, of parts of a plan that were executed."""
    if node["Actual Loops"] and node.get("Relation Name") in BIG:
        yield f"{node['Node Type']} {node['Relation Name']}"
    for part in node.get("Plans", ()):
        yield from _reads(part)


def sql(url: str, query: str) -> list[tuple[Any, ...]]:
    """What the superuser does, past every trigger."""
    with psycopg.connect(url, options="-c search_path=farthing -c session_replication_role=replica") as connection:
        cursor = connection.execute(query)
        return cursor.fetchall() if cursor.description else []


def _make(url: str, attempts: int) -> dict[str, float]:
    made = asyncio.run(fill(url, {"big": [attempts * 9 // 10], "nightly": [attempts // 10 // RUNS] * RUNS}))
    return {"run": round(made[0].settle_s, 2), "job": round(sum(each.settle_s for each in made[1:]), 2)}


def _count(url: str, table: str) -> int:
    return int(sql(url, f"SELECT count(*) FROM {table}")[0][0])


def _size(url: str, table: str) -> int:
    return int(sql(url, f"SELECT pg_total_relation_size('{table}')")[0][0])


if __name__ == "__main__":
    main()
