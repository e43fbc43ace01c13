"""The one place that opens Zarr: one array of bytes in one group, written durably and read loudly.

Zarr's own local store renames without fsync and reads a missing chunk as zeros. Both are mended here: what is
written goes through :class:`_DurableStore`, what is read through :class:`_LoudStore`. Chunks are not compressed,
carry a CRC32C each, and are written even if they are all zeros.

The metadata of a group is read as what it is, a JSON file, so that a look at a manifest doesn't import Zarr
(0.4 s). What Zarr wrote about the array is repeated in the sealed attributes, and compared on each load.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import ByteRequest
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import Buffer, BufferPrototype, cpu
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


def write_group(
    folder: Path,
    row: npt.NDArray[np.uint8],
    *,
    chunk_bytes: int,
    attributes: Callable[[dict[str, Any]], Mapping[str, Any]],
) -> None:
    """Write ``row`` as a new group at ``folder``; publishing it is the caller's.

    ``attributes`` is called when the bytes are on their way to disk, with the array's metadata, and returns what
    the group shall remember.
    """
    store = _DurableStore(folder)
    group = zarr.create_group(store, zarr_format=3)
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
    group.update_attributes(dict(attributes(json.loads((folder / ARRAY / "zarr.json").read_bytes()))))


def read_array(folder: Path, row: npt.NDArray[np.uint8], *, metadata: Mapping[str, Any]) -> None:
    """Fill ``row`` with the bytes of the group at ``folder``.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A checksum or the array's metadata is not what it was.
    """
    path = folder / ARRAY / "zarr.json"
    if not path.exists():
        raise FileNotFoundError(f"{ARRAY}/zarr.json is missing")
    if json.loads(path.read_bytes()) != metadata:
        raise ValueError(f"{ARRAY}/zarr.json is damaged")
    array = _open(folder)
    if array.shape != row.shape:
        raise ValueError(f"expected {row.size} bytes, got shape {array.shape}")
    if row.size:
        array.get_basic_selection(slice(None), out=cpu.NDBuffer.from_numpy_array(row))


def damaged_chunks(folder: Path, *, chunks: int) -> list[str]:
    """Name each chunk file that is missing or doesn't pass its checksum; empty if the fault lies elsewhere."""
    try:
        array = _open(folder)
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


def _open(folder: Path) -> zarr.Array[Any]:
    return zarr.open_array(_LoudStore(folder, read_only=True), path=ARRAY, mode="r", zarr_format=3)


def _write(path: Path, content: npt.NDArray[Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as stream:
        stream.write(content.data)
        if content.nbytes >= _SYNC_AT_ONCE_BYTES:
            stream.flush()
            os.fsync(stream.fileno())
