"""The planted bugs: each can still be planted, and each is caught."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.planted import BUGS, ROOT, Bug, is_caught
from tests.faults.summary import Tally


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_can_be_planted_in_the_code_as_it_is(bug: Bug, tmp_path: Path) -> None:
    """In exactly one place, and what comes of it is Python that a test exists for."""
    copy = tmp_path / bug.file
    copy.parent.mkdir(parents=True)
    copy.write_text((ROOT / bug.file).read_text())
    bug.plant(tmp_path)
    ast.parse(copy.read_text())
    for test in bug.caught_by:
        path, _, function = test.partition("::")
        assert function.partition("[")[0] in (ROOT / path).read_text()


@pytest.mark.long
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_turns_its_tests_red(bug: Bug, tally: Tally) -> None:
    assert is_caught(bug)
    tally.count("planted bugs caught")


@pytest.mark.long
def test_a_change_that_breaks_nothing_is_not_caught() -> None:
    harmless = Bug("none", "schemas/money.py", "from __future__", "from  __future__", ("tests/unit/test_money.py",))
    assert not is_caught(harmless)
    with pytest.raises(ValueError, match="can catch nothing"):
        is_caught(replace(harmless, caught_by=("tests/unit/test_money.py::test_no_such_test",)))
