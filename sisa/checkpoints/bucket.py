"""Zarr on object storage: what :mod:`sisa.checkpoints.group` needs there, and how a stage is published without a rename.

A stage is a prefix. First its chunks are put, each under its name and only if nothing lies there, many at a time; last
the group's metadata, which holds the sealed manifest, again only if nothing lies there. A stage exists if and only if
that object does: what a killed writer left is none, and of two writers one publishes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import obstore
from obstore.exceptions import AlreadyExistsError
from zarr.core.buffer import default_buffer_prototype
from zarr.core.config import config
from zarr.storage import ObjectStore

from sisa.checkpoints import group
from sisa.checkpoints.stage import METADATA
from sisa.errors import StoreError
from sisa.state import JSON

if TYPE_CHECKING:
    from obstore.store import S3Store
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    from sisa.storage.objects import ObjectStorage

AT_ONCE = 16
"""Chunks on their way at a time."""


class _UploadStore(ObjectStore["S3Store"]):
    """Puts each key of one new group once; its own metadata is held back, and no other is asked for."""

    def __init__(self, objects: S3Store, prefix: str) -> None:
        super().__init__(objects)
        self._prefix = prefix
        self.metadata: dict[str, Buffer] = {}
        """By key: small, asked for again by Zarr, and of a new group all there is."""

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read one key; see the base class."""
        del prototype, byte_range
        return self.metadata.get(key)

    async def exists(self, key: str) -> bool:
        """Say whether a key was put; see the base class."""
        return key in self.metadata

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Put one key; see the base class."""
        if key not in self.metadata:
            await self.set(key, value)

    async def set(self, key: str, value: Buffer) -> None:
        """Put one key; see the base class.

        Raises:
            FileExistsError: Something else lies there.
        """
        if key.endswith(METADATA):
            self.metadata[key] = value
        if key == METADATA:
            return
        whole = f"{self._prefix}/{key}"
        try:
            await obstore.put_async(self.store, whole, value.as_buffer_like(), mode="create")
        except AlreadyExistsError:
            # A request whose answer was lost, and was sent again, finds its own object; so does who writes the same.
            there = await (await obstore.get_async(self.store, whole)).bytes_async()
            if there.to_bytes() != value.to_bytes():
                raise FileExistsError(key) from None


class _LoudObjectStore(ObjectStore["S3Store"]):
    """Reads one group; a key that isn't there is an error, never a fill value."""

    def __init__(self, storage: ObjectStorage, prefix: str) -> None:
        super().__init__(storage.objects, read_only=True)
        self._storage = storage
        self._prefix = prefix

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read one key; see the base class.

        Raises:
            FileNotFoundError: It is missing.
        """
        whole = f"{self._prefix}/{key}"
        with self._storage.told("read", whole):  # a server that fails is no damage
            found = await super().get(whole, prototype or default_buffer_prototype(), byte_range)
        if found is None:
            raise FileNotFoundError(f"{key} is missing")
        return found


def group_to_read(storage: ObjectStorage, prefix: str) -> group.GroupPlace:
    """Return a group below ``prefix``, to read it from."""
    return group.GroupPlace(_LoudObjectStore(storage, prefix))


def publish(
    storage: ObjectStorage,
    prefix: str,
    row: npt.NDArray[np.uint8],
    *,
    chunk_bytes: int,
    attributes: Callable[[Mapping[str, JSON]], Mapping[str, JSON]],
) -> bool:
    """Put a group below ``prefix``, its own metadata last; return False if that is there already.

    Raises:
        StoreError: It can't be put; what was put of it is nobody's.
    """
    key = f"{prefix}/{METADATA}"
    uploads = _UploadStore(storage.objects, prefix)
    wanted: Any = attributes
    try:
        with storage.told("write", prefix), config.set({"async.concurrency": AT_ONCE}):
            group.write_group(group.GroupPlace(uploads), row, chunk_bytes=chunk_bytes, attributes=wanted)
    except FileExistsError as error:
        if storage.exists(key):
            return False
        raise StoreError(
            f"{storage.uri}/{prefix}: another writer is at work there, or was killed, and its bytes are others",
            hint="Run `sisa repair`: it removes what was left unfinished, and trains the stage again.",
        ) from error
    return storage.put_new(key, uploads.metadata[METADATA].to_bytes())
