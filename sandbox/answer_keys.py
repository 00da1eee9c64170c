"""Answer keys: alone responsible for what the emulator answers about a licence, right and plausibly wrong.

SIMULATED, NOT EXPERT. A licence's category, name, owner and SPDX key are ScanCode's own, made by experts. The
obligations are sentences of the text that a few patterns pick out; how hard a document is, and how sure the model
says it is, are made up so that hard documents are more often wrong. They exercise the pipeline, and say nothing
about any model.

Everything follows from the text alone, so that two machines write the same keys.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

Json = dict[str, object]

#: How often people mix a category up, from 0 to 1, and with which others.
_CONFUSABLE: dict[str, tuple[float, tuple[str, ...]]] = {
    "Permissive": (0.08, ("Free Restricted", "Public Domain")),
    "Copyleft": (0.12, ("Copyleft Limited", "Permissive")),
    "Copyleft Limited": (0.2, ("Copyleft", "Permissive")),
    "Proprietary Free": (0.3, ("Commercial", "Free Restricted")),
    "Commercial": (0.35, ("Proprietary Free", "Source-available")),
    "Free Restricted": (0.45, ("Permissive", "Proprietary Free")),
    "Source-available": (0.35, ("Free Restricted", "Proprietary Free")),
    "Public Domain": (0.15, ("Permissive", "Unstated License")),
    "Patent License": (0.2, ("Permissive", "CLA")),
    "CLA": (0.1, ("Patent License", "Commercial")),
    "Unstated License": (0.5, ("Proprietary Free", "Public Domain")),
}
CATEGORIES = tuple(_CONFUSABLE)

#: The first pattern that a sentence fits names the kind of obligation; the order is from particular to general.
_KINDS = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        ("no_endorsement", r"endors|promot|publicity|trademark|trade name"),
        ("non_commercial", r"commercial (use|purpose|gain)|non-?commercial|for profit"),
        (
            "no_modification",
            r"revers\w* engineer|decompil|disassembl|may not (modify|alter|adapt)|shall not (modify|alter)",
        ),
        ("disclose_source", r"source code|source form|corresponding source"),
        ("share_alike", r"same (license|terms)|under (the terms of )?this license|under these terms"),
        ("state_changes", r"chang\w+|modif\w+"),
        ("keep_notice", r"copyright|notice|acknowledg|attribution|credit"),
        ("no_distribution", r"distribut|sublicens|sell|rent|lease|transfer"),
        ("pay", r"\bfees?\b|royalt|\bpay\b|payment"),
        ("indemnify", r"indemnif|hold harmless"),
        ("comply_with_law", r"export|applicable law|regulation"),
    )
)
_BINDING = re.compile(r"\b(must|shall|may not|provided that|required to)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.;:])\s+")

MOST_OBLIGATIONS = 5
_SHORTEST_QUOTE, _LONGEST_QUOTE = 25, 240


@dataclass(frozen=True, slots=True)
class Licence:
    """One licence as its source gives it. `spdx` is None where the SPDX list does not have it."""

    key: str
    text: str
    category: str
    name: str
    owner: str | None
    spdx: str | None

    @property
    def sha256(self) -> str:
        """The SHA-256 of the text in UTF-8, in hexadecimal: what the emulator knows a document by."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def category_line(licence: Licence) -> Json:
    """The key's line for `jobs/licences`: a category, and how sure the model says it is."""
    hard = _hardness(licence)
    wrong = [
        {"category": other, "confidence": _bin(0.8 - 0.5 * hard + 0.2 * _chance(licence, other))}
        for other in _CONFUSABLE[licence.category][1]
    ]
    answer = {"category": licence.category, "confidence": _bin(1 - 0.4 * hard)}
    return {"sha256": licence.sha256, "answer": answer, "wrong": wrong, "hard": hard}


def obligations_line(licence: Licence) -> Json:
    """The key's line for `jobs/obligations`; its wrong answers fail in three ways that validation can meet.

    A quote that does not occur in the text, a category that is not the expert's (valid, but wrong), and a field
    that is missing.
    """
    quotes = find_obligations(licence.text)
    answer = _obligations_answer(licence, quotes)
    ungrounded = answer | {"obligations": [_misquote(licence.text, quotes), *quotes[1:]]}
    mistaken = answer | {"category": _CONFUSABLE[licence.category][1][0]}
    incomplete = {field: value for field, value in answer.items() if field != "category"}
    return {
        "sha256": licence.sha256,
        "answer": answer,
        "wrong": [mistaken, ungrounded, incomplete],
        "hard": _hardness(licence),
    }


def find_obligations(text: str) -> list[dict[str, str]]:
    """The first few binding sentences of a text, each with its kind; a quote is verbatim but for white space."""
    found: list[dict[str, str]] = []
    for sentence in _SENTENCE_END.split(" ".join(text.split())):
        quote = _cut(sentence)
        if _BINDING.search(quote) and len(quote) >= _SHORTEST_QUOTE:
            found.append({"kind": _kind(quote), "quote": quote})
        if len(found) == MOST_OBLIGATIONS:
            break
    return found


def _obligations_answer(licence: Licence, quotes: list[dict[str, str]]) -> Json:
    return {
        "name": licence.name,
        "owner": licence.owner,
        "spdx_key": licence.spdx,
        "category": licence.category,
        "obligations": quotes,
    }


def _cut(sentence: str) -> str:
    """At most the longest quote, ending at a word."""
    if len(sentence) <= _LONGEST_QUOTE:
        return sentence
    return sentence[:_LONGEST_QUOTE].rsplit(" ", 1)[0]


def _kind(quote: str) -> str:
    return next((kind for kind, pattern in _KINDS if pattern.search(quote)), "other")


def _misquote(text: str, quotes: list[dict[str, str]]) -> dict[str, str]:
    """A quote in the document's manner that is not in the document."""
    if not quotes:
        return {
            "kind": "keep_notice",
            "quote": "You must retain this notice in every copy that you pass on to others.",
        }
    first = quotes[0]
    return first | {"quote": _BINDING.sub(lambda found: f"{found[0]} at all times", first["quote"], count=1)}


def _hardness(licence: Licence) -> float:
    """0 (never mistaken) to 1: the category's own, more for a very short or very long text, and some chance."""
    words = len(licence.text.split())
    extra = 0.15 if words < 40 or words > 4000 else 0.0
    chance = _chance(licence, "hard") ** 3
    return round(min(1.0, _CONFUSABLE[licence.category][0] + extra + 0.6 * chance), 3)


def _chance(licence: Licence, purpose: str) -> float:
    """A number in [0, 1) that this text always gets for this purpose."""
    seen = hashlib.sha256(f"{purpose}\0{licence.sha256}".encode()).digest()
    return int.from_bytes(seen[:6]) / 2**48


def _bin(confidence: float) -> float:
    """The middle of one of ten bins, as the job's prompt asks for."""
    return round(min(9, max(0, int(confidence * 10))) / 10 + 0.05, 2)
