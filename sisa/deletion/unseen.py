"""Rows that could not be read when their owner's deletion was accepted: who is deleted is known then, of which records isn't."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sisa.opening import OpenStore
from sisa.records.names import RECORD, SUBJECT
from sisa.records.partition import PartitionRows
from sisa.routing.keys import exclusion_digests


def remember_unseen(store: OpenStore, rows: PartitionRows, gone_N: NDArray[np.bool_]) -> None:
    """Count and remember records of people whose rows could not be read when their deletion was accepted."""
    exclusions, key = store.ledger.requests.exclusions(), store.keys.exclusion
    gone = rows.table.filter(pa.array(gone_N))
    owners = exclusion_digests(key, "subject", gone[SUBJECT].to_pylist())
    records = exclusion_digests(key, "record", gone[RECORD].to_pylist())
    found = {
        record: exclusions["subject", owner]
        for record, owner in zip(records, owners, strict=True)
        if ("subject", owner) in exclusions and ("record", record) not in exclusions
    }
    if found:
        store.ledger.requests.found(found)
