"""One document's way up the ladder: reserve, intend, send, judge, record, until it ends.

The order is the promise: money is reserved before the intent, the intent is durable before the request leaves
(G4), and the outcome is durable before the document's next attempt. The rules are `schemas.ladder`'s; here is only
the doing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypedDict, Unpack

from schemas.attempts import Call, Purpose, Reply, Signal
from schemas.booking import Booking, Reserved, book_reply
from schemas.brakes import Breaker, RetryBudget
from schemas.calls import RejectedAnswer, attempt_key, compose, input_bound, is_too_large, max_tokens
from schemas.documents import Document
from schemas.errors import KeyRefused, LeaseLost, ProviderStopped
from schemas.jobs import Job
from schemas.judgement import Judgement, judge
from schemas.ladder import Accept, Again, DeadLetter, Hold, Position, Step, Stop, Verdict, advance
from schemas.pricing import Price, PriceBook, reservation
from schemas.records import DocumentState, Ending, Held, Intent, Lease, Outcome, Record, ResultKey, StoredAnswer
from tasks.completions import Completions
from tasks.drains import Draining, rest
from tasks.failpoints import reach
from tasks.grants import Grants, Reservation
from tasks.ledger.attempts import Fenced, Permit, Permitted, Withheld
from tasks.ledger.connection import PoisonValue
from tasks.ledger.runs import Run
from tasks.limiter import Limiter
from tasks.off_peak import Gate
from tasks.priming import Primer
from tasks.telemetry import Telemetry, UnderWay
from tasks.waits import Waits
from tasks.watch import Watch
from tasks.writer import Writer

#: A reply may be billed a little after its deadline, at the price of then.
PRICE_SLACK = timedelta(minutes=2)
#: What waited longer than this for money and its intent is not sent: its worst case may not be the worst any more.
SEND_WITHIN = PRICE_SLACK / 2


#: After so many replies in a row without usage, nobody knows what the run costs.
UNMETERED_LIMIT = 5
#: Replies of a model, which is billed by its usage.
_METERED = frozenset({Signal.ANSWERED, Signal.BLANK, Signal.TRUNCATED, Signal.INTERRUPTED, Signal.REFUSED})


@dataclass(frozen=True, slots=True)
class Work:
    """A document to finish, under a lease, from where its past attempts left it."""

    document: Document
    lease: Lease
    position: Position = field(default_factory=Position)
    rejected: RejectedAnswer | None = None


@dataclass
class Climber:
    """What every climb of a lane shares. `now` is the provider's clock, `tick` a monotonic one in seconds."""

    job: Job
    run: Run
    book: PriceBook
    price_ids: dict[str, int]
    completions: Completions
    grants: Grants
    intents: Writer[Intent, Permit]
    records: Writer[Record, bool]
    limiters: dict[str, Limiter]
    primers: dict[str, Primer]
    waits: Waits
    watch: Watch
    now: Callable[[], datetime]
    tick: Callable[[], float]
    gate: Gate
    #: What the lane tells an operator's own tools; None: nobody asked.
    telemetry: Telemetry | None = None
    breaker: Breaker = field(default_factory=Breaker)
    retry_budget: RetryBudget = field(default_factory=RetryBudget)
    backing_off: int = 0
    #: Attempts on their way now. A place in flight is taken earlier: its holder may wait for money or the breaker.
    in_flight: int = 0
    last_failure: str = ""
    #: Replies in a row that should have reported their usage and did not.
    unmetered: int = 0
    draining: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_draining(self) -> bool:
        """Whether no new attempt may be made."""
        return self.draining.is_set()

    async def finish(self, work: Work) -> None:
        """Take one document to its end.

        Raises Draining, LeaseLost, BudgetExhausted, ProviderStopped or UnknownPrice: the document then stays as
        its last recorded attempt left it.
        """
        if is_too_large(self.job, work.document.text):
            await self._end(work, end_of(work, DocumentState.DEAD_LETTER, reason="too_large"))
            return
        while True:
            await self._pass_gate()
            step, work = await self._attempt(work)
            if isinstance(step, Stop):
                raise _stopped(step.reason)
            if not isinstance(step, Again):
                return
            work = replace(work, position=step.position)

    async def _attempt(self, work: Work) -> tuple[Step, Work]:
        """One attempt, from its turn to its recorded outcome.

        None where the gate has shut in the meantime, or so few may be in flight now that this one has to queue again.
        """
        asked = work
        tier = self.job.ladder[work.position.rung].name
        primer = self.primers[tier]
        async with primer.turn(partial(rest, self.draining)) as is_priming, self.limiters[tier].place() as place:
            if self.is_draining:
                raise Draining
            await self._pass_breaker()  # only now: it may have opened while this one waited for its turn and place
            if is_priming and work.position.purpose is Purpose.ANSWER:
                work = replace(work, position=replace(work.position, purpose=Purpose.PRIMING))
            prepared_at = self.now()
            call, reserved, price = self._prepare(work)
            async with self.grants.reserved(reserved.worst, rung=work.position.rung) as reservation:
                if self.gate.look() or place.is_surplus:
                    return Again(asked.position), asked
                permit = await self._intend(work, reservation, price)
                if isinstance(permit, ResultKey):
                    await self._end(work, end_of(work, DocumentState.REUSED, of=permit))
                    return Accept(), work
                if abs(self.now() - prepared_at) > SEND_WITHIN:  # it waited, or the clock was put right
                    step, work = await self._give_up(work)
                    reservation.used = 0
                    return step, work
                began_s = self.tick()
                reply = await self._send(call)
                under_way = UnderWay(began_s, self.tick())
                place.leave(reply.signal, reply.ceiling)
                if is_priming:
                    primer.see(reply)
                self.watch.see(tier, reply, primer, is_priming=is_priming)
                self._note(reply, work.position)
                booking = self._book(reply, call, reserved)
                step, work = await self._record(work, reply, booking, under_way)
                reservation.used = booking.used  # only now is it durable: until then all of it counts as spent
        if booking.alarm:
            raise ProviderStopped(f"{booking.alarm}: the run stops so that nobody pays for a surprise")
        if self.unmetered >= UNMETERED_LIMIT:
            raise _stopped("no_usage")
        if isinstance(step, Again) and step.position.purpose is Purpose.RETRY:
            await self._back_off(reply, step.position)
        return step, work

    def _prepare(self, work: Work) -> tuple[Call, Reserved, Price]:
        """The next attempt's call, its worst case, and the price row that this is by."""
        document, position = work.document, work.position
        key = attempt_key(self.run.run_id, document.document_no, position.attempts + 1)
        call = compose(self.job, document.text, position, work.rejected, key)
        reserved, price = self._worst_case(call, max_tokens(self.job, position))
        return call, reserved, price

    async def _intend(self, work: Work, reservation: Reservation, price: Price) -> Permit:
        """Make the intent durable. Raises Draining or LeaseLost where the request may not leave."""
        document, position = work.document, work.position
        if self.is_draining:
            raise Draining
        intent = Intent(
            document.document_no,
            position.attempts + 1,
            work.lease,
            self.job.ladder[position.rung].name,
            position.purpose,
            position.reason,
            reservation.grant_id,
            self.price_ids[price.name],
            reservation.worst,
            document.text_digest,
        )
        reservation.used = reservation.worst  # should we be cancelled now, the intent may be durable
        permit = await self.intents.put(intent)
        if not isinstance(permit, Permitted):
            reservation.used = 0
        if isinstance(permit, Withheld):
            raise Draining
        if isinstance(permit, Fenced):
            raise LeaseLost(f"another lane owns shard {work.lease.shard_no} now")
        return permit

    async def _send(self, call: Call) -> Reply:
        reach("send.before")
        self.in_flight += 1
        try:
            reply = await self.completions.complete(call)
        finally:
            self.in_flight -= 1
        reach("send.after")
        return reply

    async def _give_up(self, work: Work) -> tuple[Step, Work]:
        """Record an attempt whose permit came too late: it never left, and says nothing about the provider."""
        now = self.now()
        reply = Reply(Signal.NOT_SENT, now, now, detail="not sent: prices may have changed while it waited")
        return await self._record(work, reply, Booking(None, 0, None))

    def _book(self, reply: Reply, call: Call, reserved: Reserved) -> Booking:
        """What the reply cost. A price row that the run did not register is as good as none."""
        booking = book_reply(reply, call.model, self.run.currency, reserved, self.book)
        if booking.price is None or booking.price.name in self.price_ids:
            return booking
        return Booking(None, None, reserved.worst, f"{booking.price.model} served, which is not on the job's ladder")

    async def _record(
        self, work: Work, reply: Reply, booking: Booking, under_way: UnderWay | None = None
    ) -> tuple[Step, Work]:
        """Judge the reply, and make what it came to durable."""
        judgement = judge(self.job, work.document, reply, work.position.rung)
        step = advance(work.position, reply.signal, judgement.verdict, len(self.job.ladder))
        outcome = self._outcome(work, reply, booking, judgement)
        record = Record(outcome, self._ending(work, step, judgement), self._held(work, step, judgement))
        try:
            is_kept = await self.records.put(record)
        except PoisonValue:
            step = DeadLetter("unstorable")
            bare = replace(reply, detail="", served_model=None, fingerprint=None, provider_id=None)
            outcome = self._outcome(work, bare, booking, Judgement(judgement.verdict))
            is_kept = await self.records.put(Record(outcome, self._ending(work, step, Judgement(None))))
        if self.telemetry is not None:
            kind = (self.job.ladder[work.position.rung].name, work.position.purpose, work.lease.shard_no)
            self.telemetry.see_attempt(*kind, reply, booking, under_way)
        if not is_kept:
            raise LeaseLost(f"another lane owns shard {work.lease.shard_no} now")
        if judgement.verdict is Verdict.INVALID_ANSWER:
            return step, replace(work, rejected=RejectedAnswer(reply.content or "", judgement.problems))
        return step, replace(work, rejected=None if reply.content else work.rejected)

    def _outcome(self, work: Work, reply: Reply, booking: Booking, judgement: Judgement) -> Outcome:
        is_stored = reply.content is not None and judgement.verdict in (
            Verdict.INVALID_ANSWER,
            Verdict.LOW_CONFIDENCE,
            Verdict.CALIBRATION,
            Verdict.HELD,
        )
        measured = judgement.measured
        return Outcome(
            work.document.document_no,
            work.position.attempts + 1,
            reply,
            judgement.verdict,
            self.price_ids[booking.price.name] if booking.price else None,
            booking.cost,
            booking.bound,
            is_escalated=work.position.is_entry and work.position.rung > 0,
            answer=StoredAnswer(
                reply.content or "",
                judgement.answer,
                measured.value if measured else None,
                measured.signal.value if measured else None,
            )
            if is_stored
            else None,
        )

    def _ending(self, work: Work, step: Step, judgement: Judgement) -> Ending | None:
        tier, measured = self.job.ladder[work.position.rung].name, judgement.measured
        match step:
            case Accept():
                return end_of(
                    work,
                    DocumentState.RESULT,
                    tier=tier,
                    attempt_no=work.position.attempts + 1,
                    answer=judgement.answer,
                    confidence=measured.value if measured else None,
                    confidence_signal=measured.signal.value if measured else None,
                )
            case DeadLetter(reason):
                return end_of(work, DocumentState.DEAD_LETTER, reason=reason, tier=tier)
            case Hold() | Again() | Stop():
                return None

    def _held(self, work: Work, step: Step, judgement: Judgement) -> Held | None:
        if not isinstance(step, Hold):
            return None
        confidence = judgement.measured.value if judgement.measured else None
        return Held(work.document.document_no, work.lease, confidence, work.position.attempts + 1)

    async def _end(self, work: Work, ending: Ending) -> None:
        if not await self.records.put(Record(ending=ending)):
            raise LeaseLost(f"another lane owns shard {work.lease.shard_no} now")

    def _worst_case(self, call: Call, output_tokens: int) -> tuple[Reserved, Price]:
        """The most the call can cost, at the dearest price that may hold until its deadline."""
        start, input_tokens = self.now(), input_bound(call)
        price = self.book.dearest(
            call.model,
            self.run.currency,
            start - PRICE_SLACK,
            start + timedelta(seconds=call.deadline_s) + PRICE_SLACK,
            input_bound=input_tokens,
            max_tokens=output_tokens,
        )
        return Reserved(reservation(price, input_tokens, output_tokens), output_tokens), price

    def _note(self, reply: Reply, position: Position) -> None:
        """Let the brakes know what came of an attempt."""
        self.breaker.note(reply.signal, self.tick())
        if reply.usage is not None:
            is_answered = reply.signal is Signal.ANSWERED
            self.retry_budget.succeed(is_answered_retry=is_answered and position.purpose is Purpose.RETRY)
            self.unmetered = 0
        elif reply.signal in _METERED and reply.http_status == 200:
            self.unmetered += 1

    async def _pass_gate(self) -> None:
        """Wait out the peak hours, where the run is to. What was known of the provider is old news afterwards."""
        if await self.gate.wait():
            self.breaker.forget_silence()
            for primer in self.primers.values():
                primer.cool()

    async def _pass_breaker(self) -> None:
        while (wait_s := self.breaker.wait_s(self.tick())) > 0:
            await rest(self.draining, wait_s)
        if verdict := self.breaker.verdict(self.tick()):
            raise _stopped(verdict)
        if self.unmetered >= UNMETERED_LIMIT:
            raise _stopped("no_usage")

    async def _back_off(self, reply: Reply, position: Position) -> None:
        """Wait before a retry: as long as the failure asks for, and as the run's retry budget demands."""
        self.backing_off += 1
        self.last_failure = reply.signal.value.replace("_", " ")
        try:
            await rest(self.draining, self.waits.seconds(reply, position.retries))
            while (wait_s := self.retry_budget.take(reply.signal, self.tick())) > 0:
                await rest(self.draining, wait_s)
        finally:
            self.backing_off -= 1


class EndDetails(TypedDict, total=False):
    """What an ending says besides its document and state: the fields of `Ending` of the same names."""

    reason: str
    tier: str
    attempt_no: int
    answer: dict[str, Any] | None
    confidence: float | None
    confidence_signal: str | None
    of: ResultKey


def end_of(work: Work, state: DocumentState, **details: Unpack[EndDetails]) -> Ending:
    """The terminal row of this document."""
    document = work.document
    return Ending(
        document.document_no,
        document.document_id,
        work.lease,
        state,
        text_digest=document.text_digest,
        **details,
    )


_ADVICE = {
    "unauthorised": "the provider refuses the key or the model (401, 403, 404): check DEEPSEEK_API_KEY and the "
    "job's ladder, then run the same command",
    "no_balance": "the account has no balance (402): top it up, then run the same command",
    "provider_down": "the provider did not answer for ten minutes: try the same command later",
    "no_usage": f"{UNMETERED_LIMIT} replies in a row came without usage, so that nobody knows what they cost: check "
    "that DEEPSEEK_BASE_URL is an API that reports usage with cache hits, then run the same command",
    "requests_rejected": "the provider rejects our requests (400, 413, 422), more than documents can explain: see "
    "`farthing audit` for the reasons, mend the job, then run the same command",
}


def _stopped(reason: str) -> ProviderStopped:
    """The error that ends the lane's work, with what to do next."""
    advice = _ADVICE.get(reason, reason)
    return KeyRefused(advice) if reason == "unauthorised" else ProviderStopped(advice)
