"""Jobs: alone responsible for what a job is, for its shared prefix, and for the version of its prompt.

The prefix is the system message of every attempt, the same bytes each time, because the provider's cache works on
prefixes (design: deepseek.md, "Prompt cache"). The prompt version names everything that an answer depends on
besides the document, so an answer can be reused exactly when version and text are the same.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from enum import StrEnum
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from schemas.agreement import Agreement, Match
from schemas.answers import Answer, AnswerRejected, canonical_json
from schemas.money import Money
from schemas.promises import Promise

__all__ = ["TIERS", "Answer", "AnswerRejected", "Budget", "Confidence", "Escalate", "Input", "Job", "Tier", "When"]

OPERATORS = ("==", "!=", "<", "<=", ">", ">=", "in", "not in")
SCHEMA_PLACEHOLDER = "{{answer_schema}}"
SCHEMA_INTRODUCTION = "Answer with one JSON object that fits this JSON Schema:"
_PLACEHOLDER = re.compile(r"\{\{[^{}\n]*\}\}")
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,49}")
_NAME_RULE = "use a-z, 0-9, - and _, starting with a letter, at most 50"

ColumnName = Annotated[str, Field(min_length=1)]
FieldName = Annotated[str, Field(min_length=1)]


class _Part(BaseModel):
    """A part of a job file: no key that is not known, nothing changed after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def parse_cap(given: object) -> Money:
    """A budget's cap as a job file writes it. Raises ValueError with what to write instead."""
    if isinstance(given, Money):
        return given
    if not isinstance(given, str):
        raise ValueError("write a sum of money, like `25 USD`")
    cap = Money.parse(given)
    if cap.pico == 0:
        raise ValueError("a budget of nothing can pay for nothing; write a sum, like `25 USD`")
    return cap


def _check_budget_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a budget; {_NAME_RULE}")
    return name


class Budget(_Part):
    """A permitted sum: a run's own, or, with a name, one that every run of every job naming it draws on."""

    cap: Annotated[Money, BeforeValidator(parse_cap)]
    name: Annotated[str, AfterValidator(_check_budget_name)] | None


class ConfidenceSignal(StrEnum):
    """What confidence is read from; where one is missing, the next one down is used."""

    LOGPROBS = "logprobs"
    FIELD = "field"
    VALIDATORS = "validators"


class When(StrEnum):
    """When a run may make attempts: at any hour, or only while the provider charges off-peak prices."""

    NOW = "now"
    OFF_PEAK = "off-peak"


class Tier(_Part):
    """A rung of the ladder: a model and the parameters it is always called with.

    `deadline_s` bounds one whole attempt. The server keeps a queued request open for up to ten minutes, and an
    attempt that we give up on may be billed all the same, so it is generous.
    """

    name: str
    model: str = Field(min_length=1)
    thinking: bool = False
    effort: Literal["low", "high", "max"] | None = None
    max_tokens: int = Field(default=1024, ge=1, le=393_216)
    temperature: float | None = Field(default=None, ge=0, le=2)
    deadline_s: float = Field(default=180, gt=0, le=3600)
    logprobs: bool = False

    @model_validator(mode="after")
    def _refuse_what_the_api_ignores(self) -> Self:
        if self.thinking and self.temperature is not None:
            raise ValueError("temperature has no effect with thinking; remove it")
        if self.effort is not None and not self.thinking:
            raise ValueError("effort has no effect without thinking; remove it, or set thinking: true")
        return self

    @classmethod
    def defaults(cls, name: str, thinking: bool | None = None) -> dict[str, object]:
        """What tier `name` is made of before a job overrides it; {} for a name we do not know.

        Turning thinking on or off also changes the parameters that go only with the other mode.
        """
        known = TIERS[name].model_dump() if name in TIERS else {}
        if thinking is None or known.get("thinking") is thinking:
            return known
        return known | ({"thinking": True} | _THINKING if thinking else {"thinking": False} | _DIRECT)

    def parameters(self, user_id: str) -> dict[str, object]:
        """The request body besides model and messages: the same for every attempt, in the same order.

        Thinking is on at the provider unless it is told otherwise, so the mode is always said.
        """
        body: dict[str, object] = {"thinking": {"type": "enabled" if self.thinking else "disabled"}}
        if self.effort is not None:
            body["reasoning_effort"] = self.effort
        body["max_tokens"] = self.max_tokens
        if self.temperature is not None:
            body["temperature"] = self.temperature
        body["response_format"] = {"type": "json_object"}
        if self.logprobs:
            body["logprobs"] = True
        return body | {"user_id": user_id}


_DIRECT: dict[str, Any] = {"effort": None, "temperature": 0.0, "logprobs": True, "max_tokens": 1024}
_THINKING: dict[str, Any] = {"effort": "high", "temperature": None, "logprobs": False, "max_tokens": 8192}

#: The tiers a ladder may name without more ado. Reasoning counts as output, hence the larger bound with thinking.
TIERS: Mapping[str, Tier] = {
    tier.name: tier
    for tier in (
        Tier(name="flash", model="deepseek-flash", thinking=False, deadline_s=180, **_DIRECT),
        Tier(name="flash-thinking", model="deepseek-flash", thinking=True, deadline_s=600, **_THINKING),
        Tier(name="pro", model="deepseek-v4-pro", thinking=False, deadline_s=300, **_DIRECT),
    )
}


def _check_path(path: str) -> str:
    scheme, separator, _ = path.partition("://")
    if separator and scheme not in ("s3", "gs"):
        raise ValueError(f"{scheme}:// is not supported; use a local glob, s3:// or gs://")
    return path


def _check_condition(condition: tuple[str, str, Any]) -> tuple[str, str, Any]:
    column, operator, value = condition
    if operator not in OPERATORS:
        raise ValueError(f"unknown operator {operator!r}; use one of {' '.join(OPERATORS)}")
    if (operator in ("in", "not in")) != isinstance(value, list):
        raise ValueError("`in` and `not in` take a list, the other operators one value")
    if value is None or value == [] or (isinstance(value, list) and None in value):
        raise ValueError(f"nothing equals null, so the condition on {column!r} would select no row")
    for each in value if isinstance(value, list) else [value]:
        if not isinstance(each, str | int | float | date) or each in (math.inf, -math.inf) or each != each:
            raise ValueError("a value is text, a finite number, a date, true or false; quote it if it is text")
    return condition


#: One condition of a filter: column, operator, value.
Condition = Annotated[tuple[str, str, Any], AfterValidator(_check_condition)]


class Input(_Part):
    """What a job reads: a Parquet glob (local, s3:// or gs://) and the columns that matter.

    `filter` holds conditions (column, operator, value) that all must hold. `label` is a column with the right
    answers, if there is one: it is never sent, only compared (`Job.measure`).
    """

    path: Annotated[str, Field(min_length=1), AfterValidator(_check_path)]
    id: ColumnName
    text: ColumnName
    partition: ColumnName | None = None
    filter: tuple[Condition, ...] | None = None
    label: ColumnName | None = None

    @model_validator(mode="after")
    def _need_three_columns(self) -> Self:
        named = [self.id, self.text, *([self.label] if self.label else [])]
        if len(set(named)) < len(named):
            raise ValueError("id, text and label must be three different columns")
        return self


class Escalate(_Part):
    """The rule for going one tier up: an answer whose confidence is below `below`.

    Or, with `target` and `delta`, what keeps that promise over all documents of a run (schemas/promises.py); the
    answers of the first tier then wait until the run is certified.
    """

    below: Decimal | None = Field(default=None, ge=0, le=1)
    target: Decimal | None = Field(default=None, ge=0, le=1)
    delta: Decimal | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _one_rule(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not {"target", "delta"} & given.keys():
            return {"below": Decimal("0.85"), **given} if isinstance(given, dict) else given
        if "below" in given:
            raise ValueError("a threshold or a promise: write `{below: 0.85}`, or `{target: 0.95, delta: 0.05}`")
        if not {"target", "delta"} <= given.keys():
            raise ValueError("a promise has both: write `{target: 0.95, delta: 0.05}`")
        return given

    @property
    def promise(self) -> Promise | None:
        """What a run has to keep; None: a threshold decides."""
        if self.target is None or self.delta is None:
            return None
        return Promise(Fraction(self.target), Fraction(self.delta))


class Confidence(_Part):
    """Where confidence comes from.

    `fields` are the answer fields whose log probabilities count (none named: all but `field`); `field` is the
    answer field in which the model reports its own confidence.
    """

    signal: ConfidenceSignal = ConfidenceSignal.LOGPROBS
    fields: tuple[FieldName, ...] = ()
    field: FieldName | None = None

    @model_validator(mode="after")
    def _need_a_field_for_self_report(self) -> Self:
        if self.signal is ConfidenceSignal.FIELD and self.field is None:
            raise ValueError("signal: field needs field: NAME, the answer field that holds the confidence")
        return self


@dataclass(frozen=True)
class Job:
    """A named definition, complete and valid: input, prompt, answer, ladder and policy.

    `budget` is a hard cap for each run, or, where `budget_name` names a shared budget, for all runs that name it.
    `concurrency` bounds attempts in flight, by tier name. `tolerance` is the share of documents that may end as
    dead letters before a run counts as failed. `measure` is the answer field that `input.label` is compared with.
    `match` says of some answer fields how two answers are compared (`agreement`). A pilot is the same job run so that
    the first and the last tier answer every document; then `escalate` is not looked at.
    """

    name: str
    folder: Path
    input: Input
    prompt: str
    answer: Answer
    ladder: tuple[Tier, ...]
    budget: Money
    concurrency: Mapping[str, int]
    escalate: Escalate = field(default_factory=Escalate)
    confidence: Confidence = field(default_factory=Confidence)
    tolerance: Decimal = Decimal("0.01")
    shard_rows: int = 1000
    measure: str | None = None
    budget_name: str | None = None
    when: When = When.NOW
    match: Mapping[str, Match] = field(default_factory=dict)
    is_pilot: bool = False

    @property
    def promise(self) -> Promise | None:
        """What a run has to keep; None: a threshold decides, or it is a pilot, which asks both ends anyway."""
        return None if self.is_pilot else self.escalate.promise

    @cached_property
    def agreement(self) -> Agreement:
        """When two answers to a document say the same."""
        return find_agreement(self.answer, self.confidence, self.match)

    @cached_property
    def prefix(self) -> str:
        """The system message that every attempt of this job shares, byte for byte."""
        return render_prefix(self.prompt, self.answer)

    @cached_property
    def prompt_version(self) -> str:
        """`sha256:` over the prefix, the answer schema, and each tier's model and parameters."""
        ladder = [{"model": tier.model, "parameters": tier.parameters(self.user_id)} for tier in self.ladder]
        identity = {"prefix": self.prefix, "schema": self.answer.schema, "ladder": ladder}
        return f"sha256:{hashlib.sha256(canonical_json(identity).encode()).hexdigest()}"

    @property
    def user_id(self) -> str:
        """The provider isolates its cache by this value, so it is one per job and holds no personal data."""
        return f"job-{self.name}"

    def tier(self, name: str) -> Tier:
        """The ladder's tier of that name. Raises KeyError."""
        return {tier.name: tier for tier in self.ladder}[name]


def find_agreement(answer: Answer, confidence: Confidence, match: Mapping[str, Match]) -> Agreement:
    """By `match`; of fields that it does not name, those whose confidence counts, else all but the self-report."""
    counted = {name.split(".")[0] for name in confidence.fields} or {*answer.fields} - {confidence.field}
    return Agreement.of(answer.properties, answer.schema, match, counted)


def render_prefix(prompt: str, answer: Answer) -> str:
    """The prompt with the answer schema in its place, or appended; line ends are LF on every machine."""
    text = prompt.replace("\r\n", "\n").strip()
    if SCHEMA_PLACEHOLDER in text:
        return text.replace(SCHEMA_PLACEHOLDER, answer.schema_json)
    return f"{text}\n\n{SCHEMA_INTRODUCTION}\n{answer.schema_json}"


def check_prompt(prompt: str) -> list[tuple[int, str]]:
    """What is wrong with a prompt, as (line, problem)."""
    if not prompt.strip():
        return [(1, "the prompt is empty; say what the model is to do with each document")]
    problems = [
        (number, f"{found} is not replaced by anything; {_why_not(found)}")
        for number, line in enumerate(prompt.splitlines(), start=1)
        for found in _PLACEHOLDER.findall(line)
        if found != SCHEMA_PLACEHOLDER
    ]
    if SCHEMA_PLACEHOLDER in prompt and "json" not in prompt.lower():
        problems.append((1, "the prompt must contain the word JSON, or the provider refuses JSON mode"))
    if any(ord(character) == 0 or 0xD800 <= ord(character) <= 0xDFFF for character in prompt):
        problems.append((1, "the prompt holds a NUL or a lone surrogate; save it as plain UTF-8"))
    return problems


def _why_not(placeholder: str) -> str:
    if re.search("text|document|input|body|content", placeholder):
        return "the document is sent as a message of its own, after this prompt; remove it"
    return f"a prefix that changes would break the provider's cache; only {SCHEMA_PLACEHOLDER} may stand here"


def check_job_name(name: str) -> str:
    """`name` itself. Raises ValueError unless it fits a folder, a user id and a command line."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no job name; {_NAME_RULE}")
    return name
