"""History: what a job's earlier runs say about the next one, and nothing of other jobs or of simulated money."""

from __future__ import annotations

from pydantic import SecretStr

from schemas.estimates import MILLION, History, TierTokens
from schemas.ladder import Verdict
from schemas.records import Record
from tasks.ledger import runs
from tasks.ledger.connection import Ledger, Role, opened
from tasks.ledger.history import find_history
from tests.ledgers import JOB, USAGE, Hand, opening, run_everything


async def find(url: str, job: str, *, is_simulated: bool) -> History | None:
    """As an auditor, who reads nothing but views."""
    async with opened(SecretStr(url), Role.AUDITOR) as ledger:
        return await find_history(ledger, job, is_simulated=is_simulated)


async def test_history_is_tokens_per_attempt_and_attempts_per_document(ledger: Ledger, ledger_url: str) -> None:
    await run_everything(ledger)  # five documents were billed, once each at flash and one at pro too
    tokens = (USAGE.hit, USAGE.miss, USAGE.output)
    found = await find(ledger_url, JOB.name, is_simulated=False)
    assert found is not None
    assert (found.runs, found.documents, found.is_simulated, found.is_partial) == (1, 5, False, False)
    assert set(found.tiers) == {TierTokens("flash", *tokens, MILLION), TierTokens("pro", *tokens, MILLION // 5)}


async def test_a_history_with_a_run_that_has_not_ended_says_so(ledger: Ledger, ledger_url: str) -> None:
    """What climbs comes last: by half a run it looks as if hardly anything climbed."""
    half = await Hand.join(ledger, await runs.open_run(ledger, opening(selection={"partitions": ["half"]})))
    await half.intend(half.intent((await half.claim()).lease, 0))
    await half.record(Record(half.outcome(0, verdict=Verdict.LOW_CONFIDENCE)))
    found = await find(ledger_url, JOB.name, is_simulated=False)
    assert found is not None
    assert (found.documents, found.is_partial) == (1, True)
    await run_everything(ledger)
    found = await find(ledger_url, JOB.name, is_simulated=False)
    assert found is not None
    assert (found.runs, found.documents, found.is_partial) == (2, 6, True)


async def test_history_is_of_this_job_and_this_kind_of_money(ledger: Ledger, ledger_url: str) -> None:
    await run_everything(ledger)
    assert await find(ledger_url, JOB.name, is_simulated=True) is None
    assert await find(ledger_url, "another", is_simulated=False) is None
