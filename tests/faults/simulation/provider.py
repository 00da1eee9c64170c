"""The simulated provider: its replies by chance, and a bill of its own by the sandbox's tariff."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from random import Random

from sandbox.tariff import charge_at
from schemas.attempts import Call, Reply, Signal, Token, Usage
from tests.faults.simulation.model import Key
from tests.faults.simulation.world import World

COLOURS = ("red", "green", "blue", "black", "white")


@dataclass(frozen=True, slots=True)
class Charged:
    """One line of the bill: what the provider charges for an attempt, by its own tariff."""

    cost: int
    at: float
    lane_id: int
    model: str


@dataclass
class Provider:
    """The provider: its replies by chance, its own bill, and how many of each lane's requests it has at once."""

    world: World
    bill: dict[Key, Charged] = field(default_factory=dict)
    sent: dict[Key, float] = field(default_factory=dict)
    in_flight: Counter[tuple[int, str]] = field(default_factory=Counter)
    peaks: Counter[tuple[int, str]] = field(default_factory=Counter)
    #: By model, the most at once of all lanes that the ledger took for alive.
    together: Counter[str] = field(default_factory=Counter)
    #: Requests by model that had the prefix: the third hits.
    warmed: Counter[str] = field(default_factory=Counter)

    async def answer(self, call: Call, lane_id: int) -> Reply:
        key = _key(call.attempt_key)
        self._admit(key, lane_id)
        place = (lane_id, call.model)
        self.in_flight[place] += 1
        self.peaks[place] = max(self.peaks[place], self.in_flight[place])
        lanes = self.world.model.lanes
        alive = [
            n for (lane, model), n in self.in_flight.items() if model == call.model and not lanes[lane].ended_because
        ]
        self.together[call.model] = max(self.together[call.model], sum(alive))
        try:
            return await self._reply(call, key, lane_id)
        finally:
            self.in_flight[place] -= 1

    def _admit(self, key: Key, lane_id: int) -> None:
        """Note a request, and whether it may be here at all (G4)."""
        if key in self.sent:
            self.world.problems.append(f"attempt {key} was sent twice")
        self.sent[key] = self.world.clock()
        intent = self.world.model.intents.get(key)
        if intent is None or intent[1] != lane_id:
            self.world.problems.append(f"attempt {key} was sent by lane {lane_id} without an intent of its own")

    async def _reply(self, call: Call, key: Key, lane_id: int) -> Reply:
        chance, clock = self.world.chance, self.world.clock
        kind, latency_s = self._choose(), min(0.2 + chance.expovariate(2), call.deadline_s)
        usage = self._count(call, chance)
        sent_at, ended_at = self.world.now(), self.world.now() + timedelta(seconds=latency_s)
        model = {"other_model": "deepseek-v4-pro", "foreign_model": "gpt-5.5"}.get(kind, call.model)
        if kind == "too_much_output":
            usage = replace(usage, output=_allowed(call) + 1)
        if kind in BILLED or (kind in PERHAPS_BILLED and chance.random() < 0.5):
            cost = 0 if model == "gpt-5.5" else _charge(model, usage, ended_at)
            self.bill[key] = Charged(cost, clock(), lane_id, model)
        await asyncio.sleep(call.deadline_s if kind == "slow" else latency_s)
        return make_reply(kind, key, usage, model, sent_at, ended_at, chance)

    def _choose(self) -> str:
        world = self.world
        if world.clock() < world.storm_until and world.chance.random() < 0.9:
            return "rate_limited"
        for kind, share in world.plan.replies.items():
            if world.happens(share, kind):
                return kind
        return "good"

    def _count(self, call: Call, chance: Random) -> Usage:
        """Tokens: a quarter of the bytes, the prefix from the cache once two requests had it."""
        total = sum(len(message.content.encode()) for message in call.messages) // 4 + 8
        prefix = len(call.messages[0].content.encode()) // 4 // 128 * 128
        self.warmed[call.model] += 1
        hit = prefix if self.warmed[call.model] > 2 else 0
        return Usage(hit, total - hit, chance.randint(4, min(20, _allowed(call))))


#: Replies of a model that did its work; and those after which nobody can tell.
BILLED = frozenset(
    {
        "good",
        "unsure",
        "invalid",
        "blank",
        "truncated",
        "interrupted",
        "refused",
        "other_model",
        "foreign_model",
        "unmetered",
        "impossible_usage",
        "too_much_output",
        "poisonous",
    }
)
PERHAPS_BILLED = frozenset({"failed", "lost", "slow", "malformed"})
#: Replies without usage: signal and HTTP status.
BARE = {
    "interrupted_unbilled": (Signal.INTERRUPTED, 200),
    "refused_unread": (Signal.REFUSED, 400),
    "rate_limited": (Signal.RATE_LIMITED, 429),
    "unavailable": (Signal.UNAVAILABLE, 503),
    "failed": (Signal.FAILED, 504),
    "not_sent": (Signal.NOT_SENT, None),
    "lost": (Signal.LOST, None),
    "slow": (Signal.LOST, None),
    "malformed": (Signal.MALFORMED, 200),
    "rejected": (Signal.REJECTED, 400),
    "unauthorised": (Signal.UNAUTHORISED, 401),
    "no_balance": (Signal.NO_BALANCE, 402),
}
SIGNALS = {
    "blank": Signal.BLANK,
    "truncated": Signal.TRUNCATED,
    "interrupted": Signal.INTERRUPTED,
    "refused": Signal.REFUSED,
}


def make_reply(
    kind: str, key: Key, usage: Usage, model: str, sent_at: datetime, ended_at: datetime, chance: Random
) -> Reply:
    """What tasks.completions would make of such a reply."""
    if kind in BARE:
        signal, status = BARE[kind]
        reply = Reply(signal, sent_at, ended_at, http_status=status)
        if kind == "rate_limited":
            ceiling, wait_s = chance.choice((None, 2, 5)), chance.choice((None, 3.0))
            return replace(reply, ceiling=ceiling, retry_after_s=wait_s)
        return reply
    content = f'{{"colour":"{COLOURS[key[1] % len(COLOURS)]}"}}'
    if kind == "invalid":
        content = content.replace("colour", "color")
    logprob = -3.0 if kind == "unsure" else -0.001
    has_usage = kind not in ("unmetered", "impossible_usage")
    return Reply(
        SIGNALS.get(kind, Signal.ANSWERED),
        sent_at,
        ended_at,
        http_status=200,
        content=None if kind in SIGNALS else content,
        tokens=None if kind in SIGNALS else tuple(Token(piece, logprob) for piece in _pieces(content)),
        usage=usage if has_usage else None,
        usage_fault="hit + miss is not the prompt" if kind == "impossible_usage" else None,
        served_model=model,
        provider_id="poison" if kind == "poisonous" else "fine",
    )


def _pieces(content: str) -> list[str]:
    head, colour, tail = content.partition(content.split('"')[3])
    return [head, colour, tail]


def _charge(model: str, usage: Usage, instant: datetime) -> int:
    return charge_at(model, "USD", instant).price.cost(usage.hit, usage.miss, usage.output)


def _allowed(call: Call) -> int:
    allowed = call.parameters["max_tokens"]
    assert isinstance(allowed, int)
    return allowed


def _key(name: str) -> Key:
    run_id, number, attempt_no = map(int, name.split("."))
    return run_id, number, attempt_no
