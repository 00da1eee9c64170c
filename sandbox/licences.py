"""The licence corpus: alone responsible for the demo's documents, and for their answer keys on disk.

2,100-odd software licences with whole texts and the category that ScanCode's experts gave them, from the package
`licensedcode-data` (CC-BY-4.0), which is found through its spec and never imported. Deprecated entries, entries
without a text, and texts that an earlier entry already has are left out.

Whatever machine writes it, the corpus is the same: the order is that of a hash of each licence's key, so that the
first N documents are a fair sample and not the ones that begin with A.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from sandbox.answer_keys import CATEGORIES, Json, Licence, category_line, obligations_line
from sandbox.errors import SandboxError

DISTRIBUTION = "licensedcode-data"
PACKAGE = "licensedcode"
#: Raised with every change to what is written, so that a corpus of an older kind is written anew.
VERSION = 1
FILE_COUNT = 5
ROW_GROUP_ROWS = 200
_FENCE = re.compile(r"^---\s*?$", re.MULTILINE)
_STAMP = "corpus.json"
_KEYS: dict[str, Callable[[Licence], Json]] = {"licences": category_line, "obligations": obligations_line}

_ATTRIBUTION = """\
These documents are software licence texts collected by the ScanCode project, with the names, owners, SPDX keys and
categories that its contributors gave them:

    licensedcode-data {version}, copyright (c) nexB Inc. and others, https://github.com/aboutcode-org/scancode-toolkit
    licensed under CC-BY-4.0, https://creativecommons.org/licenses/by/4.0/legalcode

Changes: deprecated entries, entries without a text and repeated texts were left out; outer white space was removed;
the rest was put into Parquet. Each licence text remains its author's.

answers-licences.jsonl and answers-obligations.jsonl are what the emulator answers. They are SIMULATED: names, owners,
SPDX keys and categories are ScanCode's, but obligations are sentences picked by pattern, not by an expert, and the
wrong answers and the `hard` figures are made up. They measure no model.
"""


@dataclass(frozen=True, slots=True)
class Corpus:
    """What is on disk: the folder, how many documents its Parquet files hold, and which data they are from."""

    folder: Path
    documents: int
    source: str

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def answer_key(self, job: str) -> Path:
        """The emulator's answer key for `licences` or `obligations`."""
        return self.folder / f"answers-{job}.jsonl"


def write_corpus(folder: Path) -> Corpus:
    """The corpus in `folder` (`data/licences` for the shipped jobs), written unless it is there already.

    The stamp is written last and every file appears whole, so an interrupted writing is simply done again. Of
    several processes at once the first one writes; were the others to write too, a reader of the first one's
    documents would see them change. Raises SandboxError if the data package is missing.
    """
    version = _installed_version()
    source = f"{DISTRIBUTION} {version}"
    written = _read_stamp(folder, source)
    if written is not None:
        return written
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _read_stamp(folder, source) or _write_all(folder, version, source)


def _write_all(folder: Path, version: str, source: str) -> Corpus:
    licences = list(read_licences())
    for number in range(FILE_COUNT):
        _write_parquet(folder / f"part-{number}.parquet", licences[number::FILE_COUNT])
    for job, line in _KEYS.items():
        _write_text(folder / f"answers-{job}.jsonl", "".join(map(_json_line, map(line, licences))))
    _write_text(folder / "LICENSE.txt", _ATTRIBUTION.format(version=version))
    stamp = {"version": VERSION, "source": source, "documents": len(licences)}
    _write_text(folder / _STAMP, _json_line(stamp))
    return Corpus(folder, len(licences), source)


def read_licences() -> Iterator[Licence]:
    """Every licence that is current, has a text, and whose text no other has, in the corpus's order."""
    seen: set[str] = set()
    for path in sorted(
        _licence_folder().glob("*.LICENSE"), key=lambda path: hashlib.sha256(path.stem.encode()).digest()
    ):
        licence = _read_licence(path)
        if licence is not None and licence.sha256 not in seen:
            seen.add(licence.sha256)
            yield licence


def _read_licence(path: Path) -> Licence | None:
    """One `.LICENSE` file: YAML between two `---` lines, then the text. None if it is no document for us."""
    _, front, body = _FENCE.split(path.read_text(encoding="utf-8"), maxsplit=2)
    about = yaml.load(front, Loader=_FastLoader)  # noqa: S506  # a safe loader, in C where there is one
    text = body.strip()
    if about.get("is_deprecated") or not text or about.get("category") not in CATEGORIES:
        return None
    spdx = about.get("spdx_license_key")
    owner = about["owner"]
    return Licence(
        key=about["key"],
        text=text,
        category=about["category"],
        name=about["name"],
        owner=None if owner == "Unspecified" else owner,
        spdx=None if spdx is None or spdx.startswith("LicenseRef-") else spdx,
    )


_FastLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _installed_version() -> str:
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise SandboxError(
            f"{DISTRIBUTION} is missing; install farthing[sandbox] to get the demo's documents"
        ) from None


def _licence_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(location) / "data" / "licenses"
        if folder.is_dir():
            return folder
    raise SandboxError(f"{DISTRIBUTION} is installed without its licences; install it again")


def _read_stamp(folder: Path, source: str) -> Corpus | None:
    """The corpus that is there already, if it is whole and of this source and version."""
    try:
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(stamp, dict) or (stamp.get("version"), stamp.get("source")) != (VERSION, source):
        return None
    corpus = Corpus(folder, stamp["documents"], source)
    is_whole = len(corpus.files) == FILE_COUNT and all(corpus.answer_key(job).is_file() for job in _KEYS)
    return corpus if is_whole else None


def _write_parquet(path: Path, licences: Iterable[Licence]) -> None:
    rows = [_row(licence) for licence in licences]
    schema = pa.schema([(name, pa.int64() if name == "words" else pa.string()) for name in rows[0]])
    partial = _partial(path)
    pq.write_table(
        pa.Table.from_pylist(rows, schema=schema),
        partial,
        row_group_size=ROW_GROUP_ROWS,
        compression="zstd",
        write_page_checksum=True,
    )
    os.replace(partial, path)


def _row(licence: Licence) -> dict[str, str | int | None]:
    row = asdict(licence)
    return {"licence_key": row.pop("key"), **row, "words": len(licence.text.split())}


def _write_text(path: Path, text: str) -> None:
    partial = _partial(path)
    partial.write_text(text, encoding="utf-8", newline="\n")
    os.replace(partial, path)


def _partial(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def _json_line(value: Json | dict[str, object]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"
