"""Pages: hostile text stays text, the figures are the audit's, exactly, and the file stays small."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import tomllib
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from schemas.buckets import COST_EDGES, pick_stride
from schemas.errors import ConfigurationError
from schemas.inert import plain
from schemas.money import MOST_PICO, PICO
from schemas.spending import Line, Side, Sums
from tasks import charts, report
from tasks.ledger.breakdowns import DearDocument, SlowDocument
from tasks.ledger.proof import Evidence, Proof
from tasks.ledger.shapes import Shape, Slice, Sureness
from tasks.ledger.spend import Audit, RunSummary
from tasks.pages import MOST_DOCUMENTS, MOST_LINES, MOST_RUNS, Page, render, write_page
from tests.unit.test_report import AUDIT, NOW

ROOT = Path(__file__).parents[2]
VENDOR = ROOT / "tasks" / "templates" / "vendor"
HOSTILE = (
    "all",
    "<script>alert(1)</script>",
    "</script><!--",
    "'\"><b>",
    "{{ 7 * 7 }}",
    "a\u2028b\u0000c",
    "\u202eevil",
)
STRIDE = pick_stride(NOW, NOW + timedelta(hours=1))


def shape(**changes: Any) -> Shape:
    usual = Shape(
        first=NOW,
        last=NOW + timedelta(hours=1),
        stride=STRIDE,
        slices=(
            Slice(NOW, "flash", 1_030, PICO, 0, 1_900_000, 900_000),
            Slice(NOW + STRIDE, "pro", 204, 2 * PICO + 141_592_653_589, 12_000_000_000, 100_001, 100_002),
        ),
        costs={0: 3, 40: 700, 42: 287},
        confidences=(Sureness("flash", 20, 200, 200), Sureness("flash", 39, 780, 0), Sureness("pro", 39, 180, 0)),
        threshold=Decimal("0.85"),
    )
    return replace(usual, **changes)


SLOW = SlowDocument(7, 41, "t-41", "dead_letter", "pro", "invalid_answer", 6, 61_250_000)


def page(audit: Audit | None = None, **changes: Any) -> Page:
    return replace(Page(audit or replace(AUDIT, slowest=(SLOW,)), shape(), (), (), NOW), **changes)


class Reader(HTMLParser):
    """What a browser would make of it: elements, and the text in each script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.open = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        self.open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open == "script":
            self.scripts[-1] += data
        else:
            self.words.append(data)


def read(page: Page) -> Reader:
    return Reader(render(page))


def told(text: str) -> Page:
    """A page that has this text wherever somebody else's stands."""
    dear = replace(AUDIT.document_costs.dearest[0], document_id=text, tier=text)
    audit = replace(
        AUDIT,
        job=text,
        reason=text,
        tiers={text: AUDIT.tiers["flash"], "pro": AUDIT.tiers["pro"]},
        dead_letters_by_reason={text: 14},
        document_costs=replace(AUDIT.document_costs, dearest=(dear,)),
        escalations=(replace(AUDIT.escalations[0], reason=text),),
        by=(Side.MODEL,),
        lines=(Line((text,), Sums(attempts=1)),),
        slowest=(replace(SLOW, document_id=text, reason=text),),
    )
    proof = Proof(7, text, "done", {"G1": Evidence(1, (text,), text)})
    return page(audit, proofs=(proof,))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_text_wherever_it_stands(text: str) -> None:
    hostile = told(text)
    found, harmless = read(hostile), read(told("a name"))
    assert (found.elements, found.attributes) == (harmless.elements, harmless.attributes)
    assert len(found.scripts) == 4
    assert json.loads(found.scripts[0]) == json.loads(json.dumps(hostile.audit.to_json()))
    assert list(json.loads(found.scripts[1])["tiers"]["names"]) == [plain(text), "pro"]
    assert plain(text) in "".join(found.words)
    assert not any(sign in render(hostile) for sign in "\u2028\u202e\0")


def test_the_figures_in_a_page_are_the_audit_s_beyond_what_a_float_can_hold() -> None:
    large = replace(AUDIT, cost_pico=MOST_PICO, unknown_pico=1)
    assert json.loads(read(page(large)).scripts[0])["cost_pico"] == MOST_PICO
    assert f"known {MOST_PICO:,} pico-USD" in render(page(large))


def test_charts_spell_exact_sums_and_draw_them_as_shares_of_their_axis() -> None:
    large = replace(AUDIT, tiers={"flash": replace(AUDIT.tiers["flash"], cost_pico=MOST_PICO)}, cost_pico=MOST_PICO)
    drawn = json.loads(read(page(large)).scripts[1])["tiers"]
    assert drawn["series"] == [{"name": "cost", "lengths": [0.922337], "shown": ["$9,223,372.04"]}]
    assert drawn["ticks"][-1] == [1.0, "$10,000,000.00"]
    over_time = charts.spend_over_time(AUDIT, shape())
    assert [each.shown[:3] for each in over_time.series] == [("$1.00", "$0.00", "$0.00"), ("$0.00", "$2.14", "$0.00")]
    assert len(over_time.names) == len(over_time.table.rows) == timedelta(hours=1) // STRIDE + 1


def test_costs_of_documents_are_told_in_steps_and_what_is_not_known_apart() -> None:
    drawn = charts.cost_per_document(AUDIT, shape())
    assert drawn.names[0] == "0"
    assert drawn.titles[0] == "nothing that is known"
    assert drawn.series[0].shown == ("3", "700", "0", "287")
    assert COST_EDGES[39] == 6_300_000
    assert drawn.titles[1] == "$0.00000630 to $0.00000800"
    assert report.Figure("3", 3) == drawn.table.rows[0][1]


def test_a_threshold_is_marked_only_where_there_is_one() -> None:
    drawn = charts.confidence(AUDIT, shape())
    assert drawn.mark == charts.Mark(0.85, "threshold 0.85")
    assert drawn.says.startswith("200 of 1,160 valid answers were less sure than 0.85.")
    assert charts.confidence(AUDIT, shape(threshold=None)).mark is None


def test_the_policy_names_the_two_scripts_and_the_style_as_they_stand_there() -> None:
    html = render(page())
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    style = html.partition("<style>")[2].partition("</style>")[0]
    scripts = [each.partition("</script>")[0] for each in html.split("<script>")[1:]]
    names = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (*scripts, style)]
    assert len(scripts) == 2
    assert policy.replace("&#39;", "'") == (
        "default-src 'none'; script-src 'sha256-{}' 'sha256-{}'; style-src 'sha256-{}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    ).format(*names)
    assert "sourceMappingURL" not in html


def test_a_page_says_what_was_proved_of_it() -> None:
    holds, broken = Evidence(9, (), "all is well"), Evidence(9, ("row 3 is odd",), "not so")
    good, bad = (Proof(7, "tickets", "done", {"G1": each}) for each in (holds, broken))
    assert "Not proved here: farthing verify 7" in render(page())
    assert ">Proved</li>" in render(page(proofs=(good,)))
    assert "Does NOT prove: run 7" in render(page(proofs=(bad,)))
    assert "not so; row 3 is odd" in render(page(proofs=(bad,)))
    of_job = replace(AUDIT, run=None, runs=(5, 6, 7))
    assert "Proved: 1 of 3 runs" in render(page(of_job, proofs=(good,)))


@pytest.mark.parametrize(("unknown", "cost"), [(0, ">$3.14<"), (12_000_000_000, ">$3.14 to $3.15<")])
def test_the_cost_is_one_sum_or_a_range(unknown: int, cost: str) -> None:
    html = render(page(replace(AUDIT, unknown_pico=unknown)))
    assert cost in html
    assert (">Exact</li>" in html) == (unknown == 0)


def test_a_ledger_without_a_run_still_makes_a_page() -> None:
    nobody = ("run", "job", "currency", "state", "is_simulated", "budget_pico", "prefix_hit_rate")
    none = ("documents", "results", "dead_letters", "attempts", "cost_pico", "unknown_pico", "reused")
    nothing = replace(
        AUDIT,
        **dict.fromkeys(nobody),
        **dict.fromkeys(none, 0),
        **dict.fromkeys(("escalations", "accuracy", "waste", "runs"), ()),
        tiers={},
        dead_letters_by_reason={},
        hours={},
        document_costs=replace(AUDIT.document_costs, documents=0, dearest=()),
    )
    assert "Nothing was ever run here." in render(page(nothing, shape=None))


def test_the_largest_page_is_under_two_megabytes(tmp_path: Path) -> None:
    """With all that is bounded at its bound, and ids of 3 KB in a script that JSON spells out."""
    document = DearDocument(7, 10**9, "\u672c" * 1_000, "dead_letter", "pro", "invalid_answer", 60, 10**15, 10**15)
    begins = [NOW + number * STRIDE for number in range(90)]
    tiers = {f"tier-{number}": AUDIT.tiers["flash"] for number in range(5)}
    large = replace(
        AUDIT,
        tiers=tiers,
        by=tuple(Side),
        lines=(Line(("2026-11-30 deepseek",) * len(Side), Sums(*([10**12] * 12))),) * MOST_LINES,
        document_costs=replace(AUDIT.document_costs, dearest=(document,) * MOST_DOCUMENTS),
        slowest=(replace(SLOW, document_id=document.document_id),) * MOST_DOCUMENTS,
    )
    wide = shape(
        last=begins[-1],
        slices=tuple(Slice(begin, tier, 10**6, 10**15, 10**15, 10**9, 10**9) for begin in begins for tier in tiers),
        costs=dict.fromkeys(range(len(COST_EDGES) + 1), 10**5),
        confidences=tuple(Sureness(tier, part, 10**6, 10**6) for tier in tiers for part in range(40)),
    )
    run = RunSummary(7, "tickets", "done", None, 10, 10, 10**15, 0, 10**15, "USD", False, NOW, NOW)
    assert 500_000 < write_page(page(large, shape=wide, runs=(run,) * 3 * MOST_RUNS), tmp_path / "page") < 2_000_000
    with pytest.raises(ConfigurationError, match="--by: these are 501 lines, and a page holds 500"):
        write_page(page(replace(large, lines=large.lines[:1] * 501)), tmp_path / "page")


def test_a_page_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be written: No such file"):
        write_page(page(), tmp_path / "nowhere" / "page.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigurationError, match="cannot be written: Is a directory"):
        write_page(page(), tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_chart_js_stands_here_as_it_was_published_with_its_licence() -> None:
    library = (VENDOR / "chart.umd.min.js").read_bytes()
    assert hashlib.sha256(library).hexdigest() in (VENDOR / "README.md").read_text()
    (version,) = re.findall(r"Chart\.js v([\d.]+)", library[:100].decode())
    assert f"Chart.js](https://www.chartjs.org) {version}, MIT" in (VENDOR / "README.md").read_text()
    assert "Permission is hereby granted, free of charge" in (VENDOR / "chart.js-LICENSE.md").read_text()
    assert f"Charts by Chart.js {version} (MIT)" in render(page())


def test_an_installation_has_every_file_of_a_page() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["tasks"]
    packed = {path for pattern in declared for path in (ROOT / "tasks").glob(pattern)}
    assert packed == {path for path in (ROOT / "tasks" / "templates").rglob("*") if path.is_file()}


def test_a_figure_is_the_text_and_keeps_its_number_when_it_is_copied() -> None:

    figure = copy.deepcopy(report.count(1_234))
    assert (figure, figure.exact) == ("1,234", 1_234)
