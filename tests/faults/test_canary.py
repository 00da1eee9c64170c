"""A key, a password and a document's text go through every failure at DEBUG, and turn up nowhere (G15).

The real command line with a real Prefect server and its SQLite: everything that is written or said is searched.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from psycopg import sql

from sandbox import service
from sandbox.mishaps import KINDS
from schemas.tables import metadata
from tests.faults.stage import wait_until
from tests.faults.summary import Tally
from tests.world import CLOCK, JOB, PROMPT, SCHEMA

ROOT = Path(__file__).parents[2]
#: Written in two halves, so that no scanner of secrets takes this file for a leak.
KEY = "sk-" + "sandbox-canary7f3ce1"
PASSWORD = "pw" + "canary90ad44"
TEXT = "textcanary5b2e08"
DOCUMENTS = 80
LEVELS = ("DEBUG", "INFO ", "WARNI", "ERROR")
#: These stop a run, so each needs a start of its own.
STOPPING = ("401", "402", "403", "404", "usage_over_max_tokens")


#: One server serves all of these tests, so one worker runs them.
pytestmark = [pytest.mark.long, pytest.mark.xdist_group("canary")]


@dataclass(frozen=True)
class Prefect:
    """A Prefect server of its own: its SQLite and its log are in `home`."""

    url: str
    home: Path


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    arguments = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(arguments, env=environment, stdout=log, stderr=log)
    try:
        assert wait_until(lambda: is_healthy(port), 180), (home / "server.log").read_text()
        yield Prefect(f"http://127.0.0.1:{port}/api", home)
    finally:
        server.terminate()
        server.wait(30)


def is_healthy(port: str) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health").close()
    except OSError:
        return False
    return True


@dataclass
class Cage:
    """Where commands run and whatever they leave is kept."""

    root: Path
    ledger_url: str
    owner_url: str
    endpoint: str
    prefect: Prefect
    output: bytes = field(default=b"", repr=False)
    command_lines: set[bytes] = field(default_factory=set, repr=False)

    @property
    def heard(self) -> Path:
        return self.root / "heard.log"

    def farthing(self, *arguments: str, terminate: str | None = None, **environment: str) -> int:
        """The exit code of a command, given SIGTERM once a query says that it is time."""
        said = self.root / "said.log"
        with self._watched(), said.open("wb") as output:  # a pipe would be full before anybody reads it
            command = subprocess.Popen(
                [sys.executable, "-m", "farthing", *arguments], cwd=self.root, env=self._environment(environment),
                stdout=output, stderr=output,
            )  # fmt: skip
            if terminate is not None:
                self._wait_for(terminate, command)
                command.send_signal(signal.SIGTERM)
            command.wait(240)
        self.output += said.read_bytes()
        return command.returncode

    def rows(self, *, with_answers: bool) -> bytes:
        """The whole ledger as text, also what no role of Farthing's may read."""
        found = b""
        with psycopg.connect(self.owner_url) as connection:
            for table in metadata.sorted_tables:
                columns = [c.name for c in table.columns if with_answers or c.name not in ("answer", "content")]
                names = sql.SQL(", ").join(map(sql.Identifier, columns))
                copy = sql.SQL("COPY (SELECT {} FROM farthing.{}) TO STDOUT").format(
                    names, sql.Identifier(table.name)
                )
                with connection.cursor().copy(copy) as rows:
                    found += b"".join(map(bytes, rows))
        return found

    def left(self) -> dict[str, bytes]:
        """Everything that was said or written, but for the ledger and the emulator's own files."""
        files = [self.root / "home", self.heard, self.prefect.home]
        every = [path for top in files for path in ([top] if top.is_file() else top.rglob("*")) if path.is_file()]
        said = {"output": self.output, "command lines": b"\n".join(sorted(self.command_lines))}
        return said | {path.name: path.read_bytes() for path in every}

    def plan_mishaps(self, *rules: dict[str, object]) -> None:
        for method, body in (("DELETE", None), ("POST", json.dumps(rules).encode())):
            urllib.request.urlopen(
                urllib.request.Request(f"{self.endpoint}/sandbox/mishaps", body, method=method)
            ).close()

    def _environment(self, changes: dict[str, str]) -> dict[str, str]:
        return os.environ | {
            "FARTHING_DATABASE_URL": self.ledger_url, "FARTHING_HOME": str(self.root / "home"),
            "FARTHING_SANDBOX": "1", "FARTHING_TIME_SCALE": "0", "FARTHING_LOG_JSON": "1",
            "DEEPSEEK_BASE_URL": self.endpoint, "DEEPSEEK_API_KEY": KEY, "OPENAI_LOG": "debug",
            "PREFECT_HOME": str(self.prefect.home), "PREFECT_API_URL": self.prefect.url,
            "PREFECT_LOGGING_LEVEL": "DEBUG",
            "FARTHING_FAULTS_HEARD": str(self.heard), "PYTHONPATH": f"{self.root / 'ear'}{os.pathsep}{ROOT}",
        } | changes  # fmt: skip

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Collect the command lines of all processes of this machine, as anybody can see them."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.5):
                for path in Path("/proc").glob("[0-9]*/cmdline"):
                    with contextlib.suppress(OSError):
                        self.command_lines.add(path.read_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def _wait_for(self, query: str, command: subprocess.Popen[bytes]) -> None:
        pause = threading.Event()
        with psycopg.connect(self.ledger_url, autocommit=True) as connection:
            for _ in range(1200):
                row = connection.execute(query.encode()).fetchone()
                if command.poll() is not None or (row is not None and row[0]):
                    return
                pause.wait(0.05)


@pytest.fixture
def cage(tmp_path: Path, ledger_url: str, prefect: Prefect) -> Iterator[Cage]:
    """A job whose documents hold the canary, an emulator that repeats every third of them, a login of its own."""
    write_job(tmp_path)
    login = f"canary_{secrets.token_hex(6)}"
    with psycopg.connect(ledger_url, autocommit=True) as root:
        who = sql.Identifier(login)
        root.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(who, PASSWORD))
        root.execute(sql.SQL("GRANT farthing_lane, farthing_auditor TO {}").format(who))
        at = ledger_url.partition("@")[2]
        options: dict[str, service.Option] = {"answers": tmp_path / "answers.jsonl", "clock": CLOCK, "cache_build": 0}
        with service.running(tmp_path / "provider", time_scale=0, **options) as emulator:
            yield Cage(tmp_path, f"postgresql://{login}:{PASSWORD}@{at}", ledger_url, emulator.url, prefect)
        root.execute(sql.SQL("DROP OWNED BY {}; DROP ROLE {}").format(who, who))


def write_job(root: Path) -> None:
    texts = [f"document {number} ({TEXT}) is about a colour" for number in range(DOCUMENTS)]
    lines = [
        json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "answer": {"colour": text}})
        for text in texts[::3]
    ]
    (root / "answers.jsonl").write_text("\n".join(lines))
    table = pa.table({"id": [f"d{number}" for number in range(DOCUMENTS)], "text": texts})
    pq.write_table(table, root / "documents.parquet", row_group_size=10)
    (root / "broken.parquet").write_bytes((root / "documents.parquet").read_bytes()[:-40] + TEXT.encode() * 9)
    for name in ("colours", "broken"):
        folder = root / "jobs" / name
        folder.mkdir(parents=True)
        job = JOB.replace("deadline_s: 5", "deadline_s: 2").replace("name: colours", f"name: {name}")
        (folder / "job.yaml").write_text(
            job.replace("documents.parquet", f"{name}.parquet") if name == "broken" else job
        )
        (folder / "prompt.md").write_text(PROMPT)
        (folder / "answer.schema.json").write_text(SCHEMA)
    (root / "ear").mkdir()
    shutil.copy(ROOT / "tests/faults/eavesdrop.py", root / "ear" / "sitecustomize.py")


def leaks(places: dict[str, bytes], *canaries: str) -> list[str]:
    """Where a canary is, as it is or in base64 (Prefect's pickles) or hex."""
    return sorted(
        f"{canary} in {place}: …{found[max(0, found.index(form) - 120) : found.index(form) + 60]!r}…"
        for place, found in places.items()
        for canary in canaries
        for form in forms(canary)
        if form in found
    )


def forms(canary: str) -> list[bytes]:
    raw = canary.encode()
    shifted = [base64.b64encode(b" " * shift + raw)[4:-4] for shift in range(3)]
    return [raw, raw.hex().encode(), *shifted]


def assert_silence(cage: Cage) -> None:
    left = cage.left()
    assert leaks(left, KEY, PASSWORD, TEXT) == []
    assert leaks({"the ledger": cage.rows(with_answers=True)}, KEY, PASSWORD) == []
    assert leaks({"the ledger, answers apart": cage.rows(with_answers=False)}, TEXT) == []


@pytest.mark.long
def test_every_way_to_fail_keeps_its_secrets(cage: Cage, tally: Tally) -> None:
    wrong = cage.ledger_url.replace(PASSWORD, f"{PASSWORD}x")
    assert cage.farthing("run", "colours", FARTHING_DATABASE_URL=wrong) == 2
    assert cage.farthing("run", "broken") == 2
    kinds = [kind for kind in KINDS if kind not in STOPPING]
    cage.plan_mishaps(*({"kind": kind, "first": 1} for kind in kinds))
    assert cage.farthing("run", "colours") in (0, 1, 3), cage.output
    speakers = {
        line.split()[1].partition(".")[0] for line in cage.heard.read_text().splitlines() if line[:5] in LEVELS
    }
    assert {"sqlalchemy", "psycopg", "prefect", "openai", "httpx2", "farthing"} <= speakers
    assert any(b"enrich-colours" in found for place, found in cage.left().items() if "prefect.db" in place)
    assert TEXT.encode() in cage.rows(with_answers=True), "no answer repeats its document, so nothing was tried"
    assert_silence(cage)
    tally.figure("canaries", f"0 hits in {sum(map(len, cage.left().values())) >> 10:,} KiB of logs, files and output")


def test_a_bug_whose_message_quotes_a_document_tells_nobody(cage: Cage) -> None:
    """Exit 70; neither the terminal nor Prefect, which stores what ends a task, learns what the exception says."""
    assert cage.farthing("run", "colours", FARTHING_FAULTS_BUG=TEXT) == 70, cage.output
    assert b"RuntimeError at " in cage.output
    assert b"please report this as a bug" in cage.output
    assert_silence(cage)


@pytest.mark.long
def test_a_stopped_run_keeps_its_secrets(cage: Cage) -> None:
    for kind in STOPPING:
        cage.plan_mishaps({"kind": kind})
        assert cage.farthing("run", "colours") in (2, 3, 4), cage.output  # 4: it billed above the worst case
    cage.plan_mishaps({"kind": "hang", "args": {"seconds": 2}, "every": 2})
    begun = "SELECT count(*) > 0 FROM farthing.lane WHERE ended_at IS NULL AND attempts > 0"
    assert cage.farthing("run", "colours", terminate=begun) in (3, 4), cage.output
    cage.plan_mishaps()
    for command in (("run", "colours", "--json"), ("audit",), ("status",), ("verify",), ("verify", "--json")):
        assert cage.farthing(*command) in (0, 1, 4), cage.output
    assert_silence(cage)
