"""Everything that a provider may do to a run, and what becomes of the documents, the money and the run.

The rows are the design's ("What a reply means", and the malformed replies): T transient and not billed, U of unknown
billing, Q quality, P permanent for the document, S the end of the run until somebody looks.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from multiprocessing.context import ForkServerProcess
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg.rows import namedtuple_row
from sqlalchemy import make_url

from sandbox.bill import bill_path, read_lines
from sandbox.mishaps import KINDS
from sandbox.postgres import Server, create_database, drop_database
from tasks.ledger.leases import LeaseTimes
from tests.faults.proxy import Fault, Kind, Proxy, Toward
from tests.faults.stage import IN_FLIGHT, Stage, staged, wait_until
from tests.faults.summary import Tally

#: One worker has the stage of this module, which takes longer to set up than most tests here.
pytestmark = pytest.mark.xdist_group("provider")

DOCUMENTS = 80
#: Enough for a run that is stopped soon.
FEW = 40
#: By this one the emulated models are blank, wrong and unsure within so few documents.
SEED_OF_ANSWERS = 6
#: Nobody is killed here, so nobody has to be buried at once.
TIMES = LeaseTimes(beat_every_s=0.5, grace_s=1.5)


class Tried(NamedTuple):
    """One attempt as the ledger has it."""

    tier: str
    purpose: str
    signal: str | None
    verdict: str | None
    cost: int | None
    bound: int | None


@dataclass(frozen=True)
class Ended:
    """A document: its attempts in order, and how it ended."""

    state: str | None
    reason: str | None
    tier: str | None
    tried: Sequence[Tried]

    @property
    def path(self) -> list[str]:
        """Tier and purpose of each attempt. That it warmed the cache beside is none of a reply's doing."""
        return [f"{a.tier} {'answer' if a.purpose == 'priming' else a.purpose}" for a in self.tried]


@pytest.fixture(scope="module")
def stage(postgres: Server, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    root = tmp_path_factory.mktemp("provider")
    name = f"provider_{root.parent.name}_{root.name}".replace("-", "_")
    url = create_database(postgres, name, template=template)
    with staged(root, url, documents=DOCUMENTS, seed=SEED_OF_ANSWERS) as made:
        made.times = TIMES
        yield made
    drop_database(postgres, name)


@pytest.fixture(scope="module")
def fair(stage: Stage) -> Mapping[int, Ended]:
    """A run that nothing befell: what became of each document."""
    stage.remember_baseline()
    return endings(stage)


@pytest.fixture(autouse=True)
def fair_weather(stage: Stage, fair: Mapping[int, Ended]) -> Iterator[None]:
    """Whatever a test planned ends with it."""
    yield
    stage.plan_mishaps()
    stage.ask_sandbox("POST", "clock", {"now": "2026-09-26T00:10:00Z"})
    stage.documents = DOCUMENTS
    stage.change_job()


def endings(stage: Stage) -> Mapping[int, Ended]:
    """Every document of the scene's run that was tried or ended, by number."""
    options = "-c search_path=farthing"
    with psycopg.connect(stage.database_url, options=options, row_factory=namedtuple_row) as connection:
        documents = connection.execute(
            "SELECT document_no, state, reason, tier FROM document WHERE run_id = %s", [stage.run_id]
        ).fetchall()
        attempts = connection.execute(
            "SELECT document_no, i.tier, i.purpose, o.signal, o.verdict, o.cost, u.bound FROM attempt_intent i"
            " LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)"
            " LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)"
            " WHERE run_id = %s ORDER BY document_no, attempt_no",
            [stage.run_id],
        ).fetchall()
    tried: dict[int, list[Tried]] = defaultdict(list)
    for a in attempts:
        tried[a.document_no].append(Tried(*a[1:]))
    ended = {d.document_no: d for d in documents}
    return {
        number: Ended(*(ended[number][1:] if number in ended else (None, None, None)), tried[number])
        for number in sorted({*ended, *tried})
    }


def happened(stage: Stage, kind: str) -> int:
    return int(stage.value(f"SELECT count(*) FROM run_event WHERE run_id = {stage.run_id} AND kind = '{kind}'"))


def checked(stage: Stage, *, is_alike: bool = True, undecided: frozenset[str] = frozenset({"I9"})) -> list[str]:
    """Violations. Unless `is_alike`, answers need not be those of a run without faults."""
    return stage.violations(undecided=undecided | (frozenset() if is_alike else {"I10"}))


# --- one document each: what a reply means for it ---------------------------------------------------------------


@dataclass(frozen=True, eq=False)  # each is itself: two may be of one kind
class Row:
    """A row of the table: what strikes a document, at its first attempt or at `each`, and what is made of that."""

    kind: str
    signal: str
    path: Sequence[str]
    state: str = "result"
    reason: str | None = None
    tier: str | None = "flash"
    verdict: str | None = None
    #: What the ledger says of a struck attempt's cost: nothing, as billed, or no more than a bound.
    cost: str = "none"
    each: bool = False
    model: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind}{' each time' if self.each else ''}{f' at {self.model}' if self.model else ''}"


ONCE = ["flash answer"]
AGAIN = ["flash answer", "flash retry"]
THRICE = [*AGAIN, "flash retry"]
REPAIRED = ["flash answer", "flash repair"]
CLIMBED = [*REPAIRED, "pro answer"]
SHORT = {"seconds": 0.1, "pause": 0.01}

TRANSIENT = {
    "rate_limited": ["rate_limited", "rate_limited_bare"],
    "unavailable": ["500", "502", "503", "504", "529", "502_html", "503_html"],
}
UNKNOWN = {
    "failed": ["500_html", "504_html"],
    "lost": [
        *("hang", "blank_lines", "reset_before", "reset_after", "eof", "eof_after_headers", "cut"),
        *("empty", "not_json", "bad_utf8", "deep_nesting"),
    ],
    "malformed": ["html", "list", "null", "string", "error_object"],
}
HEAVY = ["gzip_bomb", "huge_body"]
BLANK = ["no_choices", "empty_choices", "null_content", "blank"]
INTERRUPTED = ["insufficient_system_resource", "aborted"]

#: T and U.
LINE_ROWS = [
    *(
        Row(kind, signal, AGAIN, args={"ceiling": IN_FLIGHT} if kind == "rate_limited" else {})
        for signal, kinds in TRANSIENT.items()
        for kind in kinds
    ),
    *(
        Row(kind, signal, AGAIN, cost="bound", args=SHORT if kind in ("hang", "blank_lines") else {})
        for signal, kinds in UNKNOWN.items()
        for kind in kinds
    ),
    *(
        Row(kind, signal, THRICE, "dead_letter", signal, cost="bound", each=True, args=SHORT)
        for signal, kinds in UNKNOWN.items()
        for kind in kinds
    ),
    *(Row(kind, "lost", AGAIN, cost="bound") for kind in HEAVY),
    # To the end of the deadline: a read that never ends, blank lines for minutes, a byte now and then.
    Row("hang", "lost", AGAIN, cost="bound", args={"seconds": 3600}),
    Row("blank_lines", "lost", AGAIN, cost="bound", args={"seconds": 600, "pause": 0.05}),
    Row("trickle", "lost", AGAIN, cost="bound", args={"bytes": 1, "pause": 0.05}),
]

#: Q, P, and what is an answer all the same.
REPLY_ROWS = [
    *(Row(kind, "blank", REPAIRED, verdict="blank", cost="billed") for kind in BLANK),
    *(
        Row(kind, "blank", CLIMBED, tier="pro", verdict="blank", cost="billed", each=True, model="flash")
        for kind in BLANK
    ),
    Row("length", "truncated", REPAIRED, verdict="truncated", cost="billed"),
    Row("length", "truncated", CLIMBED, tier="pro", verdict="truncated", cost="billed", each=True, model="flash"),
    Row(
        "blank",
        "blank",
        [*CLIMBED, "pro repair"],
        "dead_letter",
        "blank",
        "pro",
        "blank",
        cost="billed",
        each=True,
    ),
    *(Row(kind, "interrupted", AGAIN, cost="billed") for kind in INTERRUPTED),
    *(
        Row(kind, "interrupted", [*THRICE, "pro answer"], tier="pro", cost="billed", each=True, model="flash")
        for kind in INTERRUPTED
    ),
    Row("aborted", "interrupted", AGAIN, cost="bound", args={"usage": False}),
    Row("content_exists_risk", "refused_by_provider", ONCE, "dead_letter", "refused_by_provider"),
    Row("content_filter", "refused_by_provider", ONCE, "dead_letter", "refused_by_provider", cost="billed"),
    *(Row(kind, "rejected", ONCE, "dead_letter", "rejected") for kind in ("400", "413")),
    *(Row(kind, "answered", ONCE, verdict="accepted", cost="bound") for kind in ("usage_missing", "usage_null")),
    Row("duplicate_keys", "answered", ONCE, verdict="accepted", cost="billed"),
    Row("trickle", "answered", ONCE, verdict="accepted", cost="billed", args={"bytes": 200, "pause": 0.001}),
    Row("served_model", "answered", ONCE, verdict="accepted", cost="billed"),
    Row(
        "blank_lines",
        "answered",
        ONCE,
        verdict="accepted",
        cost="billed",
        args={"seconds": 1, "pause": 0.01, "answers": True},
    ),
]
#: Whoever meets one of these has more than a document to think of: tests of their own, below.
STOPPING = {"401", "402", "403", "404", "422"}
ABSURD = {"usage_negative", "usage_strings", "usage_unbalanced", "usage_over_max_tokens"}
ELSEWHERE = STOPPING | ABSURD | {"other_document"}

Played = Mapping[Row, tuple[Ended, int]]


def play_rows(stage: Stage, fair: Mapping[int, Ended], rows: Sequence[Row]) -> Played:
    """One run, with a document of its own for each row; nothing else befalls it. Each row's document, and strikes."""
    plain = [number for number, found in fair.items() if found.path == ONCE and found.state == "result"]
    plain = plain[8:]  # the first ones prime the cache, and so wait for one another
    models = {"flash": "deepseek-flash", "pro": "deepseek-v4-pro", None: None}
    numbers = dict(zip(rows, plain, strict=False))
    assert len(numbers) == len(rows), "too few documents are answered at once"
    stage.scene()
    stage.plan_mishaps(
        *(
            {"kind": row.kind, "document": number, "model": models[row.model], "args": dict(row.args)}
            | ({} if row.each else {"attempt": 1})
            for row, number in numbers.items()
        )
    )
    assert stage.run() == 0, stage.told()
    struck = [rule["struck"] for rule in stage.ask_sandbox("GET", "mishaps")]
    found = endings(stage)
    untouched = {number for number in found} - set(numbers.values())
    assert checked(stage, is_alike=False) == [], stage.told()
    assert all(found[number].state == "result" or found[number].reason == "blank" for number in untouched)
    return {row: (found[number], struck[at]) for at, (row, number) in enumerate(numbers.items())}


@pytest.fixture(scope="module")
def played(stage: Stage, fair: Mapping[int, Ended]) -> Played:
    """All rows, in two runs: together their rejections would look like a job that is wrong."""
    found: dict[Row, tuple[Ended, int]] = {}
    for rows in (LINE_ROWS, REPLY_ROWS):
        found |= play_rows(stage, fair, rows)
    stage.plan_mishaps()
    return found


@pytest.mark.parametrize("row", [*LINE_ROWS, *REPLY_ROWS], ids=str)
def test_a_reply_means_for_its_document_what_the_table_says(row: Row, played: Played, tally: Tally) -> None:
    ended, struck = played[row]
    hurt = [tried for tried in ended.tried if tried.signal == row.signal and tried.verdict == row.verdict]
    assert (ended.state, ended.reason) == (row.state, row.reason)
    assert ended.path == row.path
    assert row.state != "result" or ended.tier == row.tier
    assert struck == len(hurt) > 0
    for tried in hurt:
        assert {"none": tried.cost == 0, "billed": bool(tried.cost), "bound": tried.cost is None}[row.cost], tried
        assert (tried.bound is not None) == (row.cost == "bound")
    tally.count(f"provider: {row.kind}", struck)


def test_every_mishap_of_the_sandbox_is_in_a_table_or_has_a_test_of_its_own() -> None:
    in_rows = {row.kind for row in (*LINE_ROWS, *REPLY_ROWS)}
    assert in_rows | ELSEWHERE == KINDS.keys()
    assert not in_rows & ELSEWHERE


def test_answers_that_are_unsure_or_wrong_go_the_ways_of_the_table(fair: Mapping[int, Ended]) -> None:
    """What the emulated models do wrong by themselves."""
    seen: Counter[str] = Counter()
    for ended in fair.values():
        for before, after in zip(ended.tried, ended.tried[1:], strict=False):
            seen[str(before.verdict)] += 1
            if before.verdict == "low_confidence":
                assert (before.tier, after.tier) == ("flash", "pro")
            else:
                assert (after.tier, after.purpose) == (before.tier, "repair") or before.purpose == "repair"
    assert {"low_confidence", "invalid_answer"} <= seen.keys(), seen


# --- S: the run stops -------------------------------------------------------------------------------------------

REFUSALS = {
    "401": ("unauthorised", "check DEEPSEEK_API_KEY"),
    "402": ("no_balance", "top it up"),
    "403": ("unauthorised", "check DEEPSEEK_API_KEY"),
    "404": ("unauthorised", "check DEEPSEEK_API_KEY"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_sudden_refusal_of_everything_pauses_the_run_and_costs_nothing(
    kind: str, stage: Stage, tally: Tally
) -> None:
    signal, advice = REFUSALS[kind]
    stage.documents = FEW
    stage.scene()
    stage.plan_mishaps({"kind": kind, "after": 10})
    assert stage.run() == 3, stage.told()
    assert advice in stage.told()
    struck = stage.struck()[kind]
    assert 0 < struck <= IN_FLIGHT
    refused = [ended for ended in endings(stage).values() if ended.tried[-1].signal == signal]
    assert len(refused) == struck
    assert all(ended.state is None and ended.tried[-1].cost == 0 for ended in refused)
    earlier = stage.snapshot()
    assert checked(stage) == []
    stage.plan_mishaps()
    assert stage.resume() == 1
    assert stage.violations(earlier) == [], stage.told()
    tally.count(f"provider: {kind}", struck)


def test_requests_that_are_all_rejected_stop_the_run_after_twenty(stage: Stage, tally: Tally) -> None:
    stage.scene()
    stage.plan_mishaps({"kind": "422", "after": 10})
    assert stage.run() == 3, stage.told()
    assert "mend the job" in stage.told()
    struck = stage.struck()["422"]
    assert 20 <= struck <= 20 + IN_FLIGHT
    rejected = [ended for ended in endings(stage).values() if ended.reason == "rejected"]
    assert len(rejected) == struck
    assert all(ended.tried[-1].cost == 0 for ended in rejected)
    stage.plan_mishaps()
    assert stage.resume() == 1
    assert checked(stage, is_alike=False) == [], stage.told()
    tally.count("provider: 422", struck)


#: What stops the run at its first sight, what the run says, and what becomes of that attempt's cost.
ALARMS: Mapping[str, tuple[dict[str, Any], str, str]] = {
    "usage_negative": ({}, "usage is impossible", "bound"),
    "usage_strings": ({}, "usage is impossible", "bound"),
    "usage_unbalanced": ({}, "usage is inconsistent", "bound"),
    "usage_over_max_tokens": ({"by": 1}, "allowed", "billed"),
    "served_model": ({"model": "deepseek-v9"}, "deepseek-v9", "bound"),
}


@pytest.mark.parametrize("kind", ALARMS)
def test_a_usage_or_a_model_that_nobody_can_price_stops_the_run_and_is_never_free(
    kind: str, stage: Stage, tally: Tally
) -> None:
    args, words, cost = ALARMS[kind]
    stage.documents = FEW
    stage.scene()
    stage.plan_mishaps({"kind": kind, "model": "deepseek-flash", "after": 10, "first": 1, "args": args})
    assert stage.run() == 3, stage.told()
    assert words in stage.told(), stage.told()
    assert stage.struck()[kind] == 1
    bounded = [tried for ended in endings(stage).values() for tried in ended.tried if tried.bound is not None]
    assert len(bounded) == (cost == "bound")
    assert all(tried.bound for tried in bounded)
    earlier = stage.snapshot()
    assert checked(stage) == []
    stage.plan_mishaps()
    assert stage.resume() == 1
    assert stage.violations(earlier) == [], stage.told()
    tally.count(f"provider: {kind}")


def test_replies_without_usage_stop_the_run_before_long(stage: Stage, tally: Tally) -> None:
    stage.documents = FEW
    stage.scene()
    stage.plan_mishaps({"kind": "usage_missing", "after": 10})
    assert stage.run() == 3, stage.told()
    assert "nobody knows what they cost" in stage.told()
    struck = stage.struck()["usage_missing"]
    assert 5 <= struck <= 5 + IN_FLIGHT
    assert stage.value(f"SELECT count(*) FROM attempt_unknown WHERE run_id = {stage.run_id}") == struck
    assert checked(stage) == []
    tally.count("provider: usage_missing", struck)


# --- other documents and other models ---------------------------------------------------------------------------


def test_an_answer_about_another_document_is_not_noticed_but_paid_for_once(stage: Stage, tally: Tally) -> None:
    """Not promised: a reply names no document. What a job can do is ask for quotes, which are then looked up."""
    stage.scene()
    stage.plan_mishaps({"kind": "other_document", "every": 4})
    assert stage.run() == 0, stage.told()
    assert checked(stage, is_alike=False) == [], stage.told()
    assert {ended.state for ended in endings(stage).values()} <= {"result", "dead_letter"}
    tally.count("provider: other_document", stage.struck()["other_document"])


def test_a_model_that_changes_in_mid_run_is_told_of_and_priced_as_what_served(stage: Stage, tally: Tally) -> None:
    stage.scene()
    stage.plan_mishaps({"kind": "served_model", "model": "deepseek-flash", "after": 20})
    assert stage.run() == 0, stage.told()
    assert stage.violations() == [], stage.told()
    assert happened(stage, "served_model_changed") >= 1
    assert "served model changed" in stage.told()
    tally.count("provider: served model changed", stage.struck()["served_model"])


def test_a_dearer_model_than_was_asked_for_is_booked_at_its_own_price(stage: Stage, tally: Tally) -> None:
    stage.scene()
    rule = {"kind": "served_model", "model": "deepseek-flash", "after": 20, "first": 1}
    stage.plan_mishaps({**rule, "args": {"model": "deepseek-v4-pro"}})
    code = stage.run()
    assert code in (0, 3), stage.told()  # 3: it cost more than what was set aside
    assert checked(stage) == [], stage.told()
    served = (
        "SELECT count(*) FROM attempt_outcome o JOIN price p USING (price_id) WHERE served_model = 'deepseek-v4-pro'"
    )
    swapped = f"{served} AND p.model = 'deepseek-v4-pro' AND o.run_id = {stage.run_id} AND o.cost > 0"
    tiers = f"SELECT count(*) FROM attempt_intent WHERE run_id = {stage.run_id} AND tier = 'pro'"
    assert stage.value(swapped) == stage.value(tiers) + 1
    stage.plan_mishaps()
    stage.resume()
    assert stage.violations() == [], stage.told()
    tally.count("provider: a dearer model served")


# --- a provider that is down, busy or away, and comes back ------------------------------------------------------

#: The provider's minutes are more than half a second long.
SCALED = 0.01


def wait_for(is_so: Callable[[], bool], stage: Stage) -> None:
    assert wait_until(is_so, 45.0), stage.told()


def waits_because(stage: Stage) -> str:
    return str(stage.value(f"SELECT max(waiting_because) FROM lane WHERE run_id = {stage.run_id}"))


def test_minutes_of_503_open_the_breaker_and_the_run_goes_on_by_itself(stage: Stage, tally: Tally) -> None:
    stage.scene()
    stage.plan_mishaps({"kind": "503", "after": 20})
    child = stage.start(time_scale=SCALED)
    wait_for(lambda: "has not answered" in waits_because(stage), stage)
    since, before = time.monotonic(), stage.struck()["503"]
    time.sleep(2 * 60 * SCALED)
    probes, seconds = stage.struck()["503"] - before, time.monotonic() - since
    assert 0 < probes <= seconds / (5 * SCALED) + IN_FLIGHT
    struck = stage.struck()["503"]
    stage.plan_mishaps()
    assert stage.wait(child) == 0, stage.told()
    assert stage.violations() == [], stage.told()
    busy = [tried for ended in endings(stage).values() for tried in ended.tried if tried.signal == "unavailable"]
    assert len(busy) >= struck
    assert {tried.cost for tried in busy} == {0}
    tally.count("provider: minutes of 503")


def test_ten_minutes_without_an_answer_end_the_run_until_somebody_resumes_it(stage: Stage, tally: Tally) -> None:
    stage.scene()
    stage.plan_mishaps({"kind": "503", "after": 20})
    assert stage.run(time_scale=0.002) == 3, stage.told()
    assert "did not answer for ten minutes" in stage.told()
    assert stage.violations() == []
    stage.plan_mishaps()
    assert stage.resume() == 1
    assert stage.violations() == [], stage.told()
    tally.count("provider: ten minutes of 503")


def test_a_provider_that_refuses_connections_for_a_while_costs_nothing_meanwhile(stage: Stage, tally: Tally) -> None:
    stage.scene()
    emulator = make_url(stage.base_url).port or 0
    slow = Fault(Kind.LATENCY, Toward.SERVER, seconds=0.1)
    with Proxy(emulator) as proxy:
        proxy.play(slow)
        child = stage.start(base_url=f"http://127.0.0.1:{proxy.port}", time_scale=SCALED)
        wait_for(lambda: proxy.struck[slow] > 40, stage)
    refused = "SELECT count(*) FROM attempt_outcome WHERE signal = 'not_sent' AND run_id = "
    wait_for(lambda: stage.value(f"{refused}{stage.run_id}") > 0, stage)
    with Proxy(emulator, port=proxy.port):
        assert stage.wait(child) == 0, stage.told()
    assert stage.violations() == [], stage.told()
    unsent = [tried for ended in endings(stage).values() for tried in ended.tried if tried.signal == "not_sent"]
    assert {(tried.cost, tried.bound) for tried in unsent} == {(0, None)}
    tally.count("provider: connections refused")


# --- a reply cut at every byte ----------------------------------------------------------------------------------


def cut_replies(stage: Stage, documents: int, *, start: int, step: int) -> list[bool]:
    """A run in which document n's first reply ends after start + n * step bytes. Which of them were cut short."""
    stage.documents = documents
    stage.scene()
    stage.plan_mishaps({"kind": "cut", "attempt": 1, "args": {"at": start, "per_document": step}})
    assert stage.run() == 0, stage.told()
    assert stage.violations() == [], stage.told()
    assert stage.struck()["cut"] == documents
    ended = list(endings(stage).values())
    cut = [found.tried[0].signal == "lost" for found in ended]
    assert all(bool(found.tried[0].bound) == is_cut for found, is_cut in zip(ended, cut, strict=True))
    return cut


def test_a_reply_cut_anywhere_is_unknown_and_its_document_is_not_lost(stage: Stage, tally: Tally) -> None:
    cut = cut_replies(stage, DOCUMENTS, start=0, step=20)
    assert sum(cut) > 20
    assert not cut[-1], "the longest cuts are not yet whole replies"
    tally.count("provider: reply cut at a byte", sum(cut))


@pytest.mark.long
def test_a_reply_cut_at_each_of_its_bytes_is_unknown_and_its_document_is_not_lost(stage: Stage, tally: Tally) -> None:
    start, cuts = 0, 0
    while any(cut := cut_replies(stage, 200, start=start, step=1)):
        assert all(cut) or start > 400, "no reply is as short as that"
        cuts, start = cuts + sum(cut), start + len(cut)
    assert cuts > 500
    tally.count("provider: reply cut at a byte", cuts)


# --- every kind by itself ---------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_kind_of_mishap_that_strikes_all_for_a_while_and_then_a_third_breaks_no_promise(
    kind: str, stage: Stage, seed: int, tally: Tally
) -> None:
    """Whatever it stops, the same command goes on with it; a share of 1.0 lasts for some attempts only."""
    args = {"seconds": 0.1, "pause": 0.01, "ceiling": 5, "by": 1}
    first = {"kind": kind, "after": 5, "first": 2 * IN_FLIGHT, "args": args}
    for rule in (first, {"kind": kind, "share": 0.3, "seed": seed, "args": args}):
        stage.scene()
        stage.plan_mishaps(rule)
        earlier: dict[str, str] = {}
        for _ in range(20):
            code = stage.run()
            assert code in (0, 3), f"seed {seed}: {stage.told()}"
            earlier.update(stage.snapshot())
            if code == 0 or kind in ELSEWHERE:
                break
        struck = stage.struck()[kind]
        stage.plan_mishaps()
        stage.resume()
        found = [broken for broken in stage.violations(earlier) if not broken.startswith("I10")]
        assert found == [], f"seed {seed}: {found}\n{stage.told()}"
        assert struck > 0
        tally.count(f"provider: {kind}", struck)


# --- with time: storms, and edges of the tariff -----------------------------------------------------------------


@pytest.fixture(scope="module")
def timed(postgres: Server, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A provider that takes its time, and up to 64 requests at once."""
    root = tmp_path_factory.mktemp("timed")
    name = f"timed_{root.parent.name}_{root.name}".replace("-", "_")
    url = create_database(postgres, name, template=template)
    with staged(root, url, documents=200, time_scale=1, reply=0.1) as made:
        made.times = TIMES
        made.change_job(concurrency=64)
        yield made
    drop_database(postgres, name)


def billed(stage: Stage) -> int:
    """Lines of the bill so far: cheap to ask, again and again."""
    return bill_path(stage.root).read_bytes().count(b"\n")


def bands(stage: Stage) -> set[str]:
    """The tariffs by which the scene's run was billed."""
    mine = f"{stage.run_id}."
    return {str(line["band"]) for line in read_lines(bill_path(stage.root)) if line["attempt"].startswith(mine)}


#: Instants of a change, or of none where the calendar says so, and the tariffs by which a run across it is billed.
EDGES = {
    "peak begins": ("2026-09-28T01:00:00Z", {"off-peak", "peak"}),
    "National Day": ("2026-10-01T01:00:00Z", {"off-peak"}),
}
MORE_EDGES = {
    "peak ends": ("2026-09-28T04:00:00Z", {"off-peak", "peak"}),
    "a Saturday to be worked": ("2026-10-10T01:00:00Z", {"off-peak"}),
    "peak begins again": ("2026-09-28T06:00:00Z", {"off-peak", "peak"}),
    "peak ends for the day": ("2026-09-28T10:00:00Z", {"off-peak", "peak"}),
    "new prices": ("2026-09-10T04:00:00Z", {"off-peak", "peak"}),
    "the first tariff": ("2026-08-16T16:00:00Z", {"off-peak", "flat"}),
    "a Sunday": ("2026-09-27T01:00:00Z", {"off-peak"}),
    "Mid-Autumn": ("2026-09-25T06:00:00Z", {"off-peak"}),
}


@pytest.mark.parametrize("name", [*EDGES, *(pytest.param(name, marks=pytest.mark.long) for name in MORE_EDGES)])
def test_a_run_across_an_edge_of_the_tariff_is_booked_to_the_last_pico(name: str, timed: Stage, tally: Tally) -> None:
    """The clock runs on from shortly before, and is moved to the edge once the run is under way on both sides."""
    instant, tariffs = {**EDGES, **MORE_EDGES}[name]
    edge = datetime.fromisoformat(instant)
    timed.documents = 200
    timed.scene()
    before = billed(timed)
    set_clock(timed, edge - timedelta(seconds=60))
    child = timed.start()
    for documents, moved_to in ((50, edge - timedelta(seconds=2)), (100, edge)):
        wait_for(lambda due=before + documents: billed(timed) >= due, timed)
        set_clock(timed, moved_to)
    assert timed.wait(child) == 0, timed.told()
    assert timed.violations() == [], timed.told()
    assert bands(timed) == tariffs
    tally.count(f"provider: {name}")


def set_clock(stage: Stage, instant: datetime) -> None:
    stage.ask_sandbox("POST", "clock", {"now": f"{instant:%Y-%m-%dT%H:%M:%SZ}"})


def storm(
    stage: Stage, most: int, least: int, documents: int, back: float = 0.8, late: int = 8, **order: Any
) -> Counter[str]:
    """The account's ceiling falls from `most` to `least` in mid-run and rises again. What was counted.

    At least so much of what was in flight before must be again. So many refusals may come `late`, of what was sent
    before the ceiling fell.
    """
    stage.documents = documents
    stage.change_job(concurrency=most, shard_rows=max(5, documents // 20), budget="50 USD")
    set_limit(stage, most)
    stage.scene()
    before, counted = billed(stage), Counter[str]()
    child = stage.start(**order)
    watch(stage, child, before + documents // 3, counted, "high")
    set_limit(stage, least)
    fallen = before + documents // 3 + counted["high"] + 2 * least  # what was in flight is over
    watch(stage, child, fallen, counted, "falling")
    already = refused(stage)
    watch(stage, child, fallen + 12 * least, counted, "low")  # long enough to doubt that the ceiling still holds
    counted["429 while low"] = refused(stage) - already
    set_limit(stage, most)
    rose, want = time.monotonic(), back * counted["high"]
    watch(stage, child, before + 10 * documents, counted, "high again", lambda: counted["high again"] >= want)
    counted["seconds until high again"] = round(time.monotonic() - rose)
    assert stage.wait(child) == 0, stage.told()
    costs = [tried for ended in endings(stage).values() for tried in ended.tried if tried.signal == "rate_limited"]
    assert {(tried.cost, tried.bound) for tried in costs} == {(0, None)}, counted
    counted["429"] = len(costs)
    assert counted["high again"] >= want, counted
    assert counted["429 while low"] <= 0.05 * 12 * least + late, counted
    return counted


def refused(stage: Stage) -> int:
    query = "SELECT count(*) FROM attempt_outcome WHERE signal = 'rate_limited' AND run_id = "
    return int(stage.value(f"{query}{stage.run_id}"))


def set_limit(stage: Stage, limit: int) -> None:
    stage.ask_sandbox("POST", "limits", {"deepseek-flash": limit})


def watch(
    stage: Stage,
    child: ForkServerProcess,
    until: int,
    counted: Counter[str],
    phase: str,
    is_seen: Callable[[], bool] = lambda: False,
) -> None:
    """Look how many are in flight until so many were billed, or the run is over; the most is `counted`."""
    deadline = time.monotonic() + stage.deadline_s
    while billed(stage) < until and child.exitcode is None and not is_seen():
        assert time.monotonic() < deadline, (phase, counted, stage.told())
        now = stage.ask_sandbox("GET", "status")["in_flight"]["deepseek-flash"]
        counted[phase] = max(counted[phase], now)
        time.sleep(0.01)


def test_a_lane_comes_down_to_a_ceiling_that_falls_and_climbs_when_it_rises(timed: Stage, tally: Tally) -> None:
    counted = storm(timed, 64, 4, documents=600, back=0.6, late=64)  # a busy machine has neither time
    assert timed.violations() == [], timed.told()
    assert counted["high"] > 32
    assert counted["low"] <= 4, counted
    assert 0 < counted["429"] <= 64 + 8, counted
    tally.count("provider: 429 storm")


@pytest.mark.long
def test_2500_in_flight_come_down_to_50_and_climb_again(
    postgres: Server, template: str, tmp_path_factory: pytest.TempPathFactory, scale: float, tally: Tally
) -> None:
    root = tmp_path_factory.mktemp("storm")
    name = f"storm_{root.parent.name}_{root.name}".replace("-", "_")
    url = create_database(postgres, name, template=template)
    most = max(250, round(2500 * scale))
    # Replies take so long that the account's ceiling is what binds, and not this machine.
    with staged(root, url, documents=0, time_scale=1, reply=12, reply_within_s=120, tokens="fast") as stage:
        stage.deadline_s = 400.0
        counted = storm(stage, most, 50, documents=6 * most, time_scale=1.0)
        assert stage.violations(undecided=frozenset()) == [], stage.told()
    drop_database(postgres, name)
    assert counted["high"] > 0.8 * most, counted
    assert counted["low"] <= 50, counted
    assert 0 < counted["429"] <= most, counted
    tally.count("provider: 429 storm")
    tally.figure("storm", ", ".join(f"{phase} {count}" for phase, count in counted.items()))
