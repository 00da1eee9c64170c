"""Jobs on disk: alone responsible for turning a job's folder into a `Job`, and for starting a new one.

A job's `answer.py` is the user's code. It is imported under a name of its own, made from its path and content:
no entry on `sys.path`, no clash between two jobs, no stale byte code.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import traceback
from contextlib import suppress
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from pydantic import BaseModel

from schemas.answers import Answer
from schemas.errors import ConfigurationError, Problem
from schemas.jobfile import VARIES, Draft, JobFile, suggest
from schemas.jobs import Job, check_job_name, check_prompt
from schemas.requests import RunRequest
from tasks.job_template import ANSWER_PY, JOB_YAML, PROMPT_MD

FOLDER = "jobs"
FILE = "job.yaml"


def load_job(name_or_path: str, root: Path = Path(".")) -> Job:
    """The job called `name_or_path` (`jobs/NAME/job.yaml` under `root`), or in that folder or file.

    Raises ConfigurationError with every problem of the job's files at once.
    """
    path = _find(name_or_path, root)
    draft = Draft(_read_text(path, root), _shown(path, root))
    return _load(draft, path.parent, path.parent, root)


def load_variant(name_or_path: str, variant: str, root: Path = Path(".")) -> Job:
    """The same job with what the file `variant`, under `root` or in the job's folder, says: YAML, or else a prompt.

    Raises ConfigurationError with every problem of the job's files, or else of the variant's.
    """
    job = load_job(name_or_path, root)
    path = _find_variant(variant, job.folder, root)
    if path.suffix not in (".yaml", ".yml"):
        return replace(job, prompt=_read_prompt(path, root, path.as_posix()))
    job_file = _find(name_or_path, root)
    draft = Draft(_read_text(path, root), _shown(path, root))
    has_prompt = "prompt" in draft.values
    draft.lay_over(Draft(_read_text(job_file, root), _shown(job_file, root)))
    return _load(draft, job.folder, path.parent if has_prompt else job.folder, root)


def load_asked(request: RunRequest) -> Job:
    """The job as a request runs it. Raises what `load_variant` and `RunRequest.adapt` raise."""
    if request.variant is None:
        return request.adapt(load_job(request.job, request.root))
    return request.adapt(load_variant(request.job, request.variant, request.root))


def _find_variant(variant: str, folder: Path, root: Path) -> Path:
    for path in (root / variant, folder / variant):
        if _is_file(path):
            return path
    raise ConfigurationError(
        f"--variant: there is no file {variant}, here or in {_shown(folder, root)}; name a prompt, or YAML with "
        f"those of the job's keys that the variant changes: {', '.join(VARIES)}"
    )


def _load(draft: Draft, folder: Path, prompts: Path, root: Path) -> Job:
    """The job of a file that was read, with its prompt in `prompts`."""
    file = draft.validate()
    prompt = draft.gather(lambda: _load_prompt(draft, prompts, root))
    answer = draft.gather(lambda: _load_answer(draft, folder, root))
    if file is not None:
        _check_name(draft, file, folder)
    if answer is not None:
        draft.check_fields(answer.fields)
        if file is not None:
            draft.check_match(file, answer)
    draft.raise_problems()
    if file is None or prompt is None or answer is None:
        raise AssertionError("a part is missing although no problem was noted")
    return _assemble(file, folder, prompt, answer)


def list_jobs(root: Path = Path(".")) -> list[str]:
    """The names of the jobs under `root`, sorted."""
    return sorted(path.parent.name for path in (root / FOLDER).glob(f"*/{FILE}"))


def write_new_job(name: str, root: Path = Path(".")) -> Path:
    """Write a small job that works, to be edited, into `jobs/NAME`; returns that folder.

    Raises ConfigurationError if the name will not do or the folder exists: nothing is overwritten.
    """
    try:
        check_job_name(name)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    folder = root / FOLDER / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ConfigurationError(f"{_shown(folder, root)} exists already; choose another name, or edit it") from None
    for file, text in ((FILE, JOB_YAML), ("prompt.md", PROMPT_MD), ("answer.py", ANSWER_PY)):
        (folder / file).write_text(text.replace("@NAME@", name), encoding="utf-8", newline="\n")
    return folder


def _assemble(file: JobFile, folder: Path, prompt: str, answer: Answer) -> Job:
    return Job(
        name=file.name,
        folder=folder,
        input=file.input,
        prompt=prompt,
        answer=answer,
        ladder=file.ladder,
        budget=file.budget.cap,
        budget_name=file.budget.name,
        concurrency=file.concurrency,
        escalate=file.escalate,
        confidence=file.confidence,
        tolerance=file.tolerance,
        shard_rows=file.shard_rows,
        measure=file.measure or file.input.label,
        when=file.when,
        match=file.match,
    )


def _find(name_or_path: str, root: Path) -> Path:
    """The job file that a user means by a name, a folder or a file."""
    for path in (root / FOLDER / name_or_path / FILE, root / name_or_path / FILE, root / name_or_path):
        if _is_file(path):
            return path
    names = list_jobs(root)
    hint = suggest(name_or_path, names) if names else f"; start one with `farthing new {name_or_path}`"
    raise ConfigurationError(f"there is no job {name_or_path!r} in {FOLDER}/{hint}")


def _is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have names none."""
    try:
        return path.is_file()
    except OSError:
        return False


def find_place(job: Job, word: str) -> str:
    """Where a job's file first says `word`, as `jobs/x/job.yaml:7`; just the file where it does not."""
    path = job.folder / FILE
    with suppress(OSError, ValueError):
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
            if word in line.partition("#")[0]:
                return f"{path}:{number}"
    return str(path)


def _check_name(draft: Draft, file: JobFile, folder: Path) -> None:
    """A job in `jobs/` is found by its folder, so a different name inside would be a second name for it."""
    actual = folder.resolve()
    if actual.parent.name == FOLDER and actual.name != file.name:
        draft.add(("name",), f"is {file.name!r}, but its folder is {actual.name!r}; make them the same")


def _load_prompt(draft: Draft, folder: Path, root: Path) -> str | None:
    name = draft.text("prompt", "prompt.md")
    if name is None:
        return None  # noted already
    return _read_prompt(folder / name, root, draft.place("prompt"))


def _read_prompt(path: Path, root: Path, named_at: str) -> str:
    where = _shown(path, root)
    try:
        prompt = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise _problem(named_at, f"prompt: {where} cannot be read: {_reason(error)}") from None
    if wrong := check_prompt(prompt):
        raise ConfigurationError(*(Problem(f"{where}:{line}", what) for line, what in wrong))
    return prompt


def _load_answer(draft: Draft, folder: Path, root: Path) -> Answer | None:
    named = draft.text("answer", "answer.py:Answer")
    if named is None:
        return None  # noted already
    name, _, class_name = named.partition(":")
    path = folder / name
    where = _shown(path, root)
    if path.suffix not in (".json", ".py"):
        raise _problem(draft.place("answer"), f"answer: {named} is neither FILE.py:CLASS nor FILE.json")
    if not _is_file(path):
        raise _problem(draft.place("answer"), f"answer: there is no file {where}")
    try:
        if path.suffix == ".json":
            return Answer.from_schema(path.name.partition(".")[0], _read_schema(path, where))
        return Answer.from_model(_find_model(import_file(path, where), class_name, where))
    except ValueError as error:
        raise _problem(where, str(error)) from None


def _problem(where: str, what: str) -> ConfigurationError:
    return ConfigurationError(Problem(where, what))


def _read_schema(path: Path, where: str) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise _problem(f"{where}:{error.lineno}", f"not valid JSON: {error.msg}") from None
    except RecursionError:
        raise _problem(where, "is nested too deeply; no answer needs that") from None
    except (OSError, ValueError) as error:
        raise _problem(where, f"cannot be read: {_reason(error)}") from None


def _find_model(module: ModuleType, class_name: str, where: str) -> type[BaseModel]:
    models = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, BaseModel) and value.__module__ == module.__name__
    }
    if class_name in models:
        return models[class_name]
    if hasattr(module, class_name):
        raise _problem(where, f"{class_name} is not a pydantic model defined there")
    raise _problem(where, f"it defines no class {class_name!r}{suggest(class_name, models)}")


def import_file(path: Path, where: str) -> ModuleType:
    """The module in `path`, imported once per content. Raises ConfigurationError on the line that failed."""
    digest = hashlib.sha256(f"{path.resolve()}\0".encode() + path.read_bytes()).hexdigest()
    name = f"farthing_job_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    loader = _FreshLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None  # it is None only where the loader is None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic looks annotations up there
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:  # it may hold anything, an exit() too
        del sys.modules[name]
        raise ConfigurationError(_import_problem(error, path, where)) from error
    return module


class _FreshLoader(SourceFileLoader):
    """Compiles what the file says now, and leaves no `__pycache__` in the job's folder."""

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.get_data(self.path), self.path, "exec", dont_inherit=True)


def _import_problem(error: BaseException, path: Path, where: str) -> Problem:
    if isinstance(error, SyntaxError):
        return Problem(f"{where}:{error.lineno or 1}", f"not valid Python: {error.msg}")
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return Problem(f"{where}:{(lines or [1])[-1]}", f"importing it raised {type(error).__name__}: {error}")


def _read_text(path: Path, root: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise _problem(_shown(path, root), f"cannot be read: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Why a file could not be read, without its path, which the message names already."""
    if isinstance(error, OSError):
        return (error.strerror or type(error).__name__).lower()
    return "it is not UTF-8 text"


def _shown(path: Path, root: Path) -> str:
    """The path as a user would write it: from `root` where it lies below."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
