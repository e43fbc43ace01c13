"""The secrets of a store and what is derived from them.

Invariants:

* Everything that influences training (routing, order, digests of records) derives from the 32-byte
  routing key. A worker is given the :class:`ShardKeys` of one shard and can compute neither the routing
  key nor another shard's keys from them.
* The exclusion key is independent of it: destroying it makes the memory of deletions unreadable and
  changes nothing else.
* No key's bytes appear in a ``repr``, an error or a log.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from sisa.errors import UserError

KEY_BYTES = 32
SUBKEY_BYTES = 16
"""Length of a SipHash key."""
LEAST_KEY_BYTES = 16


@dataclass(frozen=True)
class StoreKeys:
    """The two root secrets of a store; void once printed, hence the quiet ``repr``."""

    routing: bytes = field(repr=False)
    """32 bytes: root of shard, slice, holdout, order and digests."""
    exclusion: bytes = field(repr=False)
    """32 bytes: keys the digests that remember who was deleted."""


@dataclass(frozen=True)
class ShardKeys:
    """What a worker of one shard may know."""

    shard: int
    order: bytes = field(repr=False)
    """16 bytes: the SipHash key of the order of records in an epoch."""
    digest: bytes = field(repr=False)
    """32 bytes: keys the digests of records."""


def derive(key: bytes, *context: str | int) -> bytes:
    """Return HMAC-SHA256 of the length-prefixed context parts under ``key`` (32 bytes).

    Each part is prefixed by its length in bytes, so ``("ab", "c")`` and ``("a", "bc")`` differ.
    """
    parts = [str(part).encode("utf-8") for part in context]
    message = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return hmac.new(key, message, hashlib.sha256).digest()


def shard_keys(routing_key: bytes, shard: int) -> ShardKeys:
    """Derive the keys that a worker of ``shard`` gets.

    >>> shard_keys(bytes(32), 3)
    ShardKeys(shard=3)
    """
    return ShardKeys(
        shard=shard,
        order=derive(routing_key, "order", shard)[:SUBKEY_BYTES],
        digest=derive(routing_key, "digest", shard),
    )


def new_key() -> bytes:
    """Return 32 fresh random bytes."""
    return secrets.token_bytes(KEY_BYTES)


def parse_key(content: bytes) -> bytes:
    """Read a key file: a text of at least 32 hexadecimal digits, or at least 16 raw bytes.

    Thirty-two bytes are taken as they are; any other length is hashed to 32.

    Raises:
        UserError: The content is shorter than 16 bytes.
    """
    raw = content
    text = content.strip()
    if len(text) >= 2 * LEAST_KEY_BYTES and all(byte in b"0123456789abcdefABCDEF" for byte in text):
        if len(text) % 2:
            raise UserError(
                f"routing.key_file: a hexadecimal key has two digits a byte, got an odd number ({len(text)})",
                hint="Make one with: openssl rand -hex 32",
            )
        raw = bytes.fromhex(text.decode("ascii"))
    if len(raw) < LEAST_KEY_BYTES:
        raise UserError(
            f"routing.key_file: expected at least {LEAST_KEY_BYTES} bytes or {2 * LEAST_KEY_BYTES} "
            f"hexadecimal digits, got {len(raw)} bytes",
            hint="Make one with: openssl rand -hex 32",
        )
    return raw if len(raw) == KEY_BYTES else hashlib.sha256(b"sisa-key" + raw).digest()


def exclusion_digest(exclusion_key: bytes, kind: Literal["subject", "record"], id_: str) -> bytes:
    """Return the 16 bytes by which a deleted subject or record is remembered.

    Args:
        exclusion_key: The store's exclusion key.
        kind: What ``id_`` names; the same text as a subject and as a record has two digests.
        id_: Canonical text form of the id.
    """
    return exclusion_digests(exclusion_key, kind, [id_])[0]


def exclusion_digests(
    exclusion_key: bytes, kind: Literal["subject", "record", "content"], ids: Iterable[str]
) -> list[bytes]:
    """Return the :func:`exclusion_digest` of each of many ids of one kind, in their order.

    Args:
        exclusion_key: The store's exclusion key.
        kind: What the ids name.
        ids: Canonical text forms.
    """
    base = exclusion_hasher(exclusion_key, kind)
    digests = []
    for id_ in ids:
        hasher = base.copy()  # the key is derived and hashed once, not once an id
        hasher.update(id_.encode("utf-8"))
        digests.append(hasher.digest())
    return digests


def exclusion_hasher(exclusion_key: bytes, kind: Literal["subject", "record", "content"]) -> hashlib.blake2b:
    """Return the hasher behind :func:`exclusion_digest`; copy it to digest many ids of one kind."""
    return hashlib.blake2b(digest_size=16, key=derive(exclusion_key, "exclusion", kind), person=b"sisa-exclusion")
