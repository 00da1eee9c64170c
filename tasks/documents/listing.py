"""The listing: alone responsible for which of the files that exist a job's path names."""

from __future__ import annotations

import glob
import os
import posixpath
from collections.abc import Iterator

import pyarrow.fs

from schemas.errors import ConfigurationError, Problem
from schemas.selection import depth_below, fixed_folder, is_hidden, matches
from tasks.documents.places import Place

#: In a folder, files are told by their suffix; a pattern says itself what it means.
_SUFFIXES = (".parquet", ".parq", ".pq")


def list_names(place: Place) -> list[str]:
    """The names of the files that the pattern selects, sorted. Raises ConfigurationError if there are none."""
    kind = place.filesystem.get_file_info(place.locate(place.pattern)).type
    if kind == pyarrow.fs.FileType.File:
        return [place.name(place.pattern)]
    pattern = place.pattern
    if is_folder := kind == pyarrow.fs.FileType.Directory:
        pattern = posixpath.normpath(posixpath.join(glob.escape(pattern), "**/*"))
    names = [name for name in _walk(place, pattern) if matches(name, pattern)]
    if is_folder:
        names = [name for name in names if name.lower().endswith(_SUFFIXES)]
    if not names:
        raise ConfigurationError(Problem("input.path", _explain_no_match(place, pattern, is_folder)))
    return sorted({place.name(name) for name in names})


def _walk(place: Place, pattern: str) -> Iterator[str]:
    """Names of the files that may match, in the pattern's own spelling."""
    base, depth = fixed_folder(pattern), depth_below(pattern)
    walk = _walk_local if place.is_local else _walk_store
    return (posixpath.join(base, name) for name in walk(place, place.locate(base), depth))


def _walk_store(place: Place, path: str, depth: int | None) -> Iterator[str]:
    selector = pyarrow.fs.FileSelector(path, allow_not_found=True, recursive=depth != 0)
    for info in place.filesystem.get_file_info(selector):
        if info.type == pyarrow.fs.FileType.File:
            yield info.path.removeprefix(path).lstrip("/")


def _walk_local(place: Place, path: str, depth: int | None) -> Iterator[str]:
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


def _explain_no_match(place: Place, pattern: str, is_folder: bool) -> str:
    folder = place.locate(fixed_folder(pattern))
    selector = pyarrow.fs.FileSelector(folder, allow_not_found=True)
    infos = [info for info in place.filesystem.get_file_info(selector) if not is_hidden(info.base_name)]
    names = sorted(info.base_name + ("/" if info.type == pyarrow.fs.FileType.Directory else "") for info in infos)
    what = f"no Parquet file ({', '.join(_SUFFIXES)}) in" if is_folder else "no file matches"
    shown = ", ".join(names[:8]) + (f", … ({len(names)})" if len(names) > 8 else "")
    where = f"looked in {place.scheme}{folder or '.'}"
    return f"{what} {place.scheme}{place.pattern}; {where}, which holds {shown or 'nothing (or does not exist)'}"
