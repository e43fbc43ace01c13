"""The same promises on another server of S3's protocol: the contracts of storage, checkpoints and stores, on Ceph's gateway.

Its buckets with versions ignore If-None-Match, which moto's honour: such a bucket must get no record.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ceph_kit
import crash_kit
import pytest
from ceph_kit import CephServer
from s3_kit import everything
from test_checkpoints_objects import TestBucket as CheckpointsInBucket
from test_checkpoints_objects import small_chunks  # noqa: F401 - a fixture
from test_life import InBucket
from test_storage import TestBucket as StorageInBucket
from test_storage import impatient  # noqa: F401 - a fixture

import sisa
from sisa.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[CephServer]:
    with tempfile.TemporaryDirectory(prefix="ceph-") as name, ceph_kit.running(Path(name)) as running:  # short: sockets
        yield running


class TestStorage(StorageInBucket):
    """Bytes under keys."""


class TestCheckpoints(CheckpointsInBucket):
    """Stages."""


class TestLife(InBucket):
    """A store, from its first training to its last deletion."""

    versioned = False


class TestVersioned:
    """What can't be trusted is refused before anything is written."""

    def test_its_buckets_with_versions_get_no_record(self, server: CephServer, tmp_path: Path) -> None:
        bucket = server.bucket(versioned=True)
        recipe = crash_kit.make_recipe(tmp_path, crash_kit.people(24))
        keys = {name: str(tmp_path / name) for name in ("key_file", "exclusion_key_file")}
        for path in map(Path, keys.values()):
            path.write_text(secrets.token_hex(32))
            path.chmod(0o600)
        place = {"store": f"s3://{bucket}/one", "ledger": str(tmp_path / "beside" / "ledger.db"), "routing": keys}
        with pytest.raises(UserError, match="ignores If-None-Match"):
            sisa.train({**recipe, **place}, executor="inline")
        assert everything(server, bucket) == {}
