"""One stage: a Zarr group whose sealed attributes describe one flat array of bytes.

Where it lies is a :class:`Place`. In a folder, writing happens under a temporary name and ends with a rename;
everything is durable by then. Reading trusts nothing: the seal over the attributes, what Zarr says of the array, each chunk's CRC32C, then the digest of the
whole state.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from sisa.checkpoints.manifest import FORMAT, Manifest, StageId, sealed, unsealed
from sisa.checkpoints.packing import aligned_zeros, chunking, pack, plan, read_index, unpack
from sisa.errors import DamagedError, StoreError
from sisa.files import publish_folder, remove, temporary_beside
from sisa.state import JSON, StageState, digests

if TYPE_CHECKING:
    from sisa.checkpoints.group import GroupPlace

# Zarr takes 0.4 s to import: `sisa.checkpoints.group` is imported where it is used.

METADATA: Final = "zarr.json"
EMPTY_GROUP: Final[dict[str, JSON]] = {"attributes": {}, "zarr_format": 3, "node_type": "group"}
"""The metadata of a group without attributes."""

SNAPSHOT_FORMAT: Final = "snapshot-1"
"""The format of what is kept in the middle of a stage: no reader of stages takes it for one."""

_TENSORS: Final = ("model.", "buffer.", "preprocess.", "optimizer.", "schedule.")
_SCALARS: Final = ("preprocess.", "optimizer.", "schedule.", "rng.")
_AMID: Final = ("rng.", "snapshot.")
"""What is kept in the middle of a stage besides: where the generators stand, and where the training does."""
_CONTENT: Final = {"format", "manifest", "index", "scalars", "chunks", "chunk_bytes", "array"}
_HEAL: Final = "Run `sisa repair`: it trains the stage again from the last good one."


class MissingStage(DamagedError):
    """The stage isn't there (any more)."""


def storable(state: StageState) -> StageState:
    """Return the state with its scalars as they will come back from JSON.

    Raises:
        StoreError: A name of no known kind (no digest of what is served would see it), an element type or a
            scalar that can't be kept.
    """
    return _storable(state, _TENSORS, _SCALARS)


def snapshot_state(state: StageState) -> StageState:
    """Return the state in the middle of a stage as :func:`storable` does that of a whole one.

    Raises:
        StoreError: As there.
    """
    return _storable(state, _TENSORS + _AMID, _SCALARS + _AMID)


def _storable(state: StageState, tensors: tuple[str, ...], scalars: tuple[str, ...]) -> StageState:
    for names, kinds, what in ((state.tensors, tensors, "a tensor"), (state.scalars, scalars, "a scalar")):
        for name in names:
            if not name.startswith(kinds) or name in kinds:
                raise StoreError(f"state {name!r}: expected {what} called {', '.join(f'{kind}*' for kind in kinds)}")
    plan(state.tensors)
    return StageState(state.tensors, {name: _plain(name, value) for name, value in state.scalars.items()})


class Place(Protocol):
    """Where one stage lies, or shall lie."""

    def exists(self) -> bool:
        """Say whether the stage is there, whole or damaged."""
        ...

    def metadata(self) -> bytes:
        """Return the group's metadata.

        Raises:
            FileNotFoundError: It is missing.
        """
        ...

    def group(self) -> GroupPlace:
        """Return where Zarr reads the group."""
        ...

    def publish(
        self,
        row: npt.NDArray[np.uint8],
        *,
        chunk_bytes: int,
        attributes: Callable[[Mapping[str, JSON]], Mapping[str, JSON]],
    ) -> bool:
        """Write the group, whole or not at all; return False, and leave what is there, if a stage is there already."""
        ...


@dataclass(frozen=True)
class FolderPlace:
    """A stage in a folder of its own, whose parent is there already."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    def exists(self) -> bool:
        """Say whether something is there."""
        return os.path.lexists(self.folder)

    def metadata(self) -> bytes:
        """Return the group's metadata.

        Raises:
            FileNotFoundError: It is missing.
        """
        return (self.folder / METADATA).read_bytes()

    def group(self) -> GroupPlace:
        """Return where Zarr reads the group."""
        from sisa.checkpoints import group

        return group.folder_to_read(self.folder)

    def publish(
        self,
        row: npt.NDArray[np.uint8],
        *,
        chunk_bytes: int,
        attributes: Callable[[Mapping[str, JSON]], Mapping[str, JSON]],
    ) -> bool:
        """Write the group beside the folder and rename it.

        Raises:
            OSError: The files can't be written.
        """
        from sisa.checkpoints import group

        scratch = temporary_beside(self.folder)
        try:
            group.write_group(group.folder_to_write(scratch), row, chunk_bytes=chunk_bytes, attributes=attributes)
            publish_folder(scratch, self.folder)
        except BaseException as error:
            remove(scratch)
            if _is_taken(error):
                return False
            raise
        return True


def write_stage(
    place: Place, state: StageState, *, describe: Callable[[str, str, int], Manifest], form: int | str = FORMAT
) -> tuple[bool, str]:
    """Write a stage.

    Args:
        place: Where.
        state: What to keep, from :func:`storable`.
        describe: Makes the manifest from the state digest, the full digest and the number of bytes.
        form: What it says of its format.

    Returns:
        Whether it was published, False if something is there already; and the full digest.

    Raises:
        OSError: The files can't be written.
    """
    entries = plan(state.tensors)
    chunks, chunk_bytes = chunking(entries)
    row = pack(state.tensors, entries, size_bytes=chunks * chunk_bytes)
    packed = StageState(unpack(row, entries), state.scalars)
    with ThreadPoolExecutor(1) as pool:  # hashes the very bytes that are on their way to disk
        hashed = pool.submit(digests, packed)

        def attributes(array: Mapping[str, JSON]) -> dict[str, JSON]:
            manifest = describe(*hashed.result(), sum(entry.bytes for entry in entries))
            content: dict[str, JSON] = {
                "format": form,
                "manifest": manifest.to_json(),
                "index": [entry.to_json() for entry in entries],
                "scalars": packed.scalars,
                "chunks": chunks,
                "chunk_bytes": chunk_bytes,
                "array": dict(array),
            }
            return {"sisa": sealed(content)}

        published = place.publish(row, chunk_bytes=chunk_bytes, attributes=attributes)
    return published, hashed.result()[1]


def read_content(place: Place, stage_id: StageId, *, form: int | str = FORMAT) -> tuple[dict[str, Any], Manifest]:
    """Read and verify the attributes of a stage's group; doesn't import Zarr.

    Raises:
        MissingStage: It isn't there.
        DamagedError: They are missing, changed, or another stage's.
    """
    try:
        whole = json.loads(place.metadata())
        attributes = whole["attributes"]
        if {**whole, "attributes": {}} != EMPTY_GROUP or attributes.keys() != {"sisa"}:
            raise ValueError("it is not the metadata of a stage")
        content = unsealed(attributes["sisa"])
        if content["format"] != form:
            raise ValueError(f"format {content['format']}, expected {form}")
        if content.keys() != _CONTENT:
            raise ValueError("it has other fields than a stage")
        manifest = Manifest.from_json(content["manifest"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
        raise damage(place, stage_id, f"{METADATA} {reason}") from error
    if manifest.stage_id != stage_id:
        raise damage(place, stage_id, f"it holds {manifest.stage_id.folder}")
    return content, manifest


def read_stage(place: Place, stage_id: StageId, *, form: int | str = FORMAT) -> tuple[Manifest, StageState]:
    """Read a stage and verify all of it; the tensors are writable views of one fresh row of bytes.

    Raises:
        MissingStage: It isn't there.
        DamagedError: Bytes are missing or changed.
    """
    from sisa.checkpoints import group

    content, manifest = read_content(place, stage_id, form=form)
    chunks = content["chunks"]
    try:
        row = aligned_zeros(chunks * content["chunk_bytes"])
        group.read_array(place.group(), row, metadata=content["array"])
        state = StageState(unpack(row, read_index(content["index"])), content["scalars"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = group.damaged_chunks(place.group(), chunks=chunks) or [str(error)]
        raise damage(place, stage_id, "; ".join(found)) from error
    if digests(state) != (manifest.state_digest, manifest.full_digest):
        raise damage(place, stage_id, "its bytes are not those of its digest")
    return manifest, state


def chunk_names(place: Place, stage_id: StageId) -> list[str] | None:
    """Return the names of the chunks that a stage consists of, there or not; None if its manifest doesn't tell."""
    from sisa.checkpoints import group

    try:
        return [group.chunk_name(number) for number in range(int(read_content(place, stage_id)[0]["chunks"]))]
    except DamagedError:  # a read reports it; until it is healed every chunk may be the stage's
        return None


def expected_files(folder: Path, stage_id: StageId) -> set[Path]:
    """Return the files and folders that a stage in a folder consists of, there or not."""
    from sisa.checkpoints import group

    names = chunk_names(FolderPlace(folder), stage_id)
    if names is None:
        names = [f"{group.ARRAY}/{path.name}" for path in (folder / group.ARRAY).glob("c.*")]
    return {folder / name for name in (METADATA, group.ARRAY, f"{group.ARRAY}/{METADATA}", *names)}


def damage(place: Place, stage_id: StageId, reason: str) -> DamagedError:
    """Return the error that says what is wrong with a stage."""
    if not place.exists():
        return MissingStage(f"{stage_id} is missing", hint=_HEAL, place=str(place))
    return DamagedError(f"{stage_id} is damaged: {reason}", hint=_HEAL, place=str(place))


def _is_taken(error: BaseException) -> bool:
    """Say whether a rename failed since somebody published the same name meanwhile."""
    return isinstance(error, FileExistsError) or (isinstance(error, OSError) and error.errno == errno.ENOTEMPTY)


def _plain(name: str, value: JSON) -> JSON:
    """Return a scalar as it will come back from JSON: lists for tuples, and no numpy numbers."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float) and value - value != 0:
        raise StoreError(f"state {name}: expected a finite number, got {value}")
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(name, child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, child) for child in value]
    raise StoreError(
        f"state {name}: expected numbers, text, lists or dictionaries with text keys, got {type(value).__name__}",
        hint="Keep arrays as tensors and convert other numbers with int() or float().",
    )
