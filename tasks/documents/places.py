"""Places: alone responsible for where files are, and for how a manifest's names become a file system's paths."""

from __future__ import annotations

import os
import posixpath
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow.fs

from tasks.documents.stores import bucket_url, connect

Signature: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """A file system, and how names in a manifest become its paths.

    `key` tells one file system from another within this process; `pattern` is the job's path as a name.
    """

    filesystem: Any
    key: str
    scheme: str
    root: str
    pattern: str

    @property
    def is_local(self) -> bool:
        """Whether files are on this machine, where more can be asked about them."""
        return isinstance(self.filesystem, pyarrow.fs.LocalFileSystem)

    def locate(self, name: str) -> str:
        """The file system's path of a name."""
        if self.scheme:
            return name.removeprefix(self.scheme).rstrip("/")
        return posixpath.normpath(posixpath.join(self.root, name))

    def name(self, path: str) -> str:
        """The manifest's name of a path: no machine's folders in it, where that can be avoided."""
        if self.root and path.startswith(self.root.rstrip("/") + "/"):
            return os.path.relpath(path, self.root)
        return self.scheme + path

    def sign(self, path: str) -> Signature | None:
        """What changes whenever the file does, its size first; None if there is no such file."""
        if self.is_local:
            return _sign_local(path)
        info = self.filesystem.get_file_info(path)
        return (info.size, info.mtime_ns or 0) if info.type == pyarrow.fs.FileType.File else None


def _sign_local(path: str) -> Signature | None:
    try:
        state = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(state.st_mode):
        return None
    return (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)


def find_place(path: str, root: Path, filesystem: Any) -> Place:
    """Where a job's path leads; `filesystem` stands in for the one that it names."""
    scheme, separator, rest = path.partition("://")
    if separator:
        return _find_bucket(scheme, rest, filesystem)
    pattern = posixpath.normpath(path)
    if filesystem is not None:
        return Place(filesystem, str(id(filesystem)), "", "", pattern)
    return Place(pyarrow.fs.LocalFileSystem(), "", "", str(root.absolute()), pattern)


def _find_bucket(scheme: str, rest: str, filesystem: Any) -> Place:
    location, _, options = rest.partition("?")
    authority, _, key = location.partition("/")
    url = bucket_url(scheme, authority, options)
    pattern = posixpath.join(authority.rpartition("@")[2], key).rstrip("/")
    if filesystem is None:
        return Place(connect(url), url, f"{scheme}://", "", pattern)
    return Place(filesystem, str(id(filesystem)), f"{scheme}://", "", pattern)
