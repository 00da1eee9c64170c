"""What a promise will take, told before it costs anything: alone responsible for saying a plan in words.

How many documents the last tier will answer is known only when the first tier has answered and the sample is in.
Until then it is between the sample and all of them.
"""

from __future__ import annotations

from schemas.money import Money
from schemas.promises import Plan, caution


def spell_plan(planned: Plan, last: str, each: Money | None) -> list[str]:
    """A plan in lines for people. `each` is what a document is expected to cost at the `last` tier; None: unknown."""
    promise = planned.promise
    told = (
        f"promise: {float(promise.target):g} of {planned.documents:,} answers are what {last} would say, but for a "
        f"chance of {float(promise.delta):g}: at most {planned.allowed:,} may differ{_spell_fields(planned.fields)}"
    )
    if planned.allowance is None:
        return [
            told,
            "nothing can be certified with a sample of half of them or less, so none is drawn: all documents go to "
            f"{last}{_spell(planned.documents, each)}; ask for less, run more at once, or use `below`",
        ]
    share, others = 100 * planned.size / max(1, planned.documents), planned.population - planned.size
    lines = [
        told,
        f"{planned.size:,} documents ({share:.1f} %) are drawn for {last}{_spell(planned.size, each)}; "
        f"{planned.allowance:,} disagreements among them may be passed before the cut",
        f"how many more go to {last} is unknown until the first tier has answered and the sample is in: from none to "
        f"{others:,}{_spell(others, each)}",
    ]
    return [*lines, warning] if (warning := caution(planned)) else lines


def _spell(documents: int, each: Money | None) -> str:
    return "" if each is None else f", about {Money(each.pico * documents, each.currency)}"


def _spell_fields(fields: int) -> str:
    return "" if fields == 1 else f" in each of {fields} fields, which share the chance"
