"""The emulated DeepSeek as a server: routes, set-up and its own command line (`python -m sandbox.deepseek`).

It binds 127.0.0.1 only. Nothing of the product is imported: prices, counts and the bill are its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

import orjson
from aiohttp import web

from sandbox.account import KEY_PREFIX, Account
from sandbox.answers import AnswerKey
from sandbox.bill import FOLDER, Bill, bill_path
from sandbox.clock import Clock, parse_instant
from sandbox.drafts import Author
from sandbox.endpoint import LOCK, Published, last_published, publish, take_lock, try_lock
from sandbox.errors import SandboxError
from sandbox.exchange import JSON, Exchange, House
from sandbox.export import export_month
from sandbox.latency import Latency, Pace
from sandbox.mishaps import Mishaps
from sandbox.prefixcache import PrefixCache
from sandbox.tariff import FLASH, PRO, charge_at
from sandbox.tokens import Encodings, encode_exactly, encode_fast, load
from sandbox.wire import MODELS, Refusal, read_ask

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class DeepSeek:
    """The HTTP face of one house."""

    def __init__(self, house: House, mishaps: Mishaps) -> None:
        self.house = house
        self.mishaps = mishaps
        self.requests = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        for base in ("", "/v1", "/beta"):
            app.router.add_post(f"{base}/chat/completions", self.complete)
            app.router.add_get(f"{base}/models", self._guarded(self.models))
            app.router.add_get(f"{base}/user/balance", self._guarded(self.balance))
        app.router.add_get("/sandbox/bill", self.bill)
        app.router.add_get("/sandbox/export", self.export)
        app.router.add_get("/sandbox/status", self.status)
        app.router.add_post("/sandbox/clock", self.set_clock)
        app.router.add_post("/sandbox/limits", self.set_limits)
        app.router.add_post("/sandbox/balance", self.set_balance)
        app.router.add_get("/sandbox/mishaps", self.show_mishaps)
        app.router.add_post("/sandbox/mishaps", self.add_mishaps)
        app.router.add_delete("/sandbox/mishaps", self.clear_mishaps)
        return app

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        attempt = request.headers.get("X-Attempt", "")
        account = self.house.account
        try:
            account.check_key(request.headers.get("Authorization"))
            ask = read_ask(await request.read())
            account.check_balance()
            with account.slot(ask.model):
                mishap = self.mishaps.choose(attempt, ask.model)
                exchange = Exchange(self.house, request, ask, attempt)
                return await (mishap.befall(exchange) if mishap else exchange.answer())
        except Refusal as refusal:
            return self._refuse(refusal)
        except web.HTTPRequestEntityTooLarge:
            return self._refuse(Refusal(413, "Request body is too large"))
        except SandboxError as error:
            return self._refuse(Refusal(503, str(error), "server_error"))

    def _refuse(self, refusal: Refusal) -> web.Response:
        return self._reply(refusal.body, refusal.status)

    def _reply(self, body: bytes, status: int = 200) -> web.Response:
        headers = {"Date": self.house.clock.http_date(self.house.clock.second()), "Content-Type": JSON}
        return web.Response(body=body, status=status, headers=headers)

    def _guarded(self, handler: Handler) -> Handler:
        """Ask for the key first."""

        async def guarded(request: web.Request) -> web.StreamResponse:
            try:
                self.house.account.check_key(request.headers.get("Authorization"))
            except Refusal as refusal:
                return self._refuse(refusal)
            return await handler(request)

        return guarded

    async def models(self, request: web.Request) -> web.StreamResponse:
        rows = [{"id": model, "object": "model", "owned_by": "deepseek"} for model in (FLASH, PRO)]
        return self._reply(orjson.dumps({"object": "list", "data": rows}))

    async def balance(self, request: web.Request) -> web.StreamResponse:
        return self._reply(orjson.dumps(self.house.account.on_wire()))

    async def bill(self, request: web.Request) -> web.StreamResponse:
        return self._reply(orjson.dumps({**asdict(self.house.bill.total), "requests": self.requests}))

    async def export(self, request: web.Request) -> web.StreamResponse:
        month = request.query.get("month", "")
        if len(month) != 7:
            return self._refuse(Refusal(400, "say which month: ?month=YYYY-MM"))
        body = export_month(self.house.bill.path, month)
        disposition = f'attachment; filename="usage_data_{month}.zip"'
        return web.Response(body=body, content_type="application/zip", headers={"Content-Disposition": disposition})

    async def status(self, request: web.Request) -> web.StreamResponse:
        account = self.house.account
        body = {
            "pid": os.getpid(),
            "now": self.house.clock.second(),
            "requests": self.requests,
            "documents": len(self.house.author.key),
            "in_flight": {model: account.in_flight[model] for model in (FLASH, PRO)},
            "peak_in_flight": {model: account.peak[model] for model in (FLASH, PRO)},
            "ceiling": {model: account.ceiling(model) for model in (FLASH, PRO)},
        }
        return self._reply(orjson.dumps(body))

    async def set_clock(self, request: web.Request) -> web.StreamResponse:
        """`{"now": "2026-11-25T02:00:00Z"}`, or null for this machine's time."""
        return await self._set(request, lambda body: _set_clock(self.house, body["now"]))

    async def set_limits(self, request: web.Request) -> web.StreamResponse:
        """`{"deepseek-flash": 50}`: the concurrency that the account is entitled to, and its peaks, from now on."""
        return await self._set(
            request,
            lambda body: self.house.account.set_limits({MODELS[name]: int(limit) for name, limit in body.items()}),
        )

    async def set_balance(self, request: web.Request) -> web.StreamResponse:
        """`{"balance": "5.00"}`: what is left from now on, in whole units of the funded currency."""
        return await self._set(request, lambda body: _set_balance(self.house, body["balance"]))

    async def show_mishaps(self, request: web.Request) -> web.StreamResponse:
        return self._reply(orjson.dumps(self.mishaps.on_wire()))

    async def add_mishaps(self, request: web.Request) -> web.StreamResponse:
        """A list of rules, added after those already there."""
        return await self._set(request, self.mishaps.add)

    async def clear_mishaps(self, request: web.Request) -> web.StreamResponse:
        self.mishaps.clear()
        return self._reply(b"{}")

    async def _set(self, request: web.Request, change: Callable[[Any], None]) -> web.StreamResponse:
        try:
            change(orjson.loads(await request.read()))
        except (SandboxError, ValueError, KeyError, TypeError, ArithmeticError) as error:
            return self._refuse(Refusal(400, f"{type(error).__name__}: {error}"))
        return self._reply(b"{}")


def _set_clock(house: House, text: str | None) -> None:
    """Refuses an instant that no price covers, before anything is billed at it."""
    instant = None if text is None else parse_instant(text)
    clock = Clock(instant)
    check_priced(clock, house.bill.currency)
    house.clock = clock


def check_priced(clock: Clock, currency: str) -> None:
    for model in (FLASH, PRO):
        charge_at(model, currency, datetime.fromtimestamp(clock.second(), UTC))


def _set_balance(house: House, text: str) -> None:
    house.account.funded_pico = house.bill.cost_pico + to_pico(text)


def to_pico(text: str) -> int:
    """Whole units in decimal to pico units."""
    return int(Decimal(str(text)) * 10**12)


def build(options: argparse.Namespace) -> DeepSeek:
    """Put the parts together. Raises SandboxError for options that cannot work."""
    clock = Clock(parse_instant(options.clock) if options.clock else None)
    check_priced(clock, options.currency)
    bill = Bill(bill_path(options.home), options.currency)
    account = Account(bill, to_pico(options.balance), options.key)
    account.set_limits({FLASH: options.flash_limit, PRO: options.pro_limit})
    scale = options.time_scale
    house = House(
        account=account,
        bill=bill,
        clock=clock,
        author=Author(AnswerKey(options.answers), options.seed),
        encode=Encodings(encode_fast if options.tokens == "fast" else encode_exactly),
        cache=PrefixCache(build_s=options.cache_build * scale),
        latency=Latency(Pace(scale, options.queue, options.reply, options.slow), options.seed),
        basis=options.basis,
        blank_s=options.blank * scale,
    )
    mishaps = Mishaps()
    if options.mishaps:
        mishaps.add(json.loads(options.mishaps.read_text()))
    return DeepSeek(house, mishaps)


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m sandbox.deepseek", description="A DeepSeek on this machine.")
    add = parser.add_argument
    add("--home", type=Path, default=Path(".farthing"), help="its bill lives in HOME/deepseek (default: .farthing)")
    add("--port", type=int, default=0, help="default: the port it had before, or any free one")
    add("--key", help="the one valid API key (default: any that starts with sk-sandbox)")
    add("--clock", help="start the provider's clock at this instant, e.g. 2026-11-25T02:00:00Z (default: now)")
    add("--basis", choices=("completion", "dispatch"), default="completion", help="which instant decides the tariff")
    add("--currency", choices=("USD", "CNY"), default="USD", help="the funded currency, and so the price card")
    add("--balance", default="1000", help="paid in, in whole units (default: 1000); low ones shrink the ceilings")
    add("--flash-limit", type=int, default=2_500, help="concurrency of Flash (default: 2500)")
    add("--pro-limit", type=int, default=500, help="concurrency of Pro (default: 500)")
    add("--answers", type=Path, action="append", default=[], help="an answer key, JSON lines; may be given again")
    add("--mishaps", type=Path, help="a JSON list of fault rules")
    add("--seed", type=int, default=0, help="of answers, waits and mishaps (default: 0)")
    add("--time-scale", type=float, default=1.0, help="1: real time; 0: answer at once")
    add("--reply", type=float, help="median seconds of a whole reply, instead of tokens per second")
    add("--slow", type=float, default=0.0, help="share of replies that take twenty times as long (default: 0)")
    add("--queue", type=float, default=0.0, help="mean seconds in the queue (default: 0)")
    add("--blank", type=float, default=10.0, help="seconds between blank lines while queued (default: 10)")
    add("--cache-build", type=float, default=3.0, help="seconds until a new prefix unit serves (default: 3)")
    add("--tokens", choices=("exact", "fast"), default="exact", help="fast: four bytes are one token")
    add("--while-used", action="store_true", help="stop when no process uses it (set by sandbox/service.py)")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    options.as_given = [flag for flag in given if not flag.startswith(("--home", "--while-used"))]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. One server per home: a second one is refused with exit code 2."""
    options = read_options(arguments)
    folder = options.home / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    # The last one opened is let go first: whoever gets a turn must never find a server that is about to leave.
    with _open(folder, "turn") as turn, _open(folder, "users") as users, _open(folder, LOCK) as lock:
        if not take_lock(lock):
            print(f"a sandbox already serves {options.home}", file=sys.stderr)
            return 2
        try:
            load()  # now, not in the first request
            server = build(options)
        except (SandboxError, ValueError, OSError) as error:
            print(f"the sandbox cannot start: {error}", file=sys.stderr)
            return 2
        asyncio.run(_serve(server, options, turn, users))
    return 0


def _open(folder: Path, name: str) -> IO[str]:
    return (folder / name).open("a")


async def _serve(server: DeepSeek, options: argparse.Namespace, turn: IO[str], users: IO[str]) -> None:
    stopped = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stopped.set)
    runner = await start(server.app())
    port = await _bind(runner, options)
    _publish(options, port)
    watch = None
    if options.while_used:
        watch = asyncio.create_task(_leave_when_unused(options.home / FOLDER / "kept", turn, users, stopped))
    await stopped.wait()
    if watch is not None:
        watch.cancel()
    await runner.cleanup()
    server.house.bill.close()


async def _leave_when_unused(kept: Path, turn: IO[str], users: IO[str], stopped: asyncio.Event) -> None:
    """Stop when nobody holds `users` any more, as after the SIGKILL of the last one (see sandbox/service.py).

    Both locks are then held to the end, so that nobody can come to rely on a server that is about to leave.
    """
    while not stopped.is_set():
        await asyncio.sleep(2)
        if not try_lock(turn):
            continue
        if not kept.exists() and try_lock(users):
            stopped.set()
        else:
            fcntl.flock(turn, fcntl.LOCK_UN)


async def start(app: web.Application) -> web.AppRunner:
    """Ready to listen: no access log, and a client that leaves cancels its request (which bills it)."""
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=2.0)
    await runner.setup()
    return runner


async def _bind(runner: web.AppRunner, options: argparse.Namespace) -> int:
    """Listen on the port asked for, else the one it had before a crash (clients still hold it), else any."""
    for port in [options.port] if options.port else [_last_port(options.home / FOLDER), 0]:
        site = web.TCPSite(runner, "127.0.0.1", port, backlog=4096)
        with contextlib.suppress(OSError):
            await site.start()
            break
    else:
        raise SandboxError(f"port {options.port} is taken")
    return int(runner.addresses[0][1])


def _last_port(folder: Path) -> int:
    last = last_published(folder)
    return last.port if last else 0


def _publish(options: argparse.Namespace, port: int) -> None:
    url = f"http://127.0.0.1:{port}"
    publish(options.home / FOLDER, Published(os.getpid(), port, url, options.key or KEY_PREFIX, options.as_given))
    print(f"DeepSeek's sandbox listens at {url}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
