"""One shard's work: read it in blocks, end what needs no attempt, and set the rest climbing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from schemas.calls import RejectedAnswer
from schemas.certificates import Fate
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
from schemas.ladder import Accept, Again, DeadLetter, Hold, PastAttempt, Stop, Verdict, release, stand
from schemas.records import DocumentState, Ending, Held, Record, ResultKey
from tasks.bulkhead import Bulkhead
from tasks.climbs import Climber, Work, end_of
from tasks.drains import Draining, unless
from tasks.ledger import attempts, certification, leases, runs
from tasks.ledger.attempts import FirstAnswer, PaidAnswer, Reusable
from tasks.ledger.certification import HeldAnswer
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
        held = await self.patience.ask(certification.find_held, *span) if fresh and self._is_certified else {}
        records, climbing = await self._sort([d for d in fresh if d.document_no not in held], history)
        released, due = self._release(fresh, held)
        if records + released:
            climbs.create_task(self._record(records + released))
        for document, reason in (*((document, None) for document in climbing), *due):
            await self.slots.acquire()
            if self._is_over:
                self.slots.release()
                return
            climbs.create_task(self._climb(document, history.get(document.document_no, []), reason))

    @property
    def _is_certified(self) -> bool:
        return self.climber.job.promise is not None

    def _release(
        self, fresh: Sequence[Document | UnfitDocument], held: Mapping[int, HeldAnswer]
    ) -> tuple[list[Record], list[tuple[Document, str]]]:
        """Of the documents whose first answers wait: those that end by it now, and those that climb, with why."""
        accepted: list[Record] = []
        climbing: list[tuple[Document, str]] = []
        for document in fresh:
            answer = held.get(document.document_no)
            if answer is None:
                continue
            if not isinstance(document, Document):  # it can be read no more as it was when it was asked
                accepted.append(Record(ending=self._end_without_attempt(document, {})))
                continue
            match answer.place.fate:
                case Fate.ACCEPT:
                    accepted.append(Record(ending=self._accept(Work(document, self.claimed.lease), answer)))
                case Fate.SAMPLE | Fate.ESCALATE as fate:
                    climbing.append((document, fate.value))
                case Fate.WAIT:
                    pass
        return accepted, climbing

    def _accept(self, work: Work, answer: HeldAnswer) -> Ending:
        """The first answer, now that it is certified."""
        if answer.of is not None:
            return end_of(work, DocumentState.REUSED, of=answer.of)
        if answer.attempt_no is None or answer.stored is None:
            return end_of(work, DocumentState.DEAD_LETTER, reason="answer_missing")
        tier = self.climber.job.ladder[0].name
        return _end_as_paid(work, PaidAnswer(tier, answer.attempt_no, answer.stored))

    async def _sort(
        self, fresh: Sequence[Document | UnfitDocument], history: dict[int, list[PastAttempt]]
    ) -> tuple[list[Record], list[Document]]:
        """Split what needs no attempt (unfit, duplicate, answered before) from what has to climb."""
        texts = {d.text_digest for d in fresh if isinstance(d, Document) and d.document_no not in history}
        answered = await self.patience.ask(attempts.find_results_now, self.ledger, texts, self.reusable)
        said = await self._find_first_answers(texts - answered.keys())
        records: list[Record] = []
        climbing: list[Document] = []
        for document in fresh:
            is_begun = document.document_no in history
            ending = self._end_without_attempt(document, {} if is_begun else answered)
            if ending is not None:
                records.append(Record(ending=ending))
            elif isinstance(document, Document) and not is_begun and document.text_digest in said:
                first, lease = said[document.text_digest], self.claimed.lease
                records.append(Record(held=Held(document.document_no, lease, first.confidence, of=first.of)))
            elif isinstance(document, Document):
                climbing.append(document)
        return records, climbing

    async def _find_first_answers(self, texts: Collection[bytes]) -> dict[bytes, FirstAnswer]:
        if not self._is_certified:
            return {}
        return await self.patience.ask(attempts.find_first_answers, self.ledger, texts, self.reusable)

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

    async def _record(self, records: Sequence[Record]) -> None:
        kept = await asyncio.gather(*(self.climber.records.put(record) for record in records))
        if not all(kept):
            self._lose()

    async def _climb(self, document: Document, history: list[PastAttempt], reason: str | None) -> None:
        """Finish one document, one that waited for that `reason`; what stops the whole lane becomes a drain here."""
        try:
            work = await self._resume(Work(document, self.claimed.lease), history, reason)
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

    async def _resume(self, work: Work, history: list[PastAttempt], reason: str | None) -> Work | None:
        """Where a document stands after its past attempts. None: it ends or waits just now, at no further cost."""
        ladder = [tier.name for tier in self.climber.job.ladder]
        match stand(history, ladder) if reason is None else release(history, ladder, reason):
            case Again(position):
                rejected = await self._find_rejected(work) if position.amends is Verdict.INVALID_ANSWER else None
                return Work(work.document, work.lease, position, rejected)
            case Accept():
                await self._record([Record(ending=await self._end_paid(work))])
            case Hold():
                await self._record([await self._hold_paid(work)])
            case DeadLetter(why) | Stop(why):
                await self._record([Record(ending=end_of(work, DocumentState.DEAD_LETTER, reason=why))])
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
        return _end_as_paid(work, paid)

    async def _hold_paid(self, work: Work) -> Record:
        """As `_end_paid`, of a first answer that waits."""
        paid = await self._find_paid_answer(work, Verdict.HELD)
        if paid is None:
            return Record(ending=end_of(work, DocumentState.DEAD_LETTER, reason="answer_missing"))
        number = work.document.document_no
        return Record(held=Held(number, work.lease, paid.stored.confidence, paid.attempt_no))

    async def _find_paid_answer(self, work: Work, verdict: Verdict) -> PaidAnswer | None:
        key = (self.ledger, self.climber.run.run_id, work.document.document_no, verdict)
        return await self.patience.ask(attempts.find_paid_answer, *key)

    def _lose(self) -> None:
        if not self._is_lost:
            log.warning("lease lost", shard=self.claimed.lease.shard_no, epoch=self.claimed.lease.epoch)
        self._is_lost = True


def _end_as_paid(work: Work, paid: PaidAnswer) -> Ending:
    return end_of(
        work,
        DocumentState.RESULT,
        tier=paid.tier,
        attempt_no=paid.attempt_no,
        answer=paid.stored.answer,
        confidence=paid.stored.confidence,
        confidence_signal=paid.stored.confidence_signal,
    )


async def _take(blocks: AsyncIterator[Sequence[Document | UnfitDocument]]) -> Sequence[Document | UnfitDocument]:
    """The next block; an empty one at the end."""
    async for block in blocks:
        return block
    return ()
