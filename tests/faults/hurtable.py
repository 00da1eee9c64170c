"""A Postgres of a test's own, which may be ended in every way there is and comes back at the same address."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

from sandbox import postgres
from tests.faults.stage import wait_until


@dataclass
class HurtablePostgres:
    """The server of `home`. Whoever ended it brings it back with `revive`."""

    home: Path
    server: postgres.Server
    users: ExitStack

    def hurt(self, number: signal.Signals, away_s: float) -> None:
        """End the server by a signal (SIGINT: fast, SIGQUIT: immediate, SIGKILL), and bring it back."""
        self.end(number)
        time.sleep(away_s)
        self.revive()

    def end(self, number: signal.Signals) -> None:
        """Returns once it answers nobody."""
        os.kill(self.server.pid, number)
        wait_until(lambda: postgres.status(self.home) is None)

    def revive(self) -> None:
        """Returns once it answers again; fine if it never went."""
        self.server = self.users.enter_context(postgres.running(self.home, throwaway=True))

    def terminate_backends(self) -> None:
        """Cut every client off."""
        with psycopg.connect(self.server.url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )


@contextmanager
def hurtable(home: Path) -> Iterator[HurtablePostgres]:
    """A server of its own in `home`, deleted at the end."""
    with ExitStack() as users:
        yield HurtablePostgres(home, users.enter_context(postgres.running(home, throwaway=True)), users)


__all__ = ["HurtablePostgres", "hurtable"]
