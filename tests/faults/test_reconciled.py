"""A run that every kind of fault befell: its audit is the provider's bill, and after an export nothing is unknown."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from farthing import main
from sandbox.bill import bill_path, read_lines
from sandbox.export import export_month
from sandbox.postgres import Server, create_database, drop_database
from tasks.ledger.leases import LeaseTimes
from tests.faults.checker import check
from tests.faults.stage import KILLED, Stage, staged
from tests.faults.summary import Tally

DOCUMENTS = 40
BUCKETS = ("hit", "miss", "output")
#: What strikes shares of the requests: replies lost that were billed, and that were not; refusals; bad answers.
MISHAPS = [
    {"kind": kind, "share": share, **({"args": args} if args else {})}
    for kind, share, args in (
        ("cut", 0.04, {}),
        ("reset_before", 0.02, {}),
        ("reset_after", 0.03, {}),
        ("eof_after_headers", 0.02, {}),
        ("hang", 0.01, {}),
        ("bad_utf8", 0.03, {}),
        ("500", 0.03, {}),
        ("504_html", 0.02, {}),
        ("rate_limited_bare", 0.04, {}),
        ("blank", 0.05, {}),
        ("length", 0.04, {}),
        ("insufficient_system_resource", 0.02, {}),
        ("content_exists_risk", 0.02, {}),
    )
]


@pytest.fixture
def stage(postgres: Server, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    root = tmp_path_factory.mktemp("reconciled")
    name = f"reconciled_{root.parent.name}_{root.name}".replace("-", "_")
    url = create_database(postgres, name, template=template)
    with staged(root, url, documents=DOCUMENTS) as made:
        made.times = LeaseTimes(beat_every_s=0.1, grace_s=0.3)  # the killed are buried at once
        made.deadline_s = 300
        yield made
    drop_database(postgres, name)


@pytest.fixture
def farthing(stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command line over the stage's ledger, in a thread's place: its exit code and its JSON."""
    for name, value in {
        "FARTHING_DATABASE_URL": stage.database_url,
        "FARTHING_SANDBOX": "1",
        "DEEPSEEK_BASE_URL": stage.base_url,
        "FARTHING_HOME": str(stage.root),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(stage.root)

    def call(*arguments: str) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["farthing", *arguments, "--json"])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        assert isinstance(left.value.code, int)
        found = json.loads(said.out)
        assert "error" not in found, found
        return left.value.code, found

    return call


def billed(stage: Stage, *, known_to: set[str] | None = None) -> tuple[Counter[Any], int]:
    """The bill's tokens by model, bucket and price, and its sum: of all of it, or of these attempts."""
    found: Counter[Any] = Counter()
    total = 0
    for line in read_lines(bill_path(stage.root)):
        if known_to is None or line["attempt"] in known_to:
            total += line["cost_pico"]
            for bucket in BUCKETS:
                found[line["served_model"], bucket, line[f"{bucket}_pico"]] += line[bucket]
    return +found, total


def audited(stage: Stage) -> tuple[Counter[Any], int, set[str]]:
    """The ledger's tokens by model, bucket and price, its cost, and which attempts that is known of."""
    found: Counter[Any] = Counter()
    with psycopg.connect(stage.database_url, options="-c search_path=farthing") as connection:
        rows = connection.execute(
            "SELECT p.model, a.hit, a.miss, a.output, p.hit_pico, p.miss_pico, p.output_pico, a.cost_pico,"
            " concat_ws('.', a.run_id, a.document_no, a.attempt_no)"
            " FROM attempt a LEFT JOIN price p ON p.name = a.price WHERE a.billing = 'known'"
        ).fetchall()
    for model, *figures in rows:
        if model is not None:
            for bucket, tokens, price in zip(BUCKETS, figures[:3], figures[3:6], strict=True):
                found[model, bucket, price] += tokens
    return +found, sum(int(row[7]) for row in rows), {row[8] for row in rows}


def play(stage: Stage) -> int:
    """One run, killed with requests in flight, replies on their way, and replies on no record; how often it was."""
    stage.scene()
    stage.plan_mishaps(*MISHAPS)
    codes = [stage.run(failpoint=point) for point in ("send.after:15", "record.before_commit:3")]
    stage.resume()
    return codes.count(KILLED)


@pytest.mark.parametrize(
    "by_request",
    [
        pytest.param(False, id="the account's user_id", marks=pytest.mark.long),
        pytest.param(True, id="requests' user_id"),
    ],
)
def test_after_every_fault_an_export_leaves_nothing_unknown_and_nothing_off(
    by_request: bool, stage: Stage, farthing: Any, tally: Tally
) -> None:
    killed = play(stage)
    assert killed > 0
    assert stage.violations() == [], stage.told()
    lines, cost, attempts = audited(stage)
    assert (lines, cost) == billed(stage, known_to=attempts)
    _, before = farthing("audit", str(stage.run_id))
    assert before["cost_pico"] == cost
    assert before["unknown_attempts"] > 3
    export = stage.root / "usage_data_2026-09.zip"
    export.write_bytes(export_month(bill_path(stage.root), "2026-09", by_request=by_request))
    rows = stage.snapshot()
    known = ["--complete", *([] if by_request else ["--alone"])]  # the bill is at rest, and the sandbox ours

    code, found = farthing("reconcile", str(stage.run_id), str(export), *known)
    assert (code, found["closed"]["attempts"], found["closable"]["attempts"]) == (0, 0, before["unknown_attempts"])
    assert stage.snapshot() == rows
    code, found = farthing("reconcile", str(stage.run_id), str(export), "--complete")
    assert (found["closable"]["attempts"] > 0) is by_request
    code, found = farthing("reconcile", "colours", str(export), "--close", "--yes", *known)
    assert (code, found["closed"]["attempts"], found["off_pico"]) == (0, before["unknown_attempts"], 0)
    assert {line["status"] for line in found["lines"]} == {"matched"}
    assert found["by_user_id"] is by_request

    total = billed(stage)
    assert audited(stage)[:2] == total
    _, after = farthing("audit", str(stage.run_id))
    assert (after["cost_pico"], after["unknown_pico"], after["unknown_attempts"]) == (total[1], 0, 0)
    buckets = {name: pico for name, pico in after["token_costs"].items() if name.endswith("_pico")}
    assert after["cost_pico"] == sum(buckets.values())
    assert [str(each) for each in check(stage.database_url, bill_path(stage.root)) if each.invariant != "I9"] == []
    assert stage.violations(rows) == []
    assert farthing("verify", str(stage.run_id))[1]["proved"]
    code, again = farthing("reconcile", "2026-09", str(export), "--close", "--yes", *known)
    assert (code, again["closed"]["attempts"], again["unknown_attempts"]) == (0, 0, 0)
    assert farthing("close", "2026-09", "--currency", "usd")[1]["cost_pico"] == total[1]
    assert farthing("verify", "2026-09", "--currency", "USD")[1]["proved"]
    tally.count("killed at a failpoint", killed)
