"""Drafts: what an emulated model says about a document, before limits, prices and mishaps touch it."""

from __future__ import annotations

import json
import math
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from types import MappingProxyType
from typing import Any

from sandbox.answers import AnswerKey, Entry
from sandbox.errormodel import DEFAULTS, ErrorModel, Fate, Form, decide, draw, draw_confidence
from sandbox.forms import Answer, Schema, find_schema, spoil, state_confidence
from sandbox.logprobs import Scored, Span, score
from sandbox.tokens import encode_exactly

#: Median reasoning tokens by effort.
REASONING = MappingProxyType({"low": 120.0, "high": 400.0, "max": 1200.0})
#: Each word with its space is one token, so a text of n words has exactly n tokens.
_THOUGHT = "the text says what it is so we check one rule and then another to be sure"
WORDS = tuple(f" {word}" for word in _THOUGHT.split())
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Question:
    """What decides an answer: the document and its digest, the tier, the schema's home, and the turns so far."""

    sha: bytes
    text: str
    tier: str
    effort: str | None
    system: str
    turns: int

    @property
    def key(self) -> tuple[object, ...]:
        """What to keep a draft under; the text itself need not stay in memory."""
        return self.sha, self.tier, self.effort, sys.intern(self.system), self.turns


@dataclass(frozen=True, slots=True)
class Draft:
    """An answer's text and token ids, its reasoning tokens, and where its confidence lies."""

    content: str
    ids: bytes
    reasoning: int
    spans: tuple[Span, ...]
    is_json: bool

    def scored(self) -> list[Scored]:
        return score(self.content, self.spans)


class Author:
    """Writes drafts from an answer key and an error model, and keeps the recent ones."""

    def __init__(self, key: AnswerKey, seed: int = 0, models: Mapping[str, ErrorModel] = DEFAULTS) -> None:
        self.key = key
        self.models = models
        self.seed = seed
        self._kept: OrderedDict[tuple[object, ...], Draft] = OrderedDict()

    def write(self, question: Question) -> Draft:
        kept = self._kept.get(question.key)
        if kept is not None:
            return kept
        draft = self._kept[question.key] = self._write(question)
        if len(self._kept) > 8_192:
            self._kept.popitem(last=False)
        return draft

    def _write(self, question: Question) -> Draft:
        schema = read_schema(question.system)
        entry = self.key.find(question.sha, schema)
        right = self._right(question, schema, entry)
        wrongs = _wrongs(schema, right, entry)
        model = self.models[question.tier]
        hard = entry.hard if entry else None
        fate = decide(self.seed, question.sha, question.tier, question.turns, model, hard)
        answer = _choose(schema, right, wrongs, fate)
        doubts = self._doubts(question, answer, right, model)
        return self._express(question, _say(schema, answer, doubts), fate, doubts, (right, *wrongs), schema)

    def _right(self, question: Question, schema: Schema, entry: Entry | None) -> Answer:
        """What is true of the document, with a place for the confidence where the schema asks for one."""
        if entry is None:
            return schema.make(question.text, question.sha)
        right = schema.trim(entry.answer) or dict(entry.answer)
        if "confidence" in schema.properties:
            right = schema.trim({**right, "confidence": right.get("confidence")})
        return right

    def _doubts(self, question: Question, answer: Answer, right: Answer, model: ErrorModel) -> dict[str, float]:
        return {
            field: draw_confidence(self.seed, question.sha, question.tier, field, value == right.get(field), model)
            for field, value in answer.items()
            if field != "confidence"
        }

    def _express(
        self,
        question: Question,
        answer: Answer,
        fate: Fate,
        doubts: dict[str, float],
        rivals: tuple[Answer, ...],
        schema: Schema,
    ) -> Draft:
        shaped = _shape(answer, fate.form)
        content, starts = _lay_out(shaped) if isinstance(shaped, dict) else (shaped, {})
        spans = tuple(
            Span(start, shaped[field], doubts[field], _others(field, shaped[field], rivals, schema))
            for field, start in starts.items()
            if isinstance(shaped, dict) and field in doubts
        )
        reasoning = self._reasoning(question)
        return Draft(content, encode_exactly(content), reasoning, spans, isinstance(shaped, dict))

    def _reasoning(self, question: Question) -> int:
        if question.effort is None:
            return 0
        chance = draw(self.seed, question.sha, question.tier, "reasoning")
        spread = math.exp(0.5 * _NORMAL.inv_cdf(min(max(chance, 1e-6), 1 - 1e-6)))
        return max(1, round(REASONING[question.effort] * spread))


@lru_cache(maxsize=256)
def read_schema(system: str) -> Schema:
    return Schema(find_schema(system))


@lru_cache(maxsize=64)
def reason(tokens: int) -> str:
    """A chain of thought of exactly that many tokens."""
    return "".join(WORDS[i % len(WORDS)] for i in range(tokens))


def _wrongs(schema: Schema, right: Answer, entry: Entry | None) -> list[Answer]:
    """Wrong answers of the key, laid over the right one, as far as this schema shows a difference."""
    laid = [schema.trim({**right, **wrong}) for wrong in (entry.wrong if entry else ())]
    return [wrong for wrong in laid if wrong and wrong != right]


def _choose(schema: Schema, right: Answer, wrongs: list[Answer], fate: Fate) -> Answer:
    if not fate.is_wrong:
        return right
    return wrongs[int(fate.pick * len(wrongs))] if wrongs else spoil(schema, right, fate.pick)


def _say(schema: Schema, answer: Answer, doubts: dict[str, float]) -> Answer:
    if "confidence" not in answer:
        return answer
    stated = state_confidence(schema, answer["confidence"], min(doubts.values(), default=0.5))
    return {**answer, "confidence": stated}


def _shape(answer: Answer, form: Form) -> Answer | str:
    first = next(iter(answer))
    match form:
        case Form.BLANK:
            return ""
        case Form.PROSE:
            return "I am sorry, I could not decide what this text says."
        case Form.MISSING_FIELD:
            return {field: value for field, value in answer.items() if field != first}
        case Form.WRONG_TYPE:
            return {**answer, first: {"value": [answer[first]]}}
        case Form.VALID:
            return answer


def _lay_out(answer: Answer) -> tuple[str, dict[str, int]]:
    """The answer as JSON, and where each field's value starts, in bytes."""
    text = "{"
    starts: dict[str, int] = {}
    for field, value in answer.items():
        text += f"{', ' if starts else ''}{json.dumps(field, ensure_ascii=False)}: "
        starts[field] = len(text.encode())
        text += json.dumps(value, ensure_ascii=False)
    return text + "}", starts


def _others(field: str, value: Any, rivals: tuple[Answer, ...], schema: Schema) -> tuple[Any, ...]:
    """Values the model might have said instead, the likeliest first."""
    named = [rival[field] for rival in rivals if field in rival]
    return tuple(other for other in [*named, *schema.choices(field)] if other != value)[:40]
