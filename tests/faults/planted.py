"""Do the checks bite? Bugs that would break the promise, planted one at a time in a copy, and who catches it.

    python -m tests.faults.planted            every bug
    python -m tests.faults.planted NAME …     these

A bug is caught when the tests it names, which pass in a copy without it, end with failures and without errors, or
when a proof rejects a run that nothing befell: a copy that does not import, finds no test or has no Postgres
catches nothing. Whoever changes a planted line plants
the bug again in what took its place: a test sees to it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults import summary
from tests.faults.stage import BROKEN_UNHURT

ROOT = Path(__file__).parents[2]
#: What the tests of a copy need.
COPIED = ("farthing.py", "flows", "tasks", "schemas", "migrations", "sandbox", "jobs", "tests", "pyproject.toml")
#: pytest's exit codes for tests that ran: none failed, and some did or could not begin. What failed is in its words.
TESTS_PASSED, TESTS_FAILED = 0, 1


@dataclass(frozen=True)
class Bug:
    """One line of the product, `was`, and the bug that takes its place. `caught_by` is what pytest is to run."""

    name: str
    file: str
    was: str
    becomes: str
    caught_by: tuple[str, ...]

    def plant(self, root: Path) -> None:
        """Put the bug into the copy at `root`. Raises ValueError where the line is not there exactly once."""
        path = root / self.file
        code = path.read_text()
        if code.count(self.was) != 1:
            raise ValueError(f"{self.name}: {self.file} has {self.was!r} {code.count(self.was)} times, expected once")
        path.write_text(code.replace(self.was, self.becomes))


FAILPOINTS = "tests/faults/test_failpoints.py::test_killed_at_its_first_hit_a_run_goes_on_and_keeps_its_promise"

BUGS = (
    Bug(
        "send before intent",
        "tasks/climbs.py",
        "permit = await self.intents.put(intent)",
        "permit: Permit = Permitted()\n"
        "        self.sent_early = asyncio.get_running_loop().create_task(self.intents.put(intent))",
        (f"{FAILPOINTS}[intend.before_commit]", f"{FAILPOINTS}[send.after]"),
    ),
    Bug(
        "drop the epoch check",
        "tasks/ledger/attempts.py",
        "    if intent.lease not in held:\n        return Fenced()\n",
        "",
        ("tests/integration/test_attempts.py",),
    ),
    Bug(
        "SDK retries on",
        "tasks/completions.py",
        '"headers": headers, "max_retries": 0,',
        '"headers": headers, "max_retries": 2,',
        ("tests/integration/test_completions.py",),
    ),
    Bug(
        "release by reserved",
        "tasks/ledger/budgets.py",
        "SELECT i.grant_id, sum(coalesce(",
        "SELECT i.grant_id, sum(coalesce(i.reserved, ",
        (f"{FAILPOINTS}[close_grants.after_commit]", f"{FAILPOINTS}[leave.before_commit]"),
    ),
    Bug(
        "price by requested model",
        "schemas/booking.py",
        "book.canonical(reply.served_model or model)",
        "book.canonical(model)",
        ("tests/unit/test_booking.py",),
    ),
    Bug(
        "float cost",
        "schemas/pricing.py",
        "return usage.hit * self.hit_pico + usage.miss * self.miss_pico + usage.output * self.output_pico",
        "return int(\n            (usage.hit * self.hit_pico + usage.miss * self.miss_pico"
        " + usage.output * self.output_pico) / 1e12 * 1e12\n        )",
        ("tests/unit/test_pricing.py",),
    ),
    Bug(
        "count a blank as an answer",
        "schemas/replies.py",
        "if signal is Signal.ANSWERED and (content is None or not content.strip()):",
        "if signal is Signal.ANSWERED and not content:",
        ("tests/integration/test_completions.py",),
    ),
    Bug(
        "unknown attempts cost nothing",
        "tasks/ledger/leases.py",
        "SELECT run_id, document_no, attempt_no, reserved, :because FROM open",
        "SELECT run_id, document_no, attempt_no, 0, :because FROM open",
        (f"{FAILPOINTS}[send.after]",),
    ),
    Bug(
        "retry what was lost without end",
        "schemas/ladder.py",
        "UNKNOWN_RETRIES = 2",
        "UNKNOWN_RETRIES = 20",
        ("tests/unit/test_ladder.py",),
    ),
    Bug(
        "never ask the cap",
        "tasks/ledger/budgets.py",
        "WHERE budget_id = :budget_id AND cap - granted >= :need FOR UPDATE",
        "WHERE budget_id = :budget_id OR cap - granted >= :need FOR UPDATE",
        ("tests/integration/test_budgets.py",),
    ),
    Bug(
        "reuse another prompt's answers",
        "tasks/ledger/attempts.py",
        "AND r.prompt_version = :prompt_version AND",
        "AND (r.prompt_version = :prompt_version OR r.prompt_version IS NOT NULL) AND",
        ("tests/integration/test_attempts.py",),
    ),
    Bug(
        "a lane that drains goes on intending",
        "tasks/lanes.py",
        "if self.is_draining:  # also when Postgres comes back after a drain began",
        "if False:",
        (
            "tests/integration/test_climbs.py"
            "::test_an_intent_that_waited_for_postgres_is_not_made_once_the_lane_drains",
        ),
    ),
    Bug(
        "forget a document of a failed shard",
        "tasks/ledger/leases.py",
        "generate_series(s.first_document_no, s.first_document_no + s.document_count - 1) n",
        "generate_series(s.first_document_no, s.first_document_no + s.document_count - 2) n",
        (f"{FAILPOINTS}[fail.after_commit]",),
    ),
    Bug(
        "the peak ends an hour early",
        "schemas/peak_hours.py",
        "start <= clock < end for start, end in self.windows",
        "start <= clock and clock.hour < end.hour - 1 for start, end in self.windows",
        ("tests/unit/test_pricing.py",),
    ),
    Bug(
        "the proof looks at nothing",
        "tasks/ledger/proof.py",
        "    for broken in claim.broken:",
        "    for broken in ():",
        ("tests/integration/test_proof.py",),
    ),
)


def main(names: Sequence[str]) -> int:
    """Plant each bug, run its tests, and say which were caught. The exit code is the number that were not."""
    unknown = set(names) - {bug.name for bug in BUGS}
    if unknown:
        print(f"no such bug: {', '.join(sorted(unknown))}; there are: {', '.join(bug.name for bug in BUGS)}")
        return 2
    missed = [bug.name for bug in BUGS if (not names or bug.name in names) and not _tell(bug)]
    print(f"not caught: {', '.join(missed)}" if missed else "all caught")
    return len(missed)


def _tell(bug: Bug) -> bool:
    caught = is_caught(bug)
    print(f"{'caught' if caught else 'MISSED'}  {bug.name}  ({bug.file}; {' '.join(bug.caught_by)})", flush=True)
    return caught


def is_caught(bug: Bug) -> bool:
    """Whether the bug's tests fail in a copy of the tree that has it. Raises ValueError if they fail without it."""
    with copied() as root:
        if bug.caught_by not in _PASS_UNPLANTED:
            if _run(root, bug.caught_by).returncode != TESTS_PASSED:
                raise ValueError(f"{' '.join(bug.caught_by)} fail without the bug, so they can catch nothing")
            _PASS_UNPLANTED.add(bug.caught_by)
        bug.plant(root)
        done = _run(root, bug.caught_by)
        said = done.stdout.splitlines()[-1] if done.stdout else ""
        is_seen = (" failed" in said and " error" not in said) or BROKEN_UNHURT in done.stdout
        return done.returncode == TESTS_FAILED and is_seen


#: Tests that were seen to pass in a copy without a bug, by this process.
_PASS_UNPLANTED: set[tuple[str, ...]] = set()


def _run(root: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {name: value for name, value in os.environ.items() if name not in (summary.AGAIN, summary.REPORT)}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of everything that the tests need, for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        root = Path(folder)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, root / name)
        yield root


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
