"""Stores on every medium, for tests of whole lives: made, kept, put back and broken past the code under test."""

from __future__ import annotations

import io
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import crash_kit
import pyarrow as pa
import pyarrow.parquet as papq
import pytest
from s3_kit import S3Server, everything, uploads

import sisa
from sisa.storage import storage_at
from sisa.store.store import Store

PEOPLE = crash_kit.people(24)
PERSON = "p03"
RECORDS = [r for r, p in zip(PEOPLE["record"].to_pylist(), PEOPLE["person"].to_pylist(), strict=True) if p == PERSON]


class Killed(BaseException):
    """Nobody catches this: the process is gone."""


def state(store: Store) -> dict[tuple[int, int], tuple[str, str]]:
    rows = store.opened.ledger.stages.all()
    return {(row.shard, row.stage): (row.key, row.full_digest) for row in rows if not row.tainted}


def decoded(content: bytes) -> bytes:
    """Bytes as they are, and unpacked if they are a table."""
    if content[:4] == b"PAR1":
        content += repr(papq.read_table(io.BytesIO(content)).to_pydict()).encode()
    return content


class Medium:
    """Inherited by each medium. ``raw`` and ``change`` go past the code under test."""

    folder: Path

    def recipe(self, table: pa.Table = PEOPLE, **fields: Any) -> dict[str, Any]:
        """A recipe for a store on this medium."""
        raise NotImplementedError

    def raw(self) -> dict[str, bytes]:
        """All that the medium keeps of the store, in every version, by key."""
        raise NotImplementedError

    def change(self, key: str, content: bytes | None) -> None:
        """Replace or remove one."""
        raise NotImplementedError

    def train(self, table: pa.Table = PEOPLE, **options: Any) -> Store:
        return sisa.train(self.recipe(table), **{"executor": "inline", **options})

    def opened(self) -> Store:
        return sisa.open_store(self.recipe()["store"])

    def holding(self, *texts: str) -> list[str]:
        """Keys whose content has one of the texts in it."""
        return [key for key, content in self.raw().items() if any(t.encode() in decoded(content) for t in texts)]

    def elsewhere(self, table: pa.Table) -> Store:
        """Trained from nothing in a folder, on ``table``."""
        name = f"fresh-{len(list(self.folder.iterdir()))}"
        return crash_kit.trained(crash_kit.make_recipe(self.folder / name, table), self.folder / name / "store")

    def without(self, *people: str) -> pa.Table:
        return PEOPLE.filter(pa.array([person not in people for person in PEOPLE["person"].to_pylist()]))

    def killed_at(self, number: int) -> Any:
        """Die at the ``number``-th writing call to the medium, before or (every other time) after it took effect.

        From then on nothing is written any more: what would clean up is dead too.
        """
        storage = type(storage_at(self.recipe()["store"]))
        calls = [0]

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                calls[0] += 1
                if calls[0] > number // 2 or (calls[0] == number // 2 and number % 2 == 0):
                    raise Killed
                done = real(*arguments)
                if calls[0] == number // 2:
                    raise Killed
                return done

            return call

        names = ("put", "put_new", "put_file", "remove", "remove_all", "sweep")
        return mock.patch.multiple(storage, **{name: dying(getattr(storage, name)) for name in names})

    def keep(self, store: Store) -> None:
        raise NotImplementedError

    def restore(self) -> None:
        """Go back to what was kept."""
        raise NotImplementedError

    def begin_anew(self) -> None:
        """Forget the store."""
        raise NotImplementedError


class InFolder(Medium):
    """In a folder."""

    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def recipe(self, table: pa.Table = PEOPLE, **fields: Any) -> dict[str, Any]:
        return {**crash_kit.make_recipe(self.folder / "recipe", table), "store": str(self.folder / "store"), **fields}

    def raw(self) -> dict[str, bytes]:
        root = self.folder / "store"
        parts = [path for path in root.rglob("*") if path.is_file() and path.parent.name not in {"keys", "locks"}]
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in parts}

    def change(self, key: str, content: bytes | None) -> None:
        path = self.folder / "store" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink() if content is None else path.write_bytes(content)
        if content is None and not list(path.parent.iterdir()):
            path.parent.rmdir()
            if path.parent.name == "state":
                path.parent.parent.rmdir()

    def keep(self, store: Store) -> None:
        store.close()
        crash_kit.copy_store(self.folder / "store", self.folder / "kept")

    def restore(self) -> None:
        self.begin_anew()
        crash_kit.copy_store(self.folder / "kept", self.folder / "store")

    def begin_anew(self) -> None:
        shutil.rmtree(self.folder / "store", ignore_errors=True)


class InBucket(Medium):
    """In object storage; what is tested in every run is the harder kind, a bucket that keeps versions."""

    versioned: bool

    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path, server: S3Server) -> None:
        self.folder = tmp_path
        self.server = server
        self.bucket = server.bucket(versioned=self.versioned)
        # The routing key is that of the store in a folder to compare with; one server has the ledgers of many tests.
        for name, key in (("routing.key", "00" * 32), ("exclusion.key", secrets.token_hex(32))):
            path = tmp_path / name
            path.write_text(key)
            path.chmod(0o600)

    def recipe(self, table: pa.Table = PEOPLE, **fields: Any) -> dict[str, Any]:
        routing = {"key_file": str(self.folder / "routing.key")}
        routing["exclusion_key_file"] = str(self.folder / "exclusion.key")
        return {
            **crash_kit.make_recipe(self.folder / "recipe", table),
            "store": f"s3://{self.bucket}/runs/one",
            "ledger": str(self.folder / "beside" / "ledger.db"),
            "routing": routing,
            **fields,
        }

    def raw(self) -> dict[str, bytes]:
        found = everything(self.server, self.bucket)
        assert len({key for key, _ in found}) == len(found), "a key has more than one version, or a delete marker"
        assert uploads(self.server, self.bucket) == []
        beside = [
            path for path in (self.folder / "beside").rglob("*") if path.is_file() and path.parent.name != "locks"
        ]
        return {
            **{key.removeprefix("runs/one/"): content or b"" for (key, _), content in found.items()},
            **{f"beside/{path.name}": path.read_bytes() for path in beside},
        }

    def change(self, key: str, content: bytes | None) -> None:
        whole = f"runs/one/{key}"
        for found, version in everything(self.server, self.bucket, whole):
            if found == whole:
                self.server.client.delete_object(Bucket=self.bucket, Key=whole, VersionId=version)
        if content is not None:
            self.server.client.put_object(Bucket=self.bucket, Key=whole, Body=content)

    def keep(self, store: Store) -> None:
        store.close()
        self.kept = everything(self.server, self.bucket)
        crash_kit.copy_store(self.folder / "beside", self.folder / "kept")

    def restore(self) -> None:
        self.begin_anew()
        crash_kit.copy_store(self.folder / "kept", self.folder / "beside")
        for (key, _), content in self.kept.items():
            self.server.client.put_object(Bucket=self.bucket, Key=key, Body=content)

    def begin_anew(self) -> None:
        for key, version in everything(self.server, self.bucket):
            self.server.client.delete_object(Bucket=self.bucket, Key=key, VersionId=version)
        shutil.rmtree(self.folder / "beside", ignore_errors=True)
