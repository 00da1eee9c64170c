"""A comparison as people and scripts see it: alone responsible for its tables, its markdown and its JSON. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from fractions import Fraction
from math import ceil, floor
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from schemas.comparisons import PER, Comparison, Difference, Figures, Mean, per_thousand, points
from schemas.inert import escape_markdown, plain_lines
from schemas.intervals import LEVEL
from schemas.money import Money
from schemas.signals import Share
from tasks.report import SIMULATED, Section, count, money, section_markdown, section_tables

_UNKNOWN = "—"
#: Under the tables, once: what the second line of a cell is.
_ENDS = f"After each figure: where that of all documents is in {LEVEL} of 100 cases."


def sections(found: Comparison) -> list[Section]:
    """Its tables."""
    return [_variants(found), _pairs(found)]


def comparison_report(found: Comparison) -> list[RenderableType]:
    """A comparison for a terminal."""
    notes = [Text(plain_lines(f"· {note}")) for note in found.notes]
    simulated: list[RenderableType] = [Text(SIMULATED, "yellow"), ""] if found.is_simulated else []
    return [*section_tables(sections(found)), *notes, "", *simulated]


def comparison_markdown(found: Comparison) -> str:
    """A comparison as markdown, for a Prefect artifact."""
    parts = [section_markdown(_in_lines(part)) for part in sections(found)]
    parts.append("\n".join(f"- {escape_markdown(note)}" for note in found.notes))
    return "\n\n".join([*parts, f"> {SIMULATED}"] if found.is_simulated else parts)


def _in_lines(part: Section) -> Section:
    """The same with cells of one line."""
    return replace(part, rows=tuple(tuple(cell.replace("\n", ", ") for cell in row) for row in part.rows))


def comparison_json(found: Comparison) -> dict[str, Any]:
    """A comparison as scripts rely on it; sums in pico units."""
    return {
        "job": found.job,
        "documents": found.documents,
        "sampled": found.sampled,
        "currency": found.currency.value,
        "is_simulated": found.is_simulated,
        "level": LEVEL,
        "variants": [
            {
                "name": each.variant.name,
                "run": each.variant.run_id,
                "documents": each.documents,
                "without_result": each.without_result,
                "paid_pico": each.variant.paid_pico,
                "right": _share_json(each.right),
                "pico_per_1000_documents": _pico_json(each.pico),
                "cached": _mean_json(each.cached),
                "seconds": _mean_json(each.seconds),
            }
            for each in found.figures
        ],
        "differences": [
            {
                "first": each.first,
                "second": each.second,
                "agreement": _share_json(each.agreement),
                "differing": dict(each.differing),
                "right": _mean_json(each.right),
                "only_second_right": each.better,
                "only_first_right": each.worse,
                "needed": None if each.needed is None else {"right": each.needed[0], "documents": each.needed[1]},
                "pico_per_1000_documents": _pico_json(each.pico),
                "seconds": _mean_json(each.seconds),
            }
            for each in found.differences
        ],
        "notes": list(found.notes),
    }


def _share_json(found: Share | None) -> dict[str, Any] | None:
    return None if found is None else {"count": found.count, "of": found.of, "low": found.low, "high": found.high}


def _pico_json(found: Mean | None) -> dict[str, int] | None:
    """What a thousand documents cost, in whole pico units; ends of an interval are rounded outwards."""
    if found is None:
        return None
    return {
        "mean": round(found.mean * PER),
        "of": found.of,
        "low": floor(found.low * PER),
        "high": ceil(found.high * PER),
    }


def _mean_json(found: Mean | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"mean": float(found.mean), "of": found.of, "low": found.low, "high": found.high}


def _variants(found: Comparison) -> Section:
    """A row for each figure and a column for each variant: names are short, and intervals are not."""
    rows: list[tuple[str, Callable[[Figures], str]]] = [
        ("right, by the labels", lambda each: _share(each.right)),
        ("documents with a label", lambda each: _UNKNOWN if each.right is None else count(each.right.of)),
        (f"cost of {PER:,} documents", lambda each: _cost(found, each.pico)),
        ("prompt from the cache", lambda each: _in_percent(each.cached)),
        ("seconds a document", lambda each: _mean(each.seconds, lambda value: f"{float(value):.2f}")),
        ("without a result", lambda each: f"{each.without_result:,} of {each.documents:,}"),
        ("run", lambda each: str(each.variant.run_id)),
        ("paid for the run", lambda each: money(Money(each.variant.paid_pico, found.currency))),
    ]
    made = tuple((name, *map(read, found.figures)) for name, read in rows)
    title = f"{found.job}: {len(found.figures)} variants on {found.sampled:,} of {found.documents:,} documents"
    return Section(title, ("", *(each.variant.name for each in found.figures)), made, _ENDS)


def _pairs(found: Comparison) -> Section:
    rows = tuple(
        (
            f"{each.second} − {each.first}",
            _share(each.agreement),
            _mean(each.right, lambda value: f"{_sign(value)}{points(abs(float(value)))}"),
            _mean(each.pico, lambda value: f"{_sign(value)}{per_thousand(abs(float(value)), found.currency)}"),
            _mean(each.seconds, lambda value: f"{_sign(value)}{abs(float(value)):.2f}"),
        )
        for each in found.differences
    )
    columns = ("the second less the first", "answers agree", "right, in points", f"cost of {PER:,}", "seconds")
    return Section("Each two compared, document by document", columns, rows, _note(found.differences))


def _note(differences: Iterable[Difference]) -> str:
    """Where answers of more than one field differ, which."""
    told = []
    for each in differences:
        apart = [f"{name} {documents:,}" for name, documents in each.differing.items() if documents]
        if len(each.differing) > 1 and apart:
            told.append(f"{each.second} and {each.first} differ in {', '.join(apart)}")
    return ". ".join(["Agreement is not truth: both answers may be wrong", *told]) + "."


def _sign(value: Fraction | float) -> str:
    return "+" if value > 0 else "−" if value < 0 else ""


def _share(found: Share | None) -> str:
    if found is None:
        return _UNKNOWN
    return f"{points(found.share)} %\n{points(found.low)} to {points(found.high)}"


def _in_percent(found: Mean | None) -> str:
    return _mean(found, lambda value: f"{points(value)} %")


def _cost(found: Comparison, pico: Mean | None) -> str:
    return _mean(pico, lambda value: str(per_thousand(value, found.currency)))


def _mean(found: Mean | None, spell: Callable[[Fraction | float], str]) -> str:
    return _UNKNOWN if found is None else f"{spell(found.mean)}\n{spell(found.low)} to {spell(found.high)}"
