"""The table of a fault run: what tests tell adds up, and what failed is not counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.summary import BEGIN, END, REPORT_FILE, Tally, gather, lines, markdown

ROOT = Path(__file__).parents[2]


def report(
    name: str, outcome: str, *told: tuple[str, int], figures: dict[str, str] | None = None
) -> pytest.TestReport:
    properties: list[tuple[str, object]] = []
    for fault, times in told:
        Tally(properties).count(fault, times)
    for figure, measured in (figures or {}).items():
        Tally(properties).figure(figure, measured)
    node = f"tests/faults/{name}"
    return pytest.TestReport(node, (node, 0, name), {}, outcome, None, "call", user_properties=properties)


def test_faults_of_all_tests_add_up() -> None:
    reports = [report("a", "passed", ("SIGKILL", 2)), report("b", "passed", ("SIGKILL", 3), figures={"took": "1 s"})]
    found = gather((r.outcome, r) for r in reports)
    assert (found.faults, found.figures, found.passed) == ({"SIGKILL": 5}, {"took": "1 s"}, 2)
    assert list(lines(found)) == ["SIGKILL          5", "took     1 s", "0 violations in 2 tests"]


def test_the_faults_of_a_failed_test_do_not_count_and_it_is_named() -> None:
    reports = [report("a", "passed", ("SIGKILL", 2)), report("b", "failed", ("SIGKILL", 3))]
    found = gather((r.outcome, r) for r in reports)
    assert (found.faults, found.failed) == ({"SIGKILL": 2}, ["tests/faults/b"])
    assert list(lines(found))[-1].startswith("FAILED: 1 of 2 tests")


def test_the_readme_shows_the_last_run_and_nothing_failed_in_it() -> None:
    report = json.loads(REPORT_FILE.read_text())
    assert report["tests"]["failed"] == []
    readme = (ROOT / "README.md").read_text()
    assert readme.partition(BEGIN)[2].partition(END)[0].strip() == markdown(report)
