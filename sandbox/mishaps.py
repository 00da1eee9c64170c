"""Scripted misfortune: which requests go wrong, how, and whether the provider bills them.

A rule names a kind and when it strikes: `share` of the requests (by seed and attempt key, so a retry has its own
luck), the `first` n, or each n-th (`every`), among attempts whose key starts with `match` and, if given, of one
`model`, one `document` (by number), one `attempt` of each document; the first `after` of them are spared. The first
rule that strikes wins. Without `share`, `first` and `every` it strikes always.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

import orjson
from aiohttp import web

from sandbox.account import over_ceiling
from sandbox.errormodel import draw
from sandbox.errors import SandboxError
from sandbox.exchange import Exchange
from sandbox.wire import Refusal

Args = Mapping[str, Any]
Act = Callable[[Exchange, Args, bool], Awaitable[web.StreamResponse]]
Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to go wrong, and whether the attempt is billed unless a rule's `args.bills` says otherwise."""

    bills: bool
    act: Act


@dataclass
class Rule:
    """One configured mishap and how often it met and struck."""

    kind: str
    share: float | None = None
    first: int | None = None
    every: int | None = None
    match: str = ""
    model: str | None = None
    document: int | None = None
    attempt: int | None = None
    after: int = 0
    seed: int = 0
    args: dict[str, Any] = field(default_factory=dict)
    met: int = 0
    struck: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SandboxError(f"{self.kind!r} is no mishap; choose from {', '.join(sorted(KINDS))}")

    def strikes(self, attempt: str, model: str) -> bool:
        if not attempt.startswith(self.match) or self.model not in (None, model) or not self._is_about(attempt):
            return False
        self.met += 1
        is_struck = self.met > self.after and self._is_struck(attempt)
        self.struck += is_struck
        return is_struck

    def _is_about(self, attempt: str) -> bool:
        """Whether it is for attempts of this `run.document.attempt`."""
        number, attempt_no = [*attempt.split("."), "", ""][1:3]
        return (self.document is None or number == str(self.document)) and (
            self.attempt is None or attempt_no == str(self.attempt)
        )

    def _is_struck(self, attempt: str) -> bool:
        if self.first is not None:
            return self.met - self.after <= self.first
        if self.every is not None:
            return self.met % self.every == 0
        return self.share is None or draw(self.seed, self.kind, attempt or self.met) < self.share

    async def befall(self, exchange: Exchange) -> web.StreamResponse:
        kind = KINDS[self.kind]
        exchange.mishap = self.kind
        return await kind.act(exchange, self.args, bool(self.args.get("bills", kind.bills)))


class Mishaps:
    """The rules in force."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []

    def add(self, rules: list[dict[str, Any]]) -> None:
        """Add rules as they come from JSON; all or none. Raises SandboxError or TypeError on an unknown one."""
        self._rules += [Rule(**rule) for rule in rules]

    def clear(self) -> None:
        self._rules = []

    def choose(self, attempt: str, model: str) -> Rule | None:
        return next((rule for rule in self._rules if rule.strikes(attempt, model)), None)

    def on_wire(self) -> list[dict[str, Any]]:
        return [asdict(rule) for rule in self._rules]


# --- replies instead of work: the provider, or something before it, refuses -----------------------------------

HTML = b"<html><head><title>Error</title></head><body><center><h1>Error</h1></center><hr>nginx</body></html>"


def _refuse(status: int, message: str, kind: str = "invalid_request_error", body: str = "json") -> Act:
    """A refusal. `args`: `body` json, html or empty; `retry_after` seconds."""

    async def act(x: Exchange, args: Args, bills: bool) -> web.StreamResponse:
        return await _refused(x, Refusal(status, message, kind), {"body": body, **args}, bills)

    return act


async def _refused(x: Exchange, refusal: Refusal, args: Args, bills: bool) -> web.StreamResponse:
    if bills:
        x.prepare()
        x.charge("withheld", status=refusal.status)
    shape = args.get("body", "json")
    headers = x.headers("text/html" if shape == "html" else "application/json")
    if "retry_after" in args:
        headers["Retry-After"] = str(args["retry_after"])
    payload = {"json": refusal.body, "html": HTML, "empty": b""}[shape]
    return await x.send(payload, refusal.status, headers)


async def _rate_limit(x: Exchange, args: Args, bills: bool) -> web.StreamResponse:
    """The 429 that states a ceiling: `args.ceiling`, default 50."""
    ceiling = int(args.get("ceiling", 50))
    return await _refused(x, over_ceiling(ceiling, ceiling + 1), args, bills)


# --- transport: the work may be done, but the reply does not arrive whole --------------------------------------


async def _hang(x: Exchange, args: Args, bills: bool) -> web.StreamResponse:
    """Nothing, for `args.seconds` of real time (default an hour) or until the client leaves."""
    x.prepare()
    try:
        await asyncio.sleep(float(args.get("seconds", 3600)))
    finally:
        if bills:
            x.charge("aborted")
    return x.hang_up()


async def _blank_lines(x: Exchange, args: Args, bills: bool) -> web.StreamResponse:
    """Blank lines every `args.pause` seconds for `args.seconds` (default .05 and 600, real time), then the end; the
    reply, with `args.answers`."""
    x.prepare()
    pause = float(args.get("pause", 0.05))
    try:
        for _ in range(int(float(args.get("seconds", 600)) / pause)):
            await (await x.open_stream()).write(b"\n")
            await asyncio.sleep(pause)
        if args.get("answers"):
            return await x.answer()
    finally:
        if bills:
            x.charge("aborted")
    return x.hang_up()


async def _reset_before(x: Exchange, args: Args, bills: bool) -> web.StreamResponse:
    if bills:
        x.prepare()
        x.charge("withheld")
    return x.hang_up(is_reset=True)


async def _reset_after(x: Exchange, args: Args, bills: bool) -> web.StreamResponse:
    await _worked(x, bills)
    return x.hang_up(is_reset=True)


async def _eof(x: Exchange, args: Args, bills: bool) -> web.StreamResponse:
    await _worked(x, bills)
    return x.hang_up()


async def _eof_after_headers(x: Exchange, args: Args, bills: bool) -> web.StreamResponse:
    raw = await _worked(x, bills)
    return x.hang_up(raw[: raw.index(b"\r\n\r\n") + 4])


async def _cut(x: Exchange, args: Args, bills: bool) -> web.StreamResponse:
    """The first `args.at` bytes of the whole reply, head included (default: half), and `args.per_document` more for
    each document before this one."""
    raw = await _worked(x, bills)
    at = int(args.get("at", len(raw) // 2))
    if "per_document" in args:
        at += int(args["per_document"]) * int(x.attempt.split(".")[1])
    return x.hang_up(raw[:at])


async def _trickle(x: Exchange, args: Args, bills: bool) -> web.StreamResponse:
    """A good reply, `args.bytes` (default 16) every `args.pause` seconds of real time (default .02)."""
    raw = await _worked(x, bills, "sent")
    size, pause = int(args.get("bytes", 16)), float(args.get("pause", 0.02))
    for at in range(0, len(raw), size):
        if x.request.transport is None or x.request.transport.is_closing():
            break
        x.request.transport.write(raw[at : at + size])
        await asyncio.sleep(pause)
    return x.hang_up()


async def _worked(x: Exchange, bills: bool, delivery: str = "withheld") -> bytes:
    """Do the work and bill it; what comes back is the whole reply as bytes of the wire."""
    await x.work()
    if bills:
        x.charge(delivery)
    return x.raw(x.reply().on_wire())


# --- replies that arrive, but are not what was promised --------------------------------------------------------


def _instead(payload: bytes, content_type: str = "application/json") -> Act:
    """A 200 with something else in it."""

    async def act(x: Exchange, args: Args, bills: bool) -> web.StreamResponse:
        await x.work()
        if bills:
            x.charge()
        return await x.send(payload, headers=x.headers(content_type))

    return act


def _altered(change: Callable[[Body, Args], object]) -> Act:
    """A good reply with one thing changed; billed by the true usage."""

    async def act(x: Exchange, args: Args, bills: bool) -> web.StreamResponse:
        await x.work()
        if bills:
            x.charge()
        body = orjson.loads(x.reply().on_wire())
        change(body, args)
        return await x.send(orjson.dumps(body))

    return act


def _mangled(mangle: Callable[[bytes, Args], bytes]) -> Act:
    """A good reply with its bytes changed."""

    async def act(x: Exchange, args: Args, bills: bool) -> web.StreamResponse:
        await x.work()
        if bills:
            x.charge()
        return await x.send(mangle(x.reply().on_wire(), args))

    return act


def _say(body: Body, content: object) -> None:
    body["choices"][0]["message"]["content"] = content
    body["choices"][0]["logprobs"] = None


def _finish(reason: str, *, keeps_text: bool = True) -> Callable[[Body, Args], None]:
    """Another finish_reason, with half the text or none; `args.usage` false leaves the usage out."""

    def change(body: Body, args: Args) -> None:
        choice = body["choices"][0]
        content = choice["message"]["content"] or ""
        _say(body, content[: len(content) // 2] if keeps_text else "")
        choice["finish_reason"] = reason
        if not args.get("usage", True):
            del body["usage"]

    return change


def _use(**changed: object) -> Callable[[Body, Args], None]:
    def change(body: Body, args: Args) -> None:
        body["usage"].update(changed)

    return change


def _unbalance(body: Body, args: Args) -> None:
    body["usage"]["prompt_cache_miss_tokens"] += 7


def _stringify(body: Body, args: Args) -> None:
    body["usage"] = {name: str(count) for name, count in body["usage"].items()}


async def _overrun(x: Exchange, args: Args, bills: bool) -> web.StreamResponse:
    """More output than max_tokens allows, and billed as such: a provider that broke its own limit."""
    await x.work()
    x.usage = replace(x.usage, output=x.ask.max_tokens + int(args.get("by", 1000)))
    if bills:
        x.charge()
    return await x.send(x.reply().on_wire())


async def _other_document(x: Exchange, args: Args, bills: bool) -> web.StreamResponse:
    """A valid answer about some other document of the key, or about none."""
    other = x.house.author.key.after(x.ask.sha) or hashlib.sha256(x.ask.sha).digest()
    x.prepare(x.house.author.write(replace(x.question, sha=other, text="another document")))
    if bills:
        x.charge()
    return await x.send(x.reply().on_wire())


async def _served_model(x: Exchange, args: Args, bills: bool) -> web.StreamResponse:
    """The model behind the name changes: `args.model` (default: the alias) and `args.fingerprint`."""
    alias = {"deepseek-flash": "deepseek-v4-flash"}.get(x.ask.model, x.ask.model)
    x.served_model = str(args.get("model", alias))
    x.fingerprint = str(args.get("fingerprint", "fp_sandbox_2"))
    await x.work()
    if bills:
        x.charge()
    return await x.send(x.reply().on_wire())


async def _gzip_bomb(x: Exchange, args: Args, bills: bool) -> web.StreamResponse:
    """A good reply followed by `args.mb` (default 64) megabytes of white space, in a few kilobytes of gzip."""
    await x.work()
    if bills:
        x.charge()
    bomb = _squeeze(x.reply().on_wire(), int(args.get("mb", 64)))
    return await x.send(bomb, headers={**x.headers(), "Content-Encoding": "gzip"})


def _squeeze(head: bytes, megabytes: int) -> bytes:
    """One gzip member; each megabyte ends in a full flush, so its compressed form can be repeated."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = coder.compress(head) + coder.flush(zlib.Z_FULL_FLUSH)
    block = coder.compress(_blanks()) + coder.flush(zlib.Z_FULL_FLUSH)
    end = coder.flush()
    checked = zlib.crc32(head)
    for _ in range(megabytes):
        checked = zlib.crc32(_blanks(), checked)
    length = (len(head) + (megabytes << 20)) & 0xFFFFFFFF
    return b"\x1f\x8b\x08\0\0\0\0\0\x02\xff" + start + block * megabytes + end + struct.pack("<II", checked, length)


@lru_cache(maxsize=1)
def _blanks() -> bytes:
    return b" " * (1 << 20)


def _swell(body: bytes, args: Args) -> bytes:
    return body + _blanks() * int(args.get("mb", 32))


def _break_utf8(body: bytes, args: Args) -> bytes:
    return body.replace(b'"content":"', b'"content":"\xff\xfe\xc3', 1)


def _double(body: bytes, args: Args) -> bytes:
    """Two `usage` keys; the last one, which most parsers keep, is the true one."""
    return b'{"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2},' + body[1:]


def _nest(body: bytes, args: Args) -> bytes:
    depth = int(args.get("depth", 100_000))
    return body[:-1] + b',"extra":' + b"[" * depth + b"]" * depth + b"}"


ERROR_OBJECT = b'{"error":{"message":"Internal error","type":"server_error","param":null,"code":"server_error"}}'

KINDS: dict[str, Kind] = {
    "rate_limited": Kind(False, _rate_limit),
    "rate_limited_bare": Kind(False, _refuse(429, "Rate limit reached", "rate_limit_error")),
    "400": Kind(False, _refuse(400, "Invalid request")),
    "401": Kind(False, _refuse(401, "Authentication Fails (governor)", "authentication_error")),
    "402": Kind(False, _refuse(402, "Insufficient Balance", "unknown_error")),
    "403": Kind(False, _refuse(403, "Forbidden")),
    "404": Kind(False, _refuse(404, "Not Found")),
    "413": Kind(False, _refuse(413, "Request body is too large", body="html")),
    "422": Kind(False, _refuse(422, "Failed to deserialize the JSON body into the target type")),
    "content_exists_risk": Kind(False, _refuse(400, "Content Exists Risk")),
    "500": Kind(False, _refuse(500, "Internal Server Error", "server_error")),
    "502": Kind(False, _refuse(502, "Bad Gateway", "server_error")),
    "503": Kind(False, _refuse(503, "Service is too busy", "service_unavailable_error")),
    "504": Kind(False, _refuse(504, "Gateway Time-out", "server_error")),
    "529": Kind(False, _refuse(529, "Overloaded", "overloaded_error")),
    # A gateway's page after the work: nobody can tell whether it was billed, and here it was.
    "500_html": Kind(True, _refuse(500, "", body="html")),
    "502_html": Kind(False, _refuse(502, "", body="html")),
    "503_html": Kind(False, _refuse(503, "", body="html")),
    "504_html": Kind(True, _refuse(504, "", body="html")),
    "hang": Kind(True, _hang),
    "blank_lines": Kind(False, _blank_lines),
    "reset_before": Kind(False, _reset_before),
    "reset_after": Kind(True, _reset_after),
    "eof": Kind(True, _eof),
    "eof_after_headers": Kind(True, _eof_after_headers),
    "cut": Kind(True, _cut),
    "trickle": Kind(True, _trickle),
    "html": Kind(False, _instead(HTML, "text/html")),
    "list": Kind(True, _instead(b"[]")),
    "null": Kind(True, _instead(b"null")),
    "string": Kind(True, _instead(b'"ok"')),
    "empty": Kind(True, _instead(b"")),
    "not_json": Kind(True, _instead(b'{"id": ')),
    "error_object": Kind(False, _instead(ERROR_OBJECT)),
    "no_choices": Kind(True, _altered(lambda body, args: body.pop("choices"))),
    "empty_choices": Kind(True, _altered(lambda body, args: body["choices"].clear())),
    "null_content": Kind(True, _altered(lambda body, args: _say(body, None))),
    "blank": Kind(True, _altered(lambda body, args: _say(body, " \n "))),
    "length": Kind(True, _altered(_finish("length"))),
    "content_filter": Kind(True, _altered(_finish("content_filter", keeps_text=False))),
    "insufficient_system_resource": Kind(True, _altered(_finish("insufficient_system_resource"))),
    "aborted": Kind(True, _altered(_finish("aborted"))),
    "usage_missing": Kind(True, _altered(lambda body, args: body.pop("usage"))),
    "usage_null": Kind(True, _altered(lambda body, args: body.update(usage=None))),
    "usage_negative": Kind(True, _altered(_use(completion_tokens=-5, prompt_cache_hit_tokens=-128))),
    "usage_strings": Kind(True, _altered(_stringify)),
    "usage_unbalanced": Kind(True, _altered(_unbalance)),
    "usage_over_max_tokens": Kind(True, _overrun),
    "other_document": Kind(True, _other_document),
    "served_model": Kind(True, _served_model),
    "gzip_bomb": Kind(True, _gzip_bomb),
    "huge_body": Kind(True, _mangled(_swell)),
    "bad_utf8": Kind(True, _mangled(_break_utf8)),
    "duplicate_keys": Kind(True, _mangled(_double)),
    "deep_nesting": Kind(True, _mangled(_nest)),
}
