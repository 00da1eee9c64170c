"""A threshold for documents that are still to come: alone responsible for the rule that certifies one.

The documents that calibrate it and those it is used on must be drawn alike and one independent of the other (design:
cascade.md, section 1, "Streaming"). For the documents of one run, schemas/certificates.py needs no such assumption.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from schemas.promises import Promise
from schemas.tails import binomial, last_that_holds


def streaming_allowance(documents: int, promise: Promise) -> int | None:
    """c: the most disagreements of the calibration that may be passed; None where so few certify nothing."""
    share = 1 - promise.target
    found = last_that_holds(lambda c: binomial(documents, share, c).is_within(promise.delta), 0, documents)
    return found if found >= 0 else None


def streaming_threshold(disagreements: Iterable[float], documents: int, promise: Promise) -> float:
    """Accept an answer that is strictly surer than this: infinity accepts none, minus infinity all that are valid.

    `disagreements` are the confidences of those of the `documents` on which the tiers disagree. A float, since it is
    compared and never reckoned with.
    """
    passed, surest = streaming_allowance(documents, promise), sorted(disagreements, reverse=True)
    if passed is None:
        return math.inf
    return surest[passed] if len(surest) > passed else -math.inf
