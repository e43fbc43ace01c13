"""Cleaning up after an addition or a correction that was killed: its rows lie where nobody expects them.

A deletion sweeps too, before it says that rows are erased, since they may be the deleted person's. If an addition
is at work it is waited for: before it publishes it drops whoever was deleted meanwhile.
"""

from __future__ import annotations

from sisa.coordination import Held
from sisa.files import remove
from sisa.opening import OpenStore
from sisa.progress import Reporter
from sisa.records.grow import Place, sweep_generation


def next_place(store: OpenStore) -> Place:
    """Return where the next generation goes."""
    return Place(store.generations + 1, store.recipe.sisa.slices)


def sweep_incoming(store: OpenStore, reporter: Reporter) -> None:
    """Remove rows that never became part of the store; wait for who is writing some."""
    if store.layout.remote or not store.layout.incoming.exists():  # a bucket takes no additions yet
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
    with store.ledger.database.transaction():
        lock.check()
        _sweep(store)


def _sweep(store: OpenStore) -> None:
    if store.layout.incoming.exists():
        known = {request.id for request in store.ledger.requests.all()}
        if store.layout.corrections.is_dir():
            for folder in store.layout.corrections.iterdir():
                if folder.name not in known:
                    remove(folder)
        sweep_generation(store.layout, next_place(store), shards=store.shards)
