"""A PostgreSQL server of the tests' own: made in a temporary folder, on a socket and a loopback port, stopped by its pid."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

PATIENCE_S = 60.0
OPERATOR, WORKER = "operator", "worker"
RIGHTS = (
    "CREATE ROLE operator LOGIN PASSWORD '{secret}'",
    "CREATE ROLE worker LOGIN PASSWORD '{secret}'",
    "CREATE DATABASE sisa ENCODING 'UTF8' TEMPLATE template0",
    "REVOKE ALL ON DATABASE sisa FROM PUBLIC",
    "GRANT CONNECT, CREATE ON DATABASE sisa TO operator",
    "GRANT CONNECT ON DATABASE sisa TO worker",
)
"""What the pages tell an administrator to do: no test has more rights than that."""
DEBIAN = Path("/usr/lib/postgresql")
SETTINGS = {
    "listen_addresses": "127.0.0.1", "max_connections": "200", "shared_buffers": "32MB", "autovacuum": "off",
    "logging_collector": "off", "max_wal_senders": "4", "wal_level": "replica",
}  # fmt: skip


def binaries() -> Path | None:
    """Where the server's programs lie; None if there are none."""
    found = [path.parent for path in DEBIAN.glob("*/bin/initdb")] if DEBIAN.is_dir() else []
    elsewhere = shutil.which("initdb")
    return max(found, default=Path(elsewhere).parent if elsewhere else None, key=lambda path: int(path.parent.name))


def account() -> list[str]:
    """Words before a command that has to run without root's rights."""
    if os.getuid():
        return []
    names = {entry.pw_name for entry in pwd.getpwall()}
    return ["runuser", "-u", "postgres" if "postgres" in names else "nobody", "--"]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


class Server:
    """One server with one database; stopped and started as a test wants."""

    def __init__(self, programs: Path, folder: Path, *, standby_of: Server | None = None) -> None:
        self.programs, self.folder, self.port = programs, folder, free_port()
        self.data = folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self.secret = standby_of.secret if standby_of else secrets.token_hex(8)
        if standby_of is None:
            (folder / "secret").write_text(self.secret)
            self._run("initdb", "-D", self.data, "-U", "admin", "-A", "scram-sha-256", "--no-sync", "-E", "UTF8",
                      "--locale", "C", "-k", f"--pwfile={folder / 'secret'}")  # fmt: skip
        else:
            self._run("pg_basebackup", "-D", self.data, "-R", "-X", "stream", "-c", "fast", "-d", standby_of.dsn)

    @property
    def dsn(self) -> str:
        """For the administrator, secret included."""
        return f"postgresql://admin:{self.secret}@127.0.0.1:{self.port}/postgres"

    def url(self, user: str = OPERATOR) -> str:
        """What a recipe says."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/sisa"

    def _run(self, program: str, *words: object) -> None:
        subprocess.run(
            [*account(), str(self.programs / program), *map(str, words)],
            check=True,
            capture_output=True,
            cwd=self.folder,
        )

    def start(self, **settings: str) -> Server:
        """Start, and wait until it answers."""
        words = [f"-c{name}={value}" for name, value in {**SETTINGS, "port": str(self.port), **settings}.items()]
        words.append(f"-cunix_socket_directories={self.folder}")
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*account(), str(self.programs / "postgres"), "-D", str(self.data), *words],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder,
            )  # fmt: skip
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                psycopg.connect(self.dsn, connect_timeout=5).close()
                return self
            except psycopg.OperationalError:
                assert self._process.poll() is None, (self.folder / "log").read_text()[-2000:]
                assert time.monotonic() < deadline_s, "the server doesn't come up"
                time.sleep(0.05)

    @property
    def pid(self) -> int:
        """The server's own process."""
        return int((self.data / "postmaster.pid").read_text().split()[0])

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it: SIGINT rolls back and closes every session, SIGQUIT is a crash."""
        if self._process is None:
            return
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(self.pid, how)
        self._process.wait(PATIENCE_S)
        self._process = None

    def ask(self, statement: Any, *values: Any, database: str = "sisa") -> list[Any]:
        """Run a statement as the administrator."""
        with psycopg.connect(self.dsn, dbname=database, autocommit=True) as connection:
            cursor = connection.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []

    def end_sessions(self, words: str = "sisa%") -> int:
        """Have the server end the sessions of programs whose name is like this."""
        found = self.ask(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE %s"
            " AND pid <> pg_backend_pid()", words,
        )  # fmt: skip
        return len(found)


@contextlib.contextmanager
def running(*, standby_of: Server | None = None, **settings: str) -> Iterator[Server]:
    """A server for the length of a ``with`` block; a test without binaries is skipped, except where all must run."""
    programs = binaries()
    if programs is None:
        reason = "PostgreSQL's server isn't installed (Debian: postgresql)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    place = os.environ.get("PYTEST_DEBUG_TEMPROOT")
    with tempfile.TemporaryDirectory(prefix="sisa-pg-", dir=place) as name:
        folder = Path(name)
        if not os.getuid():
            shutil.chown(folder, account()[2])
        server = Server(programs, folder, standby_of=standby_of)
        server.start(**settings)
        try:
            if standby_of is None:
                for statement in RIGHTS:
                    server.ask(statement.format(secret=server.secret), database="postgres")
            yield server
        finally:
            server.stop()
