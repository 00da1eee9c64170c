"""Lanes elsewhere: what a machine must have before it may claim anything, and what a coordinator tells Prefect.

The ledger is real. Prefect is played by hand; acceptance/test_engines.py and test_prefect.py have a real one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import State
from prefect.client.schemas.objects import FlowRun, StateType, WorkPoolStatus
from prefect.states import Cancelling, Completed, Failed, Running, Scheduled

from schemas.errors import ConfigurationError
from schemas.fleets import Absence
from schemas.requests import LaneRequest, RunRequest
from tasks import enrichment, fleet
from tasks.final_states import lane_final
from tasks.fleet import Fleet
from tasks.lanes import LANE_DIED, Ended
from tasks.ledger import leases, runs
from tasks.ledger.connection import Ledger
from tasks.ledger.runs import Run
from tests.ledgers import opening, sql, value
from tests.world import World, make_world, write_documents


@pytest.fixture
async def world(tmp_path: Path, ledger_url: str) -> AsyncIterator[World]:
    async with make_world(tmp_path, ledger_url) as made:
        yield made


async def ask(world: World, run: Run) -> LaneRequest:
    (asked,) = await enrichment.ask_lanes(world.request(), world.settings, run)
    return asked


def change_prompt(world: World) -> None:
    prompt = world.root / "jobs/colours/prompt.md"
    prompt.write_text(prompt.read_text() + "Be brief.")


def lose_the_input(world: World) -> None:
    (world.root / "documents.parquet").rename(world.root / "elsewhere.parquet")


def leave_the_sandbox(world: World) -> None:
    world.settings = world.settings.model_copy(update={"sandbox": False})


def name_another_ledger(world: World) -> None:
    """Whose run of the same number was opened at another moment."""
    sql(world.database_url, "UPDATE run SET opened_at = opened_at - interval '1 second'")


def know_other_prices(world: World) -> None:
    folder = world.root / "prices"
    folder.mkdir()
    calendar = '[[calendar]]\nyear = 2027\ndays_off = [2027-01-01]\nsource = "a test"\n'
    (folder / "own.toml").write_text(calendar)
    world.settings = world.settings.model_copy(update={"prices": folder})


def ask_another_provider(world: World) -> None:
    """Where somebody listens: a lane that is not refused would ask there what time it is."""
    other = world.settings.base_url.replace("127.0.0.1", "localhost")
    world.settings = world.settings.model_copy(update={"base_url": other})


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (ask_another_provider, "its DEEPSEEK_BASE_URL names another provider"),
        (know_other_prices, "its price book is another"),
        (change_prompt, "its files of the job colours are others"),
        (lose_the_input, "documents.parquet"),
        (leave_the_sandbox, "one of the two uses the sandbox"),
        (name_another_ledger, "names another ledger"),
    ],
)
async def test_a_machine_that_is_set_up_otherwise_claims_and_pays_nothing(
    world: World, spoil: Callable[[World], None], told: str
) -> None:
    """A file that is not there would end all its documents as dead letters, on this machine only."""
    run = await world.open()
    asked = await ask(world, run)
    spoil(world)
    with pytest.raises(ConfigurationError, match=told):
        await enrichment.work_elsewhere(asked, world.settings)
    assert world.value("SELECT count(*) FROM lane") == 0
    assert world.value("SELECT count(*) FROM document") == 0
    assert world.bill() == {}


async def test_a_file_of_other_bytes_on_one_machine_condemns_no_document(world: World) -> None:
    run = await world.open()
    asked = await ask(world, run)
    original = (world.root / "documents.parquet").read_bytes()
    write_documents(world.root, [f"text {number} is another" for number in range(60)])
    ended = await enrichment.work_elsewhere(asked, world.settings)
    assert ended.reason == "input"
    assert (await enrichment.settle_run(world.settings, run, [ended])).state == "paused"
    assert world.value("SELECT count(*) FROM document") == 0
    (world.root / "documents.parquet").write_bytes(original)
    again, _ = await world.run()
    assert (again.run_id, again.state) == (run.run_id, "done")
    assert world.value("SELECT count(*) FROM document WHERE state = 'result'") == 60


async def test_a_lane_elsewhere_does_the_work_once_and_says_as_what_it_is_shown(world: World) -> None:
    run = await world.open()
    asked = await ask(world, run)
    assert await enrichment.work_elsewhere(asked, world.settings, shown_as="a flow run") == Ended("done")
    paid = world.bill()
    again = await enrichment.work_elsewhere(asked, world.settings)  # as Dask and Ray do after a kill
    settled = await enrichment.settle_run(world.settings, run, [again])
    assert (settled.state, world.bill()) == ("done", paid)
    assert world.value("SELECT detail->>'shown_as' FROM run_event WHERE kind = 'lane_shown'") == "a flow run"


async def test_a_lane_that_comes_after_the_run_was_paused_does_not_begin(world: World, ledger: Ledger) -> None:
    run = await world.open()
    asked = await ask(world, run)
    await runs.change_state(ledger, run.run_id, "paused", runs.OPERATOR)
    assert (await enrichment.work_elsewhere(asked, world.settings)).reason == "paused"
    assert world.value("SELECT count(*) FROM lane") == 0


@dataclass
class Prefect:
    """As much of Prefect's client as a fleet uses. States are taken as they are told."""

    is_away: bool = False
    flow_runs: dict[UUID, FlowRun] = field(default_factory=dict)
    told: list[tuple[UUID, StateType]] = field(default_factory=list)
    pool: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(is_paused=False, status=WorkPoolStatus.NOT_READY)
    )

    def put(self, key: str, state: State[Any], tags: list[str] | None = None) -> FlowRun:
        made = FlowRun(id=uuid4(), flow_id=uuid4(), idempotency_key=key, state=state, tags=tags or [])
        self.flow_runs[made.id] = made
        return made

    async def read_flow_runs(self, *, flow_run_filter: Any, **_: Any) -> list[FlowRun]:
        if self.is_away:
            raise ConnectionError
        if flow_run_filter.id is not None:
            return [self.flow_runs[each] for each in flow_run_filter.id.any_]
        wanted = set(flow_run_filter.tags.all_)
        return [each for each in reversed(self.flow_runs.values()) if wanted <= set(each.tags)][:1]

    async def read_deployment_by_name(self, name: str) -> Any:
        assert name == fleet.LANE
        return SimpleNamespace(id=uuid4(), work_pool_name="farthing")

    async def create_flow_run_from_deployment(
        self, _: UUID, *, idempotency_key: str, tags: list[str], **__: Any
    ) -> FlowRun:
        same = [each for each in self.flow_runs.values() if each.idempotency_key == idempotency_key]
        return same[0] if same else self.put(idempotency_key, Scheduled(), tags)

    async def set_flow_run_state(self, flow_run_id: UUID, state: State[Any]) -> None:
        if self.is_away:
            raise ConnectionError
        self.told.append((flow_run_id, state.type))
        self.flow_runs[flow_run_id].state = state

    async def read_work_pool(self, _: str) -> Any:
        return self.pool


@pytest.fixture
def prefect(monkeypatch: pytest.MonkeyPatch) -> Prefect:
    monkeypatch.setattr(fleet, "EVERY_S", 0.01)
    return Prefect()


@pytest.fixture
async def run(ledger: Ledger) -> Run:
    return await runs.open_run(ledger, opening())


async def gather(prefect: Prefect, ledger: Ledger, run: Run, *states: State[Any], within_s: float = 0.05) -> Fleet:
    """A fleet whose lanes Prefect shows in these states."""
    shown = {number: prefect.put(str(number), state) for number, state in enumerate(states, start=1)}
    return Fleet(prefect, ledger, run, Absence(within_s), await ask_of(ledger, run, len(states)), shown)  # type: ignore[arg-type]  # it is played by hand


def fresh(prefect: Prefect, ledger: Ledger, run: Run, asked: list[LaneRequest]) -> Fleet:
    """A fleet that has yet to be started, or found."""
    return Fleet(prefect, ledger, run, Absence(60), asked)  # type: ignore[arg-type]  # as above


async def ask_of(ledger: Ledger, run: Run, lanes: int) -> list[LaneRequest]:
    request, mark = RunRequest(job=run.job, lanes=lanes), await runs.find_mark(ledger, run.run_id)
    numbers = range(1, lanes + 1)
    return [
        LaneRequest(run=request, run_id=run.run_id, mark=mark, prices="sha256:0", provider="sha256:0", number=number)
        for number in numbers
    ]


async def register(ledger: Ledger, run: Run, flow_run: FlowRun) -> int:
    """A lane of that flow run, whose process is gone and whose last heartbeat was a minute ago."""
    lane_id = await leases.register(ledger, run.run_id)
    detail = {"lane": lane_id, "shown_as": str(flow_run.id)}
    await runs.note(ledger, run.run_id, leases.SHOWN_AS, detail, key=str(lane_id))
    url = ledger.url.render_as_string(hide_password=False).replace("+psycopg", "")
    sql(url, "UPDATE lane SET heartbeat_at = now() - interval '1 minute' WHERE lane_id = %s", lane_id)
    return lane_id


@pytest.mark.parametrize("is_prefect_away", [False, True])
async def test_a_lane_whose_machine_is_gone_is_crashed_in_prefect_and_its_shards_are_open(
    ledger: Ledger, ledger_url: str, run: Run, prefect: Prefect, is_prefect_away: bool
) -> None:
    """Prefect would show it at work for ever. If it went away before the lane began, the run ends all the same."""
    lanes = await gather(prefect, ledger, run, Scheduled() if is_prefect_away else Running())
    (lost,) = lanes.flow_runs.values()
    lane_id = await register(ledger, run, lost)
    assert await leases.claim(ledger, run.run_id, lane_id) is not None
    prefect.is_away = is_prefect_away
    assert [ended.reason for ended in await lanes.watch()] == [LANE_DIED]
    assert prefect.told == ([] if is_prefect_away else [(lost.id, StateType.CRASHED)])
    assert value(ledger_url, "SELECT count(*) FROM shard WHERE state = 'leased'") == 0


@pytest.mark.parametrize(
    ("is_paused", "status", "told"),
    [
        (True, WorkPoolStatus.PAUSED, "`prefect work-pool resume farthing`"),
        (False, WorkPoolStatus.NOT_READY, "`prefect worker start --pool farthing`"),
        (False, WorkPoolStatus.READY, "start more, or raise their limit"),
    ],
)
async def test_where_no_worker_comes_the_lanes_are_taken_back_and_it_is_said_what_to_start(
    ledger: Ledger, run: Run, prefect: Prefect, is_paused: bool, status: WorkPoolStatus, told: str
) -> None:
    prefect.pool = SimpleNamespace(is_paused=is_paused, status=status)
    first, second = await (await gather(prefect, ledger, run, Scheduled(), Scheduled())).watch()
    assert first == second
    assert first.reason == "no_worker"
    assert told in first.advice
    assert [state for _, state in prefect.told] == [StateType.CANCELLED] * 2


async def test_lanes_that_come_too_late_are_taken_back_and_the_run_is_whole_without_them(
    ledger: Ledger, ledger_url: str, run: Run, prefect: Prefect
) -> None:
    lanes = await gather(prefect, ledger, run, Completed(), Scheduled(), within_s=60)
    sql(ledger_url, "UPDATE shard SET state = 'done'")
    assert await lanes.watch() == [Ended("done"), Ended("done")]
    assert prefect.told == [(lanes.flow_runs[2].id, StateType.CANCELLED)]


async def test_whoever_starts_the_run_again_finds_its_lanes_and_replaces_only_those_that_ended(
    ledger: Ledger, run: Run, prefect: Prefect
) -> None:
    asked = await ask_of(ledger, run, 2)
    begun = []
    for state in (Running(), Failed()):
        lanes = fresh(prefect, ledger, run, asked)
        await lanes.start()
        begun.append(lanes.flow_runs)
        lanes.flow_runs[2].state = state
    again, after = fresh(prefect, ledger, run, asked), fresh(prefect, ledger, run, asked)
    await again.start()
    await after.start()
    assert begun[0] == begun[1] == {1: again.flow_runs[1], 2: begun[0][2]}
    assert again.flow_runs == after.flow_runs
    assert again.flow_runs[2].id != begun[0][2].id


async def test_a_lane_that_died_with_whoever_started_it_is_crashed_and_replaced_by_the_next_start(
    ledger: Ledger, run: Run, prefect: Prefect
) -> None:
    asked = await ask_of(ledger, run, 1)
    lanes, again = fresh(prefect, ledger, run, asked), fresh(prefect, ledger, run, asked)
    prefect.is_away = True
    await lanes.start()
    assert lanes.flow_runs == {}  # as where Prefect's database is busy: the next look starts it
    prefect.is_away = False
    await lanes.start()
    lost = lanes.flow_runs[1]
    lost.state = Running()
    await register(ledger, run, lost)
    await again.start()
    assert prefect.told == [(lost.id, StateType.CRASHED)]
    assert again.flow_runs[1].id != lost.id


async def test_a_lane_that_leaves_by_a_pause_which_is_over_has_a_successor(
    ledger: Ledger, ledger_url: str, run: Run, prefect: Prefect
) -> None:
    """As after `farthing pause`, where the same command comes while lanes still drain: it finds them at work."""
    asked = await ask_of(ledger, run, 2)
    before, again = fresh(prefect, ledger, run, asked), fresh(prefect, ledger, run, asked)
    await before.start()
    for each in before.flow_runs.values():
        each.state = Running()
    watching = asyncio.create_task(again.watch())
    await until(lambda: again.flow_runs == before.flow_runs)
    before.flow_runs[1].state = lane_final(Ended("paused", "run the same command to go on"))
    await until(lambda: len(prefect.flow_runs) == 3)
    assert again.flow_runs[2] == before.flow_runs[2]
    sql(ledger_url, "UPDATE shard SET state = 'done'")
    for each in again.flow_runs.values():
        each.state = Completed()
    assert await watching == [Ended("done"), Ended("done")]


async def test_a_lane_that_obeyed_a_pause_that_holds_has_none(ledger: Ledger, run: Run, prefect: Prefect) -> None:
    lanes = await gather(prefect, ledger, run, lane_final(Ended("paused", "go on")))  # type: ignore[arg-type]  # a state
    await runs.change_state(ledger, run.run_id, "paused", runs.OPERATOR)
    assert await lanes.watch() == [Ended("paused", "go on")]
    assert len(prefect.flow_runs) == 1


async def test_a_lane_that_its_worker_is_told_to_end_is_replaced_by_the_next_start(
    ledger: Ledger, run: Run, prefect: Prefect
) -> None:
    asked = await ask_of(ledger, run, 1)
    before, again = fresh(prefect, ledger, run, asked), fresh(prefect, ledger, run, asked)
    await before.start()
    before.flow_runs[1].state = Cancelling()
    await again.start()
    assert again.flow_runs[1].id != before.flow_runs[1].id


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.01)


async def test_asked_twice_to_end_it_has_the_workers_stop_the_lanes(
    ledger: Ledger, run: Run, prefect: Prefect
) -> None:
    lanes = await gather(prefect, ledger, run, Running(), Scheduled(), Completed(), within_s=60)
    lanes.give_up()
    await runs.change_state(ledger, run.run_id, "paused", runs.INTERRUPTED)
    await lanes._tell(await lanes._look())
    of = {each.id: number for number, each in lanes.flow_runs.items()}
    assert [(of[each], state) for each, state in prefect.told] == [
        (2, StateType.CANCELLED),
        (1, StateType.CANCELLING),
    ]
