"""One HTTP exchange with the provider: bounded in time and in size, and sure whether anything was sent.

It is the openai client's transport (the httpx2 interface) over one aiohttp session, and it exists for three
things that the client's own aiohttp backend cannot say or do:

- *Was anything sent?* The body tells: before its first byte is handed to the connection nothing was sent,
  whatever failed (name, TLS, refusal, a full pool, the deadline); after it, the provider may have billed.
- *One deadline.* While a request is queued the provider sends blank lines, so a timeout between two reads
  never fires. The request's read timeout is taken as the deadline of the whole exchange.
- *One size cap*, while reading, before and after decompression, for error replies too.

Only the headers we act on are passed up: no cookie is kept, no redirect followed, no charset guessed.
"""

from __future__ import annotations

import asyncio
import errno
import urllib.request
import zlib
from urllib.parse import urlsplit

import aiohttp
import httpx2
from aiohttp.abc import AbstractStreamWriter

from tasks.failpoints import reach

#: Idle connections are dropped well before a provider's own limit: a request that is written into a connection
#: that just closed counts as lost, and may be paid twice.
KEEP_ALIVE_S = 15.0
#: Name under which a reply carries how long its body took after its headers, in seconds.
BODY_SECONDS = "farthing.body_seconds"
_KEPT_HEADERS = ("date", "retry-after")


class BodyTooLarge(Exception):
    """The reply is larger than the size cap, as sent or as unpacked."""


class UnreadableEncoding(Exception):
    """The reply is packed in a way that was not asked for and cannot be unpacked within bounds."""


class _Body(aiohttp.Payload):
    """A request body that knows whether any of it was handed to a connection."""

    _default_content_type = "application/json"
    _value: bytes

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._size = len(content)
        self.is_sent = False

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self._value.decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        self.is_sent = True
        await writer.write(self._value)


class Transport(httpx2.AsyncBaseTransport):
    """Exchanges over one pool of at most `ceiling` connections. Made inside the event loop that uses it."""

    def __init__(self, base_url: str, *, ceiling: int, size_cap: int) -> None:
        self._size_cap = size_cap
        self._proxy = environment_proxy(base_url)
        is_tls = urlsplit(base_url).scheme == "https"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=ceiling,
                keepalive_timeout=KEEP_ALIVE_S,
                ssl=httpx2.create_ssl_context() if is_tls else True,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None),
            auto_decompress=False,
        )

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request. Raises ConnectError, ConnectTimeout (nothing sent) or ReadError, ReadTimeout (sent)."""
        body = _Body(request.content)
        try:
            async with asyncio.timeout(request.extensions["timeout"]["read"]):
                return await self._exchange(request, body)
        except Exception as error:
            raise _failure(error, is_sent=body.is_sent) from error

    async def _exchange(self, request: httpx2.Request, body: _Body) -> httpx2.Response:
        async with self._session.request(
            request.method,
            str(request.url),
            headers=[(name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers.raw],
            data=body if body.size else None,
            allow_redirects=False,
            proxy=self._proxy,
        ) as response:
            if body.size:
                reach("send.under_way")
            started = asyncio.get_running_loop().time()
            packed = await _read(response, self._size_cap)
            content = _unpack(packed, response.headers.get("Content-Encoding", ""), self._size_cap)
            return httpx2.Response(
                response.status,
                headers=[(name, response.headers[name]) for name in _KEPT_HEADERS if name in response.headers],
                content=content,
                extensions={BODY_SECONDS: asyncio.get_running_loop().time() - started},
            )

    async def aclose(self) -> None:
        await self._session.close()


async def _read(response: aiohttp.ClientResponse, size_cap: int) -> bytes:
    """The whole body as sent. Raises BodyTooLarge as soon as it is known to exceed the cap."""
    if (response.content_length or 0) > size_cap:
        raise BodyTooLarge
    chunks, size = [], 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > size_cap:
            raise BodyTooLarge
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _unpack(packed: bytes, encoding: str, size_cap: int) -> bytes:
    """The body without its content encoding, never inflated past the cap. We ask for none; a gateway may not care."""
    match encoding.strip().lower():
        case "" | "identity":
            return packed
        case "gzip" | "x-gzip" | "deflate":
            stream = zlib.decompressobj(wbits=47)  # gzip or zlib, by its header
            content = stream.decompress(packed, size_cap + 1)
            if len(content) > size_cap:
                raise BodyTooLarge
            if not stream.eof:
                raise UnreadableEncoding
            return content
        case _:
            raise UnreadableEncoding


def _failure(error: Exception, *, is_sent: bool) -> httpx2.TransportError:
    """What went wrong, in httpx2's own words for before and after the request was sent."""
    if type(error) is TimeoutError:  # the deadline; what the system itself calls a timeout is a subclass or wrapped
        return httpx2.ReadTimeout("deadline") if is_sent else httpx2.ConnectTimeout("deadline")
    return (httpx2.ReadError if is_sent else httpx2.ConnectError)(describe(error))


def describe(error: BaseException) -> str:
    """An error's class and system code. Its own text may hold a URL or a document, so it is never used."""
    code = getattr(error, "errno", None)
    name = errno.errorcode.get(code) if isinstance(code, int) else None
    return f"{type(error).__name__} {name}" if name else type(error).__name__


def environment_proxy(base_url: str) -> str | None:
    """The proxy that the environment names for this URL; never one for this machine itself."""
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    if host == "localhost" or host.startswith("127.") or host == "::1" or urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")
