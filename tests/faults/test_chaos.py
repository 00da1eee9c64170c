"""Random chaos, by seed: whatever is killed, stopped or cut, and whenever, both proofs find nothing after it."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess

import pytest
from pydantic import SecretStr

from sandbox.postgres import Server, create_database, drop_database, status
from tasks.ledger.leases import LeaseTimes
from tasks.ledger.upgrades import upgrade
from tests.faults.checker import Snapshot
from tests.faults.hurtable import HurtablePostgres, hurtable
from tests.faults.stage import Stage, staged, wait_until
from tests.faults.summary import Tally

DOCUMENTS = 150
#: Everything that is waited for in a run, scaled to a test's patience: the killed are buried at once.
TIMES = LeaseTimes(beat_every_s=0.1, fence_after_s=1.2, grace_s=0.3, dead_after_s=2.0)
#: For what must not be given up within the test.
PATIENT = LeaseTimes(beat_every_s=0.2, fence_after_s=30.0, grace_s=1.0, dead_after_s=40.0)
#: Exit codes of children that nobody killed: done, paused, refused because Postgres is away.
ORDERLY = {0, 2, 3}
#: Those that a signal ended: SIGKILL, SIGTERM before the lane listened, a second SIGTERM.
SIGNALLED = {-signal.SIGKILL, -signal.SIGTERM, 130}
#: Long storms are played in so many parts, which several workers may share.
PARTS = 4


@dataclass
class Round:
    """One run, the children that work on it, and what befell them, by a seed. `server` is for what hurts it.

    The seed is the fault run's times 1,000 and the number of the round, but in the short form, where it is the same.
    It decides which faults are played and when; what they meet is up to the machine.
    """

    seed: int
    stage: Stage
    server: HurtablePostgres | None = None
    faults: Counter[str] = field(default_factory=Counter)
    children: list[ForkServerProcess] = field(default_factory=list)
    snapshots: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.stage.scene()

    def play(self, faults: Sequence[str]) -> None:
        """Start, hurt, resume until done, look."""
        self.start()
        if self.random.random() < 0.5:
            self.start()
        for name in faults:
            time.sleep(self.random.uniform(0.05, 0.6))
            self.keep_alive(1)
            self.faults[name] += FAULTS[name][1](self)
            self.remember()
        self.end()

    def end(self) -> None:
        """Let those who live end, resume until done, and look."""
        while self.children:
            self._judge(self.children.pop())
        self.stage.resume()
        found = self.stage.violations(self.snapshots)
        assert found == [], f"round {self.seed}: {found}\n{self.stage.told()}"
        self.snapshots.clear()
        self._ask_again()

    def _ask_again(self) -> None:
        """G5, in any run: once more the same command finds every result there and pays for none of them."""
        before = self.stage.run_id
        assert self.stage.run() == 0, f"round {self.seed}: {self.stage.told()}"
        results = f"SELECT document_no FROM document WHERE run_id = {before} AND state = 'result'"
        paid = f"SELECT count(*) FROM attempt_intent WHERE run_id > {before} AND document_no IN ({results})"
        reused = f"SELECT count(*) FROM document WHERE run_id > {before} AND state = 'reused'"
        asked, found = self.stage.value(paid), self.stage.value(reused)
        assert asked == 0 < found, f"round {self.seed}: {asked} paid again, {found} reused: {self.stage.told()}"

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

    def start(self, **order: object) -> ForkServerProcess:
        child = self.stage.start(**order)
        self.children.append(child)
        # Whoever ended just now may have left requests that its provider still works on.
        self.stage.starts = max(self.stage.starts, len(self.living) + 1)
        return child

    def keep_alive(self, many: int) -> None:
        """So many children work on the run, unless it is over; each is given a moment to begin, mostly."""
        while len(self.living) < many:
            self.start()
            time.sleep(self.random.uniform(0.2, 0.8))
            if not self.living:  # it finished the run, so there is nothing to hurt any more
                self.start()

    def _judge(self, child: ForkServerProcess) -> None:
        """A child may end in good order or by a signal. Postgres away is a reason not to begin, never to give up."""
        code, told = self.stage.wait(child), self.stage.told_by(child)
        assert code in ORDERLY | SIGNALLED, f"round {self.seed}: exit code {code}: {told}"
        assert code != 2 or "lane working" not in told or "lane ended" in told, f"round {self.seed}: {told}"

    def kill(self) -> bool:
        """Whether a child was killed: one that has just ended by itself was not."""
        child = self.pick()
        self.signal(child, signal.SIGKILL)
        child.join()
        return child.exitcode == -signal.SIGKILL

    def stop_past_the_lease(self) -> bool:
        """Whether a stopped lane woke up after others had buried it."""
        zombie = self.pick()
        self.keep_alive(2)
        wait_until(lambda: "lane working" in self.stage.told_by(zombie) or zombie.exitcode is not None, 5)
        buried = f"SELECT count(*) FROM lane WHERE pid = {zombie.pid} AND ended_because = 'died'"
        self.signal(zombie, signal.SIGSTOP)
        is_zombie = wait_until(lambda: self.stage.value(buried), TIMES.dead_after_s + 0.7)
        time.sleep(self.random.uniform(0.0, 0.4))  # its heirs have begun, or not yet
        self.signal(zombie, signal.SIGCONT)
        return bool(is_zombie)

    def interrupt(self) -> bool:
        self.signal(self.pick(), signal.SIGTERM)
        return True

    def interrupt_twice(self) -> bool:
        child = self.pick()
        self.signal(child, signal.SIGTERM)
        time.sleep(self.random.uniform(0.0, 0.1))
        self.signal(child, signal.SIGTERM)
        return True

    def start_another(self) -> bool:
        if len(self.living) >= 3:
            return False
        self.start()
        return True

    def hurt_postgres(self, number: signal.Signals) -> bool:
        assert self.server is not None
        self.server.hurt(number, away_s=self.random.uniform(0.0, 0.5))
        return True

    def terminate_backends(self) -> bool:
        assert self.server is not None
        self.server.terminate_backends()
        return True


#: Every kind of fault, how often it is drawn beyond the once that each is owed, and what it does: it returns whether
#: it was played.
FAULTS: dict[str, tuple[int, Callable[[Round], bool]]] = {
    "SIGKILL": (5, Round.kill),
    "zombie lane": (2, Round.stop_past_the_lease),
    "SIGTERM": (1, Round.interrupt),
    "SIGTERM twice": (1, Round.interrupt_twice),
    "another start": (1, Round.start_another),
    "Postgres restart": (1, lambda round: round.hurt_postgres(signal.SIGINT)),
    "Postgres immediate stop": (1, lambda round: round.hurt_postgres(signal.SIGQUIT)),
    "Postgres killed": (1, lambda round: round.hurt_postgres(signal.SIGKILL)),
    "backends terminated": (1, Round.terminate_backends),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stage, HurtablePostgres]]:
    """One server and one stage for all tests of a worker: each plays scenes of its own."""
    root = tmp_path_factory.mktemp("chaos")
    with hurtable(root / "home") as server:
        upgrade(SecretStr(server.server.url))
        with staged(root, server.server.url, documents=DOCUMENTS, time_scale=1, reply=0.15) as made:
            made.times = TIMES
            made.remember_baseline()
            yield made, server


@pytest.fixture
def calm(postgres: Server, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A stage on the server of all tests: nothing here may hurt it."""
    root = tmp_path_factory.mktemp("calm")
    name = f"calm_{root.parent.name}_{root.name}".replace("-", "_")
    url = create_database(postgres, name, template=template)
    with staged(root, url, documents=DOCUMENTS, time_scale=1, reply=0.15) as made:
        made.times = TIMES
        made.remember_baseline()
        yield made
    drop_database(postgres, name)


@pytest.fixture
def server(shared: tuple[Stage, HurtablePostgres]) -> HurtablePostgres:
    return shared[1]


@pytest.fixture
def stage(shared: tuple[Stage, HurtablePostgres]) -> Stage:
    stage, server = shared
    if status(server.home) is None:  # the test before failed while it was away
        server.revive()
    stage.times, stage.starts = TIMES, 1
    return stage


def storm(round: Round, fault: str, times: int, lanes: int) -> None:
    """One fault again and again, into the work of so many lanes; a run that ends is followed by another."""
    while round.faults[fault] < times:
        round.keep_alive(lanes)
        time.sleep(round.random.uniform(0.1, 0.7))
        if not round.living:
            round.end()
            round.stage.scene()
        elif FAULTS[fault][1](round):
            round.faults[fault] += 1
            if round.faults[fault] % 5 == 0:
                round.remember()
    round.end()


def hand(seed: int, faults: int) -> list[str]:
    """The faults of a seed. It shares a shuffled deck with its neighbour: every kind once, the rest by weight."""
    chance = random.Random(seed // 2)
    weights = [weight for weight, _ in FAULTS.values()]
    deck = [*FAULTS, *chance.choices(list(FAULTS), weights, k=2 * faults - len(FAULTS))]
    chance.shuffle(deck)
    return deck[:faults] if seed % 2 == 0 else deck[faults:]


def share(full: int, scale: float) -> int:
    """The part of a full count that one of PARTS plays at this scale, and one at least."""
    return max(1, round(full * scale / PARTS))


def test_a_run_killed_again_and_again_still_ends_and_proves(calm: Stage, seed: int, tally: Tally) -> None:
    round = Round(seed, calm)
    storm(round, "SIGKILL", 24, lanes=2)
    tally.count_all(round.faults)


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_a_storm_of_kills_breaks_no_promise(
    part: int, stage: Stage, server: HurtablePostgres, seed: int, scale: float, tally: Tally
) -> None:
    """One lane or two starts of the same command at once, killed in every phase of their lives."""
    round = Round(seed * 1000 + part, stage, server)
    storm(round, "SIGKILL", share(1000, scale), lanes=1 + part % 2)
    tally.count_all(round.faults)


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_a_storm_of_postgres_crashes_breaks_no_promise(
    part: int, stage: Stage, server: HurtablePostgres, seed: int, scale: float, tally: Tally
) -> None:
    round = Round(seed * 1000 + part, stage, server)
    fault = ("Postgres killed", "Postgres immediate stop")[part % 2]
    storm(round, fault, share(120, scale), lanes=2)
    tally.count_all(round.faults)


@pytest.mark.long
@pytest.mark.parametrize("pair", range(PARTS))
def test_every_kind_of_fault_at_random_breaks_no_promise(
    pair: int, stage: Stage, server: HurtablePostgres, seed: int, scale: float, tally: Tally
) -> None:
    """Two seeds share every kind of fault; half of them begin with two starts at once."""
    first = seed * 1000 + 2 * pair * 100
    faults: Counter[str] = Counter()
    for number in range(first, first + 2 * share(8, scale)):
        Round(number, stage, server, faults).play(hand(number, 8))
    tally.count_all(faults)


@pytest.mark.long
@pytest.mark.parametrize("is_away", [False, True], ids=["Postgres up", "Postgres away"])
def test_a_lane_told_twice_to_stop_ends_whether_postgres_is_there_or_not(
    is_away: bool, stage: Stage, server: HurtablePostgres, seed: int, scale: float, tally: Tally
) -> None:
    """At any moment of its work: a cancellation in mid-COPY on a connection that breaks must not be lost."""
    round = Round(seed, stage, server)
    for number in range(max(1, int(50 * scale))):
        child = round.start()
        wait_until(lambda child=child: "lane working" in stage.told_by(child) or child.exitcode is not None)
        time.sleep(round.random.uniform(0.0, 0.3))
        if is_away:
            server.end(signal.SIGKILL)
            time.sleep(round.random.uniform(0.0, 0.2))
        round.signal(child, signal.SIGTERM)
        time.sleep(round.random.uniform(0.0, 0.1))
        round.signal(child, signal.SIGTERM)
        stage.wait(child)
        if is_away:
            server.revive()
        if child.exitcode == 0 or number % 10 == 9:
            round.end()
            stage.scene()
    round.end()
    tally.count("SIGTERM twice", number + 1)
    if is_away:
        tally.count("Postgres killed", number + 1)


@pytest.mark.long
@pytest.mark.parametrize("last", [None, signal.SIGTERM, signal.SIGKILL])
def test_replies_that_came_while_postgres_was_away_are_not_paid_again(
    last: signal.Signals | None, stage: Stage, server: HurtablePostgres, tally: Tally
) -> None:
    """SIGTERM while finished replies wait for Postgres, then an impatient end or none: resume finds them on disk."""
    stage.scene()
    stage.times, before = PATIENT, stage.run_id
    child = stage.start()
    documents = f"SELECT count(*) FROM document WHERE run_id > {before}"
    in_flight = f"SELECT count(*) FROM attempt WHERE run_id > {before} AND billing = 'open'"
    unknown = f"SELECT count(*) FROM attempt_unknown WHERE run_id > {before}"
    assert wait_until(lambda: stage.value(documents) > 20)
    server.end(signal.SIGKILL)
    time.sleep(1.0)  # until every reply has come
    os.kill(child.pid or 0, signal.SIGTERM)
    assert wait_until(lambda: list((stage.root / "farthing" / "spill").glob("*.jsonl")) != [])
    time.sleep(0.5)
    if last is not None:
        os.kill(child.pid or 0, last)
    code = stage.wait(child)
    assert last is signal.SIGKILL or code == 3, stage.told()
    assert last is not None or "waits on disk until the run goes on: start Postgres" in stage.told()
    server.revive()
    assert stage.value(in_flight) > 0
    earlier = stage.snapshot()
    stage.resume()
    assert stage.value(unknown) == 0
    assert list((stage.root / "farthing" / "spill").iterdir()) == []
    assert stage.violations(earlier) == [], stage.told()
    tally.count("Postgres killed")
