"""Job files: what is refused, on which line, all at once; and what the prompt version depends on."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from schemas.answers import Answer
from schemas.errors import ConfigurationError
from schemas.jobs import TIERS, ConfidenceSignal, Input, Job, Tier, When
from schemas.money import PICO, Currency, Money
from schemas.promises import Promise
from schemas.requests import RunRequest
from tasks.jobs import list_jobs, load_job, write_new_job

GOOD = """\
name: tick
input: {path: data/*.parquet, id: id, text: text}
ladder: [flash, pro]
budget: 5 USD
"""
ANSWER = "from pydantic import BaseModel\n\n\nclass Answer(BaseModel):\n    topic: str\n    score: float = 0\n"
SCHEMA = {
    "type": "object",
    "properties": {"b": {"type": "string"}, "a": {"enum": ["x", "y"]}},
    "required": ["b", "a"],
}


def write_job(root: Path, text: str = GOOD, prompt: str = "Sort it. JSON.", answer: str = ANSWER) -> Path:
    folder = root / "jobs" / "tick"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.yaml").write_text(text, encoding="utf-8")
    (folder / "prompt.md").write_text(prompt, encoding="utf-8")
    (folder / "answer.py").write_text(answer, encoding="utf-8")
    return folder


def problems_of(root: Path) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load_job("tick", root)
    return [str(problem).removeprefix("jobs/tick/") for problem in caught.value.problems]


def make_job(**changes: object) -> Job:
    job = Job(
        name="tick",
        folder=Path("jobs/tick"),
        input=Input(path="data/*.parquet", id="id", text="text"),
        prompt="Sort it. JSON.",
        answer=Answer.from_schema("answer", SCHEMA),
        ladder=(TIERS["flash"], TIERS["pro"]),
        budget=Money.parse("5 USD"),
        concurrency={"flash": 256, "pro": 256},
    )
    return dataclasses.replace(job, **changes)  # type: ignore[arg-type]  # the tests name real fields


def test_a_short_job_gets_the_defaults(tmp_path: Path) -> None:
    write_job(tmp_path)
    job = load_job("tick", tmp_path)
    assert job.budget == Money(5 * PICO, Currency.USD)
    assert (job.escalate.below, job.tolerance, job.shard_rows) == (Decimal("0.85"), Decimal("0.01"), 1000)
    assert (job.confidence.signal, job.user_id) == (ConfidenceSignal.LOGPROBS, "job-tick")
    assert job.concurrency == {"flash": 256, "pro": 256}
    assert [tier.model for tier in job.ladder] == ["deepseek-flash", "deepseek-v4-pro"]


@pytest.mark.parametrize(
    ("budget", "name"), [("5 USD", None), ("{name: tickets-2026-11, cap: 5 USD}", "tickets-2026-11")]
)
def test_a_budget_is_a_runs_own_unless_it_has_a_name(tmp_path: Path, budget: str, name: str | None) -> None:
    write_job(tmp_path, GOOD.replace("5 USD", budget))
    job = load_job("tick", tmp_path)
    assert (job.budget, job.budget_name) == (Money(5 * PICO, Currency.USD), name)


@pytest.mark.parametrize(
    ("written", "asked", "holds"),
    [
        ("", None, When.NOW),
        ("when: now\n", None, When.NOW),
        ("when: off-peak\n", None, When.OFF_PEAK),
        ("when: off-peak\n", When.NOW, When.NOW),
        ("", When.OFF_PEAK, When.OFF_PEAK),
    ],
)
def test_what_is_asked_for_overrides_when_the_job_runs(
    tmp_path: Path, written: str, asked: When | None, holds: When
) -> None:
    write_job(tmp_path, GOOD + written)
    assert RunRequest(job="tick", when=asked).hours(load_job("tick", tmp_path)) is holds


def test_when_a_job_runs_changes_neither_its_prompt_version_nor_its_selection(tmp_path: Path) -> None:
    write_job(tmp_path, GOOD)
    now = load_job("tick", tmp_path)
    write_job(tmp_path, GOOD + "when: off-peak\n")
    later, request = load_job("tick", tmp_path), RunRequest(job="tick", when=When.OFF_PEAK)
    assert later.prompt_version == now.prompt_version
    assert request.selection(later) == RunRequest(job="tick").selection(now)


@pytest.mark.parametrize("name", ["tick", "jobs/tick", "jobs/tick/job.yaml"])
def test_a_job_is_found_by_name_folder_and_file(tmp_path: Path, name: str) -> None:
    write_job(tmp_path)
    assert load_job(name, tmp_path).name == "tick"


def test_a_promise_is_read_exactly_and_is_about_two_tiers(tmp_path: Path) -> None:
    promised = GOOD + "escalate: {target: 0.95, delta: 0.05}\n"
    write_job(tmp_path, promised)
    job = load_job("tick", tmp_path)
    assert job.escalate.promise == Promise(Fraction(95, 100), Fraction(5, 100))
    assert job.escalate.below is None
    write_job(tmp_path, promised.replace("ladder: [flash, pro]", "ladder: [flash, flash-thinking, pro]"))
    assert problems_of(tmp_path) == [
        "job.yaml:5: escalate: a promise is about two tiers, the first and the last; write `ladder: [flash, pro]`"
    ]


def test_everything_a_job_may_say_is_read(tmp_path: Path) -> None:
    full = GOOD.replace("text: text}", "text: text, partition: day, label: topic, filter: [[n, '>=', 3]]}")
    write_job(
        tmp_path,
        full + "tolerance: 0.05\nshard_rows: 2\nconcurrency: {pro: 9}\nmeasure: topic\n"
        "escalate: {below: 0.9}\nconfidence: {signal: field, field: score, fields: [topic]}\n"
        "tiers: {flash: {max_tokens: 64, deadline_s: 9.5}, own: {model: qwen}}\n",
    )
    job = load_job("tick", tmp_path)
    assert job.input.filter == (("n", ">=", 3),)
    assert (job.input.label, job.measure, job.input.partition) == ("topic", "topic", "day")
    assert job.concurrency == {"flash": 256, "pro": 9}
    assert (job.ladder[0].max_tokens, job.ladder[0].deadline_s, job.ladder[0].temperature) == (64, 9.5, 0)
    assert (job.escalate.below, job.tolerance) == (Decimal("0.9"), Decimal("0.05"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nmae: x", "job.yaml:5: nmae: unknown key; did you mean name?"),
        ("escalate:\n  belw: 0.5", "job.yaml:6: escalate.belw: unknown key; did you mean below?"),
        ("tiers:\n  flash:\n    temprature: 1", "job.yaml:7: tiers.flash.temprature: unknown key; did you mean temp"),
        ("budget: 6 USD", "job.yaml:5: budget: given twice; keep one"),
        ("escalate: {target: 0.95}", "job.yaml:5: escalate: a promise has both: write `{target: 0.95, delta: 0.05}`"),
        (
            "escalate: {target: 1.1, delta: 0.05}",
            "job.yaml:5: escalate.target: Input should be less than or equal to 1",
        ),
        ("escalate: {target: 0.9, delta: 0}", "job.yaml:5: escalate.delta: Input should be greater than 0"),
        (
            "escalate: {below: 0.8, delta: 0.1}",
            "job.yaml:5: escalate: a threshold or a promise: write `{below: 0.85}`, or",
        ),
        ("escalate: {below: 1.5}", "job.yaml:5: escalate.below: Input should be less than or equal to 1"),
        ("escalate: {below: .nan}", "job.yaml:5: escalate.below: Input should be a valid decimal"),
        ("escalate: 0.9", "job.yaml:5: escalate: must be a mapping"),
        ("when: later", "job.yaml:5: when: Input should be 'now' or 'off-peak'"),
        ("when:", "job.yaml:5: when: Input should be 'now' or 'off-peak'"),
        ("tolerance: -1", "job.yaml:5: tolerance: Input should be greater than or equal to 0"),
        ("shard_rows: 0", "job.yaml:5: shard_rows: Input should be greater than or equal to 1"),
        ("concurrency: 0", "job.yaml:5: concurrency.flash: Input should be greater than or equal to 1"),
        ("concurrency: {flsh: 3}", "job.yaml:5: concurrency: flsh is not in the ladder; did you mean flash?"),
        ("tiers: {mine: {max_tokens: 3}}", "job.yaml:5: tiers.mine.model: is required, since mine is not a tier"),
        ("tiers: {flash: {effort: high}}", "job.yaml:5: tiers.flash: effort has no effect without thinking"),
        ("tiers: {flash-thinking: {temperature: 1}}", "job.yaml:5: tiers.flash-thinking: temperature has no effect"),
        ("confidence: {signal: field}", "job.yaml:5: confidence: signal: field needs field: NAME"),
        (
            "confidence:\n  fields:\n  - topc",
            "job.yaml:7: confidence.fields.0: the answer has no field 'topc'; did you",
        ),
        ("confidence: {field: scor}", "job.yaml:5: confidence.field: the answer has no field 'scor'; did you mean"),
        ("measure: topic", "job.yaml:5: measure: there is nothing to measure against"),
        ("prompt: nowhere.md", "job.yaml:5: prompt: jobs/tick/nowhere.md cannot be read: no such file"),
        ("prompt:", "job.yaml:5: prompt: has no value"),
        ("answer: nowhere.py:A", "job.yaml:5: answer: there is no file jobs/tick/nowhere.py"),
        ("answer: answer.txt", "job.yaml:5: answer: answer.txt is neither FILE.py:CLASS nor FILE.json"),
        ("answer: answer.py:Anser", "answer.py: it defines no class 'Anser'; did you mean Answer?"),
        ("measure: &a x\nprompt: *a", "job.yaml:6: prompt: YAML aliases are not supported"),
        ("measure: !env HOME", "job.yaml:5: measure: the tag !env means nothing here"),
        ("a: b: c", "job.yaml:5: not valid YAML: mapping values are not allowed here"),
    ],
)
def test_a_mistake_is_reported_on_its_line(tmp_path: Path, line: str, expected: str) -> None:
    write_job(tmp_path, GOOD + line + "\n")
    found = problems_of(tmp_path)
    assert any(problem.startswith(expected) for problem in found), found


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("tick", "Tick", "job.yaml:1: name: 'Tick' is no job name"),
        ("tick", "123", "job.yaml:1: name: '123' is no job name"),
        ("tick", "tock", "job.yaml:1: name: is 'tock', but its folder is 'tick'"),
        ("id: id, ", "", "job.yaml:2: input.id: is required"),
        ("id: id", "id: text", "job.yaml:2: input: id, text and label must be three different columns"),
        ("path: data", "path: http://data", "job.yaml:2: input.path: http:// is not supported"),
        ("text: text}", "text: text, label: x}", "job.yaml:2: input.label: say which answer field"),
        ("text: text}", "text: text, filter: [[n, '~', 3]]}", "job.yaml:2: input.filter.0: unknown operator '~'"),
        ("text: text}", "text: text, filter: [[n, in, 3]]}", "job.yaml:2: input.filter.0: `in` and `not in` take"),
        ("text: text}", "text: text, filter: [[n, '==', null]]}", "job.yaml:2: input.filter.0: nothing equals null"),
        ("text: text}", "text: text, filter: [[n, '==']]}", "job.yaml:2: input.filter.0.2: a condition is a list"),
        ("[flash, pro]", "[flsh, pro]", "job.yaml:3: ladder.0: unknown tier 'flsh'; did you mean flash?"),
        ("[flash, pro]", "[flash, flash]", "job.yaml:3: ladder: a tier is named twice"),
        ("[flash, pro]", "[]", "job.yaml:3: ladder: Tuple should have at least 1 item"),
        ("[flash, pro]", "flash", "job.yaml:3: ladder: must be a list"),
        ("5 USD", "5 EUR", "job.yaml:4: budget: '5 EUR' is not a sum of money"),
        ("5 USD", "0 USD", "job.yaml:4: budget: a budget of nothing"),
        ("5 USD", "[5]", "job.yaml:4: budget: write a sum of money"),
        ("budget: 5 USD", "", "job.yaml:1: budget: is required"),
        ("5 USD", "{name: all}", "job.yaml:4: budget.cap: is required"),
        ("5 USD", "{cap: 5 USD}", "job.yaml:4: budget.name: is required"),
        ("5 USD", "{name: all, cap: 0 USD}", "job.yaml:4: budget.cap: a budget of nothing"),
        ("5 USD", "{name: All of it, cap: 5 USD}", "job.yaml:4: budget.name: 'All of it' is no name for a budget"),
        ("5 USD", "{name: all, cup: 5 USD}", "job.yaml:4: budget.cup: unknown key; did you mean cap?"),
    ],
)
def test_a_wrong_value_is_reported_on_its_line(tmp_path: Path, old: str, new: str, expected: str) -> None:
    write_job(tmp_path, GOOD.replace(old, new, 1))
    found = problems_of(tmp_path)
    assert any(problem.startswith(expected) for problem in found), found


def test_all_problems_of_all_files_are_reported_at_once_in_order(tmp_path: Path) -> None:
    text = GOOD.replace("id: id", "idd: id").replace("flash", "flsh").replace("5 USD", "much")
    write_job(tmp_path, text + "confidence: {fields: [topc]}\n", prompt="JSON {{date}}")
    found = problems_of(tmp_path)
    assert [problem.split(": ")[:2] for problem in found] == [
        ["job.yaml:2", "input.id"],
        ["job.yaml:2", "input.idd"],
        ["job.yaml:3", "ladder.0"],
        ["job.yaml:4", "budget"],
        ["job.yaml:5", "confidence.fields.0"],
        ["prompt.md:1", "{{date}} is not replaced by anything; a prefix that changes would break the provider's "
         "cache; only {{answer_schema}} may stand here"],
    ]  # fmt: skip


def test_an_empty_file_is_one_problem(tmp_path: Path) -> None:
    write_job(tmp_path, "")
    assert problems_of(tmp_path) == ["job.yaml:1: a job file is a mapping: `name: …`, `input: …` and so on"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a\n{{ date }}", "prompt.md:2: {{ date }} is not replaced"),
        (
            "a {{document}}",
            "prompt.md:1: {{document}} is not replaced by anything; the document is sent as a message",
        ),
        ("  \n", "prompt.md:1: the prompt is empty"),
        ("Sort it. {{answer_schema}}", "prompt.md:1: the prompt must contain the word JSON"),
        ("a\0", "prompt.md:1: the prompt holds a NUL"),
    ],
)
def test_a_prompt_that_would_cost_money_for_nothing_is_refused(tmp_path: Path, prompt: str, expected: str) -> None:
    write_job(tmp_path, prompt=prompt)
    assert problems_of(tmp_path)[0].startswith(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("x = 1\nclass :\n", "answer.py:2: not valid Python"),
        ("x = 1\ny = 1 / 0\n", "answer.py:2: importing it raised ZeroDivisionError"),
        ("Answer = 3\n", "answer.py: Answer is not a pydantic model"),
        (
            "from pydantic import RootModel\nclass Answer(RootModel[list[int]]): pass\n",
            "answer.py: the answer must be",
        ),
        (
            "from collections.abc import Callable\nfrom pydantic import BaseModel\n"
            "class Answer(BaseModel):\n    f: Callable[[], int]\n",
            "answer.py: Answer has no JSON Schema",
        ),
    ],
)
def test_an_answer_that_cannot_be_used_is_refused(tmp_path: Path, answer: str, expected: str) -> None:
    write_job(tmp_path, answer=answer)
    assert problems_of(tmp_path)[0].startswith(expected)


def test_an_edited_answer_is_seen_at_once_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    folder = write_job(tmp_path)
    before = load_job("tick", tmp_path)
    paths = list(sys.path)
    (folder / "answer.py").write_text(ANSWER.replace("topic", "matter"), encoding="utf-8")
    after = load_job("tick", tmp_path)
    assert (before.answer.fields, after.answer.fields) == (("score", "topic"), ("matter", "score"))
    assert sys.path == paths
    assert not (folder / "__pycache__").exists()


def test_an_unknown_job_names_those_that_exist(tmp_path: Path) -> None:
    write_job(tmp_path)
    with pytest.raises(ConfigurationError, match="no job 'tik' in jobs/; did you mean tick"):
        load_job("tik", tmp_path)
    with pytest.raises(ConfigurationError, match="known are: tick"):
        load_job("zzz", tmp_path)


def test_without_any_job_the_error_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="farthing new first"):
        load_job("first", tmp_path)


def test_a_new_job_is_valid_as_it_stands(tmp_path: Path) -> None:
    folder = write_new_job("tickets", tmp_path)
    assert folder == tmp_path / "jobs" / "tickets"
    assert load_job("tickets", tmp_path).input.path == "data/tickets/*.parquet"
    assert list_jobs(tmp_path) == ["tickets"]


def test_a_new_job_overwrites_nothing(tmp_path: Path) -> None:
    folder = write_job(tmp_path)
    with pytest.raises(ConfigurationError, match="jobs/tick exists already"):
        write_new_job("tick", tmp_path)
    assert (folder / "job.yaml").read_text() == GOOD


@pytest.mark.parametrize("name", ["", "Tick", "7", "../x", "a/b", "a" * 51, "a b", "ä"])
def test_a_name_that_is_no_folder_or_looks_like_a_run_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="is no job name"):
        write_new_job(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_parameters_of_each_mode_are_those_the_api_takes() -> None:
    assert list(TIERS["flash"].parameters("job-x").items()) == [
        ("thinking", {"type": "disabled"}),
        ("max_tokens", 1024),
        ("temperature", 0),
        ("response_format", {"type": "json_object"}),
        ("logprobs", True),
        ("user_id", "job-x"),
    ]
    assert list(TIERS["flash-thinking"].parameters("job-x").items()) == [
        ("thinking", {"type": "enabled"}),
        ("reasoning_effort", "high"),
        ("max_tokens", 8192),
        ("response_format", {"type": "json_object"}),
        ("user_id", "job-x"),
    ]


def test_turning_thinking_on_takes_along_what_belongs_to_it(tmp_path: Path) -> None:
    write_job(tmp_path, GOOD + "tiers: {pro: {thinking: true}}\n")
    pro = load_job("tick", tmp_path).tier("pro")
    assert (pro.thinking, pro.effort, pro.temperature, pro.logprobs) == (True, "high", None, False)


def test_the_schema_goes_where_the_prompt_says_or_to_the_end() -> None:
    schema = make_job().answer.schema_json
    assert make_job(prompt="A {{answer_schema}} JSON").prefix == f"A {schema} JSON"
    assert make_job(prompt="A\n").prefix.startswith("A\n\nAnswer with one JSON object")
    assert make_job(prompt="A\n").prefix.endswith(schema)


def test_line_ends_do_not_change_the_prefix() -> None:
    assert make_job(prompt="A\r\nB\r\n").prefix == make_job(prompt="A\nB").prefix


def test_key_order_of_the_schema_does_not_change_the_version() -> None:
    turned = {"required": ["b", "a"], "properties": dict(reversed(SCHEMA["properties"].items())), "type": "object"}  # type: ignore[attr-defined]  # it is a dict
    assert make_job(answer=Answer.from_schema("answer", turned)).prompt_version == make_job().prompt_version


def test_the_version_is_the_same_in_every_process() -> None:
    script = "from tests.unit.test_jobs import make_job; print(make_job().prompt_version)"
    root = Path(__file__).parents[2]
    versions = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert versions == {make_job().prompt_version}


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "Sort it. JSON!"},
        {"answer": Answer.from_schema("answer", {**SCHEMA, "required": ["a"]})},
        {"ladder": (TIERS["flash"],)},
        {"ladder": (TIERS["pro"], TIERS["flash"])},
        {"ladder": (TIERS["flash"].model_copy(update={"max_tokens": 7}), TIERS["pro"])},
        {"ladder": (TIERS["flash"].model_copy(update={"model": "other"}), TIERS["pro"])},
        {"ladder": (TIERS["flash"].model_copy(update={"logprobs": False}), TIERS["pro"])},
    ],
    ids=["prompt", "schema", "shorter", "order", "max_tokens", "model", "logprobs"],
)
def test_the_version_changes_with_all_that_an_answer_depends_on(changes: dict[str, object]) -> None:
    assert make_job(**changes).prompt_version != make_job().prompt_version


@pytest.mark.parametrize(
    "changes",
    [{"budget": Money.parse("9 USD")}, {"shard_rows": 7}, {"tolerance": Decimal(1)}],
    ids=["budget", "shard_rows", "tolerance"],
)
def test_the_version_ignores_what_no_answer_depends_on(changes: dict[str, object]) -> None:
    assert make_job(**changes).prompt_version == make_job().prompt_version


def test_a_deadline_is_no_part_of_the_request() -> None:
    patient = TIERS["flash"].model_copy(update={"deadline_s": 900.0})
    assert isinstance(patient, Tier)
    assert make_job(ladder=(patient, TIERS["pro"])).prompt_version == make_job().prompt_version
