"""Reading the URI of a store. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sisa.errors import UserError

SCHEME = "s3://"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_SEGMENT = re.compile(r"[A-Za-z0-9!_.*'()=-]+")
"""What every S3 keeps as it is, without an encoding that two libraries may do in two ways."""


@dataclass(frozen=True)
class Address:
    """A place in object storage."""

    bucket: str
    prefix: str
    """Without slashes at its ends; "" for the whole bucket."""

    @property
    def uri(self) -> str:
        """The address as a user writes it."""
        return f"{SCHEME}{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")

    def key(self, name: str) -> str:
        """Return the key in the bucket of what is called ``name`` below this place."""
        return "/".join(part for part in (self.prefix, name) if part)

    def below(self, name: str) -> str:
        """Return what every key below ``name`` begins with."""
        key = self.key(name)
        return f"{key}/" if key else ""


def parse_address(uri: str) -> Address:
    """Read ``s3://bucket/prefix``.

    Raises:
        UserError: It isn't one.
    """
    bucket, _, prefix = uri.removeprefix(SCHEME).partition("/")
    if not uri.startswith(SCHEME) or not _BUCKET.fullmatch(bucket):
        raise UserError(
            f"store {uri!r}: expected s3://BUCKET/PREFIX, with the name of a bucket (3 to 63 of a-z, 0-9, '.' and '-')",
            hint="Credentials, region and endpoint come from the AWS_* variables or a profile, never from the URI.",
        )
    parts = prefix.removesuffix("/").split("/") if prefix else []
    wrong = [part for part in parts if not _SEGMENT.fullmatch(part) or part in {".", ".."}]
    if wrong:
        raise UserError(
            f"store {uri!r}: {wrong[0]!r} can't be part of a prefix",
            hint="Use letters, digits and !_.*'()=- between single slashes; a query or a version can't be given.",
        )
    return Address(bucket, "/".join(parts))


def is_remote(uri: str) -> bool:
    """Say whether a URI names object storage."""
    return uri.startswith(SCHEME)


def local_path(uri: str) -> Path:
    """Read a path, or ``file://`` before one.

    Raises:
        UserError: It is another kind of URI, or empty.
    """
    text = uri.removeprefix("file://")
    if "://" in text:
        raise UserError(
            f"store {uri!r}: expected a path, file:// or s3://; other kinds of storage are not supported yet",
            hint="Give a path on a local disk, or s3://BUCKET/PREFIX.",
        )
    if not text:
        raise UserError("store: expected a path, got an empty text", hint="Give a path, or s3://BUCKET/PREFIX.")
    return Path(text).absolute()
