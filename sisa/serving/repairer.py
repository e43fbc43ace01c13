"""Repairs in the background, in a process of their own: a request that accepts a deletion never retrains."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading

from sisa.errors import SisaError
from sisa.layout import Layout
from sisa.serving.stores import ThreadStores

LOG = logging.getLogger("sisa.repairs")
RETRY_S = 30.0
LONGEST_RETRY_S = 600.0
"""After a repair that failed it is tried again, each time twice as late, or when somebody deletes."""
STOP_S = 20.0
"""How long a repair may take to stop when the server does."""


class Repairer:
    """Runs ``sisa repair`` whenever a deletion is open, one at a time; the store's own lock keeps others apart."""

    def __init__(
        self, layout: Layout, *, executor: str = "auto", address: str | None = None, look_every_s: float | None = None
    ) -> None:
        """Do nothing yet.

        Args:
            layout: Where the store is.
            executor: Where chains are trained, as ``sisa repair`` takes it.
            address: A running Ray cluster.
            look_every_s: How often to look for deletions that other processes accepted; by default one has to be told.
        """
        self._layout = layout
        self._words = ["--executor", executor, *(["--address", address] if address else [])]
        self._look_every_s = look_every_s
        self._wanted = threading.Event()
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = threading.Lock()
        """Held while a process is started or told to stop, so that none is started after that."""
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Go on with what is open."""
        self._stopping.clear()
        self._wanted.set()
        self._thread = threading.Thread(target=self._run, name="sisa-repairs", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """A deletion was accepted."""
        self._wanted.set()

    def stop(self) -> None:
        """Stop; a repair that runs is interrupted, and goes on with the next start."""
        with self._starting:
            self._stopping.set()
            process = self._process
        self._wanted.set()
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        stores = ThreadStores(self._layout)
        left: frozenset[str] = frozenset()
        while not self._stopping.is_set():
            told = self._wanted.wait(self._look_every_s)
            self._wanted.clear()
            due = self._open_requests(stores)
            if due and (told or not due <= left):
                pause_s = RETRY_S
                while not self._stopping.is_set() and not self._repair():
                    self._wanted.wait(pause_s)
                    self._wanted.clear()
                    pause_s = min(2 * pause_s, LONGEST_RETRY_S)
                left = due & self._open_requests(stores)  # a success leaves some: before the first training has ended

    def _open_requests(self, stores: ThreadStores) -> frozenset[str]:
        """Return the ids of what is open; a ledger that can't be read is worth a repair that says so."""
        try:
            return frozenset(request.id for request in stores.get().ledger.requests.open())
        except SisaError:
            return frozenset({"unknown"})

    def _repair(self) -> bool:
        command = [sys.executable, "-m", "sisa", "repair", "--store", self._layout.uri, "--json", *self._words]
        with self._starting:
            if self._stopping.is_set():
                return False
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
            except OSError as error:
                LOG.error("a repair can't be started: %s", error.strerror)  # noqa: TRY400 - its trace says no more
                return False
        code = self._process.wait()
        if code and not self._stopping.is_set():
            LOG.error("a repair ended with exit code %s: run `sisa repair` to see why", code)
        return code == 0
