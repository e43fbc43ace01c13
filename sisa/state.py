"""The full state of a constituent after a stage, and the two digests that name it.

Everything that a next stage starts from is in here, by name: ``model.`` parameters, ``buffer.`` buffers,
``preprocess.`` scalers and vocabularies, ``optimizer.`` moments, ``schedule.`` position. There is no stream of
random numbers to keep: each epoch seeds its own. A digest is taken over canonical bytes (names in order,
little-endian, row-major), so that neither memory layout nor the order of insertion can move it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
"""What a scalar of a state may be: plain data that JSON gives back unchanged; no NaN, no infinity."""

ANSWERING = ("model.", "buffer.", "preprocess.")
"""Prefixes of what determines a prediction."""


@dataclass(frozen=True)
class StageState:
    """Tensors and scalars by name; without either it is the state of a shard that has no records yet."""

    tensors: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    scalars: dict[str, JSON] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether nothing was trained yet."""
        return not self.tensors and not self.scalars


def state_digest(state: StageState) -> str:
    """SHA-256 (hex) over parameters, buffers and preprocessing, and over nothing else.

    Raises:
        ValueError: A scalar isn't plain JSON data.
    """
    tensors = {name: array for name, array in state.tensors.items() if name.startswith(ANSWERING)}
    scalars = {name: value for name, value in state.scalars.items() if name.startswith("preprocess.")}
    return _digest(b"sisa-state-1", tensors, scalars)


def full_digest(state: StageState) -> str:
    """SHA-256 (hex) over every tensor and every scalar.

    Raises:
        ValueError: A scalar isn't plain JSON data.
    """
    return digests(state)[1]


def digests(state: StageState) -> tuple[str, str]:
    """Return the state digest and the full digest; no byte is hashed twice, the second covers the first.

    Raises:
        ValueError: A scalar isn't plain JSON data.
    """
    served = state_digest(state)
    tensors = {name: array for name, array in state.tensors.items() if not name.startswith(ANSWERING)}
    scalars = {name: value for name, value in state.scalars.items() if not name.startswith("preprocess.")}
    return served, _digest(b"sisa-full-2 " + served.encode(), tensors, scalars)


def _digest(domain: bytes, tensors: Mapping[str, np.ndarray[Any, Any]], scalars: Mapping[str, JSON]) -> str:
    digest = hashlib.sha256(_prefixed(domain))
    for name in sorted(tensors):
        array = _canonical(tensors[name])
        digest.update(_prefixed(_json([name, array.dtype.str, list(array.shape)])))
        digest.update(array.nbytes.to_bytes(8, "little"))
        digest.update(array.reshape(-1).view(np.uint8).data if array.size else b"")
    digest.update(_prefixed(_json(dict(scalars))))
    return digest.hexdigest()


def _canonical(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if array.dtype.hasobject:
        raise ValueError(f"a state holds numbers, not objects: {array.dtype}")
    big = array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big")
    return np.asarray(array, dtype=array.dtype.newbyteorder("<") if big else None, order="C")


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _prefixed(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content
