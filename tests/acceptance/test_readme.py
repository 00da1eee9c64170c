"""The README says what is: its commands, keys, settings, exit codes and SQL are those of the code."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest
import yaml
from psycopg.rows import dict_row

import farthing
from schemas import errors
from schemas.errors import UnknownPrice
from schemas.jobfile import JobFile
from schemas.money import Currency
from schemas.pricing import Band, load_price_book
from schemas.settings import Settings
from tasks.job_template import JOB_YAML
from tests.ledgers import lane_ledger, run_everything

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def section(title: str) -> str:
    """The text under a heading, up to the next one of its rank."""
    return re.split(r"^## ", README.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def first_cells(text: str) -> set[str]:
    """What stands in backquotes in the first column of the tables of a text."""
    rows = [re.split(r"(?<!\\)\|", line)[1] for line in text.splitlines() if line.startswith("|")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_every_command_is_in_the_readme_and_every_one_in_it_exists() -> None:
    names = {command.name or command.callback.__name__ for command in farthing.app.registered_commands}  # type: ignore[union-attr]  # they are functions
    groups = {str(group.typer_instance.info.name) for group in farthing.app.registered_groups if group.typer_instance}
    told = {cell.split()[1] for cell in first_cells(section("Commands")) if cell.startswith("farthing ")}
    assert told == names | groups
    assert set(re.findall(r"(?<![/\w])farthing ([a-z]+)", README)) <= names | groups


def test_the_job_in_the_readme_is_the_one_that_new_writes() -> None:
    shown = section("Write a job").split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(shown) == yaml.safe_load(JOB_YAML.replace("@NAME@", "tickets"))


def test_the_price_file_in_the_readme_is_added_to_the_book(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(
        section("Against DeepSeek and your own Postgres").split("```toml\n")[1].split("```")[0], "utf-8"
    )
    added = set(load_price_book(tmp_path).rows()) - set(load_price_book().rows())
    assert {(price.model, price.band) for price in added} == {
        ("deepseek-flash", Band.OFF_PEAK),
        ("deepseek-flash", Band.PEAK),
    }
    with pytest.raises(UnknownPrice):
        load_price_book().at("deepseek-flash", Currency.USD, datetime(2027, 1, 1, 12, tzinfo=UTC))
    assert load_price_book(tmp_path).at("deepseek-flash", Currency.USD, datetime(2027, 1, 1, 12, tzinfo=UTC))


def test_every_job_key_is_in_the_readme() -> None:
    told = {name.split(".")[0] for name in first_cells(section("Write a job")) if not name.startswith(".")}
    assert told == set(JobFile.model_fields)


def test_every_setting_is_in_the_readme_and_none_that_is_not() -> None:
    known = {
        str(field.validation_alias or f"FARTHING_{name.upper()}") for name, field in Settings.model_fields.items()
    }
    told = first_cells(section("Against DeepSeek and your own Postgres"))
    assert told == known - {"FARTHING_SANDBOX"}  # set by the sandbox, never by a user


def test_exit_codes_are_those_of_the_errors_and_of_the_command_line() -> None:
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", section("Commands"), flags=re.MULTILINE)}
    raised = {kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")}
    assert told == raised | {0, farthing.PAUSED, farthing.CRASHED, farthing.INTERRUPTED}


def test_every_make_target_exists() -> None:
    for target in re.findall(r"\$ make ([a-z-]+)", README):
        assert f"\n{target}:" in MAKEFILE


def read_sql(text: str) -> list[str]:
    """The statements in a text of the README."""
    return [line for block in text.split("```sql\n")[1:] for line in block.split("```")[0].split(";\n") if line]


def test_the_sql_runs_and_names_every_view(ledger_url: str) -> None:
    text = section("Answers and audits in SQL")
    with psycopg.connect(ledger_url) as connection:
        connection.execute("SET ROLE farthing_auditor")
        assert all(connection.execute(statement).fetchall() == [] for statement in read_sql(text))
        views = connection.execute("SELECT viewname FROM pg_views WHERE schemaname = 'farthing'").fetchall()
    told = set(re.findall(r"`([a-z_]+)`", text)) | set(re.findall(r"farthing\.([a-z_]+)", text))
    # What the command line reads while a run goes on.
    internal = {"run_overview", "backfill_overview", "lane_progress", "event"}
    # What the others are made of, and what they are checked by.
    internal |= {"summed", "unsummed", "lateness", *(name for (name,) in views if name.endswith("_by_rows"))}
    assert {name for (name,) in views} - internal <= told


async def test_an_auditor_s_five_queries_answer_for_a_real_run(ledger_url: str) -> None:
    async with lane_ledger(ledger_url) as ledger:
        await run_everything(ledger)
    with psycopg.connect(ledger_url, row_factory=dict_row) as connection:
        connection.execute("SET ROLE farthing_auditor")
        queries = read_sql(section("Answers and audits in SQL").split("### Plain SQL")[1])
        months, dearest, cache, waste, climbs = [connection.execute(query).fetchall() for query in queries]
        spent = connection.execute(
            "SELECT cost_pico / 1e12 AS cost, unknown_pico / 1e12 AS more FROM farthing.run_cost"
        )
        (run,) = spent.fetchall()
    assert sum(row["cost"] for row in months) == run["cost"] > 0
    assert sum(row["at_most_more"] for row in months) == sum(row["at_most_more"] for row in waste) == run["more"] > 0
    assert sum(row["cost"] for row in dearest) == run["cost"]
    assert {row["document_id"] for row in dearest} == {"d0", "d1", "d2", "d3", "d4"}
    assert sum(row["saved"] for row in cache) > 0
    assert [(row["escalated"], row["rescued"], row["more_right"]) for row in climbs] == [(1, 1, 1)]
