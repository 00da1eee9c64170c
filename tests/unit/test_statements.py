"""Exports of a console: read whatever their columns and encodings, or refused by file, line and column."""

from __future__ import annotations

import io
import os
import zipfile
from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from schemas.errors import ConfigurationError
from schemas.money import Currency
from schemas.statements import Bucket, Statement
from tasks import statements
from tasks.statements import load_statement

HEADER = "user_id,start_time_iso,end_time_iso,model,api_key_name,api_key,type,price,amount"
ROW = "u1,2026-11-25T02:00:00+00:00,2026-11-25T03:00:00+00:00,deepseek-flash,mine,sk-1***,{type},{price},{amount}"
MISS = ROW.format(type="input_cache_miss_tokens", price="0.0000003", amount="1200")
OUTPUT = ROW.format(type="output_tokens", price="0.0000012", amount="30")
COUNT = ROW.format(type="request_count", price="", amount="3")
COST = "utc_date,model,wallet_type,cost,currency\n2026-11-25,deepseek-flash,paid,0.000396,CNY\n"


def write(path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path.write_bytes("\r\n".join(lines).encode(encoding))
    return path


def zipped(path: Path, **members: str | bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tokens(statement: Statement) -> dict[tuple[date, str, Bucket, int], int]:
    return {(each.period.day, each.model, each.bucket, each.price_pico): each.tokens for each in statement.used}


USUAL = {
    (date(2026, 11, 25), "deepseek-flash", Bucket.MISS, 300_000): 1200,
    (date(2026, 11, 25), "deepseek-flash", Bucket.OUTPUT, 1_200_000): 30,
}


def test_a_zip_of_amounts_and_costs_is_read(tmp_path: Path) -> None:
    path = zipped(
        tmp_path / "usage_data_2026-11.zip",
        **{
            "amount-2026-11.csv": "\ufeff" + "\n".join([HEADER, MISS, OUTPUT, COUNT, ""]),
            "cost-2026-11.csv": COST,
            "__MACOSX/._amount-2026-11.csv": b"\0\0",
        },
    )
    found = load_statement([path])
    assert tokens(found) == USUAL
    assert (found.currency, sum(each.pico for each in found.charged)) == (Currency.CNY, 396_000_000)
    assert (found.since, found.until) == (
        datetime(2026, 11, 25, 2, tzinfo=UTC),
        datetime(2026, 11, 25, 2, tzinfo=UTC),
    )
    assert found.sources[0].startswith("usage_data_2026-11.zip (sha256:")


@pytest.mark.parametrize(
    ("lines", "encoding"),
    [
        ([HEADER, MISS, OUTPUT], "utf-8-sig"),
        ([HEADER, MISS, "", OUTPUT, ""], "utf-16"),
        ([line.replace(",", ";") for line in (HEADER, MISS, OUTPUT)], "utf-8"),
        ([line.replace(",", "\t") for line in (HEADER, MISS, OUTPUT)], "utf-8"),
        (
            [  # another order, other columns, Beijing's offset, an exponent
                "Amount, Type,price,region,MODEL,start_time_iso",
                "1200,input_cache_miss_tokens,3E-7,cn,deepseek-flash,2026-11-25T10:00:00+08:00",
                "30,output_tokens,0.00000120,cn,deepseek-flash,2026-11-25T10:00:00+08:00",
            ],
            "utf-8",
        ),
        (
            [  # the older form
                "utc_date,model,type,price,amount",
                "2026-11-25,deepseek-flash,input_cache_miss_tokens,0.0000003,1200",
                "2026/11/25,deepseek-flash,output_tokens,0.0000012,30.0",
            ],
            "utf-8",
        ),
    ],
)
def test_columns_encodings_and_offsets_may_be_others(tmp_path: Path, lines: list[str], encoding: str) -> None:
    assert tokens(load_statement([write(tmp_path / "amount.csv", *lines, encoding=encoding)])) == USUAL


def test_a_key_is_taken_out_of_an_account_that_others_use(tmp_path: Path) -> None:
    path = write(tmp_path / "amount.csv", HEADER, MISS, OUTPUT.replace("mine", "theirs"))
    assert [each.bucket for each in load_statement([path], key="mine").used] == [Bucket.MISS]
    with pytest.raises(ConfigurationError, match="nothing of an API key 'x'; it knows mine, theirs"):
        load_statement([path], key="x")


def changed(row: str, was: str, becomes: str) -> list[str]:
    assert was in row
    return [HEADER, OUTPUT, row.replace(was, becomes)]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (changed(MISS, "1200", "1e400"), "a.csv:3: amount: '1e400' is no number"),
        (changed(MISS, "1200", "1.5"), "a.csv:3: amount: '1.5' is no whole number, 0 or more"),
        (changed(MISS, "1200", "-1"), "a.csv:3: amount: '-1' is no whole number, 0 or more"),
        (changed(MISS, "1200", ""), "a.csv:3: amount: is empty"),
        (changed(MISS, "0.0000003", "0.0000000000001"), "no whole number of pico units per token"),
        (changed(MISS, "0.0000003", "free"), "a.csv:3: price: 'free' is no number"),
        (changed(MISS, "input_cache_miss_tokens", "image_tokens"), "a.csv:3: type: 'image_tokens' has a price"),
        (changed(MISS, "02:00:00+00:00", "02:00:00"), "start_time_iso: '2026-11-25T02:00:00' has no offset"),
        (changed(MISS, "2026-11-25T02", "yesterday"), "start_time_iso: 'yesterday"),
        (changed(MISS, "2026-11-25T03", "2026-11-26T03"), "end_time_iso: the row is about two UTC days"),
        (changed(MISS, "2026-11-25T03", "2026-11-25T01"), "end_time_iso: is not later than start_time_iso"),
        (changed(MISS, "deepseek-flash", ""), "a.csv:3: model: is empty"),
        (changed(MISS, "u1,", ""), "a.csv:3: has 8 cells, and the header 9"),
        ([HEADER, MISS, f'"{OUTPUT}'], "a.csv:3: is no CSV"),
        ([HEADER.replace("amount", "price"), MISS], "a.csv:1: has the column price twice"),
        ([HEADER.replace("amount", "total"), MISS], "a.csv:1: needs the columns model, type, price and amount"),
        (["a,b", "1,2"], "a.csv:1: no column says when: start_time_iso or utc_date; it has a, b"),
        ([""], "a.csv:1: no column says when"),
        ([HEADER, COUNT], "no row of the export says which tokens were used"),
        (COST.replace("CNY", "BTC").splitlines(), "a.csv:2: currency: 'BTC' is none"),
    ],
)
def test_what_cannot_be_read_is_refused_by_line_and_column(tmp_path: Path, lines: list[str], told: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load_statement([write(tmp_path / "a.csv", *lines)])
    assert told in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_bytes_that_are_no_text_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(f"{HEADER}\n{MISS}\n".encode() + b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match=r"a.csv:3: is no UTF-8 text"):
        load_statement([path])


def test_what_two_files_tell_of_one_hour_is_counted_in_neither(tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", HEADER, MISS)
    second = write(tmp_path / "b.csv", HEADER, OUTPUT, MISS)
    with pytest.raises(ConfigurationError, match=r"b.csv:3: tells again of what a.csv tells"):
        load_statement([first, second])
    with pytest.raises(ConfigurationError, match="is the same file as"):
        load_statement([first, write(tmp_path / "copy.csv", HEADER, MISS)])


def test_wallets_of_two_currencies_are_refused(tmp_path: Path) -> None:
    path = zipped(
        tmp_path / "e.zip",
        **{"amount.csv": f"{HEADER}\n{MISS}", "cost.csv": f"{COST}2026-11-25,deepseek-flash,paid,1,USD"},
    )
    with pytest.raises(ConfigurationError, match="sums in CNY and USD"):
        _ = load_statement([path]).currency


def encrypted() -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("amount.csv", f"{HEADER}\n{MISS}")
    content = bytearray(raw.getvalue())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"../../etc/amount.csv": HEADER}, "points out of the archive"),
        ({"/amount.csv": HEADER}, "points out of the archive"),
        ({"amount.txt": HEADER}, "has 0 CSV files among 1"),
        ({f"{number}.csv": HEADER for number in range(65)}, "has 65 CSV files among 65"),
    ],
)
def test_an_archive_with_tricks_is_refused(tmp_path: Path, members: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        load_statement([zipped(tmp_path / "e.zip", **members)])


def test_an_encrypted_or_damaged_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.zip"
    path.write_bytes(encrypted())
    with pytest.raises(ConfigurationError, match=r"amount.csv is encrypted"):
        load_statement([path])
    zipped(path, **{"amount.csv": "\n".join([HEADER, *[MISS] * 500])})
    raw = bytearray(path.read_bytes())
    raw[80:90] = b"\xff" * 10
    path.write_bytes(raw)
    with pytest.raises(ConfigurationError, match="damaged or unusual ZIP"):
        load_statement([path])


def test_an_archive_is_not_believed_how_much_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statements, "MOST_BYTES", 1 << 20)
    path = zipped(tmp_path / "e.zip", **{"amount.csv": b" " * (50 << 20)})
    assert path.stat().st_size < 1 << 18
    raw = path.read_bytes().replace((50 << 20).to_bytes(4, "little"), (1 << 10).to_bytes(4, "little"))
    for content in (path.read_bytes(), raw):  # as it is, and with a small size claimed
        path.write_bytes(content)
        with pytest.raises(ConfigurationError, match=r"larger than 1 MiB|damaged or unusual ZIP|no column says when"):
            load_statement([path])


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    for path, told in (
        (tmp_path, "is no file"),
        (tmp_path / "pipe.csv", "is no file"),
        (tmp_path / "x", "cannot be"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            load_statement([path])
