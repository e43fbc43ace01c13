"""From a subject to its shard and slice: oblivious of every other record.

Invariants:

* A route depends on the subject's canonical id and the routing key alone. The partition of the data
  without a person is the partition of the data, without that person; everything one subject owns lands
  in one shard and one slice (Bourtoule et al. 2021 shard by position; a deletion would shift neighbours).
* One 64-bit keyed hash decides everything, each decision from bits of its own: the lower 24 bits whether
  the subject is held out, the upper 40 read as a fraction x the shard, floor(x S), and what is left of
  x S after the point the slice. The bits of a PRF are independent, so the decisions are; the holdout
  depends on neither S nor R, the shard not on R.
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
from sisa.routing.siphash import siphash_text

PLACE_BITS = 40
HOLDOUT_BITS = 64 - PLACE_BITS
MOST_SHARDS = 2**16
"""Far beyond what a recipe may ask for; keeps products within 64 bits and the bias below 1e-7."""


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
        """Derive the hash key.

        Args:
            routing_key: The store's 32-byte routing key.
            shards: S >= 1.
            slices: R >= 1.
            holdout_fraction: Share of subjects in the holdout, 0 <= f < 1, exact to 2^-25.

        Raises:
            ValueError: A number is out of range.
        """
        if not (1 <= shards <= MOST_SHARDS and 1 <= slices <= MOST_SHARDS and 0.0 <= holdout_fraction < 1.0):
            raise ValueError(f"no router for {shards} shards, {slices} slices, holdout {holdout_fraction}")
        self.shards = shards
        self.slices = slices
        self._key = derive(routing_key, "route")[:SUBKEY_BYTES]
        self._threshold = np.uint64(round(holdout_fraction * 2**HOLDOUT_BITS))

    def route(self, subject_ids: pa.StringArray) -> Routes:
        """Route N subjects, given by their canonical ids.

        Raises:
            ValueError: An id is null.
        """
        hash_N = siphash_text(self._key, subject_ids)
        scaled_N = (hash_N >> np.uint64(HOLDOUT_BITS)) * np.uint64(self.shards)
        shard_N = (scaled_N >> np.uint64(PLACE_BITS)).astype(np.int32)
        scaled_N &= np.uint64(2**PLACE_BITS - 1)
        scaled_N *= np.uint64(self.slices)
        slice_N = (scaled_N >> np.uint64(PLACE_BITS)).astype(np.int32) + np.int32(1)
        slice_N[(hash_N & np.uint64(2**HOLDOUT_BITS - 1)) < self._threshold] = HOLDOUT_SLICE
        return Routes(shard_N, slice_N)

    def route_one(self, subject: str) -> tuple[int, int]:
        """Route one subject, given by its canonical id, to (shard, slice)."""
        routes = self.route(pa.array([subject], pa.string()))
        return int(routes.shard_N[0]), int(routes.slice_N[0])
