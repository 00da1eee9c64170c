"""The table of a fault run: how often each fault was played, over all tests and workers, and what was measured.

`make faults` writes it to `report.json` beside this file; `python -m tests.faults.summary` puts that into the README.
`make faults-again` plays only the tests that failed, and adds them to the report, which says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

SEED, SCALE, REPORT = "FARTHING_FAULTS_SEED", "FARTHING_FAULTS_SCALE", "FARTHING_FAULTS_REPORT"
#: Set where only the tests that failed in the report are played, to be added to it.
AGAIN = "FARTHING_FAULTS_AGAIN"
REPORT_FILE = Path(__file__).parent / "report.json"
#: The README's table is between these lines.
BEGIN, END = "<!-- faults: begin (written by python -m tests.faults.summary) -->", "<!-- faults: end -->"
_FAULT, _FIGURE = "fault", "figure"
#: Where pytest files a test that ran: "error" has those whose set-up or tear-down failed.
OUTCOMES = ("passed", "failed", "error")
#: Characters of why a test failed that a report keeps.
WHY = 200
#: What the whole form owes, at full scale: how often at least.
FLOORS = {
    "SIGKILL": 1000,
    "Postgres killed": 100,
    "zombie lane": 100,
    "simulated seeds": 10_000,
    "provider: reply cut at a byte": 600,
    "random budgets": 1000,
}


@dataclass(frozen=True)
class Tally:
    """What one test did. `properties` are the test's own, which pytest carries from a worker to the summary."""

    properties: list[tuple[str, object]]

    def count(self, fault: str, times: int = 1) -> None:
        """A fault was played so often, and the run it hit was checked after it."""
        self.properties.append((_FAULT, [fault, times]))

    def count_all(self, faults: Counter[str]) -> None:
        for fault, times in faults.items():
            self.count(fault, times)

    def figure(self, name: str, measured: str) -> None:
        """Something measured on the way, in words for people."""
        self.properties.append((_FIGURE, [name, measured]))


@dataclass
class Summary:
    """All tests of a fault run together."""

    faults: Counter[str] = field(default_factory=Counter)
    figures: dict[str, str] = field(default_factory=dict)
    passed: int = 0
    #: The tests that failed, each with the first line of why.
    failed: dict[str, str] = field(default_factory=dict)

    def added_to(self, earlier: Mapping[str, Any]) -> dict[str, Any]:
        """The report of a run whose failed tests were played again. What had failed counted nothing there."""
        at_first = {**earlier["tests"]["failed"], **earlier["tests"].get("at_first", {})}
        tests = {
            "passed": earlier["tests"]["passed"] + self.passed,
            "failed": self.failed,
            "at_first": {name: why for name, why in at_first.items() if name not in self.failed},
        }
        faults = Counter(earlier["faults"]) + self.faults
        figures = {**earlier["figures"], **self.figures}
        return {**earlier, "tests": tests, "faults": dict(sorted(faults.items())), "figures": figures}

    def as_json(self, seed: str, scale: str | None) -> dict[str, Any]:
        return {
            "date": datetime.now(UTC).date().isoformat(),
            "commit": commit(),
            "seed": int(seed),
            "scale": scale,  # of the full form; None: the short one, which every commit plays
            "tests": {"passed": self.passed, "failed": self.failed},
            "faults": dict(sorted(self.faults.items())),
            "figures": dict(sorted(self.figures.items())),
        }


def gather(reports: Iterator[tuple[str, pytest.TestReport]]) -> Summary:
    """Add up what the tests told. A failed test's faults do not count: nothing is known of their runs."""
    found = Summary()
    for outcome, report in reports:
        if "tests/faults" not in report.nodeid or (outcome == "passed" and report.when != "call"):
            continue
        if outcome != "passed":  # in its set-up and tear-down, too
            found.failed.setdefault(ungrouped(report.nodeid), why(report))
            continue
        found.passed += 1
        for name, told in report.user_properties:
            if name == _FAULT:
                found.faults[told[0]] += told[1]
            elif name == _FIGURE:
                found.figures[told[0]] = told[1]
    return found


def why(report: pytest.TestReport) -> str:
    """The first line of what a test failed with, as far as it fits into a report."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return (str(crash.message if crash else report.longreprtext).splitlines() or [""])[0][:WHY]


def commit() -> str | None:
    """Which code was played; None: this is no checkout."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() or None


def ungrouped(nodeid: str) -> str:
    """The test's name without the group that pytest-xdist appends, `@GROUP`."""
    name, at, group = nodeid.rpartition("@")
    return name if at and "]" not in group else nodeid


def show(terminal: pytest.TerminalReporter) -> None:
    """Print the table, and write it as JSON where `FARTHING_FAULTS_REPORT` says."""
    outcomes = ((name, report) for name in OUTCOMES for report in terminal.stats.get(name, []))
    found = gather((name, report) for name, report in outcomes if isinstance(report, pytest.TestReport))
    if not (found.faults or found.figures or found.failed):
        return
    terminal.section("faults")
    for line in lines(found):
        terminal.line(line)
    if path := os.environ.get(REPORT):
        report = found.as_json(os.environ.get(SEED, "1"), os.environ.get(SCALE))
        if os.environ.get(AGAIN):
            report = found.added_to(json.loads(Path(path).read_text()))
        Path(path).write_text(json.dumps(report, indent=2) + "\n")
        terminal.line(f"written to {path}")
        if report["scale"] == "1" and (less := missed(report)):
            terminal.line(f"played less often than a whole run owes: {', '.join(less)}")


def lines(found: Summary) -> Iterator[str]:
    """The table, line by line."""
    width = max(map(len, [*found.faults, *found.figures]), default=0)
    for fault, times in sorted(found.faults.items()):
        yield f"{fault:<{width}}  {times:>9,}"
    for name, measured in sorted(found.figures.items()):
        yield f"{name:<{width}}  {measured}"
    if found.failed:
        yield f"FAILED: {len(found.failed)} of {found.passed + len(found.failed)} tests; their faults are not counted"
    else:
        yield f"0 violations in {found.passed} tests"


#: What the README adds up, by how the names begin: `report.json` has each kind.
GROUPS = {
    "provider: ": "bad replies, refusals, storms and price edges of the provider",
    "model: ": "faults on the line to the model",
    "Postgres: ": "faults on the line to Postgres",
}


def grouped(faults: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """The faults as the README shows them: those of a group as one, with the number of their kinds."""
    for name, times in faults.items():
        if not name.startswith(tuple(GROUPS)):
            yield name, times
    for prefix, words in GROUPS.items():
        of_group = [times for name, times in faults.items() if name.startswith(prefix)]
        if of_group:
            yield f"{words}, {len(of_group)} kinds", sum(of_group)


def markdown(report: Mapping[str, Any]) -> str:
    """A run as the README shows it."""
    faults = [f"| {name} | {times:,} |" for name, times in grouped(report["faults"])]
    figures = [f"| {name} | {measured} |" for name, measured in report["figures"].items()]
    failed = len(report["tests"]["failed"])
    played = f"`make faults SEED={report['seed']} SCALE={report['scale']}`"
    heading = "The short form, which every commit plays" if report["scale"] is None else played
    heading += f", {report['date']}, commit {report['commit']}: {report['tests']['passed']} tests passed, "
    at_first = report["tests"].get("at_first", {})
    if at_first:
        heading += f"{len(at_first)} of them only when they were played again, "
    return "\n".join(
        [
            heading + (f"{failed} failed." if failed else "no violation."),
            *(f"\n{name.rpartition('::')[2]} failed at first: `{why}`" for name, why in at_first.items()),
            "",
            "| what befell the runs | times |",
            "|---|---:|",
            *faults,
            "",
            "| measured on the way | |",
            "|---|---|",
            *figures,
        ]
    )


def write_readme(readme: Path, report: Path) -> None:
    """Put the table of `report` between the README's marks."""
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    readme.write_text(f"{before}{begin}\n{markdown(json.loads(report.read_text()))}\n{end}{after}")


def missed(report: Mapping[str, Any]) -> list[str]:
    """The faults that a whole run played less often than it owes."""
    return [fault for fault, least in FLOORS.items() if report["faults"].get(fault, 0) < least]


if __name__ == "__main__":
    if sys.argv[1:] == ["failed"]:
        print("\n".join(json.loads(REPORT_FILE.read_text())["tests"]["failed"]))
    else:
        write_readme(Path("README.md"), REPORT_FILE)
