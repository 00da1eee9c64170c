"""Prefect's server dies under a run: it only shows, so the work goes on or can be gone on with, and is paid once."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from sandbox import postgres
from sandbox.bill import bill_path
from tests.faults.checker import Beside, check
from tests.faults.stage import wait_until
from tests.faults.summary import Tally
from tests.prefect_servers import QUIET, free_port, prefect_server

ROOT = Path(__file__).parents[2]
DOCUMENTS = 400
PAUSED = 3
#: When the server dies, by what there is to see in the ledger by then, and with how many lanes.
MOMENTS = {
    "as the run opens": ("SELECT count(*) FROM run", 1),
    "in its middle": (f"SELECT count(*) / {DOCUMENTS // 4} FROM document", 1),
    "in its middle, two lanes": (f"SELECT count(*) / {DOCUMENTS // 4} FROM document", 2),
    "at its end": (f"SELECT count(*) / {DOCUMENTS} FROM document", 1),
}


@dataclass
class Farthing:
    """The real command line, with a home of its own, against a Prefect server."""

    home: Path
    database_url: str
    environment: dict[str, str]

    @property
    def log(self) -> Path:
        return self.home / "log"

    def start(self, lanes: int) -> subprocess.Popen[bytes]:
        command = ("run", "licences", "--sandbox", "--limit", str(DOCUMENTS), "--lanes", str(lanes), "--json")
        with self.log.open("ab") as log:
            arguments = [sys.executable, "-m", "farthing", *command]
            return subprocess.Popen(arguments, cwd=ROOT, env=self.environment, stdout=log, stderr=log)

    def ask(self, *arguments: str) -> Any:
        command = [sys.executable, "-m", "farthing", *arguments, "--json"]
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, check=False)
        assert done.stdout, done.stderr.decode()
        return json.loads(done.stdout)

    def value(self, query: str) -> int:
        try:
            with psycopg.connect(self.database_url, options="-c search_path=farthing") as connection:
                row = connection.execute(query).fetchone()
        except psycopg.errors.UndefinedTable:
            return 0
        return int(row[0]) if row else 0


@pytest.mark.long
@pytest.mark.xdist_group("prefect")
@pytest.mark.parametrize("moment", MOMENTS)
def test_when_prefects_server_dies_a_run_still_ends_and_pays_once(moment: str, tmp_path: Path, tally: Tally) -> None:
    query, lanes = MOMENTS[moment]
    port = free_port()
    home = tmp_path / "farthing"
    home.mkdir()
    with ExitStack() as stack:
        ledger = stack.enter_context(postgres.running(home))
        server = stack.enter_context(prefect_server(tmp_path, port))
        sandbox = {"FARTHING_HOME": str(home), "FARTHING_TIME_SCALE": "0.5"}
        farthing = Farthing(home, ledger.url, server.environment | QUIET | sandbox)
        run = farthing.start(lanes)
        stack.callback(run.kill)
        assert wait_until(lambda: farthing.value(query) > 0 or run.poll() is not None, 240), farthing.log.read_text()
        assert run.poll() is None, farthing.log.read_text()
        server.kill()
        code = run.wait(300)
        assert code in (0, PAUSED), farthing.log.read_text()
        if code == PAUSED:
            stack.enter_context(prefect_server(tmp_path, port))
            assert farthing.start(lanes).wait(300) == 0, farthing.log.read_text()
        assert farthing.ask("verify")["proved"] is True
        broken = [str(found) for found in check(ledger.url, bill_path(home), Beside()) if found.invariant != "I9"]
        assert broken == [], farthing.log.read_text()
    tally.count("Prefect server killed")
