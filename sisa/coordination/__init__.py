"""Locks and stop marks of one store: files on one machine, or a PostgreSQL server for many."""

from pathlib import Path

from sisa.coordination.protocol import Coordination, Held, HeldElsewhere, Lock, Marks
from sisa.layout import Layout
from sisa.ledger.place import Place

__all__ = ["Coordination", "Held", "HeldElsewhere", "Lock", "Marks", "coordination_at"]


def coordination_at(layout: Layout, place: Place) -> Coordination:
    """Return how a store's processes keep out of each other's way: where its ledger lies, its locks lie too.

    Args:
        layout: The store.
        place: Of its ledger.
    """
    if isinstance(place, Path):
        from sisa.coordination.files import FileCoordination

        return FileCoordination(layout)
    from sisa.coordination.postgres import PostgresCoordination

    return PostgresCoordination(place)
