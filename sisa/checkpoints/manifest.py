"""What a stage is called and what is remembered about it.

Pure. The attributes of a stage's group hold its manifest, the index of its tensors and a digest over all of
that, so that no number in them can change unseen. Names are computed from numbers and digests, never from ids.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sisa.errors import StoreError
from sisa.state import JSON

FORMAT: Final = 1
"""Number of this format of a stage's group; a reader refuses others."""

_KEY = re.compile(r"[0-9a-f]{64}")
_PLATFORM = re.compile(r"[0-9a-f]{12}")
_SHARD_NAME = re.compile(r"shard-(\d{4,})")
_STAGE_NAME = re.compile(r"stage-(\d{2,})-([0-9a-f]{64})\.([0-9a-f]{12})")


@dataclass(frozen=True, order=True)
class StageId:
    """The name of one stage; sorts by shard, stage, key, platform.

    Raises:
        StoreError: A part that isn't what it should be (a name becomes a path: nothing else may get in).
    """

    shard: int
    """0..S-1."""
    stage: int
    """1..R; stage 0, the absent one, is never stored."""
    key: str
    """The lineage key, 64 hex digits."""
    platform: str
    """The platform fingerprint's id, 12 hex digits."""

    def __post_init__(self) -> None:
        if self.shard < 0 or self.stage < 1 or not _KEY.fullmatch(self.key) or not _PLATFORM.fullmatch(self.platform):
            raise StoreError(f"expected a shard >= 0, a stage >= 1, a key and a platform in hex, got {self!r}")

    @property
    def folder(self) -> str:
        """The stage's path below the root, ``shard-0003/stage-02-<key>.<platform>``."""
        return f"{shard_folder(self.shard)}/stage-{self.stage:02d}-{self.key}.{self.platform}"

    def __str__(self) -> str:
        return f"stage {self.stage} of shard {self.shard}"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known about a stage without reading its state."""

    stage_id: StageId
    parent_key: str
    """Lineage key of the stage before, empty for the first."""
    records: int
    """Records of slices 1..r."""
    state_digest: str
    full_digest: str
    bytes: int
    """Bytes of all tensors."""
    created_at: str
    """UTC, ISO 8601."""
    seconds: float
    """How long the training of this stage took."""
    worker: str
    """``host:pid`` of the process that trained it."""
    fingerprint: dict[str, JSON]
    """The platform that it was trained on."""
    epochs: int | None = None
    """Passes over these records in this stage; None if not told."""
    steps: int | None = None
    """Steps of the optimiser in this stage; None if not told."""

    def to_json(self) -> dict[str, JSON]:
        """Return plain data, the parts of the id beside the rest."""
        content: dict[str, JSON] = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "stage_id"
        }
        return {**dataclasses.asdict(self.stage_id), **content}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Manifest:
        """Read :meth:`to_json` back.

        Raises:
            ValueError: A field is missing, unknown or of another type.
        """
        fields = dict(content)
        try:
            stage_id = StageId(**{name: fields.pop(name) for name in ("shard", "stage", "key", "platform")})
            return cls(stage_id=stage_id, **fields)
        except (KeyError, TypeError, StoreError) as error:
            raise ValueError(f"not a manifest: {error}") from error


def sealed(content: Mapping[str, JSON]) -> dict[str, JSON]:
    """Return ``content`` with the digest over it."""
    return {**content, "digest": _seal(content)}


def unsealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what :func:`sealed` was given.

    Raises:
        ValueError: The digest isn't that of the content.
    """
    rest = {name: value for name, value in content.items() if name != "digest"}
    if content.get("digest") != _seal(rest):
        raise ValueError("its digest is not that of its content")
    return rest


def shard_folder(shard: int) -> str:
    """Return the name of a shard's folder."""
    return f"shard-{shard:04d}"


def parse_shard(name: str) -> int | None:
    """Return the shard whose folder is called ``name``, or None."""
    match = _SHARD_NAME.fullmatch(name)
    return int(match[1]) if match and shard_folder(int(match[1])) == name else None


def parse_stage(shard: int, name: str) -> StageId | None:
    """Return the stage of ``shard`` whose folder is called ``name``, or None."""
    match = _STAGE_NAME.fullmatch(name)
    if match is None or int(match[1]) < 1:
        return None
    stage_id = StageId(shard=shard, stage=int(match[1]), key=match[2], platform=match[3])
    return stage_id if stage_id.folder == f"{shard_folder(shard)}/{name}" else None


def _seal(content: Mapping[str, JSON]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(b"sisa-stage-manifest\0" + text.encode()).hexdigest()
