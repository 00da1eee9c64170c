"""What a run reads: files, shards and documents, as values."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class InputFile:
    """One Parquet file as the manifest fixed it (G1): its size in bytes, SHA-256 and matching rows."""

    file_no: int
    path: str
    size: int
    sha256: str
    rows: int
    partition: str | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """A row range of one file: the unit of lease.

    `first_row`/`row_count` are raw positions in the file; `document_count` of those rows pass the job's
    filter and are numbered from `first_document_no` in file order.
    """

    shard_no: int
    file_no: int
    first_row: int
    row_count: int
    first_document_no: int
    document_count: int


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A document whose id an earlier document of the run already has."""

    document_no: int
    of_document_no: int
    is_same_text: bool


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a run is bound to before the first attempt is sent."""

    files: tuple[InputFile, ...]
    shards: tuple[Shard, ...]
    duplicates: tuple[Duplicate, ...]

    @property
    def document_count(self) -> int:
        return sum(shard.document_count for shard in self.shards)

    @property
    def digest(self) -> str:
        """`sha256:` over each file's path, size, SHA-256 and rows, and every shard's range."""
        seen = hashlib.sha256()
        for file in self.files:
            seen.update(f"{file.path}\0{file.size}\0{file.sha256}\0{file.rows}\n".encode())
        for shard in self.shards:
            seen.update(f"{shard.file_no}\0{shard.first_row}\0{shard.row_count}\0{shard.document_count}\n".encode())
        return f"sha256:{seen.hexdigest()}"


@dataclass(frozen=True, slots=True)
class Document:
    """One input row: its number in the run, the user's id for it, and its text."""

    document_no: int
    document_id: str
    text: str

    @property
    def text_digest(self) -> bytes:
        """SHA-256 of the text in UTF-8, 32 bytes: with the prompt version, the key of reuse."""
        return hashlib.sha256(self.text.encode("utf-8", "replace")).digest()


class Unfit(StrEnum):
    """Why an input row cannot become a document that is sent."""

    NULL_ID = "null_id"
    NULL_TEXT = "null_text"
    EMPTY_TEXT = "empty_text"
    ID_TOO_LONG = "id_too_long"
    NUL_IN_ID = "nul_in_id"  # Postgres stores no NUL, and an id that we changed would be nobody's id
    NOT_UNICODE = "not_unicode"


@dataclass(frozen=True, slots=True)
class UnfitDocument:
    """An input row that ends as a dead letter without an attempt. `document_id` is "" where the row has none."""

    document_no: int
    document_id: str
    reason: Unfit
