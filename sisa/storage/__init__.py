"""Where the parts of a store lie: a folder on a disk, or a prefix of a bucket. The only part that opens buckets."""

from sisa.storage.address import Address, is_remote, local_path, parse_address
from sisa.storage.medium import Storage
from sisa.storage.places import object_storage_at, storage_at

__all__ = [
    "Address",
    "ObjectStorage",
    "Storage",
    "is_remote",
    "local_path",
    "object_storage_at",
    "parse_address",
    "storage_at",
]
