"""Whatever a model, a document or a provider wrote, nothing in it acts on the terminal, page or log it is on."""

from __future__ import annotations

import io
import json
import logging
import unicodedata
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import structlog
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console, RenderableType

import farthing
from schemas.inert import escape_cell, escape_markdown, plain
from schemas.spending import Line, Side, Sums
from tasks import report
from tasks.ledger.breakdowns import DearDocument
from tasks.ledger.proof import Evidence, Proof
from tasks.ledger.spend import Escalation, Event, RunSummary, TierSpend, Waste
from tasks.live import Pace, line, panel
from tasks.logs import _formatter, _make_plain
from tests.unit.test_report import AUDIT, NOW, PROGRESS

#: A title set, a screen cleared, a line overwritten, C1's own escape, reading turned round, a lone surrogate.
HOSTILE = (
    "\x1b]0;owned\x07\x1b[2J",
    "ok\rpaid",
    "\x9b31m",
    "safe\u202egnp.exe\u2066",
    "\ud800",
    "[bold red]x[/] [/nothing] [link=http://evil]y[/link] :skull:",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "| x | y |\n|---|---|",
    "``` ` **b** __i__ ~~s~~ # h",
    "![x](http://evil/a.png) [y](javascript:alert(1)) http://evil www.evil.example a@evil.example",
    "=cmd|' /C calc'!A0",
    "\\",
    "&lt;b&gt;",
)
#: No test is about how long it takes.
unhurried = settings(deadline=None, max_examples=60)
hostile = st.one_of(st.text(max_size=40), st.sampled_from(HOSTILE), st.lists(st.sampled_from(HOSTILE)).map("".join))


def rendered(*parts: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=500, force_terminal=False, color_system=None)
    for part in parts:
        # strings as the live view prints them; what is made of tables and texts relies on no setting
        console.print(part, highlight=False, markup=not isinstance(part, str))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def acts(shown: str) -> list[str]:
    """Characters that a terminal would obey or hide."""
    return sorted({each for each in shown if not each.isprintable() and unicodedata.category(each) != "Zs"} - {"\n"})


@unhurried
@given(hostile)
def test_plain_text_is_one_line_without_anything_that_acts_and_loses_nothing(text: str) -> None:
    made = plain(text)
    assert acts(made) == []
    assert "\n" not in made
    if text.isprintable():
        assert made == text


@unhurried
@given(hostile)
def test_no_table_and_no_line_for_a_terminal_acts(text: str) -> None:
    event = Event(NOW, text, {text: text, "from": [text, None]})
    audit = replace(
        AUDIT, job=text, state=text, reason=text, tiers={text: TierSpend(1, 1, 1, 0, 1, 1, 1)},
        escalations=(Escalation(text, text, 1, 1, 1, 1, 1, 1, 1, 1, 0),),
        waste=(Waste(text, text, text, text, text, 1, 0, 1, text),), dead_letters_by_reason={text: 1},
        document_costs=replace(AUDIT.document_costs, dearest=(DearDocument(1, 1, text, text, text, text, 1, 1, 1),)),
        lines=(Line((text,), Sums(attempts=1)),), by=(Side.MODEL,),
    )  # fmt: skip
    progress = replace(PROGRESS, job=text, state=text, waiting_because=text, events=(event,))
    summary = RunSummary(1, text, text, text, 1, 1, 1, 0, 1, "USD", False, NOW, NOW)
    proof = Proof(1, text, text, {"G1": Evidence(1, (text,), text)})
    shown = rendered(
        *report.run_report(audit, proof), report.line_table(audit), report.run_table([summary]),
        report.progress_table(progress),
        report.proof_table(proof), panel(progress, Pace()), line(progress, Pace()),
    )  # fmt: skip
    assert acts(shown) == []


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(1)", "  =1", "\t=1", "\r\n=1", "\uff1d1"])
def test_a_cell_of_a_spreadsheet_is_no_formula(text: str) -> None:
    made = escape_cell(text)
    assert made.startswith(("'", "\\"))
    assert acts(made) == []
    assert escape_cell("deepseek-flash") == "deepseek-flash"


@pytest.mark.parametrize("text", ["[bold]x[/]", "[/nothing]", ":skull:", "[link=http://evil]y[/link]"])
def test_markup_is_shown_as_it_is(text: str) -> None:
    assert rendered(report.table(text, ("a", "b"), [(text, text)], text)).count(text) == 4


@unhurried
@given(hostile)
@example("a|b")
@example("[x](http://evil)")
def test_a_markdown_page_shows_text_and_nothing_else(text: str) -> None:
    reason = text or "-"
    page = report.markdown(replace(AUDIT, job=reason, reason=reason, dead_letters_by_reason={reason: 1}))
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(page)
    inline = [each for token in tokens if token.type == "inline" for each in token.children or ()]
    assert {each.type for each in inline} <= {"text", "text_special"}
    assert {token.type for token in tokens if token.type.endswith("_open")} <= {
        *("table_open", "thead_open", "tbody_open", "tr_open", "th_open", "td_open", "heading_open", "paragraph_open")
    }
    assert page.count("\n## ") + 1 == len(report.sections(AUDIT))


@unhurried
@given(hostile)
def test_a_markdown_cell_reads_as_the_text_it_is(text: str) -> None:
    (paragraph,) = [token for token in MarkdownIt().parse(f"x {escape_markdown(text)} x") if token.type == "inline"]
    read = "".join(each.content for each in paragraph.children or ())
    assert read == f"x {plain(text)} x".strip()


@pytest.mark.parametrize("text", ["http://evil", "https://evil", "www.evil.example", "a@evil.example"])
def test_an_address_does_not_become_a_link(text: str) -> None:
    assert text not in escape_markdown(text)


@unhurried
@given(hostile)
def test_a_log_line_in_prefect_does_not_act(text: str) -> None:
    formatter = _formatter(_make_plain, structlog.dev.ConsoleRenderer(colors=False, pad_event_to=0))
    record = logging.LogRecord(
        "farthing", logging.INFO, "", 0, {"event": text, "model": text, "both": (text,)}, (), None
    )
    record._logger, record._name = None, "info"
    assert acts(formatter.format(record)) == []


@unhurried
@given(hostile)
def test_json_is_ascii_and_gives_the_text_back(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", printed.append)
        farthing.print_json(report_of(text))
    assert printed[0].isascii()
    assert printed[0].isprintable()
    assert json.loads(printed[0]) == report_of(text)


def report_of(text: str) -> dict[str, object]:
    return {"reason": text, "at": datetime(2026, 1, 1, tzinfo=UTC).isoformat()}


@unhurried
@given(hostile)
def test_what_the_command_line_tells_and_shows_does_not_act(text: str) -> None:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        farthing.tell(text)
        farthing.show(text)
    assert acts(out.getvalue() + err.getvalue()) == []
