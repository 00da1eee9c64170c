"""How a flow run ends in Prefect: green only where the command would exit with 0, and never without its outcome."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from prefect import State
from prefect.exceptions import UnfinishedRun
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Failed

from tasks.final_states import final, lane_ended, lane_final, outcome_of
from tasks.lanes import DIED_ADVICE, INTERRUPTED, LANE_DIED, Ended

ROOT = Path(__file__).parents[2]
#: What the example automation goes by that marks a flow run whose process is gone.
(TRIGGER,) = (
    each["trigger"]
    for each in yaml.safe_load((ROOT / "automations.yaml").read_text())["automations"]
    if "prefect.flow-run.heartbeat" in each["trigger"].get("after", ())
)
#: What it takes for the end of a flow run.
ENDS = TRIGGER["expect"]


def outcome(state: str, reason: str | None = None, advice: str = "") -> dict[str, object]:
    return {"run_id": 7, "state": state, "reason": reason, "advice": advice}


@pytest.mark.parametrize(
    ("given", "name", "kind"),
    [
        (outcome("paused", "budget", "raise it"), "Paused", "FAILED"),
        (outcome("paused", "operator"), "Paused", "FAILED"),
        (outcome("paused", "interrupted", "run the same command"), "Cancelled", "CANCELLED"),
        (outcome("done", None, "3 of 4 documents are dead letters"), "DeadLetters", "FAILED"),
        (outcome("superseded", "the job changed", "run the same command"), "Superseded", "FAILED"),
        (outcome("running"), "Unfinished", "FAILED"),
    ],
)
async def test_what_is_no_success_is_not_green_and_says_why(given: dict[str, object], name: str, kind: str) -> None:
    state = final(given)
    assert isinstance(state, State)
    assert (state.name, state.type.value) == (name, kind)
    for words in filter(None, (given["reason"], given["advice"])):
        assert str(words) in str(state.message)
    assert await outcome_of(state) == given
    assert f"prefect.flow-run.{name}" in ENDS, "the example automation would take it for a process that is gone"


def test_a_success_is_its_outcome() -> None:
    assert final(outcome("done")) == outcome("done")


async def test_what_a_flow_raised_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        await outcome_of(Failed(data=ZeroDivisionError()))


async def test_a_last_state_that_prefect_did_not_take_is_no_outcome() -> None:
    """As where somebody cancelled a flow run that no worker of Prefect's has."""
    with pytest.raises(UnfinishedRun):
        await outcome_of(Cancelling())


@pytest.mark.parametrize(
    ("ended", "kind"),
    [(Ended("budget", "raise it"), "FAILED"), (Ended("interrupted", INTERRUPTED), "CANCELLED")],
)
def test_a_lane_that_drained_is_no_success_and_whoever_started_it_learns_why(ended: Ended, kind: str) -> None:
    state = lane_final(ended)
    assert isinstance(state, State)
    assert (state.type.value, lane_ended(state)) == (kind, ended)
    assert f"prefect.flow-run.{state.name}" in ENDS, "the example automation would take it for a process that is gone"


def test_the_example_automation_marks_a_flow_run_of_any_deployment_whose_process_is_gone() -> None:
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    flows = {each["entrypoint"].rpartition(":")[2] for each in deployments}
    assert set(TRIGGER["match_related"]["prefect.resource.name"]) == flows


@pytest.mark.parametrize(
    ("state", "ended"),
    [
        (Completed(data=lane_final(Ended("done"))), Ended("done")),
        (Crashed(message="by the worker"), Ended(LANE_DIED, DIED_ADVICE)),
        (Failed(message="ConfigurationError: no key"), Ended("lane_failed", "ConfigurationError: no key")),
        (Failed(name="TimedOut", message="after an hour"), Ended("lane_failed", "after an hour")),
        (Cancelled(), Ended("lane_cancelled", INTERRUPTED)),
    ],
)
def test_a_lane_s_last_state_says_how_it_ended_whoever_gave_it(state: State[object], ended: Ended) -> None:
    assert lane_ended(state) == ended
