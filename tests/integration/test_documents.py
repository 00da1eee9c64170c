"""Parquet files on a real disk, in another file system, and behind an object store's real HTTP interface."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.documents import Document, Duplicate, Manifest, Unfit, UnfitDocument
from schemas.errors import ConfigurationError, InputChanged, InputUnavailable
from schemas.jobs import Input
from tasks.documents import plan, read_labels, read_shard

Row = Document | UnfitDocument
BASIC = Input(path="d/*.parquet", id="id", text="text")


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def write_rows(path: Path, ids: list[str], **options: Any) -> Path:
    return write(path, {"id": ids, "text": [f"text of {each}" for each in ids]}, **options)


def read_all(input: Input, manifest: Manifest, root: Path = Path("."), **where: Any) -> list[Row]:
    return [
        document
        for shard in manifest.shards
        for document in read_shard(input, manifest.files[shard.file_no], shard, root=root, **where)
    ]


def plan_and_read(input: Input, root: Path, shard_rows: int = 100, **options: Any) -> list[Row]:
    return read_all(input, plan(input, shard_rows=shard_rows, root=root, **options), root)


def problems_of(input: Input, root: Path, **options: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        plan(input, shard_rows=100, root=root, **options)
    return str(caught.value)


def run_python(program: str, *arguments: str) -> str:
    """What the program prints, run by a Python of its own; fails if it does."""
    command = [sys.executable, "-c", program, *arguments]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


# The property: shards, put together, are the table

rows = st.lists(
    st.tuples(st.text(max_size=4), st.none() | st.text(max_size=4), st.none() | st.integers(0, 5)), max_size=60
)
conditions = st.one_of(
    st.tuples(st.just("n"), st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), st.integers(-1, 6)),
    st.tuples(
        st.just("n"), st.sampled_from(["in", "not in"]), st.lists(st.integers(-1, 300), min_size=1, max_size=4)
    ),
    st.tuples(st.just("text"), st.sampled_from(["==", "<", ">="]), st.text(max_size=2)),
)
MEANING: dict[str, Callable[[Any, Any], bool]] = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "in": lambda a, b: a in b,
    "not in": lambda a, b: a not in b,
}


def passes(row: dict[str, Any], conditions: list[tuple[str, str, Any]] | None) -> bool:
    """What a condition means, in plain Python; text is in the order of its code points."""
    values = ((row[column], operator, value) for column, operator, value in conditions or [])
    return all(held is not None and MEANING[operator](held, value) for held, operator, value in values)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(st.tuples(rows, st.integers(1, 30)), min_size=1, max_size=3),
    shard_rows=st.integers(1, 25),
    chosen=st.none() | st.lists(conditions, min_size=1, max_size=2),
    limit=st.none() | st.integers(1, 80),
)
def test_shards_put_together_are_the_table_filtered_and_cut(
    tmp_path: Path, files: list[Any], shard_rows: int, chosen: Any, limit: int | None
) -> None:
    folder = tmp_path / uuid.uuid4().hex
    for number, (content, row_group_size) in enumerate(files):
        ids, texts, numbers = zip(*content, strict=True) if content else ((), (), ())
        columns = {"id": pa.array(ids, pa.string()), "text": pa.array(texts, pa.string())}
        columns["n"] = pa.array(numbers, pa.int8())
        write(folder / f"{number}.parquet", columns, row_group_size=row_group_size)
    table = [row for path in sorted(folder.iterdir()) for row in pq.read_table(path).to_pylist()]
    expected = [row for row in table if passes(row, chosen)][:limit]
    input = Input(path=folder.name, id="id", text="text", filter=chosen)
    if not expected:
        assert "rows in" in problems_of(input, tmp_path, limit=limit) or not table
        return

    manifest = plan(input, shard_rows=shard_rows, limit=limit, root=tmp_path)
    read = read_all(input, manifest, tmp_path)

    assert [row.document_no for row in read] == list(range(len(expected)))
    assert manifest.document_count == len(expected) == sum(file.rows for file in manifest.files)
    assert all(1 <= shard.document_count <= shard_rows for shard in manifest.shards)
    for row, source in zip(read, expected, strict=True):
        if isinstance(row, Document):
            assert (row.document_id, row.text) == (source["id"], source["text"])
        else:
            assert not source["id"] or "\0" in source["id"] or not (source["text"] or "").strip()
    assert manifest.duplicates == expected_duplicates(read)


def expected_duplicates(read: list[Row]) -> tuple[Duplicate, ...]:
    originals: dict[str, Document] = {}
    found = []
    for row in read:
        if isinstance(row, Document):
            original = originals.setdefault(row.document_id, row)
            if original is not row:
                found.append(Duplicate(row.document_no, original.document_no, row.text == original.text))
    return tuple(found)


def test_shards_can_be_read_in_any_order_at_the_same_time_and_in_part(tmp_path: Path) -> None:
    write_rows(tmp_path / "d/a.parquet", [str(number) for number in range(5000)], row_group_size=1700)
    manifest = plan(BASIC, shard_rows=300, root=tmp_path)
    whole = read_all(BASIC, manifest, tmp_path)
    streams = {
        shard.shard_no: read_shard(BASIC, manifest.files[0], shard, root=tmp_path) for shard in manifest.shards
    }

    abandoned = read_shard(BASIC, manifest.files[0], manifest.shards[1], root=tmp_path)
    assert next(abandoned).document_id == str(manifest.shards[1].first_document_no)
    del abandoned
    in_turns = [next(streams[shard.shard_no]) for _ in range(200) for shard in reversed(manifest.shards)]
    rest = [document for shard in reversed(manifest.shards) for document in streams[shard.shard_no]]

    assert sorted(in_turns + rest, key=lambda document: document.document_no) == whole
    assert [document.document_id for document in whole] == [str(number) for number in range(5000)]


# Types

INVALID = pa.Array.from_buffers(
    pa.string(), 3, [None, pa.array([0, 2, 4, 5], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe\xc3\xa9z")]
)
UUIDS = [uuid.UUID(int=number).bytes for number in (1, 2)]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.dictionary(pa.int8(), pa.string()),
        pa.dictionary(pa.int32(), pa.large_string()),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_filtered", [False, True])
def test_every_kind_of_text_is_read_as_text(tmp_path: Path, kind: Any, is_filtered: bool) -> None:
    def column(values: list[str | None]) -> Any:
        plain = pa.array(values, pa.string())
        return plain.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else plain.cast(kind)

    write(tmp_path / "d/a.parquet", {"id": column(["a", "é", "c"]), "text": column(["x", "ü😀", None])})
    chosen = [("text", ">=", "x"), ("id", "in", ["é", "a"])] if is_filtered else None
    read = plan_and_read(Input(path="d", id="id", text="text", filter=chosen), tmp_path)
    assert read[:2] == [Document(0, "a", "x"), Document(1, "é", "ü😀")]
    assert read[2:] == ([] if is_filtered else [UnfitDocument(2, "c", Unfit.NULL_TEXT)])


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int8(), pa.string())], ids=str
)
def test_bytes_that_are_not_unicode_cost_only_their_own_row(tmp_path: Path, kind: Any) -> None:
    if pa.types.is_dictionary(kind):
        texts = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], pa.int8()), INVALID)
    else:
        texts = INVALID.view(pa.binary()) if kind == pa.binary() else INVALID.cast(kind)
    write(tmp_path / "d/a.parquet", {"id": ["a", "b", "c"], "text": texts})
    assert plan_and_read(BASIC, tmp_path) == [
        UnfitDocument(0, "a", Unfit.NOT_UNICODE),
        Document(1, "b", "é"),
        Document(2, "c", "z"),
    ]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([1, 2], pa.int8()), ["1", "2"]),
        (pa.array([2**64 - 1, 0], pa.uint64()), ["18446744073709551615", "0"]),
        (pa.array([-5, 2**62]), ["-5", str(2**62)]),
        (pa.array(UUIDS, pa.uuid()), [str(uuid.UUID(int=1)), str(uuid.UUID(int=2))]),
        (pa.ExtensionArray.from_storage(pa.json_(), pa.array(["1", '"x"'])), ["1", '"x"']),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_ids_that_are_not_text_are_spelled_as_people_spell_them(
    tmp_path: Path, ids: Any, expected: list[str]
) -> None:
    write(tmp_path / "d/a.parquet", {"id": ids, "text": ["x", "y"]})
    assert [row.document_id for row in plan_and_read(BASIC, tmp_path)] == expected


def test_bad_rows_stand_in_their_place_with_their_reasons(tmp_path: Path) -> None:
    ids = ["ok", None, "no text", "blank", "x" * 3000, "n\0l"]
    write(tmp_path / "d/a.parquet", {"id": ids, "text": ["a\0b", "t", None, " \n", "t", "t"]})
    assert plan_and_read(BASIC, tmp_path) == [
        Document(0, "ok", "a\0b"),
        UnfitDocument(1, "", Unfit.NULL_ID),
        UnfitDocument(2, "no text", Unfit.NULL_TEXT),
        UnfitDocument(3, "blank", Unfit.EMPTY_TEXT),
        UnfitDocument(4, "x" * 1000, Unfit.ID_TOO_LONG),
        UnfitDocument(5, "n\ufffdl", Unfit.NUL_IN_ID),
    ]


def test_names_with_dots_and_other_columns_do_not_confuse(tmp_path: Path) -> None:
    nested = pa.array([{"id": "no", "b": 1}])
    write(tmp_path / "d/a.parquet", {"a.b": ["text"], "a": nested, "id.x": ["id"], "id": [{"x": 2}]})
    assert plan_and_read(Input(path="d", id="id.x", text="a.b"), tmp_path) == [Document(0, "id", "text")]


@pytest.mark.parametrize(
    ("column", "condition", "expected"),
    [
        (pa.array([1, 2, None], pa.int64()), ("==", 2), "b"),
        (pa.array([1, 2, None], pa.int64()), (">", 1.5), "b"),
        (pa.array([1, 2, None], pa.int8()), ("<", 300), "ab"),
        (pa.array([1, 2, None], pa.int8()), ("not in", [300, 1]), "b"),
        (pa.array([1, 2**63, None], pa.uint64()), (">", 1), "b"),
        (pa.array([1.0, float("nan"), None]), ("!=", 1), "b"),
        (pa.array([True, False, None]), ("==", False), "b"),
        (pa.array(["a", "b", None]), ("!=", "a"), "b"),
        (pa.array(["2026", "7", None]), ("==", 2026), "a"),
        (pa.array(["2026-01-01", "7", None]), ("==", dt.date(2026, 1, 1)), "a"),
        (pa.array(["a", "b", None]), ("not in", ["a"]), "b"),
        (pa.array(["a", "b", None]).dictionary_encode(), ("in", ["b", "c"]), "b"),
        (pa.array([dt.date(2026, 1, 1), dt.date(2026, 1, 2), None]), (">", dt.date(2026, 1, 1)), "b"),
        (pa.array([dt.date(2026, 1, 1), dt.date(2026, 1, 2), None]), ("in", ["2026-01-02"]), "b"),
        (pa.array([0, 10**15, None], pa.timestamp("us", "UTC")), (">=", "1990-01-01"), "b"),
        (pa.array([0, 10**15, None], pa.timestamp("us", "Asia/Shanghai")), ("<", "1990-01-01T00:00:00Z"), "a"),
        (pa.array([0, 10**15, None], pa.timestamp("us")), ("<", dt.datetime(1990, 1, 1)), "a"),
        (pa.array([None, None, None]), ("==", 1), ""),
    ],
)
def test_filter_means_what_it_says_for_every_type(
    tmp_path: Path, column: Any, condition: tuple[str, Any], expected: str
) -> None:
    write(tmp_path / "d/a.parquet", {"id": ["a", "b", "c"], "text": ["x"] * 3, "n": column})
    input = Input(path="d", id="id", text="text", filter=[("n", *condition)])
    if expected:
        assert "".join(row.document_id for row in plan_and_read(input, tmp_path)) == expected
    else:
        assert "none of the 3 rows in 1 file passes input.filter" in problems_of(input, tmp_path)


# Files


def test_manifest_names_files_as_the_job_does_and_pins_their_bytes(tmp_path: Path) -> None:
    write_rows(tmp_path / "d/x/day=2/b.parquet", ["3"])
    write_rows(tmp_path / "d/x/day=1/a.parquet", ["1", "2"])
    write_rows(tmp_path / "d/x/_tmp/c.parquet", ["no"])
    write(tmp_path / "d/x/day=3/empty.parquet", {"id": pa.array([], pa.string()), "text": pa.array([], pa.string())})
    (tmp_path / "d/x/day=2/_SUCCESS").write_text("")
    for path in ("d", "./d/**/*.parquet", "d/x/*/*.parquet", str(tmp_path / "d"), str(tmp_path / "d/**/*.parquet")):
        manifest = plan(Input(path=path, id="id", text="text", partition="day"), shard_rows=10, root=tmp_path)
        assert [(file.file_no, file.path, file.rows, file.partition) for file in manifest.files] == [
            (0, "d/x/day=1/a.parquet", 2, "1"),
            (1, "d/x/day=2/b.parquet", 1, "2"),
            (2, "d/x/day=3/empty.parquet", 0, "3"),
        ]
        assert [(shard.file_no, shard.first_document_no) for shard in manifest.shards] == [(0, 0), (1, 2)]
        for file in manifest.files:
            content = (tmp_path / file.path).read_bytes()
            assert file.size == len(content)
            assert file.sha256 == hashlib.sha256(content).hexdigest()


def test_partitions_select_files_before_they_are_opened(tmp_path: Path) -> None:
    write_rows(tmp_path / "d/day=1/a.parquet", ["1"])
    write_rows(tmp_path / "d/day=2/a.parquet", ["2"])
    (tmp_path / "d/day=3").mkdir()
    (tmp_path / "d/day=3/a.parquet").write_text("not Parquet")
    input = Input(path="d", id="id", text="text", partition="day")
    assert [row.document_id for row in plan_and_read(input, tmp_path, partitions=["day=2"])] == ["2"]
    assert [row.document_id for row in plan_and_read(input, tmp_path, partitions=["2", "1"])] == ["1", "2"]
    assert "'9' is not in the input; There is: 1, 2, 3" in problems_of(input, tmp_path, partitions=["9"])


def test_a_limit_leaves_later_files_unopened(tmp_path: Path) -> None:
    write_rows(tmp_path / "d/a.parquet", [str(number) for number in range(10)])
    (tmp_path / "d/b.parquet").write_text("not Parquet")
    manifest = plan(BASIC, shard_rows=4, limit=10, root=tmp_path)
    assert (len(manifest.files), manifest.document_count) == (1, 10)
    assert "b.parquet" in problems_of(BASIC, tmp_path, limit=11)


@pytest.mark.parametrize("limit", [1, 4, 5, 6, 7, 11, 12])
@pytest.mark.parametrize("is_filtered", [False, True])
def test_a_limit_ends_the_last_shard_at_its_document(tmp_path: Path, limit: int, is_filtered: bool) -> None:
    for name in "ab":
        ids = [f"{name}{number}" for number in range(6)]
        columns = {"id": ids, "text": ids, "n": list(range(6))}
        write(tmp_path / f"d/{name}.parquet", columns, row_group_size=4)
    input = Input(path="d", id="id", text="text", filter=[("n", "!=", 1)] if is_filtered else None)
    expected = [f"{name}{number}" for name in "ab" for number in range(6) if not (is_filtered and number == 1)]
    manifest = plan(input, shard_rows=3, limit=limit, root=tmp_path)
    assert [row.document_id for row in read_all(input, manifest, tmp_path)] == expected[:limit]
    assert sum(file.rows for file in manifest.files) == manifest.document_count == min(limit, len(expected))


def test_a_name_that_promises_compression_is_only_a_name(tmp_path: Path) -> None:
    write_rows(tmp_path / "d/a.parquet.gz", ["1"])
    input = Input(path="d/*.gz", id="id", text="text")
    assert plan_and_read(input, tmp_path) == [Document(0, "1", "text of 1")]


def test_links_are_followed_and_a_loop_of_them_ends(tmp_path: Path) -> None:
    write_rows(tmp_path / "elsewhere/a.parquet", ["1"])
    (tmp_path / "d").mkdir()
    (tmp_path / "d/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "d")
    (tmp_path / "d/b.parquet").symlink_to(write_rows(tmp_path / "one.parquet", ["2"]))
    manifest = plan(Input(path="d", id="id", text="text"), shard_rows=10, root=tmp_path)
    assert [file.path for file in manifest.files] == ["d/b.parquet", "d/link/a.parquet"]


def test_a_file_may_be_called_like_a_pattern(tmp_path: Path) -> None:
    write_rows(tmp_path / "d[1]/a*.parquet", ["1"])
    for path in ("d[1]/a*.parquet", "d[1]"):
        assert plan_and_read(Input(path=path, id="id", text="text"), tmp_path) == [Document(0, "1", "text of 1")]


def test_many_files_are_one_run(tmp_path: Path) -> None:
    for number in range(120):
        write_rows(tmp_path / f"d/{number:03}.parquet", [f"{number}-{row}" for row in range(3)])
    read = plan_and_read(BASIC, tmp_path, shard_rows=2)
    assert [row.document_id for row in read] == [f"{number}-{row}" for number in range(120) for row in range(3)]


# Duplicates


def test_a_duplicate_points_to_the_first_of_its_id_in_the_run(tmp_path: Path) -> None:
    write(tmp_path / "d/a.parquet", {"id": ["1", "2", "1"], "text": ["x", "y", "x"]})
    write(tmp_path / "d/b.parquet", {"id": pa.array([3, 2, 1]), "text": ["z", "other", "x"]})
    manifest = plan(BASIC, shard_rows=2, root=tmp_path)
    assert manifest.duplicates == (Duplicate(2, 0, True), Duplicate(4, 1, False), Duplicate(5, 0, True))


def test_a_row_that_cannot_be_sent_is_nobodys_original(tmp_path: Path) -> None:
    columns = {"id": ["1", "1", "1", None, None], "text": [None, "x", "x", "x", "x"]}
    write(tmp_path / "d/a.parquet", columns)
    assert plan(BASIC, shard_rows=9, root=tmp_path).duplicates == (Duplicate(2, 1, True),)


def test_ids_whose_hashes_collide_are_no_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "d/a.parquet", ["1", "2", "3", "1"])
    monkeypatch.setattr("tasks.documents.duplicates.hash", lambda value: 7, raising=False)
    assert plan(BASIC, shard_rows=9, root=tmp_path).duplicates == (Duplicate(3, 0, True),)


def test_an_id_column_that_names_nothing_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "d/a.parquet", ["english", "german"] * 1000)
    assert "column 'id' has 2 values for 2000 documents" in problems_of(BASIC, tmp_path)


# Wrong configurations


def test_every_problem_of_every_file_is_told_at_once(tmp_path: Path) -> None:
    write(tmp_path / "d/a.parquet", {"ids": ["1"], "body": ["x"], "text": [1.5]})
    write(tmp_path / "d/b.parquet", {"id": [1.5], "text": ["x"], "label": [[1]], "n": ["x"]})
    write(tmp_path / "d/c.parquet", {"ids": ["1"], "body": ["x"], "text": [1.5]})
    (tmp_path / "d/e.parquet").write_text("no Parquet at all")
    input = Input(path="d", id="id", text="text", label="label", partition="day", filter=[("n", ">", True)])
    told = problems_of(input, tmp_path)
    assert "d/a.parquet and 1 more: input.id: no column 'id'; did you mean ids? There is: ids, body, text" in told
    assert "d/a.parquet and 1 more: input.text: column 'text' is double; it must hold text" in told
    assert "d/b.parquet: input.id: column 'id' is double; it must hold text or integers" in told
    assert "d/b.parquet: input.label: column 'label' is list<" in told
    assert "d/b.parquet: input.filter: n is string, for which `> True` has no meaning" in told
    assert "d/a.parquet and 1 more: input.filter: no column 'n'" in told
    assert "is in no folder day=…, which input.partition asks for" in told
    assert "d/e.parquet: is not a readable Parquet file" in told


@pytest.mark.parametrize("path", ["d/*.parquet", "nowhere/*.parquet", "d", "nowhere/a.parquet", "d/**/x.parquet"])
def test_no_file_says_the_pattern_and_where_it_looked(tmp_path: Path, path: str) -> None:
    (tmp_path / "d/sub").mkdir(parents=True)
    (tmp_path / "d/a.csv").write_text("")
    told = problems_of(Input(path=path, id="id", text="text"), tmp_path)
    assert path in told
    assert ("d, which holds a.csv, sub/" in told) is path.startswith("d")
    assert ("nothing (or does not exist)" in told) is path.startswith("nowhere")


def test_a_column_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    table = pa.Table.from_arrays([pa.array(["1"]), pa.array(["x"]), pa.array(["y"])], names=["id", "text", "text"])
    pq.write_table(table, tmp_path / "d/a.parquet")
    assert "2 columns are called 'text'" in problems_of(BASIC, tmp_path)


def test_no_row_at_all_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "d/a.parquet", {"id": pa.array([], pa.string()), "text": pa.array([], pa.string())})
    assert "there is no row in 1 file" in problems_of(BASIC, tmp_path)


def truncated(content: bytes) -> bytes:
    return content[:-20]


def emptied(content: bytes) -> bytes:
    return b""


def cut_out(content: bytes) -> bytes:
    return content[:200] + content[-400:]


@pytest.mark.parametrize("spoil", [truncated, emptied, cut_out])
def test_a_spoilt_file_stops_the_plan(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = write_rows(tmp_path / "d/b.parquet", [str(number) for number in range(300)])
    write_rows(tmp_path / "d/a.parquet", ["a"])
    path.write_bytes(spoil(path.read_bytes()))
    assert problems_of(BASIC, tmp_path).startswith("d/b.parquet: ")


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_is_refused_or_contained(tmp_path: Path, seed: int) -> None:
    """Before the plan nothing pins the bytes, so a flip may read as other text, but it never escapes as a crash."""
    path = write_rows(tmp_path / "d/a.parquet", [str(number) for number in range(300)], write_page_checksum=seed % 2)
    content = bytearray(path.read_bytes())
    content[(seed * 7919) % len(content)] ^= 1 << (seed % 8)
    path.write_bytes(content)
    with contextlib.suppress(ConfigurationError, InputChanged):
        assert len(plan_and_read(BASIC, tmp_path)) == 300


FLIP = """
import random, sys
from pathlib import Path
import pyarrow.parquet as pq
import pyarrow as pa
from schemas.errors import ConfigurationError, InputChanged
from schemas.jobs import Input
from tasks.documents import plan, read_labels, read_shard

path, dice = Path(sys.argv[1]) / "a.parquet", random.Random(int(sys.argv[2]))
input = Input(path=str(path), id="id", text="text", label="label", filter=[("n", ">=", 0)])
for _ in range(400):
    columns = {"id": [str(n) for n in range(600)], "text": [f"text {n}" for n in range(600)], "n": list(range(600))}
    columns["label"] = pa.array(["a", "b"] * 300).dictionary_encode()
    codec, version = dice.choice(["snappy", "zstd", "none", "gzip", "lz4"]), dice.choice(["1.0", "2.0"])
    pq.write_table(pa.table(columns), path, row_group_size=200, compression=codec, data_page_version=version)
    content = bytearray(path.read_bytes())
    start = dice.choice([0, len(content) - 2500])
    content[dice.randrange(start, len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)
    try:
        manifest = plan(input, shard_rows=70)
        for shard in manifest.shards:
            list(read_shard(input, manifest.files[0], shard))
        list(read_labels(input, manifest))
    except (ConfigurationError, InputChanged):
        pass
"""


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_flipped_bit_ends_the_process(tmp_path: Path, seed: int) -> None:
    """A corrupt footer can make Arrow abort, which no `except` would see; so this runs in a process of its own."""
    run_python(FLIP, str(tmp_path), str(seed))


# After the plan


def test_a_flipped_bit_in_a_page_with_a_checksum_fails_the_shard_that_reads_it(tmp_path: Path) -> None:
    ids = [f"{number:04}" for number in range(400)]
    options = {"row_group_size": 100, "compression": "none", "use_dictionary": False, "write_page_checksum": True}
    path = write_rows(tmp_path / "d/a.parquet", ids, **options)
    content = bytearray(path.read_bytes())
    content[content.index(b"text of 0250")] ^= 1
    path.write_bytes(content)
    manifest = plan(BASIC, shard_rows=100, root=tmp_path)
    good, bad = manifest.shards[1], manifest.shards[2]
    with pytest.raises(InputChanged, match=r"d/a.parquet: is corrupt: .*CRC"):
        list(read_shard(BASIC, manifest.files[0], bad, root=tmp_path))
    assert len(list(read_shard(BASIC, manifest.files[0], good, root=tmp_path))) == 100


def rewrite_same_size(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"text of 1")] ^= 1
    state = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def replace_whole(path: Path) -> None:
    write_rows(path.with_suffix(".new"), ["9"])
    path.with_suffix(".new").rename(path)


def remove(path: Path) -> None:
    path.unlink()


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("change", [rewrite_same_size, replace_whole, remove, become_folder])
def test_nothing_of_a_changed_file_is_read(tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = write_rows(tmp_path / "d/a.parquet", ["1", "2"], compression="none", use_dictionary=False)
    manifest = plan(BASIC, shard_rows=10, root=tmp_path)
    file = manifest.files[0]
    assert len(read_all(BASIC, manifest, tmp_path)) == 2
    change(path)
    with pytest.raises(InputChanged, match=r"d/a.parquet: is gone or no longer"):
        next(read_shard(BASIC, file, manifest.shards[0], root=tmp_path))


def test_a_file_that_is_only_touched_or_put_back_is_the_same(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d/a.parquet", ["1", "2"])
    content = path.read_bytes()
    manifest = plan(BASIC, shard_rows=10, root=tmp_path)
    path.unlink()
    path.write_bytes(content)
    assert len(read_all(BASIC, manifest, tmp_path)) == 2


def test_a_file_that_changes_under_the_reader_ends_its_shard(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d/a.parquet", [str(number) for number in range(2000)])
    manifest = plan(BASIC, shard_rows=2000, root=tmp_path)
    stream = read_shard(BASIC, manifest.files[0], manifest.shards[0], root=tmp_path)
    assert next(stream).document_no == 0
    os.utime(path)
    with pytest.raises(InputChanged, match="changed while it was being read"):
        list(stream)


def test_a_changed_filter_cannot_renumber_documents(tmp_path: Path) -> None:
    write(tmp_path / "d/a.parquet", {"id": ["a", "b", "c"], "text": ["x"] * 3, "n": [1, 2, 3]})
    manifest = plan(BASIC.model_copy(update={"filter": (("n", ">", 1),)}), shard_rows=10, root=tmp_path)
    for changed in (("n", ">", 2), ("n", ">=", 2)):
        input = BASIC.model_copy(update={"filter": (changed,)})
        if changed[1] == ">=":
            assert len(read_all(input, manifest, tmp_path)) == 2
        else:
            with pytest.raises(InputChanged, match="the filter selects other rows"):
                read_all(input, manifest, tmp_path)
    wider = plan(BASIC.model_copy(update={"filter": (("n", "in", [1, 3]),)}), shard_rows=10, root=tmp_path)
    with pytest.raises(InputChanged, match="the filter selects other rows"):
        next(read_shard(BASIC, wider.files[0], wider.shards[0], root=tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_unavailable_not_changed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d/a.parquet", ["1"])
    manifest = plan(BASIC, shard_rows=10, root=tmp_path)
    path.chmod(0)
    with pytest.raises(InputUnavailable, match="then resume the run"):
        read_all(BASIC, manifest, tmp_path)


# Labels


def test_labels_come_with_the_numbers_of_their_documents(tmp_path: Path) -> None:
    columns = {"id": ["a", "b", "c", "d"], "text": ["x"] * 4, "n": [1, 0, 1, 1]}
    write(tmp_path / "d/a.parquet", columns | {"label": pa.array(["spam", "no", None, "ham"]).dictionary_encode()})
    write(tmp_path / "d/b.parquet", columns | {"id": ["e", "f", "g", "h"], "label": [True, False, None, True]})
    write(tmp_path / "d/c.parquet", columns | {"id": ["i", "j", "k", "l"], "label": [7, 8, 9, None]})
    input = Input(path="d", id="id", text="text", label="label", filter=[("n", "==", 1)])
    manifest = plan(input, shard_rows=2, root=tmp_path)
    labels = ["spam", None, "ham", "true", None, "true", "7", "9", None]
    assert list(read_labels(input, manifest, root=tmp_path)) == list(enumerate(labels))
    with pytest.raises(ConfigurationError, match="names no column"):
        list(read_labels(BASIC, manifest, root=tmp_path))


# Memory

MEASURE = """
import resource, sys
from pathlib import Path
from schemas.jobs import Input
from tasks.documents import plan, read_shard

def peak():
    try:  # Linux lets a child begin with its parent's ru_maxrss, so ask for this program's own
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

small = Input(path="small.parquet", id="id", text="text")
large = Input(path="large.parquet", id="id", text="text")
root = Path(sys.argv[1])
for input in (small, large):
    manifest = plan(input, shard_rows=500, root=root)
    for shard in manifest.shards:
        for document in read_shard(input, manifest.files[0], shard, root=root):
            pass
    if input is small:
        before = peak()
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Once warm, 200 MB of incompressible text in a single row group cost less than a third of that."""
    block = os.urandom(4_000_000).hex()
    for name, count in (("small", 8_000), ("large", 20_000)):
        texts = [block[(start := number * 397 % 7_000_000) : start + 10_000] for number in range(count)]
        ids = [str(number) for number in range(count)]
        columns = {"id": ids, "text": texts}
        write(tmp_path / f"{name}.parquet", columns, compression="none", use_dictionary=False, row_group_size=count)
    size = (tmp_path / "large.parquet").stat().st_size
    growth = int(run_python(MEASURE, str(tmp_path)))
    assert size > 190_000_000
    assert growth < size / 3


# Other file systems


@pytest.fixture
def other_place(tmp_path: Path) -> pa.fs.FileSystem:
    """A file system that is not the local one to our code, though it is kept on the disk."""
    return pa.fs.SubTreeFileSystem(str(tmp_path), pa.fs.LocalFileSystem())


@pytest.mark.parametrize(
    "path",
    [
        "bucket/in/**/*.parquet",
        "s3://bucket/in",
        "s3://bucket/in/day=*/*.parquet",
        "gs://anonymous@bucket/in/?retry=1",
    ],
)
def test_another_file_system_goes_the_same_way(tmp_path: Path, other_place: Any, path: str) -> None:
    write_rows(tmp_path / "bucket/in/day=1/a.parquet", ["1", "2"])
    write_rows(tmp_path / "bucket/in/day=2/b.parquet", ["3"])
    (tmp_path / "bucket/in/_SUCCESS").write_text("")
    input = Input(path=path, id="id", text="text", partition="day")
    manifest = plan(input, shard_rows=1, root=tmp_path / "elsewhere", filesystem=other_place)
    scheme = path.partition("bucket")[0].replace("anonymous@", "")
    assert [file.path for file in manifest.files] == [
        f"{scheme}bucket/in/day=1/a.parquet",
        f"{scheme}bucket/in/day=2/b.parquet",
    ]
    read = read_all(input, manifest, filesystem=other_place)
    assert [row.document_id for row in read] == ["1", "2", "3"]
    write_rows(tmp_path / "bucket/in/day=1/a.parquet", ["1", "4"])
    with pytest.raises(InputChanged, match="is gone or no longer"):
        read_all(input, manifest, filesystem=other_place)
    with pytest.raises(ConfigurationError, match="no file matches bucket/x"):
        plan(Input(path="bucket/x*", id="id", text="text"), shard_rows=1, filesystem=other_place)


class Store(BaseHTTPRequestHandler):
    """As much of S3 as reading takes: list, head, and get of a range; keys are files below the server's folder."""

    server: StoreServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        file = self.server.folder / unquote(url.path).strip("/")
        if self.server.refuses_with and self.server.refuses_only in (None, self.command):
            self._reply(self.server.refuses_with, b"")
        elif "list-type" in parse_qs(url.query):
            self._reply(200, self._list(file, parse_qs(url.query)))
        elif file.is_file():
            self._send_file(file)
        else:
            self._reply(404, b"")

    def _list(self, bucket: Path, query: dict[str, list[str]]) -> bytes:
        prefix = query.get("prefix", [""])[0]
        keys = sorted(path.relative_to(bucket).as_posix() for path in bucket.rglob("*") if path.is_file())
        contents = "".join(
            f"<Contents><Key>{key}</Key><Size>{(bucket / key).stat().st_size}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in keys
            if key.startswith(prefix)
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>".encode()

    def _send_file(self, file: Path) -> None:
        content = file.read_bytes()
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            self._reply(206, content[int(first) : int(last) + 1])
        else:
            self._reply(200, content)

    def _reply(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


class StoreServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Store)
        self.folder = folder
        self.refuses_with = 0
        self.refuses_only: str | None = None

    def url(self, path: str) -> str:
        return f"s3://{path}?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{self.server_port}"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreServer]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = StoreServer(tmp_path)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_documents_are_read_from_an_object_store(tmp_path: Path, store: StoreServer) -> None:
    write_rows(tmp_path / "bucket/in/day=1/a.parquet", ["1", "2"], row_group_size=1)
    write_rows(tmp_path / "bucket/in/day=2/b.parquet", ["3"])
    (tmp_path / "bucket/in/_SUCCESS").write_text("")
    input = Input(path=store.url("bucket/in/**/*.parquet"), id="id", text="text", partition="day")
    manifest = plan(input, shard_rows=1)
    assert [file.path for file in manifest.files] == [
        "s3://bucket/in/day=1/a.parquet",
        "s3://bucket/in/day=2/b.parquet",
    ]
    assert [row.document_id for row in read_all(input, manifest)] == ["1", "2", "3"]
    (tmp_path / "bucket/in/day=1/a.parquet").unlink()
    with pytest.raises(InputChanged, match=r"s3://bucket/in/day=1/a\.parquet: is gone"):
        read_all(input, manifest)


def test_a_store_that_refuses_us_stops_the_plan_and_pauses_a_run(tmp_path: Path, store: StoreServer) -> None:
    write_rows(tmp_path / "bucket/a.parquet", ["1"])
    input = Input(path=store.url("bucket/a.parquet"), id="id", text="text")
    manifest = plan(input, shard_rows=1)
    store.refuses_with = 403
    with pytest.raises(
        ConfigurationError, match=r"(?s)input.path: the input cannot be read.*ACCESS_DENIED.*AWS_PROFILE"
    ) as told:
        plan(input, shard_rows=1)
    assert "hush" not in str(told.value)
    with pytest.raises(InputUnavailable, match=r"ACCESS_DENIED.*then resume the run"):
        read_all(input, manifest)


@pytest.mark.parametrize("refused", ["GET", None])
def test_a_store_that_fails_in_the_middle_does_not_condemn_the_file(
    tmp_path: Path, store: StoreServer, refused: str | None
) -> None:
    write_rows(tmp_path / "bucket/a.parquet", [str(number) for number in range(2000)], row_group_size=1000)
    input = Input(path=store.url("bucket/a.parquet"), id="id", text="text")
    manifest = plan(input, shard_rows=2000)
    stream = read_shard(input, manifest.files[0], manifest.shards[0])
    next(stream)
    store.refuses_with, store.refuses_only = 403, refused
    with pytest.raises(InputUnavailable):
        list(stream)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("s3://AKIA:hush-hush@bucket/a", "input.path: holds credentials; remove them"),
        ("gs://someone@bucket/a", "input.path: holds credentials; remove them"),
        ("s3://bucket/a?region=x&colour=blue", "input.path: Unexpected query parameter in S3 URI: 'colour'"),
    ],
)
def test_a_wrong_url_is_refused_without_repeating_a_secret(path: str, told: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        plan(Input(path=path, id="id", text="text"), shard_rows=1)
    assert told in str(caught.value)
    assert "hush" not in str(caught.value)
