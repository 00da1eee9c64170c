"""The provider's prompt cache: which leading tokens of a prompt are billed as hits.

A hit needs a whole stored unit. Units end where an earlier prompt or its answer ended, where two prompts were
seen to part, and at fixed intervals of long prompts; they serve after a build delay and vanish when idle. So
A+B misses, A+C misses (A is stored now), A+D hits A. Only hashes are kept, one per 128 tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from sandbox.tokens import WIDTH

BLOCK = 128


def chain(ids: bytes, namespace: Hashable, start: int = 0, link: int | None = None) -> list[int]:
    """One hash per whole block, each over all blocks before it. `start` and `link` continue an earlier chain."""
    size = BLOCK * WIDTH
    last = hash(namespace) if link is None else link
    links = []
    for at in range(start * size, len(ids) - size + 1, size):
        last = hash((last, ids[at : at + size]))
        links.append(last)
    return links


class PrefixCache:
    """Units by chain hash. Times are seconds of whatever clock the caller uses throughout."""

    def __init__(
        self, build_s: float = 3.0, idle_s: float = 6 * 3600.0, capacity: int = 200_000, interval: int = 64
    ) -> None:
        self._build_s = build_s
        self._idle_s = idle_s
        self._capacity = capacity
        self._interval = interval
        self._seen: OrderedDict[int, None] = OrderedDict()
        self._units: OrderedDict[int, tuple[float, float]] = OrderedDict()  # ready at, last used at

    def __len__(self) -> int:
        return len(self._seen) + len(self._units)

    def look_up(self, links: list[int], prompt_tokens: int, now: float) -> int:
        """Hit tokens of a prompt. Its last token is always computed, so a whole prompt never hits entirely."""
        for depth in range(min(len(links), (prompt_tokens - 1) // BLOCK), 0, -1):
            if self._serve(links[depth - 1], now):
                return depth * BLOCK
        return 0

    def learn(self, links: list[int], now: float) -> None:
        """Store a prompt (or a prompt with its answer): its end, its intervals, and where it left an earlier one."""
        shared = self._shared(links)
        ends = {shared, len(links), *range(self._interval, len(links), self._interval)}
        for depth in ends - {0}:
            self._store(links[depth - 1], now)
        for link in links:
            self._seen[link] = None
            self._seen.move_to_end(link)
        self._forget()

    def _shared(self, links: list[int]) -> int:
        for depth, link in enumerate(links):
            if link not in self._seen:
                return depth
        return len(links)

    def _serve(self, link: int, now: float) -> bool:
        unit = self._units.get(link)
        if unit is None or unit[0] > now:
            return False
        if now - unit[1] > self._idle_s:
            del self._units[link]
            return False
        self._units[link] = (unit[0], now)
        self._units.move_to_end(link)
        return True

    def _store(self, link: int, now: float) -> None:
        if link not in self._units:
            self._units[link] = (now + self._build_s, now)

    def _forget(self) -> None:
        while len(self._seen) > self._capacity:
            self._seen.popitem(last=False)
        while len(self._units) > self._capacity:
            self._units.popitem(last=False)
