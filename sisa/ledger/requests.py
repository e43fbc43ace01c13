"""Deletion requests, and the keyed digests that remember whom they were about.

``accept`` is the promise: one transaction that excludes, takes every tainted stage out of service and
publishes the quarantine version. What comes after it (erasing, purging, repairing) only moves ``state``.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sisa.errors import StaleError, StoreError, UserError
from sisa.layout import is_held_out
from sisa.ledger.database import Database, Row, now
from sisa.ledger.generations import Generations
from sisa.ledger.versions import Versions

STATES = ("accepted", "rows_erased", "stages_purged", "repairing", "repaired")
"""The order in which a request moves; it never moves back."""

Kind = Literal["subject", "record", "content"]
"""What an exclusion is about: a person, a row, or what a row said before it was corrected."""


@dataclass(frozen=True)
class Target:
    """One id that somebody asked to delete (or one superseded content), as its keyed digest, and where its rows are."""

    kind: Kind
    digest: bytes
    places: tuple[tuple[int, int], ...] = ()
    """(shard, slice) pairs; slice 0 is the holdout."""
    record_digests: tuple[bytes, ...] = ()
    """Keyed digests of the record ids found; excluded together with the subject."""
    owner_digests: tuple[bytes, ...] = ()
    """Keyed digests of the people whose rows those are; counted, not kept."""
    unseen: bool = False
    """Whether some of these places could not be read."""


@dataclass(frozen=True)
class Waiting:
    """Corrected rows on their way into one slice: in the ledger from the acceptance until the slice holds them."""

    request: str
    shard: int
    slice: int
    records: int
    membership: str
    """Digest of the rows that wait, so that lost ones aren't taken for none."""


@dataclass(frozen=True)
class Request:
    """One request: a deletion, or a correction."""

    id: str
    kind: str
    """``deletion`` or ``correction``."""
    state: str
    created_at: str
    updated_at: str
    reason: str
    subjects: int
    records: int
    version_before: int
    version_quarantine: int | None
    version_after: int | None
    stages_retrained: int
    seconds_to_quarantine: float
    note: str
    regime: str
    """Whose clock runs: see :mod:`sisa.planning.clocks`."""
    places: tuple[tuple[int, int], ...]

    @property
    def shards(self) -> list[int]:
        """Shards whose constituents were affected; holdout rows affect none."""
        return sorted({shard for shard, slice_ in self.places if not is_held_out(slice_)})

    @property
    def open(self) -> bool:
        """Whether something is left to do."""
        return self.state != STATES[-1]


@dataclass(frozen=True)
class Acceptance:
    """What ``accept`` answers."""

    request: Request
    """The new request; or, if every id was deleted before, the first that did it."""
    repeated: bool
    earlier: tuple[Request, ...] = ()
    """The other requests by which some of the ids were deleted before, oldest first."""


def exclusions_digest(exclusions: Iterable[tuple[str, bytes]]) -> str:
    """Digest what one request excludes: SHA-256 over its sorted lines, each a kind and a keyed digest in hex.

    History keeps it, so that an exclusion can't go unnoticed. It tells no more than the exclusions themselves.
    """
    lines = sorted(f"{kind} {digest.hex()}\n" for kind, digest in exclusions)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _noted(request: str, exclusions: Collection[tuple[str, bytes]]) -> dict[str, object]:
    counts = {each: sum(kind == each for kind, _ in exclusions) for each in get_args(Kind)}
    return {"request": request, "excluded": counts, "exclusions": exclusions_digest(exclusions)}


class Requests:
    """The tables of requests and exclusions."""

    def __init__(self, database: Database, versions: Versions) -> None:
        self._db = database
        self._versions = versions
        self._known: tuple[tuple[Any, ...] | None, dict[tuple[str, bytes], str]] = (None, {})

    def accept(
        self,
        targets: Sequence[Target],
        *,
        reason: str,
        regime: str = "",
        key_check: str | None = None,
        generations: int | None = None,
    ) -> Acceptance:
        """Accept a deletion: durable exclusions, tainted stages and the quarantine version, or nothing.

        Targets that are excluded already are left out: the requests that did it are answered beside the new one.

        Raises:
            UserError: There is nothing to delete.
            StoreError: The digests of ``targets`` were made with an exclusion key that was replaced meanwhile.
            StaleError: The ``generations`` in which the targets were looked up are not all any more.
        """
        with self._db.transaction():
            self._check_generations(generations)
            if key_check is not None and not self._is_key(key_check):
                raise StoreError(
                    "the exclusion key was replaced while ids were looked up", hint="Run the command again."
                )
            before = self.excluded_by((t.kind, t.digest) for t in targets)
            new = {(t.kind, t.digest): t for t in targets if (t.kind, t.digest) not in before and t.places}
            if not new:
                if not before:
                    raise UserError("nothing to delete: no id is in the store", hint="Check the ids.")
                first, *others = self._in_order(set(before.values()))
                return Acceptance(first, repeated=True, earlier=tuple(others))
            identifier = f"del-{secrets.token_hex(8)}"
            self._insert(identifier, list(new.values()), reason=reason)
            self._db.rows("UPDATE requests SET regime = ? WHERE id = ?", (regime, identifier))
            return Acceptance(self.get(identifier), repeated=False, earlier=self._in_order(set(before.values())))

    def accept_correction(
        self,
        identifier: str,
        targets: Sequence[Target],
        *,
        reason: str,
        key_check: str,
        newest_request: int,
        generations: int,
        waiting: Sequence[Waiting],
        check: Callable[[], None],
    ) -> Request:
        """Accept a correction: what the rows said is excluded, what saw it is out of service; or nothing.

        Args:
            identifier: Names the request, and the folder in which the new rows wait.
            targets: One for each row, of the kind ``content``.
            reason: For the record.
            key_check: Of the exclusion key with which the targets were made.
            newest_request: Number of the newest request when the rows were looked up.
            generations: How many there were.
            waiting: Where the new rows wait.
            check: Makes sure, when others have to wait for their turn to write, that the rows are still there to wait.

        Raises:
            StaleError: The store is not as it was when the rows were looked up.
        """
        with self._db.transaction():
            check()
            self._check_generations(generations)
            if not self._is_key(key_check) or self._db.newest_request() != newest_request:
                raise StaleError("another request came while rows were looked up", hint="Run the command again.")
            self._insert(identifier, targets, reason=reason, kind="correction")
            self._db.many(
                "INSERT INTO waiting (request, shard, slice, records, membership) VALUES (?, ?, ?, ?, ?)",
                [(w.request, w.shard, w.slice, w.records, w.membership) for w in waiting],
            )
            return self.get(identifier)

    def found(self, records: Mapping[bytes, str]) -> None:
        """Count and exclude, for the requests of their owners, records that nobody could see when these were accepted.

        What is known by then changes nothing, so that this can be repeated. It belongs before the rows are erased.

        Args:
            records: By the keyed digest of a record, the request that excludes its owner.
        """
        with self._db.transaction():
            known = self.excluded_by(("record", digest) for digest in records)
            fresh = [(digest, request) for digest, request in records.items() if ("record", digest) not in known]
            self._db.many("INSERT INTO exclusions VALUES ('record', ?, ?)", fresh)
            for request, count in sorted(Counter(request for _, request in fresh).items()):
                self._db.rows("UPDATE requests SET records = records + ? WHERE id = ?", (count, request))
                self._db.note("records_found", records=self.get(request).records, **self._excluded(request))

    def _excluded(self, request: str) -> dict[str, object]:
        """What history notes of all that a request excludes."""
        rows = self._db.rows("SELECT kind, digest FROM exclusions WHERE request = ?", (request,))
        return _noted(request, {(row["kind"], bytes(row["digest"])) for row in rows})

    def waiting(self, shard: int, slice_: int) -> list[Waiting]:
        """Return what waits to be merged into a slice, oldest first."""
        rows = self._db.rows(
            "SELECT w.* FROM waiting w JOIN requests r ON r.id = w.request WHERE w.shard = ? AND w.slice = ?"
            " ORDER BY r.number",
            (shard, slice_),
        )
        return [Waiting(r["request"], r["shard"], r["slice"], r["records"], r["membership"]) for r in rows]

    def all_waiting(self) -> list[Waiting]:
        """Return all that waits."""
        rows = self._db.rows("SELECT * FROM waiting ORDER BY request, shard, slice")
        return [Waiting(r["request"], r["shard"], r["slice"], r["records"], r["membership"]) for r in rows]

    def merged(self, shard: int, slice_: int) -> list[Request]:
        """Return the corrections of a slice that are not erased everywhere yet, and don't wait for this slice any more."""
        rows = self._db.rows(
            "SELECT * FROM requests WHERE kind = 'correction' AND state = ? AND id IN"
            " (SELECT request FROM request_partitions WHERE shard = ? AND slice = ?) AND id NOT IN"
            " (SELECT request FROM waiting WHERE shard = ? AND slice = ?) ORDER BY number",
            (STATES[0], shard, slice_, shard, slice_),
        )
        return [self._request(row) for row in rows]

    def claim(self, key: bytes, body: bytes) -> bool:
        """Bind a submission's key to its body, both as digests; say whether it isn't bound to another one."""
        with self._db.transaction():
            self._db.rows("INSERT INTO submissions VALUES (?, ?, ?) ON CONFLICT DO NOTHING", (key, body, now()))
            row = self._db.row("SELECT body FROM submissions WHERE key = ?", (key,))
            return row is not None and bytes(row["body"]) == body

    def unclaim(self, key: bytes) -> None:
        """Let a submission's key go."""
        with self._db.transaction():
            self._db.rows("DELETE FROM submissions WHERE key = ?", (key,))

    def _is_key(self, key_check: str) -> bool:
        row = self._db.row("SELECT value FROM facts WHERE name = 'exclusion_key'")
        return row is not None and row["value"] == key_check

    def _check_generations(self, known: int | None) -> None:
        """Who was looked up before a generation came may have rows in it."""
        if known is not None and known != Generations(self._db).count():
            raise StaleError("rows were added while ids were looked up", hint="Run the command again.")

    def _in_order(self, identifiers: Collection[str]) -> tuple[Request, ...]:
        found = (self._db.row("SELECT * FROM requests WHERE id = ?", (identifier,)) for identifier in identifiers)
        rows = sorted((row for row in found if row is not None), key=lambda row: int(row["number"]))
        return tuple(self._request(row) for row in rows)

    def _insert(self, identifier: str, targets: Sequence[Target], *, reason: str, kind: str = "deletion") -> None:
        places = sorted({place for target in targets for place in target.places})
        digests = {("record", digest) for target in targets for digest in target.record_digests}
        records = len(digests) if kind == "deletion" else len(targets)
        digests |= {(target.kind, target.digest) for target in targets}
        owners = {digest for target in targets for digest in target.owner_digests}
        fresh = digests - self.excluded_by(digests).keys()
        version_before = self._versions.live_number()
        self._db.rows(
            "INSERT INTO requests"
            " (number, id, kind, created_at, updated_at, state, reason, subjects, records, version_before)"
            " VALUES (?, ?, ?, ?, ?, 'accepted', ?, ?, ?, ?)",
            (
                self._db.next_number("requests"),
                identifier,
                kind,
                now(),
                now(),
                reason,
                len(owners),
                records,
                version_before,
            ),
        )
        self._db.many("INSERT INTO request_partitions VALUES (?, ?, ?)", [(identifier, *place) for place in places])
        self._db.many(
            "INSERT INTO exclusions VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            [(about, digest, identifier) for about, digest in digests],
        )
        self._db.many("UPDATE partitions SET changes = changes + 1, dirty = 1 WHERE shard = ? AND slice = ?", places)
        tainted_from: dict[int, int] = {}
        for shard, slice_ in places:
            if not is_held_out(slice_):
                tainted_from[shard] = min(slice_, tainted_from.get(shard, slice_))
        self._db.many("UPDATE stages SET tainted = 1 WHERE shard = ? AND stage >= ?", list(tainted_from.items()))
        self._db.note(
            "request_accepted",
            what=kind,
            shards=sorted(tainted_from),
            subjects=len(owners),
            records=records,
            unseen=sum(target.unseen for target in targets),
            **_noted(identifier, fresh),
        )
        if tainted_from and version_before:  # before the first version nothing is in service
            number = self._versions.publish_fallback(tainted_from, request=identifier)
            self._db.rows("UPDATE requests SET version_quarantine = ? WHERE id = ?", (number, identifier))

    def get(self, identifier: str) -> Request:
        """Return one request.

        Raises:
            UserError: There is no such request.
        """
        row = self._db.row("SELECT * FROM requests WHERE id = ?", (identifier,))
        if row is None:
            raise UserError(f"request {identifier!r}: the store has no such request", hint="`sisa status` lists them.")
        return self._request(row)

    def all(self) -> list[Request]:
        """Return all requests, oldest first."""
        return [self._request(row) for row in self._db.rows("SELECT * FROM requests ORDER BY number")]

    def page(self, *, after: str | None, most: int) -> list[Request]:
        """Return the ``most`` requests that follow one, oldest first; None is before the first.

        Raises:
            UserError: There is no such request.
        """
        row = self._db.row("SELECT number FROM requests WHERE id = ?", (after,)) if after is not None else (0,)
        if row is None:
            raise UserError("there is no such request", hint="`sisa status` lists them.")
        rows = self._db.rows("SELECT * FROM requests WHERE number > ? ORDER BY number LIMIT ?", (row[0], most))
        return [self._request(row) for row in rows]

    def newest(self, most: int) -> list[Request]:
        """Return the newest requests, oldest first."""
        rows = self._db.rows("SELECT * FROM requests ORDER BY number DESC LIMIT ?", (most,))
        return [self._request(row) for row in reversed(rows)]

    def open(self) -> list[Request]:
        """Return the requests that have something left to do, oldest first."""
        rows = self._db.rows("SELECT * FROM requests WHERE state <> ? ORDER BY number", (STATES[-1],))
        return [self._request(row) for row in rows]

    def advance(
        self,
        identifier: str,
        state: str,
        *,
        version_after: int | None = None,
        stages_retrained: int | None = None,
        note: str | None = None,
    ) -> None:
        """Move a request forward; a state it has passed already changes nothing."""
        with self._db.transaction():
            request = self.get(identifier)
            if STATES.index(state) > STATES.index(request.state):
                self._db.rows("UPDATE requests SET state = ?, updated_at = ? WHERE id = ?", (state, now(), identifier))
                self._db.note("request_state", request=identifier, state=state)
            for column, value in [
                ("version_after", version_after), ("stages_retrained", stages_retrained), ("note", note)
            ]:  # fmt: skip
                if value is not None:
                    self._db.rows(f"UPDATE requests SET {column} = ? WHERE id = ?", (value, identifier))  # noqa: S608 - names are ours

    def measured(self, identifier: str, *, seconds_to_quarantine: float) -> None:
        """Write down how long the caller waited for the quarantine."""
        with self._db.transaction():
            self._db.rows(
                "UPDATE requests SET seconds_to_quarantine = ? WHERE id = ?", (seconds_to_quarantine, identifier)
            )

    def excluded_by(self, digests: Iterable[tuple[str, bytes]]) -> dict[tuple[str, bytes], str]:
        """Map those of ``digests`` that are excluded to the request that excluded them."""
        wanted = list(digests)
        with self._db.snapshot():
            if len(wanted) > 10_000:
                known = self.exclusions()
                return {pair: known[pair] for pair in wanted if pair in known}
            found = {}
            for kind, digest in wanted:
                row = self._db.row("SELECT request FROM exclusions WHERE kind = ? AND digest = ?", (kind, digest))
                if row is not None:
                    found[kind, digest] = str(row["request"])
            return found

    def exclusions(self) -> dict[tuple[str, bytes], str]:
        """Return every exclusion and the request that made it; read again only after a new request, or more of one."""
        with self._db.snapshot():
            row = self._db.row("SELECT coalesce(max(number), 0), coalesce(sum(records), 0) FROM requests")
            state = tuple(row) if row is not None else ()
            if self._known[0] != state:
                rows = self._db.rows("SELECT kind, digest, request FROM exclusions")
                self._known = (state, {(r["kind"], bytes(r["digest"])): str(r["request"]) for r in rows})
            return self._known[1]

    def _request(self, row: Row) -> Request:
        values = {name: row[name] for name in row.keys() if name != "number"}  # noqa: SIM118 - a Row iterates over values
        places = self._db.rows(
            "SELECT shard, slice FROM request_partitions WHERE request = ? ORDER BY 1, 2", (row["id"],)
        )
        return Request(**values, places=tuple((p["shard"], p["slice"]) for p in places))
