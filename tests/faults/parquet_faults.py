"""Bad Parquet, made on the spot: files that are broken, drift, or hold what no document can be."""

from __future__ import annotations

import io
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.jobs import Input

COLOURS = ("red", "green", "blue")
PLAIN = Input(path="d/*", id="id", text="text")


@dataclass(frozen=True)
class Case:
    """Files in one folder, and what must come of them: "refused", "read" or "unreadable", and how each row ends.

    `is_plain` files have text ids, and so fit into one run together.
    """

    name: str
    files: Mapping[str, Callable[[], bytes]]
    outcome: str = "refused"
    endings: Counter[str] = field(default_factory=Counter)
    input: Input = PLAIN
    is_plain: bool = False

    def write(self, folder: Path, prefix: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / f"{prefix}{name}").write_bytes(content())


def encode(columns: Mapping[str, Any] | pa.Table, **options: Any) -> bytes:
    """The columns as a Parquet file."""
    kept = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(dict(columns)), kept, **options)
    return kept.getvalue()


def table(ids: Any, texts: Any, **more: Any) -> dict[str, Any]:
    return {"id": ids, "text": texts, "colour": [COLOURS[number % 3] for number in range(len(ids))], **more}


def small() -> dict[str, Any]:
    return table(["s1", "s2"], ["a small one", "another small one"])


def broken(name: str, content: Callable[[], bytes]) -> Case:
    return Case(name, {"a.parquet": content})


def refused(name: str, columns: Callable[[], Mapping[str, Any] | pa.Table], **options: Any) -> Case:
    return Case(name, {"a.parquet": lambda: encode(columns(), **options)})


def read(name: str, columns: Callable[[], Mapping[str, Any]], *, plain: bool = False, **endings: int) -> Case:
    return Case(name, {"a.parquet": lambda: encode(columns())}, "read", Counter(endings), is_plain=plain)


def arrow_file() -> bytes:
    kept = io.BytesIO()
    with pa.ipc.new_file(kept, pa.table(small()).schema) as file:
        file.write_table(pa.table(small()))
    return kept.getvalue()


def raw_strings(kind: Any, *values: bytes) -> Any:
    """What a file may call strings, whatever the bytes are."""
    ends = [sum(map(len, values[:number])) for number in range(len(values) + 1)]
    buffers = [None, pa.array(ends, pa.int32()).buffers()[1], pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(pa.string(), len(values), buffers).cast(kind)


def no_row_groups() -> bytes:
    kept = io.BytesIO()
    pq.ParquetWriter(kept, pa.table(small()).schema).close()
    return kept.getvalue()


def wrong_checksum() -> bytes:
    content = bytearray(
        encode(small(), write_page_checksum=True, compression="none", use_dictionary=False, write_statistics=False)
    )
    content[content.index(b"another small")] ^= 1
    return bytes(content)


def spliced(tail: bytes) -> Callable[[], bytes]:
    """A good file with another end."""
    return lambda: encode(small())[: -len(tail)] + tail


def texts_as(kind: Any) -> Case:
    def columns() -> dict[str, Any]:
        texts = pa.array(["one text", None, "ünïcode 文"], pa.string())
        typed = texts.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else texts.cast(kind)
        return table([f"{kind} {number}" for number in range(3)], typed)

    return read(f"text as {kind}".replace(" ", "_"), columns, fit=2, null_text=1)


def ids_as(kind: Any, *values: Any) -> Case:
    return read(f"id as {kind}".replace(" ", "_"), lambda: table(pa.array(values, kind), ["x", "y"]), fit=2)


def bad_ids(kind: Any, *values: Any) -> Case:
    return refused(f"id as {kind}".replace(" ", "_"), lambda: table(pa.array(values, kind), ["x"]))


def bad_texts(kind: Any, *values: Any) -> Case:
    return refused(f"text as {kind}".replace(" ", "_"), lambda: table(["x"], pa.array(values, kind)))


def beside_a_good_one(name: str, columns: Callable[[], Mapping[str, Any]], outcome: str, fit: int = 0) -> Case:
    """Drift: the first file is as it should be, the second is not."""
    files = {"a.parquet": lambda: encode(small()), "b.parquet": lambda: encode(columns())}
    return Case(name, files, outcome, Counter(fit=fit) if fit else Counter())


CASES = [
    # Not Parquet
    Case("no_file", {}),
    broken("no_byte", bytes),
    broken("four_bytes", lambda: b"PAR1"),
    broken("only_magic", lambda: b"PAR1PAR1"),
    broken("text", lambda: b"id,text\n1,x\n"),
    broken("zeros", lambda: bytes(10_000)),
    broken("arrow_ipc", arrow_file),
    broken("wrong_magic", spliced(b"PAR2")),
    broken("encrypted", spliced(b"PARE")),
    broken("footer_of_4_GB", spliced(b"\xff\xff\xff\xffPAR1")),
    broken("negative_footer", spliced(b"\x00\x00\x00\x80PAR1")),
    broken("no_footer", spliced(b"\x00\x00\x00\x00PAR1")),
    broken("tail_only", lambda: encode(small())[100:]),
    broken("doubled_garbage", lambda: encode(small()) + b"\n"),
    Case("checksum", {"a.parquet": wrong_checksum}, "unreadable"),
    # Nothing in it
    refused("no_rows", lambda: table(pa.array([], pa.string()), pa.array([], pa.string()))),
    broken("no_row_groups", no_row_groups),
    refused("no_columns", lambda: pa.table({})),
    # Other columns
    refused("no_id", lambda: {"identity": ["x"], "text": ["y"]}),
    refused("no_text", lambda: {"id": ["x"], "txt": ["y"]}),
    refused("two_texts", lambda: pa.Table.from_arrays([pa.array(["x"])] * 3, ["id", "text", "text"])),
    refused("nested_only", lambda: {"row": pa.array([{"id": "x", "text": "y"}])}),
    refused("same_id_everywhere", lambda: table(["x"] * 2000, [f"text {number}" for number in range(2000)])),
    # Types
    bad_ids(pa.float64(), 1.5),
    bad_ids(pa.decimal128(5, 2), Decimal("1.25")),
    bad_ids(pa.timestamp("us"), datetime(2026, 1, 1)),
    bad_ids(pa.date32(), date(2026, 1, 1)),
    bad_ids(pa.bool_(), True),
    bad_ids(pa.binary(4), b"four"),
    bad_ids(pa.list_(pa.string()), ["x"]),
    bad_ids(pa.struct({"x": pa.string()}), {"x": "y"}),
    bad_texts(pa.int64(), 5),
    bad_texts(pa.binary(4), b"four"),
    bad_texts(pa.list_(pa.string()), ["x"]),
    bad_texts(pa.struct({"x": pa.string()}), {"x": "y"}),
    bad_texts(pa.map_(pa.string(), pa.string()), {"x": "y"}),
    bad_texts(pa.float32(), 0.5),
    ids_as(pa.int8(), -1, 2),
    ids_as(pa.uint64(), 0, 2**64 - 1),
    ids_as(pa.uuid(), uuid.UUID(int=1).bytes, uuid.UUID(int=2).bytes),
    ids_as(pa.binary(), b"a", b"b"),
    ids_as(pa.large_string(), "a", "b"),
    ids_as(pa.string_view(), "a", "b"),
    *map(texts_as, (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary())),
    *map(texts_as, (pa.binary_view(), pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.binary()))),
    read("all_null", lambda: table(["n1", "n2"], pa.nulls(2)), null_text=2),
    # Rows
    read("null_ids", lambda: table([None, "n3", None], ["x", "not null", "y"]), plain=True, null_id=2, fit=1),
    read("null_texts", lambda: table(["n4", "n5"], [None, "a text"]), plain=True, null_text=1, fit=1),
    read("blank", lambda: table(["w1", "w2", "w3"], [" ", "\n\t\u3000\u2003", ""]), plain=True, empty_text=3),
    read("empty_id", lambda: table(["", "e1"], ["x", "with an id"]), plain=True, null_id=1, fit=1),
    read("nul", lambda: table(["a\0b", "c1"], ["x", "a\0text"]), plain=True, nul_in_id=1, fit=1),
    read("ids_of_3_KB", lambda: table(["x" * 3000, "é" * 501, "y" * 1000], ["1", "2", "3"]), id_too_long=2, fit=1),
    read("controls", lambda: table(["\x1b[2J", "\u202e"], ["\x1b]0;x\x07", "\ufeff\u202e"]), plain=True, fit=2),
    read(
        "not_unicode",
        lambda: table(["u1", "u2", "u3"], raw_strings(pa.string(), b"\xff\xfe", b"\xed\xa0\x80", b"fine")),
        not_unicode=2,
        fit=1,
    ),
    read(
        "surrogates_in_binary",
        lambda: table(
            raw_strings(pa.binary(), b"\xed\xb0\x80", b"ok"), raw_strings(pa.binary(), b"x", b"\xed\xa0\xbd")
        ),
        not_unicode=2,
    ),
    read("same_id_same_text", lambda: table(["t1", "t1"], ["the same", "the same"]), plain=True, fit=2),
    read("same_id_other_text", lambda: table(["o1", "o1"], ["the one", "the other"]), plain=True, fit=2),
    # Drift between files
    beside_a_good_one("lost_column", lambda: {"id": ["x"]}, "refused"),
    beside_a_good_one("other_type", lambda: table(["x"], [5]), "refused"),
    beside_a_good_one("other_order", lambda: dict(reversed(table(["x"], ["y"]).items())), "read", 3),
    beside_a_good_one("more_columns", lambda: table(["x"], ["y"], more=[{"id": [1]}]), "read", 3),
    beside_a_good_one("other_text", lambda: table(["x"], pa.array(["y"]).dictionary_encode()), "read", 3),
    beside_a_good_one("integer_ids", lambda: table([7], ["y"]), "read", 3),
    beside_a_good_one("no_rows_in_one", lambda: table(pa.array([], pa.int8()), pa.nulls(0)), "read", 2),
]


def good_file(dice: Random) -> bytes:
    """A file of 60 rows, in any of the forms that writers give them."""
    rows = 60
    columns = table([str(number) for number in range(rows)], [f"text {number}" for number in range(rows)])
    options: dict[str, Any] = {
        "compression": dice.choice(["snappy", "zstd", "none", "gzip", "lz4", "brotli"]),
        "data_page_version": dice.choice(["1.0", "2.0"]),
        "row_group_size": dice.choice([7, 20, 60]),
        "write_page_index": dice.random() < 0.3,
        "write_page_checksum": dice.random() < 0.3,
        "use_dictionary": dice.random() < 0.5,
        "data_page_size": dice.choice([100, 1_000_000]),
    }
    if not options["use_dictionary"] and dice.random() < 0.6:
        options["column_encoding"] = {"id": "DELTA_BYTE_ARRAY", "text": "DELTA_LENGTH_BYTE_ARRAY"}
    return encode(columns, **options)


def spoil(dice: Random, content: bytes) -> bytes:
    """A few bits flipped or bytes replaced: anywhere, or in the footer, where most of the meaning is."""
    spoiled = bytearray(content)
    for _ in range(dice.choice([1, 1, 1, 2, 8])):
        first = dice.choice([0, max(0, len(spoiled) - 1500)])
        place = dice.randrange(first, len(spoiled))
        spoiled[place] = dice.choice([spoiled[place] ^ (1 << dice.randrange(8)), 0, 0xFF, 0x7F, 0x80])
    return bytes(spoiled)
