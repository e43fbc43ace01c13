"""Which rows belong to people who were deleted, told from keyed digests alone."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sisa.routing.keys import exclusion_digest


def excluded_rows(
    record_ids: pa.Array | pa.ChunkedArray,
    subject_ids: pa.Array | pa.ChunkedArray,
    exclusions: AbstractSet[tuple[str, bytes]],
    exclusion_key: bytes,
) -> npt.NDArray[np.bool_]:
    """Mark the rows (N) whose subject or whose record an exclusion covers.

    Args:
        record_ids: Canonical record ids, N.
        subject_ids: Canonical subject ids, N.
        exclusions: (kind, digest) pairs, kind ``subject`` or ``record``.
        exclusion_key: The key behind the digests.
    """
    if not exclusions:
        return np.zeros(len(record_ids), dtype=np.bool_)
    marked: npt.NDArray[np.bool_] = np.fromiter(
        (
            ("subject", exclusion_digest(exclusion_key, "subject", subject)) in exclusions
            or ("record", exclusion_digest(exclusion_key, "record", record)) in exclusions
            for record, subject in zip(record_ids.to_pylist(), subject_ids.to_pylist(), strict=True)
        ),
        dtype=np.bool_,
        count=len(record_ids),
    )
    return marked
