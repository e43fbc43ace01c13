"""Trying out whether a bucket keeps the promises that a store rests on, before anything is stored.

What is refused: a server that ignores ``If-None-Match`` (two could make one stage), a bucket with object lock (nothing
could be erased), and credentials that may not list or erase versions (nothing could be proven to be gone).
"""

from __future__ import annotations

import secrets

from botocore.exceptions import BotoCoreError, ClientError

from sisa.errors import StoreError, UserError
from sisa.storage.faults import DeniedError
from sisa.storage.medium import UNFINISHED
from sisa.storage.objects import ObjectStorage


def probe(storage: ObjectStorage) -> None:
    """Write, replace and erase one small object below the address.

    Raises:
        UserError: The bucket, the server or the credentials can't be used for a store.
        StoreError: The server doesn't answer.
    """
    _refuse_lock(storage)
    key = f"{UNFINISHED}probe-{secrets.token_hex(8)}"
    try:
        _try_conditions(storage, key)
        storage.put(key, b"three")
        left = [version for version in storage.versions.of(storage.address.key(key)) if not version.visible]
        if storage.read(key) != b"three" or left:
            raise _refused(storage, "an object that is replaced stays readable as an older version")
        storage.remove(key)
        if storage.exists(key) or storage.versions.of(storage.address.key(key)):
            raise _refused(storage, "what is erased stays")
    except DeniedError as error:
        raise _refused(storage, error.message, hint=error.hint) from error
    finally:
        _forget(storage, key)


def _refuse_lock(storage: ObjectStorage) -> None:
    try:
        found = storage.client.get_object_lock_configuration(Bucket=storage.address.bucket)
    except (BotoCoreError, ClientError):
        return  # no lock, a server that knows of none, or no right to ask: then the erasure below tells
    if found.get("ObjectLockConfiguration", {}).get("ObjectLockEnabled") == "Enabled":
        raise _refused(
            storage,
            "object lock is on: what it holds can't be erased",
            hint="Use a bucket without object lock and retention.",
        )


def _try_conditions(storage: ObjectStorage, key: str) -> None:
    first = storage.put_new(key, b"one")
    second = storage.put_new(key, b"two")
    if not first or second or storage.read(key) != b"one":
        raise _refused(
            storage,
            "the server ignores If-None-Match: it replaced an object that was to be made only if there is none",
            hint="Use a server that honours conditional writes, versioning on or off.",
        )


def _refused(storage: ObjectStorage, why: str, *, hint: str = "Use another bucket or server.") -> UserError:
    return UserError(f"store {storage.uri!r} can't be used: {why}", hint=hint)


def _forget(storage: ObjectStorage, key: str) -> None:
    try:
        storage.remove(key)
    except StoreError:  # told already, or swept when the store is made
        return
