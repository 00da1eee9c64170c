"""The trail: alone responsible for who is told which file is being read, should it turn out to be the last."""

from __future__ import annotations

from collections.abc import Callable

_followers: list[Callable[[str], None]] = []


def follow(follower: Callable[[str], None]) -> None:
    """Tell `follower` from now on, by its name in the manifest, of each file before it is opened."""
    _followers.append(follower)


def mark(name: str) -> None:
    """Say that this file is about to be opened."""
    for follower in _followers:
        follower(name)
