"""Corruption is loud: whatever happens to the bytes of a stage, it is an error with a name, never another state."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import zarr
from checkpoint_kit import STAGE, files_of, make_state, same, write

from sisa.checkpoints import CheckpointStore, MissingStage, StageId, packing, stage
from sisa.checkpoints.manifest import sealed, unsealed
from sisa.errors import DamagedError
from sisa.state import StageState

CHUNKS = 5


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckpointStore:
    """A store with one stage of several chunks."""
    monkeypatch.setattr(stage, "chunking", partial(packing.chunking, chunk_bytes=192))
    store = CheckpointStore(tmp_path / "checkpoints")
    write(store, make_state())
    assert len(list((store.path(STAGE) / "state").glob("c.*"))) == CHUNKS
    return store


def test_no_flipped_bit_goes_unnoticed(store):
    rng = random.Random(5)
    expected = store.load(STAGE)
    for name, content in files_of(store.path(STAGE)).items():
        path = store.path(STAGE) / name
        for position in range(rng.randrange(2), len(content), 2):
            changed = bytearray(content)
            changed[position] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            try:
                manifest, state = store.load(STAGE)
            except DamagedError as error:
                assert "stage 2 of shard 3 is damaged" in error.message  # noqa: PT017 - most flips, not all
                continue
            # The case of a hexadecimal escape or of an exponent's E means nothing.
            assert name.endswith(".json"), (name, position)
            assert manifest == expected[0]
            assert same(expected[1], state)
        path.write_bytes(content)
    assert same(expected[1], store.load(STAGE)[1])


@pytest.mark.parametrize("number", range(CHUNKS))
def test_a_lost_chunk_is_named(store, number):
    (store.path(STAGE) / "state" / f"c.{number}").unlink()
    with pytest.raises(DamagedError, match=rf"stage 2 of shard 3 is damaged: state/c\.{number} is missing"):
        store.load(STAGE)


def test_a_lost_chunk_of_zeros_is_no_zeros(store):
    zeros = StageId(shard=0, stage=1, key="0" * 64, platform="0" * 12)
    write(store, StageState({"model.w": np.zeros(500, np.float32)}), zeros)
    chunks = sorted((store.path(zeros) / "state").glob("c.*"))
    assert len(chunks) > 3, "a chunk of zeros was not written"
    chunks[2].unlink()
    with pytest.raises(DamagedError, match=r"is missing"):
        store.load(zeros)
    # Zarr alone sees nothing wrong, and the digest of zeros is that of zeros: this is what the check is for.
    assert not zarr.open_array(store.path(zeros) / "state", mode="r")[:].any()


def test_all_lost_chunks_are_named(store):
    for number in (1, 4):
        (store.path(STAGE) / "state" / f"c.{number}").unlink()
    with pytest.raises(DamagedError, match=r"state/c\.1 is missing; state/c\.4 is missing"):
        store.load(STAGE)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: b"",
        lambda content: content[:3],
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content + b"\0",
        lambda content: content * 2,
        lambda content: bytes(len(content)),
        lambda content: content[:-4] + bytes(4),
    ],
)
def test_a_spoiled_chunk_is_named(store, spoil: Callable[[bytes], bytes]):
    path = store.path(STAGE) / "state" / "c.3"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DamagedError, match=r"state/c\.3 is damaged"):
        store.load(STAGE)


def test_chunks_that_pass_their_checksums_must_be_the_right_ones(store):
    chunks = store.path(STAGE) / "state"
    shutil.copyfile(chunks / "c.1", chunks / "c.0")
    with pytest.raises(DamagedError, match="digest"):
        store.load(STAGE)


def test_a_state_of_another_stage_in_the_same_shape_is_noticed(store):
    other = StageId(shard=3, stage=2, key="ee" * 32, platform=STAGE.platform)
    write(store, make_state(seed=1), other)
    shutil.rmtree(store.path(STAGE) / "state")
    shutil.copytree(store.path(other) / "state", store.path(STAGE) / "state")
    with pytest.raises(DamagedError, match="digest"):
        store.load(STAGE)
    shutil.rmtree(store.path(STAGE))
    shutil.copytree(store.path(other), store.path(STAGE))
    for ask in (store.load, store.manifest):
        with pytest.raises(DamagedError, match=f"it holds {other.folder}"):
            ask(STAGE)


@pytest.mark.parametrize("name", ["zarr.json", "state/zarr.json", "state"])
def test_lost_metadata_is_named(store, name):
    path = store.path(STAGE) / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DamagedError, match=r"zarr\.json is missing") as caught:
        store.load(STAGE)
    assert not isinstance(caught.value, MissingStage)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["manifest"].update(records=1),
        lambda content: content["manifest"].update(parent_key=""),
        lambda content: content["manifest"].pop("worker"),
        lambda content: content["manifest"].update(added=1),
        lambda content: content["scalars"].update({"optimizer.0.lr": 0.5}),
        lambda content: content["index"].pop(),
        lambda content: content.update(format=2),
        lambda content: content.pop("digest"),
        lambda content: content.clear(),
    ],
)
def test_edited_attributes_are_noticed(store, change: Callable[[dict], object]):
    path = store.path(STAGE) / "zarr.json"
    whole = json.loads(path.read_text())
    change(whole["attributes"]["sisa"])
    path.write_text(json.dumps(whole))
    for ask in (store.load, store.manifest):
        with pytest.raises(DamagedError, match="stage 2 of shard 3 is damaged"):
            ask(STAGE)


def test_a_stage_of_another_format_is_refused(store):
    path = store.path(STAGE) / "zarr.json"
    whole = json.loads(path.read_text())
    whole["attributes"]["sisa"] = sealed(unsealed(whole["attributes"]["sisa"]) | {"format": 2})
    path.write_text(json.dumps(whole))
    with pytest.raises(DamagedError, match="format 2, expected 1"):
        store.load(STAGE)


@pytest.mark.parametrize("name", ["zarr.json", "state/zarr.json"])
@pytest.mark.parametrize("change", [{"zarr_format": 2}, {"node_type": "other"}, {"added": 1}, {"fill_value": 1}])
def test_edited_metadata_of_zarr_is_noticed(store, name, change):
    path = store.path(STAGE) / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DamagedError, match=r"zarr\.json is damaged"):
        store.load(STAGE)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"attributes": []}', '{"attributes": {"sisa": 1}}', "\xff"])
def test_other_json_is_noticed(store, text):
    (store.path(STAGE) / "zarr.json").write_text(text, encoding="latin-1")
    with pytest.raises(DamagedError, match=r"zarr\.json is damaged"):
        store.load(STAGE)


def test_the_ledger_has_the_last_word(store):
    manifest = store.manifest(STAGE)
    assert store.load(STAGE, expect_full_digest=manifest.full_digest)[0] == manifest
    with pytest.raises(DamagedError, match="expected the state 00"):
        store.load(STAGE, expect_full_digest="00")


def test_a_stage_that_goes_while_it_is_read_is_missing_not_damaged(store, monkeypatch):
    monkeypatch.setattr(stage, "aligned_zeros", lambda size: (store.remove(STAGE), packing.aligned_zeros(size))[1])
    with pytest.raises(MissingStage):
        store.load(STAGE)


def test_strays_are_everything_that_is_no_part_of_a_stage(store):
    folder = store.path(STAGE)
    strays = [
        store.root / "shard-0003.partial",
        store.root / "tmp-1",
        store.root / "notes.txt",
        store.root / "shard-3",
        folder.parent / "tmp-2",
        folder.parent / "stage-02-short",
        folder.parent / "x.partial",
        folder / "notes.txt",
        folder / "state" / f"c.{CHUNKS}",
        folder / "state" / "c.0.1234.partial",
        folder / "state" / "tmp-3",
    ]
    for path in strays:
        path.write_bytes(b"x")
    links = [store.root / "shard-0007", folder.parent / f"stage-01-{'0' * 64}.{'0' * 12}", folder / "state" / "c.9"]
    for path in links:
        path.symlink_to(folder)
    for path in (folder / "state" / "c.0", store.root / "zarr.json"):
        path.symlink_to(path.rename(store.root.parent / path.name))
        links.append(path)
    changed = folder.parent / "zarr.json"
    changed.write_bytes(changed.read_bytes().replace(b"group", b"grouq"))
    assert store.strays() == sorted([*strays, *links, changed])
    assert store.all_stages() == [STAGE]
    assert same(make_state(), store.load(STAGE)[1])


@pytest.mark.parametrize("names", [["."], ["shard-0003"], [".", "shard-0003"]])
def test_damaged_metadata_of_the_groups_around_is_healed_by_the_next_write(store, names):
    damaged = [store.root / name / "zarr.json" for name in names]
    for path in damaged:
        path.write_bytes(b"")
    assert store.strays() == sorted(damaged)
    write(store, make_state(), StageId(shard=3, stage=1, key="0" * 64, platform="0" * 12))
    assert store.strays() == []
    assert STAGE.folder.split("/")[1] in zarr.open_group(store.root, mode="r")["shard-0003"]


def test_the_chunks_of_a_stage_with_a_damaged_manifest_are_no_strays(store):
    (store.path(STAGE) / "zarr.json").write_bytes(b"{}")
    assert store.strays() == []
