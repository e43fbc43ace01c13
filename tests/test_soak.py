"""Rounds of deletions, corrections, additions and repairs at once, with kills among them: at the end nothing is lost.

``SISA_SOAK_SEED`` gives the seed of a failed run again, ``SISA_SOAK_ROUNDS`` another number of rounds to a life.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import crash_kit as kit
import pytest
import soak_kit as soak
from postgres_kit import Server, running
from s3_kit import S3Server, everything, kept
from soak_life import Life
from soak_media import PREFIX, Bucket, Folder, Medium, small_parts


@pytest.fixture(autouse=True)
def _nobody_left() -> Iterator[None]:
    yield
    kit.Child.kill_all()


KINDS = {"folder": (False, False), "postgres": (False, True), "bucket": (True, True), "bucket-sqlite": (True, False)}
"""Of stores: whether one lies in a bucket, and whether its ledger lies on a server."""


@contextlib.contextmanager
def surroundings(kind: str) -> Iterator[tuple[Path, Medium, Server | None]]:
    """A folder, the medium of a store that isn't there yet, and the ledger's server."""
    in_bucket, on_server = KINDS[kind]
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(kit.fast_folder())
        server = stack.enter_context(running()) if on_server else None
        variables = {"XDG_CACHE_HOME": str(folder / "beside"), "PGPASSWORD": server.secret if server else ""}
        stack.enter_context(mock.patch.dict(os.environ, variables))
        if in_bucket:
            stack.enter_context(small_parts())
            yield folder, Bucket(folder, stack.enter_context(S3Server().running())), server
        else:
            yield folder, Folder(folder / "store"), server


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_is_there_is_found(kind: str) -> None:
    """The search can fail: before anybody is deleted, it finds them wherever they are."""
    with surroundings(kind) as (folder, medium, server):
        life = Life(folder, "there", 1, medium, server)
        found: dict[str, set[str]] = {}
        for name, content in medium.contents():
            words = soak.words_in(content) | soak.keys_in(content)
            found.setdefault(name.removeprefix("beside/").split("/")[0], set()).update(words)
        everybody = {
            word for row in life.model.present() for word in (row.record, row.person, row.tag, soak.word(row.x))
        }
        assert everybody <= found["records"]
        assert any(word.startswith("tag-") for word in found["checkpoints"])  # of the first slices, in the vocabulary
        assert not everybody & set().union(
            *(words for name, words in found.items() if name not in {"records", "checkpoints"})
        )
        served = [set(soak.keys_in(content)) for name, content in life._server() if "pg_wal" not in name]
        assert life.digests <= (set().union(*served) if server else found["ledger.db"])
        assert not server or life.digests <= served[0]  # the dump


def test_what_a_bucket_hides_is_found() -> None:
    """The search finds older versions, what lies under a delete marker, and parts of an upload that nobody ended."""
    with surroundings("bucket-sqlite") as (_, medium, _):
        assert isinstance(medium, Bucket)
        with S3Server().running() as server:  # another one: the same memory
            client, where = server.client, {"Bucket": medium.bucket}
            for number, key in enumerate(("older", "deleted", "checkpoints/shard-0000/stage-01-" + 64 * "a")):
                client.put_object(**where, Key=PREFIX + key, Body=f"per-{number:010d}")
            client.put_object(**where, Key=PREFIX + "older", Body=b"nobody")
            client.delete_object(**where, Key=PREFIX + "deleted")
            upload = client.create_multipart_upload(**where, Key=PREFIX + "records/unfinished")["UploadId"]
            part = {**where, "Key": PREFIX + "records/unfinished", "UploadId": upload}
            client.upload_part(**part, PartNumber=1, Body=b"per-0000000003")
            listed = {(key, version) for key, version in everything(server, medium.bucket)}
        assert {(each.key, each.id) for each in kept(medium.bucket) if each.kind != "upload"} == listed
        found = set().union(*(soak.words_in(content) for _, content in medium.contents()))
        assert found == {f"per-{number:010d}" for number in range(4)}
        assert medium.stages() == {(0, 1, 64 * "a")}
        assert sorted((where, name.split()[0]) for where, name in medium.hidden()) == [
            ("", "marker"), ("", "older"), ("", "older"), ("records", "upload"),
        ]  # fmt: skip
        assert len(medium.leftovers()) == 4


def rounds_of(usual: int) -> int:
    return int(os.environ.get("SISA_SOAK_ROUNDS", usual))


def seed_of(number: int) -> str:
    """As it was given; in CI always the same, elsewhere another one each time."""
    given = os.environ.get("SISA_SOAK_SEED")
    return given or (f"ci-{number}" if os.environ.get("CI") else secrets.token_hex(4))


def live(kind: str, number: int, rounds: int) -> None:
    with surroundings(kind) as (folder, medium, server):
        Life(folder, seed_of(number), rounds_of(rounds), medium, server).live()


@pytest.mark.parametrize(("kind", "rounds"), [("folder", 10), ("postgres", 5), ("bucket", 5)])
def test_a_short_life(kind: str, rounds: int) -> None:
    live(kind, 0, rounds)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "kind"), list(enumerate((*("folder", "postgres", "bucket") * 3, "bucket-sqlite"))))
def test_a_long_life(number: int, kind: str) -> None:
    live(kind, number, 50)
