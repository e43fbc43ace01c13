"""Which form a ledger has, told without importing what makes it: Alembic is needed only when that has to change.

The form is a numbered revision, written into the ledger itself by the migration that made it. A ledger of another
revision is refused when it is opened; an older one is brought forward by ``sisa migrate``.
"""

from __future__ import annotations

from sisa.errors import DamagedError, StoreError

REVISION = "0001"
"""The form that this release reads and writes."""
REVISION_OF = "SELECT version_num FROM alembic_version"


def check_revision(found: str | None, what: str) -> None:
    """Make sure that a ledger has this release's form.

    Raises:
        StoreError: It has an older or a newer one.
        DamagedError: It has none.
    """
    if found == REVISION:
        return
    if found is None or not found.isdecimal():
        raise DamagedError(
            f"{what}: expected schema {REVISION}, found none", hint="Restore the ledger from a copy of this store's."
        )
    if int(found) > int(REVISION):
        raise StoreError(
            f"{what} has schema {found}, from a newer release; this one knows {REVISION} and older ones",
            hint="Use the release that made or migrated the store, or a newer one.",
        )
    raise StoreError(
        f"{what} has schema {found}, from an older release; this one needs {REVISION}",
        hint="End every command and server of older releases, make a backup, then run `sisa migrate`.",
    )


def check_migratable(found: str | None, what: str) -> None:
    """Make sure that a ledger has this release's form, or an older one.

    Raises:
        StoreError: It has a newer one.
        DamagedError: It has none.
    """
    if found is None or not found.isdecimal() or int(found) > int(REVISION):
        check_revision(found, what)
