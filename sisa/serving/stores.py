"""An open store for each thread: a ledger's connection belongs to the thread that opened it."""

from __future__ import annotations

import threading

from sisa.errors import StoreError, UserError
from sisa.layout import Layout
from sisa.opening import OpenStore, open_store


class ThreadStores:
    """Opens the store once in each thread that asks; closed when the thread ends."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._local = threading.local()

    def get(self) -> OpenStore:
        """Return this thread's open store; opened again if the ledger was replaced: on the old file a write is lost.

        Raises:
            StoreError: It can't be opened.
        """
        opened: OpenStore | None = getattr(self._local, "opened", None)
        if opened is not None and not opened.ledger.database.stale():
            return opened
        if opened is not None:
            opened.close()
            del self._local.opened
        try:
            opened = open_store(self.layout)
        except UserError as error:  # it was there when the server started: not the client's mistake
            raise StoreError("the store is gone", hint="The operator has to bring it back.") from error
        self._local.opened = opened
        return opened


def without_path(text: str, layout: Layout) -> str:
    """Return a message without where the store lies: what is answered and logged is for others too."""
    for place in filter(None, (layout.remote, str(layout.root))):
        text = text.replace(place, "the store")
    return text
