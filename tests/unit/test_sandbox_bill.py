"""The bill's file: what it holds, what it survives, and how it is exported."""

from __future__ import annotations

import csv
import io
import resource
import zipfile
from decimal import Decimal
from pathlib import Path

import pytest

from sandbox.bill import Bill, BillLine, BillTotal, bill_path, read_bill, read_lines
from sandbox.errors import SandboxError
from sandbox.export import export_month


def line(attempt: str = "1.2.1", at: str = "2026-11-25T02:00:00Z", hit: int = 128, currency: str = "USD") -> BillLine:
    cost = hit * 6_000 + 100 * 300_000 + 10 * 1_200_000
    return BillLine(
        attempt, "job-x", "id", "deepseek-flash", "deepseek-flash", at, "peak", hit, 100, 10, 0,
        6_000, 300_000, 1_200_000, cost, currency, 200, "stop", "sent",
    )  # fmt: skip


def test_a_bill_is_read_without_a_server(tmp_path: Path) -> None:
    assert read_bill(tmp_path) == BillTotal(0, 0, "USD")
    bill = Bill(bill_path(tmp_path), "USD")
    bill.append(line())
    bill.append(line("1.3.1"))
    assert read_bill(tmp_path) == bill.total == BillTotal(2, 2 * 42_768_000, "USD")
    bill.close()


def test_a_torn_last_line_is_ignored_and_then_cut_off(tmp_path: Path) -> None:
    path = bill_path(tmp_path)
    first = Bill(path, "USD")
    first.append(line())
    first.close()
    with path.open("ab") as file:
        file.write(b'{"attempt": "1.3')
    assert read_bill(tmp_path).attempts == 1
    again = Bill(path, "USD")
    assert again.total.attempts == 1
    again.append(line("1.4.1"))
    again.close()
    assert [row["attempt"] for row in read_lines(path)] == ["1.2.1", "1.4.1"]


def test_a_line_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    bill = Bill(bill_path(tmp_path), "USD")
    bill.append(line())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bill.path.stat().st_size + 20, hard))
    try:
        with pytest.raises(SandboxError, match="disk is full"):
            bill.append(line("1.3.1"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    bill.append(line("1.4.1"))
    bill.close()
    assert [row["attempt"] for row in read_lines(bill.path)] == ["1.2.1", "1.4.1"]


def test_a_bill_is_in_one_currency(tmp_path: Path) -> None:
    bill = Bill(bill_path(tmp_path), "CNY")
    bill.append(line(currency="CNY"))
    bill.close()
    with pytest.raises(SandboxError, match="CNY"):
        Bill(bill_path(tmp_path), "USD")


def test_the_export_adds_up_to_the_bill_of_its_month(tmp_path: Path) -> None:
    bill = Bill(bill_path(tmp_path), "USD")
    for each in (
        line(),
        line(at="2026-11-25T02:59:59Z"),
        line(at="2026-11-25T03:00:00Z"),
        line(at="2026-12-01T00:00:00Z"),
    ):
        bill.append(each)
    bill.close()
    with zipfile.ZipFile(io.BytesIO(export_month(bill.path, "2026-11"))) as archive:
        assert sorted(archive.namelist()) == ["amount-2026-11.csv", "cost-2026-11.csv"]
        amounts, costs = (
            list(csv.DictReader(io.StringIO(archive.read(name).decode("utf-8-sig"))))
            for name in sorted(archive.namelist())
        )
    billed = sum(Decimal(row["price"]) * int(row["amount"]) for row in amounts if row["price"])
    assert billed == sum(Decimal(row["cost"]) for row in costs) == Decimal(3 * 42_768_000).scaleb(-12)
    assert [int(row["amount"]) for row in amounts if row["type"] == "request_count"] == [2, 1]
    assert {row["price"] for row in amounts if row["type"] == "output_tokens"} == {"0.000001200000"}
