"""The emulated DeepSeek over a real socket: the protocol by openai's client, the faults by a raw one."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import math
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import aiohttp
import openai
import orjson
import pytest

from sandbox.bill import read_bill, read_lines
from sandbox.deepseek import DeepSeek, build, read_options, start
from sandbox.errormodel import ErrorModel
from sandbox.mishaps import KINDS
from sandbox.tariff import FLASH, PRO

PREFIX = "Classify the licence. Answer in json. " + "Weigh each clause with care and decide. " * 80
SCHEMA = {
    "properties": {
        "category": {"enum": ["Copyleft", "Permissive"], "type": "string"},
        "confidence": {"type": "number"},
    },
    "required": ["category"],
}
SYSTEM = f"{PREFIX}\nJSON Schema:\n{json.dumps(SCHEMA)}"
OFF_PEAK = "2026-11-25T00:10:00Z"


@dataclass
class Sandbox:
    """A server of this test's own, and a session that has its key."""

    server: DeepSeek
    url: str
    home: Path
    http: aiohttp.ClientSession

    async def ask(self, text: str = "a licence", attempt: str = "1.1.1", **more: Any) -> aiohttp.ClientResponse:
        body: dict[str, Any] = {
            "model": FLASH,
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}],
            "thinking": {"type": "disabled"},
            "max_tokens": 200,
            "user_id": "job-test",
            "response_format": {"type": "json_object"},
        }
        body |= more
        return await self.http.post(f"{self.url}/chat/completions", json=body, headers={"X-Attempt": attempt})

    async def answer(self, text: str = "a licence", **more: Any) -> dict[str, Any]:
        async with await self.ask(text, **more) as reply:
            assert reply.status == 200, await reply.text()
            return dict(orjson.loads(await reply.read()))

    async def post(self, path: str, body: object) -> int:
        async with self.http.post(f"{self.url}/sandbox/{path}", json=body) as reply:
            return reply.status

    def bill(self) -> list[dict[str, Any]]:
        return list(read_lines(self.server.house.bill.path))


@asynccontextmanager
async def serving(home: Path, *flags: str) -> AsyncIterator[Sandbox]:
    server = build(read_options([f"--home={home}", "--time-scale=0", f"--clock={OFF_PEAK}", *flags]))
    runner = await start(server.app())
    site = aiohttp.web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer sk-sandbox-1"}) as http:
        yield Sandbox(server, url, home, http)
    await runner.cleanup()
    server.house.bill.close()


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[Sandbox]:
    async with serving(tmp_path) as running:
        yield running


async def test_openais_client_gets_a_typed_answer(sandbox: Sandbox) -> None:
    async with openai.AsyncOpenAI(
        base_url=sandbox.url, api_key="sk-sandbox", max_retries=0, http_client=openai.DefaultAioHttpClient()
    ) as client:
        reply = await client.chat.completions.create(
            model="deepseek-v4-flash",
            messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": "text"}],
            max_tokens=100,
            logprobs=True,
            top_logprobs=20,
            extra_body={"thinking": {"type": "disabled"}, "user_id": "job-x"},
        )
        assert (reply.model, reply.system_fingerprint) == (FLASH, "fp_sandbox_1")
        content = reply.choices[0].message.content
        assert content is not None
        assert json.loads(content)["category"] in ("Copyleft", "Permissive")
        tokens = reply.choices[0].logprobs
        assert tokens is not None
        assert tokens.content is not None
        assert "".join(token.token for token in tokens.content) == content
        assert 0 < math.exp(sum(token.logprob for token in tokens.content)) < 1
        assert reply.usage is not None
        assert reply.usage.prompt_tokens_details is not None
        assert reply.usage.prompt_tokens_details.cached_tokens == 0
        assert [model.id async for model in client.models.list()] == [FLASH, PRO]
        with pytest.raises(openai.BadRequestError, match="Model Not Exist"):
            await client.chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "x"}])


async def test_thinking_is_on_unless_it_is_disabled(sandbox: Sandbox) -> None:
    thought = await sandbox.answer(thinking=None, max_tokens=None)
    usage = thought["usage"]
    assert thought["choices"][0]["message"]["reasoning_content"]
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]
    assert sandbox.bill()[0]["output"] == usage["completion_tokens"]
    for off in ({"thinking": {"type": "disabled"}}, {"thinking": None, "reasoning_effort": "none"}):
        plain = await sandbox.answer(**off)
        assert "reasoning_content" not in plain["choices"][0]["message"]


async def test_reasoning_counts_in_max_tokens(sandbox: Sandbox) -> None:
    reply = await sandbox.answer(thinking={"type": "enabled"}, max_tokens=10)
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["choices"][0]["message"]["content"] == ""
    assert reply["usage"]["completion_tokens"] == 10


async def test_a_shared_prefix_misses_misses_and_hits(sandbox: Sandbox) -> None:
    usages = [(await sandbox.answer(f"{name} is another document"))["usage"] for name in ("B", "C", "D")]
    hits = [usage["prompt_cache_hit_tokens"] for usage in usages]
    assert hits[:2] == [0, 0]
    assert hits[2] > 0
    assert hits[2] % 128 == 0
    for usage in usages:
        assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_cache_hit_tokens"]
    other = await sandbox.answer("E is another document", user_id="job-other")
    assert other["usage"]["prompt_cache_hit_tokens"] == 0


@pytest.mark.parametrize(
    ("clock", "band", "pico"),
    [
        ("2026-11-25T00:10:00Z", "off-peak", (3_000, 150_000, 600_000)),
        ("2026-11-25T01:10:00Z", "peak", (6_000, 300_000, 1_200_000)),
        ("2026-11-28T01:10:00Z", "off-peak", (3_000, 150_000, 600_000)),  # Saturday
        ("2026-10-02T01:10:00Z", "off-peak", (3_000, 150_000, 600_000)),  # National Day
        ("2026-05-02T01:10:00Z", "flat", (2_800, 140_000, 280_000)),
    ],
)
async def test_the_bill_is_tokens_times_the_prices_of_the_date_header(
    sandbox: Sandbox, clock: str, band: str, pico: tuple[int, int, int]
) -> None:
    assert await sandbox.post("clock", {"now": clock}) == 200
    for text in ("B", "C", "D"):
        async with await sandbox.ask(text) as reply:
            usage = orjson.loads(await reply.read())["usage"]
            told = parsedate_to_datetime(reply.headers["Date"])
    line = sandbox.bill()[-1]
    counts = (usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"], usage["completion_tokens"])
    assert counts[0] > 0
    assert line["cost_pico"] == sum(count * price for count, price in zip(counts, pico, strict=True))
    assert (line["band"], line["at"]) == (band, told.strftime("%Y-%m-%dT%H:%M:%SZ"))
    async with sandbox.http.get(f"{sandbox.url}/sandbox/bill") as reply:
        total = await reply.json()
    assert (
        total["cost_pico"] == sum(line["cost_pico"] for line in sandbox.bill()) == read_bill(sandbox.home).cost_pico
    )


async def test_a_clock_without_a_price_is_refused(sandbox: Sandbox) -> None:
    assert await sandbox.post("clock", {"now": "2026-01-01T00:00:00Z"}) == 400
    assert await sandbox.post("clock", {"now": "2031-01-01T02:00:00Z"}) == 400


@pytest.mark.parametrize("header", [None, "Bearer sk-wrong-key", "sk-sandbox"])
async def test_a_wrong_key_is_refused(sandbox: Sandbox, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    async with aiohttp.ClientSession(headers=headers) as http:
        for method, path in (("POST", "/v1/chat/completions"), ("GET", "/user/balance")):
            async with http.request(method, sandbox.url + path, json={}) as reply:
                assert reply.status == 401
                error = (await reply.json())["error"]
    assert error["type"] == "authentication_error"
    assert "wrong-key" not in error["message"]


@pytest.mark.parametrize(
    ("status", "words", "body"),
    [
        (400, "Model Not Exist", {"model": "deepseek-v9"}),
        (422, "model", {"model": 7}),
        (422, "messages", {"messages": "hello"}),
        (400, "Empty", {"messages": []}),
        (422, "role", {"messages": [{"role": "robot", "content": "x"}]}),
        (422, "content", {"messages": [{"role": "user", "content": 5}]}),
        (422, "thinking", {"thinking": {"type": "maybe"}}),
        (422, "reasoning_effort", {"reasoning_effort": "extreme"}),
        (400, "max_tokens", {"max_tokens": 393_217}),
        (400, "max_tokens", {"max_tokens": 0}),
        (422, "max_tokens", {"max_tokens": "many"}),
        (422, "temperature", {"temperature": "hot"}),
        (400, "temperature", {"temperature": 3}),
        (400, "json", {"messages": [{"role": "user", "content": "no such word"}]}),
        (400, "response_format", {"response_format": {"type": "json_schema"}}),
        (400, "stream", {"stream": True}),
        (400, "logprobs", {"logprobs": True, "thinking": {"type": "enabled"}}),
        (400, "top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        (400, "top_logprobs", {"top_logprobs": 5}),
    ],
)
async def test_a_bad_request_is_refused_in_words_and_not_billed(
    sandbox: Sandbox, status: int, words: str, body: dict[str, Any]
) -> None:
    async with await sandbox.ask(**body) as reply:
        assert reply.status == status
        error = orjson.loads(await reply.read())["error"]
    assert words in error["message"]
    assert sandbox.bill() == []


async def test_more_than_the_context_is_refused(tmp_path: Path) -> None:
    body = {"model": FLASH, "messages": [{"role": "user", "content": "word " * 900_000}]}
    async with (
        serving(tmp_path, "--tokens=fast") as sandbox,
        sandbox.http.post(f"{sandbox.url}/v1/chat/completions", data=io.BytesIO(orjson.dumps(body))) as reply,
    ):
        assert reply.status == 400
        assert "maximum context length is 1048576" in await reply.text()


async def test_max_tokens_cuts_the_answer(sandbox: Sandbox) -> None:
    whole = (await sandbox.answer())["choices"][0]["message"]["content"]
    reply = await sandbox.answer(max_tokens=4, logprobs=True)
    choice = reply["choices"][0]
    assert choice["finish_reason"] == "length"
    assert whole.startswith(choice["message"]["content"])
    assert len(choice["logprobs"]["content"]) == reply["usage"]["completion_tokens"] == 4


async def test_json_mode_replaces_prose_by_spaces(sandbox: Sandbox) -> None:
    model = ErrorModel(0.0, 1.0, 0.0, (14, 1.2), (4, 2.2))
    sandbox.server.house.author.models = {"flash": model}
    found = set()
    for i in range(40):
        as_json = (await sandbox.answer(str(i)))["choices"][0]
        as_text = (await sandbox.answer(str(i), response_format=None))["choices"][0]
        if not as_text["message"]["content"].startswith("{"):
            assert as_json["message"]["content"].strip() == ""
            assert as_json["message"]["content"] != ""
            assert as_json["finish_reason"] == "stop"
            found.add(i)
    assert found


async def test_a_repair_message_continues_the_conversation(sandbox: Sandbox) -> None:
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "a licence " * 200},
        {"role": "assistant", "content": "{}"},
        {"role": "user", "content": "That is not valid; answer again."},
    ]
    await sandbox.answer(messages=messages[:2])
    repaired = await sandbox.answer(messages=messages)
    assert repaired["usage"]["prompt_cache_hit_tokens"] > 800
    assert json.loads(repaired["choices"][0]["message"]["content"])["category"]


async def test_a_strict_function_is_answered_by_a_call(sandbox: Sandbox) -> None:
    tool = {"type": "function", "function": {"name": "classify", "strict": True, "parameters": SCHEMA}}
    choice = {"type": "function", "function": {"name": "classify"}}
    reply = await sandbox.answer(tools=[tool], tool_choice=choice, response_format=None)
    assert reply["choices"][0]["finish_reason"] == "tool_calls"
    called = reply["choices"][0]["message"]["tool_calls"][0]["function"]
    assert set(json.loads(called["arguments"])) == {"category", "confidence"}
    async with await sandbox.ask(tools=[tool], tool_choice=choice, thinking=None) as refused:
        assert refused.status == 400


async def test_the_ceiling_is_told_in_the_body_only_and_falls_with_the_balance(tmp_path: Path) -> None:
    async with serving(tmp_path, "--time-scale=1", "--reply=0.3") as sandbox:
        await sandbox.post("balance", {"balance": "0.156"})
        replies = await asyncio.gather(*(sandbox.ask(str(i)) for i in range(60)))
        bodies = [await reply.text() for reply in replies if reply.status == 429]
        assert [reply.status for reply in replies].count(200) == 39
        assert all("exceeds your concurrency limit of 39 based on your remaining balance" in body for body in bodies)
        assert sandbox.server.house.account.peak[FLASH] == 39
        assert len(sandbox.bill()) == 39


async def test_limits_are_set_while_it_runs(tmp_path: Path) -> None:
    async with serving(tmp_path, "--time-scale=1", "--reply=0.2") as sandbox:
        assert await sandbox.post("limits", {FLASH: 2}) == 200
        replies = await asyncio.gather(*(sandbox.ask(str(i)) for i in range(5)))
        assert sorted(reply.status for reply in replies) == [200, 200, 429, 429, 429]
        text = " ".join([await reply.text() for reply in replies])
        assert "exceeds your concurrency limit of 2." in text
        assert sandbox.server.house.account.peak[FLASH] == 2
        await sandbox.post("limits", {})
        assert sandbox.server.house.account.peak[FLASH] == 0


async def test_the_balance_falls_by_what_is_billed_and_nothing_is_sold_on_credit(tmp_path: Path) -> None:
    async with serving(tmp_path, "--currency=CNY", "--balance=1") as sandbox:
        await sandbox.answer()
        left = 10**12 - sandbox.bill()[0]["cost_pico"]
        assert sandbox.server.house.account.balance_pico == left
        async with sandbox.http.get(f"{sandbox.url}/user/balance") as reply:
            rows = {row["currency"]: row["total_balance"] for row in (await reply.json())["balance_infos"]}
        assert rows == {"CNY": f"{left / 10**12:.2f}", "USD": "0.00"}
        await sandbox.post("balance", {"balance": "0"})
        async with await sandbox.ask() as reply:
            assert reply.status == 402


async def test_the_tariff_can_be_decided_at_dispatch(tmp_path: Path) -> None:
    flags = ("--clock=2026-11-25T00:59:59.500Z", "--time-scale=1", "--reply=1.5")
    async with serving(tmp_path / "a", *flags) as by_completion, serving(tmp_path / "b", *flags) as by_dispatch:
        by_dispatch.server.house.basis = "dispatch"
        await by_completion.post("clock", {"now": "2026-11-25T00:59:59.500Z"})
        await by_dispatch.post("clock", {"now": "2026-11-25T00:59:59.500Z"})
        await asyncio.gather(by_completion.answer(), by_dispatch.answer())
        assert by_completion.bill()[0]["band"] == "peak"
        assert by_dispatch.bill()[0]["band"] == "off-peak"


async def test_blank_lines_flow_while_a_request_is_queued(tmp_path: Path) -> None:
    async with serving(tmp_path, "--time-scale=0.05", "--queue=40", "--blank=0.1", "--seed=3") as sandbox:
        async with await sandbox.ask() as reply:
            body = await reply.read()
            told = parsedate_to_datetime(reply.headers["Date"])
        assert body.startswith(b"\n\n")
        assert orjson.loads(body)["usage"]
        assert sandbox.bill()[0]["at"] == told.strftime("%Y-%m-%dT%H:%M:%SZ")


async def test_a_client_that_leaves_is_billed_and_frees_its_place(tmp_path: Path) -> None:
    async with serving(tmp_path, "--time-scale=1", "--reply=60") as sandbox:
        task = asyncio.create_task(sandbox.ask())
        while not sandbox.server.house.account.in_flight[FLASH]:
            await asyncio.sleep(0.01)
        task.cancel()
        while sandbox.server.house.account.in_flight[FLASH]:
            await asyncio.sleep(0.01)
        assert [line["delivery"] for line in sandbox.bill()] == ["aborted"]


async def test_a_restart_goes_on_with_the_same_bill(tmp_path: Path) -> None:
    async with serving(tmp_path) as sandbox:
        await sandbox.answer()
    async with serving(tmp_path) as sandbox:
        await sandbox.answer(attempt="1.2.1")
        assert sandbox.server.house.bill.attempts == 2
        assert sandbox.server.house.bill.cost_pico == read_bill(tmp_path).cost_pico
        assert [line["attempt"] for line in sandbox.bill()] == ["1.1.1", "1.2.1"]


async def test_the_export_is_served_as_a_zip(sandbox: Sandbox) -> None:
    await sandbox.answer()
    async with sandbox.http.get(f"{sandbox.url}/sandbox/export?month=2026-11") as reply:
        assert "usage_data_2026-11.zip" in reply.headers["Content-Disposition"]
        names = zipfile.ZipFile(io.BytesIO(await reply.read())).namelist()
    assert names == ["amount-2026-11.csv", "cost-2026-11.csv"]


async def test_the_answers_come_from_a_key(tmp_path: Path) -> None:
    text = "Permission is hereby granted"
    entry = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "answer": {"category": "Permissive", "owner": "X"}}
    (tmp_path / "key.jsonl").write_text(json.dumps(entry))
    async with serving(tmp_path, f"--answers={tmp_path}/key.jsonl") as sandbox:
        said = json.loads((await sandbox.answer(text))["choices"][0]["message"]["content"])
        assert set(said) == {"category", "confidence"}
        async with sandbox.http.get(f"{sandbox.url}/sandbox/status") as reply:
            assert (await reply.json())["documents"] == 1


# --- mishaps ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a raw client saw: a status and a body, or the name of what was raised."""

    status: int = 0
    body: bytes = b""
    raised: str = ""

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def choice(self) -> Any:
        return self.json["choices"][0]


async def outcome(sandbox: Sandbox, patience_s: float) -> Outcome:
    try:
        async with asyncio.timeout(patience_s), await sandbox.ask() as reply:
            return Outcome(reply.status, await reply.read())
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        return Outcome(raised=type(error).__name__)


def has_status(status: int, words: bytes = b'"error"') -> Callable[[Outcome], bool]:
    return lambda seen: seen.status == status and words in seen.body


def has_raised(*names: str) -> Callable[[Outcome], bool]:
    return lambda seen: seen.raised in names


LOST = ("ServerDisconnectedError", "ClientOSError", "ClientPayloadError", "ClientConnectionResetError")
SEEN: dict[str, Callable[[Outcome], bool]] = {
    "rate_limited": has_status(429, b"exceeds your concurrency limit of 50 based on your remaining balance"),
    "rate_limited_bare": lambda seen: seen.status == 429 and b"limit of" not in seen.body,
    **{code: has_status(int(code)) for code in ("400", "401", "402", "403", "404", "422")},
    **{code: has_status(int(code)) for code in ("500", "502", "503", "504", "529")},
    "413": has_status(413, b"<html>"),
    **{f"{code}_html": has_status(code, b"<html>") for code in (500, 502, 503, 504)},
    "content_exists_risk": has_status(400, b"Content Exists Risk"),
    "hang": has_raised("TimeoutError"),
    "blank_lines": has_raised("TimeoutError"),
    "reset_before": has_raised(*LOST),
    "reset_after": has_raised(*LOST),
    "eof": has_raised("ServerDisconnectedError"),
    "eof_after_headers": has_raised("ClientPayloadError"),
    "cut": has_raised("ClientPayloadError"),
    "trickle": lambda seen: bool(seen.choice["message"]["content"]),
    "html": has_status(200, b"<html>"),
    "list": lambda seen: seen.json == [],
    "null": lambda seen: seen.json is None,
    "string": lambda seen: seen.json == "ok",
    "empty": lambda seen: seen.status == 200 and seen.body == b"",
    "not_json": lambda seen: seen.body == b'{"id": ',
    "error_object": has_status(200),
    "no_choices": lambda seen: "choices" not in seen.json,
    "empty_choices": lambda seen: seen.json["choices"] == [],
    "null_content": lambda seen: seen.choice["message"]["content"] is None,
    "blank": lambda seen: seen.choice["message"]["content"].strip() == "",
    "length": lambda seen: seen.choice["finish_reason"] == "length",
    "content_filter": lambda seen: seen.choice["finish_reason"] == "content_filter",
    "insufficient_system_resource": lambda seen: seen.choice["finish_reason"] == "insufficient_system_resource",
    "aborted": lambda seen: seen.choice["finish_reason"] == "aborted",
    "usage_missing": lambda seen: "usage" not in seen.json,
    "usage_null": lambda seen: seen.json["usage"] is None,
    "usage_negative": lambda seen: seen.json["usage"]["completion_tokens"] < 0,
    "usage_strings": lambda seen: isinstance(seen.json["usage"]["prompt_tokens"], str),
    "usage_unbalanced": lambda seen: (
        seen.json["usage"]["prompt_cache_hit_tokens"] + seen.json["usage"]["prompt_cache_miss_tokens"]
        != seen.json["usage"]["prompt_tokens"]
    ),
    "usage_over_max_tokens": lambda seen: seen.json["usage"]["completion_tokens"] == 1_200,
    "other_document": lambda seen: bool(seen.choice["message"]["content"]),
    "served_model": lambda seen: seen.json["model"] == "deepseek-v4-flash",
    "gzip_bomb": lambda seen: len(seen.body) > 64 << 20,
    "huge_body": lambda seen: len(seen.body) > 32 << 20,
    "bad_utf8": lambda seen: b"\xff\xfe" in seen.body,
    "duplicate_keys": lambda seen: seen.body.count(b'"usage":') == 2,
    "deep_nesting": lambda seen: b"[" * 1_000 in seen.body,
}


def test_every_mishap_is_tried() -> None:
    assert SEEN.keys() == KINDS.keys()


def test_what_never_reached_a_model_is_not_billed_and_all_else_is() -> None:
    refused = {"400", "401", "402", "403", "404", "413", "422", "500", "502", "503", "504", "529"}
    refused |= {"rate_limited", "rate_limited_bare", "content_exists_risk", "502_html", "503_html"}
    elsewhere = {"html", "error_object", "blank_lines", "reset_before"}
    assert {kind for kind in KINDS if not KINDS[kind].bills} == refused | elsewhere


@pytest.mark.parametrize("kind", sorted(KINDS))
async def test_a_mishap_befalls_one_request_and_bills_as_it_says(sandbox: Sandbox, kind: str) -> None:
    assert await sandbox.post("mishaps", [{"kind": kind, "first": 1, "args": {"bytes": 200}}]) == 200
    seen = await outcome(sandbox, 0.3 if kind in ("hang", "blank_lines") else 60)
    assert SEEN[kind](seen), seen
    while sandbox.server.house.account.in_flight[FLASH]:
        await asyncio.sleep(0.01)
    assert [line["mishap"] for line in sandbox.bill()] == ([kind] if KINDS[kind].bills else [])
    healthy = await sandbox.answer(attempt="1.1.2")
    assert healthy["choices"][0]["finish_reason"] == "stop"


async def test_the_overrun_is_billed_as_it_is_reported(sandbox: Sandbox) -> None:
    await sandbox.post("mishaps", [{"kind": "usage_over_max_tokens", "args": {"by": 5}}])
    usage = (await sandbox.answer())["usage"]
    assert sandbox.bill()[0]["output"] == usage["completion_tokens"] == 205


@pytest.mark.parametrize("at", [1, 20, 100, 200, 400])
async def test_a_reply_can_be_cut_at_any_byte(sandbox: Sandbox, at: int) -> None:
    await sandbox.post("mishaps", [{"kind": "cut", "args": {"at": at}}])
    host, port = sandbox.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = orjson.dumps({"model": FLASH, "messages": [{"role": "user", "content": "x"}]})
    head = "POST /chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-sandbox\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    assert len(await reader.read()) == at
    writer.close()
    assert len(sandbox.bill()) == 1


async def test_a_bomb_is_small_on_the_wire_and_true_inside(sandbox: Sandbox) -> None:
    await sandbox.post("mishaps", [{"kind": "gzip_bomb", "args": {"mb": 8}}])
    async with aiohttp.ClientSession(headers=sandbox.http.headers, auto_decompress=False) as http:
        plain, sandbox.http = sandbox.http, http
        async with await sandbox.ask() as reply:
            raw = await reply.read()
        sandbox.http = plain
    assert len(raw) < 32_000
    assert len(gzip.decompress(raw)) > 8 << 20
    assert orjson.loads(gzip.decompress(raw))["usage"]


async def test_rules_strike_by_share_by_turn_and_by_attempt(sandbox: Sandbox) -> None:
    rules = [
        {"kind": "529", "match": "7."},
        {"kind": "503", "every": 5, "match": "8."},
        {"kind": "500", "share": 0.5, "seed": 4, "match": "9."},
        {"kind": "404", "model": PRO},
    ]
    assert await sandbox.post("mishaps", rules) == 200

    async def statuses(run: int, **more: Any) -> list[int]:
        return [(await sandbox.ask(attempt=f"{run}.{i}.1", **more)).status for i in range(20)]

    assert set(await statuses(7)) == {529}
    assert (await statuses(8)).count(503) == 4
    first, again = await statuses(9), await statuses(9)
    assert first == again
    assert 3 < first.count(500) < 17
    assert set(await statuses(1)) == {200}
    assert set(await statuses(1, model=PRO)) == {404}
    async with sandbox.http.delete(f"{sandbox.url}/sandbox/mishaps"):
        pass
    assert set(await statuses(7)) == {200}


async def test_an_unknown_mishap_is_refused(sandbox: Sandbox) -> None:
    assert await sandbox.post("mishaps", [{"kind": "earthquake"}]) == 400
    assert await sandbox.post("mishaps", [{"kind": "503", "often": 1}]) == 400


async def test_answers_are_the_same_with_and_without_mishaps(tmp_path: Path) -> None:
    async with serving(tmp_path / "calm") as calm, serving(tmp_path / "storm") as storm:
        await storm.post("mishaps", [{"kind": "503", "share": 0.3}, {"kind": "reset_after", "share": 0.2}])
        for i in range(20):
            wanted = (await calm.answer(str(i)))["choices"][0]["message"]
            for attempt in range(50):
                try:
                    async with await storm.ask(str(i), attempt=f"1.{i}.{attempt}") as reply:
                        if reply.status == 200:
                            assert orjson.loads(await reply.read())["choices"][0]["message"] == wanted
                            break
                except aiohttp.ClientError:
                    continue
            else:
                pytest.fail("the storm never let up")


async def test_refused_requests_are_counted_apart_from_billed_ones(sandbox: Sandbox) -> None:
    await sandbox.post("mishaps", [{"kind": "503", "first": 2}])
    for _ in range(3):
        (await sandbox.ask()).release()
    async with sandbox.http.get(f"{sandbox.url}/sandbox/bill") as reply:
        total = await reply.json()
    assert (total["attempts"], total["requests"], total["currency"]) == (1, 3, "USD")
