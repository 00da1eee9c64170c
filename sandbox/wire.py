"""The wire protocol: what a request asks for, why it is refused, and the bytes of an answer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NoReturn

import orjson

from sandbox.tariff import FLASH, PRO

#: Accepted names and the model that serves them.
MODELS = {FLASH: FLASH, "deepseek-v4-flash": FLASH, PRO: PRO}
CONTEXT = 1_048_576
MAX_OUTPUT = 393_216
DEFAULT_OUTPUT = 8_192
DEFAULT_THINKING_OUTPUT = 65_536
EFFORTS = ("none", "low", "high", "max")


class Refusal(Exception):
    """A reply that is an error: its status, and DeepSeek's error JSON."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status = status
        self.body = orjson.dumps(
            {"error": {"message": message, "type": kind, "param": None, "code": "invalid_request_error"}}
        )


@dataclass(frozen=True, slots=True)
class Ask:
    """One chat request, checked. `effort` is None without thinking; `tool` is a strict function to answer by."""

    model: str
    named: str
    messages: tuple[tuple[str, str], ...]
    effort: str | None
    max_tokens: int
    is_json: bool
    top_logprobs: int | None
    user_id: str
    tool: dict[str, Any] | None

    @property
    def system(self) -> str:
        """The system prompt; or, with a strict function, the function's schema."""
        if self.tool is not None:
            return f"schema: {orjson.dumps(self.tool.get('parameters') or {}).decode()}"
        return next((content for role, content in self.messages if role == "system"), "")

    @property
    def document(self) -> str:
        """The first user message, whole."""
        return next((content for role, content in self.messages if role == "user"), "")

    @property
    def sha(self) -> bytes:
        return hashlib.sha256(self.document.encode()).digest()

    @property
    def tier(self) -> str:
        return ("flash" if self.model == FLASH else "pro") + ("-thinking" if self.effort else "")

    @property
    def turns(self) -> int:
        return sum(role == "user" for role, _ in self.messages)


def read_ask(raw: bytes) -> Ask:
    """Check a request body. Raises Refusal with the status and wording DeepSeek uses."""
    body = _parse(raw)
    named = body.get("model")
    if not isinstance(named, str):
        _unreadable("model: expected a string")
    if named not in MODELS:
        raise Refusal(400, "Model Not Exist")
    messages = _messages(body.get("messages"))
    effort = _effort(body)
    top = _top_logprobs(body, effort)
    _check_sampling(body)
    is_json = _is_json(body, messages)
    user = body.get("user_id") or body.get("user") or ""
    limit = _max_tokens(body, effort)
    return Ask(MODELS[named], named, messages, effort, limit, is_json, top, str(user), _tool(body, effort))


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except ValueError:
        raise Refusal(400, "Failed to parse the request body as JSON") from None
    if not isinstance(body, dict):
        _unreadable("expected an object")
    if body.get("stream"):
        raise Refusal(400, "The sandbox does not stream; leave `stream` out")
    return body


def _unreadable(why: str) -> NoReturn:
    raise Refusal(422, f"Failed to deserialize the JSON body into the target type: {why}")


def _messages(raw: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(raw, list):
        _unreadable("messages: expected a sequence")
    if not raw:
        raise Refusal(400, "Empty input messages")
    return tuple(_message(message, number) for number, message in enumerate(raw))


def _message(raw: object, number: int) -> tuple[str, str]:
    if not isinstance(raw, dict) or raw.get("role") not in ("system", "user", "assistant", "tool"):
        _unreadable(f"messages[{number}]: unknown role")
    content = raw.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if content is None and raw["role"] == "assistant":
        content = ""
    if not isinstance(content, str):
        _unreadable(f"messages[{number}].content: expected a string")
    return raw["role"], content


def _effort(body: dict[str, Any]) -> str | None:
    """Thinking is on unless it is disabled; its default effort is high."""
    thinking = body.get("thinking") or {}
    if not isinstance(thinking, dict) or thinking.get("type", "enabled") not in ("enabled", "disabled"):
        _unreadable("thinking.type: expected enabled or disabled")
    effort = body.get("reasoning_effort") or "high"
    if effort not in EFFORTS:
        _unreadable(f"reasoning_effort: expected one of {', '.join(EFFORTS)}")
    return None if thinking.get("type") == "disabled" or effort == "none" else effort


def _top_logprobs(body: dict[str, Any], effort: str | None) -> int | None:
    wanted, top = body.get("logprobs"), body.get("top_logprobs")
    if not isinstance(wanted, bool | None):
        _unreadable("logprobs: expected a boolean")
    if not wanted:
        if top:
            raise Refusal(400, "Invalid top_logprobs value, logprobs must be set to true")
        return None
    if effort is not None:
        raise Refusal(400, "logprobs is not supported in thinking mode")
    top = 0 if top is None else top
    if not isinstance(top, int) or isinstance(top, bool):
        _unreadable("top_logprobs: expected an integer")
    if not 0 <= top <= 20:
        raise Refusal(400, "Invalid top_logprobs value, the valid range of top_logprobs is [0, 20]")
    return top


def _check_sampling(body: dict[str, Any]) -> None:
    for name, low, high in (("temperature", 0, 2), ("top_p", 0, 1)):
        value = body.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            _unreadable(f"{name}: expected a number")
        if not low <= value <= high:
            raise Refusal(400, f"Invalid {name} value, the valid range of {name} is [{low}, {high}]")


def _is_json(body: dict[str, Any], messages: tuple[tuple[str, str], ...]) -> bool:
    shape = body.get("response_format") or {"type": "text"}
    if not isinstance(shape, dict) or shape.get("type") not in ("text", "json_object"):
        raise Refusal(400, "This response_format type is unavailable now")
    if shape["type"] == "text":
        return False
    if not any("json" in content.lower() for _, content in messages):
        raise Refusal(400, "Prompt must contain the word 'json' to use 'response_format' of type 'json_object'.")
    return True


def _max_tokens(body: dict[str, Any], effort: str | None) -> int:
    limit = body.get("max_tokens")
    if limit is None:
        limit = body.get("max_completion_tokens")
    if limit is None:
        return DEFAULT_OUTPUT if effort is None else DEFAULT_THINKING_OUTPUT
    if not isinstance(limit, int) or isinstance(limit, bool):
        _unreadable("max_tokens: expected an integer")
    if not 1 <= limit <= MAX_OUTPUT:
        raise Refusal(400, f"Invalid max_tokens value, the valid range of max_tokens is [1, {MAX_OUTPUT}]")
    return limit


def _tool(body: dict[str, Any], effort: str | None) -> dict[str, Any] | None:
    """The named function, if the choice of one is forced; only without thinking."""
    choice = body.get("tool_choice")
    if not isinstance(choice, dict):
        return None
    if effort is not None:
        raise Refusal(400, "Thinking mode does not support this tool_choice")
    name = (choice.get("function") or {}).get("name")
    for tool in body.get("tools") or ():
        if isinstance(tool, dict) and (tool.get("function") or {}).get("name") == name:
            return dict(tool["function"])
    raise Refusal(400, f"tool_choice names no function of tools: {name}")


def check_context(prompt_tokens: int, ask: Ask) -> None:
    """Raises Refusal where prompt and answer would not fit the context."""
    total = prompt_tokens + ask.max_tokens
    if total > CONTEXT:
        raise Refusal(
            400,
            f"This model's maximum context length is {CONTEXT} tokens. However, you requested {total} tokens "
            f"({prompt_tokens} in the messages, {ask.max_tokens} in the completion). "
            "Please reduce the length of the messages or completion.",
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one attempt; `reasoning` is inside `output`."""

    hit: int
    miss: int
    output: int
    reasoning: int

    def on_wire(self) -> dict[str, Any]:
        prompt = self.hit + self.miss
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": self.output,
            "total_tokens": prompt + self.output,
            "prompt_tokens_details": {"cached_tokens": self.hit},
            "prompt_cache_hit_tokens": self.hit,
            "prompt_cache_miss_tokens": self.miss,
        }
        if self.reasoning:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.reasoning}
        return usage


@dataclass(frozen=True, slots=True)
class Answered:
    """Everything in a reply's body. `logprobs` is already serialised."""

    provider_id: str
    created: int
    model: str
    fingerprint: str
    message: dict[str, Any]
    logprobs: bytes
    finish_reason: str
    usage: Usage

    def on_wire(self) -> bytes:
        body = {
            "id": self.provider_id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [
                {
                    "index": 0,
                    "message": self.message,
                    "logprobs": orjson.Fragment(self.logprobs),
                    "finish_reason": self.finish_reason,
                }
            ],
            "usage": self.usage.on_wire(),
            "system_fingerprint": self.fingerprint,
        }
        return orjson.dumps(body)
