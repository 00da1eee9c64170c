"""Pages: alone responsible for an audit as one HTML file, which opens anywhere and asks no network for anything.

Its figures are the audit's, spelt by `report`; its charts are `charts`'. What others wrote (document ids, names,
reasons) is text in it and never more: the template escapes it, and a policy lets no script run but the two in it.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import SecretStr

from schemas.errors import ConfigurationError, LedgerUnavailable
from schemas.inert import plain
from schemas.money import Currency, Money
from schemas.pricing import PriceBook
from schemas.settings import Settings
from schemas.spending import Side
from tasks import charts, report
from tasks.charts import Chart, spell_instant
from tasks.ledger import spend
from tasks.ledger.connection import Role, opened
from tasks.ledger.proof import Proof, prove
from tasks.ledger.shapes import Shape, read_shape
from tasks.ledger.spend import Audit, RunSummary
from tasks.report import Figure, Section, count, money, share

#: What a page holds at most, so that it stays well under two megabytes.
MOST_DOCUMENTS, MOST_LINES, MOST_RUNS = 50, 500, 200
#: A longer text, like an id of 3 KB, is cut in a table; the figures as JSON have all of it.
SHOWN_CHARACTERS = 160
#: Proving goes through all rows many times; a larger run is proved by `farthing verify`.
PROVED_ATTEMPTS = 1_000_000


@dataclass(frozen=True)
class Page:
    """What a report page says, as of `made_at`: an audit, how its spend lies, its runs, and what was proved."""

    audit: Audit
    shape: Shape | None
    runs: tuple[RunSummary, ...]
    proofs: tuple[Proof, ...]
    made_at: datetime

    def without_lines(self) -> Page:
        """The same, not split by anything that only an export was to be split by."""
        return replace(self, audit=replace(self.audit, by=(), lines=()))


@dataclass(frozen=True, slots=True)
class Headline:
    """A figure that stands above all others, and what has to be known of it."""

    name: str
    figure: str
    detail: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What kind of page this is, in a word or two. `kind` is good, bad or neutral."""

    words: str
    kind: str


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a page: a chart with the table behind it, tables, or both."""

    key: str
    title: str
    charts: tuple[Chart, ...] = ()
    tables: tuple[Section, ...] = ()


async def find_page(
    url: SecretStr,
    book: PriceBook,
    *,
    run: int | None = None,
    job: str | None = None,
    by: Sequence[Side] = (),
    top: int = spend.DEAREST,
    distinct: bool = False,
    answer_within_s: float | None = None,
) -> Page:
    """An audit and how its spend lies, from one snapshot; of a run with a proof. Raises as `spend.audit`."""
    if top > MOST_DOCUMENTS:
        raise ConfigurationError(f"--top: a page names at most {MOST_DOCUMENTS} documents; --json names them all")
    async with opened(url, Role.AUDITOR, pool_size=1, answer_within_s=answer_within_s) as ledger:
        async with ledger.transaction() as connection:
            await connection.execute(spend.SNAPSHOT)
            audit = await spend.read_audit(connection, run=run, job=job, by=by, top=top, distinct=distinct)
            shape = await read_shape(connection, audit.runs)
        listed = () if run is not None else tuple(await spend.list_runs(ledger, job))
    return Page(audit, shape, listed, await _prove(url, audit, book, answer_within_s), datetime.now(UTC))


async def _prove(url: SecretStr, audit: Audit, book: PriceBook, answer_within_s: float | None) -> tuple[Proof, ...]:
    """A proof of the one run that there is, unless it is large, or this login may only read what an auditor may."""
    if audit.run is None or audit.attempts > PROVED_ATTEMPTS:
        return ()
    try:
        async with opened(url, Role.LANE, pool_size=1, answer_within_s=answer_within_s) as ledger:
            return (await prove(ledger, audit.run, book),)
    except (ConfigurationError, LedgerUnavailable):
        return ()


def write_page(page: Page, path: Path) -> int:
    """Write the file, whole or not at all; returns how many bytes. Raises ConfigurationError where it cannot be."""
    if (lines := len(page.audit.lines)) > MOST_LINES:
        told = f"--by: these are {lines:,} lines, and a page holds {MOST_LINES}"
        raise ConfigurationError(f"{told}; name fewer sides, or write them with --csv")
    html = render(page).encode()
    half = path.with_name(f".{path.name}.{os.getpid()}.part")  # two may write the same page at once
    try:
        half.write_bytes(html)
        half.replace(path)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise ConfigurationError(f"{path} cannot be written: {error.strerror or error}; name another file") from None
    return len(html)


def publish_page(page: Page, name: str, settings: Settings) -> str:
    """Leave the page in the folder for reports; returns where to find it: an address, if something serves the folder.

    Raises ConfigurationError where it cannot be written.
    """
    assert settings.reports is not None
    with suppress(OSError):  # writing tells what is wrong
        settings.reports.mkdir(parents=True, exist_ok=True)
    write_page(page, settings.reports / name)
    served = settings.reports_url
    return f"{served.rstrip('/')}/{name}" if served else str((settings.reports / name).resolve())


def render(page: Page) -> str:
    """The page as HTML."""
    folder = files("tasks") / "templates"
    library = (folder / "vendor" / "chart.umd.min.js").read_text("utf-8")
    scripts = (library.partition("//# sourceMappingURL")[0], (folder / "report.js").read_text("utf-8"))
    style = (folder / "report.css").read_text("utf-8")
    parts = list(_parts(page))
    template = _environment().get_template("report.html")
    return template.render(
        title=report.title(page.audit),
        verdicts=_verdicts(page),
        summary=_summary(page.audit),
        simulated=report.SIMULATED if page.audit.is_simulated else "",
        headlines=list(_headlines(page.audit)),
        parts=parts,
        charts={chart.key: _drawn(chart) for part in parts for chart in part.charts},
        figures=page.audit.to_json(),
        cells=_cells,
        made=f"{spell_instant(page.made_at)} UTC",
        version=version("farthing"),
        policy=_policy(scripts, style),
        scripts=[Markup(script) for script in scripts],  # noqa: S704 (our own files, byte for byte)
        style=Markup(style),  # noqa: S704 (our own file)
    )


def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("tasks", "templates"),
        autoescape=True,
        finalize=lambda value: plain(value) if type(value) is not Markup and isinstance(value, str) else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["tight"] = lambda text: text.replace(" %", "\u00a0%")  # or a narrow column breaks there
    made.policies["json.dumps_kwargs"] = {}  # tiers stay in their order
    return made


def _policy(scripts: Sequence[str], style: str) -> str:
    """Nothing is fetched, and nothing runs or colours the page but what is in it."""

    def name(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {' '.join(map(name, scripts))}; style-src {name(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _drawn(chart: Chart) -> dict[str, Any]:
    """What the script needs: all but the table, which is on the page."""
    made = asdict(chart)
    del made["table"]
    return made


def _cells(row: Sequence[str]) -> list[tuple[str, str, bool]]:
    """Each cell as it is shown, what it is sorted by, and whether it is a number."""
    return [
        (cell, str(cell.exact), True) if isinstance(cell, Figure) else (_shorten(cell), "", False) for cell in row
    ]


def _shorten(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}… ({len(text):,} characters)"


# What stands above


def _verdicts(page: Page) -> list[Verdict]:
    audit = page.audit
    money_ = Verdict("Simulated", "neutral") if audit.is_simulated else Verdict("Real money", "neutral")
    exact = Verdict("Not exact yet", "bad") if audit.unknown_pico else Verdict("Exact", "good")
    return [*([money_, exact] if audit.runs else []), _proof(page)]


def _proof(page: Page) -> Verdict:
    if broken := [found.run for found in page.proofs if not found.proved]:
        return Verdict(f"Does NOT prove: run {', '.join(map(str, broken))}", "bad")
    if not page.proofs:
        which = page.audit.run or "RUN"
        return Verdict(f"Not proved here: farthing verify {which}", "neutral")
    return Verdict(
        "Proved" if page.audit.run else f"Proved: {len(page.proofs)} of {len(page.audit.runs)} runs", "good"
    )


def _summary(audit: Audit) -> str:
    """The page in two or three sentences."""
    if audit.currency is None:
        return "Nothing was ever run here."
    said = [
        f"Of {audit.documents:,} documents {audit.results:,} have a result and {audit.dead_letters:,} ended without "
        f"one, by {audit.attempts:,} attempts."
    ]
    if audit.escalations:
        climbed = sum(each.cost_pico for each in audit.escalations)
        said.append(
            f"{audit.escalated:,} times a document climbed a tier: {share(climbed, audit.cost_pico)} of the cost."
        )
    if audit.unknown_pico:
        said.append(f"Whether {audit.unknown_attempts:,} of them were billed nobody knows yet: the cost is a range.")
    return " ".join(said)


def _headlines(audit: Audit) -> Iterator[Headline]:
    if audit.currency is None:
        return
    currency = Currency(audit.currency)

    def spell(pico: int) -> Figure:
        return money(Money(pico, currency))

    yield _cost(audit, currency)
    costs = audit.document_costs
    if costs.documents:
        told = f"on average; half at most {spell(costs.p50_pico)}, 95 % at most {spell(costs.p95_pico)}"
        yield Headline("A document", spell(costs.mean_pico), told)
    ended = share(audit.results, audit.documents)
    dead = f"{audit.results:,} of {audit.documents:,}; {audit.dead_letters:,} dead letters"
    yield Headline("Answered", ended, dead)
    if audit.prefix_hit_rate is not None:
        rate = share(round(audit.prefix_hit_rate * 10**6), 10**6)
        yield Headline("Cached prefix", rate, f"after priming; saved {spell(audit.saved_pico)}")
    if audit.budget_pico:
        yield Headline("Of the budget", share(audit.high_pico, audit.budget_pico), f"of {spell(audit.budget_pico)}")


def _cost(audit: Audit, currency: Currency) -> Headline:
    low, high = Money(audit.cost_pico, currency), Money(audit.high_pico, currency)
    exact = f"{audit.cost_pico:,} pico-{currency}"
    if not audit.unknown_pico:
        return Headline("Cost", str(low), f"exactly {exact}")
    return Headline("Cost", f"{low} to {high}", f"known {exact}, and at most {audit.unknown_pico:,} more")


# What stands below


def _parts(page: Page) -> Iterator[Part]:
    """The parts that have something to say, in order."""
    audit, shape = page.audit, page.shape
    if shape is not None and shape.slices:
        yield Part("time", "Spend over time", (charts.spend_over_time(audit, shape),))
    tiers = report.tiers(audit)
    if tiers.rows:
        tables = (report.token_costs(audit), *([report.line_section(audit)] if audit.lines else ()))
        yield Part("tiers", "Where the money went", (charts.cost_by_tier(audit, tiers),), tables)
    if shape is not None and shape.costs:
        yield Part("documents", "Documents", (charts.cost_per_document(audit, shape),), _documents(audit))
    if audit.attempts:
        drawn = () if shape is None else (charts.cache_over_time(audit, shape),)
        yield Part("cache", "The prompt cache", drawn, (report.cache(audit),))
    if shape is not None and shape.confidences:
        yield Part("confidence", "Confidence", (charts.confidence(audit, shape),))
    bought = tuple(part for part in (report.escalations(audit), report.accuracy(audit)) if part.rows)
    if bought:
        yield Part("escalation", "Escalation", (), bought)
    dead = report.dead_letters(audit)
    if dead.rows:
        yield Part("dead", "Dead letters", (charts.dead_letters(audit, dead),))
    wasted = report.waste(audit)
    if wasted.rows:
        yield Part("waste", "What bought nothing", (), (wasted,))
    yield Part("figures", "All figures", (), tuple(_remaining(page)))


def _documents(audit: Audit) -> tuple[Section, ...]:
    return tuple(part for part in (report.dearest(audit), report.slowest(audit)) if part.rows)


def _remaining(page: Page) -> Iterator[Section]:
    yield report.totals(page.audit)
    if page.runs:
        older = len(page.runs) - MOST_RUNS
        found = report.run_section(page.runs[:MOST_RUNS])
        note = f"{older:,} older ones are left out; `farthing audit` lists them." if older > 0 else ""
        yield Section(found.title, found.columns, found.rows, note)
    for proof in page.proofs:
        yield _evidence(proof)


def _evidence(proof: Proof) -> Section:
    rows = [
        (
            name,
            "NO" if found.violations else "yes",
            count(found.checked),
            "; ".join([found.says, *found.violations[:3]]),
        )
        for name, found in proof.evidence.items()
    ]
    title = f"What was proved of run {proof.run}, from the ledger's rows"
    return Section(title, ("guarantee", "holds", "checked", "what it says"), tuple(rows))
