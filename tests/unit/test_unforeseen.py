"""A bug is told by its kind and its place: what it says itself may quote a document or an address (G15)."""

from __future__ import annotations

import traceback

import pytest

from schemas.errors import InputChanged, LeaseLost, Unforeseen
from tasks.steps import fit_to_be_stored

SECRET = "the text of a document"


def test_a_bug_keeps_its_kind_and_place_and_none_of_its_words() -> None:
    with pytest.raises(Unforeseen) as told, fit_to_be_stored():
        raise ValueError(SECRET)
    assert str(told.value).startswith("ValueError at ")
    assert "test_unforeseen.py:" in str(told.value)
    assert SECRET not in "".join(traceback.format_exception(told.value))


def test_the_first_bug_of_a_group_stands_for_it() -> None:
    with pytest.raises(Unforeseen, match=r"^KeyError at"), fit_to_be_stored():
        raise ExceptionGroup(SECRET, [ExceptionGroup(SECRET, [KeyError(SECRET)])])


@pytest.mark.parametrize(
    "ours", [InputChanged("a.parquet changed"), LeaseLost("shard 3"), Unforeseen("KeyError at x")]
)
def test_what_was_meant_to_be_read_stays_without_what_led_to_it(ours: Exception) -> None:
    ours.__cause__ = ValueError(SECRET)
    with pytest.raises(type(ours)) as told, fit_to_be_stored():
        raise ours
    assert told.value is ours
    assert SECRET not in "".join(traceback.format_exception(told.value))
