"""Settings for the whole suite: how hypothesis searches, and where temporary stores lie."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from postgres_kit import Server, running

from sisa.ledger.place import Place, PostgresPlace, place_of

# Two cores shared with training: an example's duration says nothing. In CI the same examples every time,
# so that a red run can be run again; elsewhere new ones, so that the search goes on.
settings.register_profile("local", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# A store is many small files, each made durable. Where memory serves as a disk and has room, tests put theirs there:
# the same calls are made, and nobody waits for a disk.
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

# Started in the background a shell has SIGINT ignored, and so has everything below it: Ctrl-C couldn't be tried there.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A PostgreSQL server for the whole run; whoever stops it starts it again."""
    with running() as server:
        yield server


@pytest.fixture
def postgres_url(postgres: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a recipe says to have its ledger there; the secret is where secrets are."""
    monkeypatch.setenv("PGPASSWORD", postgres.secret)
    return postgres.url()


@pytest.fixture
def postgres_place(postgres: Server, postgres_url: str) -> Iterator[PostgresPlace]:
    """Where a new ledger can be made on the server; it is gone afterwards, for those who look into the files."""
    place = place_of(postgres_url, Path("unused"))
    assert isinstance(place, PostgresPlace)
    own = place.of(f"sisa_{secrets.token_hex(16)}")
    yield own
    postgres.end_sessions()
    postgres.ask(f"DROP SCHEMA IF EXISTS {own.schema} CASCADE")


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Where a new ledger can be made, on each engine: what one promises, the other promises too."""
    if request.param == "sqlite":
        return tmp_path / "ledger.db"
    found: Place = request.getfixturevalue("postgres_place")
    return found
