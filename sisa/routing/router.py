"""From a subject to its shard and slice: oblivious of every other record.

Invariants:

* A route depends on the subject's canonical id and the routing key alone. The partition of the data
  without a person is the partition of the data, without that person; everything one subject owns lands
  in one shard and one slice (Bourtoule et al. 2021 shard by position; a deletion would shift neighbours).
* Shard, slice and holdout are decided by three independent keyed hashes, so a change of one setting
  leaves the other decisions alone: with another number of slices nobody changes shard.
* Slices are 1..R; slice 0 is the holdout, which is spread over the shards like everything else.

Shape suffix: N subjects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sisa.layout import HOLDOUT_SLICE
from sisa.routing.keys import SUBKEY_BYTES, derive
from sisa.routing.siphash import siphash_texts

_HALF = np.uint64(32)


@dataclass(frozen=True)
class Routes:
    """Where N subjects' records go."""

    shard_N: NDArray[np.int32]
    """0..S-1."""
    slice_N: NDArray[np.int32]
    """1..R, or 0 for the holdout."""


class Router:
    """Routes subjects by keyed hashes; void if the key becomes public or routes are edited by hand."""

    def __init__(self, routing_key: bytes, *, shards: int, slices: int, holdout_fraction: float = 0.0) -> None:
        """Derive the three hash keys.

        Args:
            routing_key: The store's 32-byte routing key.
            shards: S >= 1.
            slices: R >= 1.
            holdout_fraction: Share of subjects in the holdout, 0 <= f < 1.

        Raises:
            ValueError: A number is out of range.
        """
        if shards < 1 or slices < 1 or not 0.0 <= holdout_fraction < 1.0:
            raise ValueError(f"no router for {shards} shards, {slices} slices, holdout {holdout_fraction}")
        self.shards = shards
        self.slices = slices
        names = ("shard", "slice", "holdout")
        self._keys = [derive(routing_key, "route", name)[:SUBKEY_BYTES] for name in names]
        # Exact: a fraction is a binary float below 1, and scaling by a power of two doesn't round.
        self._threshold = int(holdout_fraction * 2.0**64)

    def route(self, subject_ids: pa.StringArray) -> Routes:
        """Route N subjects, given by their canonical ids.

        Raises:
            ValueError: An id is null.
        """
        keys = self._keys if self._threshold else self._keys[:2]
        shard_hash_N, slice_hash_N, *holdout_hash = siphash_texts(keys, subject_ids)
        slice_N = _scaled(slice_hash_N, self.slices) + np.int32(1)
        if holdout_hash:
            slice_N[holdout_hash[0] < np.uint64(self._threshold)] = HOLDOUT_SLICE
        return Routes(_scaled(shard_hash_N, self.shards), slice_N)

    def route_one(self, subject: str) -> tuple[int, int]:
        """Route one subject, given by its canonical id, to (shard, slice)."""
        routes = self.route(pa.array([subject], pa.string()))
        return int(routes.shard_N[0]), int(routes.slice_N[0])


def _scaled(hash_N: NDArray[np.uint64], size: int) -> NDArray[np.int32]:
    """Map hashes to 0..size-1 by multiply-shift of their upper 32 bits (bias below size / 2^32)."""
    return (((hash_N >> _HALF) * np.uint64(size)) >> _HALF).astype(np.int32)
