"""Starting, sharing and stopping the emulated DeepSeek of a home.

The server is a detached child that holds `server.lock` for as long as it lives, so a lock, which the kernel lets go
of even after SIGKILL, says whether it is alive; a process id alone never does (see endpoint.py). Every process that
uses it holds `users` shared; the last to leave stops it unless `up` marked it `kept`. Should the last one be
killed, the server notices and leaves by itself. Starting and stopping happen one at a time under `turn`. The bill
outlives all of that.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sandbox.bill import FOLDER, BillTotal, read_bill
from sandbox.endpoint import LOCK, find_endpoint, forget_dead_holder, is_alive, living_pid, try_lock
from sandbox.errors import SandboxError

Option = str | int | float | Path | Sequence[str | Path] | None
START_S = 60.0
STOP_S = 10.0
#: Children of this process, kept so that they can be reaped.
_children: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the emulated DeepSeek listens, and a key that it accepts."""

    url: str
    api_key: str


@dataclass(frozen=True, slots=True)
class Status:
    """What is known of a home's DeepSeek without asking it: its endpoint if it is alive, and its bill."""

    endpoint: Endpoint | None
    is_kept: bool
    bill: BillTotal


@contextmanager
def running(home: Path, **options: Option) -> Iterator[Endpoint]:
    """A live DeepSeek for as long as the block lasts; one that is alive already is shared.

    Options are those of `python -m sandbox.deepseek`, with underscores (`time_scale=0`, `answers=[path]`). Without
    options any live server will do. With options that differ from a live server's, it is started again if nobody
    else uses it, else SandboxError is raised; the bill goes on either way.
    """
    with _users(home) as users:
        with _turn(home):
            endpoint = _ensure(home, _flags(options))
            fcntl.flock(users, fcntl.LOCK_SH)
        try:
            yield endpoint
        finally:
            with _turn(home):
                fcntl.flock(users, fcntl.LOCK_UN)
                if not _kept(home).exists() and _is_unused(home):
                    _stop(home)


def up(home: Path, **options: Option) -> Endpoint:
    """Start it, if need be, and leave it running until `down`."""
    with _turn(home):
        endpoint = _ensure(home, _flags(options))
        _kept(home).touch()
        return endpoint


def down(home: Path, *, force: bool = True) -> None:
    """Stop it, by `force` whoever uses it. Raises SandboxError while somebody does."""
    with _turn(home):
        _refuse_if_used(home, force)
        _kept(home).unlink(missing_ok=True)
        _stop(home)


def reset(home: Path, *, force: bool = False) -> None:
    """Stop it and forget everything, the bill too. Raises SandboxError while somebody uses it."""
    with _turn(home):
        _refuse_if_used(home, force)
        _stop(home)
        for path in (home / FOLDER).iterdir():
            if path.name not in ("turn", "users", LOCK):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def status(home: Path) -> Status:
    """Its endpoint, None when it is not alive, and what it has billed. Nothing is created."""
    return Status(_endpoint(home) if (home / FOLDER).exists() else None, _kept(home).exists(), read_bill(home))


def _flags(options: dict[str, Option]) -> list[str]:
    """Keyword options as command-line flags; what is None is left out, a sequence is repeated."""
    flags: list[str] = []
    for name, value in sorted(options.items()):
        several = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        for one in several:
            if one is not None:
                text = str(one.resolve()) if isinstance(one, Path) else str(one)
                flags.append(f"--{name.replace('_', '-')}={text}")
    return flags


def _ensure(home: Path, flags: list[str]) -> Endpoint:
    """A listening server with these options. One whose starter was killed may still be on its way: it is awaited."""
    folder = home / FOLDER
    _wait_for(lambda: find_endpoint(folder) is not None or not is_alive(folder), START_S)
    found = find_endpoint(folder)
    if found is not None:
        if not flags or flags == found.options:
            return Endpoint(found.url, found.api_key)
        if not _is_unused(home):
            raise SandboxError(f"the sandbox of {home} runs with other options; end the runs that use it first")
    _stop(home)
    return _start(home, flags)


def _start(home: Path, flags: list[str]) -> Endpoint:
    folder = home / FOLDER
    forget_dead_holder(folder)
    child = _spawn(home, flags)
    _wait_for(lambda: find_endpoint(folder) is not None or child.poll() is not None, START_S)
    found = find_endpoint(folder)
    if found is not None and found.pid == child.pid:
        return Endpoint(found.url, found.api_key)
    if found is not None or (child.poll() is not None and is_alive(folder)):
        return _ensure(home, flags)  # a killed starter's server was quicker, perhaps with other options
    raise SandboxError(f"the sandbox did not start: {_last_line(folder / 'log')} (all of it: {folder / 'log'})")


def _spawn(home: Path, flags: list[str]) -> subprocess.Popen[bytes]:
    with (home / FOLDER / "log").open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "sandbox.deepseek", f"--home={home.resolve()}", "--while-used", *flags],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": _python_path()},
        )
    _children.append(child)
    return child


def _stop(home: Path) -> None:
    """SIGTERM, then SIGKILL. The process id is trusted only while the server's lock is held."""
    folder = home / FOLDER
    for number in (signal.SIGTERM, signal.SIGKILL):
        _wait_for(lambda: living_pid(folder) is not None or not is_alive(folder), STOP_S)
        pid = living_pid(folder)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        _wait_for(lambda: not is_alive(folder), STOP_S)
    for child in _children:
        if child.poll() is None and not is_alive(folder):
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.2)
    _children[:] = [child for child in _children if child.returncode is None]


def _refuse_if_used(home: Path, force: bool) -> None:
    if not force and not _is_unused(home):
        raise SandboxError(f"the sandbox of {home} is in use; end the runs that use it first")


def _is_unused(home: Path) -> bool:
    """Whether no process holds `users`."""
    with _users(home) as users:
        return try_lock(users)


@contextmanager
def _turn(home: Path) -> Iterator[None]:
    """One transition at a time."""
    folder = home / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "turn").open("a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


@contextmanager
def _users(home: Path) -> Iterator[IO[str]]:
    folder = home / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "users").open("a") as users:
        yield users


def _kept(home: Path) -> Path:
    return home / FOLDER / "kept"


def _endpoint(home: Path) -> Endpoint | None:
    found = find_endpoint(home / FOLDER)
    return Endpoint(found.url, found.api_key) if found else None


def _wait_for(is_so: Callable[[], bool], patience_s: float) -> None:
    """Return once it is so, or after that many seconds."""
    deadline = time.monotonic() + patience_s
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.02)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _python_path() -> str:
    """The folder that holds this package, so that the child finds it wherever it is started."""
    return os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
