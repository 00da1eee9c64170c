"""One chat request on its way: count, cache, wait, bill, reply. Mishaps bend these steps, never their order."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from sandbox.account import Account
from sandbox.bill import Bill, BillLine
from sandbox.clock import Clock
from sandbox.drafts import Author, Draft, Question, reason
from sandbox.latency import Latency
from sandbox.logprobs import encode_logprobs
from sandbox.prefixcache import PrefixCache, chain
from sandbox.tariff import charge_at
from sandbox.tokens import WIDTH, Encodings, encode_chat, encode_turn_end, pieces
from sandbox.wire import MODELS, Answered, Ask, Usage, check_context

JSON = "application/json"


@dataclass
class House:
    """What all requests share. `blank_s` is the real time between blank lines while a request is queued."""

    account: Account
    bill: Bill
    clock: Clock
    author: Author
    encode: Encodings
    cache: PrefixCache
    latency: Latency
    basis: str = "completion"
    blank_s: float = 10.0
    fingerprint: str = "fp_sandbox_1"
    served: int = 0


class Exchange:
    """One request that holds a slot. `work`, then `charge`, then `send`."""

    def __init__(self, house: House, request: web.Request, ask: Ask, attempt: str) -> None:
        self.house = house
        self.request = request
        self.ask = ask
        self.attempt = attempt
        self.mishap: str | None = None
        self.served_model = ask.model
        self.fingerprint = house.fingerprint
        self.arrived = self.at = house.clock.second()
        house.served += 1
        self.provider_id = f"sandbox-{self.arrived:x}-{house.served:x}"
        self._stream: web.StreamResponse | None = None
        self._is_charged = False

    @property
    def question(self) -> Question:
        ask = self.ask
        return Question(ask.sha, ask.document, ask.tier, ask.effort, ask.system, ask.turns)

    async def answer(self) -> web.StreamResponse:
        """The undisturbed course."""
        await self.work()
        self.charge()
        return await self.send(self.reply().on_wire())

    def prepare(self, draft: Draft | None = None) -> None:
        """Count the prompt, look it up in the cache, and settle the answer under the request's limits."""
        ask, house = self.ask, self.house
        prompt = encode_chat(house.encode, ask.messages, ask.effort is not None)
        self._tokens = len(prompt) // WIDTH
        check_context(self._tokens, ask)
        self.draft = draft or house.author.write(self.question)
        self._limit()
        self.usage = self._look_up(prompt)

    def _limit(self) -> None:
        """Cut the answer at max_tokens, thinking first; then let JSON mode blank what is not JSON."""
        draft, limit = self.draft, self.ask.max_tokens
        self.reasoning = min(draft.reasoning, limit)
        self.written = min(len(draft.ids) // WIDTH, limit - self.reasoning)
        self.content = draft.content
        self.finish_reason = "tool_calls" if self.ask.tool else "stop"
        if self.reasoning + self.written < draft.reasoning + len(draft.ids) // WIDTH:
            self.content = b"".join(pieces(draft.content)[: self.written]).decode(errors="ignore")
            self.finish_reason = "length"
        elif self.ask.is_json and not draft.is_json:
            self.content = " " * max(1, self.written)

    def _look_up(self, prompt: bytes) -> Usage:
        cache, ask, now = self.house.cache, self.ask, time.monotonic()
        namespace = (ask.user_id, ask.model, ask.effort)
        asked = chain(prompt, namespace)
        hit = cache.look_up(asked, now)
        cache.learn(asked, now)
        cache.learn_answered(chain(prompt + encode_turn_end(self.draft.ids), namespace, asked), now)
        return Usage(hit, self._tokens - hit, self.reasoning + self.written, self.reasoning)

    async def work(self) -> None:
        """Prepare and take the time it takes. A client that leaves meanwhile is billed all the same."""
        self.prepare()
        wait = self.house.latency.draw(self.ask.model, self.usage.output)
        try:
            if wait.queued:
                await self._queue(wait.queued)
            if wait.working:
                await asyncio.sleep(wait.working)
        except (asyncio.CancelledError, ConnectionError):
            self.charge("aborted")
            raise

    async def _queue(self, seconds: float) -> None:
        """Wait for a turn; long waits send blank lines, and so send the headers before the work is done."""
        while seconds > self.house.blank_s:
            await asyncio.sleep(self.house.blank_s)
            seconds -= self.house.blank_s
            await (await self.open_stream()).write(b"\n")
        await asyncio.sleep(seconds)

    async def open_stream(self) -> web.StreamResponse:
        if self._stream is None:
            self.at = self.house.clock.second()
            self._stream = web.StreamResponse(headers=self.headers())
            self._stream.enable_chunked_encoding()
            await self._stream.prepare(self.request)
        return self._stream

    def headers(self, content_type: str = JSON) -> dict[str, str]:
        return {"Date": self.house.clock.http_date(self.at), "Content-Type": content_type}

    def charge(
        self,
        delivery: str = "sent",
        *,
        status: int = 200,
        usage: Usage | None = None,
        finish_reason: str | None = None,
    ) -> None:
        """Bill the attempt, once, at the second that the Date header tells or told (or of arrival, by the basis)."""
        if self._is_charged:
            return
        self._is_charged = True
        if self._stream is None:
            self.at = self.house.clock.second()
        if delivery == "sent" and (self.request.transport is None or self.request.transport.is_closing()):
            delivery = "aborted"
        used = usage or self.usage
        line = self._line(used, delivery, status)
        self.house.bill.append(replace(line, finish_reason=finish_reason or self.finish_reason))

    def _line(self, used: Usage, delivery: str, status: int) -> BillLine:
        at = datetime.fromtimestamp(self.at if self.house.basis == "completion" else self.arrived, UTC)
        currency = self.house.bill.currency
        charge = charge_at(MODELS.get(self.served_model, self.ask.model), currency, at)
        price = charge.price
        return BillLine(
            attempt=self.attempt,
            user_id=self.ask.user_id,
            provider_id=self.provider_id,
            model=self.ask.named,
            served_model=self.served_model,
            at=at.strftime("%Y-%m-%dT%H:%M:%SZ"),
            band=charge.band,
            hit=used.hit,
            miss=used.miss,
            output=used.output,
            reasoning=used.reasoning,
            hit_pico=price.hit,
            miss_pico=price.miss,
            output_pico=price.output,
            cost_pico=price.cost(used.hit, used.miss, used.output),
            currency=currency,
            status=status,
            finish_reason=self.finish_reason,
            delivery=delivery,
            mishap=self.mishap,
        )

    def reply(self) -> Answered:
        """The body as it should be. Call it after `charge`, which settles its instant."""
        return Answered(
            self.provider_id,
            self.at,
            self.served_model,
            self.fingerprint,
            self._message(),
            self._logprobs(),
            self.finish_reason,
            self.usage,
        )

    def _message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.ask.effort is not None:
            message["reasoning_content"] = reason(self.reasoning)
        if self.ask.tool is not None:
            call = {"name": self.ask.tool.get("name"), "arguments": self.content}
            message["content"] = ""
            message["tool_calls"] = [{"index": 0, "id": "call_0", "type": "function", "function": call}]
        return message

    def _logprobs(self) -> bytes:
        if self.ask.top_logprobs is None:
            return b"null"
        return encode_logprobs(self.draft.scored()[: self.written], self.ask.top_logprobs)

    async def send(
        self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> web.StreamResponse:
        """Send a body, after the blank lines where some have gone before it."""
        if self._stream is not None:
            await self._stream.write(body)
            await self._stream.write_eof()
            return self._stream
        return web.Response(body=body, status=status, headers=headers or self.headers())

    def raw(self, body: bytes) -> bytes:
        """A whole 200 reply as it would leave the socket, for those who cut it."""
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
        lines = "".join(f"{name}: {value}\r\n" for name, value in self.headers().items())
        return f"{head}{lines}\r\n".encode() + body

    def hang_up(self, last_words: bytes = b"", *, is_reset: bool = False) -> web.Response:
        """Write what is given past the HTTP layer and close, politely or by a reset."""
        transport = self.request.transport
        if transport is not None and not transport.is_closing():
            transport.write(last_words)
            if is_reset:
                peer = transport.get_extra_info("socket")
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                transport.abort()
            else:
                transport.close()
        return web.Response()
