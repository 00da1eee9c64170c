"""Problems of files: alone responsible for telling equal ones once, with the files that have them."""

from __future__ import annotations

from collections import defaultdict
from itertools import islice

from schemas.errors import ConfigurationError, Problem

_SHOWN_PROBLEMS = 20


class FileProblems:
    """What is wrong with which files."""

    def __init__(self) -> None:
        self._names: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, name: str, what: str) -> None:
        """Note what is wrong with a file."""
        self._names[what].append(name)

    def raise_any(self) -> None:
        """Raise a ConfigurationError with all of them, if there are any."""
        if not self._names:
            return
        shown: list[Problem | str] = [
            Problem(names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""), what)
            for what, names in islice(self._names.items(), _SHOWN_PROBLEMS)
        ]
        if len(self._names) > _SHOWN_PROBLEMS:
            shown.append(f"… and {len(self._names) - _SHOWN_PROBLEMS} more problems")
        raise ConfigurationError(*shown)
