"""What the emulated prompt cache hits, and when."""

from __future__ import annotations

from array import array

from sandbox.prefixcache import PrefixCache, chain


def prompt(*parts: tuple[int, int]) -> bytes:
    """Tokens in runs: (token, how many)."""
    return b"".join(array("I", [token] * count).tobytes() for token, count in parts)


def ask(cache: PrefixCache, ids: bytes, now: float = 0.0, namespace: str = "job") -> int:
    links = chain(ids, namespace)
    hit = cache.look_up(links, now)
    cache.learn(links, now)
    return hit


A = (1, 300)


def test_a_shared_prefix_misses_twice_and_then_hits_in_whole_blocks() -> None:
    cache = PrefixCache(build_s=0)
    hits = [ask(cache, prompt(A, (document, 200))) for document in (2, 3, 4)]
    assert hits == [0, 0, 256]


def test_the_same_prompt_hits_at_once_but_never_wholly() -> None:
    cache = PrefixCache(build_s=0)
    assert [ask(cache, prompt((1, 256))) for _ in range(2)] == [0, 0]
    assert [ask(cache, prompt((1, 257))) for _ in range(2)] == [256, 256]


def test_a_conversation_that_goes_on_hits_its_whole_past() -> None:
    cache = PrefixCache(build_s=0)
    past = prompt(A, (2, 212))
    ask(cache, past)
    assert ask(cache, past + prompt((9, 50))) == 512


def test_an_earlier_prompt_must_be_met_to_its_last_token() -> None:
    cache = PrefixCache(build_s=0)
    ask(cache, prompt(A, (2, 20)))
    assert ask(cache, prompt(A, (2, 19), (3, 20))) == 0
    cache = PrefixCache(build_s=0)
    ask(cache, prompt(A, (2, 20)))
    assert ask(cache, prompt(A, (2, 20), (3, 20))) == 256


def test_short_documents_miss_twice_too() -> None:
    cache = PrefixCache(build_s=0)
    assert [ask(cache, prompt(A, (document, 9))) for document in (2, 3, 4)] == [0, 0, 256]


def test_another_user_model_or_mode_shares_nothing() -> None:
    cache = PrefixCache(build_s=0)
    for document in (2, 3, 4):
        ask(cache, prompt(A, (document, 200)))
    assert ask(cache, prompt(A, (5, 200)), namespace="other") == 0


def test_a_new_unit_serves_only_after_the_build_delay() -> None:
    cache = PrefixCache(build_s=3)
    for document in (2, 3):
        ask(cache, prompt(A, (document, 200)))
    assert ask(cache, prompt(A, (4, 200)), now=2.9) == 0
    assert ask(cache, prompt(A, (5, 200)), now=3.0) == 256


def test_an_idle_unit_expires() -> None:
    cache = PrefixCache(build_s=0, idle_s=100)
    for document in (2, 3):
        ask(cache, prompt(A, (document, 200)))
    assert ask(cache, prompt(A, (4, 200)), now=100) == 256
    assert ask(cache, prompt(A, (5, 200)), now=200) == 256
    assert ask(cache, prompt(A, (6, 200)), now=301) == 0


def test_a_prefix_under_one_block_is_never_cached() -> None:
    cache = PrefixCache(build_s=0)
    assert [ask(cache, prompt((1, 127), (document, 300))) for document in (2, 3, 4)] == [0, 0, 0]


def test_long_prompts_are_stored_at_intervals() -> None:
    cache = PrefixCache(build_s=0, interval=4)
    ask(cache, prompt((1, 1200)))
    assert ask(cache, prompt((1, 1100), (2, 100))) == 1024


def test_memory_stays_bounded_and_the_shared_prefix_survives() -> None:
    cache = PrefixCache(build_s=0, capacity=50)
    hits = [ask(cache, prompt(A, (document, 400))) for document in range(2, 300)]
    assert len(cache) <= 150
    assert hits[-1] == 256
