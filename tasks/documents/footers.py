"""Footers: alone responsible for whether files have the columns that a job needs, of types it can use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow.parquet as pq

from schemas.jobs import Input
from schemas.selection import partition_of, suggest
from tasks.documents import trail
from tasks.documents.faults import UNREADABLE, first_line
from tasks.documents.filters import Filter
from tasks.documents.kinds import is_id, is_label, is_text
from tasks.documents.places import Place
from tasks.documents.problems import FileProblems


def check_footers(place: Place, input: Input, names: Sequence[str], limit: int | None) -> None:
    """Raise a ConfigurationError with every problem that the footers show.

    Files after the one in which `limit` is certainly reached are not opened.
    """
    problems = FileProblems()
    rows = 0
    for name in names:
        trail.mark(name)
        try:
            with place.filesystem.open_input_file(place.locate(name)) as source:
                footer = pq.ParquetFile(source, pre_buffer=False)
                found = list(_find_problems(footer.schema_arrow, input, name))
                rows += footer.metadata.num_rows
        except UNREADABLE as error:
            found = [f"is not a readable Parquet file: {first_line(error)}"]
        for problem in found:
            problems.add(name, problem)
        if limit is not None and rows >= limit and not input.filter:
            break
    problems.raise_any()


def _find_problems(schema: Any, input: Input, name: str) -> Iterator[str]:
    if input.partition and partition_of(name, input.partition) is None:
        yield f"is in no folder {input.partition}=…, which input.partition asks for"
    yield from _find_column_problem(schema, "input.id", input.id, is_id, "text or integers")
    yield from _find_column_problem(schema, "input.text", input.text, is_text, "text")
    if input.label is not None:
        yield from _find_column_problem(schema, "input.label", input.label, is_label, "text, integers or booleans")
    conditions = Filter(input)
    for column in conditions.columns:
        yield from _find_column_problem(schema, "input.filter", column, lambda kind: True, "anything")
    yield from conditions.find_problems(schema)


def _find_column_problem(
    schema: Any, where: str, column: str, is_usable: Callable[[Any], bool], wanted: str
) -> Iterator[str]:
    found = schema.names.count(column)
    if found == 0:
        yield f"{where}: no column {column!r}; {suggest(column, schema.names)}"
    elif found > 1:
        yield f"{where}: {found} columns are called {column!r}; rename all but one"
    elif not is_usable(kind := schema.field(column).type):
        yield f"{where}: column {column!r} is {kind}; it must hold {wanted}"
