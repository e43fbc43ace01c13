"""Answering a table: the input's columns plus ``prediction``, ``scores`` and ``version``.

The output appears whole or not at all. If a quarantine is published before it does, its answers are void: everything
is computed again from the version that is live then. In order: write beside the target, make it durable, look for a
quarantine, rename. The look and the rename hold the ledger in one state, so that a deletion is acknowledged either
before the look, which sees it, or after the file was there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from sisa.ensemble.live import Answer, LiveEnsemble, predicted_classes
from sisa.errors import NoScoreError, StoreError, UserError
from sisa.files import replacing
from sisa.learners.columns import Columns, columns_from_table
from sisa.opening import OpenStore
from sisa.progress import Reporter, Silent
from sisa.recipe import label_text
from sisa.records.features import feature_table, open_input, table_writer
from sisa.records.source import Source
from sisa.store.store import Store

ADDED = ("prediction", "scores", "version")
TRIES = 20


class _Overtaken(Exception):
    """A quarantine was published while answers were computed: they are thrown away."""


@dataclass(frozen=True)
class Prediction:
    """What ``predict`` did."""

    output: str
    rows: int
    version: int
    voters: int
    classes: list[bool | int | str]

    def as_dict(self) -> dict[str, object]:
        """Return plain data."""
        return asdict(self)


def predict_table(store: Store, source: str, output: str | Path, *, reporter: Reporter | None = None) -> Prediction:
    """Answer every row of a table and write the result as Parquet.

    Args:
        store: The store.
        source: Table with the recipe's features, in any format that records come in.
        output: Where the answers go.
        reporter: Who wants to know how far it is.

    Raises:
        UserError: The input can't be used, or the output can't be written there.
        NoConstituentError: No clean constituent is left.
        DamagedError: A stage that should answer is damaged.
    """
    opened = store.opened
    target = _target(output, opened.layout.root)
    table = open_input(source, opened.recipe, added=ADDED)
    reporter = reporter or Silent()
    ensemble = LiveEnsemble(opened)
    for _ in range(TRIES):
        with contextlib.suppress(_Overtaken):
            done = _written(opened, ensemble, table, target, reporter)
            return Prediction(str(output), done.rows, done.version, done.voters, opened.classes)
    raise StoreError("the ensemble kept changing while the table was answered", hint="Try again.")


def _target(output: str | Path, store: Path) -> Path:
    """Return where the output goes.

    Raises:
        UserError: Nothing can be written there, or it is part of the store, by whatever way one gets there.
    """
    target = Path(output).absolute()
    if not target.parent.is_dir():
        raise UserError(f"--output {str(output)!r}: its folder doesn't exist", hint="Make the folder first.")
    if target.is_dir():
        raise UserError(f"--output {str(output)!r}: expected a file, found a folder")
    folder = target.parent.resolve()
    if any(around.samefile(store) for around in (folder, *folder.parents)):
        raise UserError(
            f"--output {str(output)!r}: lies in the store, whose files are its own",
            hint="Name a file in another folder.",
        )
    return target


def _written(opened: OpenStore, ensemble: LiveEnsemble, table: Source, target: Path, reporter: Reporter) -> Prediction:
    """Write the answers to ``target``.

    Raises:
        _Overtaken: A quarantine was published meanwhile; ``target`` is as it was.
    """
    named = False

    @contextlib.contextmanager
    def still_valid() -> Iterator[None]:
        nonlocal named
        with opened.ledger.database.hold():  # whoever commits waits for it to end: some microseconds
            if ensemble.overtaken(done.version):
                raise _Overtaken
            yield
            named = True

    try:
        with replacing(target, naming=still_valid()) as scratch:
            done = _answer(opened, ensemble, table, scratch, reporter)
    except StoreError:
        if named:  # and then the hold was lost: somebody may have been deleted between the look and the name
            target.unlink(missing_ok=True)
        raise
    return done


def _answer(opened: OpenStore, ensemble: LiveEnsemble, table: Source, scratch: Path, reporter: Reporter) -> Prediction:
    schema = _output_schema(opened, table.schema)
    rows, oldest, voters = 0, 0, 0
    reporter.begin("predicting", table.rows)
    try:
        with table_writer(scratch, schema) as writer:
            for batch in table.batches():
                features = feature_table(batch, opened.recipe)
                answer = _answered(ensemble, columns_from_table(features, opened.recipe), rows_before=rows)
                oldest = min(oldest or answer.version, answer.version)
                voters = answer.voters
                rows += batch.num_rows
                added = [
                    _predictions(predicted_classes(answer.scores_BC, opened.classes), schema.field("prediction").type),
                    pa.FixedSizeListArray.from_arrays(pa.array(answer.scores_BC.reshape(-1)), len(opened.classes)),
                    pa.array([answer.version] * batch.num_rows, pa.int64()),
                ]
                columns = [*batch.columns, added[0], added[1].cast(schema.field("scores").type), added[2]]
                writer.write_batch(pa.record_batch(columns, schema=schema))
                reporter.advance(batch.num_rows)
        if not rows:  # an empty table has a version too, and a store that can't answer says so
            nobody = feature_table(table.schema.empty_table(), opened.recipe)
            answer = ensemble.answer(columns_from_table(nobody, opened.recipe))
            oldest, voters = answer.version, answer.voters
    finally:
        reporter.end()
    return Prediction("", rows, oldest, voters, opened.classes)


def _answered(ensemble: LiveEnsemble, columns: Columns, *, rows_before: int) -> Answer:
    try:
        return ensemble.answer(columns)
    except NoScoreError as error:
        raise error.after(rows_before) from error


def _predictions(classes: list[bool | int | str], kind: pa.DataType) -> pa.Array:
    return pa.array([label_text(value) for value in classes] if kind == pa.string() else classes, kind)


def _output_schema(opened: OpenStore, source: pa.Schema) -> pa.Schema:
    kinds = {type(value) for value in opened.classes}
    prediction = pa.bool_() if kinds == {bool} else pa.int64() if kinds == {int} else pa.string()
    schema = source.remove_metadata()
    for field in (
        pa.field("prediction", prediction),
        pa.field("scores", pa.list_(pa.float64())),
        pa.field("version", pa.int64()),
    ):
        schema = schema.append(field)
    return schema
