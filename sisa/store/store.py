"""One trained ensemble and everything that can be done with it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sisa import opening
from sisa.deletion.accept import Accepted, accept
from sisa.deletion.settle import settle, settle_all
from sisa.errors import DamagedError, StoreError, UserError
from sisa.ledger import STATES
from sisa.progress import Reporter, Silent
from sisa.remote import locate
from sisa.routing.ids import id_text
from sisa.store.results import Addition, Correction, Deletion, Metrics, Repaired, Training
from sisa.store.status import status

if TYPE_CHECKING:
    from uuid import UUID

    import numpy as np
    import numpy.typing as npt

    from sisa.deletion.repair import Repair
    from sisa.ensemble.live import LiveEnsemble
    from sisa.execution.options import Execution
    from sisa.ledger import Request
    from sisa.proof.verify import Replay, Verification

# What needs torch is imported where it is used: asking for the status, or deferring a repair, doesn't.


class Store:
    """An open store. Not for sharing between threads; open one per thread.

    Made by :func:`sisa.train` and :func:`sisa.open_store`.
    """

    training: Training | None = None
    """What the training that returned this object did."""

    def __init__(self, opened: opening.OpenStore) -> None:
        self.opened = opened
        self._live: LiveEnsemble | None = None

    def __repr__(self) -> str:
        return f"Store({self.opened.layout.uri!r}, version={self.version})"

    def close(self) -> None:
        """Close the ledger."""
        self.opened.close()

    @property
    def version(self) -> int:
        """Number of the live ensemble version; 0 before the first."""
        return self.opened.ledger.versions.live_number()

    @property
    def classes(self) -> list[bool | int | str]:
        """The classes, in the order of the scores."""
        return self.opened.classes

    def predict_proba(self, rows: Any) -> npt.NDArray[np.float64]:
        """Return scores (B, C) of the live ensemble, columns in the order of ``classes``.

        The live version is read for this call; a quarantine that is published while it is computed voids
        the result, and it is computed again.

        Args:
            rows: The features of B rows: a pyarrow Table or RecordBatch, a dict of columns, a pandas
                DataFrame, or (where every feature is numeric, or the only one a vector) a 2-D array.

        Raises:
            UserError: A feature is missing or of another type.
            NoConstituentError: No clean constituent is left.
            DamagedError: A stage that should answer is damaged.
        """
        from sisa.learners.columns import columns_from_table
        from sisa.records.features import feature_table

        columns = columns_from_table(feature_table(rows, self.opened.recipe), self.opened.recipe)
        return self.ensemble.answer(columns).scores_BC

    def predict(self, rows: Any) -> list[bool | int | str]:
        """Return the predicted class of each row; see :meth:`predict_proba`."""
        from sisa.ensemble.live import predicted_classes

        return predicted_classes(self.predict_proba(rows), self.classes)

    @property
    def ensemble(self) -> LiveEnsemble:
        """The live ensemble, with the constituents that this process has loaded."""
        if self._live is None:
            from sisa.ensemble.live import LiveEnsemble

            self._live = LiveEnsemble(self.opened)
        return self._live

    def add(
        self,
        source: str | Path,
        *,
        defer: bool = False,
        executor: str = "auto",
        address: str | None = None,
        workers: int | None = None,
        reporter: Reporter | None = None,
    ) -> Addition:
        """Add the rows of a table as a new generation: a new last slice of every shard, trained on top of the others.

        Nothing that was trained before changes. The same table again is recognised, and goes on where it stopped.

        Args:
            source: A table with the columns of the recipe, and record ids that are not in the store.
            defer: Add the rows now; ``train`` or :meth:`repair` trains on them.
            executor: ``auto``, ``ray`` or ``inline``.
            address: A running Ray cluster.
            workers: How many chains at a time.
            reporter: Who wants to know how far it is.

        Raises:
            UserError: The table can't be used, or brings nothing new; nothing was changed.
            StoreError: The store is busy or damaged, or a shard could not be trained; what was added stays added.
        """
        from sisa.store.grow import add

        execution = _execution(executor, address, workers)
        return add(self, str(source), defer=defer, execution=execution, reporter=reporter or Silent())

    def correct(
        self,
        source: str | Path,
        *,
        reason: str = "",
        defer: bool = False,
        executor: str = "auto",
        address: str | None = None,
        workers: int | None = None,
        reporter: Reporter | None = None,
    ) -> Correction:
        """Give rows that are in the store new content: what saw the old one is out of service at once, and retrained.

        What the rows said is remembered as a keyed digest, so that an old source can't bring it back.

        Args:
            source: A table with the columns of the recipe; the rows as they should be.
            reason: For the record; don't put personal data in it.
            defer: Stop after the rows are replaced; :meth:`repair` does the rest.
            executor: ``auto``, ``ray`` or ``inline``.
            address: A running Ray cluster.
            workers: How many chains at a time.
            reporter: Who wants to know how far it is.

        Raises:
            UserError: A row is unknown, deleted or somebody else's, or can't be used; nothing was changed.
            StoreError: The store is damaged, or the retraining failed; an accepted request stays accepted.
        """
        from sisa.store.correct import correct

        execution = _execution(executor, address, workers)
        return correct(
            self, str(source), reason=reason, defer=defer, execution=execution, reporter=reporter or Silent()
        )

    def delete(
        self,
        *,
        subjects: Iterable[str | int | UUID] = (),
        records: Iterable[str | int | UUID] = (),
        reason: str = "",
        defer: bool = False,
        ignore_missing: bool = False,
        executor: str = "auto",
        address: str | None = None,
        workers: int | None = None,
        reporter: Reporter | None = None,
    ) -> Deletion:
        """Delete people (or single records): quarantine at once, erase, purge, and retrain unless deferred.

        The promise is kept when the request is accepted, which is durable before anything else happens:
        a crash, or a repair that can't run, never brings anybody back.

        Args:
            subjects: Ids of people; everything they own goes.
            records: Ids of rows.
            reason: For the record; don't put personal data in it.
            defer: Stop after the erasure; :meth:`repair` does the rest.
            ignore_missing: Skip ids that the store doesn't know instead of refusing; if it knows none, nothing is done.
            executor: ``auto``, ``ray`` or ``inline``.
            address: A running Ray cluster.
            workers: How many chains at a time.
            reporter: Who wants to know how far it is.

        Raises:
            UnknownIdsError: An id is unknown; nothing was changed.
            StoreError: Erasure met damage, or the retraining failed; the request stays accepted.
        """
        started = time.monotonic()
        reporter = reporter or Silent()
        if isinstance(subjects, str | bytes) or isinstance(records, str | bytes):
            raise UserError("subjects and records: expected a list of ids, got a text", hint='Write subjects=["17"].')
        wanted_subjects = [id_text(i, where="subjects") for i in subjects]
        wanted_records = [id_text(i, where="records") for i in records]
        if not wanted_subjects and not wanted_records:
            raise UserError("nothing to delete: no id was given", hint="Give --subject, --record or --from.")
        execution = _execution(executor, address, workers)
        accepted = accept(
            self.opened,
            subjects=wanted_subjects,
            records=wanted_records,
            reason=reason,
            ignore_missing=ignore_missing,
        )
        if accepted is None:
            return self._nothing_to_delete(sorted({*wanted_subjects, *wanted_records}), started=started)
        asked = "asked for before, as" if accepted.repeated else "accepted as"
        reporter.note(f"{asked} {accepted.request.id}: no prediction uses these rows any more")
        self._settle(accepted, reporter)
        note = "" if defer else self.repair_after(accepted, execution, reporter)
        return self._deletion(accepted, note=note, started=started)

    def _settle(self, accepted: Accepted, reporter: Reporter) -> None:
        """Erase and purge for every request that the ids belong to.

        Raises:
            DamagedError: Rows can't be read, so that nobody's can be erased from them.
        """
        damaged: dict[int, DamagedError] = {}
        for request in accepted.requests:
            damaged |= settle(self.opened, request, reporter)
        damage = next(iter(damaged.values()), None)
        if damage is not None:
            raise DamagedError(
                f"{accepted.request.id} is accepted and no prediction uses what may have seen these rows, "
                f"but not all of them could be erased: {damage.message}",
                hint=damage.hint,
            )
        if accepted.repeated and accepted.damage is not None:
            raise DamagedError(
                f"{accepted.request.id} was carried out; but now nobody can tell whether these rows came back: "
                f"{accepted.damage.message}",
                hint=accepted.damage.hint,
            )

    def repair_after(self, accepted: Accepted, execution: Execution, reporter: Reporter) -> str:
        """Repair unless it is done already; return why it has to wait, if it has to."""
        ledger = self.opened.ledger
        waiting = [r for r in (ledger.requests.get(request.id) for request in accepted.requests) if r.open]
        if not waiting:
            return ""
        from sisa.store.footing import require_same
        from sisa.training.footing import footing_here

        try:
            require_same(self.opened, footing_here(self.opened.recipe))
        except UserError as error:  # a model's source that is gone or broken is another source too
            reporter.note(f"erased; not retrained: {error.message}")
            return f"{error.message}. {error.hint}"
        done = self._bring_up(None, execution, reporter, heal=False, answer_for=[k for r in waiting for k in r.shards])
        return "" if done.version else "The training has not ended; `sisa train` goes on without these rows."

    def _bring_up(
        self,
        shards: Iterable[int] | None,
        execution: Execution,
        reporter: Reporter,
        *,
        heal: bool,
        answer_for: Iterable[int] | None = None,
    ) -> Repair:
        """Repair, and raise what went wrong with the shards that the caller answers for (None: all)."""
        from sisa.deletion.repair import bring_up
        from sisa.store.footing import require_same
        from sisa.training.footing import footing_here

        here = footing_here(self.opened.recipe)
        require_same(self.opened, here)
        lock = self.opened.operation_lock()
        told: list[bool] = []

        def waiting() -> None:
            if not told:
                reporter.note("waiting for another operation on this store to end; the erasure is done")
                told.append(True)

        with lock.held(poll=waiting) as held:
            done = bring_up(
                self.opened,
                shards=shards,
                footing=here,
                execution=execution,
                reporter=reporter,
                cause="repair",
                heal=heal,
                read_reused=heal,
                held=held,
            )
        failures = {k: e for k, e in done.failures.items() if answer_for is None or k in set(answer_for)}
        if failures:
            shard, error = min(failures.items(), key=lambda item: item[0])
            raise type(error)(
                f"the retraining of shard {shard} failed: {error.message}; it stays at its last clean stage, "
                "and what was deleted stays deleted",
                hint=error.hint,
            )
        if done.version:
            self.refit()
        return done

    def refit(self) -> int:
        """Fit the parameters of the aggregation, if it has some, for the constituents that answer now.

        Returns:
            The number of the live version: a new one if parameters changed.

        Raises:
            UserError: The table that they are fitted on can't be used.
        """
        if isinstance(self.opened.recipe.sisa.aggregation, str):
            return self.version
        from sisa.store.refit import refit

        return refit(self.opened, self.ensemble)

    def _nothing_to_delete(self, missing: list[str], *, started: float) -> Deletion:
        version = self.version
        return Deletion(
            request="",
            state=STATES[-1],
            subjects=0,
            records=0,
            missing=missing,
            shards=[],
            stages_retrained=0,
            version_before=version,
            version_quarantine=None,
            version_after=version,
            seconds_to_quarantine=0.0,
            seconds=round(time.monotonic() - started, 3),
        )

    def _deletion(self, accepted: Accepted, *, note: str, started: float) -> Deletion:
        requests = [self.opened.ledger.requests.get(request.id) for request in accepted.requests]
        request = requests[0]
        state = min((r.state for r in requests), key=STATES.index)
        return Deletion(
            request=request.id,
            state=state,
            subjects=request.subjects,
            records=request.records,
            missing=accepted.missing,
            shards=request.shards,
            stages_retrained=request.stages_retrained,
            version_before=request.version_before,
            version_quarantine=request.version_quarantine,
            version_after=max(r.version_after or 0 for r in requests) if state == STATES[-1] else None,
            seconds_to_quarantine=round(request.seconds_to_quarantine, 4),
            seconds=round(time.monotonic() - started, 3),
            repeated=accepted.repeated,
            requests=[r.id for r in requests],
            note=note,
        )

    def repair(
        self,
        *,
        executor: str = "auto",
        address: str | None = None,
        workers: int | None = None,
        reporter: Reporter | None = None,
    ) -> Repaired:
        """Finish every open request, heal damaged or missing stages, and publish the result.

        Raises:
            FootingError: Code or platform changed since the training; erasure is finished all the same.
            StoreError: A shard could not be retrained, or rows are damaged; what could be done is done.
        """
        started = time.monotonic()
        reporter = reporter or Silent()
        ledger = self.opened.ledger
        execution = _execution(executor, address, workers)
        if not ledger.ingested:
            raise StoreError("the store holds no records yet: its ingest has not ended", hint="Run `sisa train`.")
        settle_all(self.opened, reporter)  # even if nothing may be trained here; damage is told below
        execution.check()
        before = ledger.versions.live_number()
        done = self._bring_up(range(self.opened.shards), execution, reporter, heal=True)
        if done.damaged_rows is not None:
            raise done.damaged_rows
        if done.version != before:
            self.measure()
        closed = [ledger.requests.get(identifier) for identifier in done.requests]
        touched = {row.shard for row in done.trained} | {shard for request in closed for shard in request.shards}
        return Repaired(
            requests=done.requests,
            request=done.requests[0] if done.requests else "",
            state="repaired",
            subjects=sum(r.subjects for r in closed),
            records=sum(r.records for r in closed),
            shards=sorted(touched),
            stages_retrained=len(done.trained),
            version_before=before,
            version_quarantine=max((r.version_quarantine or 0 for r in closed), default=0) or None,
            version_after=self.version,
            seconds_to_quarantine=max((r.seconds_to_quarantine for r in closed), default=0.0),
            seconds=round(time.monotonic() - started, 3),
        )

    def verify(
        self,
        *,
        replay: Replay = "none",
        executor: str = "auto",
        address: str | None = None,
        workers: int | None = None,
        reporter: Reporter | None = None,
    ) -> Verification:
        """Check the store without trusting it; see :func:`sisa.proof.verify`.

        Args:
            replay: ``none``, ``all``, or how many constituents to retrain from nothing.
            executor: ``auto``, ``ray`` or ``inline``.
            address: A running Ray cluster.
            workers: How many chains at a time.
            reporter: Who wants to know how far it is.

        Raises:
            BusyError: Another operation holds the store, or changed it meanwhile.
        """
        if replay not in {"none", "all"} and not (isinstance(replay, int) and replay > 0):
            raise UserError(f"replay: expected none, all or a number of constituents, got {replay!r}")
        from sisa.proof.verify import verify

        execution = _execution(executor, address, workers)
        execution.check()
        with self.opened.operation_lock().held(timeout_s=0):
            return verify(self.opened, replay=replay, execution=execution, reporter=reporter or Silent())

    def measure(self) -> Metrics | None:
        """Measure the live ensemble on the holdout; None without a holdout or without an ensemble.

        What was measured is kept with the version.
        """
        from sisa.store.measure import measure

        found = measure(self.opened, self.ensemble.answer)
        if found is None:
            return None
        if found.version:
            self.opened.ledger.versions.measured(
                found.version,
                accuracy=found.metrics.accuracy,
                log_loss=found.metrics.log_loss,
                records=found.metrics.records,
            )
        return found.metrics

    def request(self, identifier: str) -> Request:
        """Return one deletion request.

        Raises:
            UserError: There is no such request.
        """
        return self.opened.ledger.requests.get(identifier)

    def status(self) -> dict[str, Any]:
        """Return what ``sisa status --json`` prints."""
        return status(self.opened)


def open_store(uri: str | Path) -> Store:
    """Open the store at ``uri``.

    Raises:
        UserError: There is no store.
        DamagedError: A part of it is missing or unreadable.
    """
    return Store(opening.open_store(locate(uri)))


def _execution(executor: str, address: str | None, workers: int | None) -> Execution:
    from sisa.execution.options import Execution

    if executor not in {"auto", "ray", "inline"}:
        raise UserError(f"executor: expected auto, ray or inline, got {executor!r}")
    return Execution(executor=executor, address=address, workers=workers)  # type: ignore[arg-type]
