"""A bad line before the model, before Postgres and before both: runs through the fault proxy keep their promise."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerProcess
from typing import Any

import pytest
from sqlalchemy import make_url

from sandbox.postgres import Server, create_database, drop_database
from tasks.ledger.leases import LeaseTimes
from tests.faults.proxy import COMMIT, Fault, Kind, Proxy, Toward
from tests.faults.stage import Stage, staged, wait_until
from tests.faults.summary import Tally

DOCUMENTS = 20
#: Nobody's lease runs out because a line is slow; whoever does not answer is asked again soon.
TIMES = LeaseTimes(beat_every_s=0.1, fence_after_s=8.0, grace_s=0.3, answer_within_s=1.0, once_within_s=2.0)

#: Nobody waits long for a reply.
TIERS = "{flash: {max_tokens: 100, deadline_s: 1}, pro: {max_tokens: 100, deadline_s: 1}}"
#: How long a black hole lasts: longer than anybody waits for it.
PATIENCE_S = {Kind.BLACK_HOLE: 600.0}


@dataclass
class Lines:
    """A stage with a proxy on each of its two lines."""

    stage: Stage
    model: Proxy
    ledger: Proxy

    def start(self, **order: Any) -> ForkServerProcess:
        """A child that reaches model and Postgres through the proxies only."""
        urls = {
            "base_url": f"http://127.0.0.1:{self.model.port}",
            "database_url": make_url(self.stage.database_url)
            .set(port=self.ledger.port)
            .render_as_string(hide_password=False),
        }
        return self.stage.start(**{**urls, **order})


@pytest.fixture(scope="module")
def shared(postgres: Server, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    root = tmp_path_factory.mktemp("wire")
    name = f"wire_{root.parent.name}_{root.name}".replace("-", "_")
    url = create_database(postgres, name, template=template)
    with staged(root, url, documents=DOCUMENTS) as made:
        made.times = TIMES
        made.change_job(tiers=TIERS)
        made.remember_baseline()
        yield made
    drop_database(postgres, name)


@pytest.fixture
def lines(shared: Stage, seed: int) -> Iterator[Lines]:
    with ExitStack() as proxies:
        model = proxies.enter_context(Proxy(make_url(shared.base_url).port or 0, seed=seed))
        ledger = proxies.enter_context(Proxy(make_url(shared.database_url).port or 0, seed=seed))
        yield Lines(shared, model, ledger)


SLOW = (Kind.LATENCY, Kind.TRICKLE, Kind.SLICES)
BROKEN = (Kind.CUT, Kind.RESET, Kind.HALF_CLOSE, Kind.LOST_ANSWER)


def once_each(kinds: Sequence[Kind], toward: Toward, chance: random.Random, every: int) -> list[Fault]:
    """A fault of each kind, each to strike once, in an order and at places that chance decides."""
    return [
        Fault(kind, toward, after=chance.randint(0, 40), seconds=PATIENCE_S.get(kind, 0.002), nth=every * number)
        for number, kind in enumerate(chance.sample(kinds, len(kinds)), 2)
    ]


def kinds_toward(toward: Toward, kinds: Sequence[Kind]) -> list[Kind]:
    """Only what is asked can lose its answer."""
    return [kind for kind in kinds if toward is Toward.SERVER or kind is not Kind.LOST_ANSWER]


def judge(lines: Lines, child: ForkServerProcess, seed: int) -> int:
    """The child ended in good order: a bad line is a reason not to begin, or to pause, never to give up."""
    code, told = lines.stage.wait(child), lines.stage.told_by(child)
    assert code in (0, 2, 3), f"seed {seed}: exit code {code}: {told}"
    assert code != 2 or "lane working" not in told or "lane ended" in told, f"seed {seed}: {told}"
    return code


def play(lines: Lines, seed: int, model: Sequence[Fault] = (), ledger: Sequence[Fault] = ()) -> int:
    """A run over bad lines, gone on with over good ones, and both proofs. Returns the first child's exit code."""
    lines.stage.scene()
    lines.model.play(*model)
    lines.ledger.play(*ledger)
    code = judge(lines, lines.start(), seed)
    earlier = lines.stage.snapshot()
    if code:
        lines.model.play()
        lines.ledger.play()
        lines.stage.resume()
    found = lines.stage.violations(earlier)
    assert found == [], f"seed {seed}: {found}\n{lines.stage.told()}"
    return code


def tell(tally: Tally, lines: Lines) -> None:
    for name, proxy in (("model", lines.model), ("Postgres", lines.ledger)):
        for fault, times in proxy.struck.items():
            tally.count(f"{name}: {fault}", times)


@pytest.mark.parametrize("toward", Toward)
def test_each_fault_of_the_line_to_the_model_strikes_once_and_breaks_no_promise(
    toward: Toward, lines: Lines, seed: int, tally: Tally
) -> None:
    kinds = kinds_toward(toward, [*SLOW, *BROKEN, Kind.BLACK_HOLE])
    faults = once_each(kinds, toward, random.Random(seed), every=2)
    assert play(lines, seed, model=faults) == 0
    assert {fault.kind for fault in lines.model.struck} == set(kinds), f"seed {seed}"
    tell(tally, lines)


@pytest.mark.parametrize("toward", Toward)
def test_each_fault_of_the_line_to_postgres_strikes_once_and_breaks_no_promise(
    toward: Toward, lines: Lines, seed: int, tally: Tally
) -> None:
    """From where a lane works: what breaks before that is the end of the start, which says so."""
    kinds = kinds_toward(toward, [*SLOW, *BROKEN])
    faults = once_each(kinds, toward, random.Random(seed), every=12)
    play(lines, seed, ledger=faults)
    while unplayed := [fault for fault in faults if not lines.ledger.struck[fault]]:
        play(lines, seed, ledger=unplayed)
    tell(tally, lines)


#: Words by which a message is known: the appending of an intent, the leases that permit one, a heartbeat.
SILENCES = {
    "intents": Fault(Kind.BLACK_HOLE, Toward.SERVER, holding=b"COPY incoming_attempt_intent", nth=1, seconds=600),
    "permits": Fault(Kind.BLACK_HOLE, Toward.CLIENT, holding=b"lease_epoch", nth=3, seconds=600),
    "heartbeats": Fault(Kind.BLACK_HOLE, Toward.SERVER, holding=b"UPDATE lane SET heartbeat_at", nth=2, seconds=600),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "intents" else pytest.mark.long) for name in SILENCES]
)
def test_a_postgres_that_falls_silent_is_asked_again_over_another_connection(
    name: str, lines: Lines, seed: int, tally: Tally
) -> None:
    """Its end of the connection takes what it is sent, so that TCP notices nothing."""
    assert play(lines, seed, ledger=[SILENCES[name]]) == 0
    assert sum(lines.ledger.struck.values()) == 1
    tell(tally, lines)


#: The same where no lane is at work: a start that gets no answer says so and ends, and so does an end.
BARE_SILENCES = {
    "open": Fault(Kind.BLACK_HOLE, Toward.SERVER, holding=b"farthing job", nth=1, seconds=600),
    "opened": Fault(Kind.BLACK_HOLE, Toward.SERVER, holding=b"INSERT INTO farthing.input_file", nth=1, seconds=600),
    "labels": Fault(Kind.BLACK_HOLE, Toward.SERVER, holding=b"COPY incoming_label", nth=1, seconds=600),
    "join": Fault(Kind.BLACK_HOLE, Toward.SERVER, holding=b"INSERT INTO farthing.lane", nth=1, seconds=600),
    "settle": Fault(Kind.BLACK_HOLE, Toward.SERVER, holding=b"ledger_digest=", nth=1, seconds=600),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "settle" else pytest.mark.long) for name in BARE_SILENCES],
)
def test_a_postgres_that_is_silent_before_and_after_the_work_ends_the_start_in_good_order(
    name: str, lines: Lines, seed: int, tally: Tally
) -> None:
    assert play(lines, seed, ledger=[BARE_SILENCES[name]]) in (2, 3)
    assert sum(lines.ledger.struck.values()) == 1
    tell(tally, lines)


@pytest.mark.long
def test_lanes_that_lost_postgres_together_come_back_together_and_bury_nobody(
    lines: Lines, seed: int, tally: Tally
) -> None:
    """For longer than a lane whose session is gone has time: the first one back knows no more than the others."""
    times = replace(TIMES, grace_s=2.0)
    stage = lines.stage
    stage.scene()
    stage.change_job(concurrency=1, shard_rows=5, tiers=TIERS)
    lines.model.play(Fault(Kind.LATENCY, Toward.CLIENT, seconds=0.4))
    children = [lines.start(times=times) for _ in range(2)]
    for child in children:
        assert wait_until(lambda child=child: "lane working" in stage.told_by(child))
    lines.ledger.play(Fault(Kind.RESET, Toward.SERVER))
    time.sleep(1.5 * times.grace_s)
    os.kill(children[1].pid or 0, signal.SIGSTOP)  # it comes back a little later
    lines.ledger.play()
    time.sleep(0.5 * times.grace_s)
    os.kill(children[1].pid or 0, signal.SIGCONT)
    for child in children:
        judge(lines, child, seed)
    stage.change_job(tiers=TIERS)
    assert stage.violations() == [], stage.told()
    died = f"SELECT count(*) FROM lane WHERE run_id = {stage.run_id} AND ended_because = 'died'"
    assert stage.value(died) == 0, stage.told()
    tally.count("Postgres: gone for all lanes")


def cut_at_commit(lines: Lines, number: int, kind: Kind, seed: int) -> bool:
    """Cut a run's n-th COMMIT off, before or after the server had it. False: the run ended without it."""
    fault = Fault(kind, Toward.SERVER, holding=COMMIT, nth=number)
    lines.ledger.met.clear()
    lines.ledger.struck.clear()
    play(lines, seed, ledger=[fault])
    return lines.ledger.struck[fault] > 0


CUTS = {"before it is heard": Kind.RESET, "before it is answered": Kind.LOST_ANSWER}


@pytest.mark.parametrize("when", CUTS)
def test_a_connection_cut_in_mid_commit_loses_and_repeats_nothing(
    when: str, lines: Lines, seed: int, tally: Tally
) -> None:
    for number in random.Random(f"{seed} {when}").sample(range(3, 40), 3):
        assert cut_at_commit(lines, number, CUTS[when], seed), f"seed {seed}: there was no COMMIT {number}"
        tally.count(f"Postgres: COMMIT cut {when}")


@pytest.mark.long
@pytest.mark.parametrize("when", CUTS)
def test_each_commit_of_a_run_is_cut_until_one_ends_clean(when: str, lines: Lines, seed: int, tally: Tally) -> None:
    number = 1
    while cut_at_commit(lines, number, CUTS[when], seed):
        tally.count(f"Postgres: COMMIT cut {when}")
        number += 1
    assert number > 30


@pytest.mark.long
@pytest.mark.parametrize("toward", Toward)
@pytest.mark.parametrize("kind", [*SLOW, *BROKEN, Kind.BLACK_HOLE])
@pytest.mark.parametrize("line", ["model", "ledger"])
def test_a_share_of_everything_on_a_line_goes_wrong_and_no_promise_is_broken(
    line: str, kind: Kind, toward: Toward, lines: Lines, seed: int, scale: float, tally: Tally
) -> None:
    chance = random.Random(f"{seed} {line} {kind} {toward}")
    for _ in range(max(1, round(3 * scale))):
        share = 1.0 if kind in SLOW else chance.uniform(0.01, 0.2 if line == "model" else 0.02)
        fault = Fault(kind, toward, share, after=chance.randint(0, 200), seconds=PATIENCE_S.get(kind, 0.002))
        play(lines, seed, **{line: [fault]})
    tell(tally, lines)


@pytest.mark.long
def test_both_lines_are_bad_in_every_way_at_once_and_no_promise_is_broken(
    lines: Lines, seed: int, scale: float, tally: Tally
) -> None:
    chance = random.Random(seed)
    for _ in range(max(1, round(10 * scale))):
        bad = [
            [
                Fault(kind, toward, share, after=chance.randint(0, 200), seconds=PATIENCE_S.get(kind, 0.002))
                for kind in chance.sample([*SLOW, *BROKEN], 4)
                for toward in Toward
            ]
            for share in (0.05, 0.005)
        ]
        play(lines, seed, model=bad[0], ledger=bad[1])
    tell(tally, lines)
