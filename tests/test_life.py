"""The life of a store, on every medium: trained, deleted from, killed, damaged, healed, proven, asked, served."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import crash_kit
import httpx
import numpy as np
import pyarrow.parquet as papq
import pytest
from life_kit import PEOPLE, PERSON, RECORDS, InBucket, InFolder, Killed, Medium, decoded, state
from s3_kit import S3Server, everything, ignores_conditions, refuses
from serving_kit import wait_for

import sisa
from sisa.errors import DamagedError, RecipeError, SisaError, StoreError, UserError
from sisa.remote import locate
from sisa.storage import storage_at
from sisa.storage.versions import Versions


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server().running() as running:
        yield running


class Life(Medium):
    """Inherited by each medium."""

    def test_it_is_trained_once_and_is_what_a_folder_would_hold(self) -> None:
        store = self.train()
        assert state(store) == state(self.elsewhere(PEOPLE))
        again = self.train()
        assert (again.training.stages_trained, again.training.stages_reused) == (0, 4)
        assert state(self.opened()) == state(store)
        assert store.verify(executor="inline").problems == []

    def test_who_is_deleted_is_nowhere_and_the_rest_is_as_if_they_had_never_been(self) -> None:
        store = self.train()
        assert self.holding(PERSON, *RECORDS)
        before = self.raw()
        shard, slice_ = store.opened.router.route_one(PERSON)
        tainted = [row for row in store.opened.ledger.stages.all(shard) if row.stage >= slice_ >= 1]
        assert tainted
        deferred = store.delete(subjects=[PERSON], defer=True)
        assert deferred.state == "stages_purged"
        assert not self.holding(PERSON, *RECORDS, *(row.key for row in tainted))
        gone = {before[key] for key in before if "/c." in key and any(row.key in key for row in tainted)}
        assert not gone & set(self.raw().values())
        assert self.opened().repair(executor="inline").state == "repaired"
        assert state(self.opened()) == state(self.elsewhere(self.without(PERSON)))
        found = self.opened().verify(replay="all", executor="inline")
        assert (found.problems, found.comparison, found.stages_replayed) == ([], "bitwise", 4)
        assert not self.holding(PERSON, *RECORDS)

    def test_a_source_that_still_has_them_brings_nobody_back(self) -> None:
        self.train().delete(subjects=[PERSON], executor="inline")
        self.train()
        assert not self.holding(PERSON, *RECORDS)

    def test_the_last_people_of_a_slice_take_its_rows_along(self) -> None:
        store = self.train()
        place = store.opened.router.route_one(PERSON)
        together = [p for p in set(PEOPLE["person"].to_pylist()) if store.opened.router.route_one(p) == place]
        store.delete(subjects=together, executor="inline")
        assert not [key for key in self.raw() if store.opened.layout.partition_key(*place) in key]
        assert store.verify(replay="all", executor="inline").problems == []
        assert state(store) == state(self.elsewhere(self.without(*together)))

    @pytest.mark.parametrize("kind", ["missing stage", "missing chunk", "changed chunk", "changed manifest"])
    def test_a_damaged_stage_is_loud_and_healed(self, kind: str) -> None:
        store = self.train()
        before = state(store)
        row = store.opened.ledger.versions.live().members[0]
        keys = [key for key in self.raw() if row.key in key]
        chunk = next(key for key in keys if key.endswith("/c.0"))
        manifest = next(key for key in keys if key.endswith("zarr.json") and "/state/" not in key)
        content = self.raw()[manifest if kind == "changed manifest" else chunk]
        if kind == "missing stage":
            for key in keys:
                self.change(key, None)
        else:
            flipped = content[:70] + bytes([content[70] ^ 1]) + content[71:]
            self.change(manifest if kind == "changed manifest" else chunk, None if "missing" in kind else flipped)
        opened = self.opened()
        with pytest.raises(DamagedError):
            opened.predict({"x": [0.5], "z": [0.5]})
        assert len(opened.verify(executor="inline").problems) >= 1
        opened.repair(executor="inline")
        assert state(opened) == before
        assert opened.verify(replay="all", executor="inline").problems == []

    def test_damaged_rows_are_loud_and_never_trained_on(self) -> None:
        self.train()
        key = next(key for key in self.raw() if key.endswith(".parquet") and "shard=0000" in key)
        content = self.raw()[key]
        for place in (30, len(content) // 2, len(content) - 20):
            self.change(key, content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(DamagedError):
                self.train()
            assert self.opened().verify(executor="inline").problems
        self.change(key, None)
        with pytest.raises(DamagedError):
            self.train()
        self.change(key, content)
        assert self.opened().verify(executor="inline").problems == []

    def test_a_stranger_in_the_store_is_told(self) -> None:
        self.train()
        strangers = ["notes.txt", "records/notes.txt", "records/shard=0000/slice=01/copy.parquet"]
        strangers += ["checkpoints/shard-0000/notes.txt", "scratch/0123456789abcdef/notes", "audit/notes"]
        for key in strangers:
            storage_at(self.recipe()["store"]).put(key, b"somebody's")
        told = " ".join(self.opened().verify(executor="inline").problems)
        for key in strangers:
            assert key in told or (str(Path(key).parent) in told and key.startswith(("scratch", "audit"))), key

    @pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
    def test_killed_at_any_writing_call_of_a_deletion_it_ends_the_same(self, stride: int) -> None:
        expected = state(self.elsewhere(self.without(PERSON)))
        store = self.train()
        self.keep(store)
        for number in range(2, 200, stride):
            self.restore()
            try:
                with self.killed_at(number):
                    self.opened().delete(subjects=[PERSON], executor="inline")
                break
            except Killed:
                pass
            self.opened().repair(executor="inline")
            opened = self.opened()
            assert state(opened) == expected
            assert not self.holding(PERSON, *RECORDS)
            assert opened.verify(executor="inline").problems == []
        assert number > 6

    @pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
    def test_killed_at_any_writing_call_of_a_training_it_ends_the_same(self, stride: int) -> None:
        expected = state(self.elsewhere(PEOPLE))
        kills = 0
        for number in range(2, 400, stride):
            self.begin_anew()
            try:
                with self.killed_at(number):
                    self.train()
                break
            except Killed:
                kills += 1
            store = self.train()
            assert state(store) == expected
            assert store.verify(executor="inline").problems == []
        assert kills

    def test_a_table_is_answered(self, tmp_path: Path) -> None:
        store = self.train()
        papq.write_table(PEOPLE.select(["x", "z"]), tmp_path / "in.parquet")
        from sisa.store.predict import predict_table

        done = predict_table(store, str(tmp_path / "in.parquet"), tmp_path / "out.parquet")
        answers = papq.read_table(tmp_path / "out.parquet")
        scores = np.array(answers["scores"].to_pylist())
        assert np.array_equal(scores, store.predict_proba(PEOPLE.select(["x", "z"])))
        assert (done.rows, done.version) == (len(PEOPLE), store.version)

    def test_the_commands_take_its_uri(self) -> None:
        self.train()
        uri = self.recipe()["store"]
        for words in (["delete", "--subject", PERSON], ["repair"], ["verify", "--replay", "all"], ["status"]):
            command = [sys.executable, "-m", "sisa", words[0], "--store", uri, "--json", *words[1:]]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            told = json.loads(done.stdout)
            assert told
        assert not self.holding(PERSON, *RECORDS)

    def test_it_is_served_and_deleted_from_over_http(self, tmp_path: Path) -> None:
        store = self.train()
        token = store.opened.ledger.tokens.create(("predict", "delete", "read"))[0]
        command = [sys.executable, "-m", "sisa", "serve", "--store", self.recipe()["store"], "--port", "0"]
        with (tmp_path / "err").open("wb") as err:
            process = subprocess.Popen(command, stderr=err, stdin=subprocess.DEVNULL)
        try:
            address = wait_for(
                lambda: [w for w in (tmp_path / "err").read_text().split() if w.startswith("http://127")],
                what=(tmp_path / "err").read_text,
            )[0]
            with httpx.Client(
                base_url=address, headers={"authorization": f"Bearer {token}"}, trust_env=False, timeout=60
            ) as asking:
                wait_for(lambda: asking.get("/readyz").status_code == 200, what=lambda: "it is ready")
                told = asking.post("/predict", json={"rows": [{"x": 0.5, "z": 0.1}]}).json()
                assert told["version"] == store.version
                accepted = asking.post("/deletions", json={"subjects": [PERSON]}).json()
                wait_for(
                    lambda: asking.get(f"/deletions/{accepted['request']}").json()["state"] == "repaired",
                    what=lambda: f"it is repaired: {accepted}",
                )
                assert not self.holding(PERSON, *RECORDS)
        finally:
            process.terminate()
            process.wait(60)
        assert state(self.opened()) == state(self.elsewhere(self.without(PERSON)))

    @pytest.mark.ray
    def test_workers_of_ray_find_it_by_its_uri(self) -> None:
        store = self.train(executor="ray", workers=2)
        assert state(store) == state(self.elsewhere(PEOPLE))
        assert store.verify(replay="all", executor="ray", workers=2).problems == []


class TestLocal(Life, InFolder):
    pass


class BucketLife(Life, InBucket):
    """What only a bucket has is tested too."""

    # --- what only a bucket has ---------------------------------------------------------------------

    def test_nothing_secret_lies_in_the_bucket(self) -> None:
        self.train().delete(subjects=[PERSON], executor="inline")
        for name in ("routing.key", "exclusion.key"):
            secret = (self.folder / name).read_text()
            for content in everything(self.server, self.bucket).values():
                assert secret.encode() not in (content or b"")
                assert bytes.fromhex(secret) not in (content or b"") or not any(bytes.fromhex(secret))  # zeros occur
        kept = self.raw()["recipe.yaml"].decode()
        assert f"key_file: {self.folder / 'routing.key'}" in kept
        assert f"ledger: {self.folder / 'beside' / 'ledger.db'}" in kept

    @pytest.mark.parametrize("name", ["ledger", "routing.key_file", "routing.exclusion_key_file"])
    def test_what_it_needs_is_asked_for(self, name: str) -> None:
        asked = self.recipe()
        section, _, field = name.rpartition(".")
        del (asked[section] if section else asked)[field]
        with pytest.raises(RecipeError, match=name):
            sisa.train(asked, executor="inline")
        assert everything(self.server, self.bucket) == {}

    def test_a_ledger_on_a_server_leaves_nothing_on_this_host(
        self, postgres_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Then any host with the keys can do anything: rows are spooled on one for a moment, and nothing else."""
        for host in ("one", "two"):
            monkeypatch.setenv("XDG_CACHE_HOME", str(self.folder / host))
            asked = self.recipe(ledger=postgres_url)
            if host == "one":
                store = sisa.train(asked, executor="inline")
                assert state(store) == state(self.elsewhere(PEOPLE))
            else:
                store = sisa.open_store(asked["store"])
                store.delete(subjects=[PERSON], executor="inline")
                assert state(store) == state(self.elsewhere(self.without(PERSON)))
                assert store.verify(replay="all", executor="inline").problems == []
                assert sisa.train(asked, executor="inline").training.stages_trained == 0
            store.close()
        assert not self.holding(PERSON, *RECORDS)
        assert [path for host in ("one", "two") for path in (self.folder / host).rglob("*") if path.is_file()] == []
        assert postgres_url in self.raw()["recipe.yaml"].decode()

    def test_another_kind_of_ledger_is_refused_and_not_repeated(self) -> None:
        with pytest.raises(UserError, match="ledger") as caught:
            sisa.train(self.recipe(ledger="mysql://me:secret@host/name"), executor="inline")
        assert "secret" not in caught.value.message

    @pytest.mark.parametrize("name", ["routing.key", "exclusion.key"])
    def test_keys_that_everybody_reads_are_refused_and_told(self, name: str) -> None:
        (self.folder / name).chmod(0o644)
        with pytest.raises(UserError, match="0600"):
            self.train()
        (self.folder / name).chmod(0o640)
        store = self.train()
        (self.folder / name).chmod(0o644)
        assert any("0644" in problem for problem in store.verify(executor="inline").problems)

    def test_one_key_for_both_is_refused(self) -> None:
        (self.folder / "exclusion.key").write_bytes((self.folder / "routing.key").read_bytes())
        with pytest.raises(UserError, match="expected another"):
            self.train()

    @pytest.mark.parametrize("name", ["routing.key", "exclusion.key"])
    def test_another_key_opens_nothing(self, name: str) -> None:
        self.train().close()
        (self.folder / name).write_text("ff" * 32)
        with pytest.raises(DamagedError, match="not the key"):
            self.opened()
        (self.folder / name).unlink()
        with pytest.raises(DamagedError, match="can't be read"):
            self.opened()

    def test_another_ledger_is_not_taken_for_its_own(self) -> None:
        self.train().close()
        crash_kit.copy_store(self.folder / "beside", self.folder / "first")
        with pytest.raises(UserError, match="ledger"):
            sisa.train(self.recipe(ledger=str(self.folder / "other" / "ledger.db")), executor="inline")
        self.begin_anew()
        self.train().close()
        self.begin_anew_beside()
        with pytest.raises(DamagedError, match="not that of the store"):
            self.opened()
        with pytest.raises(DamagedError):
            self.train()

    def begin_anew_beside(self) -> None:
        shutil.rmtree(self.folder / "beside")
        crash_kit.copy_store(self.folder / "first", self.folder / "beside")

    def test_a_lost_recipe_is_not_made_anew(self) -> None:
        self.train().close()
        self.change("recipe.yaml", None)
        with pytest.raises(UserError, match="no store there"):
            self.opened()
        with pytest.raises(DamagedError, match=r"recipe\.yaml of the store is missing"):
            self.train()

    def test_a_prefix_or_a_folder_of_others_is_left_alone(self) -> None:
        self.server.client.put_object(Bucket=self.bucket, Key="runs/one/notes", Body=b"mine")
        with pytest.raises(UserError, match="not empty"):
            self.train()
        assert [key for key, _ in everything(self.server, self.bucket)] == ["runs/one/notes"]
        self.change("notes", None)
        (self.folder / "beside").mkdir()
        (self.folder / "beside" / "other.db").write_bytes(b"mine")
        with pytest.raises(UserError, match="folder of their own"):
            self.train()

    @pytest.mark.parametrize(
        "fault", [ignores_conditions, refuses("GET", query="versions"), refuses("POST", query="delete")]
    )
    def test_a_bucket_that_can_not_keep_the_promise_gets_no_record(self, fault: Any) -> None:
        with self.server.failing(fault), pytest.raises(UserError, match="can't be used"):
            self.train()
        assert not [key for key, _ in everything(self.server, self.bucket) if "tmp-" not in key]
        self.train()
        assert self.opened().verify(executor="inline").problems == []

    def test_a_server_that_fails_costs_nothing(self) -> None:
        store = self.train()
        with self.server.failing(refuses("POST", query="delete")), pytest.raises(StoreError) as caught:
            store.delete(subjects=[PERSON], executor="inline")
        assert isinstance(caught.value, SisaError)
        (request,) = store.opened.ledger.requests.all()
        assert request.state == ("accepted" if self.versioned else "rows_erased")
        store.repair(executor="inline")
        assert not self.holding(PERSON, *RECORDS)
        assert state(store) == state(self.elsewhere(self.without(PERSON)))

    def test_it_has_no_paths(self) -> None:
        layout = self.train().opened.layout
        for name in ("records", "checkpoints", "recipe", "keys", "scratch"):
            with pytest.raises(StoreError, match="has no path"):
                getattr(layout, name)
        assert locate(layout.uri) == layout


@pytest.mark.slow
class TestBucket(BucketLife):
    versioned = False


class TestVersionedBucket(BucketLife):
    versioned = True

    def test_versions_that_others_made_are_told_and_erased_by_a_repair(self) -> None:
        store = self.train()
        keys = [key for key in self.raw() if key.startswith(("records/", "checkpoints/shard-"))]
        client = self.server.client
        for key in keys:
            content = self.raw_of(key)
            client.put_object(Bucket=self.bucket, Key=f"runs/one/{key}", Body=PERSON.encode())
            client.put_object(Bucket=self.bucket, Key=f"runs/one/{key}", Body=content)
        problems = store.verify(executor="inline").problems
        assert {problem.partition(":")[0] for problem in problems} == set(keys)
        assert all("older version" in problem for problem in problems)
        store.repair(executor="inline")
        assert store.verify(executor="inline").problems == []
        self.raw()

    def test_killed_between_a_replacement_and_the_erasure_of_what_it_replaced(self) -> None:
        store = self.train()

        def killed(*_: object) -> None:
            raise Killed

        with mock.patch.object(Versions, "erase", killed), pytest.raises(Killed):
            store.delete(subjects=[PERSON], executor="inline")
        kept = everything(self.server, self.bucket).values()
        assert any(PERSON.encode() in decoded(content or b"") for content in kept), "the test must be able to fail"
        self.opened().repair(executor="inline")
        assert not self.holding(PERSON, *RECORDS)
        assert self.opened().verify(executor="inline").problems == []

    def raw_of(self, key: str) -> bytes:
        return bytes(self.server.client.get_object(Bucket=self.bucket, Key=f"runs/one/{key}")["Body"].read())

    def test_a_plain_delete_by_others_hides_nothing(self) -> None:
        store = self.train()
        key = next(key for key in self.raw() if key.endswith(".parquet"))
        self.server.client.delete_object(Bucket=self.bucket, Key=f"runs/one/{key}")
        problems = " ".join(store.verify(executor="inline").problems)
        assert "delete marker" in problems
        assert "older version" in problems
