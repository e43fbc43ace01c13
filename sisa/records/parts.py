"""The files of one slice: one, or several where it is large, so that an erasure rewrites only those of its people. Pure.

A file of several is that of a person by a keyed hash of their id: what one subject owns lies in one file, and which, the
key says; no index holds an id, and a deletion searches nothing. How many there are is fixed when the slice is written,
from how many rows it has then, and told by each file's name and by the ledger. All of them are there as long as the
slice is, with rows or without: one that is missing is lost.

Shape suffix: N subjects.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sisa.recipe import Recipe
from sisa.routing.keys import SUBKEY_BYTES, ShardKeys, derive
from sisa.routing.siphash import siphash_text

SINGLE: Final = "part-00000.parquet"
"""The name of the one file of a slice."""
MOST_ROWS: Final = 65_536
"""A slice with more rows than this has several files, with about this number at most."""
MOST_BYTES: Final = 64 * 2**20
"""The same in bytes as declared: what is rewritten for one person, and what one writer holds in memory."""
MOST_BITS: Final = 16
_NAME = re.compile(r"part-(\d{5})-of-(\d{5})\.parquet")


def row_bytes(recipe: Recipe) -> int:
    """Return about how many bytes a decoded row takes, as declared."""
    return 64 + sum(4 * (spec.size or 4) for spec in recipe.data.columns.values())


def rows_of_a_file(recipe: Recipe) -> int:
    """Return how many rows a file may hold before there are several."""
    return max(1, min(MOST_ROWS, MOST_BYTES // row_bytes(recipe)))


def files_for(rows: int, *, most: int) -> int:
    """Return how many files a slice of so many rows gets: a power of two, so that halves nest.

    >>> files_for(10, most=10), files_for(11, most=10), files_for(41, most=10)
    (1, 2, 8)
    """
    needed = max(1, -(-rows // most))
    return int(1 << min(MOST_BITS, (needed - 1).bit_length()))


def file_name(number: int, of: int) -> str:
    """Name a file of a slice.

    >>> file_name(0, 1), file_name(3, 16)
    ('part-00000.parquet', 'part-00003-of-00016.parquet')
    """
    return SINGLE if of == 1 else f"part-{number:05d}-of-{of:05d}.parquet"


def parse_name(name: str) -> tuple[int, int] | None:
    """Return number and count of one of several files, None if it isn't one."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    number, of = int(found[1]), int(found[2])
    return (number, of) if number < of and of > 1 else None


def complete(names: Iterable[str]) -> tuple[list[str], str]:
    """Return which of the files in a folder make up a slice, in order, and what is wrong with that ("" if nothing).

    >>> complete(["part-00001-of-00002.parquet"])
    ([], 'file 0 of 2 is missing')
    """
    found = dict(sorted((place, name) for name in names if (place := parse_name(name))))
    counts = sorted({of for _, of in found})
    if not counts:
        return [], ""
    if len(counts) > 1:
        return [], f"there are files of {counts[0]} and of {counts[1]}"
    missing = [number for number in range(counts[0]) if (number, counts[0]) not in found]
    if missing:
        return [], f"file {missing[0]} of {counts[0]} is missing"
    return list(found.values()), ""


def subject_hashes(keys: ShardKeys, subjects: pa.StringArray) -> NDArray[np.uint64]:
    """Hash N subjects under their shard's key: the first bits say the file."""
    return siphash_text(derive(keys.digest, "file")[:SUBKEY_BYTES], subjects)


def file_numbers(hash_N: NDArray[np.uint64], of: int) -> NDArray[np.int64]:
    """Return in which of ``of`` files (a power of two) N subjects' rows lie."""
    bits = of.bit_length() - 1
    return first_bits(hash_N, bits)


def first_bits(hash_N: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """Return the first bits of N hashes as a number."""
    if not bits:
        return np.zeros(len(hash_N), np.int64)
    return (hash_N >> np.uint64(64 - bits)).astype(np.int64)


def numbers_of(keys: ShardKeys, subjects: pa.StringArray | pa.ChunkedArray, of: int) -> NDArray[np.int64]:
    """Return in which of ``of`` files N subjects' rows lie, from their ids."""
    if isinstance(subjects, pa.ChunkedArray):
        subjects = pa.concat_arrays([*subjects.chunks, pa.array([], pa.string())])
    return file_numbers(subject_hashes(keys, subjects), of)
