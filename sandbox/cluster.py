"""One Postgres data directory and the server over it: made, started, found again, recovered, stopped, deleted.

Only whoever holds the transition lock of `sandbox.postgres` may change a cluster. Every failure that leaves a
`postmaster.pid` behind ends here:

- The postmaster was killed, and is gone, a zombie, or its pid now belongs to another process. Postgres itself
  trusts the file when *any* process of the same user has that pid, so we look at the command line instead, which
  carries a name made of the data directory's inode, and remove a file that lies.
- Its children outlive it for a moment. The shared memory they hold keeps a second server out of the same data
  (Postgres checks that without the file, too), so starting is simply tried again until they are gone.
- A starter was killed half-way. `initdb` works in a scratch folder that is renamed when complete; a server that
  is still coming up is waited for, never doubled.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sandbox.binaries import Finished, Programs
from sandbox.errors import SandboxError

HOST = "127.0.0.1"
USER = "farthing"
#: Seconds a start may take, crash recovery included.
PATIENCE = 60.0

INITDB = (
    "--auth=scram-sha-256",
    "--encoding=UTF8",
    "--locale-provider=builtin",
    "--builtin-locale=C.UTF-8",
    "--locale=C",
    f"--username={USER}",
    "--pwfile=password",
)
#: Given on the command line at every start, so that a cluster made by an older version follows too.
SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",  # no socket file: its path may have 107 bytes at most
    "max_connections": "200",
    "shared_buffers": "128MB",
    "fsync": "on",
    "synchronous_commit": "on",
    "log_error_verbosity": "terse",  # DETAIL and CONTEXT quote rows, and a row is document text (G15)
    "log_min_error_statement": "panic",  # so do statements
}


@dataclass(frozen=True, slots=True)
class Postmaster:
    """A live server process over our data, answering or not."""

    pid: int
    port: int


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Postgres data directory and what lies beside it: password, port, log."""

    place: Path
    programs: Programs
    #: Whether it survives a power cut. One whose data is thrown away need not, and answers sooner.
    is_durable: bool = True

    @property
    def data(self) -> Path:
        return self.place / "data"

    @property
    def log(self) -> Path:
        return self.place / "log"

    @property
    def password(self) -> str:
        """The superuser's password, made with the data."""
        try:
            return (self.place / "password").read_text()
        except FileNotFoundError:
            raise SandboxError(
                f"The embedded Postgres's password is gone from {self.place}: `farthing sandbox reset` starts anew."
            ) from None

    def postmaster(self) -> Postmaster | None:
        """The live server over this data, found by its pid file and believed by its command line."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return None
        if len(lines) < 4 or not lines[0].isdecimal():
            return None  # cut short by a power failure
        if self._name() not in _command_line(int(lines[0])):
            return None
        return Postmaster(pid=int(lines[0]), port=int(lines[3]))

    def answers(self, live: Postmaster) -> bool:
        """Whether the server accepts connections: not while it starts, recovers or stops."""
        return (
            self._run("pg_isready", "-q", f"-h{HOST}", f"-p{live.port}", f"-U{USER}", "-dpostgres", "-t3").code == 0
        )

    def start(self) -> Postmaster:
        """Make the data if there is none, start the server if there is none, and wait until it answers.

        Raises:
            SandboxError: it does not start; the message holds Postgres's own reason.
        """
        self._make_data()
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            live = self.postmaster()
            if live is None:
                self._launch()
            elif self.answers(live):
                return live
            else:
                time.sleep(0.1)
        raise SandboxError(
            f"The embedded Postgres does not answer after {PATIENCE:.0f} s. Its log is {self.log}; "
            "`farthing sandbox down` stops it."
        )

    def stop(self) -> None:
        """Stop the server: in order, or at once when a minute was not enough. Fine if there is none."""
        for mode in ("fast", "immediate"):
            if self.postmaster() is None:
                return
            self._run("pg_ctl", "-w", "-t60", "-Ddata", f"-m{mode}", "stop")
        if live := self.postmaster():
            raise SandboxError(
                f"The embedded Postgres, process {live.pid}, does not stop: end it with `kill {live.pid}`."
            )

    def _name(self) -> str:
        """What the server is called in the process list: a copied folder is another cluster, a moved one is not."""
        folder = self.data.stat()
        return f"farthing-{folder.st_dev:x}-{folder.st_ino:x}"

    def _run(self, program: str, *arguments: str) -> Finished:
        return self.programs.run(program, *arguments, place=self.place)

    def _make_data(self) -> None:
        if self.data.exists():
            return
        for leftover in self.place.glob("data.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._write("password", secrets.token_urlsafe(24))
        scratch = Path(tempfile.mkdtemp(prefix="data.", dir=self.place))
        descriptor = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        self.programs.account.give(descriptor)
        os.close(descriptor)
        made = self._run("initdb", *INITDB, "-D", scratch.name)
        if made.code != 0:
            raise SandboxError(f"Postgres cannot make its data in {self.place}: {_last_words(made.printed)}")
        scratch.rename(self.data)

    def _launch(self) -> None:
        """Try once to start the server; return without one when it is worth trying again."""
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        port = self._choose_port()
        with suppress(FileNotFoundError):
            self.log.replace(self.log.with_name("log.old"))
        self._write("log", "")
        settings = SETTINGS | {"port": str(port), "cluster_name": self._name()}
        if not self.is_durable:
            settings |= {"fsync": "off", "full_page_writes": "off"}
        options = shlex.join(f"--{name}={value}" for name, value in settings.items())
        # Relative names: pg_ctl puts them into a shell line between double quotes, and a home may hold a `$`.
        started = self._run("pg_ctl", "-w", f"-t{PATIENCE:.0f}", "-Ddata", "-llog", "-o", options, "start")
        if started.code != 0:
            self._forgive(self.log.read_text(errors="replace") or started.printed)

    def _forgive(self, words: str) -> None:
        if "could not create any TCP/IP sockets" in words:  # someone took the port since we looked
            (self.place / "port").unlink()
        elif "pre-existing shared memory block" in words or 'lock file "postmaster.pid"' in words:
            time.sleep(0.25)  # children of the last server, or a rival whose starter was killed
        elif self.postmaster() is None:
            raise SandboxError(f"The embedded Postgres does not start: {_last_words(words)} Its log is {self.log}.")

    def _choose_port(self) -> int:
        """The last port while it is free, so that a restart leaves every known address valid."""
        remembered = self.place / "port"
        if remembered.exists() and _is_free(port := int(remembered.read_text())):
            return port
        port = _free_port()
        self._write("port", str(port))
        return port

    def _write(self, name: str, text: str) -> None:
        """A new private file of the server's account, on the disk before the data that depends on it."""
        path = self.place / name
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
            self.programs.account.give(descriptor)


def delete(place: Path) -> None:
    """Delete a stopped cluster and all that lies beside it.

    Raises:
        SandboxError: it cannot be deleted.
    """
    for _ in range(50):  # children of a killed server may write for some seconds more
        shutil.rmtree(place, ignore_errors=True)
        if not place.exists():
            return
        time.sleep(0.1)
    raise SandboxError(f"{place} cannot be deleted: a process still writes there, or it belongs to another user.")


def _command_line(pid: int) -> str:
    """How process `pid` was started; empty for a process that is gone or a zombie."""
    if Path("/proc/self").exists():
        try:
            return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        except OSError:
            return ""
    listed = subprocess.run(("/bin/ps", "-ww", "-o", "command=", "-p", str(pid)), capture_output=True, text=True)
    return listed.stdout


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Postgres does: old connections don't count
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def _last_words(printed: str) -> str:
    """The most telling line a program left: its last complaint, else simply its last line."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    complaints = [line for line in lines if any(word in line for word in ("FATAL", "PANIC", "error:"))]
    said = (complaints or lines or ["it gave no reason"])[-1]
    return re.sub(r"^\d{4}-.*?\]\s+", "", said).rstrip(".") + "."  # without the log's time and process id
