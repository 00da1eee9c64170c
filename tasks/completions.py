"""The one door to the model: one `Call` in, one `Reply` out, whatever the provider or the network does.

No retry happens in here: every request is an attempt with a ledger row of its own, and a hidden second one
would be a bill without a row. The only importer of openai, whose raw `post` is used: its typed models cost
more than the rest of a request together (design: performance.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx2
import openai
import orjson
import structlog

from schemas.attempts import Call, Reply, Signal
from schemas.balance import Balance, read_balance
from schemas.errors import ConfigurationError, ProviderStopped
from schemas.money import Currency
from schemas.replies import DATE_TOLERANCE, Arrival, NotJson, load_json, read_date, read_reply
from tasks.transport import BODY_SECONDS, Transport, describe

MIB = 1024 * 1024
#: An offset between two clocks that Date headers show again and again to be off by less is as good as they get.
_CLOCK_TOLERANCE = timedelta(seconds=2)
#: A question about the account or the models, not an attempt: small, so short.
_QUESTION_DEADLINE_S = 30.0

#: Statuses of a question that say that the key or the address is wrong. Asked before any money, so nothing is spent.
_OUR_MISTAKES = (401, 403, 404, 405)

#: No compression, so that a size is a size; and without what openai tells about this machine, which costs a
#: tenth of a request to build and is nobody's business.
_HEADERS: dict[str, str | openai.Omit] = {
    "Accept-Encoding": "identity",
    "User-Agent": "farthing",
    "X-Stainless-Lang": openai.omit,
    "X-Stainless-Package-Version": openai.omit,
    "X-Stainless-OS": openai.omit,
    "X-Stainless-Arch": openai.omit,
    "X-Stainless-Runtime": openai.omit,
    "X-Stainless-Runtime-Version": openai.omit,
    "X-Stainless-Async": openai.omit,
    "x-stainless-retry-count": openai.omit,
    "x-stainless-read-timeout": openai.omit,
}

log = structlog.get_logger(__name__)


class Unsendable(Exception):
    """The call cannot be written as JSON, so no request was made."""


def utc_now() -> datetime:
    """This machine's clock, in UTC."""
    return datetime.now(UTC)


class Completions:
    """The provider at one base URL, with one pool of at most `ceiling` connections. An async context manager.

    `offset` is the provider's clock minus this machine's; each reply with a Date puts it right where it is off, as
    after this machine slept.

    `send_attempt_key` is for the sandbox only: it adds an X-Attempt header, and believes the provider's clock
    however far it is from ours, because a sandbox's is set at will.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        ceiling: int = 2500,
        send_attempt_key: bool = False,
        size_cap: int = 32 * MIB,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        _check_door(base_url, api_key)
        self._base_url = base_url
        self._url = f"{base_url.rstrip('/')}/chat/completions"  # whole, so that it is not merged anew each time
        self._api_key = api_key
        self._ceiling = ceiling
        self._size_cap = size_cap
        self._sends_attempt_key = send_attempt_key
        self._date_tolerance = timedelta.max if send_attempt_key else DATE_TOLERANCE
        self._now = now
        self.offset = timedelta(0)
        self._client: openai.AsyncOpenAI | None = None

    async def __aenter__(self) -> Self:
        # httpx2 logs every request's URL at INFO: a line per document, and a query string may hold a secret.
        logging.getLogger("httpx2").setLevel(logging.WARNING)
        self._client = openai.AsyncOpenAI(
            base_url=self._base_url,
            api_key=self._api_key,
            max_retries=0,
            http_client=openai.DefaultAioHttpClient(
                transport=Transport(self._base_url, ceiling=self._ceiling, size_cap=self._size_cap)
            ),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def complete(self, call: Call) -> Reply:
        """Make one attempt and say what came of it. Raises nothing but CancelledError and programming errors."""
        client = self._open_client()
        sent_at = self.now()
        try:
            response = await _post(client, self._url, _encode(call), self._options(call))
            reply = read_reply(self._arrival(response, sent_at))
        except Exception as error:
            signal, detail = signal_of(error)
            reply = Reply(signal, sent_at, self.now(), detail=detail)
        if reply.signal is not Signal.ANSWERED:
            log.debug("attempt", key=call.attempt_key, signal=reply.signal.value, detail=reply.detail)
        return reply

    def now(self) -> datetime:
        """The provider's clock, as far as it is known."""
        return self._now() + self.offset

    async def balance(self, currency: Currency | None = None) -> Balance:
        """What is left on the account, in its funded currency or this one.

        Raises ProviderStopped or ConfigurationError.
        """
        balance = read_balance(await self._ask("/user/balance"), currency)
        if balance is None:
            raise ProviderStopped("the provider's balance reply names neither USD nor CNY; check DEEPSEEK_BASE_URL")
        return balance

    async def models(self) -> tuple[str, ...]:
        """The model ids that the provider offers this account. Raises ProviderStopped or ConfigurationError."""
        value = await self._ask("/models")
        rows = value.get("data") if isinstance(value, dict) else None
        ids = [row.get("id") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        return tuple(name for name in ids if isinstance(name, str))

    async def clock_offset(self) -> timedelta:
        """The provider's clock minus this machine's, in whole seconds. Raises ProviderStopped or ConfigurationError.

        Zero where the provider sends no sane Date: then this machine's clock is the only one there is.
        """
        before = self._now()
        response = await self._get("/models")
        middle = before + (self._now() - before) / 2
        date = self._date(response, middle)
        if date is None:
            return timedelta(0)
        return _offset(date, middle)

    async def correct_clock(self) -> None:
        """Ask the provider for the time where no reply has told it for long. Raises as `clock_offset` does."""
        self._correct_offset(await self.clock_offset())

    def _open_client(self) -> openai.AsyncOpenAI:
        if self._client is None:
            raise RuntimeError("Completions is an async context manager; use it inside `async with`")
        return self._client

    def _options(self, call: Call) -> dict[str, Any]:
        """openai's RequestOptions; each that is named here is one it does not have to copy from its defaults."""
        headers = {**_HEADERS, "X-Attempt": call.attempt_key} if self._sends_attempt_key else _HEADERS
        return {"timeout": call.deadline_s, "headers": headers, "max_retries": 0, "security": {"bearer_auth": True}}

    def _arrival(self, response: httpx2.Response, sent_at: datetime) -> Arrival:
        """The reply with its instants. A queued request gets its headers, Date too, long before its answer."""
        now = self._now()
        date = self._date(response, now)
        if date is None:
            ended = now + self.offset
        else:
            ended = (date + timedelta(seconds=response.extensions.get(BODY_SECONDS, 0.0))).replace(microsecond=0)
            self._correct_offset(_offset(ended, now))
        return Arrival(response.status_code, response.content, response.headers.get("retry-after"), sent_at, ended)

    def _correct_offset(self, seen: timedelta) -> None:
        if abs(seen - self.offset) > _CLOCK_TOLERANCE:
            log.debug("clocks moved apart", seconds=(seen - self.offset).total_seconds())
            self.offset = seen

    def _date(self, response: httpx2.Response, now: datetime) -> datetime | None:
        return read_date(response.headers.get("date"), now, tolerance=self._date_tolerance)

    async def _ask(self, path: str) -> object:
        try:
            return load_json((await self._get(path)).content)
        except (ValueError, RecursionError):
            raise ProviderStopped(
                f"the provider's reply to {path} is not JSON; check that DEEPSEEK_BASE_URL is an API, not a web page"
            ) from None

    async def _get(self, path: str) -> httpx2.Response:
        client = self._open_client()
        try:
            return await client.get(path, cast_to=httpx2.Response, options={"timeout": _QUESTION_DEADLINE_S})
        except openai.APIStatusError as error:
            is_ours = error.status_code in _OUR_MISTAKES
            raise (ConfigurationError if is_ours else ProviderStopped)(
                _refusal_advice(error.status_code, path)
            ) from None
        except Exception as error:
            _, detail = signal_of(error)
            host = urlsplit(self._base_url).hostname
            raise ProviderStopped(
                f"the provider at {host} does not answer ({detail}); check the network and DEEPSEEK_BASE_URL"
            ) from None


def _offset(date: datetime, ours: datetime) -> timedelta:
    """The provider's clock minus ours; a Date header is cut to whole seconds, so on average half a second late."""
    return timedelta(seconds=round((date - ours).total_seconds() + 0.5))


def signal_of(error: Exception) -> tuple[Signal, str]:
    """The signal of an attempt that ended in an exception, and a detail that is safe to store.

    NOT_SENT only where it is certain that nothing was sent, and REJECTED where no request could be made; any
    other failure may have been billed.
    """
    cause = error.__cause__ if isinstance(error, openai.APIConnectionError) and error.__cause__ else error
    match cause:
        case Unsendable():
            return Signal.REJECTED, "the document or the parameters cannot be written as JSON"
        case httpx2.ConnectError() | httpx2.ConnectTimeout():
            return Signal.NOT_SENT, f"nothing was sent: {cause}"
        case httpx2.ReadError() | httpx2.ReadTimeout():
            return Signal.LOST, f"no whole reply: {cause}"
        case NotJson():
            return Signal.MALFORMED, "200 with a body that is not JSON"
        case UnicodeDecodeError():
            return Signal.LOST, "the reply is not UTF-8"
        case ValueError() | RecursionError():
            return Signal.LOST, f"the reply cannot be read: {describe(cause)}"
        case _:
            return Signal.LOST, f"the attempt failed: {describe(cause)}"


def _encode(call: Call) -> bytes:
    """The request body, encoded once. Raises Unsendable, as for a lone surrogate in a document."""
    try:
        return orjson.dumps({"model": call.model, "messages": call.messages, **call.parameters})
    except TypeError:
        raise Unsendable from None


async def _post(client: openai.AsyncOpenAI, url: str, body: bytes, options: Any) -> httpx2.Response:
    """Post one completion request and return the raw response of any status."""
    try:
        return await client.post(url, cast_to=httpx2.Response, content=body, options=options)
    except openai.APIStatusError as error:
        return error.response


def _check_door(base_url: str, api_key: str) -> None:
    """Refuse an address or key that no request could use. Raises ConfigurationError, which quotes neither."""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError("DEEPSEEK_BASE_URL is not an http(s) URL; write it like https://api.deepseek.com")
    if parts.username is not None or parts.password is not None:
        raise ConfigurationError("DEEPSEEK_BASE_URL holds a user or password; put the key into DEEPSEEK_API_KEY only")
    if parts.query or parts.fragment:
        raise ConfigurationError("DEEPSEEK_BASE_URL has a ? or # in it; end it with the path, as in /v1")
    if not api_key:
        raise ConfigurationError("DEEPSEEK_API_KEY is not set; set it, or use --sandbox, which needs no key")
    if not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
        raise ConfigurationError("DEEPSEEK_API_KEY has a space or an unprintable character in it; copy it again")


def _refusal_advice(status: int, path: str) -> str:
    match status:
        case 401 | 403:
            return f"the provider refused the key (HTTP {status}); check DEEPSEEK_API_KEY"
        case 402:
            return "the account has no balance (HTTP 402); top it up, then resume"
        case 404 | 405:
            return f"the provider has no {path} (HTTP {status}); check DEEPSEEK_BASE_URL"
        case _:
            return f"the provider answered {path} with HTTP {status}; try again later"
