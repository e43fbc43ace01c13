"""Where everything of one store lies. Pure: names are computed from numbers and digests, never from ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sisa.errors import UserError

HOLDOUT_SLICE = 0
"""Slice number under which the ledger and the records keep holdout rows; trained slices are 1..R."""


@dataclass(frozen=True)
class Layout:
    """Paths of the parts of the store at ``root``."""

    root: Path

    @classmethod
    def at(cls, uri: str | Path) -> Layout:
        """Read a store URI: a path, or ``file://`` before one.

        Raises:
            UserError: Another kind of URI.
        """
        text = str(uri)
        if text.startswith("file://"):
            text = text[len("file://") :]
        elif "://" in text:
            raise UserError(
                f"store {text!r}: expected a local path or file://, object storage is not supported yet",
                hint="Give a path on a local or shared disk.",
            )
        if not text:
            raise UserError("store: expected a path, got an empty text", hint="Give --store PATH.")
        return cls(Path(text).absolute())

    @property
    def recipe(self) -> Path:
        """The frozen recipe."""
        return self.root / "recipe.yaml"

    @property
    def ledger(self) -> Path:
        """The SQLite ledger."""
        return self.root / "ledger.db"

    @property
    def records(self) -> Path:
        """The router's output."""
        return self.root / "records"

    @property
    def checkpoints(self) -> Path:
        """The Zarr hierarchy of stages."""
        return self.root / "checkpoints"

    @property
    def keys(self) -> Path:
        """Secrets, each in a file of mode 0600."""
        return self.root / "keys"

    @property
    def routing_key(self) -> Path:
        """The key behind routing, order and digests."""
        return self.keys / "routing.key"

    @property
    def exclusion_key(self) -> Path:
        """The key behind the digests that remember who was deleted; destroying it forgets them."""
        return self.keys / "exclusion.key"

    @property
    def locks(self) -> Path:
        """Advisory locks; empty of meaning when no process is alive."""
        return self.root / "locks"

    @property
    def scratch(self) -> Path:
        """Where a replay retrains; removed after it."""
        return self.root / "scratch"

    def partition(self, shard: int, slice_: int) -> Path:
        """The folder with the rows of one slice; ``slice_`` 0 is this shard's part of the holdout."""
        if slice_ == HOLDOUT_SLICE:
            return self.records / "holdout" / f"shard={shard:04d}"
        return self.records / f"shard={shard:04d}" / f"slice={slice_:02d}"

    def lock(self, name: str) -> Path:
        """The lock file called ``name``."""
        return self.locks / f"{name}.lock"

    def shard_lock(self, shard: int) -> Path:
        """Held by whoever trains, or purges, stages of this shard."""
        return self.lock(f"shard-{shard:04d}")

    def rows_lock(self, shard: int) -> Path:
        """Held for the moment in which rows of this shard are rewritten."""
        return self.lock(f"rows-{shard:04d}")

    def stop_marks(self, shard: int) -> Path:
        """A folder: while a file lies in it, one per deletion, training of this shard stops at its next step."""
        return self.locks / f"stop-{shard:04d}"
