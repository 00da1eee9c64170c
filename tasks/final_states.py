"""How a flow run ends in Prefect: green only where the same command would exit with 0.

What is paused would look like done otherwise, to people and to automations. Exit code 3 is of type Failed and named
Paused, or Cancelled where somebody interrupted it; exit code 1 is of type Failed and named DeadLetters. A lane that
left work undone is named Unfinished, whatever its reason: automations.yaml has to know every name.
"""

from __future__ import annotations

from typing import Any

from prefect import State
from prefect.client.schemas.objects import StateType
from prefect.states import Cancelled, Failed

from tasks.lanes import DIED_ADVICE, INTERRUPTED, LANE_DIED, Ended
from tasks.ledger import runs

UNFINISHED = "Unfinished"

#: What a flow returns: plain values, alone or in a state.
Final = dict[str, Any] | State[dict[str, Any]]


def final(outcome: dict[str, Any]) -> Final:
    """What the flow returns for that outcome; alone, it is Completed."""
    message = "; ".join(filter(None, (outcome["reason"], outcome["advice"])))
    match outcome["state"], outcome["reason"]:
        case "done", _:
            return Failed(name="DeadLetters", message=message, data=outcome) if outcome["advice"] else outcome
        case "paused", runs.INTERRUPTED:
            return Cancelled(message=message, data=outcome)
        case "running", _:  # a failed flow run that is named Running would look alive
            return Failed(name=UNFINISHED, message=message or "another start goes on with the run", data=outcome)
        case state, _:  # superseded: by another start, with another job
            return Failed(name=state.capitalize(), message=message or f"the run is {state}", data=outcome)


def lane_final(ended: Ended) -> Final:
    """What a lane's own flow returns: of one that drained the message is its reason, a colon, and what to do."""
    if ended.is_done:
        return {"reason": ended.reason}
    make = Cancelled if ended.reason == runs.INTERRUPTED else Failed
    return make(name=UNFINISHED, message=f"{ended.reason}: {ended.advice}")


def lane_ended(state: State[Any]) -> Ended:
    """How a lane ended, by the last state of its flow run: what `lane_final` said, or whatever kept it from that."""
    match state.type:
        case StateType.COMPLETED:
            return Ended("done")
        case StateType.CRASHED:
            return Ended(LANE_DIED, DIED_ADVICE)
        case _ if state.name == UNFINISHED:
            reason, _, advice = (state.message or "").partition(": ")
            return Ended(reason, advice)
        case other:  # Prefect's own: an exception, or somebody who cancelled it
            return Ended(f"lane_{other.value.lower()}", state.message or INTERRUPTED)


async def outcome_of(state: State[Any]) -> dict[str, Any]:
    """The outcome that a flow returned, whatever state it is in, if called with `return_state=True`.

    Raises what the flow raised, and UnfinishedRun where Prefect did not take its last state: somebody cancelled the
    flow run in its pages meanwhile. What became of the run is on the ledger then.
    """
    found = await state.aresult(raise_on_failure=False)
    if isinstance(found, BaseException):
        raise found
    return dict(found)
