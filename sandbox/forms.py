"""Answers by their JSON Schema: finding the schema in a prompt, and making, trimming and spoiling answers to it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from sandbox.errormodel import draw

Answer = dict[str, Any]
_BEFORE_SCHEMA = re.compile(r"(?:```\w*|[Ss]chema[^\n{]*)\s*(?=\{)")
#: An unknown document without a schema.
UNKNOWN: Answer = {"answer": "unknown"}
#: First words of scales that run from sure to unsure.
_SURE_FIRST = ("certain", "almost certain", "very high", "high", "sure", "very sure", "very confident")


@lru_cache(maxsize=256)
def find_schema(prompt: str) -> dict[str, Any] | None:
    """The first JSON object with `properties` after a code fence or the word schema, if any."""
    for match in _BEFORE_SCHEMA.finditer(prompt):
        try:
            found, _ = json.JSONDecoder().raw_decode(prompt, match.end())
        except ValueError:
            continue
        if isinstance(found.get("properties"), dict):
            return dict(found)
    return None


class Schema:
    """A JSON Schema of an object, or None where the prompt shows none."""

    def __init__(self, raw: dict[str, Any] | None) -> None:
        self._raw = raw or {}
        self.properties: dict[str, Any] = {
            name: self._resolve(node) for name, node in self._raw.get("properties", {}).items()
        }
        self.required = frozenset(self._raw.get("required", ())) - {"confidence"}

    def covers(self, answer: Mapping[str, Any]) -> bool:
        """Whether an answer of the key was written for this schema."""
        return self.required <= answer.keys()

    def trim(self, answer: Answer) -> Answer:
        """The answer in the schema's own fields and order; without a schema, as it is."""
        if not self.properties:
            return answer
        return {name: answer[name] for name in self.properties if name in answer}

    def choices(self, field: str) -> list[Any]:
        """Other values that a field may take."""
        return list(self.properties.get(field, {}).get("enum", ()))

    def make(self, text: str, sha: bytes) -> Answer:
        """A sane answer about a document that the key does not know."""
        if not self.properties:
            return dict(UNKNOWN)
        return {name: self._make(node, name, text, sha, 0) for name, node in self.properties.items()}

    def _resolve(self, node: dict[str, Any]) -> dict[str, Any]:
        """Follow a $ref into $defs, and take the first branch of a union that is not null."""
        if "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            return self._resolve(self._raw.get("$defs", {}).get(name, {}))
        for union in ("anyOf", "oneOf", "allOf"):
            if union in node:
                branches = [branch for branch in node[union] if branch.get("type") != "null"]
                return self._resolve(branches[0]) if branches else {"type": "null"}
        return node

    def _make(self, node: dict[str, Any], name: str, text: str, sha: bytes, depth: int) -> Any:
        node = self._resolve(node)
        chance = draw(sha, name, depth)
        if "const" in node:
            return node["const"]
        if node.get("enum"):
            return node["enum"][int(chance * len(node["enum"]))]
        match node.get("type", "string"):
            case "object":
                return {
                    key: self._make(child, key, text, sha, depth + 1)
                    for key, child in node.get("properties", {}).items()
                    if depth < 5
                }
            case "array":
                count = max(node.get("minItems", 0), 1 if depth < 3 else 0)
                return [self._make(node.get("items", {}), f"{name}{i}", text, sha, depth + 1) for i in range(count)]
            case "boolean":
                return chance < 0.5
            case "integer" | "number" as kind:
                return _number(node, chance, kind == "integer")
            case "null":
                return None
            case _:
                return _words(node, chance, text)


def _number(node: dict[str, Any], chance: float, is_whole: bool) -> float:
    low = node.get("minimum", node.get("exclusiveMinimum", 0))
    high = node.get("maximum", node.get("exclusiveMaximum", low + 10))
    return int(low + chance * (high - low)) if is_whole else round(low + chance * (high - low), 2)


def _words(node: dict[str, Any], chance: float, text: str) -> str:
    """A string that occurs in the document, so that quotes are grounded."""
    if node.get("format") in ("date", "date-time"):
        return "2026-01-01" if node["format"] == "date" else "2026-01-01T00:00:00Z"
    lines = [line.strip() for line in text[:20_000].splitlines() if line.strip()] or ["none"]
    length = min(node.get("maxLength", 60), 60)
    return lines[int(chance * len(lines))][: max(length, node.get("minLength", 0))]


def spoil(schema: Schema, answer: Answer, pick: float) -> Answer:
    """A plausible wrong answer: another value for the first field that can take one."""
    for field, value in answer.items():
        others = [choice for choice in schema.choices(field) if choice != value]
        if others:
            return {**answer, field: others[int(pick * len(others))]}
    field, value = next(iter(answer.items()))
    return {**answer, field: _other(value)}


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return "other" if value != "other" else "none"
    return type(value)()


def state_confidence(schema: Schema, example: Any, confidence: float) -> Any:
    """A confidence as the field `confidence` can say it: a bin of its scale, a percentage, or one of ten numbers."""
    node = schema.properties.get("confidence", {})
    if scale := node.get("enum"):
        place = int(confidence * len(scale))
        return scale[-1 - place] if str(scale[0]).lower().replace("_", " ") in _SURE_FIRST else scale[place]
    if node.get("type") == "integer" or (isinstance(example, int) and not isinstance(example, bool)):
        return round(confidence * node.get("maximum", 100))
    if node.get("type") == "string" or isinstance(example, str):
        return ("almost no chance", "unlikely", "about even", "likely", "almost certain")[int(confidence * 5)]
    return round((int(confidence * 10) + 0.5) / 10 * node.get("maximum", 1), 2)
