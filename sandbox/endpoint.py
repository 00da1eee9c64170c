"""Where a home's DeepSeek listens: alone responsible for `endpoint.json`, and for whether it may be believed.

A server locks `server.lock` for as long as it lives and writes its process id into it; some time later, when it
listens, it publishes `endpoint.json`, which outlives it so that the next one may have its port. So the lock alone
says that a server is alive, and only an endpoint of the process id in the lock is that server's.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

ENDPOINT = "endpoint.json"
LOCK = "server.lock"
#: How long a server tries for its lock. Whoever looks whether it is free holds it for a moment.
LOCK_S = 1.0


@dataclass(frozen=True, slots=True)
class Published:
    """What a listening server says of itself; `options` are the flags that it was started with."""

    pid: int
    port: int
    url: str
    api_key: str
    options: list[str]


def take_lock(lock: IO[str]) -> bool:
    """Hold the server's lock, open for appending, and write this process's id into it. False: another has it."""
    deadline = time.monotonic() + LOCK_S
    while not try_lock(lock):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return True


def try_lock(file: IO[str], how: int = fcntl.LOCK_EX) -> bool:
    """Lock it now or not at all."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def forget_dead_holder(folder: Path) -> None:
    """Empty the lock if no server has it, so that the next one is never taken for the one before."""
    with (folder / LOCK).open("a") as lock:
        if try_lock(lock):
            lock.truncate(0)


def publish(folder: Path, published: Published) -> None:
    """Say where it listens, in one rename."""
    fresh = folder / f"{ENDPOINT}.{published.pid}"
    fresh.touch(mode=0o600)
    fresh.write_text(json.dumps(asdict(published)))
    fresh.rename(folder / ENDPOINT)


def last_published(folder: Path) -> Published | None:
    """The endpoint of the last server that listened here, alive or not."""
    try:
        return Published(**json.loads((folder / ENDPOINT).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def is_alive(folder: Path) -> bool:
    """Whether a server has the lock; it may not listen yet."""
    with (folder / LOCK).open("a") as lock:
        # Shared, so that two who look at once do not take each other for a server.
        return not try_lock(lock, fcntl.LOCK_SH)


def living_pid(folder: Path) -> int | None:
    """The process id of the server that is alive; None if none is, or if it has not said so yet."""
    said = (folder / LOCK).read_text() if is_alive(folder) else ""
    return int(said) if said else None


def find_endpoint(folder: Path) -> Published | None:
    """The endpoint of the server that is alive; None if none is, or if it does not listen yet."""
    published = last_published(folder)
    return published if published is not None and published.pid == living_pid(folder) else None
