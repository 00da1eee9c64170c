"""One shard's work: read it in blocks, end what needs no attempt, and set the rest climbing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from schemas.calls import RejectedAnswer
from schemas.documents import Document, UnfitDocument
from schemas.errors import (
    BudgetExhausted,
    InputChanged,
    InputUnavailable,
    KeyRefused,
    LeaseLost,
    ProviderStopped,
    UnknownPrice,
)
from schemas.ladder import Accept, Again, DeadLetter, PastAttempt, Stop, Verdict, stand
from schemas.records import DocumentState, Ending, Record, ResultKey
from tasks.bulkhead import Bulkhead
from tasks.climbs import Climber, Work, end_of
from tasks.drains import Draining, unless
from tasks.ledger import attempts, leases, runs
from tasks.ledger.attempts import PaidAnswer, Reusable
from tasks.ledger.connection import Ledger
from tasks.ledger.leases import ClaimedShard
from tasks.patience import Patience

log = structlog.get_logger("farthing.shards")


@dataclass
class ShardWork:
    """The work on one claimed shard. `slots` bounds the documents in progress over all of a lane's shards."""

    claimed: ClaimedShard
    climber: Climber
    ledger: Ledger
    bulkhead: Bulkhead
    root: Path
    reusable: Reusable
    slots: asyncio.Semaphore
    drain: Callable[[str, str], None]
    patience: Patience
    #: Whether what is wrong with a file here may be this machine's fault only.
    is_elsewhere: bool = False
    #: Set once every document of the shard is under way, so that the next shard may be claimed.
    started: asyncio.Event = field(default_factory=asyncio.Event)
    _is_lost: bool = False

    async def finish(self) -> None:
        """Finish every document of the shard, then the shard; less if the lane drains or loses the lease."""
        try:
            async with asyncio.TaskGroup() as climbs:
                changed = await self._start_all(climbs)
                self.started.set()
        finally:
            self.started.set()
        if not self._is_over:
            with suppress(Draining):
                await self._close(changed)

    async def _close(self, changed: InputChanged | None) -> None:
        """Finish the shard, or fail it. Raises Draining: whoever resumes the run does it."""
        key = (self.ledger, self.climber.run.run_id, self.climber.grants.lane_id, self.claimed.lease)
        if changed is not None:
            await self.patience.ask(leases.fail, *key, changed.reason)
            event = f"{changed.reason} {self.claimed.shard.shard_no}"
            await self.patience.ask(runs.note, *key[:2], changed.reason, {"why": str(changed)}, key=event)
            log.warning("shard failed", shard=self.claimed.shard.shard_no, why=str(changed))
        elif await self.patience.ask(leases.finish, *key):
            log.info("shard done", shard=self.claimed.shard.shard_no, documents=self.claimed.shard.document_count)

    async def _start_all(self, climbs: asyncio.TaskGroup) -> InputChanged | None:
        """Set every document going. What is under way is finished even if the file turns out to have changed."""
        try:
            async with aclosing(self._read()) as blocks:
                async for block in blocks:
                    await self._start(block, climbs)
                    if self._is_over:
                        break
        except InputChanged as changed:
            if not self.is_elsewhere:
                return changed
            self.drain("input", f"{changed}; on this machine at least: nothing of it was given up")
        except InputUnavailable as unavailable:
            self.drain("input", str(unavailable))
        except Draining:
            pass
        return None

    @property
    def _is_over(self) -> bool:
        return self._is_lost or self.climber.is_draining

    async def _read(self) -> AsyncGenerator[Sequence[Document | UnfitDocument], None]:
        """The shard's documents in blocks. Raises Draining: a disk that does not answer cannot keep a lane."""
        file, shard, draining = self.claimed.file, self.claimed.shard, self.patience.draining
        reading = self.bulkhead.read_shard(self.climber.job.input, file, shard, root=self.root)
        async with aclosing(reading) as blocks:
            while block := await unless(draining, _take(blocks)):
                yield block

    async def _start(self, block: Sequence[Document | UnfitDocument], climbs: asyncio.TaskGroup) -> None:
        """Set a block's documents going: end those that need no attempt, climb the others."""
        span = (self.ledger, self.climber.run.run_id, block[0].document_no, block[-1].document_no)
        ended = await self.patience.ask(attempts.find_endings, *span)
        fresh = [document for document in block if document.document_no not in ended]
        history = await self.patience.ask(attempts.find_past_attempts, *span) if fresh else {}
        endings, climbing = await self._sort(fresh, history)
        if endings:
            climbs.create_task(self._record(endings))
        for document in climbing:
            await self.slots.acquire()
            if self._is_over:
                self.slots.release()
                return
            climbs.create_task(self._climb(document, history.get(document.document_no, [])))

    async def _sort(
        self, fresh: Sequence[Document | UnfitDocument], history: dict[int, list[PastAttempt]]
    ) -> tuple[list[Ending], list[Document]]:
        """Split what ends without an attempt (unfit, duplicate, answered before) from what has to climb."""
        texts = {d.text_digest for d in fresh if isinstance(d, Document) and d.document_no not in history}
        answered = await self.patience.ask(attempts.find_results_now, self.ledger, texts, self.reusable)
        endings: list[Ending] = []
        climbing: list[Document] = []
        for document in fresh:
            is_begun = document.document_no in history
            ending = self._end_without_attempt(document, {} if is_begun else answered)
            if ending is not None:
                endings.append(ending)
            elif isinstance(document, Document):
                climbing.append(document)
        return endings, climbing

    def _end_without_attempt(
        self, document: Document | UnfitDocument, answered: dict[bytes, ResultKey]
    ) -> Ending | None:
        """How a document ends that needs no attempt; None: it needs one."""
        lease, number = self.claimed.lease, document.document_no
        if isinstance(document, UnfitDocument):
            reason = document.reason.value
            return Ending(number, document.document_id, lease, DocumentState.DEAD_LETTER, reason=reason)
        work = Work(document, lease)
        if duplicate := self.claimed.duplicates.get(number):
            if not duplicate.is_same_text:
                return end_of(work, DocumentState.DEAD_LETTER, reason="conflicting_duplicate")
            of = ResultKey(self.climber.run.run_id, duplicate.of_document_no)
            return end_of(work, DocumentState.DUPLICATE, of=of)
        if earlier := answered.get(document.text_digest):
            return end_of(work, DocumentState.REUSED, of=earlier)
        return None

    async def _record(self, endings: Sequence[Ending]) -> None:
        kept = await asyncio.gather(*(self.climber.records.put(Record(ending=ending)) for ending in endings))
        if not all(kept):
            self._lose()

    async def _climb(self, document: Document, history: list[PastAttempt]) -> None:
        """Finish one document; what stops the whole lane becomes a drain here."""
        try:
            work = await self._resume(Work(document, self.claimed.lease), history)
            if work is not None:
                await self.climber.finish(work)
        except Draining:
            pass
        except LeaseLost:
            self._lose()
        except BudgetExhausted as error:
            self.drain("budget", str(error))
        except KeyRefused as error:
            self.drain("key", str(error))
        except ProviderStopped as error:
            self.drain("provider", str(error))
        except UnknownPrice as error:
            self.drain("price", str(error))
        finally:
            self.slots.release()

    async def _resume(self, work: Work, history: list[PastAttempt]) -> Work | None:
        """Where a document stands after its past attempts. None: it has ended just now, at no further cost."""
        match stand(history, [tier.name for tier in self.climber.job.ladder]):
            case Again(position):
                rejected = await self._find_rejected(work) if position.amends is Verdict.INVALID_ANSWER else None
                return Work(work.document, work.lease, position, rejected)
            case Accept():
                await self._record([await self._end_paid(work)])
            case DeadLetter(reason) | Stop(reason):
                await self._record([end_of(work, DocumentState.DEAD_LETTER, reason=reason)])
        return None

    async def _find_rejected(self, work: Work) -> RejectedAnswer | None:
        """The answer to repair, as the lane before this one stored it."""
        paid = await self._find_paid_answer(work, Verdict.INVALID_ANSWER)
        return RejectedAnswer(paid.stored.content, ("it does not fit the schema",)) if paid else None

    async def _end_paid(self, work: Work) -> Ending:
        """The result of a lane that paid for it and lost its lease before it could say so."""
        paid = await self._find_paid_answer(work, Verdict.ACCEPTED)
        if paid is None:
            return end_of(work, DocumentState.DEAD_LETTER, reason="answer_missing")
        return end_of(
            work,
            DocumentState.RESULT,
            tier=paid.tier,
            attempt_no=paid.attempt_no,
            answer=paid.stored.answer,
            confidence=paid.stored.confidence,
            confidence_signal=paid.stored.confidence_signal,
        )

    async def _find_paid_answer(self, work: Work, verdict: Verdict) -> PaidAnswer | None:
        key = (self.ledger, self.climber.run.run_id, work.document.document_no, verdict)
        return await self.patience.ask(attempts.find_paid_answer, *key)

    def _lose(self) -> None:
        if not self._is_lost:
            log.warning("lease lost", shard=self.claimed.lease.shard_no, epoch=self.claimed.lease.epoch)
        self._is_lost = True


async def _take(blocks: AsyncIterator[Sequence[Document | UnfitDocument]]) -> Sequence[Document | UnfitDocument]:
    """The next block; an empty one at the end."""
    async for block in blocks:
        return block
    return ()
