"""An open store for each thread: a ledger's connection belongs to the thread that opened it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from sisa.errors import StoreError, UserError
from sisa.layout import Layout
from sisa.opening import OpenStore, open_store


class ThreadStores:
    """Opens the store once in each thread that asks; closed when the thread ends."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._path = os.fspath(layout.ledger)
        self._local = threading.local()

    def get(self) -> OpenStore:
        """Return this thread's open store; opened again if the ledger was replaced: on the old file a write is lost.

        Raises:
            StoreError: It can't be opened.
        """
        opened: OpenStore | None = getattr(self._local, "opened", None)
        file = ledger_file(self._path)
        if opened is not None and self._local.file == file:
            return opened
        if opened is not None:
            opened.ledger.close()
            del self._local.opened
        try:
            opened = open_store(self.layout)
        except UserError as error:  # it was there when the server started: not the client's mistake
            raise StoreError("the store is gone", hint="The operator has to bring it back.") from error
        if ledger_file(self._path) != file:
            opened.ledger.close()
            raise StoreError("the store's ledger is being replaced", hint="Try again.")
        self._local.opened, self._local.file = opened, file
        return opened


def without_path(text: str, layout: Layout) -> str:
    """Return a message without where the store lies: what is answered and logged is for others too."""
    return text.replace(str(layout.root), "the store")


def ledger_file(path: str) -> tuple[int, int]:
    """Say which file the ledger's path names, for each request. It is not opened: closing it would drop SQLite's locks.

    Raises:
        StoreError: There is none.
    """
    try:
        found = os.stat(path)  # noqa: PTH116 - half the time
    except OSError as error:
        raise StoreError(f"the store's ledger ({Path(path).name}) can't be found: {error.strerror}") from error
    return found.st_dev, found.st_ino
