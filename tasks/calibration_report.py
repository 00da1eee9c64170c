"""A calibration as people and scripts see it: alone responsible for its tables, its markdown and its JSON. Pure."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from schemas.calibrations import TARGETS, Calibration, Policy
from schemas.inert import escape_markdown, plain_lines
from schemas.money import Money
from schemas.signals import LEVEL, Share
from tasks.report import SIMULATED, Section, count, money, section_markdown, section_tables, share

#: Said under every agreement: cascade.md, section 4.
_NOT_TRUTH = "Agreement is not truth: on public data both answers were wrong in 2 to 20 % of those that agreed."


def sections(found: Calibration) -> list[Section]:
    """Its tables; those with nothing to say are left out."""
    return [part for make in (_agreement, _fields, _labels, _signals, _policies) if (part := make(found)).rows]


def calibration_report(found: Calibration) -> list[RenderableType]:
    """A calibration for a terminal."""
    notes = [Text(plain_lines(f"· {note}")) for note in found.notes]
    simulated: list[RenderableType] = [Text(SIMULATED, "yellow"), ""] if found.pilot.is_simulated else []
    return [*section_tables(sections(found)), *notes, "", *simulated]


def calibration_markdown(found: Calibration) -> str:
    """A calibration as markdown, for a Prefect artifact."""
    parts = [section_markdown(part) for part in sections(found)]
    parts += ["\n".join(f"- {escape_markdown(note)}" for note in found.notes)] if found.notes else []
    return "\n\n".join([*parts, f"> {SIMULATED}"] if found.pilot.is_simulated else parts)


def calibration_json(found: Calibration) -> dict[str, Any]:
    """A calibration as scripts rely on it; sums in pico units. Shares of all documents have their interval."""
    pilot, labels = found.pilot, found.labels
    held, promised = found.cheapest_that_held, found.cheapest_promised
    return {
        "job": found.job,
        "run": pilot.run_id,
        "documents": pilot.documents,
        "sampled": len(pilot.pairs),
        "left": found.left,
        "paid_pico": pilot.paid_pico,
        "currency": pilot.currency.value,
        "is_simulated": pilot.is_simulated,
        "target": float(found.promise.target),
        "delta": float(found.promise.delta),
        "level": LEVEL,
        "agreement": _share_json(found.agreement),
        "without_answer": dict(zip((found.ladder[0], found.ladder[-1]), found.unanswered, strict=True)),
        "differing": dict(found.differing),
        "signals": [
            {
                "name": each.name,
                "answers": each.answers,
                "auc": _number(each.auc),
                "accepted": {
                    f"{float(target):g}": taken for target, taken in zip(TARGETS, each.accepted, strict=True)
                },
                "brier": each.brier,
                "tied": _number(each.tied),
            }
            for each in found.signals
        ],
        "policies": [_policy_json(each) for each in found.policies],
        "cheapest_promised": None if promised is None else promised.name,
        "cheapest_that_held": None if held is None else held.name,
        "labels": None
        if labels is None
        else {
            "first": _share_json(labels.first),
            "last": _share_json(labels.last),
            "only_last_right": labels.better,
            "only_first_right": labels.worse,
            "is_last_better": labels.gain,
        },
        "notes": list(found.notes),
    }


def _share_json(found: Share) -> dict[str, Any]:
    return {"count": found.count, "of": found.of, "low": found.low, "high": found.high}


def _policy_json(each: Policy) -> dict[str, Any]:
    return {
        "name": each.name,
        "setting": each.setting,
        "to_last_tier": each.escalated,
        "cost_pico": each.pico,
        "agreement": float(each.agreement),
        "standing": each.standing.value,
    }


def _agreement(found: Calibration) -> Section:
    first, last = found.ladder[0], found.ladder[-1]
    pilot, (no_first, no_last) = found.pilot, found.unanswered
    rows = (
        ("documents drawn, of all", f"{len(pilot.pairs):,} of {pilot.documents:,}"),
        (f"answers of {first} and {last} that agree", _spell(found.agreement)),
        (f"without a valid answer of {first}, of {last}", f"{no_first:,}, {no_last:,}"),
        ("paid for the pilot", money(Money(pilot.paid_pico, pilot.currency))),
        (f"a document at {first}, at {last}", f"{_cost(found, pilot.first_cost)}, {_cost(found, pilot.last_cost)}"),
    )
    return Section(f"{found.job}: the pilot, run {pilot.run_id}", ("", ""), rows, _NOT_TRUTH)


def _fields(found: Calibration) -> Section:
    """Where an answer is one field, the table above has said it."""
    rows = [(name, count(differing)) for name, differing in found.differing.items()]
    return Section("Where answers differ", ("field", "documents"), tuple(rows) if len(rows) > 1 else ())


def _labels(found: Calibration) -> Section:
    labels = found.labels
    if labels is None:
        return Section("", (), ())
    first, last = found.ladder[0], found.ladder[-1]
    rows = (
        (first, _spell(labels.first), f"{labels.worse:,}"),
        (last, _spell(labels.last), f"{labels.better:,}"),
    )
    return Section("Against the labels", ("tier", "right", "where the other is not"), rows)


def _signals(found: Calibration) -> Section:
    whole = len(found.pilot.pairs)
    rows = [
        (
            each.name,
            count(each.answers),
            "—" if each.auc is None else f"{float(each.auc):.3f}",
            *(share(taken, whole) for taken in each.accepted),
            "—" if each.brier is None else f"{each.brier:.3f}",
            "—" if each.tied is None else share(each.tied.numerator, each.tied.denominator),
        )
        for each in found.signals
    ]
    columns = ("signal", "answers", "AUC", *(f"accepts at {float(each):g}" for each in TARGETS), "Brier", "tied")
    note = (
        "AUC: how often an answer that agrees is surer than one that does not; 0.5 is chance. Accepts: documents of "
        "the pilot that a threshold could have let keep their first answer. A run is decided by confidence."
    )
    return Section("What signals are worth", columns, tuple(rows), note)


def _policies(found: Calibration) -> Section:
    rows = [
        (
            f"{each.name}{' *' if each == found.cheapest_promised else ''}",
            each.setting,
            count(each.escalated),
            _cost(found, each.pico),
            share(each.agreement.numerator, each.agreement.denominator),
            each.standing.value,
        )
        for each in found.policies
    ]
    best = found.cheapest_that_held
    held = ""
    if best is not None and best != found.cheapest_promised:
        held = f" The cheapest that held in the pilot, and promises nothing: {best.name}."
    columns = ("policy", "in the job file", f"documents at {found.ladder[-1]}", "cost", "agrees", f"{_target(found)}")
    note = (
        f"For the {found.left:,} documents that are left to pay, and for all at {found.ladder[-1]} only, which "
        "reuses nothing, at what the pilot's were booked at. "
        f"* the cheapest that promises the target.{held}"
    )
    return Section("What policies would cost", columns, tuple(rows), note)


def _target(found: Calibration) -> str:
    return f"{float(found.promise.target):g} at a risk of {float(found.promise.delta):g}"


def _spell(found: Share) -> str:
    """`183 of 200 (91.50 %; in 90 of 100 cases 87.51 to 94.51 %)`."""
    ends = f"{found.low * 100:.2f} to {found.high * 100:.2f} %"
    return f"{found.count:,} of {found.of:,} ({share(found.count, found.of)}; in {LEVEL} of 100 cases {ends})"


def _cost(found: Calibration, pico: Fraction | int | None) -> str:
    return "not known" if pico is None else money(Money(round(pico), found.pilot.currency))


def _number(value: Fraction | None) -> float | None:
    return None if value is None else float(value)
