"""A prefix of a bucket of S3 or of a server that speaks it, through obstore.

A key is replaced by one request, which S3 makes visible whole or not at all; then older versions of it are erased. A
key is made by one request with ``If-None-Match: *``: of many at once, one succeeds. Each request has a time limit and
is tried again a few times, so that nothing waits for ever.

Credentials, region and endpoint come from the AWS_* variables or the profile that they name.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Final

import boto3
import botocore.config
import obstore
from botocore.exceptions import BotoCoreError
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.exceptions import AlreadyExistsError
from obstore.store import S3Store

from sisa.errors import BusyError, UserError
from sisa.storage.address import Address
from sisa.storage.faults import AGAIN, DeniedError, told
from sisa.storage.medium import UNFINISHED, checked
from sisa.storage.versions import Versions

PART_BYTES: Final = 16 * 2**20
"""What is larger is uploaded in parts of this size."""
CONNECT_S: Final = 5
REQUEST_S: Final = 60
"""A request of one part, its answer included."""
RETRIES: Final = 5
AT_ONCE: Final = 8
"""Parts of one object that are read side by side."""
PATIENCE_S: Final = 90
"""After this a request that failed is not tried again."""


class _ReplacedError(Exception):
    """The object is another one by now."""


class ObjectStorage:
    """Content in objects below an address."""

    def __init__(self, address: Address) -> None:
        self.address = address

    @property
    def uri(self) -> str:
        """The address."""
        return self.address.uri

    @cached_property
    def client(self) -> Any:
        """The boto3 client: for what obstore can't do, and for what it is told of region and endpoint."""
        wanted = botocore.config.Config(
            connect_timeout=CONNECT_S,
            read_timeout=REQUEST_S,
            retries={"max_attempts": RETRIES, "mode": "standard"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        try:
            return self._session.client("s3", config=wanted)
        except (BotoCoreError, ValueError) as error:
            raise UserError(
                f"store {self.uri!r}: the AWS_* variables or the profile can't be used ({type(error).__name__})",
                hint="Set AWS_REGION, and AWS_ENDPOINT_URL for a server other than Amazon's.",
            ) from error

    @cached_property
    def _session(self) -> boto3.Session:
        try:
            session = boto3.Session()
            found = session.get_credentials()
        except BotoCoreError as error:
            raise self._no_credentials(type(error).__name__) from error
        if found is None:
            raise self._no_credentials("there are none")
        return session

    def _no_credentials(self, why: str) -> DeniedError:
        return DeniedError(
            f"store {self.uri!r}: no credentials for object storage ({why})",
            hint="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
        )

    @cached_property
    def objects(self) -> S3Store:
        """The obstore of the whole address."""
        endpoint = str(self.client.meta.endpoint_url)
        return S3Store(
            self.address.bucket,
            prefix=self.address.prefix or None,
            config={"endpoint": endpoint, "region": str(self.client.meta.region_name or "us-east-1")},
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=CONNECT_S),
                "timeout": timedelta(seconds=REQUEST_S),
            },
            retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=PATIENCE_S)},
            credential_provider=Boto3CredentialProvider(self._session),
        )

    @cached_property
    def versions(self) -> Versions:
        """Every form of what lies in the bucket."""
        return Versions(self.client, self.address)

    def told(self, what: str, key: str) -> contextlib.AbstractContextManager[None]:
        """Turn errors of the libraries into ours."""
        return told(what, f"{self.uri}/{key}")

    def exists(self, key: str) -> bool:
        """Say whether an object lies at ``key``."""
        try:
            with self.told("look for", checked(key)):
                obstore.head(self.objects, key)
        except FileNotFoundError:
            return False
        return True

    def read(self, key: str) -> bytes:
        """Return the content of ``key``.

        Raises:
            FileNotFoundError: There is none.
        """
        try:
            with self.told("read", checked(key)):
                found = obstore.get(self.objects, key)
                if found.meta["size"] <= PART_BYTES:
                    return found.bytes().to_bytes()
                return self._read_parts(key, found.meta)
        except FileNotFoundError:
            raise FileNotFoundError(f"{key} is missing") from None

    def _read_parts(self, key: str, meta: obstore.ObjectMeta) -> bytes:
        """Read a large object in parts, each within its own time limit; all of one object, or begin again."""

        def part(start: int) -> memoryview:
            end = min(start + PART_BYTES, meta["size"])
            got = obstore.get(self.objects, key, options={"range": (start, end)})
            if (got.meta["size"], got.meta["e_tag"]) != (meta["size"], meta["e_tag"]):
                raise _ReplacedError
            return memoryview(got.bytes())

        for _ in range(RETRIES):
            try:
                with ThreadPoolExecutor(AT_ONCE) as pool:
                    return b"".join(pool.map(part, range(0, meta["size"], PART_BYTES)))
            except _ReplacedError:
                meta = obstore.head(self.objects, key)
        raise BusyError(f"object storage: {self.uri}/{key} is replaced again and again", hint=AGAIN)

    @contextlib.contextmanager
    def opened(self, key: str) -> Iterator[BinaryIO]:
        """Yield the content of ``key``, which is read whole: an object may be replaced between two requests.

        Raises:
            FileNotFoundError: There is none.
        """
        yield io.BytesIO(self.read(key))

    def put(self, key: str, content: bytes | memoryview) -> None:
        """Replace the object at ``key``, and erase what was there before."""
        self._replace(key, lambda: content)

    def put_file(self, key: str, path: Path) -> None:
        """Replace the object at ``key`` by the content of a file."""
        self._replace(key, lambda: path)

    @contextlib.contextmanager
    def writing(self, key: str) -> Iterator[BinaryIO]:
        """Yield a stream in memory, whose content replaces the object at ``key`` in the end."""
        stream = io.BytesIO()
        yield stream
        self.put(key, stream.getbuffer())

    def _replace(self, key: str, content: Callable[[], Any]) -> None:
        with self.told("write", checked(key)):
            done = obstore.put(self.objects, key, content(), chunk_size=PART_BYTES)
        self.versions.erase(self.versions.replaced(self.address.key(key), by=done["version"]))

    def put_new(self, key: str, content: bytes | memoryview) -> bool:
        """Put ``content`` at ``key`` if nothing lies there; return whether it did.

        A request whose answer was lost is sent again and finds its own object: who gets False compares what lies there.
        """
        with self.told("write", checked(key)):
            try:
                obstore.put(self.objects, key, content, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def keys(self, prefix: str) -> list[str]:
        """Return the keys below ``prefix``, sorted, but for unfinished ones."""
        with self.told("list", prefix):
            found = obstore.list(self.objects, prefix or None, chunk_size=1000).collect()
        return sorted(item["path"] for item in found if not _is_unfinished(item["path"]))

    def there(self, prefix: str) -> list[str]:
        """Return every key below ``prefix`` of which the bucket keeps anything, sorted."""
        below = self.address.below(prefix)
        found = {version.key for version in self.versions.all(below)}
        return sorted(self._short(key) for key in found | {key for key, _ in self.versions.uploads(below)})

    def remove(self, key: str) -> None:
        """Erase every version of ``key``."""
        key = self.address.key(checked(key))
        self.versions.abort_uploads(key)
        self.versions.erase_all(key, only=key)

    def remove_all(self, prefix: str) -> None:
        """Erase every version of every key below ``prefix``."""
        below = self.address.below(prefix)
        self.versions.abort_uploads(below)
        self.versions.erase_all(below)

    def sweep_beside(self, prefix: str) -> None:
        """Nothing: what a killed removal left has kept its key, and goes when it is removed again."""

    def sweep(self, prefix: str) -> None:
        """Erase older versions, delete markers and unfinished things below ``prefix``."""
        below = self.address.below(prefix)
        self.versions.abort_uploads(below)
        self.versions.erase(v for v in self.versions.all(below) if not v.visible or self._unfinished(v.key))

    def hidden(self, prefix: str) -> list[str]:
        """List older versions, delete markers and unfinished things below ``prefix``."""
        below = self.address.below(prefix)
        found = [f"{self._short(key)}: an unfinished upload" for key, _ in self.versions.uploads(below)]
        for version in self.versions.all(below):
            if not version.visible:
                kind = "a delete marker" if version.marker else "an older version"
                found.append(f"{self._short(version.key)}: {kind} is kept by the bucket")
            elif self._unfinished(version.key):
                found.append(f"{self._short(version.key)}: unfinished")
        return sorted(set(found))

    def _short(self, key: str) -> str:
        return key.removeprefix(self.address.below(""))

    def _unfinished(self, key: str) -> bool:
        return _is_unfinished(self._short(key))


def _is_unfinished(key: str) -> bool:
    return any(part.startswith(UNFINISHED) for part in key.split("/"))
