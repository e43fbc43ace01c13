"""Digests of who is in a slice, and the names of stages. Pure.

A stage's key is derived from all that goes into its training, and from nothing else::

    key(k, r) = H(recipe digest, code version, k, r, key(k, r-1), membership(k, r))

so a stage whose key is in the store is the stage that a fresh training would make. Membership is taken
over keyed digests of records: a key that outlives a deletion can't be used to test a guess about a record.

Shape suffixes: N records of a slice, 16 bytes of a digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

SEMANTICS = 1
"""Number of our training semantics. Raise it whenever the same recipe and records would give other bits."""

DIGEST_BYTES = 16
_ROWS = 1 << 16
"""Records digested at a time: memory beside the digests themselves doesn't grow with their number."""


def canonical_order(id_digests_N16: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the positions that put records in canonical order: ascending bytes of their id digest.

    Args:
        id_digests_N16: Keyed digests of record ids, (N, 16) uint8.

    Raises:
        ValueError: The digests aren't of that shape.
    """
    _check(id_digests_N16)
    halves = np.ascontiguousarray(id_digests_N16).view(">u8")
    return np.lexsort((halves[:, 1], halves[:, 0]))


def membership(id_digests_N16: NDArray[np.uint8], content_digests_N16: NDArray[np.uint8]) -> str:
    """Digest who is in a slice and what their records say, whatever order they came in.

    SHA-256 over the count (8 bytes, little-endian) and, in canonical order, id digest and content digest
    of each record.

    Args:
        id_digests_N16: Keyed digests of record ids, (N, 16) uint8.
        content_digests_N16: Keyed digests of records' contents, in the same order.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: The digests aren't of that shape, or not as many of one as of the other.
    """
    _check(content_digests_N16)
    if len(id_digests_N16) != len(content_digests_N16):
        raise ValueError(f"{len(id_digests_N16)} id digests, but {len(content_digests_N16)} content digests")
    order = canonical_order(id_digests_N16)
    starts = range(0, len(order), _ROWS)
    parts = (order[start : start + _ROWS] for start in starts)
    return membership_in_order(
        len(order), (np.concatenate([id_digests_N16[part], content_digests_N16[part]], axis=1) for part in parts)
    )


def membership_in_order(count: int, pairs: Iterable[NDArray[np.uint8]]) -> str:
    """Digest the same as :func:`membership`, of records that come in canonical order, some at a time.

    Args:
        count: How many records will come.
        pairs: (N, 32) uint8 each: id digest and content digest of the next records.

    Raises:
        ValueError: Others came, or in another order.
    """
    digest = hashlib.sha256(count.to_bytes(8, "little"))
    last = b""
    for pairs_N32 in pairs:
        if not len(pairs_N32):
            continue
        if pairs_N32[0, :DIGEST_BYTES].tobytes() < last:
            raise ValueError("records came out of order")
        last = pairs_N32[-1, :DIGEST_BYTES].tobytes()
        count -= len(pairs_N32)
        digest.update(pairs_N32.tobytes())
    if count:
        raise ValueError(f"{abs(count)} records too {'few' if count > 0 else 'many'} came")
    return digest.hexdigest()


def stage_key(
    *, recipe_digest: str, code_version: str, shard: int, stage: int, parent_key: str, membership: str
) -> str:
    """Name stage ``stage`` (1..R) of shard ``shard`` after everything that determines its weights.

    Args:
        recipe_digest: Digest of the training's part of the recipe.
        code_version: Our semantics and the source of a model that the user brings.
        shard: 0..S-1.
        stage: 1..R.
        parent_key: Key of the stage before, empty for stage 1.
        membership: :func:`membership` of slice ``stage``; slices before are in the parent's key.

    Returns:
        64 hexadecimal digits.
    """
    content = {
        "code_version": code_version,
        "membership": membership,
        "parent_key": parent_key,
        "recipe_digest": recipe_digest,
        "shard": shard,
        "stage": stage,
        "what": "sisa-stage",
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _check(digests_N16: NDArray[np.uint8]) -> None:
    if digests_N16.dtype != np.uint8 or digests_N16.ndim != 2 or digests_N16.shape[1] != DIGEST_BYTES:
        raise ValueError(f"expected (N, 16) uint8, got {digests_N16.shape} {digests_N16.dtype}")
