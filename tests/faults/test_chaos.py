"""Random chaos, by seed: whatever is killed, stopped or cut, and whenever, both proofs find nothing after it.

`FARTHING_CHAOS_SEED=n` plays one seed again; `FARTHING_CHAOS_ROUNDS`, `_KILLS` and `_ZOMBIES` say how long the long
forms go on.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psycopg
import pytest
from pydantic import SecretStr

from sandbox import postgres
from tasks.ledger.connection import upgrade
from tasks.ledger.leases import LeaseTimes
from tests.faults.checker import Snapshot
from tests.faults.stage import Stage, staged, wait_until

#: All of it is for `make faults`: what is left to chance, and to timing, must not decide whether a commit lands. Each
#: commit is killed at every failpoint (test_failpoints.py) and in the middle of a real run (test_kill.py).
pytestmark = pytest.mark.long

DOCUMENTS = 100
#: Everything that is waited for in a run, scaled to a test's patience.
TIMES = LeaseTimes(beat_every_s=0.2, fence_after_s=1.2, grace_s=1.0, dead_after_s=2.0)
#: For what must not be given up within the test.
PATIENT = LeaseTimes(beat_every_s=0.2, fence_after_s=30.0, grace_s=1.0, dead_after_s=40.0)
#: Exit codes of children that nobody killed: done, paused, refused because Postgres is away.
ORDERLY = {0, 2, 3}
#: Those that a signal ended: SIGKILL, SIGTERM before the lane listened, a second SIGTERM.
SIGNALLED = {-signal.SIGKILL, -signal.SIGTERM, 130}


@dataclass
class PrivatePostgres:
    """A server that may be hurt. Its address stays the same."""

    home: Path
    server: postgres.Server
    users: ExitStack

    def hurt(self, number: signal.Signals, away_s: float) -> None:
        """End the server by a signal (SIGINT: fast, SIGQUIT: immediate, SIGKILL), and bring it back."""
        self.end(number)
        time.sleep(away_s)
        self.revive()

    def end(self, number: signal.Signals) -> None:
        os.kill(self.server.pid, number)
        wait_until(lambda: postgres.status(self.home) is None)

    def revive(self) -> None:
        self.server = self.users.enter_context(postgres.running(self.home, throwaway=True))

    def terminate_backends(self) -> None:
        with psycopg.connect(self.server.url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )


@dataclass
class Round:
    """One seed: a run, the children that work on it, and what befell them."""

    seed: int
    stage: Stage
    server: PrivatePostgres
    tally: Counter[str]
    children: list[ForkServerProcess] = field(default_factory=list)
    snapshots: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def play(self, faults: Sequence[str]) -> list[str]:
        """Start, hurt, resume until done. Returns the violations."""
        self.stage.scene()
        self.start()
        if self.random.random() < 0.5:
            self.start()
        for name in faults:
            time.sleep(self.random.uniform(0.05, 1.0))
            self._keep_one_alive()
            FAULTS[name][1](self)
            self.tally[name] += 1
            self.remember()
        return self.end()

    def end(self) -> list[str]:
        """Let those who live end, resume until done, and look."""
        for child in self.children:
            self._judge(child)
        self.stage.resume()
        return self.stage.violations(self.snapshots)

    def remember(self) -> None:
        """Whatever is durable now must be there, unchanged, at the end (I12)."""
        earlier: Snapshot = self.stage.snapshot()
        self.snapshots.update(earlier)

    @property
    def living(self) -> list[ForkServerProcess]:
        return [child for child in self.children if child.exitcode is None]

    def pick(self) -> ForkServerProcess:
        return self.random.choice(self.living)

    def signal(self, child: ForkServerProcess, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(child.pid or 0, number)

    def start(self) -> None:
        self.children.append(self.stage.start())
        self.stage.starts = max(self.stage.starts, len(self.living))

    def _keep_one_alive(self) -> None:
        if not self.living:
            self.start()
            time.sleep(self.random.uniform(0.3, 1.0))  # until it works, mostly
            if not self.living:  # it finished the run, so there is nothing to hurt any more
                self.start()

    def _judge(self, child: ForkServerProcess) -> None:
        """A child may end in good order or by a signal. Postgres away is a reason not to begin, never to give up."""
        code, told = self.stage.wait(child), self.stage.told_by(child)
        assert code in ORDERLY | SIGNALLED, f"seed {self.seed}: exit code {code}: {told}"
        assert code != 2 or "lane working" not in told or "lane ended" in told, f"seed {self.seed}: {told}"
        self.tally[f"exit {code}"] += 1

    def kill(self) -> None:
        child = self.pick()
        self.signal(child, signal.SIGKILL)
        child.join()
        self.tally["kills"] += child.exitcode == -signal.SIGKILL

    def stop_past_the_lease(self) -> None:
        """A zombie: stopped until others have buried its lane, then awake again among them."""
        zombie = self.pick()
        if len(self.living) < 2:
            self.start()
        wait_until(lambda: "lane working" in self.stage.told_by(zombie) or zombie.exitcode is not None, 5)
        buried = f"SELECT count(*) FROM lane WHERE pid = {zombie.pid} AND ended_because = 'died'"
        for _ in range(3):  # stopped in mid-transaction it holds its own row, and nobody can bury it
            self.signal(zombie, signal.SIGSTOP)
            is_zombie = wait_until(lambda: self.stage.value(buried), TIMES.dead_after_s + 0.7)
            time.sleep(self.random.uniform(0.0, 0.4))  # its heirs have begun, or not yet
            self.signal(zombie, signal.SIGCONT)
            if is_zombie or len(self.living) < 2:
                break
            time.sleep(0.02)
        self.tally["zombies"] += is_zombie

    def interrupt(self) -> None:
        self.signal(self.pick(), signal.SIGTERM)

    def interrupt_twice(self) -> None:
        child = self.pick()
        self.signal(child, signal.SIGTERM)
        time.sleep(self.random.uniform(0.0, 0.1))
        self.signal(child, signal.SIGTERM)

    def start_another(self) -> None:
        if len(self.living) < 3:
            self.start()

    def hurt_postgres(self, number: signal.Signals) -> None:
        self.server.hurt(number, away_s=self.random.uniform(0.0, 1.0))

    def terminate_backends(self) -> None:
        self.server.terminate_backends()


#: Every kind of fault, how often it is drawn beyond the once that each is owed, and what it does.
FAULTS: dict[str, tuple[int, Callable[[Round], None]]] = {
    "SIGKILL": (5, Round.kill),
    "stop past the lease": (2, Round.stop_past_the_lease),
    "SIGTERM": (1, Round.interrupt),
    "SIGTERM twice": (1, Round.interrupt_twice),
    "another start": (1, Round.start_another),
    "Postgres restart": (1, lambda round: round.hurt_postgres(signal.SIGINT)),
    "Postgres immediate": (1, lambda round: round.hurt_postgres(signal.SIGQUIT)),
    "Postgres SIGKILL": (1, lambda round: round.hurt_postgres(signal.SIGKILL)),
    "backends terminated": (1, Round.terminate_backends),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stage, PrivatePostgres]]:
    """One server and one stage for all tests here: each plays scenes of its own."""
    folder = tmp_path_factory.mktemp("chaos")
    with ExitStack() as users:
        home, root = folder / "home", folder / "stage"
        server = users.enter_context(postgres.running(home, throwaway=True))
        upgrade(SecretStr(server.url))
        root.mkdir()
        with staged(root, server.url, documents=DOCUMENTS, time_scale=1, reply=0.15) as made:
            made.remember_baseline()
            yield made, PrivatePostgres(home, server, users)


@pytest.fixture
def private(shared: tuple[Stage, PrivatePostgres]) -> PrivatePostgres:
    return shared[1]


@pytest.fixture
def stage(shared: tuple[Stage, PrivatePostgres]) -> Stage:
    stage, private = shared
    if postgres.status(private.home) is None:  # the test before failed while it was away
        private.revive()
    stage.times = TIMES
    return stage


def storm(seed: int, kills: int, stage: Stage) -> Counter[str]:
    """SIGKILL again and again, each time into the work of the one before; a run that ends is followed by another."""
    chance, tally, earlier = random.Random(seed), Counter[str](), dict[str, str]()
    stage.scene()
    while tally["kills"] < kills:
        child = stage.start()
        child.join(chance.uniform(0.2, 1.2))
        child.kill()
        child.join()
        tally["kills"] += child.exitcode == -signal.SIGKILL
        earlier.update(stage.snapshot())
        if child.exitcode == 0:
            tally["runs"] += 1
            assert stage.violations(earlier) == [], f"seed {seed}: {stage.told()}"
            stage.scene()
    stage.resume()
    assert stage.violations(earlier) == [], f"seed {seed}: {stage.told()}"
    return tally + Counter(runs=1)


def hand(seed: int, faults: int) -> list[str]:
    """The faults of a seed. It shares a shuffled deck with its neighbour: every kind once, the rest by weight."""
    chance = random.Random(seed // 2)
    deck = [
        *FAULTS,
        *chance.choices(list(FAULTS), [weight for weight, _ in FAULTS.values()], k=2 * faults - len(FAULTS)),
    ]
    chance.shuffle(deck)
    return deck[:faults] if seed % 2 == 0 else deck[faults:]


def play(seeds: range, faults: int, stage: Stage, private: PrivatePostgres) -> Counter[str]:
    tally: Counter[str] = Counter()
    for seed in seeds:
        found = Round(seed, stage, private, tally).play(hand(seed, faults))
        assert found == [], f"FARTHING_CHAOS_SEED={seed}: {found}\n{stage.told()}"
    return tally


def seeds(usual: range) -> range:
    one = os.environ.get("FARTHING_CHAOS_SEED")
    return range(int(one), int(one) + 1) if one else usual


def test_a_few_faults_of_each_kind_break_no_promise(
    stage: Stage, private: PrivatePostgres, capsys: pytest.CaptureFixture[str]
) -> None:
    played = seeds(range(2))
    tally = play(played, 6, stage, private)
    with capsys.disabled():
        print(f"\n{summary(played, tally)}")
    assert len(played) == 1 or FAULTS.keys() <= tally.keys()


@pytest.mark.parametrize("last", [signal.SIGTERM, signal.SIGKILL])
def test_replies_that_came_while_postgres_was_away_are_not_paid_again(
    last: signal.Signals, stage: Stage, private: PrivatePostgres
) -> None:
    """SIGTERM while finished replies wait for Postgres, then an impatient end: resume finds them on disk."""
    stage.scene()
    stage.times, before = PATIENT, stage.run_id
    child = stage.start()
    documents = f"SELECT count(*) FROM document WHERE run_id > {before}"
    in_flight = f"SELECT count(*) FROM attempt WHERE run_id > {before} AND billing = 'open'"
    unknown = f"SELECT count(*) FROM attempt_unknown WHERE run_id > {before}"
    assert wait_until(lambda: stage.value(documents) > 20)
    private.end(signal.SIGKILL)
    time.sleep(1.0)  # until every reply has come
    os.kill(child.pid or 0, signal.SIGTERM)
    assert wait_until(lambda: list((stage.root / "farthing" / "spill").glob("*.jsonl")) != [])
    time.sleep(0.5)
    os.kill(child.pid or 0, last)
    child.join()
    private.revive()
    assert stage.value(in_flight) > 0
    earlier = stage.snapshot()
    stage.resume()
    assert stage.value(unknown) == 0
    assert list((stage.root / "farthing" / "spill").iterdir()) == []
    assert stage.violations(earlier) == [], stage.told()


def test_a_run_killed_again_and_again_still_ends_and_proves(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    tally = storm(1, 25, stage)
    with capsys.disabled():
        print(f"\n{summary(range(1, 2), tally)}")


def test_a_storm_of_kills_breaks_no_promise(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    tally = storm(1, int(os.environ.get("FARTHING_CHAOS_KILLS", "100")), stage)
    with capsys.disabled():
        print(f"\n{summary(range(1, 2), tally)}")


def zombies(seed: int, many: int, stage: Stage, private: PrivatePostgres) -> Counter[str]:
    """One lane after the other is taken for dead while it works, and wakes up among those who took its shards."""
    tally: Counter[str] = Counter()
    while tally["zombies"] < many:
        seed += 1
        stage.scene()
        round = Round(seed, stage, private, tally)
        round.start()
        time.sleep(round.random.uniform(0.3, 1.0))
        if round.living:
            round.stop_past_the_lease()
        found = round.end()
        assert found == [], f"seed {seed}: {found}\n{stage.told()}"
        tally["runs"] += 1
    return tally


def test_a_lane_that_wakes_up_after_its_burial_commits_nothing(
    stage: Stage, private: PrivatePostgres, capsys: pytest.CaptureFixture[str]
) -> None:
    tally = zombies(0, 2, stage, private)
    with capsys.disabled():
        print(f"\n{summary(range(1), tally)}")


def test_many_zombies_break_no_promise(
    stage: Stage, private: PrivatePostgres, capsys: pytest.CaptureFixture[str]
) -> None:
    tally = zombies(100, int(os.environ.get("FARTHING_CHAOS_ZOMBIES", "10")), stage, private)
    with capsys.disabled():
        print(f"\n{summary(range(100, 101), tally)}")


def test_chaos_breaks_no_promise(stage: Stage, private: PrivatePostgres, capsys: pytest.CaptureFixture[str]) -> None:
    played = seeds(range(1000, 1000 + int(os.environ.get("FARTHING_CHAOS_ROUNDS", "20"))))
    tally = play(played, 8, stage, private)
    with capsys.disabled():
        print(f"\n{summary(played, tally)}")
    assert tally["kills"] > 0
    assert len(played) == 1 or FAULTS.keys() <= tally.keys()


def summary(played: range, tally: Counter[str]) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in sorted(tally.items()))
    return f"chaos, seeds {played.start} to {played.stop - 1}: {counts}; 0 violations"
