"""One trained ensemble and everything that can be done with it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sisa import opening
from sisa.deletion import accept, bring_up, settle
from sisa.ensemble.live import LiveEnsemble, predicted_classes
from sisa.errors import FootingError, NoConstituentError, UserError
from sisa.execution import Execution
from sisa.layout import HOLDOUT_SLICE, Layout
from sisa.learners.columns import Columns, columns_from_table
from sisa.ledger import Request
from sisa.progress import Reporter, Silent
from sisa.proof import Verification, verify
from sisa.proof.verify import Replay
from sisa.records.features import feature_table
from sisa.records.partition import present_ids, read_partition
from sisa.routing.keys import shard_keys
from sisa.store.footing import footing_here, require_same
from sisa.store.results import Deletion, Metrics, Repaired

if TYPE_CHECKING:
    from sisa.store.results import Training


class Store:
    """An open store. Not for sharing between threads; open one per thread.

    Made by :func:`sisa.train` and :func:`sisa.open_store`.
    """

    training: Training | None = None
    """What the training that returned this object did."""

    def __init__(self, opened: opening.OpenStore) -> None:
        self.opened = opened
        self._ensemble = LiveEnsemble(opened)

    def __repr__(self) -> str:
        return f"Store({str(self.opened.layout.root)!r}, version={self.version})"

    def close(self) -> None:
        """Close the ledger."""
        self.opened.ledger.close()

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
        columns = self._columns(rows)
        answer = self._ensemble.answer(columns)
        return answer.scores_BC

    def predict(self, rows: Any) -> list[bool | int | str]:
        """Return the predicted class of each row; see :meth:`predict_proba`."""
        return predicted_classes(self.predict_proba(rows), self.classes)

    def _columns(self, rows: Any) -> Columns:
        table = feature_table(rows, self.opened.recipe)
        return columns_from_table(table, self.opened.recipe)

    def delete(
        self,
        *,
        subjects: Iterable[str | int] = (),
        records: Iterable[str | int] = (),
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
            ignore_missing: Skip ids that the store doesn't know instead of refusing.
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
        wanted_subjects, wanted_records = [str(i) for i in subjects], [str(i) for i in records]
        if not wanted_subjects and not wanted_records:
            raise UserError("nothing to delete: no id was given", hint="Give --subject, --record or --from.")
        execution = Execution(executor=executor, address=address, workers=workers)  # type: ignore[arg-type]
        accepted = accept(
            self.opened,
            subjects=wanted_subjects,
            records=wanted_records,
            reason=reason,
            ignore_missing=ignore_missing,
        )
        if accepted is None:
            raise UserError(
                f"nothing to delete: none of {len(set(wanted_subjects) | set(wanted_records))} ids is in the store",
                hint="Nothing was changed; check the ids.",
            )
        reporter.note(f"accepted as {accepted.request.id}: no prediction uses these rows any more")
        settle(self.opened, accepted.request, reporter)
        note = "" if defer else self._repair_after(accepted.request.id, execution, reporter)
        return self._deletion(
            accepted.request.id, accepted.missing, repeated=accepted.repeated, note=note, started=started
        )

    def _repair_after(self, request: str, execution: Execution, reporter: Reporter) -> str:
        """Repair unless it is done already; return why it has to wait, if it has to."""
        if not self.opened.ledger.requests.get(request).open:
            return ""
        here = footing_here(self.opened)
        try:
            require_same(self.opened, here)
        except FootingError as error:
            reporter.note(f"erased; not retrained: {error.message}")
            return f"{error.message}. {error.hint}"
        self._bring_up(None, execution, reporter, heal=False)
        return ""

    def _bring_up(self, shards: Iterable[int] | None, execution: Execution, reporter: Reporter, *, heal: bool) -> Any:
        here = footing_here(self.opened)
        require_same(self.opened, here)
        lock = self.opened.operation_lock()
        told: list[bool] = []

        def waiting() -> None:
            if not told:
                reporter.note("waiting for another operation on this store to end; the erasure is done")
                told.append(True)

        with lock.held(poll=waiting):
            done = bring_up(
                self.opened,
                shards=shards,
                code=here.code,
                platform=here.platform,
                execution=execution,
                reporter=reporter,
                cause="repair",
                heal=heal,
                read_reused=heal,
            )
        if done.failures:
            shard, error = min(done.failures.items(), key=lambda item: item[0])
            raise type(error)(
                f"the retraining of shard {shard} failed: {error.message}; it stays at its last clean stage, "
                "and what was deleted stays deleted",
                hint=error.hint,
            )
        return done

    def _deletion(self, identifier: str, missing: list[str], *, repeated: bool, note: str, started: float) -> Deletion:
        request = self.opened.ledger.requests.get(identifier)
        return Deletion(
            request=request.id,
            state=request.state,
            subjects=request.subjects,
            records=request.records,
            missing=missing,
            shards=request.shards,
            stages_retrained=request.stages_retrained,
            version_before=request.version_before,
            version_quarantine=request.version_quarantine,
            version_after=request.version_after,
            seconds_to_quarantine=round(request.seconds_to_quarantine, 4),
            seconds=round(time.monotonic() - started, 3),
            repeated=repeated,
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
            StoreError: A shard could not be retrained.
        """
        started = time.monotonic()
        reporter = reporter or Silent()
        ledger = self.opened.ledger
        for request in ledger.requests.open():
            settle(self.opened, request, reporter)
        before = ledger.versions.live_number()
        execution = Execution(executor=executor, address=address, workers=workers)  # type: ignore[arg-type]
        done = self._bring_up(range(self.opened.shards), execution, reporter, heal=True)
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
            version_after=done.version,
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
        execution = Execution(executor=executor, address=address, workers=workers)  # type: ignore[arg-type]
        with self.opened.operation_lock().held(timeout_s=0):
            return verify(self.opened, replay=replay, execution=execution, reporter=reporter or Silent())

    def measure(self) -> Metrics | None:
        """Measure the live ensemble on the holdout; None without a holdout or without an ensemble."""
        correct, loss, count, voters = 0, 0.0, 0, 0
        for columns in self._holdout():
            try:
                answer = self._ensemble.answer(columns)
            except NoConstituentError:
                return None
            rows_B = np.arange(len(columns.labels_N))
            correct += int((answer.scores_BC.argmax(axis=1) == columns.labels_N).sum())
            loss -= float(np.log(np.clip(answer.scores_BC[rows_B, columns.labels_N], 1e-12, None)).sum())
            count, voters = count + len(rows_B), answer.voters
        return Metrics(correct / count, loss / count, count, voters) if count else None

    def _holdout(self) -> Iterable[Columns]:
        opened = self.opened
        for partition in opened.ledger.partitions.all():
            if partition.slice == HOLDOUT_SLICE and partition.records:
                keys = shard_keys(opened.keys.routing, partition.shard)
                rows = read_partition(opened.layout, opened.recipe, keys, partition.shard, HOLDOUT_SLICE)
                if len(rows.table):
                    yield columns_from_table(rows.table, opened.recipe)

    def count_subjects(self) -> int:
        """Count the people whose rows may be trained on."""
        total = 0
        for partition in self.opened.ledger.partitions.all():
            if partition.slice != HOLDOUT_SLICE and partition.records:
                total += len(present_ids(self.opened.layout, partition.shard, partition.slice)[1].unique())
        return total

    def request(self, identifier: str) -> Request:
        """Return one deletion request.

        Raises:
            UserError: There is no such request.
        """
        return self.opened.ledger.requests.get(identifier)

    def status(self) -> dict[str, Any]:
        """Return what ``sisa status --json`` prints."""
        ledger = self.opened.ledger
        version = ledger.versions.live()
        partitions = ledger.partitions.all()
        open_requests = ledger.requests.open()
        if not ledger.ingested:
            state = "ingesting"
        elif version.number == 0:
            state = "training"
        else:
            state = "repair due" if open_requests else "ready"
        return {
            "version": version.number,
            "state": state,
            "records": sum(p.records for p in partitions if p.slice != HOLDOUT_SLICE),
            "subjects": self.count_subjects(),
            "holdout_records": sum(p.records for p in partitions if p.slice == HOLDOUT_SLICE),
            "shards": self.opened.shards,
            "slices": self.opened.slices,
            "requests": [request_json(request) for request in ledger.requests.all()],
            "constituents": [self._constituent(version, shard) for shard in range(self.opened.shards)],
        }

    def _constituent(self, version: Any, shard: int) -> dict[str, Any]:
        ledger = self.opened.ledger
        member = next((m for m in version.members if m.shard == shard), None)
        row = ledger.stages.get(member.key, member.platform) if member is not None and member.stage else None
        return {
            "shard": shard,
            "stage": row.stage if row else 0,
            "key": row.key if row else "",
            "state_digest": row.state_digest if row else "",
            "records": row.records if row else 0,
            "quarantined": any(shard in request.shards for request in ledger.requests.open()),
        }


def request_json(request: Request) -> dict[str, Any]:
    """Return a request as ``sisa status --json`` prints it."""
    return {
        "request": request.id,
        "state": request.state,
        "created_at": request.created_at,
        "updated_at": request.updated_at,
        "reason": request.reason,
        "subjects": request.subjects,
        "records": request.records,
        "shards": request.shards,
        "slices": sorted({slice_ for _, slice_ in request.places if slice_ != HOLDOUT_SLICE}),
        "stages_retrained": request.stages_retrained,
        "version_before": request.version_before,
        "version_quarantine": request.version_quarantine,
        "version_after": request.version_after,
        "note": request.note,
    }


def open_store(uri: str | Path) -> Store:
    """Open the store at ``uri``.

    Raises:
        UserError: There is no store.
        DamagedError: A part of it is missing or unreadable.
    """
    return Store(opening.open_store(Layout.at(uri)))
