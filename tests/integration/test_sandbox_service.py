"""The emulated DeepSeek as a detached process: shared, stopped by the last user, and started anew after a SIGKILL."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox.bill import bill_path, read_bill
from sandbox.errors import SandboxError
from sandbox.service import Endpoint, down, reset, running, status, up

OPTIONS = {"time_scale": 0, "clock": "2026-11-25T00:10:00Z"}


def ask(endpoint: Endpoint, attempt: str = "1.1.1") -> int:
    body = {"model": "deepseek-flash", "messages": [{"role": "user", "content": "hello"}]}
    headers = {
        "Authorization": f"Bearer {endpoint.api_key}",
        "X-Attempt": attempt,
        "Content-Type": "application/json",
    }
    request = urllib.request.Request(f"{endpoint.url}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as reply:
        return int(json.load(reply)["usage"]["prompt_tokens"])


def pid_of(home: Path) -> int:
    return int(json.loads((home / "deepseek" / "endpoint.json").read_text())["pid"])


def test_users_share_one_server_and_the_last_one_stops_it(tmp_path: Path) -> None:
    with running(tmp_path, **OPTIONS) as first:
        with running(tmp_path) as second:
            assert first == second
            assert ask(second) > 0
        assert status(tmp_path).endpoint == first
    assert status(tmp_path).endpoint is None
    assert read_bill(tmp_path).attempts == 1


def test_a_killed_server_is_started_anew_with_its_bill_intact(tmp_path: Path) -> None:
    with running(tmp_path, **OPTIONS) as before:
        ask(before)
        os.kill(pid_of(tmp_path), signal.SIGKILL)
        while status(tmp_path).endpoint is not None:
            time.sleep(0.01)
        with bill_path(tmp_path).open("ab") as torn:
            torn.write(b'{"attempt": ')
        with running(tmp_path, **OPTIONS) as after:
            assert after.url == before.url
            ask(after, "1.1.2")
            assert status(tmp_path).bill == read_bill(tmp_path)
    assert read_bill(tmp_path).attempts == 2


def test_a_kept_server_outlives_its_users_until_it_is_put_down(tmp_path: Path) -> None:
    endpoint = up(tmp_path, **OPTIONS)
    try:
        with running(tmp_path) as shared:
            assert shared == endpoint
        assert status(tmp_path).is_kept
        assert ask(endpoint) > 0
    finally:
        down(tmp_path)
    assert status(tmp_path).endpoint is None
    reset(tmp_path)
    assert read_bill(tmp_path).attempts == 0


def test_other_options_restart_an_idle_server_but_never_one_in_use(tmp_path: Path) -> None:
    with running(tmp_path, **OPTIONS):
        with pytest.raises(SandboxError, match="other options"), running(tmp_path, time_scale=1):
            pass
        with pytest.raises(SandboxError, match="in use"):
            reset(tmp_path)
        assert status(tmp_path).endpoint is not None


def start_and_be_killed(home: Path, when: Callable[[], bool]) -> None:
    code = (
        "import sys; from pathlib import Path; from sandbox.service import running\n"
        "with running(Path(sys.argv[1]), time_scale=0, clock='2026-11-25T00:10:00Z'):\n"
        "    sys.stdin.read()\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", code, str(home)], stdin=subprocess.PIPE)
    try:
        while not when():
            assert starter.poll() is None
            time.sleep(0.001)
    finally:
        starter.kill()
        starter.communicate()


def is_locked(home: Path) -> bool:
    lock = home / "deepseek" / "server.lock"
    if not lock.exists():
        return False
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


@pytest.mark.parametrize("has_served_before", [False, True])
def test_a_server_on_its_way_is_awaited_when_its_starter_was_killed(tmp_path: Path, has_served_before: bool) -> None:
    if has_served_before:
        with running(tmp_path, **OPTIONS):
            pass
    start_and_be_killed(tmp_path, lambda: is_locked(tmp_path))
    with running(tmp_path, **OPTIONS) as endpoint:
        assert ask(endpoint) > 0


def test_a_server_that_has_not_its_lock_yet_when_its_starter_is_killed_does_no_harm(tmp_path: Path) -> None:
    start_and_be_killed(tmp_path, (tmp_path / "deepseek" / "log").exists)
    with running(tmp_path, **OPTIONS) as endpoint:
        assert ask(endpoint) > 0


def test_a_server_on_its_way_can_be_put_down(tmp_path: Path) -> None:
    start_and_be_killed(tmp_path, lambda: is_locked(tmp_path))
    down(tmp_path)
    assert not is_locked(tmp_path)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="no USD price"), running(tmp_path, clock="2020-01-01T00:00:00Z"):
        pass


def test_two_servers_never_share_a_home(tmp_path: Path) -> None:
    with running(tmp_path, **OPTIONS):
        second = subprocess.run(
            [sys.executable, "-m", "sandbox.deepseek", f"--home={tmp_path}"], capture_output=True, text=True
        )
    assert second.returncode == 2
    assert "already serves" in second.stderr


def test_a_server_leaves_when_its_last_user_was_killed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from sandbox.service import running\n"
        "with running(Path(sys.argv[1]), time_scale=0, clock='2026-11-25T00:10:00Z'):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    server = pid_of(tmp_path)
    for _ in range(1_000):
        if status(tmp_path).endpoint is None:
            break
        time.sleep(0.02)
    assert status(tmp_path).endpoint is None, server
