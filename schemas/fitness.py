"""Which input rows can be sent as documents; alone responsible for that verdict."""

from __future__ import annotations

from typing import TypeAlias

from schemas.documents import Document, Unfit, UnfitDocument

#: What a file holds in one place: text, None for null, or the raw bytes where they are not UTF-8.
Cell: TypeAlias = str | bytes | None

#: The longest id, in bytes of UTF-8: Postgres must be able to index it.
MAX_ID_BYTES = 1000


def judge_row(document_no: int, document_id: Cell, text: Cell) -> Document | UnfitDocument:
    """A row as a document, or as a dead letter with its reason.

    A NUL in the text is sent as it is (JSON escapes it); one in the id is refused, since Postgres stores none.
    """
    if not document_id:
        return UnfitDocument(document_no, "", Unfit.NULL_ID)
    if isinstance(document_id, str) and isinstance(text, str):
        reason = _find_fault_in_id(document_id) or (Unfit.EMPTY_TEXT if not text or text.isspace() else None)
        if reason is None:
            return Document(document_no, document_id, text)
    elif isinstance(document_id, str) and text is None:
        reason = _find_fault_in_id(document_id) or Unfit.NULL_TEXT
    else:
        reason = Unfit.NOT_UNICODE
    return UnfitDocument(document_no, storable_id(document_id), reason)


def _find_fault_in_id(document_id: str) -> Unfit | None:
    if "\0" in document_id:
        return Unfit.NUL_IN_ID
    if len(document_id) * 4 > MAX_ID_BYTES and len(document_id.encode()) > MAX_ID_BYTES:
        return Unfit.ID_TOO_LONG
    return None


def storable_id(document_id: str | bytes) -> str:
    """An unfit id as Postgres can keep it: its first 1,000 bytes, with U+FFFD for what is not text."""
    text = document_id.decode("utf-8", "replace") if isinstance(document_id, bytes) else document_id
    return text.replace("\0", "\ufffd").encode()[:MAX_ID_BYTES].decode("utf-8", "ignore")
