"""Readings: alone responsible for what is said between those who want files read and the process that reads them.

One `Order` begins a reading, `More` asks for the next of its blocks, and an empty `Block` ends it. Each is answered
by one `Block` or `Raised`; before that, `Opened` names any file that is about to be read, so that whoever waits knows
which one ended the process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from schemas.errors import FarthingError, Unforeseen

#: Documents looked up and started together.
BLOCK = 200
#: A block ends early at so many characters of text: two documents of 100 MB never travel together.
BLOCK_CHARACTERS = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Order:
    """Read this, in blocks of at most so many rows; a reading that was not ended is given up."""

    what: Literal["list_files", "plan", "draw", "read_shard", "read_labels"]
    arguments: Mapping[str, Any]
    rows: int = BLOCK


@dataclass(frozen=True, slots=True)
class More:
    """Read the next block."""


@dataclass(frozen=True, slots=True)
class Opened:
    """This file is read from now on; "" says that the process is there and has opened none."""

    name: str


@dataclass(frozen=True, slots=True)
class Block:
    """The next rows; none: there are no more."""

    rows: Sequence[Any]


@dataclass(frozen=True, slots=True)
class Raised:
    """What stopped the reading."""

    error: FarthingError | Unforeseen


Reply: TypeAlias = Opened | Block | Raised
