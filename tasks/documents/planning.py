"""Planning: alone responsible for binding a run to its input, files and rows cut into numbered shards."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.fs

from schemas.documents import InputFile, Manifest, Shard
from schemas.errors import ConfigurationError, InputChanged, Problem
from schemas.jobs import Input
from schemas.selection import partition_of, select_partitions
from schemas.shards import Cut, cut_shards
from tasks.documents import trail
from tasks.documents.cells import choose, to_cells
from tasks.documents.digests import find_digest
from tasks.documents.duplicates import find_duplicates, hash_ids
from tasks.documents.faults import UNREADABLE, first_line, planning_faults
from tasks.documents.filters import Filter
from tasks.documents.footers import check_footers
from tasks.documents.listing import list_names
from tasks.documents.places import Place, find_place
from tasks.documents.problems import FileProblems
from tasks.documents.readers import Reader, open_reader


def plan(
    input: Input,
    *,
    shard_rows: int,
    partitions: Sequence[str] = (),
    limit: int | None = None,
    root: Path = Path("."),
    filesystem: pyarrow.fs.FileSystem | None = None,
) -> Manifest:
    """Bind a run to its input: files with size and SHA-256, shards of at most `shard_rows` documents, duplicates.

    Documents are numbered from 0 over the files in the order of their names. `limit` keeps the first so many;
    files after that are not opened. Among documents with one id the first that is fit to be sent is the original.
    `filesystem` stands in for the one that the path names. Raises ConfigurationError with all that is wrong.
    """
    if shard_rows < 1 or (limit is not None and limit < 1):
        raise ConfigurationError("shard size and limit must be at least 1")
    with planning_faults():
        place = find_place(input.path, root, filesystem)
        names = select_partitions(list_names(place), input.partition, partitions)
        check_footers(place, input, names, limit)
        survey = _Survey(place, input, shard_rows, limit)
        survey.add(names)
        manifest = Manifest(tuple(survey.files), tuple(survey.shards), duplicates=())
        return replace(manifest, duplicates=find_duplicates(place, input, manifest, survey.hashes))


def list_files(input: Input, *, root: Path = Path(".")) -> list[str]:
    """The names of the input's files, sorted; none is opened. Raises ConfigurationError where there is none."""
    with planning_faults():
        return list_names(find_place(input.path, root, None))


class _Survey:
    """What planning has seen so far: files, shards, and one hash per document."""

    def __init__(self, place: Place, input: Input, shard_rows: int, limit: int | None) -> None:
        self._place = place
        self._input = input
        self._filter = Filter(input)
        self._shard_rows = shard_rows
        self._limit = limit
        self._raw_rows = 0
        self.files: list[InputFile] = []
        self.shards: list[Shard] = []
        self.hashes: array[int] = array("q")

    @property
    def _room(self) -> int | None:
        """How many more documents the limit allows; None without one."""
        return None if self._limit is None else self._limit - len(self.hashes)

    def add(self, names: Sequence[str]) -> None:
        """Read files until the limit is reached. Raises ConfigurationError for all that fail, or if all are empty."""
        problems = FileProblems()
        for name in names:
            if self._room == 0:
                break
            trail.mark(name)
            try:
                self._add_file(name)
            except UNREADABLE as error:
                problems.add(name, f"cannot be read: {first_line(error)}; write the file anew")
        problems.raise_any()
        if not self.shards:
            raise ConfigurationError(Problem("input", self._explain_nothing()))

    def _explain_nothing(self) -> str:
        where = f"{len(self.files)} file{'s' if len(self.files) > 1 else ''}"
        if self._raw_rows:
            return f"none of the {self._raw_rows} rows in {where} passes input.filter; check its values"
        return f"there is no row in {where}; check input.path"

    def _add_file(self, name: str) -> None:
        path, first = self._place.locate(name), len(self.hashes)
        signature = self._place.sign(path)
        if signature is None:
            raise InputChanged(f"{name}: has just been removed; wait for its writer")
        sha256 = find_digest(self._place, path, signature)
        cuts = self._cut(path)
        if self._place.sign(path) != signature:
            raise InputChanged(f"{name}: changed while it was being read; wait for its writer")
        rows, partition = len(self.hashes) - first, partition_of(name, self._input.partition)
        self._add_shards(cuts, first)
        self.files.append(InputFile(len(self.files), name, signature[0], sha256, rows, partition))

    def _cut(self, path: str) -> list[Cut]:
        with closing(open_reader(self._place, path, (self._input.id, *self._filter.columns))) as reader:
            return list(cut_shards(self._read_groups(reader), self._shard_rows))

    def _add_shards(self, cuts: Sequence[Cut], first_document_no: int) -> None:
        for cut in cuts:
            shard_no, file_no = len(self.shards), len(self.files)
            self.shards.append(
                Shard(shard_no, file_no, cut.first_row, cut.row_count, first_document_no, cut.document_count)
            )
            first_document_no += cut.document_count

    def _read_groups(self, reader: Reader) -> Iterator[Sequence[int]]:
        """For each row group, the positions in the file of the rows that are documents."""
        for rows in reader.row_groups:
            if self._room == 0:
                return
            self._raw_rows += len(rows)
            yield self._read_filtered(reader, rows) if self._filter else self._read_all(reader, rows)

    def _read_all(self, reader: Reader, rows: range) -> range:
        rows = rows[: self._room]
        for _, batch in reader.read(rows):
            self._add_ids(batch.column(self._input.id))
        return rows

    def _read_filtered(self, reader: Reader, rows: range) -> array[int]:
        chosen = array("Q")
        for first, batch in reader.read(rows):
            positions = self._filter.select(batch)[: self._room]
            self._add_ids(choose(batch.column(self._input.id), positions))
            chosen.extend(first + position for position in positions.to_pylist())
            if self._room == 0:
                break
        return chosen

    def _add_ids(self, column: Any) -> None:
        self.hashes.extend(hash_ids(to_cells(column), len(self.hashes)))
