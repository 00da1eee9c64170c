"""docs/guarantee.md works an example: its figures are those of the rule."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path

from schemas.certificates import Finding, find_cut
from schemas.promises import Promise, plan
from schemas.tails import hypergeometric

PAGE = (Path(__file__).parents[2] / "docs" / "guarantee.md").read_text("utf-8")
EXAMPLE = " ".join(PAGE.split("<!-- example: begin")[1].split("<!-- example: end")[0].split())


def told(pattern: str) -> tuple[str, ...]:
    """The figures that the page gives there."""
    found = re.search(pattern, EXAMPLE)
    assert found is not None, f"the page no longer says {pattern}"
    return found.groups()


def test_the_worked_example_is_what_the_rule_does() -> None:
    documents, target, delta, allowed = told(
        r"There are (\d+) documents, the target is (\S+) and delta is (\S+)\. So (\d+)"
    )
    (size,) = told(r"Pro is asked about (\d+)")
    planned = plan(Promise.parse(target, delta), int(documents), size=int(size))
    assert planned.allowed == int(allowed)
    assert planned.allowance == int(told(r"So c is (\d+)\.")[0])
    first, second, accepted, begins = map(
        int, told(r"places (\d+) and (\d+) .* The first (\d+) .* places (\d+) to 20")
    )
    assert find_cut(planned, [Finding("answer", (first - 1, second - 1))]) == accepted == begins - 1
    among, drawn, answered = map(int, told(r"If (\d+) of the (\d+) drawn .* answered (\d+) of 20"))
    assert answered == int(documents) - accepted + among
    assert drawn == int(size)


def test_the_worked_chances_are_those_of_the_rule() -> None:
    factors, product, percent = told(r"so on: (.*) = (\S+) (\S+) % is less")
    chance = math.prod(Fraction(one) for one in factors.split(" · "))
    none_drawn, one_drawn = hypergeometric(20, 5, 10, 0), hypergeometric(20, 6, 10, 1)
    assert chance == Fraction(none_drawn.ways, none_drawn.of)
    assert (product, percent) == (f"{float(chance):.4f}", f"{100 * float(chance):.2f}")
    assert told(r"a chance of (\S+) %, which is more")[0] == f"{100 * one_drawn.ways / one_drawn.of:.2f}"
