"""Alone responsible for reading input: Parquet files become a manifest, shards, and a stream of documents.

Three rules shape it (design: parts.md, "Parquet reading"; ledger.md, G1 and G14). *Flat*: rows are read a few at a
time, without read-ahead, so memory depends neither on the file nor on its row groups. *Pinned*: a run is bound to the
bytes it was planned on; a file is hashed again before its first row is read, and page checksums, where written, are
verified on the way. *Contained*: a wrong input stops before any money moves, with every problem at once; a bad row
becomes an `UnfitDocument`, and no row can stop its shard.

Names of files are kept as the job spells them: relative to `root` where the path is, with the scheme for an object
store. Nothing outside this module knows what Arrow is.
"""

from __future__ import annotations

import glob
import hashlib
import os
import posixpath
import stat
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq

from schemas.documents import Document, Duplicate, InputFile, Manifest, Shard, UnfitDocument
from schemas.errors import ConfigurationError, InputChanged, InputUnavailable, Problem
from schemas.fitness import Cell, judge_row
from schemas.jobs import Input
from schemas.selection import depth_below, fixed_folder, is_hidden, matches, partition_of, select_partitions, suggest
from schemas.shards import cut_shards

__all__ = ["is_unchanged", "list_partitions", "plan", "read_labels", "read_shard"]

SUFFIXES = (".parquet", ".parq", ".pq")

_BUFFER = 256 * 1024  # bytes read at once per column
_BATCH_BYTES = 2 * 1024 * 1024  # of one batch, by the footer's sizes
_BATCH_ROWS = 256  # at most: a dictionary page hides how large its rows are
_PIECE = 4 * 1024 * 1024  # bytes hashed at once
_SHOWN_PROBLEMS = 20

#: What Arrow raises for bytes that are not the Parquet they should be: seen by flipping bits of real files.
_UNREADABLE = (pa.ArrowException, OSError, UnicodeError, MemoryError)

Signature: TypeAlias = tuple[int, ...]


# What others use


def plan(
    input: Input,
    *,
    shard_rows: int,
    partitions: Sequence[str] = (),
    limit: int | None = None,
    root: Path = Path("."),
    filesystem: pa.fs.FileSystem | None = None,
) -> Manifest:
    """Bind a run to its input: files with size and SHA-256, shards of at most `shard_rows` documents, duplicates.

    Documents are numbered from 0 over the files in the order of their names. `limit` keeps the first so many;
    files after that are not opened. Among documents with one id the first that is fit to be sent is the original.
    `filesystem` stands in for the one that the path names. Raises ConfigurationError with all that is wrong.
    """
    if shard_rows < 1 or (limit is not None and limit < 1):
        raise ConfigurationError("shard size and limit must be at least 1")
    with _planning():
        place = _find_place(input.path, root, filesystem)
        names = select_partitions(_list_names(place), input.partition, partitions)
        _check_files(place, input, names, limit)
        survey = _Survey(input, place, shard_rows, limit)
        survey.add(names)
        return Manifest(tuple(survey.files), tuple(survey.shards), survey.find_duplicates())


def list_partitions(
    input: Input, *, root: Path = Path("."), filesystem: pa.fs.FileSystem | None = None
) -> tuple[str, ...]:
    """The partitions that exist, sorted: values of the job's hive key, or without one the names of its files."""
    with _planning():
        names = _list_names(_find_place(input.path, root, filesystem))
    if input.partition is None:
        return tuple(names)
    return tuple(sorted({value for name in names if (value := partition_of(name, input.partition)) is not None}))


def is_unchanged(
    input: Input, file: InputFile, *, root: Path = Path("."), filesystem: pa.fs.FileSystem | None = None
) -> bool:
    """Whether the file still is, byte for byte, the one in the manifest (G1).

    A process hashes a file once, and again only when its size, times or inode change. Raises InputUnavailable where
    the store cannot tell.
    """
    with _storage():
        return _unchanged_signature(_find_place(input.path, root, filesystem), file) is not None


def read_shard(
    input: Input,
    file: InputFile,
    shard: Shard,
    *,
    root: Path = Path("."),
    filesystem: pa.fs.FileSystem | None = None,
) -> Iterator[Document | UnfitDocument]:
    """The shard's documents in order, streamed; a row that cannot be sent comes as an UnfitDocument in its place.

    Raises InputChanged, at the first document if it can be known by then, when the file is gone, corrupt or not the
    manifest's, or when the job's filter selects other rows than planned; InputUnavailable when the store is down.
    """
    with _storage():
        yield from _read_documents(_find_place(input.path, root, filesystem), input, file, shard)


def read_labels(
    input: Input, manifest: Manifest, *, root: Path = Path("."), filesystem: pa.fs.FileSystem | None = None
) -> Iterator[tuple[int, str | None]]:
    """Every document's number with its label, None where the row has none. Labels are spelled as JSON spells them.

    Raises what `read_shard` raises, and ConfigurationError where the job names no label column.
    """
    if input.label is None:
        raise ConfigurationError(
            Problem("input.label", "names no column; without labels there is nothing to measure")
        )
    with _storage():
        place = _find_place(input.path, root, filesystem)
        for shard in manifest.shards:
            file = manifest.files[shard.file_no]
            for number, (labels,) in _read_cells(place, input, file, shard, (input.label,)):
                for document_no, label in enumerate(labels, start=number):
                    yield document_no, label.decode("utf-8", "replace") if isinstance(label, bytes) else label


# Values of a column


def _choose(column: Any, positions: Any) -> Any:
    return (column if isinstance(column.type, pa.UuidType) else _plain(column)).take(positions)


def _cells(column: Any) -> list[Cell]:
    """A column's values as text: integers in decimal, UUIDs in their usual form, truth as JSON has it."""
    kind = column.type
    if isinstance(kind, pa.UuidType):
        return [None if value is None else str(value) for value in column.to_pylist()]
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return list(column.cast(pa.string()).to_pylist())
    column = _plain(column)
    if _is_binary(column.type):
        return [_decode(value) for value in column.to_pylist()]
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:  # Arrow does not validate what a file calls a string
        return [_decode(value) for value in column.cast(pa.large_binary()).to_pylist()]


def _decode(value: bytes | None) -> Cell:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def _plain(column: Any) -> Any:
    """The column without what wraps its values: extension, dictionary, or view (which Arrow cannot filter)."""
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string_view(column.type):
        return column.cast(pa.large_string())
    return column.cast(pa.large_binary()) if pa.types.is_binary_view(column.type) else column


def _plain_type(kind: Any) -> Any:
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_binary(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text(kind: Any) -> bool:
    """Whether cells of this type can be texts; an all-null column has no type of its own and can."""
    kind = _plain_type(kind)
    is_string = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return bool(is_string or _is_binary(kind) or pa.types.is_null(kind))


def _is_id(kind: Any) -> bool:
    return _is_text(kind) or pa.types.is_integer(kind) or isinstance(kind, pa.UuidType)


def _is_label(kind: Any) -> bool:
    return _is_id(kind) or pa.types.is_boolean(kind)


# The filter


class _Filter:
    """A job's conditions; all must hold. As in SQL, a null fulfils none of them, `!=` and `not in` included.

    Texts are compared as UTF-8 bytes: the order is that of their characters, and no byte can stop the comparison.
    """

    def __init__(self, input: Input) -> None:
        self._conditions = input.filter or ()
        self.columns = tuple(dict.fromkeys(column for column, _, _ in self._conditions))

    def __bool__(self) -> bool:
        return bool(self._conditions)

    def find_problems(self, schema: Any) -> Iterator[str]:
        """Say what is wrong with conditions on columns that exist, by trying each on no rows."""
        for column, operator, value in self._conditions:
            if column in schema.names:
                kind = schema.field(column).type
                try:
                    _holds(pa.array([], _plain_type(kind)), operator, value)
                except (pa.ArrowException, ValueError, TypeError, OverflowError):
                    yield f"input.filter: {column} is {kind}, for which `{operator} {value!r}` has no meaning"

    def select(self, batch: Any) -> Any:
        """The positions in the batch of the rows that pass."""
        mask = None
        for column, operator, value in self._conditions:
            holds = pc.fill_null(_holds(_plain(batch.column(column)), operator, value), False)
            mask = holds if mask is None else pc.and_(mask, holds)
        return pc.indices_nonzero(mask)


_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "==": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


def _holds(column: Any, operator: str, value: Any) -> Any:
    """Whether the condition holds, per value; null where the value is null."""
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.bool_())
    if _is_text(column.type):
        column = column.cast(pa.large_binary())
    if operator in _COMPARISONS:
        return _COMPARISONS[operator](column, _literal(value, column.type))
    if operator not in ("in", "not in"):
        raise ValueError(f"unknown operator {operator}")
    known = pc.is_in(column, value_set=_literals(value, column.type))
    return known if operator == "in" else pc.and_(pc.invert(known), pc.is_valid(column))


def _literals(values: Sequence[Any], kind: Any) -> Any:
    """The list as an array of the column's type, without numbers that no value of that type can equal."""
    fitting = []
    for value in values:
        literal = _literal(value, kind)
        try:
            fitting.append(literal.cast(kind))
        except pa.ArrowInvalid:
            if not _is_number(kind):
                raise
    return pa.array([literal.as_py() for literal in fitting], kind)


def _literal(value: Any, kind: Any) -> Any:
    """A value out of a job file as something that Arrow can compare with a column of this type."""
    if isinstance(value, bool) is not pa.types.is_boolean(kind):
        raise ValueError("true and false go with a boolean column, and nothing else does")
    if pa.types.is_uint64(kind) and isinstance(value, int):
        return pa.scalar(value, kind)  # compared with a signed number, Arrow would refuse its upper half
    if _is_number(kind) and isinstance(value, int | float):
        return pa.scalar(value)
    if _is_binary(kind) and not isinstance(value, float):
        return pa.scalar(str(value).encode(), pa.large_binary())
    if pa.types.is_timestamp(kind) and kind.tz and isinstance(value, str):
        return _instant(value, kind)
    return pa.scalar(value).cast(kind)


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _instant(value: str, kind: Any) -> Any:
    """An instant; without a zone of its own it is UTC."""
    try:
        return pa.scalar(value).cast(kind)
    except pa.ArrowInvalid:
        return pa.scalar(value).cast(pa.timestamp(kind.unit)).cast(kind)


# Where the files are


@dataclass(frozen=True, slots=True)
class _Place:
    """A file system, and how names in a manifest become its paths.

    `key` tells one file system from another within this process; `pattern` is the job's path as a name.
    """

    filesystem: Any
    key: str
    scheme: str
    root: str
    pattern: str

    def locate(self, name: str) -> str:
        """The file system's path of a name."""
        if self.scheme:
            return name.removeprefix(self.scheme).rstrip("/")
        return posixpath.normpath(posixpath.join(self.root, name)) if self.root or name else ""

    def name(self, path: str) -> str:
        """The manifest's name of a path: no machine's folders in it, where that can be avoided."""
        if self.root and os.path.isabs(path) and path.startswith(self.root.rstrip("/") + "/"):
            return os.path.relpath(path, self.root)
        return self.scheme + path

    def sign(self, path: str) -> Signature | None:
        """What changes whenever the file does, its size first; None if there is no such file."""
        if not isinstance(self.filesystem, pa.fs.LocalFileSystem):
            info = self.filesystem.get_file_info(path)
            return (info.size, info.mtime_ns or 0) if info.type == pa.fs.FileType.File else None
        try:
            state = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return (
            (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
            if stat.S_ISREG(state.st_mode)
            else None
        )


def _find_place(path: str, root: Path, filesystem: Any) -> _Place:
    scheme, separator, rest = path.partition("://")
    if separator:
        authority, _, key = rest.partition("?")[0].partition("/")
        pattern = posixpath.join(authority.rpartition("@")[2], key).rstrip("/")
        url = _store_url(scheme, authority, rest.partition("?")[2])
        return _Place(
            filesystem or _connect(url),
            url if filesystem is None else str(id(filesystem)),
            f"{scheme}://",
            "",
            pattern,
        )
    pattern = posixpath.normpath(path)
    if filesystem is not None:
        return _Place(filesystem, str(id(filesystem)), "", "", pattern)
    return _Place(pa.fs.LocalFileSystem(), "", "", str(root.absolute()), pattern)


def _store_url(scheme: str, authority: str, query: str) -> str:
    """The URL of a bucket with its options. Keys have no place in a job file, nor in the ledger it is copied to."""
    user, at, _ = authority.rpartition("@")
    if at and (scheme, user) != ("gs", "anonymous"):
        raise ConfigurationError(
            Problem(
                "input.path", "holds credentials; remove them, and set the environment's (AWS_PROFILE, …) instead"
            )
        )
    if scheme == "gs" and "retry_limit_seconds" not in query:
        query = "&".join(
            filter(None, (query, "retry_limit_seconds=30"))
        )  # else an unreachable store hangs 15 minutes
    return f"{scheme}://{authority}" + (f"?{query}" if query else "")


@lru_cache(maxsize=16)
def _connect(url: str) -> Any:
    try:
        return pa.fs.FileSystem.from_uri(url)[0]
    except (pa.ArrowException, ValueError) as error:
        raise ConfigurationError(
            Problem("input.path", f"{_brief(error)}; see the options of pyarrow's URLs")
        ) from None


@contextmanager
def _planning() -> Iterator[None]:
    """Before money moves, a store that fails or a file that changes is a wrong configuration."""
    try:
        yield
    except OSError as error:
        raise ConfigurationError(Problem("input.path", _explain_store(error))) from error
    except (InputChanged, InputUnavailable) as error:
        raise ConfigurationError(str(error)) from error


@contextmanager
def _storage() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputUnavailable(f"{_explain_store(error)}; then resume the run") from error


def _explain_store(error: OSError) -> str:
    return (
        f"the input cannot be read: {_brief(error)}; check the network, the name, and the rights that this process "
        "has (file modes; AWS_PROFILE or AWS_ACCESS_KEY_ID; GOOGLE_APPLICATION_CREDENTIALS)"
    )


def _is_stores_fault(error: BaseException) -> bool:
    """Whether the disk or the network failed, not the bytes: Arrow gives an errno, or the store's words."""
    if not isinstance(error, OSError):
        return False
    return error.errno is not None or "AWS Error" in str(error) or "google::cloud::Status" in str(error)


def _brief(error: BaseException) -> str:
    """An Arrow error's first line, which names places and formats but no values of rows."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 300 else f"{lines[0][:300]}…"


# Which files


def _list_names(place: _Place) -> list[str]:
    """The names of the files that the pattern selects, sorted. Raises ConfigurationError if there are none."""
    kind = place.filesystem.get_file_info(place.locate(place.pattern)).type
    if kind == pa.fs.FileType.File:
        return [place.name(place.pattern)]
    pattern = place.pattern
    if is_folder := kind == pa.fs.FileType.Directory:
        pattern = posixpath.normpath(posixpath.join(glob.escape(pattern), "**/*"))
    names = [name for name in _walk(place, pattern) if matches(name, pattern)]
    if is_folder:
        names = [name for name in names if name.lower().endswith(SUFFIXES)]
    if not names:
        raise ConfigurationError(Problem("input.path", _explain_no_match(place, pattern, is_folder)))
    return sorted({place.name(name) for name in names})


def _walk(place: _Place, pattern: str) -> Iterator[str]:
    """Names of the files that may match, in the pattern's own spelling."""
    base, depth = fixed_folder(pattern), depth_below(pattern)
    path = place.locate(base)
    if isinstance(place.filesystem, pa.fs.LocalFileSystem):
        below = _walk_folders(path, depth)
    else:
        selector = pa.fs.FileSelector(path, allow_not_found=True, recursive=depth != 0)
        infos = place.filesystem.get_file_info(selector)
        files = (info.path for info in infos if info.type == pa.fs.FileType.File)
        below = (file.removeprefix(path).lstrip("/") for file in files)
    return (posixpath.join(base, name) for name in below)


def _walk_folders(path: str, depth: int | None) -> Iterator[str]:
    """Files below a local folder. Links are followed, but no folder is entered twice, so a loop ends."""
    seen = set()
    for folder, subfolders, files in os.walk(path, followlinks=True, onerror=_raise_unless_gone):
        state = os.stat(folder)
        below = os.path.relpath(folder, path)
        level = 0 if below == "." else below.count("/") + 1
        if (state.st_dev, state.st_ino) in seen or (depth is not None and level > depth):
            subfolders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        subfolders.sort()
        for file in files:
            yield posixpath.normpath(posixpath.join(below, file))


def _raise_unless_gone(error: OSError) -> None:
    """A folder that we may not list holds documents that we would leave out in silence."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _explain_no_match(place: _Place, pattern: str, is_folder: bool) -> str:
    folder = place.locate(fixed_folder(pattern))
    selector = pa.fs.FileSelector(folder, allow_not_found=True)
    infos = [info for info in place.filesystem.get_file_info(selector) if not is_hidden(info.base_name)]
    names = sorted(info.base_name + ("/" if info.type == pa.fs.FileType.Directory else "") for info in infos)
    what = f"no Parquet file ({', '.join(SUFFIXES)}) in" if is_folder else "no file matches"
    shown = ", ".join(names[:8]) + (f", … ({len(names)})" if len(names) > 8 else "")
    where = f"looked in {place.scheme}{folder or '.'}"
    return f"{what} {place.scheme}{place.pattern}; {where}, which holds {shown or 'nothing (or does not exist)'}"


def _check_files(place: _Place, input: Input, names: Sequence[str], limit: int | None) -> None:
    """Raise every problem that the footers show, equal ones once with the files that have them."""
    problems: dict[str, list[str]] = {}
    rows = 0
    for name in names:
        try:
            with _open(place, name) as footer:
                found = list(_find_problems(footer.schema_arrow, input, name))
                rows += footer.metadata.num_rows
        except _UNREADABLE as error:
            found = [f"is not a readable Parquet file: {_brief(error)}"]
        for problem in found:
            problems.setdefault(problem, []).append(name)
        if limit is not None and rows >= limit and not input.filter:
            break
    if problems:
        raise ConfigurationError(*_sum_up(problems))


def _sum_up(problems: dict[str, list[str]]) -> Iterator[Problem | str]:
    for what, names in list(problems.items())[:_SHOWN_PROBLEMS]:
        yield Problem(names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""), what)
    if len(problems) > _SHOWN_PROBLEMS:
        yield f"… and {len(problems) - _SHOWN_PROBLEMS} more problems"


def _find_problems(schema: Any, input: Input, name: str) -> Iterator[str]:
    if input.partition and partition_of(name, input.partition) is None:
        yield f"is in no folder {input.partition}=…, which input.partition asks for"
    yield from _find_column_problem(schema, "input.id", input.id, _is_id, "text or integers")
    yield from _find_column_problem(schema, "input.text", input.text, _is_text, "text")
    if input.label is not None:
        yield from _find_column_problem(schema, "input.label", input.label, _is_label, "text, integers or booleans")
    conditions = _Filter(input)
    for column in conditions.columns:
        yield from _find_column_problem(schema, "input.filter", column, lambda kind: True, "anything")
    yield from conditions.find_problems(schema)


def _find_column_problem(
    schema: Any, where: str, column: str, is_usable: Callable[[Any], bool], wanted: str
) -> Iterator[str]:
    found = schema.names.count(column)
    if found == 0:
        yield f"{where}: no column {column!r}; {suggest(column, schema.names)}"
    elif found > 1:
        yield f"{where}: {found} columns are called {column!r}; rename all but one"
    elif not is_usable(kind := schema.field(column).type):
        yield f"{where}: column {column!r} is {kind}; it must hold {wanted}"


# Reading rows


@contextmanager
def _open(place: _Place, name: str) -> Iterator[Any]:
    with (
        place.filesystem.open_input_file(place.locate(name)) as source,
        pq.ParquetFile(source, pre_buffer=False) as file,
    ):
        yield file


class _Reader:
    """Reads row ranges of one Parquet file, a few rows at a time.

    It remembers where it is: going on in a row group costs nothing, while going back, or into the middle of
    another one, decodes that row group from its start.
    """

    def __init__(self, source: Any, columns: Sequence[str]) -> None:
        self._source = source
        self._columns = list(columns)
        self._parquet = pq.ParquetFile(
            source,
            pre_buffer=False,
            buffer_size=_BUFFER,
            page_checksum_verification=True,
            binary_type=pa.large_binary(),  # else one value that is not UTF-8 spoils a whole dictionary
        )
        metadata = self._parquet.metadata
        sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        self._starts = list(accumulate(sizes, initial=0))
        self._group = -1
        self._position = 0
        self._batches: Iterator[Any] = iter(())
        self._rest: Any = None

    def close(self) -> None:
        """Give the file back; reading is over."""
        self._batches, self._rest = iter(()), None
        self._parquet.close(force=True)
        self._source.close()

    @property
    def row_groups(self) -> Iterator[range]:
        """The rows of each row group."""
        return (range(start, stop) for start, stop in zip(self._starts, self._starts[1:], strict=False))

    def read(self, rows: range) -> Iterator[tuple[int, Any]]:
        """Batches that cover exactly these rows, each with the position of its first."""
        first = rows.start
        while first < rows.stop:
            self._seek(first)
            batch = self._take(rows.stop - first)
            yield first, batch
            first += batch.num_rows

    def _seek(self, row: int) -> None:
        group = bisect_right(self._starts, row) - 1
        if group != self._group or row < self._position:
            self._start(group)
        while self._position < row:
            self._take(row - self._position)

    def _start(self, group: int) -> None:
        if group >= len(self._starts) - 1:
            raise pa.ArrowInvalid("the file has fewer rows than its manifest says")
        self._group, self._position, self._rest = group, self._starts[group], None
        self._batches = self._parquet.iter_batches(
            self._batch_rows(group), row_groups=[group], columns=self._columns, use_threads=False
        )

    def _batch_rows(self, group: int) -> int:
        """How many rows make a batch of a few megabytes, to the footer's knowledge.

        The size of our columns alone would be closer, but Arrow 26 aborts the process where a corrupt footer has
        nonsense in a column's size statistics.
        """
        metadata = self._parquet.metadata.row_group(group)
        rows: int = metadata.num_rows
        size: int = metadata.total_byte_size
        return max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(size, 1)))

    def _take(self, most: int) -> Any:
        batch = self._rest or next(self._batches, None)
        if batch is None:
            raise pa.ArrowInvalid("a row group ends before its last row")
        self._rest = batch.slice(most) if batch.num_rows > most else None
        batch = batch.slice(0, most)
        self._position += batch.num_rows
        return batch


_ReaderKey: TypeAlias = tuple[str, str, Signature, tuple[str, ...]]


class _Shelf:
    """Open readers between two shards, so that the next shard of a file goes on where the last one ended."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._readers: OrderedDict[_ReaderKey, _Reader] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, key: _ReaderKey) -> _Reader | None:
        """The reader for exactly this file and these columns, now the caller's alone."""
        with self._lock:
            return self._readers.pop(key, None)

    def put(self, key: _ReaderKey, reader: _Reader) -> None:
        """Keep a reader for the next shard; the one unused for longest is closed."""
        with self._lock:
            surplus = [self._readers.pop(key)] if key in self._readers else []
            self._readers[key] = reader
            if len(self._readers) > self._size:
                surplus.append(self._readers.popitem(last=False)[1])
        for old in surplus:
            old.close()


_shelf = _Shelf(size=4)


def _read_documents(place: _Place, input: Input, file: InputFile, shard: Shard) -> Iterator[Document | UnfitDocument]:
    for number, (ids, texts) in _read_cells(place, input, file, shard, (input.id, input.text)):
        for document_no, (document_id, text) in enumerate(zip(ids, texts, strict=True), start=number):
            yield judge_row(document_no, document_id, text)


def _read_cells(
    place: _Place, input: Input, file: InputFile, shard: Shard, columns: tuple[str, ...]
) -> Iterator[tuple[int, list[list[Cell]]]]:
    """The columns' values in the shard's rows that pass the filter, with the number of the first document in each."""
    conditions = _Filter(input)
    number, end = shard.first_document_no, shard.first_document_no + shard.document_count
    rows = range(shard.first_row, shard.first_row + shard.row_count)
    for batch in _read_pinned(place, file, rows, tuple(dict.fromkeys((*columns, *conditions.columns)))):
        chosen = [batch.column(name) for name in columns]
        if conditions:
            positions = conditions.select(batch)
            chosen = [_choose(column, positions) for column in chosen]
        if number + len(chosen[0]) > end:
            break
        yield number, [_cells(column) for column in chosen]
        number += len(chosen[0])
    else:
        if number == end:
            return
    raise InputChanged(f"{file.path}: the filter selects other rows than planned; start a new run for the new job")


def _read_pinned(place: _Place, file: InputFile, rows: range, columns: tuple[str, ...]) -> Iterator[Any]:
    """Batches of a file that is the manifest's before the first one, and has not been touched by each one after."""
    path = place.locate(file.path)
    signature = _require_unchanged(place, file)
    with _borrow(place, path, signature, columns, file) as reader:
        for _, batch in reader.read(rows):
            if place.sign(path) != signature:
                raise InputChanged(f"{file.path}: changed while it was being read; start a new run for the new file")
            yield batch


@contextmanager
def _borrow(
    place: _Place, path: str, signature: Signature, columns: tuple[str, ...], file: InputFile
) -> Iterator[_Reader]:
    """A reader for the duration of a shard; one that failed is not used again."""
    key = (place.key, path, signature, columns)
    reader = _shelf.take(key)
    is_sound = False
    try:
        reader = reader or _Reader(place.filesystem.open_input_file(path), columns)
        yield reader
        is_sound = True
    except GeneratorExit:  # the shard was given up half way, which does the reader no harm
        is_sound = True
        raise
    except _UNREADABLE as error:
        _require_unchanged(place, file)
        if _is_stores_fault(error):
            raise
        raise InputChanged(
            f"{file.path}: is corrupt: {_brief(error)}; write the file anew, start a new run"
        ) from error
    finally:
        if reader is not None and is_sound:
            _shelf.put(key, reader)
        elif reader is not None:
            reader.close()


# Files that must not change

_digests: dict[tuple[str, str, Signature], str] = {}
_hashing = threading.Lock()


def _require_unchanged(place: _Place, file: InputFile) -> Signature:
    signature = _unchanged_signature(place, file)
    if signature is None:
        raise InputChanged(
            f"{file.path}: is gone or no longer what the run was planned on; restore it, or start a new run"
        )
    return signature


def _unchanged_signature(place: _Place, file: InputFile) -> Signature | None:
    path = place.locate(file.path)
    signature = place.sign(path)
    if signature is None or signature[0] != file.size:
        return None
    try:
        return signature if _digest(place, path, signature) == file.sha256 else None
    except FileNotFoundError:
        return None


def _digest(place: _Place, path: str, signature: Signature) -> str:
    """The file's SHA-256 in hex, computed once per process and signature; lanes that ask meanwhile wait for it."""
    key = (place.key, path, signature)
    with _hashing:
        if key not in _digests:
            _digests[key] = _hash_file(place.filesystem, path)
        return _digests[key]


def _hash_file(filesystem: Any, path: str) -> str:
    seen = hashlib.sha256()
    with filesystem.open_input_stream(path, compression=None, buffer_size=0) as stream:
        while piece := stream.read_buffer(_PIECE):
            seen.update(piece)
    return seen.hexdigest()


# Planning


@dataclass(slots=True)
class _Survey:
    """What planning has seen so far. `hashes` has one 64-bit hash per document: ids themselves would not fit."""

    input: Input
    place: _Place
    shard_rows: int
    limit: int | None
    files: list[InputFile] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    hashes: array[int] = field(default_factory=lambda: array("q"))
    raw_rows: int = 0

    @property
    def room(self) -> int | None:
        """How many more documents the limit allows; None without one."""
        return None if self.limit is None else self.limit - len(self.hashes)

    def add(self, names: Sequence[str]) -> None:
        """Read files until the limit is reached. Raises ConfigurationError for all that fail, or if all are empty."""
        problems: dict[str, list[str]] = {}
        for name in names:
            if self.room == 0:
                break
            try:
                self._add_file(name)
            except _UNREADABLE as error:
                problems.setdefault(f"cannot be read: {_brief(error)}; write the file anew", []).append(name)
        if problems:
            raise ConfigurationError(*_sum_up(problems))
        if not self.shards:
            raise ConfigurationError(Problem("input", self._explain_nothing()))

    def _explain_nothing(self) -> str:
        where = f"{len(self.files)} file{'s' if len(self.files) > 1 else ''}"
        if self.raw_rows:
            return f"none of the {self.raw_rows} rows in {where} passes input.filter; check its values"
        return f"there is no row in {where}; check input.path"

    def _add_file(self, name: str) -> None:
        path, first = self.place.locate(name), len(self.hashes)
        signature = self.place.sign(path)
        if signature is None:
            raise InputChanged(f"{name}: has just been removed; wait for its writer")
        sha256 = _digest(self.place, path, signature)
        with self._open(path) as reader:
            cuts = list(cut_shards(self._read_groups(reader), self.shard_rows))
        if self.place.sign(path) != signature:
            raise InputChanged(f"{name}: changed while it was being read; wait for its writer")
        partition = partition_of(name, self.input.partition)
        file_no, rows = len(self.files), len(self.hashes) - first
        self.files.append(InputFile(file_no, name, signature[0], sha256, rows, partition))
        for cut in cuts:
            shard_no = len(self.shards)
            self.shards.append(Shard(shard_no, file_no, cut.first_row, cut.row_count, first, cut.document_count))
            first += cut.document_count

    @contextmanager
    def _open(self, path: str) -> Iterator[_Reader]:
        columns = tuple(dict.fromkeys((self.input.id, *_Filter(self.input).columns)))
        with self.place.filesystem.open_input_file(path) as source:
            yield _Reader(source, columns)

    def _read_groups(self, reader: _Reader) -> Iterator[Sequence[int]]:
        conditions = _Filter(self.input)
        for rows in reader.row_groups:
            self.raw_rows += len(rows)
            yield self._read_filtered(reader, rows, conditions) if conditions else self._read_all(reader, rows)

    def _read_all(self, reader: _Reader, rows: range) -> Sequence[int]:
        rows = rows[: self.room]
        for _, batch in reader.read(rows):
            self._add_ids(batch.column(self.input.id))
        return rows

    def _read_filtered(self, reader: _Reader, rows: range, conditions: _Filter) -> Sequence[int]:
        chosen = array("Q")
        for first, batch in reader.read(rows if self.room != 0 else range(0)):
            positions = conditions.select(batch)[: self.room]
            self._add_ids(_choose(batch.column(self.input.id), positions))
            chosen.extend(first + position for position in positions.to_pylist())
            if self.room == 0:
                break
        return chosen

    def _add_ids(self, column: Any) -> None:
        """Hash ids; one that can be no document's gets a hash of its own."""
        start = len(self.hashes)
        self.hashes.extend(
            hash(cell) if type(cell) is str else hash((start, place)) for place, cell in enumerate(_cells(column))
        )

    def find_duplicates(self) -> tuple[Duplicate, ...]:
        """Documents whose id an earlier one has: found by hash, proven by reading those few again."""
        repeated = _find_repeated(self.hashes)
        if len(repeated) >= 1000 and 10 * len(repeated) > 9 * len(self.hashes):
            self._refuse_constant_id(repeated)
        originals: dict[str, tuple[int, bytes]] = {}
        duplicates = []
        for document in self._read_again(repeated):
            number, digest = document.document_no, document.text_digest
            of_number, of_digest = originals.setdefault(document.document_id, (number, digest))
            if of_number != number:
                duplicates.append(Duplicate(number, of_number, digest == of_digest))
        return tuple(duplicates)

    def _refuse_constant_id(self, repeated: Sequence[int]) -> None:
        count = len(self.hashes)
        different = count - len(repeated) + len({self.hashes[number] for number in repeated})
        if 10 * different < count:
            what = f"column {self.input.id!r} has {different} values for {count} documents, so it names none of them"
            raise ConfigurationError(Problem("input.id", f"{what}; choose a column that does, or fewer partitions"))

    def _read_again(self, numbers: Sequence[int]) -> Iterator[Document]:
        """The documents with these numbers that are fit to be sent; only shards that hold one are read."""
        for shard in self.shards:
            start = bisect_left(numbers, shard.first_document_no)
            stop = bisect_left(numbers, shard.first_document_no + shard.document_count)
            wanted = set(numbers[start:stop])
            documents = _read_documents(self.place, self.input, self.files[shard.file_no], shard) if wanted else ()
            yield from (each for each in documents if each.document_no in wanted and isinstance(each, Document))


def _find_repeated(hashes: array[int]) -> list[int]:
    """Positions of the values that occur more than once, counted in parts so that memory stays near the array's."""
    whole = pa.Array.from_buffers(pa.int64(), len(hashes), [None, pa.py_buffer(hashes)])
    slices = [whole.slice(start, 1 << 20) for start in range(0, len(whole), 1 << 20)]
    mask = (1 << (len(hashes) >> 20).bit_length()) - 1
    repeated = [_find_repeated_values(slices, mask, part) for part in range(mask + 1)]
    values = pa.concat_arrays(repeated)
    return [
        start + position
        for start, each in zip(range(0, len(whole), 1 << 20), slices, strict=True)
        for position in pc.indices_nonzero(pc.is_in(each, value_set=values)).to_pylist()
    ]


def _find_repeated_values(slices: Iterable[Any], mask: int, part: int) -> Any:
    chosen = [each.filter(pc.equal(pc.bit_wise_and(each, mask), part)) for each in slices]
    counts = pc.value_counts(pa.chunked_array(chosen, pa.int64()))
    return counts.field("values").filter(pc.greater(counts.field("counts"), 1))
