"""Which rows can be sent."""

import pytest

from schemas.documents import Document, Unfit, UnfitDocument
from schemas.fitness import Cell, judge_row


@pytest.mark.parametrize(
    ("document_id", "text", "reason", "kept_id"),
    [
        (None, "text", Unfit.NULL_ID, ""),
        ("", "text", Unfit.NULL_ID, ""),
        (b"", "text", Unfit.NULL_ID, ""),
        ("a", None, Unfit.NULL_TEXT, "a"),
        ("a", "", Unfit.EMPTY_TEXT, "a"),
        ("a", " \n\t\u3000", Unfit.EMPTY_TEXT, "a"),
        ("a", b"\xff", Unfit.NOT_UNICODE, "a"),
        (b"a\xff\0", "text", Unfit.NOT_UNICODE, "a\ufffd\ufffd"),
        (b"\xff" * 3000, None, Unfit.NOT_UNICODE, "\ufffd" * 333),
        ("a\0b", "text", Unfit.NUL_IN_ID, "a\ufffdb"),
        ("é" * 501, "text", Unfit.ID_TOO_LONG, "é" * 500),
        ("a" * 999 + "é", None, Unfit.ID_TOO_LONG, "a" * 999),
    ],
)
def test_a_row_that_cannot_be_sent_keeps_an_id_that_can_be_stored(
    document_id: Cell, text: Cell, reason: Unfit, kept_id: str
) -> None:
    assert judge_row(7, document_id, text) == UnfitDocument(7, kept_id, reason)


@pytest.mark.parametrize(
    ("document_id", "text"), [("é" * 500, "x"), ("1", "a\0b"), (" ", "\ufeff"), ("😀" * 250, " x ")]
)
def test_what_can_be_sent_is_sent_as_it_is(document_id: str, text: str) -> None:
    assert judge_row(7, document_id, text) == Document(7, document_id, text)
