"""The failpoints: what is listed is what the code reaches, and a set one ends the process at its n-th hit."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.failpoints import ATTEMPT, KILLED, POINTS, STEPS, VARIABLE

ROOT = Path(__file__).parents[2]
#: Functions whose own transactions write nothing, or nothing that is the ledger's.
READING = ("find_", "_find_", "_alone", "has_", "is_", "list_", "prove", "opened", "audit", "progress", "refresh_")


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call of a function or method of that name in tasks/, with the function it is in."""
    for path in sorted((ROOT / "tasks").rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.Call) and _called(node) == name:
                        yield function.name, node


def _called(call: ast.Call) -> str | None:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)


def test_every_step_is_one_transaction_and_every_transaction_that_writes_is_a_step() -> None:
    steps = Counter(call.args[0].value for _, call in calls("transaction") if call.args)
    assert steps == Counter(STEPS)


def test_only_functions_that_read_have_a_transaction_without_a_step() -> None:
    unnamed = {function for function, call in calls("transaction") if not call.args}
    assert {function for function in unnamed if not function.startswith(READING)} == set()


def test_the_points_of_an_attempt_are_those_that_the_code_reaches() -> None:
    literal = Counter(call.args[0].value for _, call in calls("reach") if isinstance(call.args[0], ast.Constant))
    assert literal == Counter(ATTEMPT)
    assert set(POINTS) == {*ATTEMPT, *(f"{step}.{side}_commit" for step in STEPS for side in ("before", "after"))}


def run(setting: str, reached: str) -> subprocess.CompletedProcess[str]:
    program = f"from tasks.failpoints import reach\nfor n in range(3): print(n, flush=True); reach({reached!r})"
    environment = {**os.environ, VARIABLE: setting, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("setting", "hits"), [("record.before_commit", 1), ("record.before_commit:2", 2)])
def test_a_set_failpoint_ends_the_process_at_its_hit(setting: str, hits: int) -> None:
    done = run(setting, "record.before_commit")
    assert (done.returncode, len(done.stdout.split())) == (KILLED, hits)


@pytest.mark.parametrize("setting", ["", "record.after_commit:1", "record.before_commit:4"])
def test_any_other_point_is_passed(setting: str) -> None:
    done = run(setting, "record.before_commit")
    assert (done.returncode, len(done.stdout.split())) == (0, 3)


def test_a_point_that_does_not_exist_is_refused() -> None:
    done = run("recrod.before_commit", "record.before_commit")
    assert done.returncode == 1
    assert "recrod.before_commit is no failpoint" in done.stderr
