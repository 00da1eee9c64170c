"""Kinds of columns: alone responsible for which of Arrow's types count as text, id or label."""

from __future__ import annotations

from typing import Any

import pyarrow as pa


def unwrap(column: Any) -> Any:
    """The column without what wraps its values: extension, dictionary, or view (which Arrow cannot filter)."""
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string_view(column.type):
        return column.cast(pa.large_string())
    return column.cast(pa.large_binary()) if pa.types.is_binary_view(column.type) else column


def unwrap_kind(kind: Any) -> Any:
    """The type of the values inside an extension or a dictionary."""
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_binary(kind: Any) -> bool:
    """Whether values are bytes of any length."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def is_text(kind: Any) -> bool:
    """Whether cells of this type can be texts; an all-null column has no type of its own and can."""
    kind = unwrap_kind(kind)
    is_string = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return bool(is_string or is_binary(kind) or pa.types.is_null(kind))


def is_number(kind: Any) -> bool:
    """Whether values are integers or floating-point numbers."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def is_id(kind: Any) -> bool:
    """Whether values can name documents."""
    return is_text(kind) or pa.types.is_integer(kind) or isinstance(kind, pa.UuidType)


def is_label(kind: Any) -> bool:
    """Whether values can be compared with an answer's."""
    return is_id(kind) or pa.types.is_boolean(kind)
