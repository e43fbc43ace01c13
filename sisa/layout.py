"""Where everything of one store lies; names are computed from numbers and digests, never from ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sisa.errors import StoreError, UserError
from sisa.files import TEMPORARY
from sisa.storage import Storage, is_remote, local_path, parse_address, storage_at

HOLDOUT_SLICE = 0
"""Slice number under which the ledger and the records keep holdout rows; trained slices are 1..R."""


RECIPE_KEY = "recipe.yaml"
"""Key of the frozen recipe, which says that a store is there."""
RECORDS_KEY = "records"
CHECKPOINTS_KEY = "checkpoints"
SCRATCH_KEY = "scratch"


@dataclass(frozen=True)
class Layout:
    """Names of the parts of one store.

    What has a key lies in the store's :attr:`storage`. What has a path lies on a local disk: all of a local store; of
    a store in object storage the ledger, the locks and what is spooled, in a folder of their own.
    """

    root: Path
    """The store's folder; of a store in object storage, the folder that its ledger lies in."""
    remote: str = ""
    """The URI of a store in object storage."""
    ledger_name: str = "ledger.db"

    @classmethod
    def at(cls, uri: str | Path, *, ledger: str | None = None) -> Layout:
        """Read a store URI: a path, ``file://`` before one, or ``s3://bucket/prefix``.

        Args:
            uri: Where the store lies.
            ledger: The file of its ledger, if it lies in object storage.

        Raises:
            UserError: Another kind of URI, or a ledger that doesn't fit it.
        """
        text = str(uri)
        if not is_remote(text):
            if ledger is not None:
                raise UserError(
                    f"ledger: the store {text!r} keeps its ledger itself, expected none",
                    hint="Leave it out; it is for stores in object storage.",
                )
            return cls(local_path(text))
        address = parse_address(text)
        if ledger is None:
            raise UserError(
                f"store {text!r}: a store in object storage needs a ledger beside it, none is named",
                hint="Set `ledger: /path/on/a/local/disk/ledger.db` in the recipe, in a folder of its own.",
            )
        if "://" in ledger.removeprefix("file://"):
            raise UserError(
                f"ledger {ledger!r}: expected a file on a local disk; other ledgers are not supported yet",
                hint="Set `ledger: /path/on/a/local/disk/ledger.db` in the recipe, in a folder of its own.",
            )
        path = local_path(ledger)
        return cls(path.parent, address.uri, path.name)

    @property
    def uri(self) -> str:
        """The store as a user names it."""
        return self.remote or str(self.root)

    @property
    def name(self) -> str:
        """The last part of its URI."""
        return self.uri.rpartition("/")[2]

    @property
    def storage(self) -> Storage:
        """Where what has a key lies."""
        return storage_at(self.uri)

    @property
    def recipe(self) -> Path:
        """The frozen recipe."""
        return self._local(RECIPE_KEY)

    @property
    def ledger(self) -> Path:
        """The SQLite ledger."""
        return self.root / self.ledger_name

    @property
    def records(self) -> Path:
        """The router's output."""
        return self._local(RECORDS_KEY)

    @property
    def checkpoints(self) -> Path:
        """The Zarr hierarchy of stages."""
        return self._local(CHECKPOINTS_KEY)

    @property
    def keys(self) -> Path:
        """Secrets, each in a file of mode 0600."""
        return self._local("keys")

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
        """Where a replay of a local store retrains; removed after it."""
        return self._local(SCRATCH_KEY)

    @property
    def spool(self) -> Path:
        """Where rows wait while they are sorted, on a local disk; removed after it."""
        return self.root / f"{TEMPORARY}records"

    def partition(self, shard: int, slice_: int) -> Path:
        """The folder with the rows of one slice of a local store."""
        return self._local(self.partition_key(shard, slice_))

    def partition_key(self, shard: int, slice_: int) -> str:
        """The prefix of the rows of one slice; ``slice_`` 0 is this shard's part of the holdout."""
        if slice_ == HOLDOUT_SLICE:
            return f"{RECORDS_KEY}/holdout/shard={shard:04d}"
        return f"{RECORDS_KEY}/shard={shard:04d}/slice={slice_:02d}"

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

    def _local(self, key: str) -> Path:
        """The path of what lies in the storage of a local store.

        Raises:
            StoreError: The store lies in object storage, where nothing has a path.
        """
        if self.remote:
            raise StoreError(f"{key} of the store {self.remote!r} lies in object storage: it has no path")
        return self.root / key
