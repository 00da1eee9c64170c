"""How a flow run ends in Prefect: green only where the command would exit with 0, and never without its outcome."""

from __future__ import annotations

import pytest
from prefect import State
from prefect.states import Failed

from tasks.final_states import final, outcome_of


def outcome(state: str, reason: str | None = None, advice: str = "") -> dict[str, object]:
    return {"run_id": 7, "state": state, "reason": reason, "advice": advice}


@pytest.mark.parametrize(
    ("given", "name", "kind"),
    [
        (outcome("paused", "budget", "raise it"), "Paused", "FAILED"),
        (outcome("paused", "operator"), "Paused", "FAILED"),
        (outcome("paused", "interrupted", "run the same command"), "Cancelled", "CANCELLED"),
        (outcome("done", None, "3 of 4 documents are dead letters"), "DeadLetters", "FAILED"),
    ],
)
async def test_what_is_no_success_is_not_green_and_says_why(given: dict[str, object], name: str, kind: str) -> None:
    state = final(given)
    assert isinstance(state, State)
    assert (state.name, state.type.value) == (name, kind)
    for words in filter(None, (given["reason"], given["advice"])):
        assert str(words) in str(state.message)
    assert await outcome_of(state) == given


@pytest.mark.parametrize("given", [outcome("done"), outcome("running", None, "")])
def test_a_success_is_its_outcome(given: dict[str, object]) -> None:
    assert final(given) == given


async def test_what_a_flow_raised_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        await outcome_of(Failed(data=ZeroDivisionError()))
