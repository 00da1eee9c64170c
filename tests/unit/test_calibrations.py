"""What follows from a pilot, reckoned a second time by hand and by brute force."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest
from rich.console import Console

from schemas.answers import Answer
from schemas.calibrations import TARGETS, Calibration, Policy, Standing, calibrate
from schemas.jobs import TIERS, Confidence, Input, Job
from schemas.money import Currency, Money
from schemas.pilots import Pair, Pilot
from schemas.promises import Promise, plan
from schemas.thresholds import streaming_allowance
from tasks.calibration_report import calibration_json, calibration_markdown, calibration_report
from tasks.jobs import load_job

USUAL = Promise.parse("0.95", "0.05")
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "note": {"type": "string"}, "sure": {"type": "number"}},
}
FIRST, LAST = 1_000_000, 20_000_000


def make_job(**changes: object) -> Job:
    job = Job(
        name="colours",
        folder=Path("jobs/colours"),
        input=Input(path="data/*.parquet", id="id", text="text"),
        prompt="Sort it. JSON.",
        answer=Answer.from_schema("answer", SCHEMA),
        ladder=(TIERS["flash"], TIERS["pro"]),
        budget=Money.parse("5 USD"),
        concurrency={"flash": 256, "pro": 256},
        confidence=Confidence(fields=("colour",), field="sure"),
    )
    return replace(job, **changes)  # type: ignore[arg-type]  # the tests name real fields


def make_pair(agrees: bool, confidence: float | None, **changes: object) -> Pair:
    last = {"colour": "red", "note": "a", "sure": 0.5}
    pair = Pair(
        first=last | {"colour": "red" if agrees else "blue"},
        last=last,
        confidence=confidence,
        prompt_tokens=100,
        output_tokens=10,
        first_pico=FIRST,
        last_pico=LAST,
    )
    return replace(pair, **changes)  # type: ignore[arg-type]  # the tests name real fields


def make_pilot(*pairs: Pair, documents: int = 10_000) -> Pilot:
    return Pilot(7, pairs, documents, 5 * 10**9, Currency.USD, is_simulated=True)


def draw_pilot(count: int = 200, seed: int = 1, wrong: float = 0.12) -> Pilot:
    """Documents of which that share differ, and these are less sure; some have no answer of the first tier."""
    random, pairs = Random(seed), []
    for number in range(count):
        agrees = random.random() >= wrong
        sureness = round(random.betavariate(14, 1.2) if agrees else random.betavariate(4, 2.2), 2)
        pair = make_pair(agrees, sureness, last_pico=random.randrange(10, 30) * 10**6)
        pairs.append(pair if number % 50 else replace(pair, first=None, confidence=None))
    return make_pilot(*pairs)


def policy(found: Calibration, name: str) -> Policy:
    return {each.name: each for each in found.policies}[name]


def replay(pilot: Pilot, accepts: Callable[[float], bool]) -> tuple[int, int, Fraction]:
    """By hand: documents to the last tier of the 9,800 others, accepted differences in the pilot, and the cost."""
    kept = [
        pair
        for pair in pilot.pairs
        if pair.first is not None and (pair.confidence is None or accepts(pair.confidence))
    ]
    wrong = sum(pair.first != pair.last for pair in kept)
    up = sum(pair.last_pico or 0 for pair in pilot.pairs if pair not in kept)
    climbing = -(-9800 * (200 - len(kept)) // 200)
    return climbing, wrong, 9800 * (Fraction(FIRST) + Fraction(up, 200))


@pytest.mark.parametrize("seed", range(5))
def test_policies_cost_what_the_pilot_s_documents_cost_under_them(seed: int) -> None:
    pilot = draw_pilot(seed=seed)
    found = calibrate(make_job(), pilot, USUAL)
    first = policy(found, "flash only")
    climbing, wrong, cost = replay(pilot, lambda sureness: True)
    assert (first.escalated, first.agreement) == (climbing, 1 - Fraction(wrong, 200))
    assert first.setting == "escalate: {below: 0}"
    assert first.pico == -(-cost.numerator // cost.denominator)
    last = policy(found, "pro only")
    mean = Fraction(sum(pair.last_pico or 0 for pair in pilot.pairs), 200)
    assert (last.escalated, last.agreement, last.standing) == (10_000, 1, Standing.ALL)
    assert last.pico == -(-(10_000 * mean).numerator // (10_000 * mean).denominator)

    held = policy(found, "threshold that held")
    below = float(held.setting.removeprefix("escalate: {below: ").removesuffix("}"))
    climbing, wrong, cost = replay(pilot, lambda sureness: sureness >= below)
    assert wrong <= 10
    assert (held.escalated, held.pico) == (climbing, -(-cost.numerator // cost.denominator))
    lower = [pair.confidence for pair in pilot.pairs if pair.confidence is not None and pair.confidence < below]
    assert replay(pilot, lambda sureness: sureness >= max(lower))[1] > 10

    daily = policy(found, "threshold for daily runs")
    below = float(daily.setting.removeprefix("escalate: {below: ").removesuffix("}"))
    climbing, wrong, cost = replay(pilot, lambda sureness: sureness >= below)
    allowed = streaming_allowance(200, USUAL)
    assert allowed == 4
    assert wrong <= allowed
    assert (daily.escalated, daily.standing) == (climbing, Standing.PROMISED_ALIKE)
    assert daily.pico == -(-cost.numerator // cost.denominator)


def test_a_certified_target_is_expected_to_cost_its_sample_and_what_lies_beyond_its_cut() -> None:
    """Every tenth document differs, and they lie evenly in the order: where the cut falls can be said by hand."""
    pairs = [make_pair(number % 10 != 9, 1 - number / 1000) for number in range(200)]
    found = policy(calibrate(make_job(), make_pilot(*pairs), USUAL), "certified target")
    planned = plan(USUAL, 10_000, piloted=200)
    assert planned.allowance is not None
    sample, passed = planned.size, planned.allowance + 1
    per_document = sample / 9800  # sampled disagreements for each document of the others that differs
    rank = next(rank for rank in range(200) if (rank + 1) // 10 >= passed * 200 / sample)
    assert 0.35 < rank / 200 < 0.5  # half of all documents hold the 500 that may remain, and chance wants its part
    beyond = (9800 - sample) * (200 - rank) / 200
    assert found.escalated == pytest.approx(sample + beyond, abs=1)
    assert found.pico == pytest.approx(9800 * FIRST + (sample + beyond) * LAST, rel=1e-9)
    assert found.agreement == pytest.approx(1 - (1 - per_document) * (rank // 10) / 200)
    assert found.standing is Standing.PROMISED
    assert found.setting == "escalate: {target: 0.95, delta: 0.05}"


def test_a_certified_target_is_about_whole_answers_and_climbs_with_what_is_invalid() -> None:
    """Ten of 200 have no first answer; of the others every tenth differs, in one field or by turns in two."""
    answers = [make_pair(True, 1 - number / 1000) for number in range(200)]
    planned = plan(USUAL, 10_000, piloted=200 + 490)
    assert planned.allowance is not None
    rank = next(rank for rank in range(190) if (rank + 1) // 10 >= (planned.allowance + 1) * 190 / planned.size)
    beyond = (planned.population - planned.size) * (190 - rank) / 190
    for fields in (("colour",), ("colour", "note")):
        pairs = []
        for number, pair in enumerate(answers):
            name = fields[number // 10 % len(fields)]
            differs = {"first": {**(pair.last or {}), name: "blue" if name == "colour" else "b"}}
            pairs.append(replace(pair, **differs) if number % 10 == 9 else pair)  # type: ignore[arg-type]
        pairs = [*pairs[:190], *[replace(pair, first=None, confidence=None) for pair in pairs[190:]]]
        job = make_job(confidence=Confidence(fields=fields, field="sure"))
        found = policy(calibrate(job, make_pilot(*pairs), USUAL), "certified target")
        assert found.escalated == pytest.approx(490 + planned.size + beyond, abs=1)


def test_with_tiers_between_policies_say_which_ladder_they_mean_and_reuse_nothing() -> None:
    job = make_job(ladder=(TIERS["flash"], TIERS["flash-thinking"], TIERS["pro"]))
    found, short = (calibrate(each, draw_pilot(), USUAL) for each in (job, make_job()))
    assert (found.left, short.left) == (10_000, 9_800)
    for each, other in zip(found.policies, short.policies, strict=True):
        if each.name != "pro only":
            assert each.setting == f"ladder: [flash, pro]\n{other.setting}"
            assert each.pico is not None
            assert other.pico is not None
            assert 1.0 < each.pico / other.pico < 1.05
    assert "says nothing of flash-thinking" in found.notes[0]


@pytest.mark.parametrize("ladder", ["flash, pro", "flash, flash-thinking, pro"])
def test_every_setting_is_what_a_job_file_can_say(ladder: str, tmp_path: Path) -> None:
    names = ladder.split(", ")
    found = calibrate(make_job(ladder=tuple(TIERS[name] for name in names)), draw_pilot(), USUAL)
    assert len(found.policies) == 5
    (tmp_path / "prompt.md").write_text("Sort it. JSON.")
    (tmp_path / "answer.schema.json").write_text(json.dumps(SCHEMA | {"required": ["colour"]}))
    told = "name: colours\ninput: {path: x, id: id, text: text}\nprompt: prompt.md\nanswer: answer.schema.json\n"
    for each in found.policies:
        has_ladder = each.setting.startswith("ladder: ")
        usual = "" if has_ladder else f"ladder: [{ladder}]\n"
        (tmp_path / "job.yaml").write_text(f"{told}budget: 5 USD\n{usual}{each.setting}\n")
        job = load_job(str(tmp_path / "job.yaml"))
        wanted = names[-1:] if each.name == "pro only" else [names[0], names[-1]]
        assert [tier.name for tier in job.ladder] == wanted
        if "escalate" in each.setting:
            assert (job.promise == USUAL) is (each.name == "certified target")


def test_the_cheapest_policy_is_named_and_must_meet_the_target() -> None:
    agreeing = [make_pair(number % 50 != 49, 0.9) for number in range(100)]
    found = calibrate(make_job(), make_pilot(*agreeing), USUAL)
    assert found.cheapest_that_held == policy(found, "flash only")
    assert found.cheapest_that_held.standing is Standing.HELD
    shown = calibration_markdown(found).replace("\\", "")
    assert "| certified target * |" in shown
    assert "| flash only |" in shown
    assert "held in the pilot, and promises nothing: flash only." in shown
    assert found.cheapest_promised == policy(found, "certified target")
    differing = [make_pair(number % 10 == 0, 0.9) for number in range(100)]
    found = calibrate(make_job(), make_pilot(*differing), USUAL)
    assert policy(found, "flash only").standing is Standing.FAILED
    assert (
        found.cheapest_that_held == found.cheapest_promised == policy(found, "pro only")
    )  # what a sample could save is less than flash costs
    unknown = [replace(pair, first_pico=None, last_pico=None) for pair in agreeing]
    found = calibrate(make_job(), make_pilot(*unknown), USUAL)
    assert found.cheapest_that_held is found.cheapest_promised is None
    assert {each.pico for each in found.policies} == {None}


def test_signals_are_those_that_the_ledger_has() -> None:
    pairs = [
        make_pair(True, 0.9, output_tokens=5),
        make_pair(True, 0.9, output_tokens=7),
        make_pair(False, 0.4, output_tokens=6, is_repaired=True),
        make_pair(False, None, first=None),
    ]
    found = {each.name: each for each in calibrate(make_job(), make_pilot(*pairs), USUAL).signals}
    assert list(found) == ["confidence", "self-report", "shorter answer", "shorter document", "not repaired"]
    confidence, report, shorter = found["confidence"], found["self-report"], found["shorter answer"]
    assert (confidence.answers, confidence.auc, confidence.tied) == (3, 1, Fraction(2, 3))
    assert confidence.brier == pytest.approx((0.01 + 0.01 + 0.16) / 3)
    assert [name for name, each in found.items() if each.brier is not None] == ["confidence", "self-report"]
    assert (report.auc, report.accepted) == (Fraction(1, 2), (0, 0, 0))  # all the same: none can be accepted alone
    assert (shorter.auc, shorter.brier) == (Fraction(1, 2), None)
    assert [each.accepted for each in (confidence, shorter)] == [(2, 2, 2), (1, 1, 1)]
    assert len(TARGETS) == 3
    less = make_job(ladder=(TIERS["flash-thinking"], TIERS["pro"]))
    thought = [replace(pair, reasoning_tokens=number) for number, pair in enumerate(pairs)]
    assert "less thinking" in [each.name for each in calibrate(less, make_pilot(*thought), USUAL).signals]


def test_an_answer_without_a_number_is_below_no_threshold_and_counts_against_all() -> None:
    pairs = [make_pair(number >= 12, None) for number in range(100)]
    found = calibrate(make_job(), make_pilot(*pairs), USUAL)
    assert found.signals[0].name == "self-report"
    assert [each.name for each in found.policies] == ["flash only", "pro only", "certified target"]
    assert policy(found, "flash only").agreement == Fraction(88, 100)


def test_no_threshold_keeps_only_answers_without_a_number_where_others_are_entirely_sure() -> None:
    bare = [make_pair(True, None)] * 80
    for score, names in ((0.9, True), (1.0, False)):
        found = calibrate(make_job(), make_pilot(*bare, *[make_pair(False, score)] * 20), USUAL)
        held = [each for each in found.policies if each.name == "threshold that held"]
        assert [(each.setting, each.standing) for each in held] == [
            ("escalate: {below: 1}", Standing.HELD) for _ in range(names)
        ]


def test_agreement_counts_what_no_tier_answered_as_different() -> None:
    pairs = [make_pair(True, 0.9)] * 8 + [make_pair(True, 0.9, first=None), make_pair(True, 0.9, last=None)]
    found = calibrate(make_job(), make_pilot(*pairs), USUAL)
    assert (found.agreement.count, found.agreement.of, found.unanswered) == (8, 10, (1, 1))
    assert found.differing == {"colour": 0}


@pytest.mark.parametrize(
    ("better", "worse", "gain", "says"),
    [
        (6, 0, True, "by the labels pro is better than flash: on 6 documents only pro is right, on 0 only flash"),
        (5, 0, None, "these 25 labels do not tell whether pro is better than flash"),  # by chance one time in sixteen
        (4, 0, None, "it may be right up to 34.2 % more often: label more documents"),
        (1, 9, False, "by the labels pro is worse than flash, and costs more"),
    ],
)
def test_a_ladder_that_does_not_earn_its_money_is_named(
    better: int, worse: int, gain: bool | None, says: str
) -> None:
    def labelled(first: bool, last: bool) -> Pair:
        return make_pair(first == last, 0.9, is_first_right=first, is_last_right=last)

    pairs = [labelled(False, True)] * better + [labelled(True, False)] * worse + [labelled(True, True)] * 20
    found = calibrate(make_job(), make_pilot(*pairs, make_pair(True, 0.9)), USUAL)
    assert found.labels is not None
    assert (found.labels.gain, found.labels.first.of) == (gain, better + worse + 20)
    assert any(says in note for note in found.notes), found.notes


def test_a_tier_is_dropped_only_where_labels_bound_what_it_buys() -> None:
    same = make_pair(True, 0.9, is_first_right=True, is_last_right=True)
    apart = make_pair(False, 0.9, is_first_right=False, is_last_right=True)
    few, many = (calibrate(make_job(), make_pilot(*[same] * number, apart), USUAL) for number in (99, 299))
    assert any("label more" in note for note in few.notes)
    (told,) = [note for note in many.notes if "`ladder: [flash]` is about as good" in note]
    assert many.labels is not None
    assert 0.015 < many.labels.most <= 0.02
    assert "right at most 1.6 % more often" in told
    worse = [replace(apart, is_first_right=True, is_last_right=False, last_pico=FIRST)] * 9
    (told,) = [
        note for note in calibrate(make_job(), make_pilot(*worse), USUAL).notes if note.startswith("by the labels")
    ]
    assert "costs more" not in told


def test_free_text_that_never_agrees_is_named() -> None:
    pairs = [make_pair(True, 0.9, first={"colour": "red", "note": f"{number}"}) for number in range(20)]
    found = calibrate(make_job(confidence=Confidence()), make_pilot(*pairs), USUAL)
    assert found.differing == {"colour": 0, "note": 20, "sure": 20}
    assert any("`match: {note: ignore}`" in note for note in found.notes)


def test_a_pilot_of_every_document_leaves_no_policy_to_choose() -> None:
    pilot = make_pilot(*[make_pair(True, 0.9)] * 20, documents=20)
    found = calibrate(make_job(), pilot, USUAL)
    assert found.policies == ()
    assert "the pilot asked every document" in found.notes[0]


def test_a_calibration_is_shown_as_it_is() -> None:
    pairs = draw_pilot().pairs
    labelled = [replace(pair, is_first_right=False, is_last_right=True) for pair in pairs[:10]]
    found = calibrate(make_job(), make_pilot(*labelled, *pairs[10:]), USUAL)
    console = Console(width=140, file=io.StringIO(), color_system=None)
    for part in calibration_report(found):
        console.print(part)
    shown, told = console.file.getvalue(), calibration_markdown(found)  # type: ignore[attr-defined]  # it is a StringIO
    agreed, cheapest = found.agreement, found.cheapest_promised
    assert cheapest is not None
    for words in (
        f"{agreed.count} of 200",
        f"{agreed.low * 100:.2f} to {agreed.high * 100:.2f} %",
        f"{cheapest.name} *",
        "SIMULATED",
        "by the labels pro is better than flash",
    ):
        assert words in shown
        assert words in told.replace("\\", "").replace("\u00a0", " ")
    seen = calibration_json(found)
    assert json.loads(json.dumps(seen)) == seen
    assert seen["agreement"] == {"count": agreed.count, "of": 200, "low": agreed.low, "high": agreed.high}
    assert [each["cost_pico"] for each in seen["policies"]] == [each.pico for each in found.policies]
    assert seen["cheapest_promised"] == cheapest.name
    assert (seen["labels"]["only_last_right"], seen["labels"]["is_last_better"]) == (10, True)


def test_a_threshold_is_short_and_accepts_what_it_should() -> None:
    scores = [0.123456789, 0.5, 0.87654321, 0.9999999999]
    strict = Promise.parse("0.99", "0.05")
    for allowed in range(4):  # so many of the least sure differ
        pairs = [make_pair(number >= allowed, score) for number, score in enumerate(scores)] * 50
        found = policy(calibrate(make_job(), make_pilot(*pairs), strict), "threshold that held")
        below = found.setting.removeprefix("escalate: {below: ").removesuffix("}")
        assert [score >= float(below) for score in scores] == [number >= allowed for number in range(4)]
        assert len(below) <= 12
        assert 0 <= Decimal(below) <= 1
