"""What a run would have cost otherwise, for people and for scripts. Pure: nothing is read or printed in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from schemas.errors import UnknownPrice
from schemas.money import Money
from schemas.price_files import Machine
from schemas.pricing import PriceBook
from schemas.whatif import Alternative, Hosting, Past, Scenario, host, reprice, usual_scenarios
from tasks.report import SIMULATED, share, table


@dataclass(frozen=True)
class Comparison:
    """A run as it was beside what it would have cost otherwise.

    `left_out` says of scenarios that nobody can price why that is.
    """

    past: Past
    alternatives: tuple[Alternative, ...]
    hostings: tuple[Hosting, ...]
    left_out: tuple[tuple[str, str], ...] = ()


def compare(past: Past, book: PriceBook, machines: Sequence[Machine]) -> Comparison:
    """The usual scenarios; those that have no price, such as in another currency, are left out and said so."""
    found, left_out = [], []
    for scenario in usual_scenarios(past, book, machines):
        try:
            found.append(reprice(past, scenario, book))
        except UnknownPrice as error:
            left_out.append((scenario.name, str(error)))
    models = {book.canonical(tier.model) for tier in past.tiers}
    hosting = [each for each in machines if each.hosts in models and each.currency is past.currency]
    return Comparison(past, tuple(found), _host(past, hosting, book), tuple(left_out))


def ask(was: Past, past: Past, scenario: Scenario, book: PriceBook, machines: Sequence[Machine]) -> Comparison:
    """One scenario; `past` is the run under the threshold that is asked about. Raises UnknownPrice."""
    named = replace(scenario, name=_spell(scenario, past.below))
    hosting = [machine for machine in machines if scenario.hosts.get(machine.hosts) == machine.model]
    return Comparison(was, (reprice(past, named, book),), _host(was, hosting, book))


def _host(past: Past, machines: Sequence[Machine], book: PriceBook) -> tuple[Hosting, ...]:
    found = [host(past, each.hosts, each, book) for each in machines]
    return tuple(each for each in found if each.tokens)


def _spell(scenario: Scenario, below: Decimal | None) -> str:
    """What is otherwise, in words."""
    parts = (
        f"ladder {', '.join(scenario.ladder)}" if scenario.ladder else "",
        f"threshold {below}" if below is not None else "",
        "off-peak" if scenario.is_off_peak else "",
        "" if scenario.has_cache else "no cache",
        f"prices of {scenario.prices_at:%Y-%m-%d}" if scenario.prices_at else "",
        *(f"{model} on {machine}" for model, machine in scenario.hosts.items()),
    )
    return ", ".join(part for part in parts if part) or scenario.name


def comparison_report(found: Comparison) -> list[RenderableType]:
    """A comparison for a terminal; one scenario by its steps, too."""
    made: list[RenderableType] = [_comparison_table(found), ""]  # a caption has no empty line after it
    if len(found.alternatives) == 1:
        made += [_step_table(found.past, found.alternatives[0])]
    if found.hostings:
        made += [_hosting_table(found), ""]
    made += [Text(f"{name} is left out: {why}", "yellow") for name, why in found.left_out]
    return [*made, Text(SIMULATED, "yellow")] if found.past.is_simulated else made


def _comparison_table(found: Comparison) -> Table:
    past = found.past
    was = ("as it was", _money(past, past.cost_pico), "100.00 %", _bound(past, past.unknown_pico))
    rows = [
        (
            each.scenario.name,
            _money(past, each.cost_pico),
            share(each.cost_pico, past.cost_pico),
            _bound(past, each.unknown_pico),
        )
        for each in found.alternatives
    ]
    notes = dict.fromkeys(f"· {line}" for each in found.alternatives for line in each.assumptions) | _price_notes(
        found
    )
    title = f"What run {past.run} of {past.job} would have cost"
    return table(title, ("", "cost", "of what it cost", "not known"), [was, *rows], "\n".join(notes))


def _price_notes(found: Comparison) -> dict[str, None]:
    """Each note of the price book once, with all the models that it is about."""
    models: dict[str, dict[str, None]] = {}
    for model, note in (each for alternative in found.alternatives for each in alternative.price_notes):
        models.setdefault(note, {})[model] = None
    return dict.fromkeys(f"· {note}: {', '.join(about)}" for note, about in models.items())


def _step_table(past: Past, found: Alternative) -> Table:
    rows = [
        (step.name, step.model, f"{step.documents:,}", _money(past, step.cost_pico), _bound(past, step.unknown_pico))
        for step in found.steps
    ]
    columns = ("step", "model", "documents", "cost", "not known")
    return table(found.scenario.name, columns, rows, texts=(0, 1))


def _hosting_table(found: Comparison) -> Table:
    past = found.past
    rows = [
        (
            each.machine.model,
            _money(past, each.hour_pico),
            f"{each.busy_hours:,}",
            _money(past, each.api_pico),
            "never" if each.break_even is None else f"{each.break_even:,} tokens/h",
            "—" if each.break_even is None else share(each.break_even, each.machine.tokens_per_hour),
        )
        for each in found.hostings
    ]
    columns = ("machine", "an hour", "hours, full", "the API", "pays from", "of its most")
    note = (
        "It pays from so many tokens an hour on; never: the API costs less even when the machine is full.\n"
        "What it serves in an hour is an assumption (schemas/prices/self_hosted.toml): measure your own."
    )
    return table("GPUs of one's own", columns, rows, note)


def comparison_json(found: Comparison) -> dict[str, Any]:
    """A comparison as scripts rely on it; sums in pico units."""
    past = found.past
    return {
        "run": past.run,
        "job": past.job,
        "currency": past.currency.value,
        "is_simulated": past.is_simulated,
        "cost_pico": past.cost_pico,
        "unknown_pico": past.unknown_pico,
        "scenarios": [_alternative_json(each) for each in found.alternatives],
        "self_hosted": [
            {
                "machine": each.machine.model,
                "hosts": each.machine.hosts,
                "hour_pico": each.hour_pico,
                "tokens": each.tokens,
                "api_pico": each.api_pico,
                "busy_hours": each.busy_hours,
                "break_even_tokens_per_hour": each.break_even,
                "tokens_per_hour": each.machine.tokens_per_hour,
            }
            for each in found.hostings
        ],
        "left_out": [{"name": name, "why": why} for name, why in found.left_out],
    }


def _alternative_json(found: Alternative) -> dict[str, Any]:
    return {
        "name": found.scenario.name,
        "cost_pico": found.cost_pico,
        "unknown_pico": found.unknown_pico,
        "high_pico": found.high_pico,
        "steps": [
            {
                "name": step.name,
                "model": step.model,
                "documents": step.documents,
                "cost_pico": step.cost_pico,
                "unknown_pico": step.unknown_pico,
            }
            for step in found.steps
        ],
        "assumptions": [*found.assumptions, *(f"{model}: {note}" for model, note in found.price_notes)],
    }


def _money(past: Past, pico: int) -> str:
    return str(Money(pico, past.currency))


def _bound(past: Past, pico: int) -> str:
    return f"at most {_money(past, pico)}" if pico else "—"
