"""Damage that goes unnoticed: lost chunks read as zeros, flipped bits, rows that aren't those that were written."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as papq
import pytest
import tables
from store_kit import KEY, assert_same, at, chunks, copied, files, partition, slices, stage_folder, train, write

import sisa
from sisa.checkpoints import StageId
from sisa.cli.main import run
from sisa.errors import DamagedError
from sisa.records.partition import read_partition
from sisa.records.seal import seal
from sisa.routing.keys import shard_keys
from sisa.state import StageState

RECIPE = tables.mixed_recipe()
TABLE = tables.mixed()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"), RECIPE, TABLE)


@pytest.fixture
def store(trained, tmp_path):
    return copied(trained, tmp_path)


@pytest.fixture
def ask(store, tmp_path, capsys):
    """Run a verb on the store and return its exit code and what it said."""
    root = str(store.opened.layout.root)
    (tmp_path / "config.yaml").write_text(json.dumps(at(tmp_path, RECIPE, write(TABLE, tmp_path / "all.parquet"))))
    inline = ["--executor", "inline", "--json"]
    target = str(tmp_path / "answers.parquet")
    words = {
        "train": ["train", str(tmp_path / "config.yaml"), "--store", root, *inline],
        "verify": ["verify", "--store", root, *inline],
        "replay": ["verify", "--store", root, "--replay", "all", *inline],
        "repair": ["repair", "--store", root, *inline],
        "predict": ["predict", "--store", root, str(tmp_path / "all.parquet"), "--output", target, "--json"],
        "status": ["status", "--store", root, "--json"],
    }

    def asked(verb, *more):
        code = run([*words.get(verb, [verb, "--store", root]), *more])
        said = json.loads(capsys.readouterr().out)
        assert ("error" in said) == (code in (2, 3))
        return code, said

    return asked


def chunk(folder):
    return next(iter(sorted(folder.rglob("c.*"))))


def flipped(path, *, at_byte=None, bit=4):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at_byte is None else at_byte] ^= 1 << bit
    path.write_bytes(content)


STAGE_DAMAGE = {
    "the stage is missing": shutil.rmtree,
    "a chunk is missing": lambda folder: chunk(folder).unlink(),
    "a chunk is empty": lambda folder: chunk(folder).write_bytes(b""),
    "a chunk is truncated": lambda folder: chunk(folder).write_bytes(chunk(folder).read_bytes()[:-64]),
    "a chunk is zeros": lambda folder: chunk(folder).write_bytes(bytes(chunk(folder).stat().st_size)),
    "a bit is flipped": lambda folder: flipped(chunk(folder)),
    "a bit is flipped in the checksum": lambda folder: flipped(chunk(folder), at_byte=-1),
    "the metadata is missing": lambda folder: (folder / "zarr.json").unlink(),
    "a bit is flipped in the metadata": lambda folder: flipped(folder / "zarr.json"),
    "the array's metadata is missing": lambda folder: next(folder.glob("*/zarr.json")).unlink(),
    "the array is missing": lambda folder: shutil.rmtree(next(folder.glob("*/zarr.json")).parent),
}


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", STAGE_DAMAGE)
def test_8_a_checkpoint_whose_damage_goes_unnoticed(store, trained, ask, name, stage):
    STAGE_DAMAGE[name](stage_folder(store, 1, stage))
    place = f"stage {stage} of shard 1"
    for verb, expected in [("train", 3), ("predict", 3 if stage == 3 else 0), ("verify", 1)]:
        code, said = ask(verb)
        assert code == expected, (verb, said)
        if code == 3:
            assert place in said["error"]["message"]
            assert "repair" in said["error"]["hint"]
        if code == 1:
            assert not said["ok"]
            assert len(said["problems"]) == 1
            assert place in said["problems"][0] or f"shard 1, stage {stage}" in said["problems"][0]
    code, said = ask("repair")
    assert (code, said["stages_retrained"], said["shards"]) == (0, 1, [1])
    assert chunks(store) == chunks(trained)
    assert [ask(verb)[0] for verb in ("train", "predict", "replay")] == [0, 0, 0]
    assert_same(store, trained)


def test_8_no_flipped_bit_of_a_stage_goes_unnoticed(store):
    folder = stage_folder(store, 0, 3)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for position in np.linspace(0, len(content) - 1, 12).astype(int):
            flipped(path, at_byte=position)
            found = store.verify(executor="inline")
            assert not found.ok, f"{path.name}, byte {position}"
            assert all("shard 0" in problem for problem in found.problems)
            path.write_bytes(content)
    assert store.verify(executor="inline").ok


def test_8_two_stages_that_changed_places(store, ask):
    """Each is whole in itself, but not what its name says."""
    one, other = stage_folder(store, 1, 2), stage_folder(store, 1, 3)
    one.rename(one.with_name("away"))
    other.rename(one)
    one.with_name("away").rename(other)
    assert [ask(verb)[0] for verb in ("train", "predict", "verify")] == [3, 3, 1]
    assert ask("repair")[0] == 0
    assert ask("replay")[0] == 0


@pytest.mark.parametrize(
    "tensors",
    [{"model.w": np.zeros((4, 3), np.float32), "buffer.n": np.zeros((), np.int64)}, {"model.w": np.zeros((0, 3))}, {}],
    ids=["zeros", "nothing in it", "no tensor"],
)
def test_8_zero_tensors_that_can_not_be_read_again(store, tensors):
    """A row of zeros is written like any other; when its chunk is lost, that is no row of zeros."""
    checkpoints, identity = store.opened.checkpoints, StageId(0, 1, "ab" * 32, "0123456789ab")
    told = {"parent_key": "", "records": 0, "seconds": 0.0, "worker": "", "fingerprint": {}}
    checkpoints.write(identity, StageState(dict(tensors)), **told)
    read = checkpoints.load(identity)[1].tensors
    assert {n: (a.shape, a.dtype, a.tobytes()) for n, a in read.items()} == {
        n: (a.shape, a.dtype, a.tobytes()) for n, a in tensors.items()
    }
    for path in checkpoints.path(identity).rglob("c.*"):
        path.unlink()
        with pytest.raises(DamagedError, match="stage 1 of shard 0"):
            checkpoints.load(identity)


# --- rows ------------------------------------------------------------------------------------------


def rewritten(path, change):
    """A whole and valid file with other rows."""
    papq.write_table(change(papq.read_table(path, partitioning=None)), path, write_page_checksum=True)
    seal(path)


def another_value(rows):
    index = rows.column_names.index("hours")
    hours = [1.0 if hour is None else hour + 1 for hour in rows["hours"].to_pylist()]
    return rows.set_column(index, rows.schema.field(index), tables.pa.array(hours, rows.schema.field(index).type))


def another_owner(rows):
    index = rows.column_names.index("_sisa_subject")
    return rows.set_column(index, rows.schema.field(index), tables.pa.array(["me"] * len(rows)))


ROW_DAMAGE = {
    "the file is missing": lambda path, _: path.unlink(),
    "the file is empty": lambda path, _: path.write_bytes(b""),
    "the file is truncated": lambda path, _: path.write_bytes(path.read_bytes()[:-40]),
    "half of the file": lambda path, _: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a bit is flipped in a page": lambda path, _: flipped(path, at_byte=path.stat().st_size // 3),
    "a bit is flipped in the footer": lambda path, _: flipped(path, at_byte=-20),
    "another slice's file": lambda path, other: shutil.copy(other, path),
    "a row less": lambda path, _: rewritten(path, lambda rows: rows.slice(1)),
    "a row twice": lambda path, _: rewritten(path, lambda rows: tables.pa.concat_tables([rows, rows.slice(0, 1)])),
    "another value": lambda path, _: rewritten(path, another_value),
    "another owner": lambda path, _: rewritten(path, another_owner),
}


@pytest.mark.parametrize("name", ROW_DAMAGE)
def test_8_rows_whose_damage_goes_unnoticed(store, trained, ask, name):
    path = partition(store, 1, 2)
    whole = path.read_bytes()
    ROW_DAMAGE[name](path, partition(store, 1, 3))
    code, said = ask("train")
    assert code == 3, said
    code, said = ask("verify")
    assert code == 1
    assert any("shard=0001/slice=02" in text or "shard 1, slice 2" in text for text in said["problems"])
    assert ask("replay")[0] == 1
    assert ask("predict")[0] == 0  # the weights are whole, and they are what answers
    path.write_bytes(whole)
    assert [ask(verb)[0] for verb in ("train", "verify", "predict")] == [0, 0, 0]
    assert_same(store, trained)


@pytest.mark.parametrize("name", ROW_DAMAGE)
def test_8_damage_is_never_trained_on_as_if_it_were_a_correction(store, ask, name):
    """A stage has to be made again, and its rows are damaged: it isn't made, and the file to restore is named."""
    path = partition(store, 1, 2)
    whole = path.read_bytes()
    ROW_DAMAGE[name](path, partition(store, 1, 3))
    shutil.rmtree(stage_folder(store, 1, 3))
    before = files(store.opened.layout.checkpoints)
    code, said = ask("repair")
    assert code == 3
    assert "slice=02" in said["error"]["message"] + said["error"]["hint"] or "slice 2" in said["error"]["message"]
    assert files(store.opened.layout.checkpoints) == before
    path.write_bytes(whole)
    assert ask("repair")[0] == 0
    assert ask("replay")[0] == 0


def test_8_no_flipped_bit_of_rows_goes_unnoticed(store):
    """Any byte: pages, what lies around them, and the footer, most of which means nothing to a reader of Parquet."""
    path, keys = partition(store, 0, 2), shard_keys(KEY, 0)
    content = path.read_bytes()
    for position in range(len(content)):
        flipped(path, at_byte=position, bit=position % 8)
        with pytest.raises(DamagedError, match=r"shard=0000/slice=02"):
            read_partition(store.opened.layout, store.opened.recipe, keys, 0, 2)
        path.write_bytes(content)
    for position in (1, len(content) // 2, len(content) - 60):
        flipped(path, at_byte=position)
        assert not store.verify(executor="inline").ok
        path.write_bytes(content)
    assert store.verify(executor="inline").ok


def test_8_a_sealed_file_is_a_parquet_file_that_anybody_reads(store):
    for (shard, slice_), records in slices(store).items():
        rows = papq.read_table(partition(store, shard, slice_), partitioning=None, page_checksum_verification=True)
        assert sorted(rows["_sisa_record"].to_pylist()) == records


def test_8_forgetting_does_not_wait_for_damaged_rows(store, ask):
    """Rows of the slice can't be read: they can't be erased either, which is an error. But nobody answers with them."""
    path = partition(store, 1, 2)
    whole = path.read_bytes()
    victim, kept = slices(store)[1, 2][:2]
    rewritten(path, another_value)
    before = store.version
    code, said = ask("delete", "--record", victim, "--executor", "inline", "--json")
    assert code == 3, said
    code, said = ask("status")
    assert [request["state"] for request in said["requests"]] == ["accepted"]
    assert said["version"] == before + 1
    assert [(c["stage"], c["quarantined"]) for c in said["constituents"]] == [(3, False), (1, True)]
    assert ask("predict")[0] == 0
    assert ask("verify")[0] == 1
    assert ask("repair")[0] == 3
    path.write_bytes(whole)
    assert ask("repair")[0] == 0
    assert victim not in slices(store)[1, 2]
    assert kept in slices(store)[1, 2]
    assert ask("replay")[0] == 0


# --- what lies around ------------------------------------------------------------------------------


def test_8_rows_and_stages_that_nobody_knows_are_found(store, ask):
    root = store.opened.layout.root
    assert ask("verify")[0] == 0
    strays = [
        root / "checkpoints" / "shard-0000" / "old",
        root / "records" / "shard=0000" / "slice=01" / "copy.parquet",
    ]
    strays += [root / "notes.txt", root / "records" / "tmp-rows"]
    for stray in strays:
        stray.write_bytes(b"x")
        code, said = ask("verify")
        assert (code, len(said["problems"])) == (1, 1)
        assert str(stray.relative_to(root)) in said["problems"][0]
        stray.unlink()
    shutil.copytree(
        stage_folder(store, 0, 2), stage_folder(store, 0, 2).with_name(f"stage-02-{'ab' * 32}.0123456789ab")
    )
    assert ask("verify")[0] == 1


@pytest.mark.parametrize("name", ["ledger.db", "keys/routing.key", "keys/exclusion.key"])
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_8_a_part_of_the_store_is_lost(store, ask, name, how):
    path = store.opened.layout.root / name
    path.unlink() if how == "missing" else path.write_bytes(b"")
    assert [ask(verb)[0] for verb in ("train", "predict", "repair", "status")] == [3, 3, 3, 3]
    code, said = ask("verify")
    assert code == 1
    assert path.name in said["problems"][0]


def test_8_a_recipe_that_was_edited_in_the_store(store, ask):
    path = store.opened.layout.recipe
    path.write_text(path.read_text().replace("lr: 0.1", "lr: 0.2"))
    assert [ask(verb)[0] for verb in ("predict", "repair", "status")] == [3, 3, 3]
    assert ask("verify")[0] == 1


def test_8_a_secret_that_others_can_read_is_told(store, ask):
    store.opened.layout.routing_key.chmod(0o644)
    code, said = ask("verify")
    assert (code, len(said["problems"])) == (1, 1)
    assert "0600" in said["problems"][0]
    assert sisa.open_store(store.opened.layout.root).version == store.version
