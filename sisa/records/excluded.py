"""Telling which rows belong to people who were deleted, from the keyed digests that remember them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sisa.routing.keys import exclusion_hasher


def excluded_rows(
    records: pa.Array | pa.ChunkedArray,
    subjects: pa.Array | pa.ChunkedArray,
    exclusions: Collection[tuple[str, bytes]],
    exclusion_key: bytes,
) -> NDArray[np.bool_]:
    """Mark the rows whose record or subject is excluded.

    Args:
        records: N canonical record ids.
        subjects: N canonical ids of their owners.
        exclusions: Pairs of kind (``"record"`` or ``"subject"``) and digest, in which membership is cheap to tell.
        exclusion_key: The store's exclusion key.

    Returns:
        (N,) bool.
    """
    marked_N = np.zeros(len(records), np.bool_)
    kinds = _kinds(exclusions, most=len(records))
    if "record" in kinds:
        marked_N |= _marked(records, "record", exclusions, exclusion_key)
    if "subject" in kinds:
        marked_N |= _marked(subjects, "subject", exclusions, exclusion_key)
    return marked_N


def superseded_digests(
    records: pa.Array | pa.ChunkedArray, contents_N16: NDArray[np.uint8], exclusion_key: bytes
) -> list[bytes]:
    """Return by what each of N pairs of a record and what it says is remembered once a correction superseded it.

    Args:
        records: N canonical record ids.
        contents_N16: Keyed digests of their contents.
        exclusion_key: The store's exclusion key.
    """
    base = exclusion_hasher(exclusion_key, "content")
    digests = []
    names = records.cast(pa.binary()).to_numpy(zero_copy_only=False)
    for name, content in zip(names, contents_N16, strict=True):
        hasher = base.copy()
        hasher.update(content.tobytes() + name)  # the content has a fixed width
        digests.append(hasher.digest())
    return digests


def superseded_rows(
    records: pa.Array | pa.ChunkedArray,
    contents_N16: NDArray[np.uint8],
    exclusions: Collection[tuple[str, bytes]],
    exclusion_key: bytes,
) -> NDArray[np.bool_]:
    """Mark the rows that say what a correction superseded.

    Returns:
        (N,) bool.
    """
    if "content" not in _kinds(exclusions, most=len(records)):
        return np.zeros(len(records), np.bool_)
    digests = superseded_digests(records, contents_N16, exclusion_key)
    return np.array([("content", digest) in exclusions for digest in digests], np.bool_)


def _kinds(exclusions: Collection[tuple[str, bytes]], *, most: int) -> Collection[str]:
    """Tell which kinds may occur, walking over ``most`` exclusions at most.

    A kind that doesn't occur saves a hash for each row. Exclusions may outnumber the rows of a partition by far,
    and this is asked for each partition: then a walk over all of them would cost more than the hashes.
    """
    return {kind for kind, _ in exclusions} if len(exclusions) <= most else ("record", "subject", "content")


def _marked(
    ids: pa.Array | pa.ChunkedArray,
    kind: Literal["record", "subject"],
    exclusions: Collection[tuple[str, bytes]],
    exclusion_key: bytes,
) -> NDArray[np.bool_]:
    base = exclusion_hasher(exclusion_key, kind)
    marked = []
    for content in ids.cast(pa.binary()).to_numpy(zero_copy_only=False):
        hasher = base.copy()
        hasher.update(content)
        marked.append((kind, hasher.digest()) in exclusions)
    return np.array(marked, np.bool_)
