"""How well each live version answers: measured on the holdout, in a thread beside the answers.

Training and repair measure what they publish. What they don't publish, a quarantine, is live all the same, for as long
as its repair is put off; so is what another process has repaired. It takes half of a core at most: a rest follows each
batch, as long as the batch took.
"""

from __future__ import annotations

import logging
import threading
import time

from sisa.ensemble.live import Answer
from sisa.errors import SisaError
from sisa.learners.columns import Columns
from sisa.serving.replica import NotServingError, Replica
from sisa.serving.stores import ThreadStores
from sisa.store.measure import measure

LOG = logging.getLogger("sisa.measurements")
LOOK_EVERY_S = 0.5
RETRY_S = 30.0
"""After damage, which somebody has to mend."""
STOP_S = 5.0


class _Stopped(Exception):
    """The server stops."""


class Measurer:
    """Measures each version that is live for long enough, with the constituents that the replica has loaded."""

    def __init__(self, stores: ThreadStores, replica: Replica, *, look_every_s: float = LOOK_EVERY_S) -> None:
        self._stores = stores
        self._replica = replica
        self._look_every_s = look_every_s
        self._seen = 0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look for versions that nobody has measured."""
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="sisa-measurements", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop, between two batches."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(STOP_S)
            self._thread = None

    def _run(self) -> None:
        pause_s = self._look_every_s
        while not self._stopping.wait(pause_s):
            pause_s = self._look_every_s
            try:
                self._look()
            except _Stopped:
                return
            except NotServingError:
                continue  # a version is being loaded, or the ledger can't be reached: the replica says so
            except Exception as error:  # noqa: BLE001 - whatever it is: answers don't depend on it; try again later
                told = error.message if isinstance(error, SisaError) else type(error).__name__
                LOG.error("the live version can't be measured: %s", told)  # noqa: TRY400 - a trace says no more
                pause_s = RETRY_S

    def _look(self) -> None:
        """Measure the live version, unless that was done."""
        store = self._stores.get()
        versions = store.ledger.versions
        number = versions.live_number()
        if number == self._seen or versions.is_measured(number):
            self._seen = number
            return
        found = measure(store, self._answer)
        if found is None:  # no holdout, or nobody to answer
            self._seen = number
        elif found.version:
            metrics = found.metrics
            versions.measured(
                found.version, accuracy=metrics.accuracy, log_loss=metrics.log_loss, records=metrics.records
            )

    def _answer(self, columns: Columns) -> Answer:
        started_s = time.monotonic()
        answer = self._replica.answer(columns, patience_s=0.0)
        if self._stopping.wait(time.monotonic() - started_s):
            raise _Stopped
        return answer
