"""The command line as a person or a script meets it: exit code, stdout and stderr.

No network; and no servers but where it takes a ledger and a bill to show that nothing is on them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from farthing import PRICED, _sandbox_clock, main
from sandbox import service
from sandbox.bill import bill_path, read_lines
from schemas.settings import Settings

ROOT = Path(__file__).parents[2]
SECRET = "hunter2-not-to-be-shown"


@dataclass(frozen=True)
class Left:
    """What a command left behind."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout."""
        return json.loads(self.stdout)


class Terminal:
    """Runs farthing's `main` in a folder of its own, with an environment that knows no database and no key."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._monkeypatch, self._capsys = folder, monkeypatch, capsys
        for name in [name for name in os.environ if name.startswith(("FARTHING_", "DEEPSEEK_"))]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("FARTHING_HOME", str(folder / "home"))
        monkeypatch.chdir(folder)

    def __call__(self, *arguments: str, **environment: str) -> Left:
        with self._monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["farthing", *arguments])
            for name, value in environment.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as left:
                main()
        assert isinstance(left.value.code, int)
        return Left(left.value.code, *self._capsys.readouterr())


@pytest.fixture
def farthing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(tmp_path, monkeypatch, capsys)


@pytest.fixture
def tickets(farthing: Terminal) -> Path:
    """A job from `farthing new` with documents that fit it; returns its folder."""
    assert farthing("new", "tickets").exit_code == 0
    table = pa.table({"id": ["a", "b", "c"], "text": ["Where is it?", "It broke.", "Thank you!"]})
    (farthing.folder / "data/tickets").mkdir(parents=True)
    pq.write_table(table, farthing.folder / "data/tickets/1.parquet")
    return farthing.folder / "jobs/tickets"


def test_help_names_every_command(farthing: Terminal) -> None:
    left = farthing("--help")
    assert left.exit_code == 0
    for command in ("demo", "run", "estimate", "audit", "status", "verify", "prices", "sandbox", "db", "new"):
        assert f"\n  {command} " in left.stdout


def test_help_imports_nothing_heavy() -> None:
    heavy = ("prefect", "sqlalchemy", "pyarrow", "openai", "rich", "pydantic", "asyncio")
    script = (
        "import atexit, sys, farthing\n"
        f"atexit.register(lambda: print([name for name in {heavy!r} if name in sys.modules]))\n"
        "sys.argv = ['farthing', '--help']\nfarthing.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_says_what_a_budget_without_a_currency_means(farthing: Terminal) -> None:
    words = " ".join(farthing("run", "--help").stdout.split())
    assert "a bare number is USD" in words


def test_version_is_the_package_s(farthing: Terminal) -> None:
    left = farthing("--version")
    assert (left.exit_code, left.stdout) == (0, "farthing 0.1.0\n")


@pytest.mark.parametrize(
    ("at", "model", "expected"),
    [
        # A Wednesday, in and out of the window 01:00 to 04:00 UTC, whose first instant is peak and whose last is not.
        ("2026-11-25T02:00:00Z", "deepseek-flash", ("peak", 6_000, 300_000, 1_200_000)),
        ("2026-11-25T01:00:00Z", "deepseek-flash", ("peak", 6_000, 300_000, 1_200_000)),
        ("2026-11-25T09:00:00+08:00", "deepseek-flash", ("peak", 6_000, 300_000, 1_200_000)),
        ("2026-11-25T04:00:00Z", "deepseek-flash", ("off_peak", 3_000, 150_000, 600_000)),
        ("2026-11-28T02:00:00Z", "deepseek-flash", ("off_peak", 3_000, 150_000, 600_000)),  # a Saturday
        ("2026-11-25T02:00:00Z", "deepseek-v4-pro", ("peak", 44_000, 1_320_000, 3_960_000)),
        ("2026-05-01T02:00:00Z", "deepseek-v4-flash", ("flat", 2_800, 140_000, 280_000)),
    ],
)
def test_prices_are_exact_at_an_instant(
    farthing: Terminal, at: str, model: str, expected: tuple[str, int, int, int]
) -> None:
    left = farthing("prices", "--at", at, "--model", model, "--currency", "USD", "--json")
    assert left.exit_code == 0
    (price,) = left.json["prices"]
    assert (price["band"], price["hit_pico"], price["miss_pico"], price["output_pico"]) == expected
    assert price["currency"] == "USD"


def test_prices_are_shown_per_million_tokens_with_the_next_peak(farthing: Terminal) -> None:
    left = farthing("prices", "--at", "2026-11-25T05:00:00Z", "--currency", "usd")
    assert "$0.150" in left.stdout
    assert "next peak hours Wed 2026-11-25 06:00 until 10:00 UTC" in left.stdout
    assert "claude" not in left.stdout


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("--at", "2026-11-25T02:00:00"), "write 2026-11-25T02:00:00Z for UTC"),
        (("--at", "noon"), "is not a time"),
        (("--model", "gpt-9"), "no price for model 'gpt-9'"),
        (("--at", "1999-01-01T00:00:00Z"), "the first one is from 20"),
        (("--at", "2099-01-01T00:00:00Z"), "not known yet"),
        (("--model", "deepseek-flash", "--at", "2020-01-01T00:00:00Z"), "its first row is from"),
        (("--currency", "EUR"), "USD or CNY"),
    ],
)
def test_a_price_that_is_not_known_is_refused(farthing: Terminal, arguments: tuple[str, ...], advice: str) -> None:
    left = farthing("prices", *arguments)
    assert left.exit_code == 2
    assert advice in left.stderr
    assert left.stderr.startswith("error: ")
    assert left.stdout == ""


def test_a_new_job_is_valid_and_says_what_to_do(farthing: Terminal, tickets: Path) -> None:
    assert sorted(path.name for path in tickets.iterdir()) == ["answer.py", "job.yaml", "prompt.md"]
    left = farthing("estimate", "tickets", "--json")
    assert left.exit_code == 0
    assert left.json["documents"] == 3
    assert 0 < left.json["low_pico"] <= left.json["cost_pico"] <= left.json["high_pico"]


def test_a_new_job_overwrites_nothing(farthing: Terminal, tickets: Path) -> None:
    before = (tickets / "job.yaml").read_text()
    left = farthing("new", "tickets", "--json")
    assert (left.exit_code, left.json["exit_code"]) == (2, 2)
    assert (tickets / "job.yaml").read_text() == before


def test_a_bad_job_is_refused_with_every_problem_on_its_line(farthing: Terminal, tickets: Path) -> None:
    text = (tickets / "job.yaml").read_text()
    text = text.replace("budget: 1 USD ", "budget: lots ").replace("  id: id ", "  idd: id ")
    (tickets / "job.yaml").write_text(text)
    lines = text.splitlines()
    left = farthing("run", "tickets")
    assert left.exit_code == 2
    for broken in ("  idd: id", "budget: lots"):
        number = 1 + next(index for index, line in enumerate(lines) if line.startswith(broken))
        assert f"jobs/tickets/job.yaml:{number}: " in left.stderr
    assert "Traceback" not in left.stderr


def test_an_unknown_job_is_refused_with_the_nearest(farthing: Terminal, tickets: Path) -> None:
    left = farthing("run", "tickts", "--json")
    assert left.exit_code == 2
    assert "did you mean tickets?" in left.json["error"]


def test_a_missing_key_is_one_message(farthing: Terminal, tickets: Path) -> None:
    left = farthing("run", "tickets", FARTHING_DATABASE_URL=f"postgresql://u:{SECRET}@127.0.0.1:1/x")
    assert left.exit_code == 2
    assert [line for line in left.stderr.splitlines() if line.startswith("error: ")] == [
        "error: no API key: set DEEPSEEK_API_KEY, or use --sandbox for an emulated DeepSeek that costs nothing"
    ]
    assert SECRET not in left.stderr


def test_a_missing_database_is_one_message(farthing: Terminal, tickets: Path) -> None:
    left = farthing("run", "tickets", DEEPSEEK_API_KEY=SECRET)
    assert left.exit_code == 2
    assert "set FARTHING_DATABASE_URL" in left.stderr
    assert left.stderr.count("error: ") == 1
    assert SECRET not in left.stderr


def test_a_database_that_is_not_there_is_one_message(farthing: Terminal, tickets: Path) -> None:
    url = f"postgresql://u:{SECRET}@127.0.0.1:1/x"
    for command in (("run", "tickets"), ("audit",), ("verify", "1"), ("db", "upgrade")):
        left = farthing(*command, "--json", FARTHING_DATABASE_URL=url, DEEPSEEK_API_KEY=SECRET)
        assert (command, left.exit_code) == (command, 2)
        assert "cannot be reached" in left.json["error"]
        assert SECRET not in left.stderr + left.stdout


def test_a_model_without_a_price_is_refused(farthing: Terminal, tickets: Path) -> None:
    text = (tickets / "job.yaml").read_text()
    (tickets / "job.yaml").write_text(text + "tiers: {pro: {model: deepseek-v9}}\n")
    url = "postgresql://u@127.0.0.1:1/x"
    left = farthing("run", "tickets", FARTHING_DATABASE_URL=url, DEEPSEEK_API_KEY=SECRET)
    assert left.exit_code == 2
    assert "no price for model 'deepseek-v9'" in left.stderr
    assert f"job.yaml:{len(text.splitlines()) + 1}: pro: " in left.stderr


def test_a_missing_column_is_refused(farthing: Terminal, tickets: Path) -> None:
    text = (tickets / "job.yaml").read_text()
    (tickets / "job.yaml").write_text(text.replace("  text: text ", "  text: body "))
    left = farthing("estimate", "tickets")
    assert left.exit_code == 2
    assert "body" in left.stderr


#: What is wrong: a text of the job file, what stands there instead, the setting left out, what the error names.
REFUSED = {
    "a bad job": ("budget: 1 USD ", "budget: lots ", None, "budget"),
    "a missing column": ("  text: text ", "  text: body ", None, "body"),
    "a model without a price": ("name: ", "tiers: {pro: {model: deepseek-v9}}\nname: ", None, "deepseek-v9"),
    "a missing key": ("", "", "DEEPSEEK_API_KEY", "set DEEPSEEK_API_KEY"),
}


@pytest.fixture
def emulator(tmp_path: Path) -> Iterator[service.Endpoint]:
    with service.running(tmp_path / "provider", time_scale=0) as endpoint:
        yield endpoint


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_is_refused_has_made_no_run_no_attempt_and_no_bill(
    wrong: str, farthing: Terminal, tickets: Path, ledger_url: str, emulator: service.Endpoint
) -> None:
    before, after, unset, named = REFUSED[wrong]
    text = (tickets / "job.yaml").read_text()
    assert before in text
    (tickets / "job.yaml").write_text(text.replace(before, after, 1))
    environment = {
        "FARTHING_DATABASE_URL": ledger_url,
        "DEEPSEEK_BASE_URL": emulator.url,
        "DEEPSEEK_API_KEY": emulator.api_key,
    }
    left = farthing("run", "tickets", **{name: value for name, value in environment.items() if name != unset})
    assert left.exit_code == 2, left.stderr
    assert named in left.stderr
    with psycopg.connect(ledger_url, options="-c search_path=farthing") as ledger:
        assert ledger.execute("SELECT run_id FROM run").fetchall() == []
        assert ledger.execute("SELECT run_id FROM attempt_intent").fetchall() == []
    assert list(read_lines(bill_path(farthing.folder / "provider"))) == []


@pytest.mark.parametrize("command", [("audit",), ("status", "tickets"), ("verify",), ("db", "status")])
def test_reading_without_any_ledger_says_how_to_get_one(farthing: Terminal, command: tuple[str, ...]) -> None:
    left = farthing(*command)
    assert left.exit_code == 2
    assert "run `farthing demo` first" in left.stderr
    assert not (farthing.folder / "home").exists()


def test_wrong_usage_is_an_object_too(farthing: Terminal) -> None:
    left = farthing("run", "tickets", "--limit", "0", "--json")
    assert left.exit_code == 2
    assert "--limit" in left.json["error"]


def test_a_wrong_setting_is_named_without_its_value(farthing: Terminal) -> None:
    left = farthing("audit", FARTHING_TIME_SCALE=SECRET)
    assert left.exit_code == 2
    assert "FARTHING_TIME_SCALE" in left.stderr
    assert SECRET not in left.stderr


def test_an_unused_sandbox_has_billed_nothing(farthing: Terminal) -> None:
    left = farthing("sandbox", "bill", "--json")
    assert left.json == {"attempts": 0, "cost_pico": 0, "currency": "USD"}


def test_a_reset_asks_first(farthing: Terminal) -> None:
    left = farthing("sandbox", "reset")
    assert left.exit_code == 2
    assert "--yes" in left.stderr


def test_after_the_last_known_calendar_the_sandbox_goes_on_at_an_instant_that_has_a_price(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A simulated run must not stop because nobody has published next year's Chinese holidays yet."""
    monkeypatch.setattr("tasks.completions.utc_now", lambda: datetime(2031, 5, 4, tzinfo=UTC))
    assert _sandbox_clock(Settings()) == PRICED
    assert "no price yet" in capsys.readouterr().err
    monkeypatch.setattr("tasks.completions.utc_now", lambda: datetime(2026, 11, 24, tzinfo=UTC))
    assert _sandbox_clock(Settings()) is None
    assert _sandbox_clock(Settings(sandbox_clock=datetime(2026, 11, 25, 2, tzinfo=UTC))).hour == 2
