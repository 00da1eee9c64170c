"""Bad input: a file that kills, hangs or fools whoever reads it, or that changes, costs only its own documents.

Each case ends in one of two ways: a message that names the file, before anything is sent (exit code 2), or a run that
finishes with every document a result or a dead letter with its reason.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.documents import Document, UnfitDocument
from schemas.errors import ConfigurationError, InputUnavailable, InputUnreadable, Unforeseen
from schemas.jobs import Input
from schemas.readings import BLOCK
from tasks import bulkhead
from tasks.bulkhead import Bulkhead
from tasks.documents import orders
from tasks.ledger.leases import LeaseTimes
from tests.faults import deadly_readers, parquet_faults
from tests.faults.parquet_faults import Case
from tests.faults.stage import JOB, TEXT_CANARY, Stage, staged, wait_until
from tests.faults.summary import Tally
from tests.forked_readers import forked_readers

ROWS = 10
BASIC = Input(path="d", id="id", text="text", label="colour")


@pytest.fixture(scope="module")
def stage(postgres: object, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    from sandbox.postgres import create_database, drop_database

    root = tmp_path_factory.mktemp("input")
    name = f"input_{root.parent.name}_{root.name}".replace("-", "_")
    url = create_database(postgres, name, template=template)  # type: ignore[arg-type]  # the fixture is a Server
    with staged(root, url, documents=1) as made:
        (root / "jobs/colours/job.yaml").write_text(JOB.replace("documents.parquet", "d/*.parquet"))
        made.times = LeaseTimes(beat_every_s=0.1, grace_s=0.3)
        yield made
    drop_database(postgres, name)  # type: ignore[arg-type]  # the fixture is a Server


def set_scene(stage: Stage, *names: str) -> None:
    """A new run over files of ten documents each, with these names."""
    stage.scene()
    folder = stage.root / "d"
    for old in sorted(folder.rglob("*"), reverse=True) if folder.exists() else []:
        old.rmdir() if old.is_dir() else old.unlink()
    for name in names:
        write(folder / name, name)


def write(path: Path, name: str, rows: int = ROWS) -> None:
    path.parent.mkdir(exist_ok=True)
    columns = {
        "id": [f"{name} {number}" for number in range(rows)],
        "text": [f"{name}: document {number} ({TEXT_CANARY})" for number in range(rows)],
        "colour": [("red", "green", "blue")[number % 3] for number in range(rows)],
    }
    pq.write_table(pa.table(columns), path, row_group_size=5)


def endings(stage: Stage) -> dict[str, Counter[str]]:
    """How the documents of each file of the newest run ended: its state, or a dead letter's reason."""
    import psycopg

    found: dict[str, Counter[str]] = {}
    with psycopg.connect(stage.database_url, options="-c search_path=farthing") as connection:
        rows = connection.execute(
            "SELECT f.path, coalesce(d.reason, d.state) FROM document d JOIN shard s ON s.run_id = d.run_id"
            " AND d.document_no BETWEEN s.first_document_no AND s.first_document_no + s.document_count - 1"
            " JOIN input_file f ON f.run_id = s.run_id AND f.file_no = s.file_no WHERE d.run_id = %s",
            [stage.run_id],
        )
        for path, ending in rows:
            found.setdefault(Path(path).name, Counter())[ending] += 1
    return found


def readers_of(pid: int) -> list[int]:
    """The living children of a process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state not in "ZX":
            found.append(int(folder.name))
    return found


def started_readers() -> list[int]:
    """Those of this process that were started, not forked."""
    return [pid for pid in readers_of(os.getpid()) if b"tasks.documents" in Path(f"/proc/{pid}/cmdline").read_bytes()]


# A reader that dies or hangs


def test_a_file_that_kills_its_reader_costs_its_own_documents_and_no_others(stage: Stage, tally: Tally) -> None:
    deadly = [f"{letter}-{death}-reading.parquet" for letter, death in zip("bdf", deadly_readers.DEATHS, strict=True)]
    good = ["a.parquet", "c.parquet", "e-accident-reading.parquet", "i.parquet"]
    set_scene(stage, *good, *deadly)
    assert stage.run(serve=partial(deadly_readers.serve, stage.root)) == 0, stage.told()
    assert endings(stage) == {name: Counter(result=ROWS) for name in good} | {
        name: Counter(input_unreadable=ROWS) for name in deadly
    }
    why = stage.value(
        f"SELECT string_agg(detail ->> 'why', ' ' ORDER BY event_id) FROM run_event WHERE run_id = {stage.run_id}"
    )
    for name, how in zip(deadly, ("SIGSEGV", "SIGABRT", "exit code 7"), strict=True):
        assert f"d/{name}: rows 0 to 4: reading it ended the reading process ({how})" in why
        assert f"d/{name}: rows 5 to 9: reading it ended" in why
    assert stage.value(f"SELECT count(*) FROM lane WHERE run_id = {stage.run_id}") == 1
    assert stage.violations() == []
    tally.count("deaths of a reading process", 2 * 2 * len(deadly) + 1)


def test_want_of_memory_pauses_a_run_and_condemns_no_document(stage: Stage, tally: Tally) -> None:
    set_scene(stage, "a.parquet", "b-kill-reading.parquet", "c.parquet")
    assert stage.run(serve=partial(deadly_readers.serve, stage.root)) == 3, stage.told()
    told = stage.told()
    assert "lane ended: input d/b-kill-reading.parquet: rows 0 to 4: reading it ended the reading process" in told
    assert "not enough memory" in told
    assert "then resume the run" in told
    assert set(sum(endings(stage).values(), Counter())) <= {"result"}
    assert stage.resume() == 1
    assert sum(endings(stage).values(), Counter()) == Counter(result=3 * ROWS)
    assert stage.violations() == []
    tally.count("deaths of a reading process", 2)


def test_a_bug_in_a_reading_process_stops_the_run_and_condemns_no_document(stage: Stage) -> None:
    """The flow pauses a run that a bug stops, and the command ends with 70 (tests/faults/test_canary.py)."""
    set_scene(stage, "a.parquet", "b-bug-reading.parquet", "c.parquet")
    assert stage.run(serve=partial(deadly_readers.serve, stage.root)) == 1, stage.told()
    assert "Unforeseen: ZeroDivisionError at " in stage.told()
    assert "deadly_readers.py:" in stage.told()
    assert "what a document says" not in stage.told()
    assert set(sum(endings(stage).values(), Counter())) <= {"result"}
    assert stage.resume() == 1
    assert sum(endings(stage).values(), Counter())["input_unreadable"] == 0
    assert stage.violations() == []


@pytest.mark.parametrize("phase", ["planning", "labelling"])
def test_a_file_that_kills_whoever_plans_is_one_clear_message(stage: Stage, tally: Tally, phase: str) -> None:
    name = f"b-segv-{phase}.parquet"
    set_scene(stage, "a.parquet", name)
    before = stage.run_id
    assert stage.run(serve=partial(deadly_readers.serve, stage.root)) == 2
    told = stage.told()
    assert f"ConfigurationError: d/{name}: reading it ended the reading process (SIGSEGV)" in told
    assert "write the file anew" in told
    assert "Traceback" not in told
    assert stage.value(f"SELECT count(*) FROM attempt_intent WHERE run_id > {before}") == 0
    tally.count("deaths of a reading process", 2)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_read_that_hangs_keeps_no_lane_and_outlives_none(stage: Stage, tally: Tally, end: signal.Signals) -> None:
    set_scene(stage, "a.parquet", "b-hang-reading.parquet", "c.parquet")
    ended = f"SELECT count(*) FROM document WHERE run_id > {stage.run_id}"
    child = stage.start(serve=partial(deadly_readers.serve, stage.root))
    assert wait_until(lambda: stage.value(ended) == ROWS), stage.told()
    assert child.pid is not None
    readers = readers_of(child.pid)
    assert readers
    os.kill(child.pid, end)
    assert stage.wait(child) == (3 if end is signal.SIGTERM else -signal.SIGKILL), stage.told()
    assert wait_until(lambda: not any(Path(f"/proc/{reader}").exists() for reader in readers), 10)
    assert stage.resume() == 1
    assert sum(endings(stage).values(), Counter()) == Counter(result=3 * ROWS)
    assert stage.violations() == []
    tally.count("reads that hang")


@pytest.mark.long
def test_a_reader_that_a_user_s_run_starts_survives_the_terminal_and_dies_with_its_lane(
    stage: Stage, tally: Tally
) -> None:
    """No fork here: the process that `farthing run` starts."""
    set_scene(stage, *(f"{number}.parquet" for number in range(40)))
    ended = f"SELECT count(*) FROM document WHERE run_id > {stage.run_id}"
    child = stage.start(serve=None)
    assert wait_until(lambda: stage.value(ended) > 0), stage.told()
    assert child.pid is not None
    (reader,) = readers_of(child.pid)
    for interrupt in (signal.SIGINT, signal.SIGTERM):
        os.kill(reader, interrupt)
    before = stage.value(ended)
    assert wait_until(lambda: stage.value(ended) > before + ROWS)
    assert readers_of(child.pid) == [reader]
    os.kill(child.pid, signal.SIGKILL)
    stage.wait(child)
    assert wait_until(lambda: not Path(f"/proc/{reader}").exists(), 10)
    stage.resume(serve=None)
    assert stage.violations() == []
    assert "a reading process died" not in stage.told()
    tally.count("SIGKILL")


# Files that change


def test_a_file_that_changes_in_mid_run_loses_what_was_not_read_and_nothing_else(stage: Stage, tally: Tally) -> None:
    changing = [
        f"{letter}-{change}-reading.parquet" for letter, change in zip("bcdef", deadly_readers.CHANGES, strict=True)
    ]
    set_scene(stage, "a.parquet", *changing, "g.parquet")
    assert stage.run(serve=partial(deadly_readers.serve, stage.root)) == 0, stage.told()
    lost = Counter(result=ROWS // 2, input_changed=ROWS // 2)
    assert endings(stage) == {name: lost for name in changing} | {
        name: Counter(result=ROWS) for name in ("a.parquet", "g.parquet")
    }
    assert stage.violations() == []
    tally.count("input files changed in mid-run", len(changing))


def test_a_run_over_everything_that_can_be_read_ends_each_row_with_its_reason(stage: Stage, tally: Tally) -> None:
    """All files of one kind of column together; the checker compares each ending with the file's own row."""
    set_scene(stage)
    readable = [case for case in parquet_faults.CASES if case.outcome == "read" and case.is_plain]
    expected: Counter[str] = Counter()
    for case in readable:
        case.write(stage.root / "d", prefix=f"{case.name}-")
        expected += case.endings
    assert stage.run() == 0, stage.told()
    found = sum(endings(stage).values(), Counter())
    fit = expected.pop("fit")
    assert found == expected + Counter(
        {state: found[state] for state in ("result", "duplicate", "conflicting_duplicate")}
    )
    assert sum(found[state] for state in ("result", "duplicate", "conflicting_duplicate")) == fit
    assert found["duplicate"] >= 1
    assert found["conflicting_duplicate"] >= 1
    assert stage.violations() == []
    tally.count("documents that cannot be sent", sum(expected.values()))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("colour " * 1_300_000, "too_large", id="9 MB"),
        pytest.param("colour " * 15_000_000, "too_large", marks=pytest.mark.long, id="100 MB"),
    ],
)
def test_a_document_beyond_any_context_costs_nothing_and_hinders_no_other(
    stage: Stage, tally: Tally, text: str, reason: str
) -> None:
    set_scene(stage, "a.parquet", "c.parquet")
    columns: dict[str, Any] = {"id": ["huge", "ordinary"], "text": [text, "a red one"], "colour": ["red", "red"]}
    pq.write_table(pa.table(columns), stage.root / "d/b.parquet")
    assert stage.run(request={"budget": "20 USD"}) == 0, stage.told()
    assert endings(stage)["b.parquet"] == Counter({reason: 1, "result": 1})
    assert stage.value(f"SELECT count(*) FROM result WHERE run_id = {stage.run_id}") == 2 * ROWS + 1
    assert stage.violations() == []
    tally.count("documents that cannot be sent")


# The process that reads


@pytest.fixture
async def reading(tmp_path: Path) -> AsyncIterator[Bulkhead]:
    """A process that was really started, over two small files."""
    write(tmp_path / "d/a.parquet", "a")
    write(tmp_path / "d/b.parquet", "b")
    async with Bulkhead() as made:
        yield made


async def test_the_reading_process_has_no_secret_no_core_dump_and_goes_first_when_memory_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_API_KEY", "sk-canary")
    monkeypatch.setenv("FARTHING_DATABASE_URL", "postgresql://canary")
    monkeypatch.setenv("PGPASSWORD", "canary")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    monkeypatch.setenv("AWS_PROFILE", "the store's")
    write(tmp_path / "d/a.parquet", "a")
    async with Bulkhead() as made:
        await made.plan(BASIC, shard_rows=5, root=tmp_path)
        (pid,) = started_readers()
        environment = Path(f"/proc/{pid}/environ").read_text()
        assert "canary" not in environment
        assert "AWS_PROFILE=the store's" in environment
        assert "Max core file size        0                    0" in Path(f"/proc/{pid}/limits").read_text()
        assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"
    assert not Path(f"/proc/{pid}").exists()


async def test_one_process_reads_everything_in_blocks_and_may_be_left_in_the_middle(
    tmp_path: Path, reading: Bulkhead
) -> None:
    write(tmp_path / "d/c.parquet", "c", rows=3 * BLOCK)
    manifest = await reading.plan(BASIC, shard_rows=5000, root=tmp_path)
    (pid,) = started_readers()
    for _ in range(2):
        blocks = reading.read_shard(BASIC, manifest.files[2], manifest.shards[-1], root=tmp_path)
        assert [row.document_no for row in await anext(blocks)] == list(range(20, 20 + BLOCK))
        await blocks.aclose()
    whole = reading.read_shard(BASIC, manifest.files[2], manifest.shards[-1], root=tmp_path)
    assert [len(block) async for block in whole] == [BLOCK] * 3
    labels = [label async for block in reading.read_labels(BASIC, manifest, root=tmp_path) for label in block]
    assert labels[:4] == [(0, "red"), (1, "green"), (2, "blue"), (3, "red")]
    assert len(labels) == manifest.document_count
    assert started_readers() == [pid]


async def test_large_documents_do_not_travel_together(tmp_path: Path, reading: Bulkhead) -> None:
    texts = ["x" * 3_000_000] * 5 + ["short"] * 5
    pq.write_table(pa.table({"id": [str(n) for n in range(10)], "text": texts}), tmp_path / "big.parquet")
    input = Input(path="big.parquet", id="id", text="text")
    manifest = await reading.plan(input, shard_rows=100, root=tmp_path)
    blocks = reading.read_shard(input, manifest.files[0], manifest.shards[0], root=tmp_path)
    assert [len(block) async for block in blocks] == [2, 2, 6]


async def test_a_reader_that_dies_in_mid_shard_is_followed_by_one_that_goes_on_there(
    tmp_path: Path, reading: Bulkhead
) -> None:
    write(tmp_path / "d/c.parquet", "c", rows=3 * BLOCK)
    manifest = await reading.plan(BASIC, shard_rows=5000, root=tmp_path)
    numbers = []
    async for block in reading.read_shard(BASIC, manifest.files[2], manifest.shards[-1], root=tmp_path):
        numbers += [row.document_no for row in block]
        if len(numbers) == BLOCK:
            os.kill(started_readers()[0], signal.SIGSEGV)
    assert numbers == list(range(20, 20 + 3 * BLOCK))


async def test_readers_killed_again_and_again_in_one_shard_lose_none_of_it(tmp_path: Path, reading: Bulkhead) -> None:
    """A machine short of memory: each gets a block further."""
    write(tmp_path / "d/c.parquet", "c", rows=4 * BLOCK)
    manifest = await reading.plan(BASIC, shard_rows=5000, root=tmp_path)
    numbers = []
    async for block in reading.read_shard(BASIC, manifest.files[2], manifest.shards[-1], root=tmp_path):
        numbers += [row.document_no for row in block]
        os.kill(started_readers()[0], signal.SIGKILL)
    assert numbers == list(range(20, 20 + 4 * BLOCK))


async def test_a_reader_that_dies_before_it_opens_a_file_accuses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "d/a.parquet", "a")
    monkeypatch.setattr(bulkhead, "_DEATHS", 1)
    monkeypatch.setattr(orders, "_READINGS", {**orders._READINGS, "read_labels": lambda **_: os.abort()})
    with forked_readers():
        async with Bulkhead() as made:
            manifest = await made.plan(BASIC, shard_rows=5, root=tmp_path)
            with pytest.raises(InputUnreadable, match=r"^input.path: reading it ended .*SIGABRT"):
                await anext(made.read_labels(BASIC, manifest, root=tmp_path))


async def test_a_read_that_takes_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "d/b-hang-reading.parquet"
    write(tmp_path / name, "b")
    with forked_readers(partial(deadly_readers.serve, tmp_path)):
        async with Bulkhead() as made:
            manifest = await made.plan(BASIC, shard_rows=5, root=tmp_path)
            asked = asyncio.ensure_future(
                anext(made.read_shard(BASIC, manifest.files[0], manifest.shards[0], root=tmp_path))
            )
            await asyncio.sleep(0.01)
            assert made.trouble is None
            monkeypatch.setattr(bulkhead, "SLOW_AFTER_S", 0.0)
            async with asyncio.timeout(20):
                while f"reading {name} for " not in (made.trouble or ""):
                    await asyncio.sleep(0.01)
            asked.cancel()
            await asyncio.wait([asked])
            assert made.trouble is None


async def test_a_reader_that_does_not_start_pauses_a_run_and_condemns_no_file(
    tmp_path: Path, reading: Bulkhead, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = await reading.plan(BASIC, shard_rows=5, root=tmp_path)
    monkeypatch.setattr(bulkhead, "PROGRAM", ("-c", "raise SystemExit(3)"))
    async with Bulkhead() as broken:
        with pytest.raises(InputUnavailable, match=r"does not start \(exit code 3\).*then resume the run"):
            await anext(broken.read_shard(BASIC, manifest.files[0], manifest.shards[0], root=tmp_path))
        with pytest.raises(ConfigurationError, match="does not start"):
            await broken.plan(BASIC, shard_rows=5, root=tmp_path)


async def test_what_nobody_foresaw_is_told_without_a_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError(f"in {TEXT_CANARY}")

    write(tmp_path / "d/a.parquet", "a")
    monkeypatch.setattr("tasks.documents.reading.judge_row", fail)
    with forked_readers():
        async with Bulkhead() as made:
            manifest = await made.plan(BASIC, shard_rows=5, root=tmp_path)
            with pytest.raises(Unforeseen, match=r"^ZeroDivisionError at .*test_bad_input.py:\d+ fail$") as told:
                await anext(made.read_shard(BASIC, manifest.files[0], manifest.shards[0], root=tmp_path))
    assert TEXT_CANARY not in str(told.value)


def test_a_lane_does_not_import_arrow() -> None:
    program = "import sys, tasks.enrichment, tasks.samples; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2]).returncode == 0


# The campaign


async def judge(reading: Bulkhead, root: Path, input: Input) -> tuple[str, list[Document | UnfitDocument]]:
    """Whether the input is "refused", "read" or in part "unreadable", and its rows. Anything else fails the test."""
    try:
        manifest = await reading.plan(input, shard_rows=20, root=root)
    except ConfigurationError as error:
        require_clear(str(error), root)
        return "refused", []
    rows: list[Document | UnfitDocument] = []
    outcome = "read"
    for shard in manifest.shards:
        read: list[Document | UnfitDocument] = []
        try:
            async for block in reading.read_shard(input, manifest.files[shard.file_no], shard, root=root):
                read += block
            assert len(read) == shard.document_count
        except InputUnreadable as error:
            require_clear(str(error), root)
            outcome = "unreadable"
        assert [row.document_no for row in read] == list(
            range(shard.first_document_no, shard.first_document_no + len(read))
        )
        rows += read
    return outcome, rows


def require_clear(told: str, root: Path) -> None:
    """A message for people: it names what is wrong, says what to do, and quotes no document."""
    assert told
    assert all("input." in line or ".parquet: " in line for line in told.splitlines()), told
    assert "Traceback" not in told
    assert TEXT_CANARY not in told
    assert len(told) < 3000


@pytest.mark.parametrize("case", parquet_faults.CASES, ids=lambda case: case.name)
async def test_a_bad_input_is_refused_or_read_row_by_row(tmp_path: Path, tally: Tally, case: Case) -> None:
    case.write(tmp_path / "d")
    with forked_readers():
        async with Bulkhead() as reading:
            outcome, rows = await judge(reading, tmp_path, case.input)
    assert outcome == case.outcome
    assert Counter(row.reason.value if isinstance(row, UnfitDocument) else "fit" for row in rows) == case.endings
    tally.count("bad Parquet files")


def public_files() -> list[Path]:
    """Corrupt files of others, where FARTHING_FAULTS_PARQUET names a folder of them: we ship none (README)."""
    folder = os.environ.get("FARTHING_FAULTS_PARQUET")
    return sorted(Path(folder).glob("*.parquet")) if folder else []


def columns_of(path: Path) -> list[str]:
    """Its columns; what could be texts comes first, and one that is not there last."""
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException):  # a schema that nobody can read
        return ["id", "text"]
    return [*sorted(schema.names, key=lambda name: "string" not in str(schema.field(name).type)), "absent"]


@pytest.mark.parametrize("path", public_files(), ids=lambda path: path.name)
async def test_a_public_corrupt_file_is_refused_or_costs_its_own_documents(
    tmp_path: Path, tally: Tally, path: Path
) -> None:
    """Each of its columns as the text: it is a message, or a reason for each row that it concerns."""
    (tmp_path / "d").mkdir()
    shutil.copy(path, tmp_path / "d")
    first, *others = columns_of(path)
    outcomes = Counter[str]()
    with forked_readers():
        async with Bulkhead() as reading:
            for name in others:
                outcome, _ = await asyncio.wait_for(
                    judge(reading, tmp_path, Input(path="d", id=first, text=name)), 60
                )
                outcomes[outcome] += 1
    tally.count("public corrupt Parquet files")
    tally.figure(path.name, ", ".join(f"{outcome} {times}" for outcome, times in outcomes.items()))


async def flip(tmp_path: Path, tally: Tally, seed: int, times: int) -> None:
    """Read so many seeded corruptions of good files."""
    outcomes: Counter[str] = Counter()
    with forked_readers():
        async with Bulkhead() as reading:
            for number in range(times):
                dice = random.Random(f"{seed} {number}")
                (tmp_path / "d").mkdir(exist_ok=True)
                (tmp_path / "d/a.parquet").write_bytes(parquet_faults.spoil(dice, parquet_faults.good_file(dice)))
                try:
                    outcome, _ = await asyncio.wait_for(judge(reading, tmp_path, BASIC), 60)
                except BaseException as error:
                    error.add_note(f"SEED={seed}, file {number}")
                    raise
                outcomes[outcome] += 1
    assert set(outcomes) == {"read", "refused", "unreadable"}
    tally.count("bad Parquet files", times)


async def test_no_flipped_bit_costs_more_than_its_file(tmp_path: Path, tally: Tally, seed: int) -> None:
    await flip(tmp_path, tally, seed, 150)


@pytest.mark.long
async def test_no_flipped_bit_costs_more_than_its_file_at_length(
    tmp_path: Path, tally: Tally, seed: int, scale: float
) -> None:
    await flip(tmp_path, tally, seed + 1, max(100, int(5000 * scale)))


async def cut(tmp_path: Path, tally: Tally, sizes: Sequence[int], content: bytes) -> None:
    path = tmp_path / "d/a.parquet"
    path.parent.mkdir()
    with forked_readers():
        async with Bulkhead() as reading:
            for size in sizes:
                path.write_bytes(content[:size])
                assert (await judge(reading, tmp_path, BASIC))[0] == "refused", f"cut at byte {size}"
    tally.count("bad Parquet files", len(sizes))


async def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, tally: Tally, seed: int) -> None:
    content = parquet_faults.good_file(random.Random(seed))
    await cut(tmp_path, tally, range(0, len(content), 97), content)


@pytest.mark.long
async def test_a_truncated_file_is_refused_at_every_byte(
    tmp_path: Path, tally: Tally, seed: int, scale: float
) -> None:
    content = parquet_faults.good_file(random.Random(seed))
    await cut(tmp_path, tally, range(0, len(content), max(1, round(1 / scale))), content)
