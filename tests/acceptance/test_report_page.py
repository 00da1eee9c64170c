"""The report page of a run, in a real browser: whole, alone, right, and to be read by anybody, on anything."""

from __future__ import annotations

import asyncio
import json
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sandbox.postgres import Server, create_database, drop_database
from schemas.money import Currency, Money
from tasks.report import SIMULATED
from tests.acceptance.browser import CHROMIUM, NO_CHROMIUM, Page, browsing
from tests.acceptance.test_command_line import Terminal
from tests.world import make_world, write_documents

pytestmark = [pytest.mark.xdist_group("report page"), pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)]
#: A folder for pictures of the page, to be looked at; without it none are taken.
PICTURES = "REPORT_PICTURES"
PHONE, DESKTOP = (360, 740), (1280, 900)
#: What somebody may call a document, so that a page does what it must not.
HOSTILE = (
    "<script>window.taken = 1</script>",
    '"><img src=x onerror="window.taken = 1">',
    "</script><script>window.taken = 1</script><!--",
    "{{ 7 * 7 }}${7 * 7}",
    "line\u2028and\u2029paragraph",
    "\u202egnihton si siht",
    "مستند رقم ٧",
    "x" * 3_000,
)
DOCUMENTS = 60


@dataclass(frozen=True)
class Ledger:
    """A run in which much went wrong, and its database."""

    url: str
    run: int


@pytest.fixture(scope="module")
def ledger(postgres: Server, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    root, name = tmp_path_factory.mktemp("reported"), f"reported_{uuid.uuid4().hex}"
    url = create_database(postgres, name, template=template)
    yield Ledger(url, asyncio.run(_work(root, url)))
    drop_database(postgres, name)


async def _work(root: Path, url: str) -> int:
    """Escalations, dead letters, retries, and a few attempts of which nobody knows whether they were billed."""
    async with make_world(root, url, DOCUMENTS) as world:
        ids = [*HOSTILE, *(f"d{number}" for number in range(DOCUMENTS - len(HOSTILE)))]
        write_documents(root, [f"document {number} is about a colour" for number in range(DOCUMENTS)], ids)
        world.plan_mishaps(
            {"kind": "content_exists_risk", "every": 1, "match": "1.11."},
            {"kind": "reset_after", "every": 1, "match": "1.12.1"},
            {"kind": "length", "share": 0.1, "seed": 5},
            {"kind": "blank", "share": 0.15, "seed": 5},
            {"kind": "content_filter", "share": 0.03, "seed": 7},
        )
        run, _ = await world.run()
        assert run.state == "done"
        return run.run_id


@pytest.fixture
def farthing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(tmp_path, monkeypatch, capsys)


@pytest.fixture
def audit(ledger: Ledger, farthing: Terminal) -> dict[str, Any]:
    """What `farthing audit --json` says, while it writes the page."""
    arguments = ("audit", str(ledger.run), "--top", "50", "--html", "report.html", "--json")
    left = farthing(*arguments, FARTHING_DATABASE_URL=ledger.url)
    assert left.exit_code == 0, left.stderr
    found: dict[str, Any] = left.json
    assert found["unknown_pico"] > 0 < found["dead_letters"]
    return found


async def test_a_page_is_alone_and_says_what_the_audit_says(audit: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    assert file.stat().st_size < 2 * 10**6
    async with browsing(tmp_path / "browser", *DESKTOP) as page:
        await page.open(file.as_uri())
        text = await page.shows("Save the figures as JSON")
        await _says_what_the_audit_says(page, text, audit)
        await _draws_what_the_audit_says(page, audit)
        await _sorts_by_keyboard(page, audit)
        for scheme in ("light", "dark"):
            for size in (PHONE, DESKTOP):
                await page.be(*size, scheme)
                await _can_be_read(page, size[0], scheme)
                await _keep(page, f"report-{size[0]}-{scheme}.png")
        assert page.uncaught == page.complaints == []
        assert page.requested == [file.as_uri()]
        await _runs_nothing_else(page)


async def _says_what_the_audit_says(page: Page, text: str, audit: dict[str, Any]) -> None:
    figures = json.loads(await page.evaluate("document.getElementById('figures').textContent"))
    assert figures == {name: value for name, value in audit.items() if name != "run_list"}
    low, high = (Money(audit[name], Currency.USD) for name in ("cost_pico", "high_pico"))
    assert f"Cost {low} to {high} known {audit['cost_pico']:,} pico-USD" in text
    assert f"colours, run {audit['run']} (done)" in text
    assert f"{audit['results']:,} of {audit['documents']:,}; {audit['dead_letters']:,} dead letters" in text
    assert {"Simulated", "Not exact yet", "Proved"} <= set(re.split(r"\s(?=[A-Z])", text))
    assert SIMULATED in text
    for each in audit["waste"]:
        assert f"{each['tier']} {each['purpose']} {each['attempts']:,} " in text
    for name, tier in audit["tiers"].items():
        cost = Money(tier["cost_pico"], Currency.USD)
        assert f"{name} {tier['attempts']:,} {tier['results']:,} {cost} " in text
    for each in audit["escalations"]:
        assert f"{each['reason'].replace('_', ' ')} → {each['to_tier']} {each['escalated']:,} " in text


async def _draws_what_the_audit_says(page: Page, audit: dict[str, Any]) -> None:
    drawn = await page.evaluate(
        """Object.fromEntries([...document.querySelectorAll('canvas')].map(canvas => [canvas.id, {
            names: Chart.getChart(canvas).data.labels,
            bars: Object.fromEntries(Chart.getChart(canvas).data.datasets.map(each => [each.label, each])),
            inked: canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some(Boolean),
            told: canvas.getAttribute('role') + ': ' + canvas.ariaLabel,
        }]))"""
    )
    assert set(drawn) == {f"chart-{name}" for name in ("time", "tiers", "documents", "cache", "confidence", "dead")}
    assert all(each["inked"] and each["told"].startswith("img: ") for each in drawn.values())
    costs = [str(Money(tier["cost_pico"], Currency.USD)) for tier in audit["tiers"].values()]
    assert drawn["chart-tiers"]["bars"]["cost"]["shown"] == costs
    longest = max(tier["cost_pico"] for tier in audit["tiers"].values())
    lengths = drawn["chart-tiers"]["bars"]["cost"]["data"]
    for length, tier in zip(lengths, audit["tiers"].values(), strict=True):
        assert length / max(lengths) == pytest.approx(tier["cost_pico"] / longest, abs=1e-6)
    counts = map(int, drawn["chart-documents"]["bars"]["documents"]["shown"])
    assert sum(counts) == audit["document_costs"]["documents"]
    dead = drawn["chart-dead"]
    assert dict(zip(dead["names"], map(int, dead["bars"]["documents"]["shown"]), strict=True)) == {
        reason.replace("_", " "): number for reason, number in audit["dead_letters_by_reason"].items()
    }


async def _sorts_by_keyboard(page: Page, audit: dict[str, Any]) -> None:
    """To the last unit, which is not shown."""
    table = (
        "[...document.querySelectorAll('table')].find(each => each.caption.innerText.includes('single documents'))"
    )
    column = f"[...{table}.tHead.rows[0].cells].findIndex(each => each.innerText.startsWith('cost'))"
    costs = [str(each["cost_pico"]) for each in audit["document_costs"]["dearest"]]
    for order in ("descending", "ascending"):
        await page.evaluate(f"{table}.tHead.rows[0].cells[{column}].firstChild.focus()")
        await page.press("Enter")
        keys = f"[...{table}.tBodies[0].rows].map(row => row.cells[{column}].dataset.key)"
        assert await page.evaluate(keys) == sorted(costs, key=int, reverse=order == "descending")
        assert await page.evaluate(f"{table}.tHead.rows[0].cells[{column}].ariaSort") == order


async def _can_be_read(page: Page, width: int, scheme: str) -> None:
    """Nothing sticks out, tables have captions, and words stand out from the paper (WCAG 2: at least 4.5 to 1)."""
    assert await page.evaluate("document.documentElement.scrollWidth") <= width
    assert await page.evaluate("[...document.querySelectorAll('table')].every(each => each.caption.textContent)")
    colours = await page.evaluate(
        """['body', '.summary', '.simulated', '.kind', '.headlines dt', '.headlines .figure', '.verdicts .good',
            '.verdicts .bad', 'nav a', 'figcaption', 'summary', 'caption', 'thead th', 'td', 'footer'].map(name => {
            let element = document.querySelector(name);
            const ink = getComputedStyle(element).color;
            while (getComputedStyle(element).backgroundColor === 'rgba(0, 0, 0, 0)') element = element.parentElement;
            return [name, ink, getComputedStyle(element).backgroundColor];
        })"""
    )
    for name, ink, paper in colours:
        assert contrast(ink, paper) >= 4.5, (scheme, name, ink, paper)
        assert (luminance(paper) < luminance(ink)) == (scheme == "dark")


def contrast(one: str, other: str) -> float:
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    """https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    parts = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


async def _runs_nothing_else(page: Page) -> None:
    """What no escaping should ever let through, the page's own policy stops."""
    assert await page.evaluate("typeof window.taken") == "undefined"
    await page.evaluate(f"document.body.insertAdjacentHTML('beforeend', {json.dumps(HOSTILE[1])})")
    await page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.taken = 2'}))"
    )
    await asyncio.sleep(0.3)
    assert await page.evaluate("typeof window.taken") == "undefined"
    assert sum("Content Security Policy" in each for each in page.complaints) >= 2


async def _keep(page: Page, name: str) -> None:
    if folder := os.environ.get(PICTURES):
        await page.keep(Path(folder) / name, whole=True)
