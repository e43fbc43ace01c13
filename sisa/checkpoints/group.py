"""The one place that opens Zarr: one array of bytes in one group, written durably and read loudly.

Zarr's own local store renames without fsync and reads a missing chunk as zeros. Both are mended here: what is
written to a disk goes through :class:`_DurableStore`, what is read through :class:`_LoudStore`; for object storage
:mod:`sisa.checkpoints.bucket` has their like. Chunks are not compressed, carry a CRC32C each, and are written even if
they are all zeros.

The metadata of a group is read as what it is, a JSON file, so that a look at a manifest doesn't import Zarr
(0.4 s). What Zarr wrote about the array is repeated in the sealed attributes, and compared on each load.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import Buffer, BufferPrototype, cpu, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

ARRAY: Final = "state"
"""Name of the array of bytes in a stage's group."""

_SYNC_AT_ONCE_BYTES: Final = 2**20


class _DurableStore(LocalStore):
    """Writes files in place, in a folder that nobody knows yet; large ones are made durable side by side."""

    async def set(self, key: str, value: Buffer) -> None:
        """Write one key; see the base class."""
        await asyncio.to_thread(_write, self.root / key, value.as_numpy_array())


class _LoudStore(LocalStore):
    """A key that isn't there is an error, never a fill value."""

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read one key; see the base class.

        Raises:
            FileNotFoundError: It is missing.
        """
        found = await super().get(key, prototype, byte_range)
        if found is None:
            raise FileNotFoundError(f"{key} is missing")
        return found


@dataclass(frozen=True)
class GroupPlace:
    """Where Zarr finds a group: a store of its kind, which holds nothing else."""

    store: Store


def folder_to_write(folder: Path) -> GroupPlace:
    """Return a folder that nobody knows yet, to write a group to."""
    return GroupPlace(_DurableStore(folder))


def folder_to_read(folder: Path) -> GroupPlace:
    """Return the folder of a group, to read it from."""
    return GroupPlace(_LoudStore(folder, read_only=True))


def write_group(
    place: GroupPlace,
    row: npt.NDArray[np.uint8],
    *,
    chunk_bytes: int,
    attributes: Callable[[dict[str, Any]], Mapping[str, Any]],
) -> None:
    """Write ``row`` as a new group at ``place``; publishing it is the caller's.

    ``attributes`` is called when the bytes are on their way, with the array's metadata, and returns what the group
    shall remember.
    """
    group = zarr.create_group(place.store, zarr_format=3)
    array = group.create_array(
        ARRAY,
        shape=row.shape,
        dtype=row.dtype,
        chunks=(chunk_bytes,),
        compressors=Crc32cCodec(),
        filters=None,
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )
    if row.size:
        array[:] = row
    group.update_attributes(dict(attributes(_metadata(place))))


def read_array(place: GroupPlace, row: npt.NDArray[np.uint8], *, metadata: Mapping[str, Any]) -> None:
    """Fill ``row`` with the bytes of the group at ``place``.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A checksum or the array's metadata is not what it was.
    """
    if _metadata(place) != metadata:
        raise ValueError(f"{ARRAY}/zarr.json is damaged")
    array = _open(place)
    if array.shape != row.shape:
        raise ValueError(f"expected {row.size} bytes, got shape {array.shape}")
    if row.size:
        array.get_basic_selection(slice(None), out=cpu.NDBuffer.from_numpy_array(row))


def damaged_chunks(place: GroupPlace, *, chunks: int) -> list[str]:
    """Name each chunk file that is missing or doesn't pass its checksum; empty if the fault lies elsewhere."""
    try:
        array = _open(place)
    except (OSError, ValueError, TypeError, KeyError):
        return []
    damaged = []
    for number in range(chunks):
        try:
            array.get_block_selection(number)
        except FileNotFoundError:
            damaged.append(f"{chunk_name(number)} is missing")
        except (OSError, ValueError, TypeError):
            damaged.append(f"{chunk_name(number)} is damaged")
    return damaged


def chunk_name(number: int) -> str:
    """Return the path of a chunk's file below its group."""
    return f"{ARRAY}/c.{number}"


def _open(place: GroupPlace) -> zarr.Array[Any]:
    return zarr.open_array(place.store, path=ARRAY, mode="r", zarr_format=3)


def _metadata(place: GroupPlace) -> dict[str, Any]:
    """Read the array's metadata as the JSON that it is.

    Raises:
        FileNotFoundError: It is missing.
        ValueError: It isn't JSON.
    """
    try:
        found = sync(place.store.get(f"{ARRAY}/zarr.json", default_buffer_prototype()))
    except FileNotFoundError:
        found = None
    if found is None:
        raise FileNotFoundError(f"{ARRAY}/zarr.json is missing")
    return dict(json.loads(found.to_bytes()))


def _write(path: Path, content: npt.NDArray[Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as stream:
        stream.write(content.data)
        if content.nbytes >= _SYNC_AT_ONCE_BYTES:
            stream.flush()
            os.fsync(stream.fileno())
