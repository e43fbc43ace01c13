"""Fitting an aggregation's parameters for the constituents that answer now.

They come from a declared table of rows that are nobody's. They belong to exactly these constituents: a deletion drops
them in the transaction that accepts it, and until they are fitted again the mean answers. Parameters that were fitted
make a new version: the answers of one version never change.
"""

from __future__ import annotations

import pyarrow as pa

from sisa.ensemble.fitting import fit
from sisa.ensemble.live import LiveEnsemble, member_names
from sisa.errors import UserError
from sisa.learners.columns import Columns, columns_from_table
from sisa.opening import OpenStore
from sisa.recipe import AggregationSpec, Recipe
from sisa.records.encode import check_columns, encode_with
from sisa.records.source import open_source

FIELD = "sisa.aggregation.table"


def refit(store: OpenStore, ensemble: LiveEnsemble) -> int:
    """Fit the recipe's aggregation if it has parameters; return the number of the live version.

    Raises:
        UserError: The table can't be used.
        DamagedError: A stage that should answer is damaged.
    """
    spec = store.recipe.sisa.aggregation
    loaded = ensemble.load()
    if isinstance(spec, str) or loaded.panel is None:
        return loaded.version
    columns = calibration_rows(store.recipe)
    version = store.ledger.versions.get(loaded.version)
    members = member_names(version)
    fitted = fit(spec.name, loaded.panel.posteriors(columns), columns.labels_N, members)
    return store.ledger.versions.publish_fit(version, members, fitted.to_json())


def calibration_rows(recipe: Recipe) -> Columns:
    """Read the declared table.

    Raises:
        UserError: It can't be read, has no rows, or has ids: then its rows are somebody's.
    """
    spec, data = recipe.sisa.aggregation, recipe.data
    assert isinstance(spec, AggregationSpec)
    source = open_source(spec.table, name=FIELD)
    check_columns(source.schema.names, [*data.features, data.label], what=f"{FIELD} {spec.table!r}")
    owned = [name for name in (data.subject_column, data.record_id) if name in source.schema.names]
    if owned:
        raise UserError(
            f"{FIELD}: the table has the id column {owned[0]!r}, so its rows are somebody's, who may ask for deletion",
            hint="Fit on rows that are nobody's (made up, or public), in a table without ids.",
        )
    batches = []
    for batch in source.batches([*data.features, data.label]):
        nobody = pa.array([""] * batch.num_rows, pa.string())
        batches.append(encode_with(batch, recipe, nobody, nobody))
    if not batches:
        raise UserError(f"{FIELD}: the table {spec.table!r} has no rows", hint="Give some hundred labelled rows.")
    return columns_from_table(pa.Table.from_batches(batches).combine_chunks(), recipe)
