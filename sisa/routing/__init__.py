"""Pure: from an id and a secret key to a shard and a slice. Nothing here reads or writes anything."""

from sisa.routing.ids import canonical_id, canonical_ids, id_text
from sisa.routing.keys import (
    ShardKeys,
    StoreKeys,
    derive,
    exclusion_digest,
    exclusion_digests,
    new_key,
    parse_key,
    shard_keys,
)
from sisa.routing.router import Router, Routes
from sisa.routing.siphash import siphash_text, siphash_words

__all__ = [
    "Router",
    "Routes",
    "ShardKeys",
    "StoreKeys",
    "canonical_id",
    "canonical_ids",
    "derive",
    "exclusion_digest",
    "exclusion_digests",
    "id_text",
    "new_key",
    "parse_key",
    "shard_keys",
    "siphash_text",
    "siphash_words",
]
