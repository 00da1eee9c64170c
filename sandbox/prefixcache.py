"""The provider's prompt cache: which leading tokens of a prompt are billed as hits.

A hit needs a whole stored unit. Units end where an earlier prompt or its answer ended, where two prompts were
seen to part, and at fixed intervals of long prompts; they serve after a build delay and vanish when idle. So
A+B misses, A+C misses (A is stored now), A+D hits A. Only hashes are kept: one per 128 tokens, and one for the
rest of a prompt, which must be met whole but is not reported.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from sandbox.tokens import WIDTH

BLOCK = 128
_SIZE = BLOCK * WIDTH


@dataclass(frozen=True, slots=True)
class Chain:
    """A prompt as one hash per whole block, each over all blocks before it, and the ids that are left over."""

    root: int
    links: tuple[int, ...]
    ids: bytes

    @property
    def end(self) -> tuple[int, bytes]:
        """The last link and the rest behind it: together they stand for the whole prompt."""
        return self.links[-1] if self.links else self.root, self.ids[len(self.links) * _SIZE :]

    def link(self, depth: int) -> int:
        return self.links[depth - 1] if depth else self.root


def chain(ids: bytes, namespace: Hashable, begun: Chain | None = None) -> Chain:
    """Hash a prompt's packed ids. `begun` is the chain of a prompt that these ids begin with."""
    root = hash(namespace)
    links = list(begun.links) if begun else []
    last = links[-1] if links else root
    for at in range(len(links) * _SIZE, len(ids) - _SIZE + 1, _SIZE):
        last = hash((last, ids[at : at + _SIZE]))
        links.append(last)
    return Chain(root, tuple(links), ids)


class PrefixCache:
    """Units by hash. Times are seconds of whatever clock the caller uses throughout."""

    def __init__(
        self, build_s: float = 3.0, idle_s: float = 6 * 3600.0, capacity: int = 200_000, interval: int = 64
    ) -> None:
        self._build_s = build_s
        self._idle_s = idle_s
        self._capacity = capacity
        self._interval = interval
        self._seen: OrderedDict[int, None] = OrderedDict()
        self._units: OrderedDict[int, tuple[float, float]] = OrderedDict()  # ready at, last used at
        self._rests: OrderedDict[int, int] = OrderedDict()  # behind a link: the lengths of stored rests, as bits

    def __len__(self) -> int:
        return len(self._seen) + len(self._units) + len(self._rests)

    def look_up(self, prompt: Chain, now: float) -> int:
        """Hit tokens of a prompt. Its last token is always computed, so a whole prompt never hits entirely."""
        tokens = len(prompt.ids) // WIDTH
        for depth in range(min(len(prompt.links), (tokens - 1) // BLOCK), 0, -1):
            if self._serve(prompt.link(depth), now) or self._serve_rest(prompt, depth, now):
                return depth * BLOCK
        return 0

    def learn(self, prompt: Chain, now: float) -> None:
        """Store a prompt: its end, its intervals, and the place where it parts from an earlier one."""
        shared = self._shared(prompt.links)
        if shared:
            self._store(prompt.link(shared), now)
        self.learn_answered(prompt, now)

    def learn_answered(self, prompt: Chain, now: float) -> None:
        """Store a prompt with its answer behind it. It parts from nothing: its own prompt is no earlier one."""
        links = prompt.links
        for depth in range(self._interval, len(links), self._interval):
            self._store(links[depth - 1], now)
        self._store_end(prompt, now)
        for link in links:
            self._seen[link] = None
            self._seen.move_to_end(link)
        self._forget()

    def _shared(self, links: tuple[int, ...]) -> int:
        for depth, link in enumerate(links):
            if link not in self._seen:
                return depth
        return len(links)

    def _serve(self, unit: int, now: float) -> bool:
        times = self._units.get(unit)
        if times is None or times[0] > now:
            return False
        if now - times[1] > self._idle_s:
            del self._units[unit]
            return False
        self._units[unit] = (times[0], now)
        self._units.move_to_end(unit)
        return True

    def _serve_rest(self, prompt: Chain, depth: int, now: float) -> bool:
        """Whether an earlier prompt that ended inside the next block is met whole."""
        link = prompt.link(depth)
        lengths = self._rests.get(link, 0)
        start = depth * _SIZE
        left = (len(prompt.ids) - start) // WIDTH
        return any(
            self._serve(hash((link, prompt.ids[start : start + length * WIDTH])), now)
            for length in range(1, min(left, BLOCK - 1) + 1)
            if lengths >> length & 1
        )

    def _store_end(self, prompt: Chain, now: float) -> None:
        link, rest = prompt.end
        if not rest:
            return self._store(link, now)
        self._rests[link] = self._rests.get(link, 0) | 1 << len(rest) // WIDTH
        self._rests.move_to_end(link)
        return self._store(hash((link, rest)), now)

    def _store(self, unit: int, now: float) -> None:
        if unit not in self._units:
            self._units[unit] = (now + self._build_s, now)

    def _forget(self) -> None:
        for kept in (self._seen, self._units, self._rests):
            while len(kept) > self._capacity:
                kept.popitem(last=False)
