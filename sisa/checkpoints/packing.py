"""One flat row of bytes for all tensors of a state, and back without a copy.

Tensors follow each other in the order of their names. Each starts at a multiple of ``ALIGNMENT``, the row
itself too, since a matrix product may choose its kernel, and so its rounding, by alignment. The row is cut into
chunks of equal size; what is left of the last one is zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from sisa.errors import StoreError
from sisa.state import JSON

Tensor: TypeAlias = npt.NDArray[Any]

ALIGNMENT: Final = 64
"""In bytes; what torch gives its own tensors."""

CHUNK_BYTES: Final = 16 * 2**20
"""The largest chunk: few files, and small enough to be worked on side by side."""

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
}
"""The element types that can be kept, in the form in which they are."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in the row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """In bytes from the start of the row."""

    @property
    def bytes(self) -> int:
        """Length in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def to_json(self) -> dict[str, JSON]:
        """Return plain data."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape), "offset": self.offset}


def plan(tensors: Mapping[str, Tensor]) -> list[Entry]:
    """Give each tensor its place.

    Raises:
        StoreError: An element type that can't be kept.
    """
    entries: list[Entry] = []
    offset = 0
    for name, tensor in sorted(tensors.items()):
        if tensor.dtype.name not in DTYPES:
            raise StoreError(
                f"state {name}: expected elements of {', '.join(DTYPES)}, got {tensor.dtype}",
                hint="Convert the tensor, for instance to float32: other element types are not supported yet.",
            )
        entry = Entry(name, tensor.dtype.name, tensor.shape, offset)
        entries.append(entry)
        offset = _aligned(offset + entry.bytes)
    return entries


def read_index(index: Iterable[Mapping[str, Any]]) -> list[Entry]:
    """Read an index back.

    Raises:
        ValueError: It isn't one.
    """
    try:
        entries = [Entry(item["name"], item["dtype"], tuple(item["shape"]), item["offset"]) for item in index]
        return [entry for entry in entries if entry.bytes >= 0]
    except (KeyError, TypeError) as error:
        raise ValueError(f"not an index of tensors: {error}") from error


def chunking(entries: list[Entry], *, chunk_bytes: int = CHUNK_BYTES) -> tuple[int, int]:
    """Return ``(chunks, bytes of each)``; no chunk at all where there are no bytes."""
    total = _aligned(max((entry.offset + entry.bytes for entry in entries), default=0))
    count = math.ceil(total / chunk_bytes)
    return count, _aligned(math.ceil(total / count)) if count else ALIGNMENT


def aligned_zeros(size_bytes: int) -> npt.NDArray[np.uint8]:
    """Return zeros whose address is a multiple of ``ALIGNMENT``."""
    raw = np.zeros(size_bytes + ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size_bytes]


def pack(tensors: Mapping[str, Tensor], entries: list[Entry], *, size_bytes: int) -> npt.NDArray[np.uint8]:
    """Copy all tensors into one row."""
    row = aligned_zeros(size_bytes)
    for name, view in unpack(row, entries).items():
        view[...] = tensors[name]  # mends byte order and strides on the way
    return row


def unpack(row: npt.NDArray[np.uint8], entries: list[Entry]) -> dict[str, Tensor]:
    """Return the tensors as views of the row.

    Raises:
        ValueError: A tensor would lie outside the row.
    """
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        content = row[entry.offset : entry.offset + entry.bytes]
        tensors[entry.name] = content.view(DTYPES[entry.dtype]).reshape(entry.shape)
    return tensors


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
