"""Where everything of one store lies; names are computed from numbers and digests, never from ids."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from sisa.errors import StoreError, UserError
from sisa.files import TEMPORARY
from sisa.storage import Storage, is_remote, local_path, parse_address, storage_at

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


ON_A_SERVER = ("postgresql://", "postgres://")
"""How the URL of a ledger on a server begins."""
RECIPE_KEY = "recipe.yaml"
"""Key of the frozen recipe, which says that a store is there."""
RECORDS_KEY = "records"
CHECKPOINTS_KEY = "checkpoints"
SCRATCH_KEY = "scratch"
INCOMING_KEY = "incoming"
"""Below it lies a mark of whoever is adding or correcting rows."""
CORRECTIONS_KEY = "corrections"


@dataclass(frozen=True)
class Layout:
    """Names of the parts of one store.

    What has a key lies in the store's :attr:`storage`. What has a path lies on a local disk: all of a local store; of
    a store in object storage the ledger, the locks and what is spooled, in a folder of their own.
    """

    root: Path
    """The store's folder. Of a store in object storage the folder that its ledger lies in; or, if that is on a server,
    where this host spools rows while it sorts them."""
    remote: str = ""
    """The URI of a store in object storage."""
    ledger_name: str = "ledger.db"
    shared: bool = True
    """Whether ``root`` is one folder for all processes of the store. Else, beside a ledger on a server, each host has its own."""
    within: str = ""
    """Prefix of the store's storage, with a slash at its end, below which its records lie."""

    @classmethod
    def at(cls, uri: str | Path, *, ledger: str | None = None) -> Layout:
        """Read a store URI: a path, ``file://`` before one, or ``s3://bucket/prefix``.

        Args:
            uri: Where the store lies.
            ledger: Where its ledger lies: a file, if the store lies in object storage; or on a server.

        Raises:
            UserError: Another kind of URI, or a ledger that doesn't fit it.
        """
        text = str(uri)
        on_server = ledger is not None and ledger.startswith(ON_A_SERVER)
        if not is_remote(text):
            if ledger is not None and not on_server:
                raise UserError(
                    "ledger: expected a URL that begins with postgresql://, for a store in a folder",
                    hint="Leave the field out for the embedded ledger, a SQLite file in the store.",
                )
            return cls(local_path(text))
        address = parse_address(text)
        if on_server:
            return cls(_spool_of(address.uri), address.uri, shared=False)
        if ledger is None:
            raise UserError(
                f"store {text!r}: a store in object storage needs a ledger beside it, none is named",
                hint="Set `ledger: /path/on/a/local/disk/ledger.db`, in a folder of its own, or a postgresql:// URL.",
            )
        if "://" in ledger.removeprefix("file://"):
            raise UserError(
                "ledger: expected a file on a local disk, or a URL that begins with postgresql://",
                hint="Set `ledger: /path/on/a/local/disk/ledger.db` in the recipe, in a folder of its own.",
            )
        path = local_path(ledger)
        return cls(path.parent, address.uri, path.name)

    def here(self) -> Layout:
        """Return the same store as a process of this host sees it."""
        return self if self.shared else replace(self, root=_spool_of(self.remote))

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
    def incoming(self) -> Path:
        """A folder that is there while rows are being added or corrected, and where they are spooled.

        Of a store in object storage on a local disk, and for moments only: what says there that somebody is at work is
        an object.
        """
        return self.root / INCOMING_KEY

    @property
    def corrections(self) -> Path:
        """Corrected rows of a local store, in folders called after their requests, until they are merged."""
        return self._local(CORRECTIONS_KEY)

    def correction_key(self, request: str) -> str:
        """The prefix below which the rows of one correction wait."""
        return f"{CORRECTIONS_KEY}/{request}"

    def correction(self, request: str) -> Layout:
        """Where the rows of one correction wait, in partitions as they are in a store."""
        return replace(self, within=f"{self.correction_key(request)}/")

    @property
    def scratch(self) -> Path:
        """Where a replay of a local store retrains; removed afterwards."""
        return self._local(SCRATCH_KEY)

    @property
    def spool(self) -> Path:
        """Where rows wait while they are sorted, on a local disk; removed after it."""
        return self.root / f"{TEMPORARY}records"

    def waiting_rows(self, shard: int) -> Path:
        """Where rows of a shard wait for their batches while its stages train; nobody's but who holds its lock.

        On a local disk always: in the scratch area of a store in a folder, or of the folder that belongs to one in object
        storage.
        """
        return self.waiting_area / f"rows-{shard:04d}"

    @property
    def waiting_area(self) -> Path:
        """What holds the places where rows of shards wait."""
        return self.root / SCRATCH_KEY

    def partition(self, shard: int, slice_: int) -> Path:
        """The folder with the rows of one slice of a local store."""
        return self._local(self.partition_key(shard, slice_))

    def partition_key(self, shard: int, slice_: int) -> str:
        """The prefix of the rows of one slice; 0 is this shard's part of the holdout, -g what generation g added."""
        records = f"{self.within}{RECORDS_KEY}"
        if slice_ < HOLDOUT_SLICE:
            return f"{records}/holdout/generation={-slice_:02d}/shard={shard:04d}"
        if slice_ == HOLDOUT_SLICE:
            return f"{records}/holdout/shard={shard:04d}"
        return f"{records}/shard={shard:04d}/slice={slice_:02d}"

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


def _spool_of(uri: str) -> Path:
    """Return a folder of this user's, on this host, for what belongs to the store at ``uri``."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "sisa" / hashlib.sha256(uri.encode()).hexdigest()[:16]
