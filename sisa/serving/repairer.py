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
"""After a repair that failed."""
STOP_S = 20.0
"""How long a repair may take to stop when the server does."""


class Repairer:
    """Runs ``sisa repair`` whenever a deletion is open, one at a time; the store's own lock keeps others apart."""

    def __init__(self, layout: Layout, *, executor: str = "auto", address: str | None = None) -> None:
        self._layout = layout
        self._words = ["--executor", executor, *(["--address", address] if address else [])]
        self._wanted = threading.Event()
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="sisa-repairs", daemon=True)

    def start(self) -> None:
        """Go on with what is open."""
        self._wanted.set()
        self._thread.start()

    def wake(self) -> None:
        """A deletion was accepted."""
        self._wanted.set()

    def stop(self) -> None:
        """Stop; a repair that runs is interrupted, and goes on with the next start."""
        self._stopping.set()
        self._wanted.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
        self._thread.join()

    def _run(self) -> None:
        stores = ThreadStores(self._layout)
        while not self._stopping.is_set():
            self._wanted.wait()
            self._wanted.clear()
            try:
                is_due = bool(stores.get().ledger.requests.open())
            except SisaError:
                is_due = True
            while is_due and not self._stopping.is_set() and not self._repair():
                self._stopping.wait(RETRY_S)

    def _repair(self) -> bool:
        command = [sys.executable, "-m", "sisa", "repair", "--store", str(self._layout.root), "--json", *self._words]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        code = self._process.wait()
        if code and not self._stopping.is_set():
            LOG.error("a repair ended with exit code %s: run `sisa repair` to see why", code)
        return code == 0
