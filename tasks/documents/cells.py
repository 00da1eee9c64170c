"""Cells: alone responsible for how a column's values are spelled as text."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from schemas.fitness import Cell
from tasks.documents.kinds import is_binary, unwrap


def choose(column: Any, positions: Any) -> Any:
    """The column's values at these positions; what tells `to_cells` how to spell them is kept."""
    return (column if isinstance(column.type, pa.UuidType) else unwrap(column)).take(positions)


def to_cells(column: Any) -> list[Cell]:
    """A column's values as text: integers in decimal, UUIDs in their usual form, truth as JSON has it."""
    kind = column.type
    if isinstance(kind, pa.UuidType):
        return [None if value is None else str(value) for value in column.to_pylist()]
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return list(column.cast(pa.string()).to_pylist())
    column = unwrap(column)
    if is_binary(column.type):
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
