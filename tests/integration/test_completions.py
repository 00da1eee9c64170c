"""The door to the model over real sockets: a raw server says every wrong thing there is, byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import socket
import struct
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import aiohttp
import httpx2
import openai
import pytest

from schemas.attempts import Call, Message, Reply, Signal, Token, Usage
from schemas.errors import ConfigurationError, ProviderStopped
from schemas.money import PICO, Currency, Money
from tasks.completions import MIB, Completions, signal_of

KEY = "sk-canary-key-5d41"
CANARY = "canary document text 402abc"
NOW = datetime(2026, 11, 24, 9, 0, 30, 250_000, tzinfo=UTC)
CAP = 64 * 1024

Script = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Wire:
    """A server that reads one request and then does what the script says, for each connection in turn."""

    script: Script
    requests: list[bytes] = field(default_factory=list)
    port: int = 0
    is_reading: bool = True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                self.requests.append(await read_request(reader) if self.is_reading else b"")
                await self.script(writer)
                await writer.drain()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
    return head + await reader.readexactly(length)


@contextlib.asynccontextmanager
async def wire(script: Script) -> AsyncIterator[Wire]:
    provider = Wire(script)
    connections: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(provider.serve(reader, writer))
        connections.add(task)
        with contextlib.suppress(asyncio.CancelledError):
            await task
        writer.transport.abort()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    provider.port = server.sockets[0].getsockname()[1]
    try:
        yield provider
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await asyncio.sleep(0.01)  # aborted transports close in the next turns of the loop


def http(status: int, body: bytes | str, *headers: str, length: bool = True) -> bytes:
    content = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status} X", *headers]
    if length:
        lines.append(f"Content-Length: {len(content)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + content


def completion(content: Any = '{"a": 1}', finish: Any = "stop", usage: Any = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish}
    choice.update(more)
    return {
        "id": "id-1",
        "object": "chat.completion",
        "model": "deepseek-flash",
        "system_fingerprint": "fp-1",
        "choices": [choice],
        "usage": usage or use(),
    }


def use(prompt: Any = 300, output: Any = 9, hit: Any = 256, miss: Any = 44, **more: Any) -> dict[str, Any]:
    block = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": 309}
    block |= {"prompt_cache_hit_tokens": hit, "prompt_cache_miss_tokens": miss, **more}
    return {name: value for name, value in block.items() if value is not ...}


def ok(value: Any, *headers: str) -> bytes:
    return http(200, json.dumps(value), "Content-Type: application/json", *headers)


def say(*parts: bytes, pause_s: float = 0.0) -> Script:
    async def script(writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause_s)

    return script


def say_and_close(*parts: bytes) -> Script:
    async def script(writer: asyncio.StreamWriter) -> None:
        await say(*parts)(writer)
        writer.close()

    return script


def say_and_reset(*parts: bytes) -> Script:
    async def script(writer: asyncio.StreamWriter) -> None:
        await say(*parts)(writer)
        reset(writer)

    return script


def reset(writer: asyncio.StreamWriter) -> None:
    sock: socket.socket = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def hang(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3600)


def call(text: str = CANARY, deadline_s: float = 5.0, **parameters: Any) -> Call:
    messages = (Message("system", "Answer in JSON."), Message("user", text))
    return Call("deepseek-flash", messages, parameters, deadline_s, "7.3.1")


async def attempt(script: Script, *, deadline_s: float = 5.0) -> Reply:
    async with wire(script) as provider, door(provider.url) as completions:
        return await completions.complete(call(deadline_s=deadline_s))


def door(url: str, **options: Any) -> Completions:
    return Completions(url, KEY, **{"ceiling": 4, "size_cap": CAP, "now": lambda: NOW, **options})


@pytest.fixture(autouse=True)
def no_leak(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """No test here may log or print the key or the document, whatever went wrong."""
    caplog.set_level(logging.DEBUG)
    yield
    printed = capsys.readouterr()
    seen = caplog.text + printed.out + printed.err
    assert CANARY not in seen
    assert KEY not in seen


def is_safe(reply: Reply) -> bool:
    return CANARY not in reply.detail and KEY not in reply.detail and len(reply.detail) < 200


# --- replies that are whole --------------------------------------------------------------------------------------

OWN = {"error": {"message": f"bad: {CANARY} {KEY}", "type": "invalid_request_error", "param": None, "code": CANARY}}
HTML = f"<html><body>{CANARY}</body></html>"
DEEP = "[" * 100_000

WHOLE: dict[str, tuple[bytes, Signal]] = {
    "answered": (ok(completion()), Signal.ANSWERED),
    "leading blank lines": (http(200, "\n\r\n\n" + json.dumps(completion())), Signal.ANSWERED),
    "byte order mark": (http(200, b"\xef\xbb\xbf" + json.dumps(completion()).encode()), Signal.ANSWERED),
    "no content type": (http(200, json.dumps(completion())), Signal.ANSWERED),
    "strange charset": (http(200, json.dumps(completion()), "Content-Type: a; charset=none"), Signal.ANSWERED),
    "gzip": (http(200, gzip.compress(json.dumps(completion()).encode()), "Content-Encoding: gzip"), Signal.ANSWERED),
    "cookie": (ok(completion(), "Set-Cookie: a=b"), Signal.ANSWERED),
    "lone surrogate": (ok(completion("x\ud800y")), Signal.ANSWERED),
    "strict tool": (
        ok(completion(message={"content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]})),
        Signal.ANSWERED,
    ),
    "spaces for content": (ok(completion("   \n\t ")), Signal.BLANK),
    "null content": (ok(completion(None)), Signal.BLANK),
    "null message": (ok(completion(message=None)), Signal.BLANK),
    "no choices": (ok({**completion(), "choices": []}), Signal.BLANK),
    "null choices": (ok({**completion(), "choices": None}), Signal.BLANK),
    "tool_calls without a call": (ok(completion("", "tool_calls")), Signal.BLANK),
    "length": (ok(completion('{"a"', "length")), Signal.TRUNCATED),
    "content_filter": (ok(completion("x", "content_filter")), Signal.REFUSED),
    "no resources": (ok(completion("x", "insufficient_system_resource")), Signal.INTERRUPTED),
    "aborted": (ok(completion("x", "aborted")), Signal.INTERRUPTED),
    "unknown finish": (ok(completion("x", "eureka")), Signal.INTERRUPTED),
    "null finish": (ok(completion("x", None)), Signal.INTERRUPTED),
    "finish is a list": (ok(completion("x", ["stop"])), Signal.INTERRUPTED),
    "html": (http(200, HTML, "Content-Type: text/html"), Signal.MALFORMED),
    "plain text": (http(200, CANARY), Signal.MALFORMED),
    "list": (ok([CANARY]), Signal.MALFORMED),
    "string": (ok(CANARY), Signal.MALFORMED),
    "null": (ok(None), Signal.MALFORMED),
    "number": (ok(7), Signal.MALFORMED),
    "error object in a 200": (ok(OWN), Signal.MALFORMED),
    "empty object": (ok({}), Signal.MALFORMED),
    "choices is an object": (ok({**completion(), "choices": {"0": CANARY}}), Signal.MALFORMED),
    "choice is a string": (ok({**completion(), "choices": [CANARY]}), Signal.MALFORMED),
    "content is a list": (ok(completion([{"type": "text"}])), Signal.MALFORMED),
    "204": (http(204, ""), Signal.MALFORMED),
    "empty body": (http(200, ""), Signal.LOST),
    "only blank lines": (http(200, "\n\n\n"), Signal.LOST),
    "cut JSON of full length": (http(200, json.dumps(completion())[:-5]), Signal.LOST),
    "bad UTF-8": (http(200, b'{"choices": "\xff\xfe"}'), Signal.LOST),
    "deep nesting": (http(200, DEEP[: CAP - 1]), Signal.LOST),
    "stated size over the cap": (http(200, "x" * (CAP + 1)), Signal.LOST),
    "gzip bomb": (http(200, gzip.compress(b" " * CAP * 100), "Content-Encoding: gzip"), Signal.LOST),
    "gzip without its checksum": (
        http(200, gzip.compress(json.dumps(completion()).encode())[:-4], "Content-Encoding: gzip"),
        Signal.LOST,
    ),
    "not gzip": (http(200, "{}", "Content-Encoding: gzip"), Signal.LOST),
    "brotli": (http(200, "{}", "Content-Encoding: br"), Signal.LOST),
    "400": (http(400, json.dumps(OWN)), Signal.REJECTED),
    "400 moderation": (http(400, '{"error": {"message": "Content Exists Risk"}}'), Signal.REFUSED),
    "400 html": (http(400, HTML), Signal.REJECTED),
    "401": (http(401, json.dumps(OWN)), Signal.UNAUTHORISED),
    "402": (http(402, json.dumps(OWN)), Signal.NO_BALANCE),
    "403": (http(403, HTML), Signal.UNAUTHORISED),
    "404": (http(404, HTML), Signal.UNAUTHORISED),
    "408": (http(408, ""), Signal.FAILED),
    "413": (http(413, HTML), Signal.REJECTED),
    "422": (http(422, json.dumps(OWN)), Signal.REJECTED),
    "429 without a body": (http(429, ""), Signal.RATE_LIMITED),
    "500 own error": (http(500, json.dumps(OWN)), Signal.UNAVAILABLE),
    "500 html": (http(500, HTML), Signal.FAILED),
    "500 deep nesting": (http(500, DEEP[: CAP - 1]), Signal.FAILED),
    "500 bad UTF-8": (http(500, b"\xff\xfe"), Signal.FAILED),
    "502": (http(502, HTML), Signal.UNAVAILABLE),
    "503": (http(503, json.dumps(OWN)), Signal.UNAVAILABLE),
    "504 own error": (http(504, json.dumps(OWN)), Signal.UNAVAILABLE),
    "504 html": (http(504, HTML), Signal.FAILED),
    "524": (http(524, HTML), Signal.FAILED),
    "529": (http(529, ""), Signal.UNAVAILABLE),
    "error over the cap": (http(500, "x" * (CAP + 1)), Signal.LOST),
    "redirect": (http(307, "", "Location: http://127.0.0.1:9/steal"), Signal.UNAUTHORISED),
}


@pytest.mark.parametrize(("raw", "signal"), WHOLE.values(), ids=WHOLE)
async def test_every_whole_reply_has_its_signal(raw: bytes, signal: Signal) -> None:
    reply = await attempt(say(raw))
    assert reply.signal is signal, reply.detail
    assert is_safe(reply)
    assert (reply.content is not None) == (signal in (Signal.ANSWERED, Signal.TRUNCATED))
    assert reply.detail or signal in (
        Signal.ANSWERED,
        Signal.BLANK,
        Signal.TRUNCATED,
        Signal.REFUSED,
        Signal.INTERRUPTED,
    )


# --- replies that never become whole -----------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def drip(writer: asyncio.StreamWriter) -> None:
    writer.write(CHUNKED)
    while True:
        writer.write(b"1\r\n\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


async def flood(writer: asyncio.StreamWriter) -> None:
    writer.write(CHUNKED)
    while True:
        writer.write(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
        await writer.drain()


BROKEN: dict[str, Script] = {
    "reset after the request": say_and_reset(),
    "end after the request": say_and_close(),
    "end after the status line": say_and_close(b"HTTP/1.1 200 OK\r\n"),
    "end after the headers": say_and_close(HEAD),
    "cut body": say_and_close(HEAD + b'{"choices"'),
    "reset in the body": say_and_reset(HEAD + b'{"choices"'),
    "cut chunk": say_and_close(CHUNKED + b'10\r\n{"cho'),
    "no last chunk": say_and_close(CHUNKED + b"2\r\n{}\r\n"),
    "bad chunk size": say_and_close(CHUNKED + b"zz\r\n{}\r\n"),
    "endless body": flood,
    "not HTTP": say_and_close(f"{CANARY}\r\n\r\n".encode()),
    "huge header": say_and_close(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000 + b"\r\n\r\n"),
    "endless headers": say_and_close(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50_000 + b"\r\n"),
    "two lengths": say_and_close(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}"),
}
SLOW: dict[str, Script] = {
    "silence": hang,
    "blank lines for ever": drip,
    "a body that stops": say(HEAD + b"{", pause_s=3600),
    "a trickle": say(HEAD, *[b" "] * 400, pause_s=0.01),
}


@pytest.mark.parametrize("script", BROKEN.values(), ids=BROKEN)
async def test_a_reply_that_breaks_off_is_lost(script: Script) -> None:
    reply = await attempt(script)
    assert reply.signal is Signal.LOST, reply.detail
    assert is_safe(reply)
    assert reply.usage is None


async def test_an_endless_reply_is_left_at_the_size_cap() -> None:
    assert (await attempt(flood)).detail == "no whole reply: BodyTooLarge"


async def test_a_gzip_bomb_is_not_inflated() -> None:
    bomb = gzip.compress(b" " * (100 * MIB))
    script = say(http(200, bomb, "Content-Encoding: gzip"))
    async with wire(script) as provider, door(provider.url, size_cap=MIB) as completions:
        tracemalloc.start()
        reply = await completions.complete(call())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert reply.detail == "no whole reply: BodyTooLarge"
    assert peak < 8 * MIB


@pytest.mark.parametrize("script", SLOW.values(), ids=SLOW)
async def test_the_deadline_is_total_and_after_sending_means_lost(script: Script) -> None:
    reply = await attempt(script, deadline_s=0.2)
    assert (reply.signal, reply.detail) == (Signal.LOST, "no whole reply: deadline")


@pytest.mark.parametrize("headers", [(), ("Connection: close",)], ids=["length", "until close"])
async def test_a_reply_cut_at_any_byte_is_lost(headers: tuple[str, ...]) -> None:
    whole = http(200, json.dumps(completion()), *headers, length=not headers)
    cut = 0

    async def script(writer: asyncio.StreamWriter) -> None:
        writer.write(whole[:cut])
        writer.close()

    async with wire(script) as provider, door(provider.url) as completions:
        for cut in range(0, len(whole), 5):
            assert (await completions.complete(call())).signal is Signal.LOST, cut
        cut = len(whole)
        assert (await completions.complete(call())).signal is Signal.ANSWERED


async def test_blank_lines_before_the_answer_do_no_harm() -> None:
    body = json.dumps(completion()).encode()
    last = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    reply = await attempt(say(CHUNKED, *[b"1\r\n\n\r\n"] * 20, last, pause_s=0.005))
    assert reply.signal is Signal.ANSWERED


# --- nothing was sent --------------------------------------------------------------------------------------------


async def test_a_refused_connection_means_nothing_was_sent() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        async with door(f"http://127.0.0.1:{free.getsockname()[1]}") as completions:
            reply = await completions.complete(call())
    assert reply.signal is Signal.NOT_SENT
    assert "ECONNREFUSED" in reply.detail


async def test_an_unknown_host_means_nothing_was_sent() -> None:
    async with door("http://no-such-host.invalid") as completions:
        assert (await completions.complete(call())).signal is Signal.NOT_SENT


async def test_a_failed_tls_handshake_means_nothing_was_sent() -> None:
    async with wire(say_and_close(b"I speak no TLS\r\n")) as provider:
        provider.is_reading = False
        async with door(provider.url.replace("http:", "https:")) as completions:
            reply = await completions.complete(call())
    assert reply.signal is Signal.NOT_SENT
    assert "SSL" in reply.detail


async def test_a_deadline_during_the_handshake_means_nothing_was_sent() -> None:
    async with wire(hang) as silent, door(silent.url.replace("http:", "https:")) as completions:
        reply = await completions.complete(call(deadline_s=0.2))
    assert (reply.signal, reply.detail) == (Signal.NOT_SENT, "nothing was sent: deadline")


async def test_a_deadline_while_waiting_for_a_connection_means_nothing_was_sent() -> None:
    async with wire(hang) as provider, door(provider.url, ceiling=1) as completions:
        first = asyncio.create_task(completions.complete(call(deadline_s=1.0)))
        while not provider.requests:
            await asyncio.sleep(0.01)
        second = await completions.complete(call(deadline_s=0.1))
        assert second.signal is Signal.NOT_SENT
        assert (await first).signal is Signal.LOST
    assert len(provider.requests) == 1


async def test_a_document_that_is_not_unicode_is_rejected_without_a_request() -> None:
    async with wire(say(ok(completion()))) as provider, door(provider.url) as completions:
        assert (await completions.complete(call("lone \ud800"))).signal is Signal.REJECTED
    assert provider.requests == []


async def test_cancelling_an_attempt_is_not_swallowed_and_frees_its_connection() -> None:
    async with wire(hang) as provider, door(provider.url, ceiling=1) as completions:
        task = asyncio.create_task(completions.complete(call()))
        while not provider.requests:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        provider.script = say(ok(completion()))
        assert (await completions.complete(call())).signal is Signal.ANSWERED


REQUEST = httpx2.Request("POST", f"https://{KEY}@host/?{CANARY}")
RAISED: list[tuple[Exception, Signal]] = [
    (openai.APIConnectionError(message=CANARY, request=REQUEST), Signal.LOST),
    (openai.APITimeoutError(REQUEST), Signal.LOST),
    (openai.OpenAIError(CANARY), Signal.LOST),
    (httpx2.ReadTimeout("deadline"), Signal.LOST),
    (httpx2.ConnectTimeout("deadline"), Signal.NOT_SENT),
    (httpx2.RemoteProtocolError(CANARY), Signal.LOST),
    (aiohttp.ClientPayloadError(CANARY), Signal.LOST),
    (json.JSONDecodeError(CANARY, CANARY, 0), Signal.LOST),
    (UnicodeDecodeError("utf-8", CANARY.encode(), 0, 1, KEY), Signal.LOST),
    (ValueError(CANARY), Signal.LOST),
    (RecursionError(CANARY), Signal.LOST),
    (ConnectionResetError(104, CANARY), Signal.LOST),
    (OSError(CANARY), Signal.LOST),
    (TimeoutError(CANARY), Signal.LOST),
    (KeyError(CANARY), Signal.LOST),
    (MemoryError(CANARY), Signal.LOST),
]


@pytest.mark.parametrize(("error", "signal"), RAISED, ids=[type(error).__name__ for error, _ in RAISED])
def test_any_exception_has_a_signal_and_a_detail_without_its_text(error: Exception, signal: Signal) -> None:
    found, detail = signal_of(error)
    assert found is signal
    assert CANARY not in detail
    assert KEY not in detail
    assert detail


async def test_a_request_leaves_no_line_with_its_url_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    await attempt(say(ok(completion())))
    assert not [record for record in caplog.records if "/chat/completions" in record.getMessage()]


# --- what is sent ------------------------------------------------------------------------------------------------


async def test_a_request_carries_the_call_and_only_what_it_must() -> None:
    async with wire(say(ok(completion()))) as provider, door(provider.url + "/beta") as completions:
        await completions.complete(call("text", max_tokens=9, thinking={"type": "disabled"}))
    head, _, body = provider.requests[0].partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert lines[0] == "post /beta/chat/completions http/1.1"
    assert f"authorization: bearer {KEY}" in lines
    assert "accept-encoding: identity" in lines
    assert not [line for line in lines if line.startswith(("x-", "cookie"))]
    assert json.loads(body) == {
        "model": "deepseek-flash",
        "messages": [{"role": "system", "content": "Answer in JSON."}, {"role": "user", "content": "text"}],
        "max_tokens": 9,
        "thinking": {"type": "disabled"},
    }


async def test_the_attempt_key_is_sent_to_the_sandbox_only() -> None:
    async with wire(say(ok(completion()))) as provider, door(provider.url, send_attempt_key=True) as completions:
        await completions.complete(call())
    assert b"x-attempt: 7.3.1" in provider.requests[0].lower()


async def test_a_failed_attempt_is_not_repeated() -> None:
    async with wire(say(http(503, "", "Retry-After: 0"))) as provider, door(provider.url) as completions:
        await completions.complete(call())
        provider.script = say_and_reset()
        await completions.complete(call())
    assert len(provider.requests) == 2


async def test_a_document_of_megabytes_is_sent_whole() -> None:
    async with wire(say(ok(completion()))) as provider, door(provider.url) as completions:
        assert (await completions.complete(call("é" * 2_000_000))).signal is Signal.ANSWERED
    assert len(provider.requests[0]) > 4_000_000


async def test_a_cookie_is_never_sent_back() -> None:
    script = say(ok(completion(), "Set-Cookie: session=1; Path=/"))
    async with wire(script) as provider, door(provider.url) as completions:
        await completions.complete(call())
        await completions.complete(call())
    assert b"cookie" not in provider.requests[1].lower()


# --- what is understood ------------------------------------------------------------------------------------------


async def test_a_reply_keeps_what_the_provider_said_about_itself() -> None:
    date = NOW.replace(microsecond=0) - timedelta(seconds=3)
    usage = use(completion_tokens_details={"reasoning_tokens": 4}, prompt_tokens_details={"cached_tokens": 256})
    reply = await attempt(say(ok(completion(usage=usage), f"Date: {format_datetime(date, usegmt=True)}")))
    assert reply == Reply(
        Signal.ANSWERED,
        sent_at=NOW,
        completed_at=date,
        http_status=200,
        content='{"a": 1}',
        usage=Usage(hit=256, miss=44, output=9, reasoning=4),
        finish_reason="stop",
        served_model="deepseek-flash",
        fingerprint="fp-1",
        provider_id="id-1",
    )


@pytest.mark.parametrize("date", ["", "yesterday", "Tue, 24 Nov 2020 09:00:00 GMT", "Tue, 99 Foo 2026 09:00:00 GMT"])
async def test_without_a_sane_date_the_local_clock_dates_the_reply(date: str) -> None:
    reply = await attempt(say(ok(completion(), f"Date: {date}")))
    assert reply.completed_at == NOW


async def test_the_date_of_early_headers_is_moved_to_the_end_of_the_body() -> None:
    """A queued request gets its headers at once; the tariff of its end is another hour's, perhaps."""
    body = json.dumps(completion()).encode()
    date = f"Date: {format_datetime(NOW.replace(microsecond=0), usegmt=True)}\r\n".encode()
    head = b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n" % (date, len(body))
    reply = await attempt(say(head, body, pause_s=1.05))
    assert reply.completed_at >= NOW.replace(microsecond=0) + timedelta(seconds=1)


@pytest.mark.parametrize(
    ("text", "ceiling"),
    [
        ("You exceeded the concurrency limit of 39 based on your remaining balance", 39),
        ("your request exceeds your Concurrency Limit: 2500", 2500),
        (f"{CANARY} no limit given", None),
        ("concurrency limit of 0", None),
    ],
)
async def test_a_429_states_the_ceiling(text: str, ceiling: int | None) -> None:
    body = json.dumps({"error": {"message": text, "type": "rate_limit_error", "code": None}})
    reply = await attempt(say(http(429, body, "Retry-After: 7")))
    assert (reply.signal, reply.ceiling, reply.retry_after_s) == (Signal.RATE_LIMITED, ceiling, 7.0)
    assert is_safe(reply)
    assert "rate_limit_error" in reply.detail


BAD_USAGE: dict[str, Any] = {
    "absent": "none",
    "a list": [1],
    "hit and miss unreported": use(hit=..., miss=...),
    "negative": use(miss=-44),
    "a boolean": use(output=True),
    "a float": use(output=9.0),
    "a string": use(output="9"),
    "sum is wrong": use(miss=45),
    "hit above prompt": use(hit=301, miss=...),
    "two hits": use(prompt_tokens_details={"cached_tokens": 128}),
    "no prompt": use(prompt=...),
    "no output": use(output=...),
    "astronomical": use(prompt=10**18, miss=10**18 - 256),
    "beyond 64 bits": use(output=10**30),
    "reasoning above output": use(completion_tokens_details={"reasoning_tokens": 10}),
    "details is text": use(completion_tokens_details="4"),
}


@pytest.mark.parametrize("usage", BAD_USAGE.values(), ids=BAD_USAGE)
async def test_impossible_usage_is_unknown_and_says_why(usage: Any) -> None:
    reply = await attempt(say(ok(completion(usage=usage))))
    assert reply.signal is Signal.ANSWERED
    assert reply.usage is None
    assert reply.detail.startswith("usage ")


async def test_hits_may_come_under_openais_name_and_misses_follow() -> None:
    usage = use(hit=..., miss=..., prompt_tokens_details={"cached_tokens": 128})
    reply = await attempt(say(ok(completion(usage=usage))))
    assert reply.usage == Usage(hit=128, miss=172, output=9)


def entry(text: str, logprob: Any = -0.5, octets: list[int] | None = None) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": octets, "top_logprobs": []}


async def tokens_of(content: str, *entries: Any) -> tuple[Token, ...] | None:
    return (await attempt(say(ok(completion(content, logprobs={"content": list(entries)}))))).tokens


async def test_tokens_join_to_the_content() -> None:
    assert await tokens_of("ab c", entry("ab"), entry(" c", -1)) == (Token("ab", -0.5), Token(" c", -1.0))


async def test_tokens_that_split_a_character_become_one() -> None:
    halves = [entry("x", octets=[120]), entry("\ufffd", -1.0, [0xC3]), entry("\ufffd", -2.0, [0xA9])]
    assert await tokens_of("xé", *halves) == (Token("x", -0.5), Token("é", -3.0))


async def test_an_end_token_that_the_content_lacks_is_left_out() -> None:
    assert await tokens_of("ab", entry("ab"), entry("<end>")) == (Token("ab", -0.5),)


@pytest.mark.parametrize(
    "entries",
    [[entry("a")], [entry("abc")], [entry("ab", None)], [entry("ab", 0.5)], [entry("ab", True)], ["ab"], [], [7]],
)
async def test_tokens_that_do_not_add_up_are_none(entries: list[Any]) -> None:
    assert await tokens_of("ab", *entries) is None


# --- the account -------------------------------------------------------------------------------------------------


def row(currency: str, total: Any) -> dict[str, Any]:
    return {"currency": currency, "total_balance": total, "granted_balance": "0.00", "topped_up_balance": total}


async def test_the_balance_is_the_funded_row() -> None:
    rows = {"is_available": True, "balance_infos": [row("CNY", "0.00"), row("USD", "25.50")]}
    async with wire(say(ok(rows))) as provider, door(provider.url) as completions:
        balance = await completions.balance()
    assert provider.requests[0].startswith(b"GET /user/balance ")
    assert balance.amount == Money(25_500_000_000_000, Currency.USD)
    assert (balance.currency, balance.is_available) == (Currency.USD, True)


async def test_an_empty_or_overdrawn_account_has_an_exact_balance() -> None:
    rows = {"is_available": False, "balance_infos": [row("CNY", "-0.01"), row("EUR", "9"), row("USD", None)]}
    async with wire(say(ok(rows))) as provider, door(provider.url) as completions:
        balance = await completions.balance()
    assert (balance.amount, balance.is_available) == (Money(-PICO // 100, Currency.CNY), False)
    assert (balance.granted, balance.topped_up) == (Money(0, Currency.CNY), Money(-PICO // 100, Currency.CNY))


async def test_a_currency_s_balance_is_its_row_whatever_it_holds() -> None:
    rows = {"is_available": True, "balance_infos": [row("CNY", "7"), row("USD", "0.00"), row("USD", "1e999999999")]}
    async with wire(say(ok(rows))) as provider, door(provider.url) as completions:
        assert (await completions.balance(Currency.USD)).amount == Money(0, Currency.USD)


@pytest.mark.parametrize(
    "raw",
    [http(401, json.dumps(OWN)), http(404, HTML), http(503, ""), ok([]), http(200, HTML), ok({"balance_infos": 1})],
)
async def test_a_balance_that_cannot_be_had_stops_with_advice(raw: bytes) -> None:
    async with wire(say(raw)) as provider, door(provider.url) as completions:
        with pytest.raises((ProviderStopped, ConfigurationError)) as caught:
            await completions.balance()
    assert CANARY not in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(("status", "exit_code"), [(401, 2), (403, 2), (404, 2), (402, 3), (503, 3)])
async def test_a_wrong_key_or_address_is_a_wrong_setting_and_a_provider_in_trouble_is_not(
    status: int, exit_code: int
) -> None:
    async with wire(say(http(status, json.dumps(OWN)))) as provider, door(provider.url) as completions:
        with pytest.raises((ProviderStopped, ConfigurationError)) as caught:
            await completions.clock_offset()
    assert caught.value.exit_code == exit_code


async def test_an_unreachable_provider_stops_with_advice() -> None:
    async with wire(say_and_reset()) as provider, door(provider.url) as completions:
        with pytest.raises(ProviderStopped, match="does not answer"):
            await completions.models()


async def test_models_are_the_ids_on_offer() -> None:
    listed = {"object": "list", "data": [{"id": "deepseek-flash"}, {"id": "deepseek-v4-pro"}, {"id": 7}]}
    async with wire(say(ok(listed))) as provider, door(provider.url) as completions:
        assert await completions.models() == ("deepseek-flash", "deepseek-v4-pro")


@pytest.mark.parametrize("ahead_s", [-3600, 0, 90])
async def test_the_clock_offset_is_the_providers_clock_minus_ours(ahead_s: int) -> None:
    date = format_datetime((NOW + timedelta(seconds=ahead_s)).replace(microsecond=0), usegmt=True)
    async with wire(say(ok({"data": []}, f"Date: {date}"))) as provider, door(provider.url) as completions:
        assert await completions.clock_offset() == timedelta(seconds=ahead_s)


async def test_a_reply_puts_the_offset_right_where_the_clocks_moved_apart() -> None:
    ahead = NOW.replace(microsecond=0) + timedelta(minutes=10)
    replies = iter([f"Date: {format_datetime(ahead, usegmt=True)}", "X-No-Date: 1"])

    async def script(writer: asyncio.StreamWriter) -> None:
        writer.write(ok(completion(), next(replies)))

    async with wire(script) as provider, door(provider.url) as completions:
        first, second = await completions.complete(call()), await completions.complete(call())
        assert completions.now() == NOW + timedelta(minutes=10)
    assert (first.sent_at, first.completed_at) == (NOW, ahead)
    assert second.sent_at == second.completed_at == NOW + timedelta(minutes=10)


@pytest.mark.parametrize("late_s", [-2, 0, 1])
async def test_a_date_that_is_off_by_a_second_or_two_moves_no_clock(late_s: int) -> None:
    date = format_datetime(NOW.replace(microsecond=0) - timedelta(seconds=late_s), usegmt=True)
    async with wire(say(ok(completion(), f"Date: {date}"))) as provider, door(provider.url) as completions:
        await completions.complete(call())
        assert completions.now() == NOW


async def test_without_a_date_there_is_no_offset() -> None:
    async with wire(say(ok({"data": []}))) as provider, door(provider.url) as completions:
        assert await completions.clock_offset() == timedelta(0)


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("https://api.example", ""),
        ("https://api.example", f"{KEY}\n"),
        ("https://api.example", f"{KEY}é"),
        (f"https://user:{KEY}@api.example", KEY),
        (f"https://api.example?key={KEY}", KEY),
        ("api.example", KEY),
        ("ftp://api.example", KEY),
    ],
)
def test_a_door_that_cannot_open_is_refused_before_anything_is_sent(url: str, key: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Completions(url, key)
    assert KEY not in str(caught.value)
