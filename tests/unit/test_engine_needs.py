"""What an engine needs is asked for by name before anything is paid for."""

from __future__ import annotations

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from schemas.engines import Engine
from schemas.errors import ConfigurationError
from schemas.requests import RunRequest
from schemas.settings import Settings
from tasks import engines
from tasks.prefect_server import require_lasting_server


@pytest.mark.parametrize("engine", [Engine.DASK, Engine.RAY])
def test_an_engine_that_is_not_installed_is_an_error_that_names_its_extra(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name.startswith("prefect_") else "found")
    with pytest.raises(ConfigurationError, match=rf"pip install 'farthing\[{engine}\]'"):
        engines.require(engine)
    engines.require(Engine.PROCESSES)
    engines.require(Engine.WORKERS)


def test_workers_need_a_server_that_outlives_the_command() -> None:
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(ConfigurationError, match="set PREFECT_API_URL"),
    ):
        require_lasting_server()


@pytest.mark.parametrize(
    ("asked", "set_to", "engine"),
    [(None, "dask", Engine.DASK), ("workers", "dask", Engine.WORKERS), (None, "", Engine.PROCESSES)],
)
def test_where_lanes_work_is_what_the_run_asks_for_else_the_setting(
    asked: str | None, set_to: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARTHING_LANES_ON", set_to)
    assert RunRequest(job="tickets", lanes_on=asked).engine(Settings()) is engine
