"""What is different about a store in object storage: its keys are references, and its ledger lies elsewhere.

The recipe that such a store keeps says where key files and ledger are, and ends with a claim: a random text that the
ledger knows too, so that no other ledger, of another host or of another store, can be taken for its own.
"""

from __future__ import annotations

import secrets
import stat
from pathlib import Path
from typing import Final

from sisa.errors import DamagedError, RecipeError, StoreError, UserError
from sisa.layout import (
    CHECKPOINTS_KEY,
    CORRECTIONS_KEY,
    INCOMING_KEY,
    RECIPE_KEY,
    RECORDS_KEY,
    SCRATCH_KEY,
    Layout,
)
from sisa.recipe import Recipe, RoutingSpec, dump_recipe, read_recipe
from sisa.routing.keys import StoreKeys, parse_key
from sisa.storage import is_remote, local_path, object_storage_at, parse_address

KEYS: Final = frozenset({RECIPE_KEY, RECORDS_KEY, CHECKPOINTS_KEY, SCRATCH_KEY, INCOMING_KEY, CORRECTIONS_KEY, "audit"})
"""What a key of a store may begin with."""
_CLAIM = "# claim: "
_MAKE_KEY = "Make one with: (umask 077; openssl rand -hex 32 > exclusion.key)"


def locate(uri: str | Path) -> Layout:
    """Find the store at ``uri``; one in object storage says itself where its ledger lies.

    Raises:
        UserError: The URI can't be used, or there is no store.
        DamagedError: The recipe of the store can't be used.
        StoreError: Object storage doesn't answer.
    """
    if not is_remote(str(uri)):
        return Layout.at(uri)
    address = parse_address(str(uri))
    try:
        content = object_storage_at(address.uri).read(RECIPE_KEY)
    except FileNotFoundError as error:
        raise UserError(
            f"store {address.uri!r}: no store there (expected an object {RECIPE_KEY} below that prefix)",
            hint="Give the URI that `sisa train` wrote to.",
        ) from error
    return Layout.at(address.uri, ledger=stored_recipe(content).ledger)


def layout_for(place: str | Path, recipe: Recipe) -> Layout:
    """Return where a training with ``recipe`` shall write, to a store that is there or a new one.

    Raises:
        RecipeError: A store in object storage needs fields that are missing.
        UserError: The URI can't be used; or a store is there, with another ledger.
        StoreError: Object storage doesn't answer.
    """
    if not is_remote(str(place)):
        if recipe.routing.exclusion_key_file is not None:
            raise RecipeError(
                ["routing.exclusion_key_file: a store in a folder makes that key itself, expected nothing"],
                hint="Leave it out; it is for stores in object storage.",
            )
        return Layout.at(place, ledger=recipe.ledger)
    wanted = {
        "ledger": recipe.ledger,
        "routing.key_file": recipe.routing.key_file,
        "routing.exclusion_key_file": recipe.routing.exclusion_key_file,
    }
    missing = [f"{name}: missing; a store in object storage needs it" for name, value in wanted.items() if not value]
    if missing:
        raise RecipeError(
            missing,
            hint="Nothing secret is kept in a bucket: name key files (mode 0600), and a ledger on a local disk, in a folder of "
            f"its own. {_MAKE_KEY}",
        )
    layout = Layout.at(place, ledger=recipe.ledger)
    if layout.storage.exists(RECIPE_KEY):
        there = locate(place)
        if there.ledger != layout.ledger:
            raise UserError(
                f"ledger: the ledger of the store {there.uri!r} is {str(there.ledger)!r}, got {str(layout.ledger)!r}",
                hint="Name that one: another would know nothing of who was deleted.",
            )
    return layout


def check_vacant(layout: Layout) -> None:
    """Make sure that a new store may be made there.

    Raises:
        UserError: Something else lies below the prefix, or in the folder of the ledger.
    """
    if layout.storage.exists(RECIPE_KEY):
        return
    strangers = sorted({key.split("/")[0] for key in layout.storage.keys("")} - KEYS)
    if strangers:
        raise UserError(
            f"store {layout.uri!r}: the prefix is not empty and not a store (it holds {strangers[0]!r})",
            hint="Choose an empty or a new prefix.",
        )
    root = layout.root
    if root.exists() and not root.is_dir():
        raise UserError(f"ledger: {str(root)!r} is a file, expected a folder", hint="Choose another path.")
    beside = sorted(p.name for p in root.iterdir() if not is_beside(layout, p.name)) if root.exists() else []
    if beside:
        raise UserError(
            f"ledger: {str(root)!r} holds {beside[0]!r}; the ledger, its locks and what is spooled need a folder of their own",
            hint="Name a file in a new folder.",
        )


def is_beside(layout: Layout, name: str) -> bool:
    """Say whether ``name`` may lie in the folder of the ledger."""
    parts = {
        layout.ledger_name,
        f"{layout.ledger_name}-journal",
        "locks",
        layout.incoming.name,
        layout.waiting_area.name,
    }
    return name in parts or name.startswith("tmp-")


def probe(layout: Layout) -> None:
    """Try out whether the bucket can keep what a store promises, and sweep what a killed attempt left.

    Raises:
        UserError: It can't.
        StoreError: It doesn't answer.
    """
    from sisa.storage.probe import probe as try_out

    storage = object_storage_at(layout.uri)
    try_out(storage)
    storage.sweep("")


def frozen(recipe: Recipe, *, ledger: str) -> Recipe:
    """Return the recipe as the store keeps it: with references to its keys and its ledger, whole paths."""
    routing = RoutingSpec(
        key_file=_whole(recipe.routing.key_file), exclusion_key_file=_whole(recipe.routing.exclusion_key_file)
    )
    return recipe.model_copy(update={"store": None, "ledger": ledger, "routing": routing})


def new_claim() -> str:
    """Return a claim that nobody else has."""
    return secrets.token_hex(16)


def recipe_text(recipe: Recipe, claim: str) -> bytes:
    """Return what the store keeps of a frozen recipe."""
    return f"{dump_recipe(recipe)}{_CLAIM}{claim}\n".encode()


def publish_recipe(layout: Layout, recipe: Recipe, claim: str) -> None:
    """Put the frozen recipe, which makes it a store; of two that do so at once, one does.

    Raises:
        StoreError: Another command made a store there.
    """
    text = recipe_text(recipe, claim)
    if not layout.storage.put_new(RECIPE_KEY, text) and layout.storage.read(RECIPE_KEY) != text:
        raise StoreError(
            f"store {layout.uri!r}: another command has just made a store there",
            hint="Use that one, with its ledger; or choose another prefix.",
        )


def stored_recipe(content: bytes) -> Recipe:
    """Read the recipe of a store.

    Raises:
        DamagedError: It can't be used.
    """
    try:
        return read_recipe(content.decode(), source=RECIPE_KEY)
    except (UserError, UnicodeDecodeError) as error:
        reason = error.message if isinstance(error, UserError) else "it is not a text"
        raise DamagedError(
            f"recipe.yaml of the store can't be used: {reason}",
            hint="The recipe of a store is frozen: restore the file that `sisa train` wrote.",
        ) from error


def check_claim(layout: Layout, claim: str | None) -> None:
    """Make sure that the ledger is this store's own.

    Raises:
        DamagedError: It is another's.
    """
    last = layout.storage.read(RECIPE_KEY).decode(errors="replace").splitlines()[-1:]
    if claim is None or last != [f"{_CLAIM}{claim}"]:
        raise DamagedError(
            f"the ledger is not that of the store {layout.uri!r}, or recipe.yaml was edited",
            hint="Use the ledger that the store was made with: another knows nothing of who was deleted.",
        )


def referenced_keys(recipe: Recipe) -> StoreKeys:
    """Read the key files that a store's recipe names.

    Raises:
        DamagedError: One can't be read.
    """
    return StoreKeys(
        routing=_key("routing.key_file", recipe.routing.key_file, DamagedError),
        exclusion=_key("routing.exclusion_key_file", recipe.routing.exclusion_key_file, DamagedError),
    )


def new_keys(recipe: Recipe) -> StoreKeys:
    """Read the key files for a store that is to be made.

    Raises:
        UserError: One can't be read, everybody may read it, or both are the same.
    """
    routing, exclusion = recipe.routing.key_file, recipe.routing.exclusion_key_file
    keys = StoreKeys(
        routing=_key("routing.key_file", routing, UserError),
        exclusion=_key("routing.exclusion_key_file", exclusion, UserError),
    )
    for name, path in (("routing.key_file", routing), ("routing.exclusion_key_file", exclusion)):
        problem = open_to_all(Path(path or ""))
        if problem:
            raise UserError(f"{name}: {problem}", hint=f"chmod 600 {path}")
    if keys.routing == keys.exclusion:
        raise UserError(
            "routing.exclusion_key_file: it holds the key of routing.key_file, expected another: destroying one must "
            "leave the other",
            hint=_MAKE_KEY,
        )
    return keys


def open_to_all(path: Path) -> str:
    """Say what is wrong with the mode of a key file, if everybody on the machine may use it.

    A secret that a cluster mounts belongs to a group; others have no business with it.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    return f"{str(path)!r} has mode {mode:04o}, expected 0600: everybody can read the secret" if mode & 0o007 else ""


def _key(name: str, path: str | None, kind: type[UserError | StoreError]) -> bytes:
    try:
        return parse_key(local_path(path or "").read_bytes())
    except OSError as error:
        raise kind(
            f"{name} {path!r} can't be read: {error.strerror}",
            hint=f"Restore the key file, or make one for a new store. {_MAKE_KEY}",
        ) from error
    except UserError as error:
        raise kind(f"{name} {path!r} can't be used: {error.message}", hint=error.hint) from error


def _whole(path: str | None) -> str | None:
    return str(local_path(path)) if path else None
