"""Made-up records of the shape of the Purchase data set: 600 binary features, 2 classes.

The real one comes from a competition whose terms forbid passing it on. Here a person is drawn from one of a few
shopping profiles, each with its own probability of each product; the class is a property of the profile, so that there
is something to learn and nothing to memorise. The same seed gives the same records.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FEATURES = 600
PROFILES = 20
RECORDS_PER_SHARD = 12460
"""Of a data set of 249,215 records, the size that later papers report, cut in 20 shards."""


def purchase(*, records: int, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return features (N, 600) uint8 and classes (N,) int64."""
    rng = np.random.default_rng(seed)
    probabilities = rng.beta(0.6, 2.5, (PROFILES, FEATURES)).astype(np.float32)
    profiles_N = rng.integers(0, PROFILES, records)
    X_ND = np.empty((records, FEATURES), np.uint8)
    for start in range(0, records, 10_000):
        rows = profiles_N[start : start + 10_000]
        X_ND[start : start + 10_000] = rng.random((len(rows), FEATURES), dtype=np.float32) < probabilities[rows]
    return X_ND, profiles_N % 2


def purchase_table(*, records: int, seed: int = 0) -> pa.Table:
    """Return the records with ids: `person_id`, `bought` (a list of 600 uint8) and `class`."""
    X_ND, labels_N = purchase(records=records, seed=seed)
    bought = pa.FixedSizeListArray.from_arrays(pa.array(X_ND.reshape(-1)), FEATURES)
    return pa.table({"person_id": np.arange(records), "bought": bought, "class": labels_N})


def main() -> None:
    """Write the records to a Parquet file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--records", type=int, default=RECORDS_PER_SHARD)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pq.write_table(purchase_table(records=arguments.records, seed=arguments.seed), arguments.output)
    print(f"{arguments.records} records written to {arguments.output}")


if __name__ == "__main__":
    main()
