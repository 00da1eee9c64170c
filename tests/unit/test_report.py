"""Reports: every figure that is shown is the audit's own."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from rich.console import Console, RenderableType

from farthing import _exit_code
from schemas.money import PICO, Currency, Money
from tasks import report
from tasks.ledger.breakdowns import DearDocument, DocumentCosts
from tasks.ledger.proof import Evidence, Proof
from tasks.ledger.spend import (
    Accuracy,
    Audit,
    Escalation,
    Event,
    HoursSpend,
    Progress,
    PurposeSpend,
    SharedBudget,
    TierSpend,
    TokenCosts,
    Waste,
)
from tasks.live import Pace, duration, line, panel, project
from tasks.steering import Capped, Limited, Steered
from tests.ledgers import JOB

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
AUDIT = Audit(
    run=7,
    job="tickets",
    documents=1_000,
    results=980,
    dead_letters=15,
    attempts=1_234,
    cost_pico=3 * PICO + 141_592_653_589,
    unknown_pico=12_000_000_000,
    currency="USD",
    hit_tokens=2_000_001,
    miss_tokens=1_000_002,
    output_tokens=30_003,
    prefix_hit_rate=0.999961,
    escalated=200,
    tiers={
        "flash": TierSpend(1_030, 800, 1 * PICO, 0, 1_900_000, 900_000, 25_000),
        "pro": TierSpend(204, 180, 2 * PICO + 141_592_653_589, 12_000_000_000, 100_001, 100_002, 5_003),
    },
    runs=(7,),
    state="done",
    reason=None,
    is_simulated=False,
    prompt_version="sha256:0",
    opened_at=NOW,
    finished_at=NOW,
    budget_pico=5 * PICO,
    reused=40,
    duplicates=5,
    unknown_attempts=1,
    reasoning_tokens=0,
    priming_pico=77_000_000,
    adjusted_pico=0,
    lost_pico=88_000_000,
    saved_pico=6 * PICO,
    by_purpose={"answer": PurposeSpend(1_234, 3 * PICO + 141_592_653_589, 12_000_000_000)},
    escalations=(Escalation("pro", "low_confidence", 200, 180, 120, 60, 190, 100, 150, 2 * PICO, 0),),
    accuracy=(Accuracy("flash", 800, 780), Accuracy("pro", 190, 171)),
    waste=(
        Waste("flash", "answer", "lost", None, "unknown", 1, 0, 12_000_000_000, "unknown"),
        Waste("flash", "answer", "answered", "low_confidence", "known", 200, 314_159_265_359, 0, "unsure"),
    ),
    dead_letters_by_reason={"invalid_answer": 14, "too_large": 1},
    distinct_documents=1_000,
    expected_hit_tokens=1_234_000,
    real_hit_tokens=1_233_951,
    lost_whole_pico=80_000_000,
    token_costs=TokenCosts(5 * 10**11, 2 * PICO + 6 * 10**11, 41_592_653_589, 2_000_001, 1_000_002, 30_003),
    hours={"off_peak": HoursSpend(1_000, 2 * PICO), "peak": HoursSpend(234, PICO + 141_592_653_589)},
    document_costs=DocumentCosts(
        990,
        3_173_325_911,
        900_000_000,
        9_000_000_000,
        77_000_000_000,
        (DearDocument(7, 41, "t-41", "dead_letter", "pro", "invalid_answer", 6, 77_000_000_000, 0),),
    ),
)
PROGRESS = Progress(
    run=7,
    job="tickets",
    state="running",
    reason=None,
    done=250,
    documents=1_000,
    waiting_because="12 documents wait before a retry (rate limited)",
    in_flight=42,
    lanes=1,
    results=240,
    dead_letters=10,
    reused=0,
    escalated=25,
    attempts=300,
    cost_pico=PICO,
    unknown_pico=0,
    hit_tokens=900,
    miss_tokens=100,
    output_tokens=10,
    budget_pico=5 * PICO,
    currency="USD",
    is_simulated=True,
    opened_at=NOW,
    finished_at=None,
    events=(),
)


def shown(*parts: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=160)
    for part in parts:
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


SHARED = SharedBudget("tickets-2026-11", 25 * PICO, 3 * PICO, 4 * PICO, 2 * PICO, 16 * PICO)


def test_a_shared_budget_says_who_used_how_much_of_it() -> None:
    said = "$25.00 shared, $3.00 used here, $4.00 by other runs, $2.00 set aside, $16.00 left"
    for text in (
        shown(*report.audit_report(replace(AUDIT, shared_budget=SHARED))),
        shown(report.progress_table(replace(PROGRESS, shared_budget=SHARED))),
    ):
        assert "budget tickets-2026-11" in text
        assert said in text
    assert "set aside" not in report.shared_use(replace(SHARED, held_pico=0), Currency.USD)
    lowered = report.shared_use(replace(SHARED, left_pico=-PICO // 4), Currency.USD)
    assert "$0.250 over a cap that was lowered" in lowered
    assert "left" not in lowered


def test_the_report_shows_the_audit_s_totals() -> None:
    text = shown(*report.audit_report(AUDIT))
    for figure in (
        "1,000",
        "980 (40 reused)",
        "15",
        "1,234",
        "3,141,592,653,589 pico",
        "2,000,001",
        "1,000,002",
        "30,003",
    ):
        assert figure in text
    assert f"at most {Money(AUDIT.unknown_pico, Currency.USD)}, 1 attempts" in text


def rows_of(title: str, audit: Audit = AUDIT) -> dict[str, tuple[str, ...]]:
    """The rows of the report's part of that title, by their first cell."""
    (part,) = (part for part in report.sections(audit) if part.title.startswith(title))
    return {row[0]: row[1:] for row in part.rows}


def test_what_is_unknown_makes_the_cost_an_interval() -> None:
    assert rows_of("tickets")["so it is between"] == ("$3.14 and $3.15",)
    assert "so it is between" not in rows_of("tickets", replace(AUDIT, unknown_pico=0))


def test_the_buckets_tokens_were_billed_in_have_an_effective_price() -> None:
    rows = rows_of("What the tokens cost")
    assert rows["cached"] == ("2,000,001", "$0.500", "15.91 %", "$0.250")
    assert rows["all"] == ("3,030,006", "$3.14", "100.00 %", "$1.04")


def test_peak_and_off_peak_are_told_apart_where_there_is_such_a_thing() -> None:
    assert rows_of("tickets")["at peak prices, off-peak"] == ("$1.14 (36.33 %) / $2.00 (63.66 %)",)
    flat = replace(AUDIT, hours={"flat": HoursSpend(9, 9)})
    assert "at peak prices, off-peak" not in rows_of("tickets", flat)


def test_single_documents_are_told_by_mean_median_and_the_dearest() -> None:
    told = "$0.00317 / $0.000900 / $0.00900, at most $0.0770"
    assert rows_of("tickets")["per document: mean, median, 95 %"] == (told,)
    assert rows_of("What single documents cost")["t-41"] == ("7", "invalid answer, pro", "6", "$0.0770", "—")


def test_a_lost_cache_says_how_it_was_lost() -> None:
    lost = rows_of("What the cache saved")["lost to misses of the prefix"]
    assert lost == ("$0.0000880: $0.0000800 none of it hit, $0.00000800 a part did",)


def test_waste_is_added_up_by_kind_and_unsure_answers_are_named() -> None:
    (part,) = (part for part in report.sections(AUDIT) if part.title == "Waste")
    assert part.note == "Together: unsure $0.314 (10.00 % of all), unknown at most $0.0120."
    assert "answered, low confidence" in rows_of("Waste")


def test_an_escalation_says_what_one_answer_cost_there_and_its_share() -> None:
    told = rows_of("What escalation bought")["low confidence → pro"]
    assert told[-3:] == ("$2.00", "63.66 %", "$0.0111")
    assert AUDIT.escalations[0].pico_per_rescued == -(-2 * PICO // 180)


def test_markdown_and_terminal_say_the_same() -> None:
    text, marked = shown(*report.audit_report(AUDIT)), report.markdown(AUDIT).replace("\u00a0%", " %")
    for part in report.sections(AUDIT):
        assert part.title in text
        assert f"## {part.title}" in marked
        for row in part.rows:
            assert all(cell in text and cell in marked for cell in row)


def test_tiers_add_up_to_the_total() -> None:
    rows = next(part for part in report.sections(AUDIT) if part.title == "Where the money went").rows
    assert [row[0] for row in rows] == ["flash", "pro"]
    assert [row[3] for row in rows] == ["$1.00", "$2.14"]
    assert rows[0][4] == report.share(AUDIT.tiers["flash"].cost_pico, AUDIT.cost_pico) == "31.83 %"


def test_what_the_cache_saved_is_shown_beside_what_it_would_have_cost() -> None:
    text = shown(*report.audit_report(AUDIT))
    assert "99.99 %" in text
    assert str(Money(AUDIT.cost_pico + AUDIT.saved_pico, Currency.USD)) in text


def test_escalation_is_weighed_by_what_it_put_right() -> None:
    text = shown(*report.audit_report(AUDIT))
    assert "100 → 150 of 190" in text
    assert "50 more right, by the experts' labels: $0.0400 for each." in text


def test_escalation_that_put_nothing_right_is_called_so() -> None:
    worse = replace(AUDIT.escalations[0], right_after=100)
    assert "made no document right" in report.markdown(replace(AUDIT, escalations=(worse,)))


def test_accuracy_is_that_of_all_labelled_results() -> None:
    rows = next(part for part in report.sections(AUDIT) if part.title == "Against the labels").rows
    assert rows[-1] == ("all", "990", "951", "96.06 %")


@pytest.mark.parametrize(("state", "flatters"), [("done", False), ("paused", True), ("running", True)])
def test_accuracy_before_the_end_says_that_the_unsure_documents_are_missing(state: str, flatters: bool) -> None:
    (part,) = (p for p in report.sections(replace(AUDIT, state=state)) if p.title == "Against the labels")
    assert ("flatters" in part.note) is flatters


def test_what_a_thousand_documents_cost_says_so_where_some_were_reused() -> None:
    names = {reused: report.sections(replace(AUDIT, reused=reused))[0].rows for reused in (0, 40)}
    assert "per 1,000 documents that ended" in dict(names[0])
    assert "per 1,000 documents that ended, reused, too" in dict(names[40])


@pytest.mark.parametrize("is_simulated", [True, False])
def test_simulated_figures_are_called_so_and_only_they(is_simulated: bool) -> None:
    audit = replace(AUDIT, is_simulated=is_simulated)
    assert ("SIMULATED" in report.markdown(audit)) is is_simulated
    assert ("SIMULATED" in shown(*report.audit_report(audit))) is is_simulated


def test_a_run_that_reused_everything_says_zero_attempts() -> None:
    nothing = replace(AUDIT, attempts=0, cost_pico=0, unknown_pico=0, tiers={}, escalations=(), waste=())
    text = shown(*report.audit_report(nothing))
    assert any(row == ("attempts", "0") for row in report.sections(nothing)[0].rows)
    assert "$0.00 (0 pico)" in text


def test_a_pipe_in_a_cell_does_not_break_a_markdown_table() -> None:
    marked = report.markdown(replace(AUDIT, dead_letters_by_reason={"a|b": 1}))
    assert "| a\\|b | 1 |" in marked


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(0, 0, "—"), (0, 3, "0.00 %"), (1, 3, "33.33 %"), (99_996, 100_000, "99.99 %"), (3, 3, "100.00 %")],
)
def test_a_share_is_never_rounded_up(part: int, whole: int, text: str) -> None:
    assert report.share(part, whole) == text


def test_a_broken_proof_names_what_is_broken_and_the_row() -> None:
    evidence = {"G1": Evidence(1, (), "fixed"), "G7": Evidence(9, ("attempt 7.3.1: costs 5, not 6",), "exact")}
    proof = Proof(7, "tickets", "done", evidence)
    assert "does NOT prove: G7" in report.proof_line(proof).plain
    assert "attempt 7.3.1: costs 5, not 6" in shown(report.proof_table(proof))
    whole = Proof(7, "tickets", "done", {"G1": evidence["G1"]})
    assert "does NOT" not in report.proof_line(whole).plain


def test_the_live_view_shows_rate_money_and_why_it_waits() -> None:
    pace = Pace()
    pace.see(100.0, 50)
    pace.see(105.0, 250)
    assert pace.rate == 40
    for text in (line(PROGRESS, pace), shown(panel(PROGRESS, pace))):
        for figure in ("250/1,000", "40/s", "19 s left", "$1.00", "$4.00", "$5.00", "90.00 %", "10.00 %", "42"):
            assert figure in text
        assert "12 documents wait before a retry (rate limited)" in text


def test_the_wait_for_the_first_document_is_not_the_pace_of_the_rest() -> None:
    pace = Pace()
    for at, done in ((0.0, 40), (30.0, 40), (60.0, 40), (66.0, 100)):
        pace.see(at, done)
    assert pace.rate == 10


def test_how_long_it_takes_is_not_guessed_from_a_moment_or_a_handful_nor_while_it_drains() -> None:
    moment, handful, enough = Pace(), Pace(), Pace()
    for pace, seconds, done in ((moment, 4.0, 900), (handful, 9.0, 9), (enough, 9.0, 90)):
        pace.see(0.0, 0)
        pace.see(seconds, done)
    assert [pace.remaining_s(1_000) for pace in (moment, handful)] == [None, None]
    assert enough.remaining_s(1_000) == pytest.approx(91)
    draining = replace(PROGRESS, waiting_because="draining (interrupted)")
    assert " left" in line(PROGRESS, enough)
    assert " left" not in line(draining, enough) + shown(panel(draining, enough))


RESUMED = Event(NOW, "resumed", {"documents": 120})


@pytest.mark.parametrize(
    ("events", "job_budget", "says"),
    [
        ((RESUMED,), Money(5 * PICO, Currency.USD), "budget: $5.00, as before"),
        (
            (RESUMED,),
            Money(9 * PICO, Currency.USD),
            "budget: $5.00, as before, and not the $9.00 of the job; --budget",
        ),
        ((Event(NOW, "cap_changed", {"cap": 5 * PICO, "was": PICO}), RESUMED), None, "budget: $5.00, was $1.00"),
    ],
)
def test_a_resumed_run_says_how_far_it_is_and_under_which_budget_it_goes_on(
    events: tuple[Event, ...], job_budget: Money | None, says: str
) -> None:
    opened = Event(NOW, "opened", {"documents": 1_000, "cap": 5 * PICO})
    said = report.resumed_line(replace(PROGRESS, events=(*events, opened)), job_budget)
    assert said is not None
    assert said.startswith("resuming run 7: 120 of 1,000 documents are done; ")
    assert says in said
    assert report.resumed_line(replace(PROGRESS, events=(opened,)), job_budget) is None


def test_over_several_runs_a_document_counts_once_in_the_price_of_a_thousand() -> None:
    twice = replace(AUDIT, run=None, runs=(7, 8), documents=2_000, results=1_960, reused=1_000)
    assert twice.pico_per_1000_documents == AUDIT.pico_per_1000_documents
    assert "2,000 in 2 runs (1,000 different ones ended)" in shown(*report.audit_report(twice))


def test_what_to_try_next_depends_on_how_the_demo_ended() -> None:
    assert "every answer is reused" in report.next_commands(AUDIT)
    paused = report.next_commands(replace(AUDIT, state="paused", reason="interrupted"))
    assert "every answer is reused" not in paused
    assert "goes on where this one ended" in paused


@pytest.mark.parametrize(
    ("reason", "spent", "code"), [("key", 0, 2), ("key", 1, 3), ("interrupted", 0, 3), ("budget", 0, 3)]
)
def test_a_key_that_never_worked_is_a_wrong_setting_and_one_that_stopped_working_a_pause(
    reason: str, spent: int, code: int
) -> None:
    paused = replace(AUDIT, state="paused", reason=reason, cost_pico=spent, unknown_pico=0)
    assert _exit_code(paused, Proof(7, "tickets", "paused", {}), JOB) == code


def test_a_run_whose_documents_have_all_ended_waits_for_nothing() -> None:
    ended = replace(PROGRESS, done=1_000, lanes=0, waiting_because="no lane is at work")
    assert "no lane" not in line(ended, Pace()) + shown(panel(ended, Pace()))


def test_a_rate_is_that_of_the_last_seconds() -> None:
    pace = Pace()
    for second in range(60):
        pace.see(float(second), second * 100 if second < 40 else 4_000)
    assert pace.rate == 0
    assert pace.remaining_s(10_000) is None


def test_nothing_is_projected_while_the_documents_that_climb_wait_for_a_tier_to_be_primed() -> None:
    priming = "priming the prompt cache of pro; documents for it wait, the others go on"
    assert project(replace(PROGRESS, waiting_because=priming)) is None


def test_nothing_is_projected_before_the_first_document() -> None:
    assert project(replace(PROGRESS, done=0)) is None
    assert project(PROGRESS) == Money(4 * PICO, Currency.USD)


def test_reused_documents_make_the_rest_no_cheaper() -> None:
    assert project(replace(PROGRESS, done=250, reused=250)) is None
    assert project(replace(PROGRESS, done=500, reused=250)) == Money(3 * PICO, Currency.USD)


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "—"), (0.4, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (18_720, "5 h 12 min")]
)
def test_a_duration_is_short(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_what_waiting_saved_is_told_where_a_lane_waited_and_not_elsewhere() -> None:
    assert "saved against peak prices" not in report.markdown(AUDIT)
    waited = report.markdown(replace(AUDIT, off_peak_attempts=1_234, off_peak_saved_pico=2 * PICO))
    assert "| saved against peak prices | $2.00 by working off-peak, 1,234 attempts |" in waited


def test_progress_says_how_many_may_be_in_flight_and_who_said_so() -> None:
    by_job = replace(PROGRESS, ceilings={"flash": 256, "pro": 64}, concurrency={"flash": 256, "pro": 64})
    assert "42 in 1 lane(s), at most 256 flash, 64 pro " in shown(report.progress_table(by_job))
    limited = replace(by_job, ceilings={"flash": 16, "pro": 64})
    told = "at most 16 flash, 64 pro, set by `farthing limit` (the job: 256 flash, 64 pro); --reset lifts it"
    assert told in shown(report.progress_table(limited))
    assert "at most" not in shown(report.progress_table(PROGRESS)).split("not known")[0]  # nobody kept it then


def test_a_run_that_goes_on_says_that_it_is_limited() -> None:
    resumed = Event(NOW, "resumed", {"documents": 250})
    free = replace(PROGRESS, events=(resumed,), ceilings={"flash": 8}, concurrency={"flash": 8})
    assert "in flight" not in (report.resumed_line(free, None) or "")
    limited = report.resumed_line(replace(free, ceilings={"flash": 2}), None)
    assert (limited or "").endswith(
        "in flight: at most 2 flash, set by `farthing limit` (the job: 8 flash); --reset lifts it"
    )


def test_a_limit_that_changed_is_told_tier_by_tier_and_nothing_in_it_acts() -> None:
    event = Event(NOW, "limit_changed", {"now": {"flash": 4, "[red]pro": 2}, "was": {"flash": 256}})
    text = shown(report.progress_table(replace(PROGRESS, events=(event,))))
    assert "limit changed now 2 [red]pro, 4 flash, was 256 flash" in text


def test_an_event_says_a_cap_as_money() -> None:
    event = Event(NOW, "cap_changed", {"cap": 5 * PICO, "was": PICO})
    assert "cap changed cap $5.00, was $1.00" in shown(report.progress_table(replace(PROGRESS, events=(event,))))


def test_a_pause_says_who_is_still_at_work() -> None:
    paused = replace(PROGRESS, state="paused", reason="operator", lanes=2)
    assert report.paused_lines(Steered(paused, is_changed=True)) == (
        "run 7 is paused: its 2 lane(s) begin nothing more, finish the 42 requests in flight, and leave\n"
        "`farthing run tickets --sandbox` goes on"
    )


def test_a_limit_says_how_long_it_holds_and_one_that_is_the_job_s_does_not() -> None:
    seen = replace(PROGRESS, concurrency={"flash": 256})
    limited = Limited(seen, True, {"flash": 4}, {"flash": 256})
    assert report.limited_lines(limited) == (
        "run 7 may have in flight, over all its lanes: at most 4 flash, was 256 flash\n"
        "that holds when the run is resumed, too, until `farthing limit 7 --reset` or another number"
    )
    again = replace(limited, is_changed=False, was={"flash": 4})
    assert "at most 4 flash already\n" in report.limited_lines(again)
    assert report.limited_lines(replace(limited, ceilings={"flash": 256}, was={"flash": 4})).count("\n") == 0


def test_a_cap_says_how_the_budget_stands_and_what_the_run_does_about_it() -> None:
    capped = Capped(PROGRESS, True, 2 * PICO, 5 * PICO, PICO, PICO // 2, "USD", None)
    assert report.capped_lines(capped) == (
        "run 7: the budget is $2.00, was $5.00; $1.00 spent, $0.500 held for what is in flight"
    )
    assert report.capped_lines(replace(capped, budget_pico=PICO)).endswith("\nnothing new is begun under it")
    paused = replace(capped, seen=replace(PROGRESS, state="paused", reason="budget"))
    assert report.capped_lines(paused).endswith("\n`farthing run tickets --sandbox` goes on under it")
    same = replace(capped, is_changed=False, was_pico=2 * PICO, budget_name="tickets-2026-11")
    assert report.capped_lines(same).startswith(
        "run 7: tickets-2026-11, the budget that run 7 shares, is $2.00 already; "
    )
