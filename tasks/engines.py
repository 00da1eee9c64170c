"""Engines: the clusters that lanes may work on as Prefect's tasks, and what each needs to be installed.

Dask and Ray start a task again whose process was killed, though it has no retries: the second lane finds in the
ledger what the first one did. Both are extras, imported only where they are asked for.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import structlog

from schemas.engines import Engine
from schemas.errors import ConfigurationError

if TYPE_CHECKING:
    from prefect.futures import PrefectWrappedFuture
    from prefect.task_runners import TaskRunner

log = structlog.get_logger("farthing.engines")

#: What an engine needs besides Farthing, as Python imports it. The extra has the engine's name.
_NEEDS = {Engine.DASK: ("prefect_dask", "distributed"), Engine.RAY: ("prefect_ray", "ray")}


def require(engine: Engine) -> None:
    """Raises ConfigurationError where the engine's extra is not installed."""
    if any(find_spec(name) is None for name in _NEEDS.get(engine, ())):
        raise ConfigurationError(
            f"lanes on {engine} need what is not installed: pip install 'farthing[{engine}]', here and there"
        )


@contextmanager
def started(engine: Engine, lanes: int, cluster: str | None) -> Iterator[TaskRunner[Any] | None]:
    """The cluster of that address, or one of `lanes` processes on this machine while it lasts. None: it needs none.

    Ctrl-C in a terminal is for this process only, which pauses the run. Raises ConfigurationError for none.
    """
    if engine not in _NEEDS:
        yield None
        return
    with ExitStack() as stack:
        try:
            with _interrupts_held():  # whoever is started now holds them, too
                runner = stack.enter_context(_dask(lanes, cluster) if engine is Engine.DASK else _ray(lanes, cluster))
                if engine is Engine.DASK:
                    _ = runner.client  # only now it begins
        except Exception as error:
            log.warning("no cluster", engine=engine, error=type(error).__name__)
            raise ConfigurationError(f"{_explain(engine, cluster)} ({type(error).__name__})") from None
        yield runner


def _explain(engine: Engine, cluster: str | None) -> str:
    if cluster is None:
        return f"the {engine} cluster does not start here: see that what it needs has the versions that pip chose"
    token = ", and, if it wants a token, that RAY_AUTH_MODE=token is set here" if engine is Engine.RAY else ""
    return (
        f"the {engine} cluster at {cluster} does not answer: see that it is up, that it has the same versions as "
        f"this machine{token}"
    )


def take_back(engine: Engine, task: PrefectWrappedFuture[Any, Any], *, by_force: bool) -> None:
    """Have the cluster drop the task if it has not begun, and whoever waits for it wait no more.

    One that has begun: Ray interrupts it, by which a lane drains, or `by_force` kills it. Dask cannot reach it; it
    drains by what the ledger says.
    """
    if engine is Engine.DASK:
        task.wrapped_future.cancel()
    else:
        import ray

        ray.cancel(task.wrapped_future, force=by_force)


def interrupt(engine: Engine, task: PrefectWrappedFuture[Any, Any]) -> None:
    """Interrupt a task that has begun, by which a lane drains. Dask cannot reach it."""
    if engine is Engine.RAY:
        import ray

        ray.cancel(task.wrapped_future, force=False)


def _dask(lanes: int, cluster: str | None) -> Any:
    from prefect_dask.task_runners import DaskTaskRunner

    if cluster:
        return DaskTaskRunner(address=cluster)
    own = {"n_workers": lanes, "threads_per_worker": 1, "memory_limit": 0, "dashboard_address": None}
    return DaskTaskRunner(cluster_kwargs=own)


def _ray(lanes: int, cluster: str | None) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    from prefect_ray import RayTaskRunner

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if cluster:
        return RayTaskRunner(address=cluster, init_kwargs=quiet)
    return RayTaskRunner(address="local", init_kwargs=quiet | {"num_cpus": lanes, "include_dashboard": False})


@contextmanager
def _interrupts_held() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
