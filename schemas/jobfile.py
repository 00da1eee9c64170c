"""Job files: alone responsible for reading the text of a `job.yaml`, with every problem at once and on its line.

Scalars are taken as the text that was written, and each field parses its own: so a sum of money or a threshold is
never a float, and `name: no` is a name. The one exception is `input.filter`, whose values are what YAML says.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails

from schemas.agreement import Match, parse_match, refusal
from schemas.answers import Answer
from schemas.ceilings import MOST_IN_FLIGHT
from schemas.errors import ConfigurationError, Problem
from schemas.jobs import (
    TIERS,
    Budget,
    Confidence,
    Escalate,
    Input,
    Tier,
    When,
    check_job_name,
    find_agreement,
    parse_cap,
)

Loc = tuple[int | str, ...]
T = TypeVar("T")

DEFAULT_CONCURRENCY = 256
_LONGEST_SHARD = 5000
#: The keys in which a variant of a job may differ. One with another ladder has the usual concurrency, or its own.
VARIES = ("prompt", "ladder", "tiers", "escalate", "confidence", "concurrency")
_SHOWN_PROBLEMS = 30
_SHOWN_CHARACTERS = 400  # of one problem: it repeats what was written, which may be anything
_LAST = 1 << 30  # problems of other files follow those of the job file


class Draft:
    """A job file as it was written: its values as text, the line of each, and the problems found so far."""

    def __init__(self, text: str, where: str) -> None:
        self.where = where
        self.values: Any = {}
        self._lines: dict[Loc, int] = {}
        self._problems: list[tuple[int, Problem | str]] = []
        self._seen: set[int] = set()
        self._read_document(text)

    def add(self, loc: Loc, what: str) -> None:
        """Note a problem with the value at `loc`, on its line or that of the nearest part that has one."""
        known = next(loc[:size] for size in range(len(loc), -1, -1) if loc[:size] in self._lines or not size)
        name = ".".join(map(str, loc))
        self._note(self._lines.get(known, 1), f"{name}: {what}" if name else what)

    def lay_over(self, base: Draft) -> None:
        """Make the file of a variant the whole file of a job: what `base` says, but for what this one does.

        Tiers are laid over key by key. A key that a variant cannot have is noted.
        """
        for name in self.values:
            if name not in VARIES:
                what = "is the job's, for all its variants" if name in JobFile.model_fields else "unknown key"
                self.add((name,), f"{what}; a variant may say {', '.join(VARIES)}")
        below = {
            name: base.values[name] for name in base.values if name != "concurrency" or "ladder" not in self.values
        }
        if isinstance(given := self.values.get("tiers"), dict):
            self.values["tiers"] = base._mapping("tiers") | {
                name: {**base._mapping("tiers").get(name, {}), **changed} if isinstance(changed, dict) else changed
                for name, changed in given.items()
            }
        self.values = below | self.values

    def _mapping(self, key: str) -> dict[str, Any]:
        """The top-level mapping at `key`, even if it is wrong; {} where it is no mapping."""
        value = self.values.get(key)
        return value if isinstance(value, dict) else {}

    def place(self, key: str) -> str:
        """Where the top-level `key` stands, or would: `jobs/x/job.yaml:7`."""
        return f"{self.where}:{self._lines.get((key,), 1)}"

    def gather(self, load: Callable[[], T]) -> T | None:
        """What `load` returns; where it raises ConfigurationError, its problems join this file's."""
        try:
            return load()
        except ConfigurationError as error:
            self._problems += [(_LAST, problem) for problem in error.problems]
            return None

    def text(self, key: str, default: str) -> str | None:
        """The top-level text at `key`, even if the rest of the file is wrong; None where it is no text."""
        value = self.values.get(key, default)
        return value if isinstance(value, str) and value else None

    def raise_problems(self) -> None:
        """Raise ConfigurationError with everything noted, this file's first and in its order; else do nothing."""
        if self._problems:
            found = [problem for _, problem in sorted(self._problems, key=lambda each: each[0])]
            more = len(found) - _SHOWN_PROBLEMS
            rest = [Problem(self.where, f"… and {more} more problems")] if more > 0 else []
            raise ConfigurationError(*found[:_SHOWN_PROBLEMS], *rest)

    def validate(self) -> JobFile | None:
        """The file's values, checked; None (and problems noted) if anything is wrong with them."""
        if self._problems and not self.values:
            return None  # it could not be read at all; that every key is missing is no news
        try:
            return JobFile.model_validate(self.values, context=tuple(self._mapping("tiers")))
        except ValidationError as error:
            for item in error.errors(include_url=False):
                loc = _shown_loc(item["loc"])
                self.add(loc, _explain(item, loc))
            return None

    def check_fields(self, fields: Sequence[str]) -> None:
        """Note every answer field that the file names and the answer, which has `fields`, does not."""
        confidence, measure = self._mapping("confidence"), self.values.get("measure")
        listed = confidence.get("fields")
        named: list[tuple[Loc, object]] = [
            (("confidence", "field"), confidence.get("field")),
            (("measure",), measure),
        ]
        if isinstance(listed, list):
            named += [(("confidence", "fields", number), name) for number, name in enumerate(listed)]
        named += [(("match", name), name) for name in self._mapping("match")]
        for loc, name in named:
            if isinstance(name, str) and name and name not in fields:
                self.add(loc, f"the answer has no field {name!r}{suggest(name, fields)}")
        self._check_label(measure, fields)

    def check_match(self, file: JobFile, answer: Answer) -> None:
        """Note every rule of `match` that says nothing about its field, and where nothing is left to compare."""
        properties = answer.properties
        for name, match in file.match.items():
            if why := refusal(match, properties.get(name), answer.schema):
                self.add(("match", name), why)
        is_compared = bool(find_agreement(answer, file.confidence, file.match).fields)
        if file.escalate.promise is not None and not is_compared:
            self.add(("escalate",), "nothing of the answer is compared, so that a promise about it says nothing")
        elif file.match and not is_compared:
            self.add(("match",), "ignores every field, so that any two answers agree; leave one to compare")

    def _check_label(self, measure: object, fields: Sequence[str]) -> None:
        label = self._mapping("input").get("label")
        if measure is not None and label is None:
            self.add(("measure",), "there is nothing to measure against; name its column with `input: {label: …}`")
        if measure is None and label is not None and label not in fields:
            self.add(("input", "label"), "say which answer field it is compared with: `measure: FIELD`")

    def _note(self, line: int, what: str) -> None:
        shown = what if len(what) <= _SHOWN_CHARACTERS else f"{what[:_SHOWN_CHARACTERS]}…"
        self._problems.append((line, Problem(f"{self.where}:{line}", shown)))

    def _read_document(self, text: str) -> None:
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self._note(mark.line + 1 if mark else 1, f"not valid YAML: {error.problem or error.context}")
        except (yaml.YAMLError, RecursionError) as error:
            self._note(1, f"not valid YAML: {type(error).__name__}; save it as plain UTF-8 text")
        else:
            self._read_root(node)

    def _read_root(self, node: yaml.Node | None) -> None:
        if isinstance(node, yaml.MappingNode):
            try:
                self.values = self._read(node, ())
            except RecursionError:
                self._note(1, "is nested too deeply; no key of a job file needs that")
        else:
            self._note(1, "a job file is a mapping: `name: …`, `input: …` and so on")

    def _read(self, node: yaml.Node, loc: Loc) -> Any:
        self._lines.setdefault(loc, node.start_mark.line + 1)
        if id(node) in self._seen:
            return self.add(loc, "YAML aliases are not supported; write the value out")
        self._seen.add(id(node))
        if loc == ("input", "filter"):
            return self._read_typed(node, loc)
        if isinstance(node, yaml.MappingNode):
            return self._read_mapping(node, loc)
        if isinstance(node, yaml.SequenceNode):
            return [self._read(inner, (*loc, number)) for number, inner in enumerate(node.value)]
        return None if node.tag == "tag:yaml.org,2002:null" else self._read_scalar(node, loc)

    def _read_scalar(self, node: yaml.Node, loc: Loc) -> str:
        if not node.tag.startswith("tag:yaml.org,2002:"):
            self.add(loc, f"the tag {node.tag} means nothing here; remove it")
        return str(node.value)

    def _read_mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in node.value:
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else "?"
            inner = (*loc, name)
            if name in found:
                self._note(key.start_mark.line + 1, f"{'.'.join(map(str, inner))}: given twice; keep one")
                continue
            self._lines[inner] = key.start_mark.line + 1
            found[name] = self._read(value, inner)
        return found

    def _read_typed(self, node: yaml.Node, loc: Loc) -> Any:
        if isinstance(node, yaml.SequenceNode):
            for number, condition in enumerate(node.value):
                self._lines[(*loc, number)] = condition.start_mark.line + 1
        try:
            return yaml.constructor.SafeConstructor().construct_object(node, deep=True)
        except Exception as error:  # PyYAML raises whatever its constructors trip over: IndexError for `!!int ''`
            self.add(loc, f"a value cannot be read ({type(error).__name__}); quote it if it is text")
            return None


def _refine_tiers(given: object) -> object:
    """Each override laid over the defaults of the tier that it names, so that it is checked as a whole tier."""
    if not isinstance(given, dict):
        return given
    return {name: _refined_tier(name, overrides) for name, overrides in given.items()}


def _refined_tier(name: str, overrides: object) -> object:
    if not isinstance(overrides, dict):
        return overrides
    if "name" in overrides:
        raise ValueError(f"{name} must not hold a name; the key is the name")
    thinking = {"true": True, "false": False}.get(str(overrides.get("thinking")).lower())
    return {"name": name, **Tier.defaults(name, thinking), **overrides}


def _resolve_tier(name: object, info: ValidationInfo) -> Tier:
    """The tier a ladder names: one of the job's own, or one that we know."""
    tiers: dict[str, Tier] = TIERS | info.data.get("tiers", {})
    if isinstance(name, str) and name in tiers:
        return tiers[name]
    if isinstance(name, str) and name in (info.context or ()):
        return TIERS["flash"].model_copy(update={"name": name})  # its definition is the problem, reported there
    raise ValueError(f"unknown tier {name!r}{suggest(str(name), tiers)}")


def _ladder_is_a_ladder(ladder: tuple[Tier, ...]) -> tuple[Tier, ...]:
    names = [tier.name for tier in ladder]
    if len(set(names)) < len(names):
        raise ValueError("a tier is named twice; every rung must differ")
    return ladder


def _promise_fits_ladder(escalate: Escalate, info: ValidationInfo) -> Escalate:
    """A tier between the two would give answers that nobody promised anything about."""
    ladder = info.data.get("ladder", ())
    if escalate.promise is not None and ladder and len(ladder) != 2:
        raise ValueError("a promise is about two tiers, the first and the last; write `ladder: [flash, pro]`")
    return escalate


def _spread_concurrency(given: object, info: ValidationInfo) -> object:
    """One number is that number for every tier of the ladder; a tier that is not named gets the default."""
    names = [tier.name for tier in info.data.get("ladder", ())]
    if not isinstance(given, dict):
        return dict.fromkeys(names or ["flash"], given)
    if strangers := [name for name in given if names and name not in names]:
        raise ValueError(f"{strangers[0]} is not in the ladder{suggest(strangers[0], names)}")
    return dict.fromkeys(names, DEFAULT_CONCURRENCY) | given


def _read_budget(given: object) -> object:
    """A sum is a run's own budget; a mapping names one that is shared."""
    return given if isinstance(given, dict | Budget) else Budget(cap=parse_cap(given), name=None)


class JobFile(BaseModel):
    """The keys of a `job.yaml`. `prompt` and `answer` are still names of files here."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: Annotated[str, AfterValidator(check_job_name)]
    input: Input
    prompt: Annotated[str, Field(min_length=1)] = "prompt.md"
    answer: Annotated[str, Field(min_length=1)] = "answer.py:Answer"
    tiers: Annotated[dict[str, Tier], BeforeValidator(_refine_tiers)] = {}
    ladder: Annotated[
        tuple[Annotated[Tier, BeforeValidator(_resolve_tier)], ...],
        Field(min_length=1),
        AfterValidator(_ladder_is_a_ladder),
    ]
    escalate: Annotated[Escalate, AfterValidator(_promise_fits_ladder)] = Escalate()
    confidence: Confidence = Confidence()
    budget: Annotated[Budget, BeforeValidator(_read_budget)]
    tolerance: Decimal = Field(default=Decimal("0.01"), ge=0, le=1)
    shard_rows: int = Field(default=1000, ge=1, le=_LONGEST_SHARD)
    concurrency: Annotated[
        dict[str, Annotated[int, Field(ge=1, le=MOST_IN_FLIGHT)]],
        BeforeValidator(_spread_concurrency),
        Field(default=DEFAULT_CONCURRENCY, validate_default=True),
    ]
    measure: Annotated[str, Field(min_length=1)] | None = None
    match: dict[str, Annotated[Match, BeforeValidator(parse_match)]] = {}
    when: When = When.NOW


def _shown_loc(loc: Loc) -> Loc:
    """pydantic marks a mapping's key itself with `[key]`; the key's own place says as much."""
    return tuple(part for part in loc if part != "[key]")


def _explain(item: ErrorDetails, loc: Loc) -> str:
    explain = _EXPLANATIONS.get(item["type"])
    return explain(item, loc) if explain else item["msg"].removeprefix("Value error, ")


def _explain_missing(item: ErrorDetails, loc: Loc) -> str:
    if loc[:2] == ("input", "filter"):
        return "a condition is a list of three: `[column, operator, value]`"
    if loc[0] == "tiers" and loc[-1] == "model":
        return f"is required, since {loc[1]} is not a tier we know{suggest(str(loc[1]), TIERS)}"
    return "is required"


def _explain_extra(item: ErrorDetails, loc: Loc) -> str:
    return f"unknown key{suggest(str(loc[-1]), _known_keys(loc[:-1]))}"


def _explain_string(item: ErrorDetails, loc: Loc) -> str:
    return "has no value" if item["input"] is None else item["msg"]


_EXPLANATIONS: dict[str, Callable[[ErrorDetails, Loc], str]] = {
    "missing": _explain_missing,
    "extra_forbidden": _explain_extra,
    "string_type": _explain_string,
    "model_type": lambda item, loc: "must be a mapping, like `{key: value}`",
    "dict_type": lambda item, loc: "must be a mapping, like `{key: value}`",
    "tuple_type": lambda item, loc: "must be a list, like `[one, two]`",
}


def _known_keys(loc: Loc) -> Iterable[str]:
    parts: dict[Loc, type[BaseModel]] = {
        (): JobFile,
        ("input",): Input,
        ("escalate",): Escalate,
        ("confidence",): Confidence,
        ("budget",): Budget,
    }
    return sorted(set(parts.get(loc, Tier).model_fields) - ({"name"} if loc[:1] == ("tiers",) else set()))


def suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean id?`, or the whole choice where nothing is close."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are: {', '.join(names)}"
