"""Writing Parquet: a table of names, whole numbers and money."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

#: Money in whole units of its currency, to the last pico unit.
_MONEY = pa.decimal128(38, 12)


def write_table(
    columns: Sequence[str], rows: Sequence[Sequence[str | int | Decimal]], path: Path, *, texts: int, money: int
) -> None:
    """Write a table: its first `texts` columns are text, its last `money` columns money, those between whole numbers.

    Raises OSError where the file cannot be written.
    """
    kinds = [pa.string()] * texts + [pa.int64()] * (len(columns) - texts - money) + [_MONEY] * money
    arrays = [pa.array([row[number] for row in rows], kind) for number, kind in enumerate(kinds)]
    pq.write_table(pa.table(dict(zip(columns, arrays, strict=True))), path)
