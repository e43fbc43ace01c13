"""Where everything of one store lies. Pure: names are computed from numbers and digests, never from ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sisa.errors import UserError

HOLDOUT_SLICE = 0
"""Slice number under which the ledger and the records keep holdout rows; trained slices are 1..R.

Generation g, which `sisa add` brought, is slice R+g of each shard, and its held-out rows are slice -g.
"""


def is_held_out(slice_: int) -> bool:
    """Say whether a slice's rows are held out: those of the first ingest (0), or of a generation (below 0)."""
    return slice_ <= HOLDOUT_SLICE


def held_out_of(generation: int) -> int:
    """Return the slice number of the held-out rows of a generation; 0 is the first ingest.

    >>> held_out_of(0), held_out_of(2)
    (0, -2)
    """
    return HOLDOUT_SLICE - generation


def all_slices(*, slices: int, generations: int) -> range:
    """Return the numbers of all slices of a shard, held-out ones included, in ascending order.

    >>> list(all_slices(slices=3, generations=1))
    [-1, 0, 1, 2, 3]

    Args:
        slices: Trained slices, those of generations included.
        generations: How many generations were added.
    """
    return range(held_out_of(generations), slices + 1)


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
    def incoming(self) -> Path:
        """There while rows are being added or corrected; whoever finds it and nobody at work cleans up."""
        return self.root / "incoming"

    @property
    def corrections(self) -> Path:
        """Corrected rows between the acceptance of a request, after which their folder is called, and their merging."""
        return self.root / "corrections"

    def correction(self, request: str) -> Layout:
        """Where the rows of one correction wait, in partitions as they are in a store."""
        return Layout(self.corrections / request)

    @property
    def scratch(self) -> Path:
        """Where a replay retrains, and where rows wait for their batches; removed afterwards."""
        return self.root / "scratch"

    def waiting_rows(self, shard: int) -> Path:
        """Where rows of a shard wait for their batches while its stages train; nobody's but who holds its lock."""
        return self.scratch / f"rows-{shard:04d}"

    def partition(self, shard: int, slice_: int) -> Path:
        """The folder with the rows of one slice; 0 is this shard's part of the holdout, -g what generation g added."""
        if slice_ < HOLDOUT_SLICE:
            return self.records / "holdout" / f"generation={-slice_:02d}" / f"shard={shard:04d}"
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
