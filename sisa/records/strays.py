"""What lies among the records and is no part of the store."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sisa.layout import RECORDS_KEY, Layout, all_slices
from sisa.records.parts import file_name

Several = Mapping[tuple[int, int], int]
"""How many files each (shard, slice) has that has several."""


def stray_files(
    layout: Layout, shards: int, slices: int, *, generations: int = 0, several: Several | None = None
) -> list[Path]:
    """List everything under the records that is no part of a local store with so many shards, slices and files."""
    expected = {
        layout.partition(*place) / name
        for place, name in _expected_names(shards, all_slices(slices=slices, generations=generations), several)
    }
    folders = {folder for path in expected for folder in path.parents}
    return sorted(path for path in _walk(layout.records) if path not in expected and path not in folders)


def stray_keys(
    layout: Layout, shards: int, slices: int, *, generations: int = 0, several: Several | None = None
) -> list[str]:
    """List every key under the records that is no part of a store with so many shards, slices and files."""
    expected = {
        f"{layout.partition_key(*place)}/{name}"
        for place, name in _expected_names(shards, all_slices(slices=slices, generations=generations), several)
    }
    return [key for key in layout.storage.keys(RECORDS_KEY) if key not in expected]


def _expected_names(
    shards: int, numbers: Iterable[int], several: Several | None
) -> Iterator[tuple[tuple[int, int], str]]:
    for place in ((shard, slice_) for shard in range(shards) for slice_ in numbers):
        of = (several or {}).get(place, 1)
        yield from ((place, file_name(number, of)) for number in range(of))


def _walk(folder: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(folder):
        yield from (Path(path, name) for name in [*folders, *files])
