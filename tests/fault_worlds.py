"""Stores that are made, kept and put back on two media, for faults to strike; read past the code under test."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import crash_kit
import pyarrow as pa
import pyarrow.parquet as papq
import yaml
from s3_kit import S3Server, everything, uploads

import sisa
from sisa.cli.main import run
from sisa.store.store import Store

PEOPLE = crash_kit.people(24)
ADDED = crash_kit.more_people(24, generation=1)


def command(*words: str) -> tuple[int, dict[str, Any]]:
    """Run a command in this process; return its exit code and its answer."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = run([*words, "--json"])
    return code, json.loads(out.getvalue())


class World:
    """A store that can be made, kept and put back; what is in it is read past the code under test."""

    uri: str

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "recipe.yaml"

    def write_recipe(self, **fields: Any) -> None:
        """Write the recipe of the store."""
        recipe = {**crash_kit.make_recipe(self.folder / "recipe", PEOPLE), "store": self.uri, **fields}
        self.config.write_text(yaml.safe_dump(recipe))

    def train(self) -> tuple[int, dict[str, Any]]:
        return command("train", str(self.config), "--executor", "inline")

    def delete(self, person: str) -> tuple[int, dict[str, Any]]:
        return command("delete", "--store", self.uri, "--subject", person, "--executor", "inline")

    def add(self) -> tuple[int, dict[str, Any]]:
        return command("add", "--store", self.uri, "--source", str(self.source(ADDED)), "--executor", "inline")

    def correct(self, records: list[str]) -> tuple[int, dict[str, Any]]:
        """Correct some rows of the first table."""
        keep = pa.array([record in records for record in PEOPLE["record"].to_pylist()])
        rows = PEOPLE.filter(keep)
        new = rows.set_column(rows.column_names.index("x"), "x", pa.array([x + 1.5 for x in rows["x"].to_pylist()]))
        return command("correct", "--store", self.uri, "--source", str(self.source(new)), "--executor", "inline")

    def source(self, table: pa.Table) -> Path:
        papq.write_table(table, self.folder / "more.parquet")
        return self.folder / "more.parquet"

    def repair(self) -> tuple[int, dict[str, Any]]:
        return command("repair", "--store", self.uri, "--executor", "inline")

    def opened(self) -> Store:
        return sisa.open_store(self.uri)

    def content(self) -> dict[str, bytes]:
        """All that the medium keeps of the store, in every version, by key."""
        raise NotImplementedError

    def begin_anew(self) -> None:
        """Forget the store."""
        raise NotImplementedError

    def keep(self) -> None:
        """Remember the store as it is."""
        raise NotImplementedError

    def restore(self) -> None:
        """Go back to what was kept."""
        raise NotImplementedError

    def holding(self, *texts: str) -> list[str]:
        """Keys whose content has one of the texts in it."""
        return [key for key, content in self.content().items() if any(t.encode() in decoded(content) for t in texts)]

    def state(self) -> dict[str, Any]:
        """All that has to be the same whatever happened on the way, bit for bit."""
        store = self.opened()
        ledger = store.opened.ledger
        content = self.content()
        found = {
            "constituents": store.status()["constituents"],
            "stages": sorted(
                (r.shard, r.stage, r.key, r.state_digest, r.full_digest, r.tainted) for r in ledger.stages.all()
            ),
            # Not how many records went: whoever is accepted while their rows can't be read is accepted uncounted.
            "requests": sorted((r.state, r.subjects, tuple(r.shards)) for r in ledger.requests.all()),
            "keys": sorted(content),
            "bits": {key: content[key] for key in content if key.endswith(".parquet") or "/c." in key},
        }
        store.close()
        return found

    def problems(self) -> list[str]:
        """What a verification with a replay of everything finds."""
        store = self.opened()
        found = store.verify(replay="all", executor="inline")
        assert found.stages_replayed == store.opened.shards * store.opened.slices >= 4
        store.close()
        return list(found.problems)


class FolderWorld(World):
    """A store in a folder."""

    def __init__(self, folder: Path, *, store: Path | None = None) -> None:
        super().__init__(folder)
        self.root = store or folder / "store"
        self.uri = str(self.root)
        self.write_recipe()

    def content(self) -> dict[str, bytes]:
        parts = [p for p in self.root.rglob("*") if not p.is_dir() and p.parent.name not in {"keys", "locks"}]
        return {p.relative_to(self.root).as_posix(): p.read_bytes() for p in parts if p.name != "ledger.db-journal"}

    def begin_anew(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def keep(self) -> None:
        crash_kit.copy_store(self.root, self.folder / "kept")

    def restore(self) -> None:
        self.begin_anew()
        crash_kit.copy_store(self.folder / "kept", self.root)


class BucketWorld(World):
    """A store in a bucket, its ledger in a folder."""

    def __init__(self, folder: Path, server: S3Server, *, versioned: bool) -> None:
        super().__init__(folder)
        self.server = server
        self.bucket = server.bucket(versioned=versioned)
        self.uri = f"s3://{self.bucket}/runs/one"
        self.beside = folder / "beside"
        for number, name in enumerate(("routing.key", "exclusion.key")):
            (folder / name).write_text(f"0{number}" * 32)
            (folder / name).chmod(0o600)
        routing = {"key_file": str(folder / "routing.key"), "exclusion_key_file": str(folder / "exclusion.key")}
        self.write_recipe(ledger=str(self.beside / "ledger.db"), routing=routing)

    def content(self) -> dict[str, bytes]:
        found = everything(self.server, self.bucket)
        beside = [p for p in self.beside.rglob("*") if p.is_file() and p.parent.name != "locks"]
        parts = {f"{key.removeprefix('runs/one/')}": content or b"" for (key, _), content in found.items()}
        assert len(parts) == len(found), "a key has more than one version, or a delete marker"
        left = {f"{key} (unfinished)": b"" for key in uploads(self.server, self.bucket)}
        return parts | left | {f"beside/{p.name}": p.read_bytes() for p in beside if p.name != "ledger.db-journal"}

    def begin_anew(self) -> None:
        client = self.server.client
        for upload in client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", []):
            client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        for key, version in everything(self.server, self.bucket):
            client.delete_object(Bucket=self.bucket, Key=key, VersionId=version)
        shutil.rmtree(self.beside, ignore_errors=True)

    def keep(self) -> None:
        self.kept = everything(self.server, self.bucket)
        crash_kit.copy_store(self.beside, self.folder / "kept")

    def restore(self) -> None:
        self.begin_anew()
        crash_kit.copy_store(self.folder / "kept", self.beside)
        for (key, _), content in self.kept.items():
            self.server.client.put_object(Bucket=self.bucket, Key=key, Body=content)


def decoded(content: bytes) -> bytes:
    """Bytes as they are, and unpacked if they are a table."""
    if content[:4] == b"PAR1":
        content += repr(papq.read_table(io.BytesIO(content)).to_pydict()).encode()
    return content


def person_in_the_middle(store: Store) -> str:
    """Somebody whose stage is the first of two, so that both have to be trained again."""
    return next(p for p in PEOPLE["person"].unique().to_pylist() if store.opened.router.route_one(p)[1] == 1)


def records_of(person: str) -> list[str]:
    return PEOPLE.filter(pa.array([p == person for p in PEOPLE["person"].to_pylist()]))["record"].to_pylist()
