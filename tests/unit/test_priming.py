"""Priming: one document at a time until the prefix hits, then everyone at once."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from schemas.attempts import NOT_BILLED, UNKNOWN_BILLING, Reply, Signal, Usage
from tasks.priming import MOST_ATTEMPTS, Primer

PREFIX = 8_000  # bytes: 1,000 tokens at the very least

AT = datetime(2026, 9, 26, tzinfo=UTC)


def reply(signal: Signal, usage: Usage | None = None) -> Reply:
    return Reply(signal, AT, AT, usage=usage)


MISS, HIT = (reply(Signal.ANSWERED, usage) for usage in (Usage(0, 2_000, 10), Usage(1_664, 336, 10)))


async def climb(primer: Primer, replies: list[Reply], log: list[str]) -> None:
    async with primer.turn() as is_priming:
        log.append("prime" if is_priming else "go")
        await asyncio.sleep(0)
        if is_priming:
            primer.see(replies.pop(0))


async def test_documents_go_one_by_one_until_the_third_hits_and_then_all_go() -> None:
    primer, log = Primer(PREFIX, build_s=0), []
    await asyncio.gather(*(climb(primer, [MISS, MISS, HIT], log) for _ in range(1)))
    replies = [MISS, HIT]
    await asyncio.gather(*(climb(primer, replies, log) for _ in range(9)))
    assert log == ["prime"] * 3 + ["go"] * 7
    assert primer.is_warm
    assert not primer.is_cold


async def test_never_two_prime_at_the_same_time() -> None:
    primer, running, most = Primer(PREFIX, build_s=0), 0, 0

    async def prime() -> None:
        nonlocal running, most
        async with primer.turn() as is_priming:
            if is_priming:
                running += 1
                most = max(most, running)
                await asyncio.sleep(0)
                running -= 1
                primer.see(MISS)

    await asyncio.gather(*(prime() for _ in range(MOST_ATTEMPTS)))
    assert most == 1


async def test_a_hit_of_less_than_the_prefix_does_not_count() -> None:
    primer = Primer(PREFIX, build_s=0)
    primer.see(reply(Signal.ANSWERED, Usage(128, 1_872, 10)))
    assert not primer.is_warm


async def test_a_cache_that_never_hits_is_given_up_on() -> None:
    primer = Primer(PREFIX, build_s=0)
    for _ in range(MOST_ATTEMPTS):
        assert not primer.is_warm
        primer.see(MISS)
    assert primer.is_warm
    assert primer.is_cold


@pytest.mark.parametrize("signal", sorted(NOT_BILLED | UNKNOWN_BILLING))
async def test_a_failure_says_nothing_about_the_cache(signal: Signal) -> None:
    primer = Primer(PREFIX, build_s=0)
    for _ in range(3 * MOST_ATTEMPTS):
        primer.see(reply(signal))
    assert (primer.is_warm, primer.is_cold, primer.attempts) == (False, False, 0)


@pytest.mark.parametrize("signal", [Signal.ANSWERED, Signal.BLANK, Signal.INTERRUPTED, Signal.REFUSED])
async def test_a_provider_that_never_reports_usage_is_not_primed_for_ever(signal: Signal) -> None:
    primer = Primer(PREFIX, build_s=0)
    for _ in range(MOST_ATTEMPTS):
        primer.see(reply(signal))
    assert (primer.is_warm, primer.is_cold) == (True, True)


async def test_a_prefix_too_short_to_hit_is_not_primed() -> None:
    async with Primer(500, build_s=0).turn() as is_priming:
        assert is_priming is False


async def test_a_priming_document_that_fails_lets_the_next_one_try() -> None:
    primer = Primer(PREFIX, build_s=0)
    try:
        async with primer.turn():
            raise OSError
    except OSError:
        pass
    async with primer.turn() as is_priming:
        assert is_priming
        assert primer.is_priming


async def test_a_lane_that_drains_does_not_wait_for_the_cache_once_per_document() -> None:
    class DrainedError(Exception):
        pass

    async def refuse(_seconds: float) -> None:
        raise DrainedError

    primer = Primer(PREFIX, build_s=3600)
    primer.attempts = 2
    for _ in range(3):
        with pytest.raises(DrainedError):
            async with primer.turn(refuse):
                pass
    assert not primer.is_priming
