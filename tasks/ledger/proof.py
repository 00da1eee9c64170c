"""The proof: the guarantees G1 to G10, and a promise's G18, recomputed for one run from the ledger's rows (G17).

Each guarantee is a handful of queries that return the rows which break it, in words that name them. The rest
(the manifest's digest, the ledger's digest, the price book) is recomputed in Python by the code that made it. All
of it reads one snapshot, so a run may be proven while it works: what has not happened yet is no violation.

Not provable from rows: that no request left without an intent (only the provider's bill knows), and that rows were
durable when reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas import tables
from schemas.attempts import NOT_BILLED, UNKNOWN_BILLING, RunId, Signal
from schemas.documents import InputFile, Manifest, Shard
from schemas.errors import ConfigurationError, UnknownPrice
from schemas.ladder import UNKNOWN_RETRIES
from schemas.money import Currency
from schemas.pricing import PriceBook
from tasks.ledger import promises
from tasks.ledger.claims import CLAIMS, COMMIT_SLACK_S, Claim
from tasks.ledger.connection import Ledger
from tasks.ledger.digests import compute_answers_digest, compute_digest, count_purged
from tasks.ledger.spend import SNAPSHOT

#: Offending rows that each query shows at most.
SHOWN = 20


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one guarantee rests on: how many rows were checked, which break it, and what that means."""

    checked: int
    violations: tuple[str, ...]
    says: str


@dataclass(frozen=True)
class Proof:
    """The guarantees of one run, each with its evidence."""

    run: int
    job: str
    state: str
    evidence: dict[str, Evidence]

    @property
    def guarantees(self) -> dict[str, bool]:
        """Which guarantees the rows bear out."""
        return {name: not found.violations for name, found in self.evidence.items()}

    @property
    def proved(self) -> bool:
        """Whether they bear out all of them."""
        return all(self.guarantees.values())

    def to_json(self) -> dict[str, Any]:
        """One JSON object: `proved`, `guarantees` by name, and the evidence."""
        return {
            "run": self.run,
            "job": self.job,
            "state": self.state,
            "proved": self.proved,
            "guarantees": self.guarantees,
            "evidence": {
                name: asdict(found) | {"violations": list(found.violations)} for name, found in self.evidence.items()
            },
        }


_RUN = text("""
    SELECT r.job, r.state, r.currency, r.documents, r.manifest_digest, r.ledger_digest, r.finished_at, r.policy,
           r.prompt_version, v.ladder, (SELECT count(*) FROM document d WHERE d.run_id = r.run_id) AS ended
    FROM run r JOIN prompt_version v USING (prompt_version) WHERE r.run_id = :run_id
""")

#: An event that the digests are told in cannot be changed by a lane, which settles the run and may set its digest.
_SETTLED_WITH = text("""
    SELECT detail ->> 'ledger_digest' AS rows, detail ->> 'answers_digest' AS answers FROM run_event
    WHERE run_id = :run_id AND kind = 'done' ORDER BY event_id LIMIT 1
""")

_USED_PRICES = text("""
    SELECT name, model, currency, band, valid_from, hit_pico, miss_pico, output_pico FROM price
    WHERE price_id IN (SELECT price_id FROM attempt_outcome WHERE run_id = :run_id
                       UNION SELECT price_id FROM attempt_intent WHERE run_id = :run_id
                       UNION SELECT coalesce(price_id, corrected_price_id) FROM cost_adjustment
                       WHERE run_id = :run_id)
""")

#: Prices change on whole minutes, so a minute of one model and price stands for all its attempts.
_BOOKED_MINUTES = text("""
    SELECT i.tier, o.served_model, o.price_id, p.name, date_trunc('minute', o.completed_at) AS minute,
           min(o.hit::bigint + o.miss) AS fewest, max(o.hit::bigint + o.miss) AS most
    FROM attempt_outcome o
    JOIN attempt_intent i USING (run_id, document_no, attempt_no)
    JOIN price p ON p.price_id = o.price_id
    WHERE o.run_id = :run_id AND o.hit IS NOT NULL
    GROUP BY i.tier, o.served_model, o.price_id, p.name, minute
""")

_BOOKED_IN_MINUTE = text("""
    SELECT o.document_no, o.attempt_no, o.completed_at, o.hit::bigint + o.miss AS prompt_tokens
    FROM attempt_outcome o
    JOIN attempt_intent i USING (run_id, document_no, attempt_no)
    WHERE o.run_id = :run_id AND o.price_id = :price_id AND i.tier = :tier
      AND o.served_model IS NOT DISTINCT FROM CAST(:served_model AS text)
      AND date_trunc('minute', o.completed_at) = :minute AND o.hit IS NOT NULL
    ORDER BY 1, 2
""")


#: The digest leaves out what is stamped later than the run was settled: late facts, or a clock that was set back.
_STAMPED_LATER = text("""
    SELECT (SELECT count(*) FROM attempt_intent WHERE run_id = :run_id AND intended_at > :until)
         + (SELECT count(*) FROM attempt_outcome WHERE run_id = :run_id AND recorded_at > :until)
         + (SELECT count(*) FROM attempt_unknown WHERE run_id = :run_id AND declared_at > :until)
         + (SELECT count(*) FROM document WHERE run_id = :run_id AND recorded_at > :until)
""")


async def prove(ledger: Ledger, run_id: int, book: PriceBook) -> Proof:
    """Recompute the guarantees of a run from its rows. Raises ConfigurationError where there is no such run."""
    async with ledger.transaction() as connection:
        await connection.execute(SNAPSHOT)
        run = (await connection.execute(_RUN, {"run_id": run_id})).one_or_none()
        if run is None:
            raise ConfigurationError(f"there is no run {run_id}: `farthing audit` lists the runs of this ledger")
        evidence = {name: await _examine(connection, run_id, claim, run) for name, claim in CLAIMS.items()}
        evidence["G1"] = _more(evidence["G1"], await _check_manifest(connection, run_id, run.manifest_digest))
        evidence["G3"] = await _check_digest(connection, run_id, run)
        evidence["G7"] = _more(evidence["G7"], await _check_prices(connection, run_id, run, book))
        if "target" in run.policy["escalate"]:
            evidence["G18"] = await _check_promise(connection, run_id, run)
        order = sorted(evidence, key=lambda name: int(name[1:]))
        return Proof(run_id, run.job, run.state, {name: evidence[name] for name in order})


async def _examine(connection: AsyncConnection, run_id: int, claim: Claim, run: Row[Any]) -> Evidence:
    key = {
        "run_id": run_id,
        "is_done": run.state == "done",
        "unknown_billing": sorted(UNKNOWN_BILLING),
        "unknown_attempts": 1 + UNKNOWN_RETRIES,
        "not_billed": [*sorted(NOT_BILLED), Signal.REFUSED],
        "commit_slack": COMMIT_SLACK_S,
    }
    checked = (await connection.execute(text(claim.counted), key)).scalar_one()
    violations: list[str] = []
    for broken in claim.broken:
        rows = await connection.execute(text(f"SELECT * FROM ({broken}) broken LIMIT {SHOWN}"), key)  # noqa: S608 (ours)
        violations += rows.scalars()
    says = claim.says
    if claim is CLAIMS["G2"] and run.state != "done":
        says += f"; {run.documents - run.ended} of {run.documents} documents have not ended yet"
    return Evidence(checked, tuple(violations), says)


async def _check_promise(connection: AsyncConnection, run_id: int, run: Row[Any]) -> Evidence:
    key = {
        "run_id": run_id,
        "salt": await promises.find_salt(connection, run_id),
        "last_tier": run.policy["ladder"][-1],
    }
    violations = [what async for what in promises.find_broken(connection, run_id, run)]
    for broken in promises.BROKEN:
        rows = await connection.execute(text(f"SELECT * FROM ({broken}) broken LIMIT {SHOWN}"), key)  # noqa: S608 (ours)
        violations += rows.scalars()
    return Evidence(await promises.count_ranked(connection, run_id), tuple(violations), promises.SAYS)


def _more(evidence: Evidence, violations: Iterable[str]) -> Evidence:
    return Evidence(evidence.checked, (*evidence.violations, *violations), evidence.says)


async def _check_manifest(connection: AsyncConnection, run_id: int, recorded: str) -> list[str]:
    f, s = tables.input_file.c, tables.shard.c
    files = await connection.execute(
        select(f.file_no, f.path, f.size, f.sha256, f.rows, f.partition).where(f.run_id == run_id).order_by(f.file_no)
    )
    shards = await connection.execute(
        select(s.shard_no, s.file_no, s.first_row, s.row_count, s.first_document_no, s.document_count)
        .where(s.run_id == run_id)
        .order_by(s.shard_no)
    )
    found = Manifest(tuple(InputFile(*row) for row in files), tuple(Shard(*row) for row in shards), ()).digest
    if found == recorded:
        return []
    return [f"run {run_id}: its files and shards have the digest {found}, recorded was {recorded}"]


async def _check_digest(connection: AsyncConnection, run_id: int, run: Row[Any]) -> Evidence:
    says = "the rows are, byte for byte, those that the run was settled with"
    key = {"run_id": run_id, "until": run.finished_at}
    settled = (await connection.execute(_SETTLED_WITH, key)).one_or_none()
    if run.state != "done":
        was_done = (f"run {run_id}: was done, and is {run.state}",) if settled else ()
        return Evidence(len(was_done), was_done, says + "; the digest is made when the run is done")
    if run.ledger_digest is None or run.finished_at is None or settled is None:
        return Evidence(1, (f"run {run_id}: is done and has no digest",), says)
    if later := (await connection.execute(_STAMPED_LATER, key)).scalar_one():
        says += f"; {later} rows are stamped later than that and are not covered"
    found = await compute_digest(connection, RunId(run_id), run.finished_at)
    told = {run.ledger_digest, settled.rows} - {found}
    violations = [f"run {run_id}: its rows have the digest {found}, settled was {one}" for one in sorted(told)]
    answers = await compute_answers_digest(connection, RunId(run_id), run.finished_at)
    if answers != settled.answers:
        if purged := await count_purged(connection, RunId(run_id)):
            says += f"; {purged} answers were purged, and then none is covered"
        else:
            violations.append(f"run {run_id}: its answers have the digest {answers}, settled was {settled.answers}")
    return Evidence(1, tuple(violations), says)


async def _check_prices(connection: AsyncConnection, run_id: int, run: Row[Any], book: PriceBook) -> list[str]:
    """Price rows that are not the book's, and attempts that were booked by another row than their instant's."""
    rows = (await connection.execute(_USED_PRICES, {"run_id": run_id})).all()
    violations = [*_compare_prices(rows, book)]
    models = {name: tier["model"] for name, tier in zip(run.policy["ladder"], run.ladder, strict=False)}
    minutes = (await connection.execute(_BOOKED_MINUTES, {"run_id": run_id})).all()
    for minute in minutes:
        model = minute.served_model or models.get(minute.tier, minute.tier)
        edges = {
            _name_at(book, model, run.currency, minute.minute, tokens) for tokens in (minute.fewest, minute.most)
        }
        if edges != {minute.name}:
            violations += await _name_misbooked(connection, run_id, run.currency, minute, model, book)
        if len(violations) >= SHOWN:
            break
    return violations


def _compare_prices(rows: Iterable[Row[Any]], book: PriceBook) -> Iterator[str]:
    known = {price.name: price for price in book.rows()}
    for row in rows:
        price = known.get(row.name)
        if price is None:
            yield f"price {row.name}: is not in the price book"
            continue
        expected = (price.model, price.currency.value, price.band.value, price.valid_from)
        amounts = (price.hit_pico, price.miss_pico, price.output_pico)
        if tuple(row[1:]) != (*expected, *amounts):
            yield f"price {row.name}: hit, miss and output are {tuple(row[5:])} here, {amounts} in the price book"


async def _name_misbooked(
    connection: AsyncConnection, run_id: int, currency: str, minute: Row[Any], model: str, book: PriceBook
) -> list[str]:
    key = {name: getattr(minute, name) for name in ("price_id", "tier", "served_model", "minute")}
    rows = await connection.execute(_BOOKED_IN_MINUTE, key | {"run_id": run_id})
    named: list[str] = []
    for row in rows:
        due = _name_at(book, model, currency, row.completed_at, row.prompt_tokens)
        if due != minute.name and len(named) < SHOWN:
            named.append(
                f"attempt_outcome {run_id}.{row.document_no}.{row.attempt_no}: booked by {minute.name}, "
                f"and at {row.completed_at:%Y-%m-%d %H:%M:%S} UTC {due or 'no price'} held"
            )
    return named


def _name_at(book: PriceBook, model: str, currency: str, instant: datetime, prompt_tokens: int) -> str | None:
    """The price row in force; None where the book has none."""
    try:
        return book.at(model, Currency(currency), instant, prompt_tokens=prompt_tokens).name
    except (UnknownPrice, ValueError):  # ValueError: a currency that somebody made up
        return None
