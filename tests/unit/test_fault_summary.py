"""The table of a fault run: what tests tell adds up, and what failed is not counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.summary import (
    BEGIN,
    END,
    FLOORS,
    REPORT,
    REPORT_FILE,
    SCALE,
    Tally,
    gather,
    grouped,
    lines,
    markdown,
    missed,
    show,
    ungrouped,
)

ROOT = Path(__file__).parents[2]


def report(
    name: str, outcome: str, *told: tuple[str, int], figures: dict[str, str] | None = None
) -> pytest.TestReport:
    properties: list[tuple[str, object]] = []
    for fault, times in told:
        Tally(properties).count(fault, times)
    for figure, measured in (figures or {}).items():
        Tally(properties).figure(figure, measured)
    node, broken = f"tests/faults/{name}", "assert 1 == 2\nand more" if outcome == "failed" else None
    return pytest.TestReport(node, (node, 0, name), {}, outcome, broken, "call", user_properties=properties)


def test_faults_of_all_tests_add_up() -> None:
    reports = [report("a", "passed", ("SIGKILL", 2)), report("b", "passed", ("SIGKILL", 3), figures={"took": "1 s"})]
    found = gather((r.outcome, r) for r in reports)
    assert (found.faults, found.figures, found.passed) == ({"SIGKILL": 5}, {"took": "1 s"}, 2)
    assert list(lines(found)) == ["SIGKILL          5", "took     1 s", "0 violations in 2 tests"]


def test_the_faults_of_a_failed_test_do_not_count_and_it_is_named() -> None:
    reports = [report("a", "passed", ("SIGKILL", 2)), report("b", "failed", ("SIGKILL", 3))]
    found = gather((r.outcome, r) for r in reports)
    assert (found.faults, found.failed) == ({"SIGKILL": 2}, {"tests/faults/b": "assert 1 == 2"})
    assert list(lines(found))[-1].startswith("FAILED: 1 of 2 tests")


def test_a_test_that_could_not_begin_or_end_has_failed() -> None:
    ended = report("a", "passed", ("SIGKILL", 2))
    broken = report("a", "failed")
    broken.when = "teardown"
    found = gather(iter([("passed", ended), ("error", broken)]))
    assert list(found.failed) == ["tests/faults/a"]


class Terminal:
    """pytest's reporter, with what it files under each outcome."""

    def __init__(self, **stats: list[pytest.TestReport]) -> None:
        self.stats = stats
        self.written: list[str] = []

    def section(self, title: str) -> None:
        self.written.append(title)

    def line(self, text: str) -> None:
        self.written.append(text)


def test_a_test_that_pytest_files_as_an_error_is_in_the_table() -> None:
    terminal = Terminal(error=[report("a", "failed")])
    show(terminal)
    assert terminal.written[-1].startswith("FAILED: 1 of 1 tests")


def test_a_whole_run_says_what_it_played_too_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REPORT, str(tmp_path / "report.json"))
    monkeypatch.setenv(SCALE, "1")
    terminal = Terminal(passed=[report("a", "passed", ("SIGKILL", 999), *((fault, 10**6) for fault in FLOORS))])
    show(terminal)
    assert "owes" not in terminal.written[-1]
    terminal = Terminal(passed=[report("a", "passed", ("SIGKILL", 999))])
    show(terminal)
    assert terminal.written[-1].startswith("played less often than a whole run owes: SIGKILL, ")


def test_what_failed_and_passes_when_played_again_is_added_and_said() -> None:
    earlier = {"seed": 7, "scale": "1", "date": "2026-11-24", "commit": "abc"}
    earlier["tests"] = {"passed": 2, "failed": {"tests/faults/x.py::b": "assert 2499 == 2500"}}
    reports = [report("x.py::b", "passed", ("SIGKILL", 3), figures={"took": "2 s"})]
    found = gather((r.outcome, r) for r in reports)
    both = found.added_to(earlier | {"faults": {"SIGKILL": 2}, "figures": {"took": "1 s"}})
    at_first = {"tests/faults/x.py::b": "assert 2499 == 2500"}
    assert both["tests"] == {"passed": 3, "failed": {}, "at_first": at_first}
    assert (both["faults"], both["figures"]) == ({"SIGKILL": 5}, {"took": "2 s"})
    assert "3 tests passed, 1 of them only when they were played again, no violation." in markdown(both)
    assert "\nb failed at first: `assert 2499 == 2500`\n" in markdown(both)


@pytest.mark.parametrize(
    ("nodeid", "name"), [("a.py::t@group", "a.py::t"), ("a.py::t[x@y]@group", "a.py::t[x@y]"), ("a::t[x@y]",) * 2]
)
def test_a_test_has_the_name_that_pytest_takes(nodeid: str, name: str) -> None:
    assert ungrouped(nodeid) == name


def test_kinds_of_one_group_are_added_up_for_the_readme() -> None:
    faults = {"SIGKILL": 5, "provider: 401": 2, "provider: cut": 3, "model: reset toward client": 1}
    assert list(grouped(faults)) == [
        ("SIGKILL", 5),
        ("bad replies, refusals, storms and price edges of the provider, 2 kinds", 5),
        ("faults on the line to the model, 1 kinds", 1),
    ]


def test_a_report_becomes_a_table_that_says_which_run_it_was() -> None:
    report = {"seed": 7, "scale": "0.5", "date": "2026-11-24", "commit": "abc", "tests": {"passed": 2, "failed": {}}}
    table = markdown(report | {"faults": {"SIGKILL": 1200}, "figures": {"took": "1 s"}})
    assert table.startswith("`make faults SEED=7 SCALE=0.5`, 2026-11-24, commit abc: 2 tests passed, no violation.")
    assert "| SIGKILL | 1,200 |" in table
    assert "| took | 1 s |" in table


def test_the_readme_shows_a_whole_run_that_broke_nothing() -> None:
    told = json.loads(REPORT_FILE.read_text("utf-8"))
    assert (told["scale"], told["tests"]["failed"], missed(told)) == ("1", {}, [])
    shown = (ROOT / "README.md").read_text("utf-8").split(BEGIN)[1].split(END)[0]
    assert shown.strip() == markdown(told).strip()
