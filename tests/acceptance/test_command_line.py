"""The command line as a person or a script meets it: exit code, stdout and stderr.

No network; and no servers but where it takes a ledger and a bill to show that nothing is on them.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import make_url

from farthing import PRICED, _sandbox_clock, _stdout_kept, main
from sandbox import service
from sandbox.bill import bill_path, read_lines
from schemas.estimates import History, PastRun, PastTier
from schemas.settings import Settings
from tasks import backfills
from tasks.ledger import runs
from tasks.ledger.backfills import Evidence
from tests.ledgers import RESERVED, lane_ledger, opening, run_everything

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
    told = set(re.findall(r"^  ([a-z]+)  ", left.stdout, flags=re.MULTILINE))
    reading = {"estimate", "calibrate", "compare", "audit", "whatif", "status", "verify", "prices"}
    books = {"reconcile", "close"}
    assert told == {"demo", "run", "backfill", "pause", "limit", "budget", *reading, *books, "sandbox", "db", "new"}


@pytest.mark.parametrize(
    ("arguments", "exit_code", "heavy"),
    [
        (("--help",), 0, ("prefect", "sqlalchemy", "pyarrow", "openai", "rich", "pydantic", "asyncio")),
        (("audit", "1"), 2, ("prefect", "pyarrow", "openai", "tasks.ledger.proof", "schemas.estimates")),
    ],
)
def test_a_command_imports_nothing_heavy_that_it_does_not_use(
    arguments: tuple[str, ...], exit_code: int, heavy: tuple[str, ...]
) -> None:
    script = (
        "import atexit, sys, farthing\n"
        f"atexit.register(lambda: print([name for name in {heavy!r} if name in sys.modules]))\n"
        f"sys.argv = ['farthing', *{arguments!r}]\nfarthing.main()"
    )
    nowhere = os.environ | {"FARTHING_DATABASE_URL": "postgresql://u@127.0.0.1:1/x"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=nowhere, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == exit_code
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_engines_and_their_processes_print_while_a_run_lasts_is_not_on_stdout(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """acceptance/test_engines.py has real ones, that are long in coming."""
    with _stdout_kept():
        print("here")
        subprocess.run([sys.executable, "-c", "print('there')"], check=True)
    print("the outcome")
    told = capfd.readouterr()
    assert (told.out, sorted(told.err.split())) == ("the outcome\n", ["here", "there"])


KEPT = """
import sys
from farthing import _stdout_kept, print_json
early = sys.stdout
with _stdout_kept():
    if early is not None:
        early.write("late\\n")
    print("here")
print_json({"said": 1})
"""


@pytest.mark.parametrize(("shell", "out", "err"), [("", '{"said": 1}\n', "here late"), (" >&-", "", "here")])
def test_stdout_is_kept_from_those_who_hold_it_and_may_be_closed(shell: str, out: str, err: str) -> None:
    command = ["sh", "-c", f'exec "$0" -c "$1"{shell}', sys.executable, KEPT]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, cwd=ROOT, env=buffered, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, " ".join(sorted(done.stderr.split()))) == (0, out, err)


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
    assert "no price is known from Thu 2026-12-31 16:00 UTC" in left.stdout
    assert "no price is known" not in farthing("prices", "--at", "2026-09-25T05:00:00Z").stdout
    assert "claude" not in left.stdout


def test_ctrl_c_before_anything_was_begun_is_told(farthing: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("schemas.pricing.load_price_book", lambda *_: signal.raise_signal(signal.SIGINT))
    left = farthing("prices")
    assert (left.exit_code, left.stderr.splitlines()[-1]) == (130, "error: interrupted before anything was begun")


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("--at", "2026-11-25T02:00:00"), "write 2026-11-25T02:00:00Z for UTC"),
        (("--at", "noon"), "is not a time"),
        (("--at", "2026-11-25"), "write 2026-11-25T00:00Z for UTC"),
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


def test_the_price_book_is_held_against_a_public_map(farthing: Terminal) -> None:
    entry = {"litellm_provider": "deepseek", "cache_read_input_token_cost": 3e-9, "output_cost_per_token": 6e-7}
    (farthing.folder / "map.json").write_text(
        json.dumps({"deepseek/deepseek-flash": entry | {"input_cost_per_token": 1.5e-7}})
    )
    check = ("prices", "check", "map.json", "--at", "2026-11-25T05:00:00Z")
    left = farthing(*check, "--json")
    assert (left.exit_code, left.json["agrees"]) == (0, True)
    (farthing.folder / "map.json").write_text(
        json.dumps({"deepseek/deepseek-flash": entry | {"input_cost_per_token": 1.4e-7}})
    )
    left = farthing(*check, "--json")
    assert (left.exit_code, left.json["agrees"]) == (1, False)
    (difference,) = left.json["maps"][0]["differences"]
    assert difference["since"] == "2026-09-10T04:00:00+00:00"
    assert (difference["ours"]["miss_pico"], difference["theirs"]["miss_pico"]) == ("150000", "140000")
    left = farthing(*check)
    assert left.exit_code == 1
    assert "0.003 / 0.14 / 0.6" in left.stdout
    assert "add a [[row]]" in " ".join(left.stdout.split())
    assert farthing("prices", "check", "none.json").exit_code == 2
    left = farthing(*check, "--since", "2026-11-26")
    assert (left.exit_code, left.stderr) == (2, "error: --since 2026-11-26 is after --at 2026-11-25 05:00 UTC\n")
    (farthing.folder / "map.json").write_text(
        json.dumps({"deepseek/deepseek-old": entry | {"input_cost_per_token": 1}})
    )
    left = farthing(*check, "--json")
    assert left.exit_code == 2
    assert left.json["error"] == "map.json: no model of the price book is in there: nothing was compared"


def test_after_the_calendar_s_end_a_run_is_refused_with_what_to_update(farthing: Terminal, tickets: Path) -> None:
    """Before a key or a ledger is used: nothing is there to use."""
    url = "postgresql://u@127.0.0.1:1/x"
    later = {
        "FARTHING_SANDBOX": "1",
        "FARTHING_SANDBOX_CLOCK": "2027-01-05T02:00:00Z",
        "DEEPSEEK_BASE_URL": "http://127.0.0.1:1",
    }
    left = farthing("run", "tickets", FARTHING_DATABASE_URL=url, DEEPSEEK_API_KEY=SECRET, **later)
    assert left.exit_code == 2
    words = " ".join(left.stderr.split())
    assert "2027" in words
    assert "pip install --upgrade chinesecalendar" in words
    assert "price file of your own" in words


def test_a_new_job_is_valid_and_says_what_to_do(farthing: Terminal, tickets: Path) -> None:
    assert sorted(path.name for path in tickets.iterdir()) == ["answer.py", "job.yaml", "prompt.md"]
    left = farthing("estimate", "tickets", "--json")
    assert left.exit_code == 0
    assert left.json["documents"] == 3
    assert 0 < left.json["low_pico"] <= left.json["cost_pico"] <= left.json["high_pico"]


def test_a_sample_is_not_sent_before_somebody_agreed_to_its_price(
    farthing: Terminal, tickets: Path, ledger_url: str
) -> None:
    """The address of the model leads nowhere: a request would be another error."""
    nowhere = {"DEEPSEEK_API_KEY": SECRET, "DEEPSEEK_BASE_URL": "http://127.0.0.1:1"}
    for option in (("--sample",), ("--sample", "50")):
        left = farthing("estimate", "tickets", *option, FARTHING_DATABASE_URL=ledger_url, **nowhere)
        assert left.exit_code == 2
        assert "3 documents will be asked, $0." in left.stderr
        assert "say --yes" in left.stderr
    assert "--sample: " in farthing("estimate", "tickets", "--sample", "5").stderr
    left = farthing("estimate", "tickets", "--budget", "5 USD")
    assert (left.exit_code, left.stdout) == (2, "")
    assert "nothing is sent without --sample" in left.stderr


def test_a_pilot_is_not_sent_before_somebody_agreed_to_its_price(
    farthing: Terminal, tickets: Path, ledger_url: str
) -> None:
    nowhere = {"DEEPSEEK_API_KEY": SECRET, "DEEPSEEK_BASE_URL": "http://127.0.0.1:1"}
    left = farthing("calibrate", "tickets", FARTHING_DATABASE_URL=ledger_url, **nowhere)
    assert left.exit_code == 2
    assert "3 documents will be asked, $0." in left.stderr
    assert "say --yes" in left.stderr
    left = farthing("calibrate", "tickets", "--target", "95 %", FARTHING_DATABASE_URL=ledger_url, **nowhere)
    assert (left.exit_code, "--target, --delta: " in left.stderr) == (2, True)
    job = tickets / "job.yaml"
    job.write_text(job.read_text().replace("[flash, pro]", "[flash]").replace(", pro: {max_tokens: 256}", ""))
    left = farthing("calibrate", "tickets", FARTHING_DATABASE_URL=ledger_url, **nowhere)
    assert (left.exit_code, "a pilot compares two" in left.stderr) == (2, True)


def test_the_sandbox_s_runs_give_a_real_estimate_no_interval(
    farthing: Terminal, tickets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    past = PastRun(500, (PastTier("flash", 500, 500_000, 50_000, 5_000),), 1.0)
    monkeypatch.setattr("farthing._has_sandbox_ledger", lambda _: True)
    monkeypatch.setattr("farthing._ask", lambda *_: History((past,), is_simulated=True))
    assert farthing("estimate", "tickets", "--json").json["level"] is None
    assert "no interval" in farthing("estimate", "tickets").stdout
    assert farthing("estimate", "tickets", "--sandbox", "--json").json["level"] == 90


def test_the_sandbox_s_runs_stand_in_where_a_real_backfill_is_only_listed(
    farthing: Terminal, tickets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    past = PastRun(500, (PastTier("flash", 500, 500_000, 50_000, 5_000),), 1.0)
    known = History((past,), is_simulated=True)
    monkeypatch.setattr(backfills, "find_history", _always(known))
    monkeypatch.setattr(backfills.backfills, "find_evidence", _always(Evidence({}, {})))
    monkeypatch.setattr(backfills.backfills, "find_unfinished", _always(None))
    monkeypatch.setattr("farthing._has_sandbox_ledger", lambda _: True)
    monkeypatch.setattr("farthing._ask", lambda plan, *_, **__: asyncio.run(plan(object())))
    for where, level in (((), None), (("--sandbox",), 90)):
        assert farthing("backfill", "tickets", "--list", "--json", *where).json["level"] == level


def _always(found: object) -> Callable[..., Any]:
    async def find(*_: object, **__: object) -> object:
        return found

    return find


def test_a_sample_does_not_change_a_budget_that_others_share(
    farthing: Terminal, tickets: Path, ledger_url: str
) -> None:
    job = tickets / "job.yaml"
    job.write_text(re.sub("^budget: .*", "budget: {name: team, cap: 9 USD}", job.read_text(), flags=re.MULTILINE))
    nowhere = {
        "FARTHING_DATABASE_URL": ledger_url,
        "DEEPSEEK_API_KEY": SECRET,
        "DEEPSEEK_BASE_URL": "http://127.0.0.1:1",
    }
    left = farthing("estimate", "tickets", "--sample", "--budget", "1 USD", "--yes", **nowhere)
    assert left.exit_code == 2
    assert "--budget would change team for every job that shares it: leave it out" in left.stderr
    left = farthing("estimate", "tickets", "--sample", **nowhere)
    assert "no more than team, the budget that this job shares, has left" in left.stderr


def test_a_sample_that_is_not_the_one_that_was_drawn_says_nothing(
    steer: Callable[..., Left], tickets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run 1 is of other documents: as if those had changed while somebody was asked whether to."""
    monkeypatch.setattr("farthing._ask_sample", lambda *_: 1)
    monkeypatch.setenv("DEEPSEEK_API_KEY", SECRET)
    left = steer("estimate", "tickets", "--sample", "--yes", "--json")
    assert left.exit_code == 3
    assert "changed meanwhile: run 1 asked other documents" in left.json["error"]


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
    (tickets / "job.yaml").write_text(text.replace("pro: {max_tokens", "pro: {model: deepseek-v9, max_tokens"))
    url = "postgresql://u@127.0.0.1:1/x"
    left = farthing("run", "tickets", FARTHING_DATABASE_URL=url, DEEPSEEK_API_KEY=SECRET)
    assert left.exit_code == 2
    assert "no price for model 'deepseek-v9'" in left.stderr
    assert f"job.yaml:{text.partition('tiers:')[0].count(chr(10)) + 1}: pro: " in left.stderr


def test_a_real_run_says_when_the_holiday_calendar_will_have_ended(
    farthing: Terminal, tickets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.report.WARNED_BEFORE", timedelta(days=500))
    at = {"FARTHING_DATABASE_URL": "postgresql://u@127.0.0.1:1/x", "DEEPSEEK_API_KEY": SECRET}
    left = farthing("run", "tickets", **at)
    assert "cannot be reached" in left.stderr
    assert "write a [[calendar]]" in left.stderr


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
    "a model without a price": ("pro: {max_tokens", "pro: {model: deepseek-v9, max_tokens", None, "deepseek-v9"),
    "a missing key": ("", "", "DEEPSEEK_API_KEY", "set DEEPSEEK_API_KEY"),
}


@pytest.fixture
def emulator(tmp_path: Path) -> Iterator[service.Endpoint]:
    with service.running(tmp_path / "provider", time_scale=0) as endpoint:
        yield endpoint


@pytest.fixture
def addresses(ledger_url: str, emulator: service.Endpoint) -> dict[str, str]:
    """A ledger and a provider, as variables."""
    return {
        "FARTHING_DATABASE_URL": ledger_url,
        "DEEPSEEK_BASE_URL": emulator.url,
        "DEEPSEEK_API_KEY": emulator.api_key,
    }


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_is_refused_has_made_no_run_no_attempt_and_no_bill(
    wrong: str, farthing: Terminal, tickets: Path, ledger_url: str, addresses: dict[str, str]
) -> None:
    before, after, unset, named = REFUSED[wrong]
    text = (tickets / "job.yaml").read_text()
    assert before in text
    (tickets / "job.yaml").write_text(text.replace(before, after, 1))
    left = farthing("run", "tickets", **{name: value for name, value in addresses.items() if name != unset})
    assert left.exit_code == 2, left.stderr
    assert named in left.stderr
    with psycopg.connect(ledger_url, options="-c search_path=farthing") as ledger:
        assert ledger.execute("SELECT run_id FROM run").fetchall() == []
        assert ledger.execute("SELECT run_id FROM attempt_intent").fetchall() == []
    assert list(read_lines(bill_path(farthing.folder / "provider"))) == []


def test_a_backfill_lists_what_is_due_and_starts_nothing_where_nobody_is_there_to_ask(
    farthing: Terminal, tickets: Path, ledger_url: str, addresses: dict[str, str]
) -> None:
    listed = farthing("backfill", "tickets", "--list", "--json").json["partitions"]
    assert [(each["partition"], each["state"]) for each in listed] == [("data/tickets/1.parquet", "never run")]
    left = farthing("backfill", "tickets", "--json", **addresses)
    assert left.exit_code == 2
    assert "say --yes if you mean it" in left.json["error"]
    with psycopg.connect(ledger_url, options="-c search_path=farthing") as ledger:
        assert ledger.execute("SELECT backfill_id FROM backfill").fetchall() == []


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


@pytest.fixture
def steer(farthing: Terminal, ledger_url: str) -> Callable[..., Left]:
    """A terminal beside a ledger where run 1 is done, and run 2 of the same job is running, with nobody at work."""

    async def make() -> None:
        async with lane_ledger(ledger_url) as ledger:
            await run_everything(ledger)
            await runs.open_run(ledger, opening())

    asyncio.run(make())
    return lambda *arguments: farthing(*arguments, FARTHING_DATABASE_URL=ledger_url)


@pytest.mark.parametrize("target", [(), ("2",), ("colours",)])
def test_a_pause_says_what_happens_and_how_the_run_goes_on(steer: Callable[..., Left], target: tuple[str]) -> None:
    left = steer("pause", *target)
    assert (left.exit_code, left.stdout) == (
        0,
        "run 2 is paused: no lane was at work\n`farthing run colours` goes on\n",
    )
    again = steer("pause", "2")
    assert (again.exit_code, again.stdout) == (
        0,
        "run 2 is paused already (operator); `farthing run colours` goes on\n",
    )
    status = steer("status", "2", "--json").json
    assert (status["state"], status["reason"]) == ("paused", "operator")


def test_a_pause_is_one_object_for_scripts(steer: Callable[..., Left]) -> None:
    left = steer("pause", "--json")
    assert left.json == {
        "changed": True,
        "run": 2,
        "job": "colours",
        "state": "paused",
        "reason": "operator",
        "lanes": 0,
        "in_flight": 0,
    }
    assert steer("pause", "2", "--json").json["changed"] is False


def test_a_limit_is_shown_kept_and_lifted(steer: Callable[..., Left]) -> None:
    left = steer("limit", "2", "flash=3")
    assert left.exit_code == 0
    assert left.stdout.splitlines()[0] == (
        "run 2 may have in flight, over all its lanes: at most 3 flash, 8 pro, was 8 flash, 8 pro"
    )
    shown = " ".join(steer("status", "2").stdout.split())
    assert "0 in 0 lane(s), at most 3 flash, 8 pro, set by `farthing limit` (the job: 8 flash, 8 pro)" in shown
    assert "limit changed now 3 flash, 8 pro, was 8 flash, 8 pro" in shown
    again = steer("limit", "colours", "4", "--json").json
    assert (again["changed"], again["ceilings"], again["was"]) == (
        True,
        {"flash": 4, "pro": 4},
        {"flash": 3, "pro": 8},
    )
    status = steer("status", "2", "--json").json
    assert (status["ceilings"], status["concurrency"]) == ({"flash": 4, "pro": 4}, {"flash": 8, "pro": 8})
    lifted = steer("limit", "2", "--reset")
    assert lifted.stdout == (
        "run 2 may have in flight, over all its lanes: at most 8 flash, 8 pro, was 4 flash, 4 pro\n"
    )
    assert "set by" not in steer("status", "2").stdout


def test_a_budget_is_changed_and_says_how_it_stands(steer: Callable[..., Left]) -> None:
    left = steer("budget", "2", "2.5 USD")
    assert (left.exit_code, left.stdout) == (
        0,
        "run 2: the budget is $2.50, was $1.00; $0.00 spent, $0.00 held for what is in flight\n",
    )
    found = steer("budget", "2", "3", "--json").json
    assert (found["changed"], found["budget_pico"], found["was_pico"], found["currency"], found["spent_pico"]) == (
        True,
        3 * 10**12,
        25 * 10**11,
        "USD",
        0,
    )
    assert steer("status", "2", "--json").json["budget_pico"] == 3 * 10**12


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("pause", "1"), "run 1 of colours is done: there is nothing to pause"),
        (("limit", "1", "4"), "run 1 of colours is done: nothing of it will be in flight again"),
        (("budget", "1", "4"), "run 1 of colours is done: it will spend nothing more"),
        (("pause", "9"), "there is no run 9 in this ledger; jobs it knows: colours"),
        (("pause", "sizes"), "there is no run that is running"),
        (("limit", "2"), "like `farthing limit 2 16` or flash=64 pro=8, or else --reset"),
        (("limit", "2", "4", "--reset"), "or else --reset"),
        (("limit", "2", "0"), "limit: 0 requests in flight are too few; write 1 to 5000"),
        (("limit", "2", "prof=4"), "limit: 'prof' is not in the run's ladder, which is flash, pro"),
        (("budget", "2", "30 CNY"), "sums are never converted: write one like `25 USD`"),
        (("budget", "2", "lots"), "budget: 'lots' is not a sum of money"),
        (("budget", "2"), "SUM"),
    ],
)
def test_an_order_that_cannot_be_carried_out_is_one_line_and_changes_nothing(
    steer: Callable[..., Left], ledger_url: str, arguments: tuple[str, ...], advice: str
) -> None:
    def rows() -> list[tuple[Any, ...]]:
        with psycopg.connect(ledger_url, options="-c search_path=farthing") as ledger:
            query = (
                "SELECT state, limits, cap, (SELECT count(*) FROM run_event) FROM run JOIN budget USING (budget_id)"
            )
            return ledger.execute(query).fetchall()

    before = rows()
    left = steer(*arguments)
    assert (left.exit_code, left.stdout) == (2, "")
    assert [line for line in left.stderr.splitlines() if line.startswith("error: ")] == left.stderr.splitlines()
    assert len(left.stderr.splitlines()) == 1
    assert advice in left.stderr
    assert rows() == before


@pytest.mark.parametrize("command", [("pause",), ("limit", "1", "4"), ("budget", "1", "4 USD")])
def test_steering_without_any_ledger_says_how_to_get_one(farthing: Terminal, command: tuple[str, ...]) -> None:
    for sandbox in ((), ("--sandbox",)):
        left = farthing(*command, *sandbox)
        assert left.exit_code == 2
        assert "run `farthing demo` first" in left.stderr


def test_whoever_may_only_audit_cannot_steer_and_is_told_what_it_takes(
    steer: Callable[..., Left], farthing: Terminal, ledger_url: str
) -> None:
    name = f"finance_{uuid.uuid4().hex}"
    with psycopg.connect(ledger_url, autocommit=True) as superuser:
        superuser.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{SECRET}'")
        superuser.execute(f"GRANT farthing_auditor TO {name}")
        theirs = make_url(ledger_url).set(username=name, password=SECRET).render_as_string(hide_password=False)
        try:
            assert farthing("status", "2", FARTHING_DATABASE_URL=theirs).exit_code == 0
            left = farthing("pause", "2", FARTHING_DATABASE_URL=theirs)
        finally:
            superuser.execute(f"DROP ROLE {name}")
    assert left.exit_code == 2
    assert "GRANT farthing_lane" in left.stderr
    assert SECRET not in left.stderr
    assert steer("status", "2", "--json").json["state"] == "running"


def test_an_audit_is_split_and_exported_as_asked(steer: Callable[..., Left], farthing: Terminal) -> None:
    left = steer("audit", "1", "--by", "tier", "--by", "purpose", "--csv", "spend.csv", "--json")
    assert (left.exit_code, left.json["by"]) == (0, ["tier", "purpose"])
    assert sum(line["cost_pico"] for line in left.json["lines"]) == left.json["cost_pico"]
    assert {(line["tier"], line["purpose"]) for line in left.json["lines"]} == {
        *(("flash", "answer"), ("flash", "priming"), ("flash", "retry"), ("pro", "answer"))
    }
    assert "spend.csv: 4 lines, by tier, purpose" in left.stderr
    header, *lines = (farthing.folder / "spend.csv").read_text().splitlines()
    assert header.startswith("tier,purpose,currency,attempts,")
    assert len(lines) == 4
    shown = steer("audit", "1", "--by", "hours").stdout
    assert {"off_peak", "not", "all"} <= {line.split()[0] for line in shown.splitlines() if line.strip()}
    assert "Where the money went" not in shown


def test_a_report_page_of_a_job_holds_its_audit_and_its_runs(steer: Callable[..., Left], farthing: Terminal) -> None:
    left = steer("audit", "colours", "--html", "job.html", "--csv", "spend.csv", "--json")
    assert (left.exit_code, left.stderr.splitlines()[-1].partition(":")[0]) == (0, "job.html")
    html = (farthing.folder / "job.html").read_text()
    figures = json.loads(html.partition('id="figures">')[2].partition("</script>")[0])
    of_the_export = {"run_list": None, "by": [], "lines": []}
    assert figures | of_the_export == left.json | of_the_export
    assert (figures["runs"], figures["by"], figures["lines"]) == ([1, 2], [], [])
    assert "<h1><bdi>colours, 2 runs</bdi></h1>" in html
    assert "<caption><span>Runs</span></caption>" in html
    assert steer("audit", "1", "--by", "tier", "--html", "run.html").exit_code == 0
    html = (farthing.folder / "run.html").read_text()
    figures = json.loads(html.partition('id="figures">')[2].partition("</script>")[0])
    assert [line["tier"] for line in figures["lines"]] == ["flash", "pro"]


def test_what_if_begins_with_what_the_audit_says(steer: Callable[..., Left]) -> None:
    cost = steer("audit", "1", "--json").json["cost_pico"]
    usual = steer("whatif", "1", "--json").json
    assert (usual["cost_pico"], usual["unknown_pico"]) == (cost, 2 * RESERVED)
    by_name = {found["name"]: found["cost_pico"] for found in usual["scenarios"]}
    assert by_name["flash alone"] < cost < by_name["pro alone"] < by_name["gpt-5.5 alone"]
    assert by_name["all off-peak"] == cost
    (asked,) = steer("whatif", "1", "--ladder", "flash", "--off-peak", "--json").json["scenarios"]
    assert asked["cost_pico"] == by_name["flash alone"]
    shown = steer("whatif", "1", "--ladder", "gpt-5.5", "--no-cache").stdout
    assert "another tokenizer counts otherwise" in " ".join(shown.split())
    assert steer("whatif", "1", "--threshold", "0.4", "--prices", "2026-05-01", "--json").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("audit", "1", "--by", "colour"), "only by job, run, day, tier, model, purpose, hours"),
        (("audit", "1", "--csv", "nowhere/x.csv"), "nowhere/x.csv cannot be written: No such file"),
        (("audit", "1", "--html", "nowhere/x.html"), "nowhere/x.html cannot be written: No such file"),
        (("audit", "1", "--html", "x.html", "--top", "51"), "--top: a page names at most 50 documents"),
        (("whatif", "1", "--threshold", "lots"), "write a number from 0 to 1"),
        (("whatif", "1", "--threshold", "1.1"), "write a number from 0 to 1"),
        (("whatif", "1", "--ladder", "gpt-9"), "no price for model 'gpt-9'"),
        (("whatif", "1", "--prices", "1999-01-01"), "its first row is from"),
        (("whatif", "1", "--prices", "May"), "is not a time"),
        (("whatif", "1", "--self-hosted", "toaster"), "only self-hosted-flash-2xh100"),
        (("whatif", "9"), "there is no run 9"),
    ],
)
def test_a_question_about_costs_that_has_no_answer_is_one_line(
    steer: Callable[..., Left], arguments: tuple[str, ...], advice: str
) -> None:
    left = steer(*arguments)
    assert (left.exit_code, left.stdout) == (2, "")
    assert len(left.stderr.splitlines()) == 1
    assert advice in left.stderr
