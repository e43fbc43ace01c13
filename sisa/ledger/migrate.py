"""Making a ledger's tables, and bringing older ones forward, with Alembic: the only place that has SQLAlchemy.

The revisions under ``migrations/versions`` are the only definition of the tables, run for both engines. A migration
is one transaction: killed at any instant it leaves the old form or the new one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import StaticPool

if TYPE_CHECKING:
    import sqlite3

    import psycopg
    from sqlalchemy import Connection, Engine

MIGRATIONS = Path(__file__).with_name("migrations")
VERSIONS = [MIGRATIONS / "versions"]
"""Folders with revisions."""
_ONE_AT_A_TIME = threading.Lock()
"""Alembic tells a revision about its connection through a global."""


def migrate_sqlite(connection: sqlite3.Connection) -> None:
    """Bring a connection's database to the newest form, in one transaction of its own."""
    engine = create_engine("sqlite://", creator=lambda: connection, poolclass=StaticPool)

    @event.listens_for(engine, "begin")
    def _(begun: Connection) -> None:
        begun.exec_driver_sql("BEGIN IMMEDIATE")

    with _begun(engine) as begun:
        _upgrade(begun)


def migrate_postgres(connection: psycopg.Connection[Any]) -> None:
    """Bring the schema that a connection works in to the newest form, in the transaction that it is in."""
    engine = create_engine("postgresql+psycopg://", creator=lambda: connection, poolclass=StaticPool)
    for ending in ("do_begin", "do_commit", "do_rollback"):
        setattr(engine.dialect, ending, _nothing)
    with _begun(engine) as begun:
        _upgrade(begun)


def _upgrade(begun: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", _escaped(MIGRATIONS))
    config.set_main_option("path_separator", "newline")
    config.set_main_option("version_locations", "\n".join(map(_escaped, VERSIONS)))
    config.attributes["connection"] = begun
    with _ONE_AT_A_TIME:
        command.upgrade(config, "head")


@contextlib.contextmanager
def _begun(engine: Engine) -> Iterator[Connection]:
    """Begin a transaction; what goes wrong is the driver's error, which the engines know how to tell."""
    try:
        with engine.begin() as begun:
            yield begun
    except DBAPIError as error:
        raise error.orig or error from error


def _escaped(path: Path) -> str:
    return str(path).replace("%", "%%")  # a configuration file's way


def _nothing(_: object) -> None:
    """Leave the transaction to whoever began it."""
