"""Which of the files that exist an input's pattern and the named partitions select; alone responsible for both rules.

A pattern is a glob over `/`-separated names: `**` stands for any number of folders, other wildcards stay within one
name. A name that begins with `.` or `_` is hidden, as in every Parquet tool (`_SUCCESS`, `_delta_log`, `.crc` files),
unless the pattern spells that beginning out or it is a hive folder such as `_day=7`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from fnmatch import fnmatchcase

from schemas.errors import ConfigurationError, Problem

_WILDCARD = re.compile(r"[*?\[]")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)


def has_wildcard(pattern: str) -> bool:
    """Whether the pattern can name more than one file."""
    return _WILDCARD.search(pattern) is not None


def fixed_folder(pattern: str) -> str:
    """The part of the pattern before its first wildcard, as a folder: where to begin to look. "" if there is none."""
    names = pattern.split("/")
    fixed = next((place for place, name in enumerate(names) if has_wildcard(name)), len(names) - 1)
    return "/".join(names[:fixed]) or ("/" if pattern.startswith("/") else "")


def depth_below(pattern: str) -> int | None:
    """How many folders deep, below its fixed one, the pattern can match; None without bound."""
    names = pattern.split("/")
    if "**" in names:
        return None
    fixed = next((place for place, name in enumerate(names) if has_wildcard(name)), len(names) - 1)
    return len(names) - 1 - fixed


def matches(path: str, pattern: str) -> bool:
    """Whether the glob `pattern` names `path`."""
    return _names_match(path.split("/"), pattern.split("/"))


def _names_match(names: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == "**":
        if _names_match(names, patterns[1:]):
            return True
        return bool(names) and not is_hidden(names[0]) and _names_match(names[1:], patterns)
    return bool(names) and _name_matches(names[0], patterns[0]) and _names_match(names[1:], patterns[1:])


def _name_matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) and (not is_hidden(name) or name[0] == pattern[0])


def is_hidden(name: str) -> bool:
    """Whether tools keep things of their own under this name."""
    return name[:1] in (".", "_") and "=" not in name


def hive_values(path: str) -> dict[str, str]:
    """The `key=value` folders of a path, values with their %-escapes undone."""
    folders = (folder.partition("=") for folder in path.split("/")[:-1])
    return {key: _unescape(value) for key, equals, value in folders if key and equals}


def _unescape(value: str) -> str:
    return _ESCAPE.sub(lambda escape: bytes.fromhex(escape[1].decode()), value.encode()).decode("utf-8", "replace")


def partition_of(path: str, key: str | None) -> str | None:
    """The partition a file is in: the value of its hive folder `key=…`, or None."""
    return None if key is None else hive_values(path).get(key)


def select_partitions(paths: Sequence[str], key: str | None, wanted: Sequence[str]) -> list[str]:
    """The paths that are in one of the partitions a user named, in their order; all of them if none was named.

    A partition is named by its value (`2026-01-01`), by any hive folder (`day=2026-01-01`), or, where the input has
    no partition key, by the file's path or last name; a whole path means that file alone. Raises ConfigurationError
    for names that select nothing.
    """
    if not wanted:
        return list(paths)
    names = {path: _partition_names(path, key) for path in paths}
    if unknown := [name for name in dict.fromkeys(wanted) if not any(name in known for known in names.values())]:
        raise ConfigurationError(*(_explain_unknown(name, names, key) for name in unknown))
    others = set(wanted) - set(paths)
    return [path for path in paths if path in wanted or not names[path].isdisjoint(others)]


def name_partitions(paths: Sequence[str], key: str | None) -> dict[str, str]:
    """The partition that each path is in, by the name that means it and nothing else: its value, or a file's path.

    Raises ConfigurationError for files that are in none.
    """
    named = {path: path if key is None else partition_of(path, key) for path in paths}
    if astray := [path for path, name in named.items() if name is None]:
        raise ConfigurationError(
            *(Problem(path, f"is in no folder {key}=…, which input.partition asks for") for path in astray[:8])
        )
    return {path: name for path, name in named.items() if name is not None}


def choose_partitions(
    paths: Sequence[str], key: str | None, *, wanted: Sequence[str] = (), first: str | None, last: str | None
) -> list[str]:
    """The names of the partitions that a user means, in the order of their files.

    `wanted` are names or globs (none: any), `first` and `last` bound them, both included: as dates where all
    partitions are dates, else as text. What bounds a file is its last name without the suffix. Raises
    ConfigurationError for names, globs and bounds that select nothing.
    """
    named = name_partitions(paths, key)
    known = {path: {*_partition_names(path, key), name} for path, name in named.items()}
    if nothing := [
        name for name in dict.fromkeys(wanted) if not any(_means(name, names) for names in known.values())
    ]:
        raise ConfigurationError(*(_explain_unknown(name, known, key) for name in nothing))
    meant = [path for path in paths if not wanted or any(_means(name, known[path]) for name in wanted)]
    places = {path: named[path] if key is not None else _stem(path) for path in paths}
    _check_bounds(first, last, list(places.values()))
    chosen = [
        path for path in meant if (first is None or places[path] >= first) and (last is None or places[path] <= last)
    ]
    if not chosen:
        raise ConfigurationError(
            Problem("partition", _explain_empty_range(first, last, sorted(set(places.values()))))
        )
    return list(dict.fromkeys(named[path] for path in chosen))


def _means(wanted: str, names: set[str]) -> bool:
    return wanted in names or (has_wildcard(wanted) and any(fnmatchcase(name, wanted) for name in names))


def _stem(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0]


def _is_date(value: str) -> bool:
    """Whether it is written 2026-01-31: dates of that form are in order as text is."""
    try:
        return bool(_DATE.fullmatch(value)) and bool(date.fromisoformat(value))
    except ValueError:
        return False


def _check_bounds(first: str | None, last: str | None, places: Sequence[str]) -> None:
    bounds = {name: bound for name, bound in {"from": first, "to": last}.items() if bound is not None}
    problems = {name: _misfit(bound, places) for name, bound in bounds.items()}
    if wrong := [Problem(name, problem) for name, problem in problems.items() if problem]:
        raise ConfigurationError(*wrong)
    if first is not None and last is not None and first > last:
        raise ConfigurationError(Problem("from", f"{first} comes after {last}, which --to says; swap them"))


def _misfit(bound: str, places: Sequence[str]) -> str | None:
    """Why this cannot bound them. A date has its place among other names, too, but not one that anybody means."""
    if not places:
        return None
    if all(map(_is_date, places)):
        return None if _is_date(bound) else f"{bound!r} is not a date; write it like 2026-01-31"
    if _DATE.fullmatch(bound) and not any(map(_DATE.match, places)):
        return f"{bound} reads as a date, but partitions have names like {min(places)}; bound them by such a name"
    return None


def _explain_empty_range(first: str | None, last: str | None, known: Sequence[str]) -> str:
    asked = " and ".join(f"{word} {bound}" for word, bound in (("from", first), ("up to", last)) if bound is not None)
    return f"none is {asked}; {suggest(first or last or '', known)}"


def _partition_names(path: str, key: str | None) -> set[str]:
    values = hive_values(path)
    names = {f"{folder}={value}" for folder, value in values.items()}
    return names | ({path, path.rpartition("/")[2]} if key is None else {values[key]} if key in values else set())


def _explain_unknown(name: str, names: Mapping[str, set[str]], key: str | None) -> Problem:
    if key is None:
        known = sorted(names)
    else:
        known = sorted({value for path in names if (value := partition_of(path, key)) is not None})
    return Problem("partition", f"{name!r} is not in the input; {suggest(name.rpartition('=')[2], known)}")


def suggest(name: str, known: Iterable[str]) -> str:
    """What a user may have meant, and what there is: `did you mean body? There is: id, body`."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    shown = (
        ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:6])}, … {', '.join(names[-2:])} ({len(names)})"
    )
    return (f"did you mean {near[0]}? " if near else "") + f"There is: {shown or 'nothing'}"
