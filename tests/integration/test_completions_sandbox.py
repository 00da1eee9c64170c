"""The door to the model against the emulated DeepSeek: every mishap it knows, and the bill of what went well."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from aiohttp import web

from sandbox.bill import read_lines
from sandbox.deepseek import DeepSeek, build, read_options, start
from sandbox.mishaps import KINDS
from sandbox.tariff import FLASH, PRO
from schemas.attempts import Call, Message, Signal
from schemas.money import Currency
from tasks.completions import Completions

CLOCK = datetime(2026, 9, 25, 0, 10, tzinfo=UTC)
SCHEMA = '{"properties": {"category": {"enum": ["a", "b"], "type": "string"}}, "required": ["category"]}'
PREFIX = f"Classify. Answer in json.\nJSON Schema:\n{SCHEMA}"

#: What the design's failure table makes of each mishap; every other one is answered.
SIGNALS = {
    Signal.RATE_LIMITED: {"rate_limited", "rate_limited_bare"},
    Signal.REJECTED: {"400", "413", "422"},
    Signal.UNAUTHORISED: {"401", "403", "404"},
    Signal.NO_BALANCE: {"402"},
    Signal.REFUSED: {"content_exists_risk", "content_filter"},
    Signal.UNAVAILABLE: {"500", "502", "503", "504", "529", "502_html", "503_html"},
    Signal.FAILED: {"500_html", "504_html"},
    Signal.LOST: {"hang", "blank_lines", "reset_before", "reset_after", "eof", "eof_after_headers", "cut", "trickle"}
    | {"empty", "not_json", "gzip_bomb", "huge_body", "bad_utf8", "deep_nesting"},
    Signal.MALFORMED: {"html", "list", "null", "string", "error_object"},
    Signal.BLANK: {"no_choices", "empty_choices", "null_content", "blank"},
    Signal.TRUNCATED: {"length"},
    Signal.INTERRUPTED: {"insufficient_system_resource", "aborted"},
}
EXPECTED = {kind: signal for signal, kinds in SIGNALS.items() for kind in kinds}


@asynccontextmanager
async def sandbox(home: Path) -> AsyncIterator[tuple[DeepSeek, str]]:
    server = build(read_options([f"--home={home}", "--time-scale=0", f"--clock={CLOCK:%Y-%m-%dT%H:%M:%SZ}"]))
    runner = await start(server.app())
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield server, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
        server.house.bill.close()


def door(url: str) -> Completions:
    return Completions(url, "sk-sandbox-1", ceiling=4, size_cap=256 * 1024, send_attempt_key=True)


def call(attempt_key: str, deadline_s: float = 5.0) -> Call:
    parameters = {"thinking": {"type": "disabled"}, "max_tokens": 200, "logprobs": True}
    parameters["response_format"] = {"type": "json_object"}
    return Call(FLASH, (Message("system", PREFIX), Message("user", "a text")), parameters, deadline_s, attempt_key)


@pytest.mark.parametrize("kind", sorted(KINDS))
async def test_every_mishap_of_the_sandbox_has_its_signal(tmp_path: Path, kind: str) -> None:
    async with sandbox(tmp_path) as (server, url), door(url) as completions:
        server.mishaps.add([{"kind": kind, "match": "7."}])
        is_endless = kind in ("hang", "blank_lines", "trickle")
        reply = await completions.complete(call("7.1.1", deadline_s=0.3 if is_endless else 5.0))
        assert reply.signal is EXPECTED.get(kind, Signal.ANSWERED), reply.detail
        assert (await completions.complete(call("8.1.1"))).signal is Signal.ANSWERED


async def test_what_is_read_is_what_is_billed(tmp_path: Path) -> None:
    async with sandbox(tmp_path) as (server, url), door(url) as completions:
        reply = await completions.complete(call("7.1.1"))
        line = next(iter(read_lines(server.house.bill.path)))
    assert reply.usage is not None
    assert (reply.usage.hit, reply.usage.miss, reply.usage.output) == (line["hit"], line["miss"], line["output"])
    assert reply.tokens is not None
    assert "".join(token.text for token in reply.tokens) == reply.content
    assert timedelta(0) <= reply.completed_at - CLOCK < timedelta(minutes=5)


async def test_the_account_the_models_and_the_clock_are_read(tmp_path: Path) -> None:
    async with sandbox(tmp_path) as (_, url), door(url) as completions:
        balance = await completions.balance()
        assert (balance.currency, balance.amount.decimal, balance.is_available) == (Currency.USD, 1000, True)
        assert await completions.models() == (FLASH, PRO)
        offset = await completions.clock_offset()
        assert abs(datetime.now(UTC) + offset - CLOCK) < timedelta(minutes=5)
