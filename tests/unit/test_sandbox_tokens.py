"""Token counts of the emulator."""

from __future__ import annotations

from array import array

import pytest

from sandbox.drafts import reason
from sandbox.tokens import WIDTH, Encodings, encode_chat, encode_exactly, encode_fast, load, pieces


def test_the_chat_form_is_the_one_deepseek_publishes() -> None:
    messages = [("system", "Be brief."), ("user", "Hello, wörld"), ("assistant", "Hi"), ("user", "again")]
    written = (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hello, wörld<｜Assistant｜></think>Hi<｜end▁of▁sentence｜>"
        "<｜User｜>again<｜Assistant｜>"
    )
    for is_thinking, end in ((False, "</think>"), (True, "<think>")):
        ids = array("I", encode_chat(encode_exactly, messages, is_thinking))
        assert list(ids) == load().encode(written + end, add_special_tokens=False).ids


@pytest.mark.parametrize("text", ['{"a": "Ünïcode 中文 🙂", "n": 1.25}', "", "plain words"])
def test_pieces_joined_are_the_text(text: str) -> None:
    assert b"".join(pieces(text)).decode() == text


@pytest.mark.parametrize("tokens", [1, 17, 400])
def test_a_chain_of_thought_has_exactly_its_tokens(tokens: int) -> None:
    assert len(encode_exactly(reason(tokens))) // WIDTH == tokens


def test_encodings_are_kept_within_their_bound() -> None:
    made: list[str] = []
    kept = Encodings(lambda text: (made.append(text), encode_fast(text))[1], capacity=100)
    for text in ("a" * 40, "a" * 40, "b" * 40, "a" * 40):
        kept(text)
    assert made == ["a" * 40, "b" * 40, "a" * 40]
