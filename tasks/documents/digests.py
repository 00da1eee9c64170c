"""Digests: alone responsible for whether a file is, byte for byte, the one in the manifest (G1)."""

from __future__ import annotations

import hashlib
import threading
from contextlib import suppress
from typing import Any

from schemas.documents import InputFile
from schemas.errors import InputChanged
from tasks.documents.places import Place, Signature

_PIECE = 4 * 1024 * 1024  # bytes hashed at once

_digests: dict[tuple[str, str, Signature], str] = {}
_hashing = threading.Lock()


def require_unchanged(place: Place, file: InputFile) -> Signature:
    """The file's signature, if it still is what the run was planned on. Raises InputChanged otherwise."""
    path = place.locate(file.path)
    signature = place.sign(path)
    with suppress(FileNotFoundError):
        if signature and find_digest(place, path, signature) == file.sha256:
            return signature
    raise InputChanged(
        f"{file.path}: is gone or no longer what the run was planned on; restore it, or start a new run"
    )


def find_digest(place: Place, path: str, signature: Signature) -> str:
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
