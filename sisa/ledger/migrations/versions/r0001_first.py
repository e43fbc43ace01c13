"""The first form: requests, exclusions, partitions, stages, versions, events and what serves them.

Kinds of columns are told for both engines. ``STRICT`` makes SQLite hold to them; the collation makes PostgreSQL
sort text as SQLite does.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
REAL: sa.types.TypeEngine[Any] = sa.Double().with_variant(sa.REAL(), "sqlite")
TEXT = sa.Text().with_variant(postgresql.TEXT(collation="C"), "postgresql")
BYTES = sa.LargeBinary()


def _column(name: str, kind: Any, *, null: bool = False, default: str | None = None) -> sa.Column[Any]:
    return sa.Column(
        name, kind, nullable=null, autoincrement=False, server_default=None if default is None else sa.text(default)
    )


def _table(name: str, *columns: sa.Column[Any], key: tuple[str, ...] = ()) -> None:
    constraints = [sa.PrimaryKeyConstraint(*key, name=f"{name}_key")] if key else []
    op.create_table(name, *columns, *constraints, sqlite_strict=True)


def upgrade() -> None:
    """Make every table."""
    _facts()
    _requests()
    _stages()
    _service()


def _facts() -> None:
    _table("facts", _column("name", TEXT), _column("value", TEXT), key=("name",))
    _table("counters", _column("name", TEXT), _column("last", NUMBER), key=("name",))
    for name in ("events", "requests", "turns"):
        op.execute(f"INSERT INTO counters (name, last) VALUES ('{name}', 0)")  # noqa: S608 - names are ours
    _table(
        "partitions",
        _column("shard", NUMBER), _column("slice", NUMBER),
        _column("records", NUMBER), _column("subjects", NUMBER), _column("membership", TEXT),
        _column("next_records", NUMBER, null=True), _column("next_subjects", NUMBER, null=True),
        _column("next_membership", TEXT, null=True),
        _column("changes", NUMBER, default="0"), _column("dirty", NUMBER, default="0"),
        key=("shard", "slice"),
    )  # fmt: skip
    _table(
        "partition_files",
        _column("shard", NUMBER), _column("slice", NUMBER), _column("number", NUMBER),
        _column("records", NUMBER), _column("membership", TEXT),
        _column("next_records", NUMBER, null=True), _column("next_membership", TEXT, null=True),
        key=("shard", "slice", "number"),
    )  # fmt: skip
    _table(
        "generations",
        _column("number", NUMBER),
        _column("created_at", TEXT),
        _column("records", NUMBER),
        key=("number",),
    )


def _requests() -> None:
    _table(
        "requests",
        _column("number", NUMBER), _column("id", TEXT), _column("kind", TEXT, default="'deletion'"),
        _column("created_at", TEXT), _column("updated_at", TEXT),
        _column("state", TEXT), _column("reason", TEXT), _column("subjects", NUMBER), _column("records", NUMBER),
        _column("version_before", NUMBER), _column("version_quarantine", NUMBER, null=True),
        _column("version_after", NUMBER, null=True), _column("stages_retrained", NUMBER, default="0"),
        _column("seconds_to_quarantine", REAL, default="0"), _column("note", TEXT, default="''"),
        _column("regime", TEXT, default="''"),
        key=("number",),
    )  # fmt: skip
    op.create_index("requests_by_id", "requests", ["id"], unique=True)
    _table(
        "request_partitions",
        _column("request", TEXT), _column("shard", NUMBER), _column("slice", NUMBER),
        key=("request", "shard", "slice"),
    )  # fmt: skip
    _table(
        "waiting",
        _column("request", TEXT), _column("shard", NUMBER), _column("slice", NUMBER), _column("records", NUMBER),
        _column("membership", TEXT), key=("request", "shard", "slice"),
    )  # fmt: skip
    _table(
        "exclusions", _column("kind", TEXT), _column("digest", BYTES), _column("request", TEXT), key=("kind", "digest")
    )
    _table("marks", _column("shard", NUMBER), _column("request", TEXT), key=("shard", "request"))
    _table("submissions", _column("key", BYTES), _column("body", BYTES), _column("at", TEXT), key=("key",))
    _table(
        "events", _column("number", NUMBER), _column("at", TEXT), _column("kind", TEXT), _column("detail", TEXT),
        key=("number",),
    )  # fmt: skip


def _stages() -> None:
    _table(
        "stages",
        _column("key", TEXT), _column("platform", TEXT), _column("code", TEXT), _column("shard", NUMBER),
        _column("stage", NUMBER), _column("parent_key", TEXT), _column("records", NUMBER),
        _column("state_digest", TEXT), _column("full_digest", TEXT), _column("worker", TEXT), _column("seconds", REAL),
        _column("created_at", TEXT), _column("tainted", NUMBER, default="0"),
        key=("key", "platform"),
    )  # fmt: skip
    op.create_index("stages_by_place", "stages", ["shard", "stage"])
    _table(
        "past_stages",
        _column("shard", NUMBER), _column("stage", NUMBER), _column("created_at", TEXT), _column("purged_at", TEXT),
    )  # fmt: skip


def _service() -> None:
    _table(
        "versions",
        _column("number", NUMBER), _column("created_at", TEXT), _column("cause", TEXT),
        _column("request", TEXT, null=True),
        key=("number",),
    )  # fmt: skip
    _table(
        "members",
        _column("version", NUMBER), _column("shard", NUMBER), _column("stage", NUMBER),
        _column("key", TEXT, null=True), _column("platform", TEXT, null=True),
        key=("version", "shard"),
    )  # fmt: skip
    op.create_index("members_by_key", "members", ["key"])
    _table("fitted", _column("members", TEXT), _column("content", TEXT), key=("members",))
    _table(
        "measurements",
        _column("version", NUMBER), _column("accuracy", REAL), _column("log_loss", REAL), _column("records", NUMBER),
        key=("version",),
    )  # fmt: skip
    _table(
        "replicas",
        _column("id", TEXT), _column("version", NUMBER), _column("lease_s", REAL), _column("since", TEXT),
        key=("id",),
    )  # fmt: skip
    _table(
        "tokens",
        _column("id", TEXT), _column("digest", BYTES), _column("scopes", TEXT), _column("name", TEXT),
        _column("created_at", TEXT), _column("last_used_on", TEXT, null=True),
        key=("id",),
    )  # fmt: skip
