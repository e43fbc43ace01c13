"""Making and opening a store: its frozen recipe, its keys, its ledger and its checkpoints together.

``recipe.yaml`` is written last: a folder without it is not a store, whatever a crash left in it. A ledger on a server
lies in a schema whose name derives from the exclusion key, which is there before it: a second attempt finds, and
replaces, what the first has left.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from sisa import remote
from sisa.checkpoints import Checkpoints, checkpoints_at
from sisa.coordination import Coordination, Lock, coordination_at
from sisa.errors import DamagedError, StoreError, UserError
from sisa.files import make_folder, remove, sweep_temporary, write_durably
from sisa.layout import CHECKPOINTS_KEY, RECIPE_KEY, RECORDS_KEY, Layout, all_slices
from sisa.ledger import REVISION, STATES, Ledger, Place, PostgresPlace, place_of
from sisa.recipe import Recipe, RoutingSpec, dump_recipe, recipe_digest
from sisa.routing.keys import StoreKeys, derive, new_key, parse_key
from sisa.routing.router import Router

PARTS = frozenset(
    {
        "recipe.yaml",
        "ledger.db",
        "ledger.db-journal",
        "records",
        "checkpoints",
        "keys",
        "locks",
        "scratch",
        "incoming",
        "corrections",
        "audit",
    }
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
    coordination: Coordination

    def close(self) -> None:
        """Close the ledger, and what locks and marks have open."""
        self.ledger.close()
        self.coordination.close()

    @property
    def place(self) -> Place:
        """Where the ledger lies."""
        return place_of(self.recipe.ledger, self.layout.ledger)

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
        """Number of slices of each shard now: the recipe's R, and one for each generation that was added."""
        return self.recipe.sisa.slices + self.generations

    @property
    def generations(self) -> int:
        """How many generations were added; read from the ledger, and constant only under the operation lock."""
        return self.ledger.generations.count()

    @property
    def all_slices(self) -> range:
        """Numbers of all slices of a shard, those of held-out rows (0 and below) included."""
        generations = self.generations
        return all_slices(slices=self.recipe.sisa.slices + generations, generations=generations)

    @property
    def classes(self) -> list[bool | int | str]:
        """The declared classes, in order."""
        return list(self.recipe.data.classes or [])

    def operation_lock(self) -> Lock:
        """The lock of whatever trains, repairs or verifies: one at a time, deletions excepted."""
        return self.coordination.lock("operation")

    def incoming_lock(self) -> Lock:
        """The lock of whoever is writing rows that the ledger doesn't expect yet."""
        return self.coordination.lock("incoming")

    def ingest_lock(self) -> Lock:
        """The lock of the moment in which records enter."""
        return self.coordination.lock("ingest")


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


def _stored_recipe(layout: Layout) -> Recipe:
    """Read the frozen recipe.

    Raises:
        UserError: There is no store.
        DamagedError: The recipe can't be used.
    """
    try:
        return remote.stored_recipe(layout.storage.read(RECIPE_KEY))
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


def open_store(layout: Layout) -> OpenStore:
    """Open the store at ``layout``.

    Raises:
        UserError: There is no store.
        DamagedError: A part of it is missing or unreadable.
        StoreError: The ledger's server can't be reached, or the ledger has the form of another release.
    """
    recipe = _stored_recipe(layout)
    if layout.remote:
        keys = remote.referenced_keys(recipe)
    else:
        keys = StoreKeys(routing=_stored_key(layout.routing_key), exclusion=_stored_key(layout.exclusion_key))
    place = place_of(recipe.ledger, layout.ledger)
    ledger = Ledger.open(place)
    try:
        _check_belongs(layout, recipe, keys, ledger)
    except BaseException:
        ledger.close()
        raise
    checkpoints = checkpoints_at(layout.uri, CHECKPOINTS_KEY)
    return OpenStore(layout, recipe, keys, ledger, checkpoints, coordination_at(layout, place))


def _check_belongs(layout: Layout, recipe: Recipe, keys: StoreKeys, ledger: Ledger) -> None:
    """Make sure that recipe, keys and ledger are those of one store.

    Raises:
        DamagedError: They aren't.
    """
    if ledger.fact("recipe") != _seal(recipe):
        raise DamagedError(
            "recipe.yaml of the store was edited after training: its digest is not the one in the ledger",
            hint="Restore the file; to train under another recipe, train into another store.",
        )
    for name, key in (("routing_key", keys.routing), ("exclusion_key", keys.exclusion)):
        if ledger.fact(name) != key_check(key):
            where = (
                f"routing.{name.replace('routing_', '')}_file" if layout.remote else f"keys/{name.replace('_', '.')}"
            )
            raise DamagedError(
                f"{where} is not the key that this store was made with",
                hint="Restore the key file: under another key nobody is found who was deleted, and no record is placed.",
            )
    if layout.remote:
        remote.check_claim(layout, ledger.fact("claim"))


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
        if recipe.ledger is None:
            make_folder(layout.locks)
    except OSError as error:
        raise UserError(
            f"store {str(layout.root)!r}: the folder can't be made: {error.strerror}",
            hint="Choose a place that you may write to.",
        ) from error
    asked = place_of(recipe.ledger, layout.ledger)
    with _creation(layout, asked).held():
        if is_store(layout):
            return open_store(layout)
        if any(path.is_file() for path in layout.records.rglob("*")) or _ingested(asked):
            raise DamagedError(
                "recipe.yaml of the store is missing, but records were ingested",
                hint="Restore recipe.yaml from a copy: making the store anew would forget who was deleted.",
            )
        _make_keys(layout, routing_key)
        for leftover in (layout.ledger, layout.ledger.with_name("ledger.db-journal"), layout.records):
            if leftover.exists():
                remove(leftover)
        exclusion_key = _stored_key(layout.exclusion_key)
        place = _own_place(asked, exclusion_key)
        frozen = frozen_recipe(recipe, place)
        Ledger.create(
            place,
            recipe=_seal(frozen),
            routing_key=key_check(routing_key),
            exclusion_key=key_check(exclusion_key),
        ).close()
        make_folder(layout.records)
        make_folder(layout.checkpoints)
        write_durably(layout.recipe, dump_recipe(frozen).encode())
        sweep_temporary(layout.root)
    return open_store(layout)


def _create_remote(layout: Layout, recipe: Recipe) -> OpenStore:
    """Make a store in object storage, with its ledger elsewhere; the recipe is put last, and only if there is none."""
    keys = remote.new_keys(recipe)
    asked = place_of(recipe.ledger, layout.ledger)
    try:
        make_folder(layout.root)
        if not isinstance(asked, PostgresPlace):
            make_folder(layout.locks)
    except OSError as error:
        raise UserError(
            f"ledger: the folder {str(layout.root)!r} can't be made: {error.strerror}",
            hint="Choose a place that you may write to.",
        ) from error
    with _creation(layout, asked).held():
        if is_store(layout):
            return open_store(layout)
        if layout.storage.keys(RECORDS_KEY) or _ingested(asked):
            raise DamagedError(
                "recipe.yaml of the store is missing, but records were ingested",
                hint="Restore recipe.yaml from a copy: making the store anew would forget who was deleted.",
            )
        remote.probe(layout)
        for leftover in (layout.ledger, layout.ledger.with_name(f"{layout.ledger_name}-journal")):
            if leftover.exists():
                remove(leftover)
        layout.storage.remove_all(RECORDS_KEY)
        place = _own_place(asked, keys.exclusion)
        frozen, claim = remote.frozen(recipe, ledger=_text(place)), remote.new_claim()
        Ledger.create(
            place,
            recipe=_seal(frozen),
            routing_key=key_check(keys.routing),
            exclusion_key=key_check(keys.exclusion),
            claim=claim,
        ).close()
        remote.publish_recipe(layout, frozen, claim)
    return open_store(layout)


def _text(place: Place) -> str:
    return place.text if isinstance(place, PostgresPlace) else str(place)


def _creation(layout: Layout, place: Place) -> Lock:
    """The lock of whoever makes the store; a server that has no schema for it yet knows it by where the store lies."""
    if isinstance(place, PostgresPlace):
        place = place.of("")
        return coordination_at(layout, place).lock(f"create/{layout.uri}")
    return coordination_at(layout, place).lock("create")


def _make_keys(layout: Layout, routing_key: bytes) -> None:
    make_folder(layout.keys)
    os.chmod(layout.keys, 0o700)  # noqa: PTH101 - a folder of ours
    sweep_temporary(layout.keys)  # a killed attempt's keys
    write_durably(layout.routing_key, routing_key.hex().encode() + b"\n", mode=0o600)
    if not layout.exclusion_key.exists():
        write_durably(layout.exclusion_key, new_key().hex().encode() + b"\n", mode=0o600)


def _own_place(place: Place, exclusion_key: bytes) -> Place:
    """Return where this store's ledger lies: on a server in a schema of its own, whatever the recipe was copied from."""
    if isinstance(place, PostgresPlace):
        return place.of(f"sisa_{derive(exclusion_key, 'ledger-schema').hex()[:32]}")
    return place


def _ingested(place: Place) -> bool:
    """Say whether a ledger lies there that closed its ingest; one that a crash left unfinished didn't.

    A ledger on a server answers that itself when it is made anew.
    """
    if isinstance(place, PostgresPlace) or not place.is_file() or not place.stat().st_size:
        return False
    try:
        ledger = Ledger.open(place)
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
    place = place_of(_stored_recipe(layout).ledger, layout.ledger)
    with coordination_at(layout, place).lock("operation").held(timeout_s=0):
        ledger = Ledger.open(place)
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


def migrate_ledger(layout: Layout) -> str:
    """Bring the ledger of an older release to this one's form, and say which that is.

    Raises:
        UserError: There is no store.
        BusyError: Another operation holds the store.
        StoreError: The ledger is missing or damaged, or a newer release's.
    """
    recipe = _stored_recipe(layout)
    place = place_of(recipe.ledger, layout.ledger)
    with coordination_at(layout, place).lock("operation").held(timeout_s=0):
        Ledger.migrate(place)
    Ledger.open(place).close()
    return REVISION


def key_check(key: bytes) -> str:
    """Return what the ledger remembers of a key: enough to tell another one, nothing of this one."""
    return derive(key, "key-check").hex()


def _seal(recipe: Recipe) -> str:
    """Digest of everything that a store's recipe says, what doesn't determine training included.

    Not where the ledger lies: a database may move, and which ledger is the store's own is told by this digest in it.
    """
    return hashlib.sha256(dump_recipe(recipe.model_copy(update={"ledger": None})).encode()).hexdigest()


def frozen_recipe(recipe: Recipe, place: Place) -> Recipe:
    """Return the recipe as a store keeps it: without the store's own place and the key's, and with the ledger's."""
    ledger = place.text if isinstance(place, PostgresPlace) else None
    return recipe.model_copy(update={"store": None, "routing": RoutingSpec(), "ledger": ledger})


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
