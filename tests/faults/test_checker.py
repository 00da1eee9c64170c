"""The checker finds nothing in an honest run, and names each planted violation: a check must be able to fail."""

from __future__ import annotations

import ast
import asyncio
import sys
import tomllib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import orjson
import psycopg
import pytest

from sandbox.bill import bill_path
from sandbox.postgres import Server, create_database, drop_database
from tests.faults.checker import APPEND_ONLY, INVARIANTS, Answered, Beside, check, results, snapshot
from tests.world import make_world

CANARY = "canary-7f3a"
#: Decided by the harness alone: no row can show it.
OUTSIDE = {"I14"}
#: I15 is about runs with a promise: tests/faults/test_certified.py plants what breaks it.


def test_the_checker_shares_no_code_with_the_product() -> None:
    tree = ast.parse((Path(__file__).parent / "checker.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names == {"psycopg", "pyarrow"}


def test_every_table_that_refuses_a_change_is_compared_with_its_rows_from_before() -> None:
    declared = tomllib.loads((Path(__file__).parents[2] / "migrations" / "permissions.toml").read_text())["tables"]
    frozen = {name for name, table in declared.items() if {"UPDATE", "DELETE"} <= set(table.get("refuses", ()))}
    assert frozen <= APPEND_ONLY.keys()


@dataclass(frozen=True)
class Scene:
    """A finished run that somebody may tamper with: its database, its bill, and what a harness knows besides."""

    url: str
    bill: Path
    beside: Beside

    def violations(self) -> dict[str, list[str]]:
        """What breaks each broken invariant."""
        named: dict[str, list[str]] = {}
        for found in check(self.url, self.bill, self.beside):
            named.setdefault(found.invariant, []).append(found.what)
        return named

    def names(self, invariant: str, words: str) -> bool:
        """Whether a violation of the invariant begins with these words."""
        return any(what.startswith(words) for what in self.violations().get(invariant, []))

    def change_bill(self, change: Callable[[list[dict[str, object]]], object]) -> None:
        lines = [orjson.loads(raw) for raw in self.bill.read_bytes().splitlines()]
        change(lines)
        self.bill.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))


def sql(url: str, statements: str) -> None:
    """Past every trigger and role."""
    with psycopg.connect(url, options="-c search_path=farthing -c session_replication_role=replica") as connection:
        connection.execute(statements)


@pytest.fixture(scope="module")
def honest(postgres: Server, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A run in which replies were lost, refused and cut, worked on by two lanes; its folder and its database."""
    root, name = tmp_path_factory.mktemp("honest"), f"honest_{uuid.uuid4().hex}"
    asyncio.run(_work(root, create_database(postgres, name, template=template)))
    yield root, name
    drop_database(postgres, name)


async def _work(root: Path, ledger_url: str) -> None:
    async with make_world(root, ledger_url, documents=40) as world:
        world.plan_mishaps(
            {"kind": "reset_after", "every": 1, "match": "1.3.1"},
            {"kind": "rate_limited", "share": 0.2, "seed": 5},
            {"kind": "blank", "share": 0.1, "seed": 5},
        )
        run = await world.open()
        await asyncio.gather(world.work(run), world.work(run))
        settled, _ = await world.run()
        assert (settled.run_id, settled.state) == (run.run_id, "done")


@pytest.fixture
def scene(honest: tuple[Path, str], postgres: Server, tmp_path: Path) -> Iterator[Scene]:
    """A copy of it for each test to spoil."""
    root, template = honest
    name = f"test_{uuid.uuid4().hex}"
    url = create_database(postgres, name, template=template)
    bill = tmp_path / "bill.jsonl"
    bill.write_bytes(bill_path(root).read_bytes())
    log = tmp_path / "log"
    log.write_text("nothing to see\n")
    beside = Beside(
        root=root,
        peaks={"deepseek-v4-flash": (16, 16)},
        baseline=results(url, 1),
        earlier=snapshot(url),
        logs=[log],
        canaries=[CANARY],
        trickle_per_s=1000,
    )
    yield Scene(url, bill, beside)
    drop_database(postgres, name)


def test_an_honest_run_has_no_violation(scene: Scene) -> None:
    assert check(scene.url, scene.bill, scene.beside) == []
    assert check(scene.url, scene.bill, scene.beside, run_id=1) == []
    assert len(scene.beside.earlier or {}) > 150


#: What is done to the ledger behind its triggers' back, which invariants it breaks, and what they name.
TAMPERED = {
    "a lost document": ("DELETE FROM document WHERE document_no = 9", "I1", "document 1.9 has 0 terminal rows"),
    "an invented document": (
        "INSERT INTO document (run_id, document_no, document_id, state, reason)"
        " VALUES (1, 40, 'd40', 'dead_letter', 'lost')",
        "I1",
        "document 1.40 is not one of the run's 40",
    ),
    "another's id": ("UPDATE document SET document_id = 'd8' WHERE document_no = 9", "I1", "document 1.9 is called"),
    "another's text": (
        "UPDATE document SET text_digest = sha256('x') WHERE document_no = 9",
        "I1",
        "document 1.9 has another text's digest",
    ),
    "an open shard": ("UPDATE shard SET state = 'leased' WHERE shard_no = 1", "I1", "shard 1.1 is leased"),
    "a bill without intent": (
        "DELETE FROM attempt_intent WHERE document_no = 9 AND attempt_no = 1",
        "I2",
        "attempt 1.9.1 was billed and has no intent",
    ),
    "a price too low": (
        "UPDATE attempt_outcome SET cost = cost - 1 WHERE document_no = 9 AND cost > 0",
        "I3",
        "attempt 1.9.",
    ),
    "other tokens": (
        "UPDATE attempt_outcome SET hit = hit + 1 WHERE document_no = 9 AND cost > 0",
        "I3",
        "attempt 1.9.",
    ),
    "a bound too low": (
        "UPDATE attempt_unknown SET bound = 1 WHERE document_no = 3",
        "I4",
        "run 1 was billed",
    ),
    "an unknown taken for free": (
        "UPDATE attempt_outcome SET cost = 0 WHERE cost IS NULL; DELETE FROM attempt_unknown",
        "I4",
        "run 1 was billed",
    ),
    "work after the end": (
        "UPDATE attempt_intent i SET intended_at = d.recorded_at + interval '1 second' FROM document d"
        " WHERE d.document_no = 9 AND i.document_no = 9",
        "I5",
        "attempt 1.9.1 was intended after",
    ),
    "lost too often": (
        "INSERT INTO attempt_intent SELECT run_id, document_no, n, tier, 'retry', 'lost', shard_no, epoch, lane_id,"
        " grant_id, price_id, 0, intended_at FROM attempt_intent, generate_series(20, 23) n"
        " WHERE document_no = 9 AND attempt_no = 1;"
        " INSERT INTO attempt_unknown SELECT 1, 9, n, 0, 'lost' FROM generate_series(20, 23) n",
        "I5",
        "document 1.9 was tried again after 4",
    ),
    "an answer asked for again": (
        "UPDATE document SET text_digest = (SELECT text_digest FROM document WHERE document_no = 9),"
        " recorded_at = recorded_at - interval '1 hour' WHERE document_no = 8",
        "I5",
        "attempt 1.9.1 asks what 1.8 had answered",
    ),
    "a zombie's attempt": (
        "UPDATE attempt_intent SET epoch = epoch + 1 WHERE document_no = 0 AND attempt_no = 1",
        "I5",
        "attempt 1.",
    ),
    "an open intent": (
        "DELETE FROM attempt_outcome WHERE document_no = 9; DELETE FROM attempt_unknown WHERE document_no = 9",
        "I6",
        "attempt 1.9.1 has neither",
    ),
    "an open grant": ("DELETE FROM grant_close", "I6", "grant"),
    "a lane without end": ("UPDATE lane SET ended_at = NULL WHERE lane_id = 1", "I6", "lane 1 of run 1"),
    "granted too much": ("UPDATE budget SET granted = granted + 1", "I6", "budget 1 has granted"),
    "a cap passed": (
        "UPDATE run_event SET detail = '{\"cap\": 1000}' WHERE kind = 'opened'",
        "I7",
        "budget 1 was billed",
    ),
    "a storm of retries": (
        "INSERT INTO attempt_intent SELECT run_id, document_no, n, tier, 'retry', 'rate_limited', shard_no, epoch,"
        " lane_id, grant_id, price_id, 0, intended_at FROM attempt_intent, generate_series(20, 9000) n"
        " WHERE document_no = 9 AND attempt_no = 1;"
        " INSERT INTO attempt_outcome (run_id, document_no, attempt_no, signal, sent_at, completed_at, cost)"
        " SELECT 1, 9, n, 'rate_limited', now(), now(), 0 FROM generate_series(20, 9000) n",
        "I9",
        "lane",
    ),
    "another answer": (
        'UPDATE document SET answer = \'{"colour": "none"}\' WHERE document_no = 9',
        "I10",
        "document 1.9 ended as",
    ),
    "a reason rewritten": ("UPDATE attempt_intent SET reason = 'x' WHERE document_no = 9", "I12", "attempt_intent"),
    "a row gone": ("DELETE FROM budget_grant WHERE grant_id = 1", "I12", "budget_grant 1 has gone"),
    "text in an event": (
        f"INSERT INTO run_event (run_id, kind, detail) VALUES (1, 'note', '{{\"why\": \"{CANARY}\"}}')",
        "I13",
        "run_event",
    ),
    "text in a detail": (
        f"UPDATE attempt_outcome SET detail = '{CANARY}' WHERE document_no = 9",
        "I13",
        "attempt_outcome 1.9.",
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_ledger_is_named(name: str, scene: Scene) -> None:
    statements, invariant, named = TAMPERED[name]
    sql(scene.url, statements)
    assert scene.names(invariant, named), scene.violations()


def test_a_bill_line_without_intent_is_named(scene: Scene) -> None:
    scene.change_bill(lambda lines: lines.append(lines[0] | {"attempt": "1.99.1"}))
    assert scene.violations()["I2"] == ["attempt 1.99.1 was billed and has no intent"]


def test_an_attempt_billed_twice_is_named(scene: Scene) -> None:
    scene.change_bill(lambda lines: lines.append(lines[0]))
    assert [what[-18:] for what in scene.violations()["I2"]] == ["was billed 2 times"]


def test_a_document_paid_for_again_without_reason_is_named(scene: Scene) -> None:
    """A second and a third answer on the same tier, both known and accepted, both on the bill."""
    sql(
        scene.url,
        "INSERT INTO attempt_intent SELECT run_id, 9, n, tier, purpose, reason, shard_no, epoch, lane_id, grant_id,"
        " price_id, reserved, intended_at FROM attempt_intent, generate_series(20, 21) n"
        " WHERE document_no = 9 AND attempt_no = 1;"
        " INSERT INTO attempt_outcome (run_id, document_no, attempt_no, signal, verdict, sent_at, completed_at, cost)"
        " SELECT 1, 9, n, 'answered', 'accepted', now(), now(), 1 FROM generate_series(20, 21) n",
    )
    scene.change_bill(
        lambda lines: lines.extend(
            lines[0] | {"attempt": f"1.9.{n}", "cost_pico": 1, "status": 200} for n in (20, 21)
        )
    )
    assert scene.names("I5", "document 1.9 was paid for")


def test_a_torn_last_line_of_the_bill_counts_for_nothing(scene: Scene) -> None:
    scene.bill.write_bytes(scene.bill.read_bytes() + b'{"attempt": "1.99.1", "cost')
    assert check(scene.url, scene.bill, scene.beside) == []


def test_too_many_in_flight_is_named(scene: Scene) -> None:
    beside = replace(scene.beside, peaks={"deepseek-v4-flash": (17, 16)})
    found = check(scene.url, scene.bill, beside)
    assert [str(violation) for violation in found] == [
        "I8: deepseek-v4-flash had 17 requests in flight, 16 are allowed"
    ]


def test_a_result_on_another_tier_than_without_faults_is_named(scene: Scene) -> None:
    baseline = dict(scene.beside.baseline or {})
    baseline["d9"] = Answered("result", "pro", baseline["d9"].answer)
    sql(scene.url, "UPDATE document SET tier = 'flash' WHERE document_no = 9")
    found = check(scene.url, scene.bill, replace(scene.beside, baseline=baseline))
    assert any(str(violation).startswith("I10: document 1.9") for violation in found)


def test_a_lock_left_behind_is_named(scene: Scene) -> None:
    with psycopg.connect(scene.url) as session:
        session.execute("SELECT pg_advisory_lock(18017, 1)")
        assert scene.names("I11", f"session {session.info.backend_pid} still holds the lock of lane 1")


def test_a_canary_in_a_log_is_named_without_being_repeated(scene: Scene) -> None:
    scene.beside.logs[0].write_text(f"error: {CANARY}\n")
    assert scene.violations() == {"I13": ["log tells a canary"]}


def test_every_invariant_has_a_function_and_a_planted_violation() -> None:
    assert set(INVARIANTS) | OUTSIDE == {f"I{number}" for number in range(1, 16)}
    planted = {invariant for _, invariant, _ in TAMPERED.values()} | {"I8", "I11", "I15"}
    assert planted == set(INVARIANTS)
