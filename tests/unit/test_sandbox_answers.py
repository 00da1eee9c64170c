"""What the emulator answers: the key, the error model it states, and how confidence shows."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import orjson
import pytest

from sandbox.answers import AnswerKey
from sandbox.drafts import Author, Draft, Question
from sandbox.errormodel import DEFAULTS, ErrorModel, Form, decide
from sandbox.errors import SandboxError
from sandbox.forms import Schema, find_schema, state_confidence
from sandbox.logprobs import encode_logprobs

LABELS = ["Commercial", "Copyleft", "Copyleft Limited", "Permissive"]
SCHEMA = {
    "properties": {"confidence": {"type": "number"}, "category": {"$ref": "#/$defs/C"}},
    "required": ["category", "confidence"],
    "type": "object",
    "$defs": {"C": {"enum": LABELS, "type": "string"}},
}
SYSTEM = f"Classify.\n\nThe JSON object must fit this JSON Schema:\n{json.dumps(SCHEMA)}"
SURE = ErrorModel(0.0, 0.0, 0.0, (14.0, 1.2), (4.0, 2.2))


def sha(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def write_key(path: Path, *lines: dict[str, object]) -> AnswerKey:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return AnswerKey([path])


def entry(text: str, category: str = "Permissive", **more: object) -> dict[str, object]:
    wrong = [{"category": "Copyleft"}, {"category": "Commercial"}]
    return {"sha256": sha(text).hex(), "answer": {"category": category, "owner": "X"}, "wrong": wrong, **more}


def question(text: str, tier: str = "flash", turns: int = 1, system: str = SYSTEM) -> Question:
    return Question(sha(text), text, tier, "high" if "thinking" in tier else None, system, turns)


def author(key: AnswerKey, **shares: float) -> Author:
    model = ErrorModel(
        shares.get("wrong", 0.0), shares.get("invalid", 0.0), shares.get("blank", 0.0), (14, 1.2), (4, 2.2)
    )
    return Author(key, 0, dict.fromkeys(DEFAULTS, model))


def product(draft: Draft, field: str) -> float:
    """The probability of a field's value: the product over the tokens that lie in it."""
    span = next(s for s in draft.spans if s.value == json.loads(draft.content)[field])
    end = span.start + len(json.dumps(span.value).encode())
    at, total = 0, 0.0
    for token in draft.scored():
        if at < end and at + len(token.piece) > span.start:
            total += token.logprob
        at += len(token.piece)
    return math.exp(total)


def test_a_known_document_gets_its_keys_answer_in_the_schemas_fields(tmp_path: Path) -> None:
    key = write_key(tmp_path / "key", entry("a", "Copyleft Limited"))
    said = json.loads(author(key).write(question("a")).content)
    assert list(said) == ["confidence", "category"]
    assert said["category"] == "Copyleft Limited"


def test_a_job_with_another_schema_gets_its_own_line(tmp_path: Path) -> None:
    other = {"sha256": sha("a").hex(), "answer": {"pages": 7}}
    key = write_key(tmp_path / "key", entry("a"), other)
    system = 'schema: {"properties": {"pages": {"type": "integer"}}, "required": ["pages"]}'
    assert json.loads(author(key).write(question("a", system=system)).content) == {"pages": 7}


def test_without_a_schema_the_key_is_answered_as_it_stands(tmp_path: Path) -> None:
    key = write_key(tmp_path / "key", entry("a"))
    assert json.loads(author(key).write(question("a", system="json please")).content) == entry("a")["answer"]


def test_an_unknown_document_gets_an_answer_made_from_the_schema(tmp_path: Path) -> None:
    said = json.loads(author(AnswerKey()).write(question("new text")).content)
    assert said["category"] in LABELS
    assert said == json.loads(author(AnswerKey()).write(question("new text")).content)
    assert json.loads(author(AnswerKey()).write(question("x", system="json")).content) == {"answer": "unknown"}


def test_a_made_answer_quotes_the_document_and_fills_nested_fields() -> None:
    schema = Schema(
        {
            "properties": {
                "quotes": {"type": "array", "items": {"$ref": "#/$defs/Q"}},
                "note": {"anyOf": [{"type": "null"}, {"type": "string"}]},
                "score": {"type": "integer", "minimum": 1, "maximum": 5},
            },
            "$defs": {"Q": {"type": "object", "properties": {"quote": {"type": "string"}}}},
        }
    )
    text = "First line.\nSecond line."
    made = schema.make(text, sha(text))
    assert made["quotes"][0]["quote"] in text
    assert 1 <= made["score"] <= 5


def test_a_wrong_answer_comes_from_the_key(tmp_path: Path) -> None:
    key = write_key(tmp_path / "key", entry("a"))
    assert json.loads(author(key, wrong=1.0).write(question("a")).content)["category"] in ("Copyleft", "Commercial")


def test_an_unknown_documents_wrong_answer_differs_and_stays_in_the_schema() -> None:
    right = json.loads(author(AnswerKey()).write(question("t")).content)
    wrong = json.loads(author(AnswerKey(), wrong=1.0).write(question("t")).content)
    assert wrong["category"] != right["category"]
    assert wrong["category"] in LABELS


@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_fields_tokens_multiply_to_its_confidence(tmp_path: Path, is_wrong: bool) -> None:
    key = write_key(tmp_path / "key", entry("a"), entry("b", "Copyleft Limited"))
    for text in "ab":
        draft = author(key, wrong=float(is_wrong)).write(question(text))
        span = next(s for s in draft.spans if isinstance(s.value, str))
        assert product(draft, "category") == pytest.approx(span.confidence, rel=1e-4)
        stated = json.loads(draft.content)["confidence"]
        assert abs(stated - span.confidence) <= 0.05


def test_the_token_where_labels_part_names_the_other_labels(tmp_path: Path) -> None:
    key = write_key(tmp_path / "key", entry("a"))
    decisive = min(author(key).write(question("a")).scored(), key=lambda token: token.logprob)
    assert decisive.piece == b"Perm"
    assert {b"Cop", b"Commercial"} & {piece for piece, _ in decisive.others}
    assert math.exp(decisive.logprob) + sum(math.exp(p) for _, p in decisive.others) <= 1.0


def test_logprobs_on_the_wire_hold_bytes_and_sorted_alternatives(tmp_path: Path) -> None:
    key = write_key(tmp_path / "key", entry("a"))
    draft = author(key).write(question("a"))
    content = orjson.loads(encode_logprobs(draft.scored(), 20))["content"]
    assert b"".join(bytes(token["bytes"]) for token in content).decode() == draft.content
    for token in content:
        top = [other["logprob"] for other in token["top_logprobs"]]
        assert len(top) == 20
        assert top == sorted(top, reverse=True)
        assert token["token"] == token["top_logprobs"][0]["token"]


@pytest.mark.parametrize("tier", sorted(DEFAULTS))
def test_each_tier_keeps_its_stated_shares(tier: str) -> None:
    model, n = DEFAULTS[tier], 20_000
    fates = [decide(7, str(i).encode(), tier, 1, model, None) for i in range(n)]
    wrong = sum(fate.is_wrong for fate in fates) / n
    assert wrong == pytest.approx(model.wrong, abs=4 * math.sqrt(model.wrong / n))
    invalid = sum(fate.form not in (Form.VALID, Form.BLANK) for fate in fates) / n
    assert invalid == pytest.approx(model.invalid, abs=4 * math.sqrt(model.invalid / n))


def test_hard_documents_fail_at_both_tiers_together() -> None:
    n = 10_000
    flash = {i for i in range(n) if decide(1, str(i).encode(), "flash", 1, DEFAULTS["flash"], None).is_wrong}
    pro = {i for i in range(n) if decide(1, str(i).encode(), "pro", 1, DEFAULTS["pro"], None).is_wrong}
    assert len(flash & pro) > 3 * len(flash) * len(pro) / n


def test_any_scale_of_difficulty_keeps_the_stated_share(tmp_path: Path) -> None:
    texts = [str(i) for i in range(4_000)]
    key = write_key(tmp_path / "key", *(entry(text, hard=0.08 if i % 2 else 0.3) for i, text in enumerate(texts)))
    entries = [key.find(sha(text), Schema(None)) for text in texts]
    hards = sorted(found.hard for found in entries if found and found.hard is not None)
    assert all(abs(hard - i / 4_000) < 0.05 for i, hard in enumerate(hards))


def test_a_repair_mends_nine_in_ten_invalid_answers() -> None:
    model = ErrorModel(0.0, 1.0, 0.0, (14, 1.2), (4, 2.2))
    fates = [decide(0, str(i).encode(), "flash", 2, model, None) for i in range(4_000)]
    assert sum(fate.form is Form.VALID for fate in fates) / 4_000 == pytest.approx(0.9, abs=0.02)


def test_answers_do_not_depend_on_the_order_or_number_of_requests(tmp_path: Path) -> None:
    key = write_key(tmp_path / "key", *(entry(str(i)) for i in range(50)))
    forwards, backwards = Author(key, 3), Author(key, 3)
    first = {i: forwards.write(question(str(i))) for i in range(50)}
    assert {i: backwards.write(question(str(i))) for i in reversed(range(50))} == first


def test_an_invalid_answer_misses_the_schema(tmp_path: Path) -> None:
    key = write_key(tmp_path / "key", *(entry(str(i)) for i in range(60)))
    spoiled = [author(key, invalid=1.0).write(question(str(i))) for i in range(60)]
    assert {draft.is_json for draft in spoiled} == {True, False}
    for draft in spoiled:
        if draft.is_json:
            said = json.loads(draft.content)
            assert set(said) != {"confidence", "category"} or not isinstance(said["confidence"], float)


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"enum": ["low", "medium", "high"]}, "high"),
        ({"enum": ["almost certain", "likely", "unlikely"]}, "almost certain"),
        ({"type": "integer"}, 93),
        ({"type": "integer", "maximum": 10}, 9),
        ({"type": "number"}, 0.95),
        ({"type": "string"}, "almost certain"),
    ],
)
def test_confidence_is_stated_in_the_fields_own_scale(node: dict[str, object], said: object) -> None:
    assert state_confidence(Schema({"properties": {"confidence": node}}), None, 0.93) == said


def test_a_schema_is_found_after_a_fence_or_the_word_but_an_example_is_not_one() -> None:
    schema = '{"properties": {"a": {"type": "string"}}}'
    assert find_schema(f"```json\n{schema}\n```") == json.loads(schema)
    assert find_schema(f'```json\n{{"a": "x"}}\n```\nJSON Schema:\n{schema}') == json.loads(schema)
    assert find_schema('Answer like {"a": "x"}') is None


def test_a_bad_line_of_a_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "key").write_text('{"sha256": "00", "answer": {"a": 1}}\n{"sha256": "zz"}\n')
    with pytest.raises(SandboxError, match="key:2"):
        AnswerKey([tmp_path / "key"])
