"""Cleaning up after an addition or a correction that was killed: its rows lie where nobody expects them.

Who writes such rows puts a mark of its own first, under the lock of what is incoming, and takes it away last. A deletion sweeps too,
before it says that rows are erased, since they may be the deleted person's. If an addition is at work it is waited for:
before it publishes it drops whoever was deleted meanwhile. Whoever is accepted after the mark was put finds it; whoever
was accepted before is known to the addition.
"""

from __future__ import annotations

import contextlib
import secrets

from sisa.coordination import Held
from sisa.layout import CORRECTIONS_KEY, INCOMING_KEY, RECORDS_KEY
from sisa.opening import OpenStore
from sisa.progress import Reporter
from sisa.records.grow import Place, sweep_generation


def next_place(store: OpenStore) -> Place:
    """Return where the next generation goes."""
    return Place(store.generations + 1, store.recipe.sisa.slices)


def begin_incoming(store: OpenStore) -> str:
    """Put a mark, and return it; the lock of what is incoming is held. Look only then who was deleted."""
    mark = f"{INCOMING_KEY}/{secrets.token_hex(8)}"  # of its own: who lost the lock takes nobody else's away
    store.layout.storage.put(mark, b"")
    return mark


def end_incoming(store: OpenStore, *marks: str) -> None:
    """Take marks away: what was written is part of the store, or is gone."""
    for mark in marks:
        store.layout.storage.remove(mark)
    with contextlib.suppress(OSError):  # it is gone, or somebody else is at work
        store.layout.incoming.rmdir()


def is_incoming(store: OpenStore) -> bool:
    """Say whether somebody is writing rows that nobody expects yet, or was killed in that."""
    return store.layout.incoming.exists() or bool(store.layout.storage.keys(INCOMING_KEY))


def sweep_incoming(store: OpenStore, reporter: Reporter, *, thorough: bool = False) -> None:
    """Remove rows that never became part of the store; wait for who is writing some.

    Args:
        store: The store.
        reporter: Who wants to know.
        thorough: Look for rows even without a mark: a writer that had lost its lock may have left them.
    """
    if not thorough and not is_incoming(store):
        return
    told: list[bool] = []

    def waiting() -> None:
        if not told:
            reporter.note("waiting for rows that are being added: deleted people's are left out of them")
            told.append(True)

    with store.incoming_lock().held(poll=waiting) as lock:
        sweep_held(store, lock)


def sweep_held(store: OpenStore, lock: Held) -> None:
    """Remove rows that never became part of the store.

    Args:
        store: The store.
        lock: Of what is incoming.

    What is part of it is asked in a turn to write: a commit that is on its way, of somebody who was killed while it
    waited for a standby, has taken effect by then, and nobody who lost the lock commits meanwhile.

    Raises:
        LostLockError: Somebody else may be writing there by now.
    """
    storage = store.layout.storage
    marks, records, corrections = (storage.there(key) for key in (INCOMING_KEY, RECORDS_KEY, CORRECTIONS_KEY))
    with store.ledger.database.transaction():
        lock.check()
        known = {request.id for request in store.ledger.requests.all()}
        for name in sorted({key.split("/")[1] for key in corrections} - known):
            storage.remove_all(f"{CORRECTIONS_KEY}/{name}")
            storage.sweep_beside(f"{CORRECTIONS_KEY}/{name}")
        sweep_generation(store.layout, next_place(store), shards=store.shards, there=records)
    end_incoming(store, *marks)
