"""The provider's bill: one line per billed attempt in an append-only file, and the sums over it.

A line is handed to the operating system before the reply it bills is sent, so a killed server never forgets what
a client may have received. A torn last line was never followed by a reply, and is cut off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from sandbox.errors import SandboxError

FOLDER = "deepseek"
FILE = "bill.jsonl"


@dataclass(frozen=True, slots=True)
class BillTotal:
    """Billed attempts and their sum, in pico units of one currency."""

    attempts: int
    cost_pico: int
    currency: str


@dataclass(frozen=True, slots=True)
class BillLine:
    """One billed attempt.

    `at` is the whole second that decided the tariff, prices are pico units per token, `status` is what the client
    was sent, and `delivery` is `sent`, `aborted` (the client had left) or `withheld` (a mishap kept or cut it).
    """

    attempt: str
    user_id: str
    provider_id: str
    model: str
    served_model: str
    at: str
    band: str
    hit: int
    miss: int
    output: int
    reasoning: int
    hit_pico: int
    miss_pico: int
    output_pico: int
    cost_pico: int
    currency: str
    status: int
    finish_reason: str
    delivery: str
    mishap: str | None = None


def bill_path(home: Path) -> Path:
    return home / FOLDER / FILE


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of a bill file, oldest first. A missing file is an empty bill."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield orjson.loads(line)


def sum_lines(path: Path, currency: str) -> BillTotal:
    """The total of a bill file; `currency` is what an empty one is in. Raises on a bill in two currencies."""
    attempts = cost = 0
    currencies = set()
    for line in read_lines(path):
        attempts += 1
        cost += line["cost_pico"]
        currencies.add(line["currency"])
    if len(currencies) > 1:
        raise SandboxError(f"{path} holds two currencies; `farthing sandbox reset` starts a new bill")
    return BillTotal(attempts, cost, currencies.pop() if currencies else currency)


def read_bill(home: Path) -> BillTotal:
    """The total that the sandbox of this home has billed so far, read from its file; no server is needed."""
    return sum_lines(bill_path(home), "USD")


class Bill:
    """The open bill of a running server, with its totals in memory."""

    def __init__(self, path: Path, currency: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        total = sum_lines(path, currency)
        if total.currency != currency:
            raise SandboxError(f"{path} is in {total.currency}; start with that currency, or reset the sandbox")
        self.path = path
        self.currency = currency
        self.attempts = total.attempts
        self.cost_pico = total.cost_pico
        _cut_torn_line(path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    @property
    def total(self) -> BillTotal:
        return BillTotal(self.attempts, self.cost_pico, self.currency)

    def append(self, line: BillLine) -> None:
        """Write one line in one system call; it survives this process from here on.

        Raises SandboxError when only a part of it could be written, which is then taken back.
        """
        raw = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
        end = os.fstat(self._file).st_size
        if os.write(self._file, raw) != len(raw):
            # The next line would be appended to the half one, and neither could be read again.
            os.ftruncate(self._file, end)
            raise SandboxError(f"{self.path} cannot be written: the disk is full")
        self.attempts += 1
        self.cost_pico += line.cost_pico

    def close(self) -> None:
        os.close(self._file)


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end and (file.seek(end - 1), file.read(1))[1] != b"\n":
            end -= 1
        if end != size:
            file.truncate(end)
