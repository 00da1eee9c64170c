"""Every wrong configuration: whatever a user writes, a job loads or is refused with the key or line that is wrong.

Nothing else may come of it: no other exception, no hang, no secret in a message.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas.answers import Answer, AnswerRejected
from schemas.errors import ConfigurationError
from schemas.jobs import Job
from schemas.money import Money
from schemas.requests import RunRequest
from schemas.settings import Settings
from tasks.jobs import load_job

T = TypeVar("T")
SECRET = "sk-canary-7f3a"
ANSWER = '{"type": "object", "properties": {"topic": {"type": "string"}, "score": {"type": "number"}}}'
#: Every key that a job may have.
JOB: dict[str, Any] = {
    "name": "tick",
    "input": {
        "path": "data/*.parquet",
        "id": "id",
        "text": "text",
        "partition": "day",
        "label": "topic",
        "filter": [["n", ">=", 3], ["lang", "in", ["de", "en"]]],
    },
    "prompt": "prompt.md",
    "answer": "answer.json",
    "tiers": {"flash": {"max_tokens": 64, "deadline_s": 9.5}, "own": {"model": "qwen", "thinking": False}},
    "ladder": ["flash", "own", "pro"],
    "escalate": {"below": "0.9"},
    "confidence": {"signal": "field", "field": "score", "fields": ["topic"]},
    "budget": "5 USD",
    "tolerance": 0.05,
    "shard_rows": 20,
    "concurrency": {"flash": 3, "pro": 9},
    "measure": "topic",
    "match": {"topic": "exact", "score": {"tolerance": 0.1}},
}
QUICK = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

#: What people and programs write where something else belongs. Some of it is text that YAML reads as its own.
RAW = [
    *(
        "",
        "~",
        "null",
        "yes",
        "no",
        "on",
        "0",
        "-1",
        "00",
        "1_000",
        "0x10",
        "0o7",
        "1e3",
        "1e309",
        "-0",
        ".inf",
        ".nan",
    ),
    *(
        "1:30:00",
        "2026-01-01",
        "2026-13-45",
        "0001-01-01T00:00:00+23:59",
        "9" * 400,
        "9" * 5000,
        "1e900000",
        "-1 USD",
    ),
    *("9e999999 USD", "1e30 USD", "10000000 USD", "NaN USD", "Infinity", "5 EUR", "5 USD USD", "0.0000000000001 USD"),
    *(
        "[]",
        "{}",
        "[[]]",
        "[a, b",
        "{a: b",
        "- a",
        "'",
        '"',
        '"\\x"',
        "'\\0'",
        '"\\0"',
        '"\\ud800"',
        "@",
        "`",
        "%",
        "|",
        ">",
    ),
    *("&a x", "*a", "&a [*a]", "<<: {a: b}", "!!int ''", "!!int x", "!!float ''", "!!bool maybe", "!!timestamp x"),
    *(
        "!!binary '*'",
        "!!set {a}",
        "!!omap [a: 1]",
        "!!pairs [a: 1]",
        "!!python/object:os.system x",
        "!x y",
        "!!null x",
    ),
    *(
        "[1, [2, [3]]]",
        "{1: 2}",
        "{[a]: b}",
        "{? {a: b} : c}",
        "..",
        "../..",
        "/",
        "/dev/null",
        "~root",
        "s3://",
        "ftp://x",
    ),
    *(
        "s3://AKIA:hush@bucket/x",
        "gs://b",
        "a" * 300,
        "a/" * 3000,
        "é" * 200,
        "\u202e",
        "flash",
        "[flash, flash]",
        "pro",
    ),
    *(
        "answer.py:Answer",
        "answer.json:X",
        ".json",
        ":",
        "x.py",
        "prompt.md/",
        "jobs",
        "[" * 50 + "]" * 50,
        "[" * 500,
    ),
    *(
        "{a: " * 100 + "b" + "}" * 100,
        "\t",
        "a\tb",
        "# x",
        "a: b: c",
        "---",
        "...",
        "--- a\n--- b",
        "\ufeff",
        "\x7f",
        "\x85",
    ),
]
SCALARS = st.one_of(
    st.sampled_from(
        [None, True, False, 0, -1, 1, 10**6, 10**400, 0.5, -0.5, 1e300, float("inf"), float("nan"), "", " "]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.dates(),
    st.datetimes(),
    st.binary(max_size=4),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key and index of the job."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield (*path, key)
        yield from places(child, (*path, key))


PLACES = list(places(JOB))


def change(job: Any, path: tuple[Any, ...], how: str, value: Any) -> Any:
    """The job with one thing changed."""
    changed = copy.deepcopy(job)
    part = changed
    for key in path[:-1]:
        part = part[key]
    if how == "drop":
        del part[path[-1]]
    elif how == "rename" and isinstance(part, dict):
        part[f"{path[-1]}{value!r}"[:20]] = part.pop(path[-1])
    elif how == "wrap":
        part[path[-1]] = [part[path[-1]]]
    else:
        part[path[-1]] = value
    return changed


def write(root: Path, text: str | bytes, answer: str = ANSWER) -> None:
    folder = root / "jobs" / "tick"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.yaml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    (folder / "prompt.md").write_text("Sort it. JSON.", encoding="utf-8")
    (folder / "answer.json").write_text(answer, encoding="utf-8")


def judge(root: Path, text: str | bytes, key: str = "") -> Job | None:
    """The job; None where it is refused, in words that name the key or the line. Anything else fails the test."""
    write(root, text)
    job, error = attempt(lambda: load_job("tick", root), ConfigurationError)
    if job is not None:
        use(job)
        return job
    assert isinstance(error, ConfigurationError)
    assert error.problems
    for problem in error.problems:
        assert str(problem).startswith("jobs/tick/"), problem
    assert key in str(error)
    assert len(str(error)) < 20_000
    return None


def attempt(work: Callable[[], T], refused_by: type[Exception]) -> tuple[T, None] | tuple[None, Exception]:
    """What came of it, or the error that it may raise."""
    try:
        return work(), None
    except refused_by as error:
        return None, error


def use(job: Job) -> None:
    """What the rest of the product takes for granted of a job that was loaded."""
    request = RunRequest(job="tick")
    assert json.loads(json.dumps(request.selection(job), allow_nan=False))
    assert 0 < job.budget.pico < 2**63
    assert job.prompt_version.startswith("sha256:")
    assert set(job.concurrency) >= {tier.name for tier in job.ladder}
    assert str(job.budget)


def test_the_job_that_is_mutated_is_a_good_one(tmp_path: Path) -> None:
    assert judge(tmp_path, yaml.safe_dump(JOB)) is not None


@QUICK
@given(
    path=st.sampled_from(PLACES),
    how=st.sampled_from(["drop", "rename", "wrap", "put", "put", "put"]),
    value=VALUES,
    again=st.none() | st.tuples(st.sampled_from(PLACES), VALUES),
)
def test_a_changed_job_loads_or_is_refused_by_name(
    tmp_path: Path, path: tuple[Any, ...], how: str, value: Any, again: tuple[tuple[Any, ...], Any] | None
) -> None:
    job = change(JOB, path, how, value)
    if again is not None:
        with suppress(KeyError, IndexError, TypeError):  # the first change took its place away
            job = change(job, again[0], "put", again[1])
    judge(tmp_path, yaml.safe_dump(job, allow_unicode=True))


@QUICK
@given(path=st.sampled_from(PLACES), raw=st.sampled_from(RAW) | st.text(max_size=12))
def test_whatever_stands_for_a_value_is_read_or_refused(tmp_path: Path, path: tuple[Any, ...], raw: str) -> None:
    text = yaml.safe_dump(change(JOB, path, "put", "PLACEHOLDER"), default_flow_style=None, width=10**6)
    judge(tmp_path, text.replace("PLACEHOLDER", raw))


@pytest.mark.parametrize("raw", RAW)
def test_every_yaml_trick_in_the_one_place_that_yaml_types(tmp_path: Path, raw: str) -> None:
    """`input.filter` alone holds what YAML says, so whatever its constructors trip over is met there."""
    text = yaml.safe_dump(change(JOB, ("input", "filter", 0, 2), "put", "PLACEHOLDER"), default_flow_style=None)
    judge(tmp_path, text.replace("PLACEHOLDER", raw))


@QUICK
@given(
    line=st.integers(0, 30),
    inserted=st.sampled_from([*RAW, "\tname: x", "name: tick", "? x", "x: &a 1", "<<: *a"]) | st.text(max_size=20),
)
def test_a_line_too_many_is_read_or_refused(tmp_path: Path, line: int, inserted: str) -> None:
    lines = yaml.safe_dump(JOB).splitlines()
    lines.insert(line, inserted)
    judge(tmp_path, "\n".join(lines))


@QUICK
@given(place=st.integers(0, 600), junk=st.binary(min_size=1, max_size=4))
@example(place=0, junk=b"\xef\xbb\xbf")
@example(place=0, junk=b"\xff\xfe")
@example(place=9, junk=b"\0")
def test_any_bytes_in_the_file_are_read_or_refused(tmp_path: Path, place: int, junk: bytes) -> None:
    text = yaml.safe_dump(JOB).encode()
    judge(tmp_path, text[:place] + junk + text[place:])


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


BOMBS = {
    "aliases": yaml.safe_dump(JOB) + bomb(12),
    "aliases in the filter": yaml.safe_dump(JOB).replace(
        "  filter:", f"  filter: &f [n, in, {'[' * 5 + ']' * 5}, *f]\n  x:"
    ),
    "nested lists": "name: " + "[" * 5_000,
    "nested mappings": "{a: " * 3_000 + "}" * 3_000,
    "nested in the filter": "input:\n  filter: " + "[" * 400 + "]" * 400,
    "nested at the limit": "x: " + "[" * 180 + "]" * 180 + "\n" + yaml.safe_dump(JOB),
    "long key": "k" * 1_000_000 + ": 1\n" + yaml.safe_dump(JOB),
    "many keys": "\n".join(f"key{number}: 1" for number in range(3_000)),
    "long text": yaml.safe_dump(change(JOB, ("ladder", 0), "put", "f" * 1_000_000)),
    "long number": yaml.safe_dump(JOB).replace("budget: 5 USD", f"budget: {'9' * 100_000} USD"),
    "exponent": yaml.safe_dump(JOB).replace("budget: 5 USD", "budget: 1e999990 USD"),
    "exponent of a threshold": yaml.safe_dump(change(JOB, ("tolerance",), "put", "1e-999999")),
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_in_little_time_and_few_words(tmp_path: Path, text: str) -> None:
    """One that went off would take minutes or all memory, and so the test's worker with it."""
    judge(tmp_path, text)


@pytest.mark.parametrize(
    ("budget", "is_good"),
    [("9000000 USD", True), ("9223373 USD", False), ("1e30 USD", False), ("9e999999", False), ("1e-12 USD", True)],
)
def test_a_budget_that_the_ledger_cannot_hold_is_refused(tmp_path: Path, budget: str, is_good: bool) -> None:
    assert (judge(tmp_path, yaml.safe_dump(change(JOB, ("budget",), "put", budget)), "budget") is not None) is is_good


@QUICK
@given(name=st.sampled_from(RAW) | st.text(max_size=10))
def test_any_name_of_a_job_finds_one_or_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, yaml.safe_dump(JOB))
    _, error = attempt(lambda: load_job(name, tmp_path), ConfigurationError)
    assert error is None or str(error)


SCHEMAS = st.recursive(
    st.sampled_from([None, True, 0, -1, 1.5, "", "string", "object", "#", "#/$defs/x", "(", "http://x", [], {}]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "type",
                    "properties",
                    "required",
                    "$ref",
                    "$defs",
                    "enum",
                    "pattern",
                    "items",
                    "allOf",
                    "$schema",
                    "x",
                    "format",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@QUICK
@given(schema=SCHEMAS)
@example(schema={"type": "object", "properties": {"topic": {"pattern": "("}}})
@example(schema={"type": "object", "$ref": "#"})
@example(schema={"type": "object", "$schema": "http://nowhere"})
@example(schema={"type": "object", "$schema": True})
@example(schema={"type": "object", "properties": {"x": {"$ref": "#/$defs/nowhere"}}})
@example(schema={"type": "object", "$defs": {"x": {"$ref": "#/$defs/x"}}, "properties": {"x": {"$ref": "#/$defs/x"}}})
def test_any_answer_schema_is_an_answer_s_or_refused(schema: object) -> None:
    answer, error = attempt(lambda: Answer.from_schema("answer", schema), ValueError)
    if answer is None:
        assert str(error)
        return
    assert isinstance(answer.fields, tuple)
    for reply in ("{}", '{"topic": "x", "x": {"topic": [1]}}'):
        found, rejected = attempt(partial(answer.check, reply, "d1", "a text"), AnswerRejected)
        assert isinstance(found, dict) or str(rejected)


@pytest.mark.parametrize(
    "answer",
    ["", "[", "[" * 100_000, '{"type": "object"', "nul", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")],
)
def test_a_file_that_is_no_schema_is_refused_on_its_line(tmp_path: Path, answer: str) -> None:
    write(tmp_path, yaml.safe_dump(JOB), answer)
    with pytest.raises(ConfigurationError, match=r"jobs/tick/answer\.json"):
        load_job("tick", tmp_path)


@pytest.mark.parametrize(
    "code", ["raise SystemExit(3)", "import sys; sys.exit()", "def f(): f()\nf()", "1/0", "x = (", "\0"]
)
def test_an_answer_s_code_that_fails_is_refused_on_its_line(tmp_path: Path, code: str) -> None:
    write(tmp_path, yaml.safe_dump(change(JOB, ("answer",), "put", "answer.py:Answer")))
    (tmp_path / "jobs/tick/answer.py").write_text(f"class Answer: ...\n{code}\n")
    with pytest.raises(ConfigurationError, match=r"jobs/tick/answer\.py"):
        load_job("tick", tmp_path)


# The environment

NAMES = [
    *("FARTHING_DATABASE_URL", "FARTHING_HOME", "DEEPSEEK_API_KEY", "DEEPSEEK_BASE_URL", "FARTHING_LOG_JSON"),
    *("FARTHING_CURRENCY", "FARTHING_SANDBOX", "FARTHING_TIME_SCALE", "FARTHING_SANDBOX_CLOCK"),
]
TEXTS = st.sampled_from(
    [
        *(
            "",
            " ",
            "x",
            "-1",
            "nan",
            "inf",
            "1e400",
            "true",
            "maybe",
            "EUR",
            "2026-01-01",
            "http://",
            "://",
            "file:///x",
        ),
        *(f"http://u:{SECRET}@h", f"http://u:{SECRET}@localhost:999999", f"postgresql://u:{SECRET}@h:x/d", SECRET),
    ]
) | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=10)


@QUICK
@given(environment=st.dictionaries(st.sampled_from(NAMES), TEXTS, max_size=4))
@example(environment={"DEEPSEEK_API_KEY": SECRET, "FARTHING_SANDBOX": "1"})
@example(environment={"DEEPSEEK_API_KEY": SECRET, "FARTHING_SANDBOX": "1", "DEEPSEEK_BASE_URL": f"x://u:{SECRET}@"})
@example(environment={"FARTHING_TIME_SCALE": SECRET})
def test_any_environment_is_read_or_refused_without_its_secrets(environment: dict[str, str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        read, error = attempt(Settings, ValidationError)
    if read is None:
        assert SECRET not in f"{error} {error!r}"
    else:
        assert SECRET not in f"{read.api_key!r} {read.database_url!r}"


# What is asked for


@QUICK
@given(
    asked=st.dictionaries(
        st.sampled_from(["job", "partitions", "limit", "budget", "lanes", "root", "x"]), VALUES, max_size=4
    )
)
@example(asked={"job": "x", "budget": "9e999999"})
@example(asked={"job": "x", "budget": "1e30 USD"})
@example(asked={"job": "x", "budget": "0 USD"})
def test_any_request_is_one_or_is_refused(asked: dict[str, Any]) -> None:
    request, _ = attempt(lambda: RunRequest(**asked), ValidationError)
    if request is not None and request.budget is not None:
        assert 0 < Money.parse(request.budget).pico < 2**63


@QUICK
@given(text=st.text(max_size=30) | st.sampled_from(RAW))
def test_any_sum_of_money_is_one_or_is_refused(text: str) -> None:
    money, error = attempt(lambda: Money.parse(text), ValueError)
    assert 0 <= money.pico < 2**63 if money else len(str(error)) < 300
