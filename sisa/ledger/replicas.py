"""Who serves, and from which version on: what a deletion waits for before it is acknowledged.

Invariants:

* A replica registers before its first answer, while it has no lease. Reading the live version gives it a lease
  (unless it has a quarantine to confirm first): for ``lease_s`` seconds, counted on its own clock from before the
  reading, it may answer from that version; then it has to read again. Of these it uses ``HELD`` only.
* ``confirm`` says that it has stopped answering from anything older than a version.
* Whoever publishes a quarantine waits, after the commit, until each registered replica has confirmed, or for
  ``WAITED`` of its lease: what was read before the commit is used up by then, even if one clock runs faster than
  another. Clocks are never compared, so that hosts need not agree on the time.
* A replica whose lease was waited out is struck off; it finds that out when it reads again, and registers anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sisa.ledger.database import Database, Row, now
from sisa.ledger.versions import Versions

HELD = 0.95
"""The share of its lease for which a replica answers without reading the ledger again."""
WAITED = 0.97
"""The share after which whoever deletes need not wait for it any more: two percent longer, since clocks' speeds differ,
and less than the whole, so that even with a dead replica a deletion is acknowledged within one lease."""


@dataclass(frozen=True)
class ReplicaRow:
    """One process that answers."""

    id: str
    version: int
    """It answers from this version or a newer one."""
    lease_s: float
    since: str


@dataclass(frozen=True)
class View:
    """What a replica learns when it reads the ledger: all of one moment."""

    confirmed: int | None
    """What the replica's row says; None if it isn't registered (any more)."""
    version: int
    """The live version."""
    floor: int
    """The latest quarantine: answers from older versions are void."""

    @property
    def renews(self) -> bool:
        """Whether this reading gives a new lease.

        Only if the replica is registered and nobody waits for it: else it could be struck off, and no longer be
        waited for, while a lease from a reading in between runs on.
        """
        return self.confirmed is not None and self.confirmed >= self.floor


class Replicas:
    """The table of replicas."""

    def __init__(self, database: Database, versions: Versions) -> None:
        self._db = database
        self._versions = versions

    def register(self, identifier: str, *, lease_s: float) -> View:
        """Enter a replica, or enter it again, and tell it what is live at that moment."""
        with self._db.transaction():
            floor = self._versions.last_quarantine()
            self._db.rows(
                "INSERT INTO replicas (id, version, lease_s, since) VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE"
                " SET version = excluded.version, lease_s = excluded.lease_s, since = excluded.since",
                (identifier, floor, lease_s, now()),
            )
            return View(floor, self._versions.live_number(), floor)

    def view(self, identifier: str) -> View:
        """Read what is live, and whether the replica is still registered."""
        with self._db.snapshot():
            row = self._db.row("SELECT version FROM replicas WHERE id = ?", (identifier,))
            confirmed = int(row["version"]) if row is not None else None
            return View(confirmed, self._versions.live_number(), self._versions.last_quarantine())

    def confirm(self, identifier: str, version: int) -> None:
        """Write down that a replica answers from ``version`` or newer only."""
        with self._db.transaction():
            self._db.rows(
                "UPDATE replicas SET version = ? WHERE id = ? AND version < ?", (version, identifier, version)
            )

    def behind(self, version: int) -> list[ReplicaRow]:
        """Return the replicas that have not confirmed a version."""
        return [_replica(r) for r in self._db.rows("SELECT * FROM replicas WHERE version < ? ORDER BY id", (version,))]

    def strike_off(self, identifiers: Sequence[str], *, version: int) -> None:
        """Strike off replicas whose lease was waited out, unless they have confirmed meanwhile."""
        with self._db.transaction():
            self._db.many(
                "DELETE FROM replicas WHERE id = ? AND version < ?", [(each, version) for each in identifiers]
            )

    def leave(self, identifier: str) -> None:
        """Strike off a replica that has stopped answering."""
        with self._db.transaction():
            self._db.rows("DELETE FROM replicas WHERE id = ?", (identifier,))

    def all(self) -> list[ReplicaRow]:
        """Return every registered replica, alive or not."""
        return [_replica(r) for r in self._db.rows("SELECT * FROM replicas ORDER BY id")]


def _replica(row: Row) -> ReplicaRow:
    return ReplicaRow(row["id"], row["version"], row["lease_s"], row["since"])
