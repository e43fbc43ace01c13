"""From a URI to the medium that it names; libraries of object storage are imported when they are needed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from sisa.errors import UserError
from sisa.storage.address import is_remote, parse_address
from sisa.storage.local import LocalStorage
from sisa.storage.medium import Storage

if TYPE_CHECKING:
    from sisa.storage.objects import ObjectStorage


def storage_at(uri: str) -> Storage:
    """Return the medium at ``uri``: a path, or an address of object storage.

    Raises:
        UserError: The address can't be used, or the libraries are missing.
    """
    return object_storage_at(uri) if is_remote(uri) else LocalStorage(Path(uri))


@functools.lru_cache(maxsize=8)
def object_storage_at(uri: str) -> ObjectStorage:
    """Return the object storage at ``uri``; one for each address and process, with its open connections.

    Raises:
        UserError: The address can't be used, or the libraries are missing.
    """
    address = parse_address(uri)
    try:
        from sisa.storage.objects import ObjectStorage
    except ImportError as error:
        raise UserError(
            f"store {uri!r}: object storage needs libraries that are not installed ({error.name})",
            hint="Install them with: pip install 'sisa[s3]'",
        ) from error
    return ObjectStorage(address)
