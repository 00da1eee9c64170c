"""Filters: alone responsible for which rows a job's conditions let pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from schemas.jobs import Input
from tasks.documents.kinds import is_binary, is_number, is_text, unwrap, unwrap_kind

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "==": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


class Filter:
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
                    _holds(pa.array([], unwrap_kind(kind)), operator, value)
                except (pa.ArrowException, ValueError, TypeError, OverflowError):
                    yield f"input.filter: {column} is {kind}, for which `{operator} {value!r}` has no meaning"

    def select(self, batch: Any) -> Any:
        """The positions in the batch of the rows that pass."""
        mask = None
        for column, operator, value in self._conditions:
            holds = pc.fill_null(_holds(unwrap(batch.column(column)), operator, value), False)
            mask = holds if mask is None else pc.and_(mask, holds)
        return pc.indices_nonzero(mask)


def _holds(column: Any, operator: str, value: Any) -> Any:
    """Whether the condition holds, per value; null where the value is null."""
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.bool_())
    if is_text(column.type):
        column = column.cast(pa.large_binary())
    if operator in _COMPARISONS:
        return _COMPARISONS[operator](column, _literal(value, column.type))
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
            if not is_number(kind):
                raise
    return pa.array([literal.as_py() for literal in fitting], kind)


def _literal(value: Any, kind: Any) -> Any:
    """A value out of a job file as something that Arrow can compare with a column of this type."""
    if isinstance(value, bool) is not pa.types.is_boolean(kind):
        raise ValueError("true and false go with a boolean column, and nothing else does")
    if pa.types.is_uint64(kind) and isinstance(value, int):
        return pa.scalar(value, kind)  # compared with a signed number, Arrow would refuse its upper half
    if is_number(kind) and isinstance(value, int | float):
        return pa.scalar(value)
    if is_binary(kind) and not isinstance(value, float):
        return pa.scalar(str(value).encode(), pa.large_binary())
    if pa.types.is_timestamp(kind) and kind.tz and isinstance(value, str):
        return _instant(value, kind)
    return pa.scalar(value).cast(kind)


def _instant(value: str, kind: Any) -> Any:
    """An instant; without a zone of its own it is UTC."""
    try:
        return pa.scalar(value).cast(kind)
    except pa.ArrowInvalid:
        return pa.scalar(value).cast(pa.timestamp(kind.unit)).cast(kind)
