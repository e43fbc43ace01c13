"""One process that answers: a lease on the live version, and the constituents of that version, loaded.

Two threads read the ledger. One renews the lease, some fifty times a second, and raises the floor below which
nothing may be answered; it never waits for anything else, so that loading a large stage doesn't cost the lease.
The other loads what a new version needs and swaps it in by rebinding one name. An answer is computed from what was
bound when it began, and is given only if floor and lease still allow it when it is done: a quarantine that came
in between makes it void, and it is computed again.

Invariants:

* Floor, lease and era are one immutable object, replaced by one assignment: nobody sees the floor of one reading
  with the lease of another.
* The floor is raised before it is confirmed, and the lease is let go before the replica is registered anew or
  struck off by itself.
* A lease counts only if the ledger's place still named the ledger that was read, after it was read. Another one, a
  connection that was lost, or a history that went back, begins a new era: what was loaded before answers no more.

What would void them: a clock that stands still while others go on, as in a virtual machine that is paused and
resumed without its clock being set right.
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import threading
import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace

from sisa.clock import elapsed_s
from sisa.ensemble.live import Answer, LiveEnsemble, Loaded
from sisa.errors import BusyError, DamagedError, LostError, NoConstituentError, SisaError, StoreError
from sisa.layout import Layout
from sisa.learners.columns import Columns
from sisa.learners.flags import FLAGS, FlagsTakenError
from sisa.ledger import HELD, View
from sisa.opening import OpenStore, open_store
from sisa.serving.stores import without_path

LOG = logging.getLogger("sisa.replica")
LEASE_S = 2.0
POLL_S = 0.02
PATIENCE_S = 10.0
"""How long an answer waits for a version that is being loaded, or for a lease."""
TRIES = 100
RETRY_S = 0.5
"""After something failed that takes more than a reading to try again."""
STOP_S = 5.0
"""How long the threads may take to stop; after that, deletions wait out this replica's lease."""
BUSY_S = 0.5
"""How long a reading waits for a locked ledger before it says so."""


class NotServingError(StoreError):
    """This replica may not answer now; another one may, or this one a moment later."""


@dataclass(frozen=True)
class Standing:
    """What a replica could say about itself at one moment."""

    version: int
    """It answers from this version; 0 if from none."""
    floor: int
    lease_left_s: float
    """Negative if it has run out."""
    trouble: str
    """Why it doesn't answer; empty if it does."""


@dataclass(frozen=True)
class _Lease:
    """What one reading of the ledger allows."""

    version: int = 0
    """The live version."""
    floor: int = 0
    until_s: float = -math.inf
    era: int = 0
    """Which history the numbers belong to."""


@dataclass(frozen=True)
class _Bound:
    """What answers are computed from."""

    loaded: Loaded
    era: int


class Replica:
    """Answers from the live version of one store, in this process."""

    def __init__(self, layout: Layout, *, lease_s: float = LEASE_S, poll_s: float = POLL_S) -> None:
        self.id = _new_id()
        self.lease_s = lease_s
        self._layout = layout
        self._poll_s = poll_s
        self._lease = _Lease()
        self._bound: _Bound | None = None
        self._lease_trouble = ""
        self._load_trouble = ""
        self._stopping = threading.Event()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Register, and begin to load; returns at once.

        Raises:
            NotServingError: It runs already, or has not stopped yet.
        """
        if self._threads:
            raise NotServingError("the replica runs already")
        self.id = _new_id()  # two processes that were forked from one object are two replicas
        self._stopping.clear()
        for work in (self._keep_lease, self._keep_loaded):
            thread = threading.Thread(target=work, name=f"sisa-{work.__name__.strip('_')}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Stop answering, and strike the replica off: nobody waits for it any more."""
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(STOP_S)
        self._threads = [thread for thread in self._threads if thread.is_alive()]

    @property
    def standing(self) -> Standing:
        """What the replica is up to."""
        bound, lease = self._bound, self._lease
        left_s = lease.until_s - elapsed_s()
        version = bound.loaded.version if bound is not None else 0
        return Standing(version, lease.floor, left_s, self._trouble(bound, lease, left_s))

    def _trouble(self, bound: _Bound | None, lease: _Lease, left_s: float) -> str:
        if self._stopping.is_set() or not self._threads:
            return "the replica is stopping" if self._threads else "the replica does not run"
        if left_s <= 0:
            begun = "it has no lease" if math.isinf(left_s) else "its lease has run out"
            return f"{begun}: {self._lease_trouble or 'it is waiting for the ledger'}"
        if bound is None or bound.era != lease.era or bound.loaded.version < lease.floor:
            return self._load_trouble or f"version {lease.version} is being loaded"
        return bound.loaded.nobody_because.message if bound.loaded.nobody_because is not None else ""

    def answer(self, columns: Columns, *, patience_s: float = PATIENCE_S) -> Answer:
        """Return scores for a batch of rows, all from one version that nobody has taken back.

        Raises:
            NotServingError: There is no lease, or nothing loaded, within ``patience_s``.
            NoConstituentError: No clean constituent is left.
        """
        deadline_s = elapsed_s() + patience_s
        for _ in range(TRIES):
            answer = self._answer_from(self._serving(deadline_s), columns)
            if answer is not None:
                return answer
        raise NotServingError(f"the ensemble changed {TRIES} times while an answer was computed", hint="Try again.")

    def answer_now(self, columns: Columns) -> Answer | None:
        """Answer without waiting for anything; None if that isn't possible at this moment.

        Raises:
            NoConstituentError: No clean constituent is left.
        """
        bound = self._bound
        if bound is None or not self._may_answer(bound):
            return None
        try:
            with FLAGS.without_waiting():
                return self._answer_from(bound, columns)
        except FlagsTakenError:  # a large batch is being answered, or a stage loaded
            return None

    def _answer_from(self, bound: _Bound, columns: Columns) -> Answer | None:
        """Return the answer, or None if it was taken back while it was computed."""
        try:
            answer = bound.loaded.answer(columns)
        except NoConstituentError:
            if self._may_answer(bound):
                raise
            return None
        return answer if self._may_answer(bound) else None

    def _may_answer(self, bound: _Bound | None) -> bool:
        lease = self._lease
        return (
            bound is not None
            and bound.era == lease.era
            and bound.loaded.version >= lease.floor
            and elapsed_s() < lease.until_s
            and not self._stopping.is_set()
        )

    def _serving(self, deadline_s: float) -> _Bound:
        bound = self._bound
        if bound is not None and self._may_answer(bound):
            return bound
        with self._changed:
            while not self._may_answer(bound := self._bound):
                left_s = deadline_s - elapsed_s()
                if left_s <= 0 or self._stopping.is_set():
                    trouble = self.standing.trouble or "its ensemble has just changed"
                    raise NotServingError(f"this replica doesn't answer: {trouble}", hint="Try again, or ask another.")
                self._changed.wait(min(left_s, self._poll_s))
        assert bound is not None
        return bound

    # --- the lease ---

    def _keep_lease(self) -> None:
        ledger: _Watched | None = None
        while not self._stopping.is_set():
            try:
                if ledger is None:
                    self._let_go()
                    ledger = _Watched.opened(self._layout)
                    self._hold(_Lease(era=self._lease.era + 1))
                self._renew(ledger)
                self._lease_trouble = ""
            except BusyError:
                self._lease_trouble = "the store's ledger is locked by another process"
            except Exception as error:  # noqa: BLE001 - whatever it is: go on refusing, and try again
                self._lease_trouble = self._told(error, before=self._lease_trouble)
                if ledger is not None and (
                    isinstance(error, DamagedError | LostError) or not isinstance(error, SisaError)
                ):
                    ledger.close()
                    ledger = None
            self._stopping.wait(self._poll_s if ledger is not None else RETRY_S)
        self._let_go()
        if ledger is not None:
            with contextlib.suppress(SisaError):
                ledger.store.ledger.replicas.leave(self.id)
            ledger.close()

    def _renew(self, ledger: _Watched) -> None:
        replicas = ledger.store.ledger.replicas
        started_s = elapsed_s()
        view = replicas.view(self.id)
        if view.confirmed is None:
            self._let_go()
            started_s = elapsed_s()
            view = replicas.register(self.id, lease_s=self.lease_s)
        ledger.check_place()
        self._take_in(view, until_s=started_s + HELD * self.lease_s if view.renews else None)
        if not view.renews:
            replicas.confirm(self.id, view.floor)

    def _take_in(self, view: View, *, until_s: float | None) -> None:
        """Answer from nothing older than the floor from here on, and have the live version loaded.

        Args:
            view: What the ledger says.
            until_s: End of the lease that this reading gives; None if it gives none.
        """
        before = self._lease
        went_back = view.version < before.version or view.floor < before.floor
        lease = _Lease(
            view.version,
            view.floor,
            before.until_s if until_s is None else until_s,
            before.era + 1 if went_back else before.era,
        )
        self._hold(lease)

    def _let_go(self) -> None:
        self._hold(replace(self._lease, until_s=-math.inf))

    def _hold(self, lease: _Lease) -> None:
        before, self._lease = self._lease, lease
        if replace(before, until_s=0.0) != replace(lease, until_s=0.0) or before.until_s < elapsed_s():
            with self._changed:
                self._changed.notify_all()

    # --- what is loaded ---

    def _keep_loaded(self) -> None:
        ensemble: LiveEnsemble | None = None
        era = 0
        while not self._stopping.is_set():
            try:
                if ensemble is None or era != self._lease.era:
                    _close(ensemble)
                    ensemble, era = None, self._lease.era
                    ensemble = self._opened_ensemble() if era else None
                if ensemble is not None:
                    self._load(ensemble, era)
                self._load_trouble = ""
            except Exception as error:  # noqa: BLE001 - whatever it is: go on refusing, and try again
                self._load_trouble = self._told(error, before=self._load_trouble)
                _close(ensemble)
                ensemble = None
                self._stopping.wait(RETRY_S)
            with self._changed:
                if not self._stopping.is_set() and (not self._lease.era or self._up_to_date()):
                    self._changed.wait(self._poll_s)
        _close(ensemble)

    def _opened_ensemble(self) -> LiveEnsemble:
        store = open_store(self._layout)
        with _closed_on_failure(store):
            return LiveEnsemble(store)

    def _up_to_date(self) -> bool:
        """Whether what is loaded is live, or newer than what the other thread has read."""
        bound, lease = self._bound, self._lease
        return bound is not None and bound.era == lease.era and bound.loaded.version >= lease.version

    def _load(self, ensemble: LiveEnsemble, era: int) -> None:
        if self._up_to_date():
            return
        loaded = ensemble.load()
        if loaded.panel is not None:
            loaded.panel.prepare()  # here, so that no answer waits for it
        with self._changed:
            self._bound = _Bound(loaded, era)
            self._changed.notify_all()

    def _told(self, error: Exception, *, before: str) -> str:
        """Return what to say about an error. It is logged when it is news, and an unforeseen one with its trace."""
        if isinstance(error, SisaError):
            text, trace = without_path(error.message, self._layout), None
        else:
            text, trace = f"unexpected {type(error).__name__}", error
        if text != before:
            LOG.error("%s", text, exc_info=trace)
        return text


@dataclass(frozen=True)
class _Watched:
    """An open store, and which one its ledger is."""

    store: OpenStore
    identity: Hashable

    @classmethod
    def opened(cls, layout: Layout) -> _Watched:
        """Open the store.

        Raises:
            SisaError: It can't be opened now.
        """
        store = open_store(layout)
        with _closed_on_failure(store):
            store.ledger.database.be_patient(BUSY_S)
            watched = cls(store, store.ledger.database.opened_as)
            watched.check_place()
            return watched

    def check_place(self) -> None:
        """Make sure that deletions would be written to the ledger that is read here.

        Raises:
            StoreError: There is no ledger. The one that is open may come back.
            DamagedError: Another one is in its place.
        """
        if self.store.ledger.database.identity() != self.identity:
            raise DamagedError("the store's ledger was replaced")

    def close(self) -> None:
        """Close it."""
        self.store.close()


@contextlib.contextmanager
def _closed_on_failure(store: OpenStore) -> Iterator[None]:
    try:
        yield
    except BaseException:
        store.close()
        raise


def _close(ensemble: LiveEnsemble | None) -> None:
    if ensemble is not None:
        ensemble.close()


def _new_id() -> str:
    return f"r-{secrets.token_hex(6)}"


def wait_until_serving(replica: Replica, *, timeout_s: float) -> None:
    """Wait until a replica answers.

    Raises:
        NotServingError: It doesn't within ``timeout_s``.
    """
    deadline_s = elapsed_s() + timeout_s
    while replica.standing.trouble:
        if elapsed_s() > deadline_s:
            raise NotServingError(f"the replica doesn't answer: {replica.standing.trouble}")
        time.sleep(0.01)
