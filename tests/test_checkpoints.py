"""Stages are kept whole, come back bit for bit, and are published once."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import zarr
from checkpoint_kit import STAGE, files_of, make_state, read_by_hand, same, write
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from sisa.checkpoints import CheckpointStore, MissingStage, StageId, group, packing, stage
from sisa.checkpoints.manifest import parse_shard, parse_stage
from sisa.errors import DamagedError, StoreError
from sisa.state import StageState, full_digest, state_digest

TENSORS = {
    "nothing": {},
    "scalar": {"model.w": np.array(1.5, np.float32)},
    "no elements": {"model.w": np.zeros((0, 3), np.float32), "model.v": np.ones(2, np.float32)},
    "only no elements": {"model.w": np.zeros((3, 0), np.float64)},
    "zeros": {"model.w": np.zeros((40, 50), np.float32)},
    "bool": {"buffer.mask": np.array([True, False, True])},
    "transposed": {"model.w": np.arange(12, dtype=np.float32).reshape(3, 4).T},
    "strided": {"model.w": np.arange(24, dtype=np.int16)[::-2]},
    "big-endian": {"optimizer.m": np.arange(5, dtype=">f8")},
    "read-only": {"model.w": np.broadcast_to(np.float32(3), (4, 2))},
    "NaN with a payload": {"model.w": np.array([0x7FC01234, 0x80000000], np.uint32).view(np.float32)},
    **{name: {"model.w": np.array([0, 1, 2]).astype(name)} for name in packing.DTYPES},
}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


@pytest.mark.parametrize("name", TENSORS)
def test_a_state_comes_back_bit_for_bit(store, name):
    state = StageState(TENSORS[name], {"optimizer.lr": 0.1, "schedule.epoch": 2})
    manifest = write(store, state)
    loaded_manifest, loaded = store.load(STAGE)
    assert same(state, loaded)
    assert loaded_manifest == manifest == store.manifest(STAGE)
    assert manifest.full_digest == full_digest(state) == full_digest(loaded)
    assert manifest.state_digest == state_digest(state)
    assert manifest.bytes == sum(array.nbytes for array in state.tensors.values())
    assert same(state, read_by_hand(store.path(STAGE)))
    assert store.strays() == []


def test_an_empty_state_is_a_stage_too(store):
    write(store, StageState(), records=0, epochs=None, steps=None)
    manifest, state = store.load(STAGE)
    assert state.empty
    assert (manifest.bytes, manifest.records, manifest.epochs, manifest.steps) == (0, 0, None, None)


@settings(max_examples=25)
@given(data=st.data())
def test_any_arrays_come_back(tmp_path_factory, data):
    arrays = npst.arrays(
        st.sampled_from(list(packing.DTYPES.values())), npst.array_shapes(min_dims=0, min_side=0, max_side=9)
    )
    names = st.sampled_from(["model.a", "model.b", "buffer.a", "preprocess.é", "optimizer.0.m", "schedule.x"])
    state = StageState(data.draw(st.dictionaries(names, arrays)), {})
    store = CheckpointStore(tmp_path_factory.mktemp("any"))
    write(store, state)
    assert same(state, store.load(STAGE)[1])
    assert same(state, read_by_hand(store.path(STAGE)))


def test_scalars_come_back_as_they_were_described(store):
    scalars = {"optimizer.betas": (0.9, 0.999), "preprocess.v": {"x": [None, True, 2**70, 5e-324, np.float64(0.1)]}}
    write(store, StageState({}, scalars))
    loaded = store.load(STAGE)[1].scalars
    assert loaded == {"optimizer.betas": [0.9, 0.999], "preprocess.v": {"x": [None, True, 2**70, 5e-324, 0.1]}}


def test_the_manifest_says_what_it_was_told(store):
    manifest = write(store, make_state())
    assert (manifest.stage_id, manifest.parent_key, manifest.records) == (STAGE, "cd" * 32, 120)
    assert (manifest.seconds, manifest.worker, manifest.epochs, manifest.steps) == (1.5, "host:7", 4, 32)
    assert manifest.fingerprint == {"torch": "2.13.0", "threads": 1}
    assert manifest.created_at.endswith("+00:00")


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (StageState({"model.w": np.array(["text"])}), "model.w"),
        (StageState({"model.w": np.array([object()])}), "model.w"),
        (StageState({"model.w": np.zeros(2, "V2")}), "not supported yet"),
        (StageState({"model.w": np.zeros(2, "datetime64[s]")}), "model.w"),
        (StageState({"weight": np.zeros(2)}), "weight"),
        (StageState({"model.": np.zeros(2)}), "model."),
        (StageState({}, {"model.depth": 3}), "model.depth"),
        (StageState({}, {"optimizer.lr": float("nan")}), "finite"),
        (StageState({}, {"optimizer.lr": float("-inf")}), "finite"),
        (StageState({}, {"optimizer.n": np.int64(3)}), "int64"),
        (StageState({}, {"schedule.steps": {1: 2}}), "text keys"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_written(store, state, told):
    with pytest.raises(StoreError) as caught:
        write(store, state)
    assert told in caught.value.message + caught.value.hint
    assert not store.root.exists()


def test_tensors_are_aligned_writable_views_of_one_row(store):
    write(store, make_state())
    tensors = list(store.load(STAGE)[1].tensors.values())
    assert all(tensor.ctypes.data % packing.ALIGNMENT == 0 and tensor.flags.writeable for tensor in tensors)

    def root(array: np.ndarray) -> object:
        return root(array.base) if isinstance(array.base, np.ndarray) else array

    assert len({id(root(tensor)) for tensor in tensors}) == 1


def test_a_stage_is_a_few_files_without_code(store):
    write(store, make_state())
    assert sorted(files_of(store.root)) == sorted(
        ["zarr.json", "shard-0003/zarr.json"]
        + [f"{STAGE.folder}/{name}" for name in ("zarr.json", "state/zarr.json", "state/c.0")]
    )
    for name, content in files_of(store.root).items():
        if name.endswith(".json"):
            json.loads(content, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    # 100 M parameters: chunks of at most 16 MiB and of equal size.
    chunks, size = packing.chunking([packing.Entry("model.w", "float32", (100_000_000,), 0)])
    assert (chunks, size <= packing.CHUNK_BYTES, chunks * size >= 400_000_000) == (24, True, True)


def test_zarr_itself_walks_from_the_root_to_a_stage(store):
    write(store, make_state())
    root = zarr.open_group(store.root, mode="r", zarr_format=3)
    array = root["shard-0003"][STAGE.folder.split("/")[1]]["state"]
    index = {entry["name"]: entry for entry in root[STAGE.folder].attrs["sisa"]["index"]}
    start = index["model.0.weight"]["offset"]
    weight_OI = array[start : start + 13 * 7 * 4].view("<f4").reshape(13, 7)
    assert np.array_equal(weight_OI, make_state().tensors["model.0.weight"])


def test_the_same_state_gives_the_same_bytes(store, tmp_path):
    other = CheckpointStore(tmp_path / "other")
    write(store, make_state())
    write(other, StageState(dict(reversed(make_state().tensors.items())), make_state().scalars))
    left, right = files_of(store.path(STAGE)), files_of(other.path(STAGE))
    assert {name for name in left if left[name] != right[name]} <= {"zarr.json"}  # when it was written


# --- published once -----------------------------------------------------------------------------


def racing(monkeypatch: pytest.MonkeyPatch, publish: object = stage.publish_folder) -> None:
    """Let a writer believe that the stage isn't there."""
    monkeypatch.setattr(CheckpointStore, "exists", lambda *_: False)
    monkeypatch.setattr(stage, "publish_folder", publish)


@pytest.mark.parametrize("publish", [None, stage.publish_folder, os.rename])
def test_a_stage_that_is_there_stays(store, monkeypatch, publish):
    first = write(store, make_state())
    inodes = {path: path.stat().st_ino for path in store.root.rglob("*")}
    if publish:
        racing(monkeypatch, publish)
    assert write(store, make_state(), worker="another:8") == first
    assert {path: path.stat().st_ino for path in store.root.rglob("*")} == inodes


@pytest.mark.parametrize("publish", [None, stage.publish_folder, os.rename])
def test_training_that_is_not_reproducible_is_damage(store, monkeypatch, publish):
    write(store, make_state())
    before = files_of(store.root)
    if publish:
        racing(monkeypatch, publish)
    with pytest.raises(DamagedError, match="not reproducible"):
        write(store, make_state(seed=1))
    assert files_of(store.root) == before


def test_a_damaged_stage_is_not_written_over(store):
    write(store, make_state())
    (store.path(STAGE) / "state" / "c.0").unlink()
    with pytest.raises(DamagedError, match=r"c\.0 is missing"):
        write(store, make_state())


def test_writers_of_one_new_store_do_not_disturb_each_other(store):
    ids = [StageId(shard=shard, stage=1, key="00" * 32, platform="0" * 12) for shard in (0, 0, 0, 1, 1, 2)]
    barrier = threading.Barrier(len(ids))

    def work(stage_id: StageId) -> str:
        barrier.wait()
        return write(CheckpointStore(store.root), make_state(), stage_id).full_digest

    with ThreadPoolExecutor(len(ids)) as pool:
        assert set(pool.map(work, ids)) == {full_digest(make_state())}
    assert store.all_stages() == sorted(set(ids))
    assert store.strays() == []


def test_everything_is_durable_before_it_has_its_name(store, monkeypatch):
    synced: set[int] = set()
    real_fsync, real_rename = os.fsync, os.rename
    at_rename: list[set[int]] = []
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.fstat(fd).st_ino), real_fsync(fd))[1])

    def rename(source: Path, target: Path) -> None:
        at_rename.append({path.stat().st_ino for path in [source, *source.rglob("*")]} - synced)
        synced.clear()
        real_rename(source, target)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(stage, "chunking", partial(packing.chunking, chunk_bytes=256))
    write(store, make_state())
    assert at_rename == [set()]
    assert store.path(STAGE).parent.stat().st_ino in synced


def test_a_full_disk_leaves_nothing_behind(store, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(group, "_write", full)
    with pytest.raises(StoreError, match="No space left") as caught:
        write(store, make_state())
    assert "stage 2 of shard 3" in caught.value.message
    assert store.all_stages() == store.strays() == []


KILLED = """
import os, signal, sys
import sisa.files, sisa.checkpoints.group, sisa.checkpoints.store as module
from pathlib import Path
from checkpoint_kit import make_state, write
alive, killed = 0, 0
while not alive:
    if (child := os.fork()) == 0:
        calls = 0
        def dying(real):
            def call(*arguments, **named):
                global calls
                calls += 1
                if calls > killed:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **named)
            return call
        for name in ("fsync", "rename", "replace"):
            setattr(os, name, dying(getattr(os, name)))
        sisa.checkpoints.group._write = dying(sisa.checkpoints.group._write)
        write(module.CheckpointStore(Path(sys.argv[1], str(killed))), make_state())
        os._exit(0)
    alive = os.waitpid(child, 0)[1] == 0
    killed += not alive
print(killed)
"""


def test_killed_at_any_step_leaves_a_whole_stage_or_none(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    search = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])}
    run = subprocess.run(command, env=os.environ | search, capture_output=True, text=True, check=True)
    steps = int(run.stdout)
    assert steps >= 12
    for step in range(steps):
        store = CheckpointStore(tmp_path / str(step))
        if store.exists(STAGE):
            assert same(make_state(), store.load(STAGE)[1])
        assert all(path.name.startswith("tmp-") and path.parent.name == "shard-0003" for path in store.strays())
        write(store, make_state())
        assert same(make_state(), store.load(STAGE)[1])
        assert store.sweep(3, keep=lambda _: True) == []
        assert store.strays() == []


# --- lists, removal, names ----------------------------------------------------------------------


def test_stages_are_listed_kept_and_swept(store):
    ids = [
        StageId(shard=shard, stage=number, key=key * 32, platform="0" * 12)
        for shard, number, key in [(0, 1, "aa"), (0, 2, "aa"), (0, 2, "bb"), (12345, 100, "aa")]
    ]
    for stage_id in ids:
        write(store, make_state(), stage_id)
    assert store.all_stages() == ids
    assert store.list_shard(0) == ids[:3]
    assert store.list_shard(7) == []
    (store.root / "shard-0000" / "tmp-left").mkdir()
    assert store.sweep(0, keep=lambda stage_id: stage_id != ids[1]) == [ids[1]]
    assert store.list_shard(0) == [ids[0], ids[2]]
    store.remove(ids[0])
    store.remove(ids[0])
    assert store.all_stages() == [ids[2], ids[3]]
    assert store.strays() == []
    assert CheckpointStore(store.root / "nowhere").all_stages() == []


@pytest.mark.parametrize("ask", [CheckpointStore.load, CheckpointStore.manifest])
def test_a_stage_that_is_not_there_is_missing(store, ask):
    with pytest.raises(MissingStage, match="stage 2 of shard 3"):
        ask(store, STAGE)
    write(store, make_state())
    store.remove(STAGE)
    assert not store.exists(STAGE)
    with pytest.raises(MissingStage, match="stage 2 of shard 3"):
        ask(store, STAGE)


@given(st.integers(0, 99999), st.integers(1, 999), st.sampled_from(["0" * 64, "f" * 64]))
def test_names_are_read_back(shard, number, key):
    stage_id = StageId(shard=shard, stage=number, key=key, platform="0" * 12)
    folder, name = stage_id.folder.split("/")
    assert (parse_shard(folder), parse_stage(shard, name)) == (shard, stage_id)


@pytest.mark.parametrize("name", ["stage-00-", "stage-002-", "stage-2-", "tmp-", "stage-02-X", " stage-02-"])
def test_other_names_are_no_stages(name):
    assert parse_stage(3, f"{name}{'a' * 64}.{'0' * 12}") is None
    assert parse_shard("shard-00003") is parse_shard("shard-3") is None


@pytest.mark.parametrize(
    "parts", [{"shard": -1}, {"stage": 0}, {"key": "../x"}, {"key": "AB" * 32}, {"platform": ""}, {"platform": "a/b"}]
)
def test_a_name_holds_numbers_and_digests_only(parts):
    with pytest.raises(StoreError):
        StageId(**({"shard": 0, "stage": 1, "key": "0" * 64, "platform": "0" * 12} | parts))


def test_a_manifest_is_read_without_zarr(store):
    write(store, make_state())
    code = (
        "import sys; from pathlib import Path; from sisa.checkpoints import CheckpointStore;"
        "store = CheckpointStore(Path(sys.argv[1])); store.manifest(store.all_stages()[0]); print('zarr' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(store.root)]
    search = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    assert subprocess.run(command, env=os.environ | search, capture_output=True, check=True).stdout == b"False\n"
