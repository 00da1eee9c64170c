"""One Prefect server, and the README's commands played on it once, for all tests that ask for them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from sandbox import postgres
from sandbox.licences import write_corpus
from tests.acceptance.played import Played
from tests.prefect_servers import README_S_SCHEDULE, ROOT, PrefectServer, free_port, prefect_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    with prefect_server(tmp_path_factory.mktemp("prefect"), free_port()) as server:
        yield server


@pytest.fixture(scope="session")
def played(server: PrefectServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    """The README's commands, and what they leave behind.

    All but those that start the server, which is there, and activate the environment, which is on.
    """
    own = ("source ", "prefect server start", "export PREFECT_API_URL")
    played = [line for line in README_S_SCHEDULE if not line.startswith(own)]
    assert len(README_S_SCHEDULE) - len(played) == len(own)
    write_corpus(ROOT / "data" / "licences")  # the README's reader has them from `make demo`
    told = tmp_path_factory.mktemp("played") / "told"
    with told.open("wb") as log:
        outputs = {"stdout": log, "stderr": log}
        shell = subprocess.Popen(
            ["bash", "-ec", "\n".join(played)], cwd=ROOT, env=server.environment, start_new_session=True, **outputs
        )
    left = None
    try:
        assert shell.wait(600) == 0, told.read_text()
        with postgres.running(Path(server.environment["FARTHING_HOME"])) as ledger:
            addresses = json.loads(server.command("farthing", "sandbox", "up", "--json"))
            left = Played(server, ledger.url, addresses, shell, told)
            yield left
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)  # the worker, too
        if left is not None:
            left.kill_worker()
        server.command("farthing", "sandbox", "down", "--force")
