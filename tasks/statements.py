"""Statements: alone responsible for reading the files of a console's export, which may be anything.

A file is a CSV or a ZIP of them. Nothing is unpacked to disk, and no more is read than any month can have, whatever a
ZIP's own figures say.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from schemas.errors import ConfigurationError, Problem
from schemas.inert import plain
from schemas.statements import Sheet, Statement, read_statement

#: A month by the hour, with a dozen keys and models, is 100,000 rows of 200 bytes.
MOST_BYTES = 256 * 1024**2
MOST_FILES = 64
_CHUNK = 1 << 20
_DELIMITERS = ",;\t"
#: What macOS adds to an archive.
_CLUTTER = ("__MACOSX/", ".DS_Store")


def load_statement(paths: Sequence[Path], key: str | None = None) -> Statement:
    """The statement in these files. Raises ConfigurationError that names the file, line and column it cannot read."""
    if not paths:
        raise ConfigurationError("name the export: the file that the console's usage page gives, usage_data_….zip")
    files = [(path, _read_file(path)) for path in paths]
    digests = [hashlib.sha256(raw).hexdigest() for _, raw in files]
    for number, digest in enumerate(digests):
        if digest in digests[:number]:
            raise ConfigurationError(
                f"{paths[number]} is the same file as {paths[digests.index(digest)]}: name it once"
            )
    sources = [f"{plain(path.name)} (sha256:{digest})" for path, digest in zip(paths, digests, strict=True)]
    sheets = (sheet for path, raw in files for sheet in _open_sheets(path, raw))
    return read_statement(sheets, sources, key)


def _read_file(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise ConfigurationError(f"{path} is no file: name the ZIP or the CSV of the export")
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}; name another file") from None
    if len(raw) > MOST_BYTES:
        raise _too_large(str(path))
    return raw


def _too_large(name: str) -> ConfigurationError:
    return ConfigurationError(f"{name}: is larger than {MOST_BYTES >> 20} MiB, which no month's export is: not read")


def _open_sheets(path: Path, raw: bytes) -> Iterator[Sheet]:
    if not zipfile.is_zipfile(io.BytesIO(raw)):
        yield Sheet(plain(path.name), _read_rows(plain(path.name), raw))
        return
    left = MOST_BYTES
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            for member in _choose_members(path, archive):
                name = f"{plain(path.name)}/{plain(member.filename)}"
                content = _unpack(archive, member, name, left)
                left -= len(content)
                yield Sheet(name, _read_rows(name, content))
    except (zipfile.BadZipFile, NotImplementedError, zlib.error, EOFError) as error:
        raise ConfigurationError(f"{path} is a damaged or unusual ZIP ({error}): export it again") from None


def _choose_members(path: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The CSV files in it. Raises ConfigurationError for what no console writes."""
    members = [each for each in archive.infolist() if not each.is_dir() and not _is_clutter(each.filename)]
    for member in members:
        name = f"{path}: its file {plain(member.filename)[:80]}"
        if PurePosixPath(member.filename).is_absolute() or ".." in PurePosixPath(member.filename).parts:
            raise ConfigurationError(f"{name} points out of the archive: this is no export of the console")
        if member.flag_bits & 1:
            raise ConfigurationError(f"{name} is encrypted: give the export as the console wrote it")
    tables = [each for each in members if each.filename.lower().endswith(".csv")]
    if not tables or len(members) > MOST_FILES:
        raise ConfigurationError(f"{path} has {len(tables)} CSV files among {len(members)}: this is no export")
    return tables


def _is_clutter(name: str) -> bool:
    return name.startswith(_CLUTTER[0]) or name.endswith(_CLUTTER[1])


def _unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, left: int) -> bytes:
    """Its content, if that is no more than what is left: the size that the archive claims is not believed."""
    content = bytearray()
    with archive.open(member) as file:
        for chunk in _chunks(file):
            content += chunk
            if len(content) > left:
                raise _too_large(name)
    return bytes(content)


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


def _read_rows(name: str, raw: bytes) -> Iterator[tuple[int, Sequence[str]]]:
    """Its rows with the numbers of their lines."""
    text = _decode(name, raw)
    header = text.partition("\n")[0]
    delimiter = max(_DELIMITERS, key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ConfigurationError(Problem(f"{name}:{reader.line_num}", f"is no CSV: {error}")) from None


def _decode(name: str, raw: bytes) -> str:
    """UTF-8 with or without its mark, or the UTF-16 that spreadsheets write, which has one."""
    encoding = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        told = f"is no {encoding.removesuffix('-sig').upper()} text"
        raise ConfigurationError(Problem(f"{name}:{line}", told)) from None
