"""Every form in which a bucket keeps content: versions, delete markers, parts of unfinished uploads.

Erasing goes by versions always, whatever the bucket says of itself: versioning may have been on before, or be turned
on meanwhile. A bucket without it has one version of each key, called "null". After an erasure everything is listed
again, and it ends only when nothing is left.

The one place that uses boto3 for requests: obstore lists no versions.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sisa.errors import StoreError
from sisa.storage.address import Address
from sisa.storage.faults import told

BATCH = 1000
"""Most that S3 takes in one request."""
TRIES = 10
WAIT_S = 0.1
"""Before an older listing is asked for again, and each time so much longer."""
UNVERSIONED = "null"
"""The id of the one version of a key in a bucket without versions."""


@dataclass(frozen=True)
class Version:
    """One form of a key's content."""

    key: str
    """In the bucket."""
    id: str
    latest: bool
    marker: bool
    """Whether it says that the key was deleted."""

    @property
    def visible(self) -> bool:
        """Whether it is what a reader of the key gets."""
        return self.latest and not self.marker


class Versions:
    """What lies in a bucket, seen and unseen."""

    def __init__(self, client: Any, address: Address) -> None:
        self._client = client
        self._address = address

    def all(self, prefix: str) -> list[Version]:
        """Return every version of the keys that begin with ``prefix`` (of the bucket), oldest first for each key.

        Raises:
            StoreError: They can't be listed.
        """
        found: list[Version] = []
        with told("list the versions below", self._where(prefix)):
            pages = self._client.get_paginator("list_object_versions").paginate(**self._named(prefix))
            for page in pages:
                for name, marker in (("Versions", False), ("DeleteMarkers", True)):
                    found += [
                        Version(item["Key"], item["VersionId"], bool(item["IsLatest"]), marker)
                        for item in page.get(name, [])
                    ]
        # Newest last, so that nothing older becomes visible when only some are gone.
        return sorted(found, key=lambda version: (version.key, version.latest))

    def of(self, key: str) -> list[Version]:
        """Return every version of one key."""
        return [version for version in self.all(key) if version.key == key]

    def replaced(self, key: str, *, by: str | None) -> list[Version]:
        """Return the versions of one key that a write replaced, from a listing that shows that write.

        A listing that is older shows what was replaced as what a reader gets: it would be left there for ever.

        Args:
            key: Of the bucket.
            by: The version that was written; None where versions have no ids.

        Raises:
            StoreError: Every listing is older than the write.
        """
        numbered = by not in {None, UNVERSIONED}
        for attempt in range(TRIES):
            found = self.of(key)
            written = [version for version in found if version.id == (by or UNVERSIONED)]
            if any(version.visible or numbered for version in written):
                return [version for version in found if not version.visible]
            if numbered and not self._is_there(key, version=by or ""):
                return []  # another writer came after us, and has erased what we replaced together with ours
            time.sleep(attempt * WAIT_S)
        raise StoreError(
            f"object storage: older versions of {self._where(key)} can't be told: what was just written is not listed",
            hint="Run `sisa repair` when the server lists what is there: it erases what is left of older versions.",
        )

    def _is_there(self, key: str, *, version: str) -> bool:
        with told("look for a version of", self._where(key)):
            try:
                self._client.head_object(Bucket=self._address.bucket, Key=key, VersionId=version)
            except self._client.exceptions.ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                    return False
                raise
        return True

    def erase(self, versions: Iterable[Version]) -> None:
        """Erase these versions; what is gone already is no matter.

        Raises:
            StoreError: One stays.
        """
        doomed = [{"Key": version.key, "VersionId": version.id} for version in versions]
        for start in range(0, len(doomed), BATCH):
            batch = doomed[start : start + BATCH]
            with told("erase", self._where(batch[0]["Key"])):
                answer = self._client.delete_objects(
                    Bucket=self._address.bucket, Delete={"Objects": batch, "Quiet": True}
                )
            for error in answer.get("Errors", []):
                raise StoreError(
                    f"object storage: a version of {self._where(error.get('Key', ''))} can't be erased "
                    f"({error.get('Code', 'no reason given')})",
                    hint="Object lock, a retention or a missing permission (s3:DeleteObjectVersion) keeps it: end that, "
                    "then run `sisa repair`.",
                )

    def erase_all(self, prefix: str, *, first: str = "", only: str | None = None) -> None:
        """Erase every version of the keys that begin with ``prefix``, until a listing shows none.

        Args:
            prefix: Of the bucket.
            first: The key whose versions go before those of any other.
            only: The one key that is meant, if it is one.

        Raises:
            StoreError: Something stays.
        """
        for _ in range(TRIES):
            found = [version for version in self.all(prefix) if only in {None, version.key}]
            if not found:
                return
            self.erase(version for version in found if version.key == first)
            self.erase(version for version in found if version.key != first)
        raise StoreError(
            f"object storage: versions below {self._where(prefix)} can't be erased: they are still listed",
            hint="Something goes on writing there, or the server lists what it has erased: find out, then run `sisa repair`.",
        )

    def uploads(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Yield key and id of each unfinished upload of a key that begins with ``prefix``."""
        with told("list the unfinished uploads below", self._where(prefix)):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(**self._named(prefix))
            yield from ((upload["Key"], upload["UploadId"]) for page in pages for upload in page.get("Uploads", []))

    def abort_uploads(self, prefix: str) -> None:
        """End every unfinished upload of the keys that begin with ``prefix``, and so erase its parts."""
        for key, upload in list(self.uploads(prefix)):
            with told("abort an upload of", self._where(key)):
                try:
                    self._client.abort_multipart_upload(Bucket=self._address.bucket, Key=key, UploadId=upload)
                except self._client.exceptions.NoSuchUpload:
                    continue  # it ended meanwhile

    def _named(self, prefix: str) -> dict[str, str]:
        return {"Bucket": self._address.bucket, "Prefix": prefix}

    def _where(self, key: str) -> str:
        return f"s3://{self._address.bucket}/{key}"
