"""Making and opening a store: its frozen recipe, its keys, its ledger and its checkpoints together.

``recipe.yaml`` is written last: a folder without it is not a store, whatever a crash left in it.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from sisa import remote
from sisa.checkpoints import Checkpoints, checkpoints_at
from sisa.errors import DamagedError, StoreError, UserError
from sisa.files import FileLock, make_folder, remove, sweep_temporary, write_durably
from sisa.layout import CHECKPOINTS_KEY, RECIPE_KEY, RECORDS_KEY, Layout
from sisa.ledger import STATES, Ledger
from sisa.recipe import Recipe, RoutingSpec, dump_recipe, recipe_digest
from sisa.routing.keys import StoreKeys, derive, new_key, parse_key
from sisa.routing.router import Router

PARTS = frozenset(
    {"recipe.yaml", "ledger.db", "ledger.db-journal", "records", "checkpoints", "keys", "locks", "scratch", "audit"}
)
"""What may lie directly in a store."""


@dataclass(frozen=True)
class OpenStore:
    """An open store. Belongs to one thread; close its ledger when done."""

    layout: Layout
    recipe: Recipe
    keys: StoreKeys
    ledger: Ledger
    checkpoints: Checkpoints

    @property
    def router(self) -> Router:
        """The router that put the records where they are."""
        return router_of(self.recipe, self.keys.routing)

    @property
    def recipe_digest(self) -> str:
        """Digest of what determines training."""
        return recipe_digest(self.recipe)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return self.recipe.sisa.shards

    @property
    def slices(self) -> int:
        """Number of slices of each shard."""
        return self.recipe.sisa.slices

    @property
    def classes(self) -> list[bool | int | str]:
        """The declared classes, in order."""
        return list(self.recipe.data.classes or [])

    def operation_lock(self) -> FileLock:
        """The lock of whatever trains, repairs or verifies: one at a time, deletions excepted."""
        return FileLock(self.layout.lock("operation"))

    def ingest_lock(self) -> FileLock:
        """The lock of the moment in which records enter."""
        return FileLock(self.layout.lock("ingest"))


def router_of(recipe: Recipe, routing_key: bytes) -> Router:
    """Make the router of a recipe."""
    return Router(
        routing_key,
        shards=recipe.sisa.shards,
        slices=recipe.sisa.slices,
        holdout_fraction=recipe.data.holdout.fraction,
    )


def is_store(layout: Layout) -> bool:
    """Say whether a store lies there."""
    return layout.storage.exists(RECIPE_KEY)


def open_store(layout: Layout) -> OpenStore:
    """Open the store at ``layout``.

    Raises:
        UserError: There is no store.
        DamagedError: A part of it is missing or unreadable.
    """
    try:
        recipe = remote.stored_recipe(layout.storage.read(RECIPE_KEY))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"store {layout.uri!r}: no store there (expected {'a prefix' if layout.remote else 'a folder'} with "
            "recipe.yaml)",
            hint="Give the path that `sisa train` wrote to.",
        ) from error
    except OSError as error:
        raise DamagedError(
            f"recipe.yaml of the store can't be read: {error.strerror}", hint="Give permission."
        ) from error
    if layout.remote:
        keys = remote.referenced_keys(recipe)
    else:
        keys = StoreKeys(routing=_stored_key(layout.routing_key), exclusion=_stored_key(layout.exclusion_key))
    ledger = Ledger.open(layout.ledger)
    if ledger.fact("recipe") != _seal(recipe):
        ledger.close()
        raise DamagedError(
            "recipe.yaml of the store was edited after training: its digest is not the one in the ledger",
            hint="Restore the file; to train under another recipe, train into another store.",
        )
    for name, key in (("routing_key", keys.routing), ("exclusion_key", keys.exclusion)):
        if ledger.fact(name) != key_check(key):
            ledger.close()
            where = (
                f"routing.{name.replace('routing_', '')}_file" if layout.remote else f"keys/{name.replace('_', '.')}"
            )
            raise DamagedError(
                f"{where} is not the key that this store was made with",
                hint="Restore the key file: under another key nobody is found who was deleted, and no record is placed.",
            )
    if layout.remote:
        try:
            remote.check_claim(layout, ledger.fact("claim"))
        except BaseException:
            ledger.close()
            raise
    return OpenStore(layout, recipe, keys, ledger, checkpoints_at(layout.uri, CHECKPOINTS_KEY))


def create_store(layout: Layout, recipe: Recipe, routing_key: bytes) -> OpenStore:
    """Make a store for a resolved recipe; what a killed attempt left is replaced.

    Args:
        layout: Where.
        recipe: The resolved recipe.
        routing_key: The secret that routes the records.

    Raises:
        UserError: The folder holds something else, or can't be made.
    """
    check_vacant(layout)
    if layout.remote:
        return _create_remote(layout, recipe)
    try:
        make_folder(layout.root)
        make_folder(layout.locks)
    except OSError as error:
        raise UserError(
            f"store {str(layout.root)!r}: the folder can't be made: {error.strerror}",
            hint="Choose a place that you may write to.",
        ) from error
    with FileLock(layout.lock("create")).held():
        if is_store(layout):
            return open_store(layout)
        if any(path.is_file() for path in layout.records.rglob("*")) or _ingested(layout):
            raise DamagedError(
                "recipe.yaml of the store is missing, but records were ingested",
                hint="Restore recipe.yaml from a copy: making the store anew would forget who was deleted.",
            )
        make_folder(layout.keys)
        os.chmod(layout.keys, 0o700)  # noqa: PTH101 - a folder of ours
        sweep_temporary(layout.keys)  # a killed attempt's keys
        write_durably(layout.routing_key, routing_key.hex().encode() + b"\n", mode=0o600)
        if not layout.exclusion_key.exists():
            write_durably(layout.exclusion_key, new_key().hex().encode() + b"\n", mode=0o600)
        for leftover in (layout.ledger, layout.ledger.with_name("ledger.db-journal"), layout.records):
            if leftover.exists():
                remove(leftover)
        ledger = Ledger.create(layout.ledger)
        ledger.remember(
            recipe=_seal(frozen_recipe(recipe)),
            routing_key=key_check(routing_key),
            exclusion_key=key_check(_stored_key(layout.exclusion_key)),
        )
        ledger.close()
        make_folder(layout.records)
        make_folder(layout.checkpoints)
        write_durably(layout.recipe, dump_recipe(frozen_recipe(recipe)).encode())
        sweep_temporary(layout.root)
    return open_store(layout)


def _create_remote(layout: Layout, recipe: Recipe) -> OpenStore:
    """Make a store in object storage, with its ledger beside it; the recipe is put last, and only if there is none."""
    keys = remote.new_keys(recipe)
    try:
        make_folder(layout.locks)
    except OSError as error:
        raise UserError(
            f"ledger: the folder {str(layout.root)!r} can't be made: {error.strerror}",
            hint="Choose a place that you may write to.",
        ) from error
    with FileLock(layout.lock("create")).held():
        if is_store(layout):
            return open_store(layout)
        if layout.storage.keys(RECORDS_KEY) or _ingested(layout):
            raise DamagedError(
                "recipe.yaml of the store is missing, but records were ingested",
                hint="Restore recipe.yaml from a copy: making the store anew would forget who was deleted.",
            )
        remote.probe(layout)
        for leftover in (layout.ledger, layout.ledger.with_name(f"{layout.ledger_name}-journal")):
            if leftover.exists():
                remove(leftover)
        layout.storage.remove_all(RECORDS_KEY)
        frozen, claim = remote.frozen(recipe, layout), remote.new_claim()
        ledger = Ledger.create(layout.ledger)
        ledger.remember(
            recipe=_seal(frozen),
            routing_key=key_check(keys.routing),
            exclusion_key=key_check(keys.exclusion),
            claim=claim,
        )
        ledger.close()
        remote.publish_recipe(layout, frozen, claim)
    return open_store(layout)


def _ingested(layout: Layout) -> bool:
    """Say whether a ledger lies there that closed its ingest; one that a crash left unfinished didn't."""
    if not layout.ledger.is_file() or not layout.ledger.stat().st_size:
        return False
    try:
        ledger = Ledger.open(layout.ledger)
    except DamagedError:
        return False
    try:
        return ledger.ingested
    finally:
        ledger.close()


def renew_exclusion_key(layout: Layout) -> None:
    """Replace the exclusion key by a new one: nobody can tell any more who was deleted, this program included.

    Killed half-way it leaves a store that doesn't open until this is run again.

    Raises:
        BusyError: Another operation holds the store.
        StoreError: A deletion is not erased yet: under another key its rows could not be told any more.
        DamagedError: The ledger is missing or damaged.
    """
    if layout.remote:
        raise UserError(
            "the exclusion key of a store in object storage is a file of yours: replacing it is not supported yet"
        )
    with FileLock(layout.lock("operation")).held(timeout_s=0):
        ledger = Ledger.open(layout.ledger)
        key = new_key()
        with ledger.database.transaction():
            waiting = [r.id for r in ledger.requests.open() if STATES.index(r.state) < STATES.index("rows_erased")]
            if waiting or any(partition.dirty for partition in ledger.partitions.all()):
                raise StoreError(
                    f"the rows of {', '.join(waiting) or 'a deletion'} are not erased yet: under another key they "
                    "could not be told any more",
                    hint="Run `sisa repair` first.",
                )
            write_durably(layout.exclusion_key, key.hex().encode() + b"\n", mode=0o600)
            ledger.remember(exclusion_key=key_check(key))
            ledger.database.note("exclusion_key_renewed")
        ledger.close()


def key_check(key: bytes) -> str:
    """Return what the ledger remembers of a key: enough to tell another one, nothing of this one."""
    return derive(key, "key-check").hex()


def _seal(recipe: Recipe) -> str:
    """Digest of everything that a store's recipe says, what doesn't determine training included."""
    return hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()


def frozen_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe as a store keeps it: without the store's own place and the key's."""
    return recipe.model_copy(update={"store": None, "routing": RoutingSpec()})


def check_vacant(layout: Layout) -> None:
    """Make sure that a new store may be made there.

    Raises:
        UserError: Something else lies there.
    """
    if layout.remote:
        remote.check_vacant(layout)
        return
    root = layout.root
    if root.exists() and not root.is_dir():
        raise UserError(f"store {str(root)!r}: expected a folder, found a file", hint="Choose another path.")
    above = next(folder for folder in root.parents if folder.exists())
    if not above.is_dir():
        raise UserError(
            f"store {str(root)!r}: {str(above)!r} is a file, expected a folder", hint="Choose another path."
        )
    strangers = (
        sorted(p.name for p in root.iterdir() if p.name not in PARTS and not p.name.startswith("tmp-"))
        if root.exists()
        else []
    )
    if strangers and not is_store(layout):
        raise UserError(
            f"store {str(root)!r}: the folder is not empty and not a store (it holds {strangers[0]!r})",
            hint="Choose an empty or a new folder.",
        )


def routing_key_for(recipe: Recipe, layout: Layout) -> bytes:
    """Return the routing key that a recipe asks for: its key file's, the store's, or a new one.

    Raises:
        UserError: The key file is unreadable, or is not the key that the store was made with.
    """
    if layout.remote:
        return remote.new_keys(recipe).routing
    stored = _stored_key(layout.routing_key) if layout.routing_key.exists() else None
    if recipe.routing.key_file is None:
        return stored or new_key()
    path = Path(recipe.routing.key_file)
    try:
        key = parse_key(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"routing.key_file {str(path)!r} can't be read: {error.strerror}",
            hint="Make one with: (umask 077; openssl rand -hex 32 > routing.key) -- or leave it null.",
        ) from error
    if stored is not None and is_store(layout) and stored != key:
        raise UserError(
            f"routing.key_file {str(path)!r} is not the key that this store was made with",
            hint="Another key moves every record: leave key_file null, or train into another store.",
        )
    return key


def _stored_key(path: Path) -> bytes:
    try:
        return parse_key(path.read_bytes())
    except (OSError, UserError) as error:
        raise DamagedError(
            f"keys/{path.name} of the store is missing or unreadable",
            hint="Restore the key file: without it records can be neither found nor placed.",
        ) from error
