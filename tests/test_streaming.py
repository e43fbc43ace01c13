"""Rows that wait on disk for their batches: the same bits as rows in memory, in memory that doesn't grow, and gone after."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq
import pytest
import streaming_kit
import tables
import yaml
from cli_kit import command, surroundings
from store_kit import KEY, assert_same, at, copied, holding, partition, scratch, slices, stage_folder, train, write
from training_kit import KEYS, category, images, numbers, recipe, stage

import sisa
from sisa.errors import DamagedError, StaleError, StoreError, UserError
from sisa.layout import Layout
from sisa.learners import feed, streamed
from sisa.learners.columns import Columns
from sisa.learners.packed import Dictionary, RowFormat, TooNarrowError
from sisa.learners.preprocess import Preprocessor
from sisa.learners.streamed import PairwiseSum, StreamedRows
from sisa.recipe import ColumnSpec, parse_recipe
from sisa.recipe.identity import recipe_digest
from sisa.records import batches
from sisa.records.batches import read_batches
from sisa.records.partition import read_partition
from sisa.routing.keys import shard_keys
from sisa.state import StageState, full_digest
from sisa.training import stage as stage_module
from sisa.training import waiting
from sisa.training.platform import fingerprint
from sisa.training.rows import ShardRows, available_bytes
from sisa.training.stage import Keeping, train_stage
from sisa.training.waiting import WaitingRows, nameless_file

NEVER, ALWAYS = {"rows_in_memory": "never"}, {"rows_in_memory": "always"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Blocks, batches and pieces so small that a handful of rows makes many."""
    monkeypatch.setattr(feed, "BLOCK_BYTES", 200)
    monkeypatch.setattr(streamed, "FIT_BYTES", 400)
    monkeypatch.setattr(streamed, "LONGEST_PIECE", 128)
    monkeypatch.setattr(batches, "MOST_ROWS", 3)


OPEN: list[WaitingRows] = []


@pytest.fixture(autouse=True)
def closed():
    """Rows on disk end with their test."""
    yield
    while OPEN:
        OPEN.pop().close()


def on_disk(ours, columns, tmp_path) -> StreamedRows:
    """The same records, written down slice by slice, in another order within each."""
    layout = Layout(tmp_path / "waiting")
    rng = np.random.default_rng(5)
    wide = frozenset(i for i, vector in enumerate(columns.vectors) if vector.dtype != np.uint8)
    waits = WaitingRows(layout, ours, 0, wide=wide)
    OPEN.append(waits)
    for slice_ in np.unique(columns.slices_N):
        which = np.flatnonzero(columns.slices_N == slice_)
        shuffled = rng.permutation(which)
        for start in range(0, len(shuffled), 4):
            waits.append(_placed(columns.rows(shuffled[start : start + 4])))
        waits.end_slice(np.argsort(shuffled))
    return waits.rows()


def _placed(part: Columns) -> Columns:
    return Columns(
        part.numeric_NP, part.categories, part.vectors, part.labels_N, part.uids_N, np.ones(part.count, np.int32)
    )


# --- the same bits ----------------------------------------------------------------------------------

PIXELS = {"pixels": ColumnSpec(type="vector", size=192)}
IMAGE = {"height": 8, "width": 8, "channels": 3}
RESTLESS = {"name": "mlp", "hidden": [6], "batch_norm": True, "dropout": 0.3}
CASES = {
    "our own gradients": {},
    "momentum": {"training": {"optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True}}},
    "a last batch of one": {"training": {"batch_size": 8}},
    "batches of one": {"training": {"batch_size": 1}},
    "one batch": {"training": {"batch_size": 100}},
    "dropout and statistics": {"model": RESTLESS, "training": {"optimizer": {"name": "adam", "lr": 0.01}}},
    "an optimiser of torch": {"training": {"optimizer": {"name": "torch.optim.RMSprop", "lr": 0.01}}},
    "a model that draws": {"model": {"factory": "training_models:drawing"}},
    "images": {"model": {"name": "cnn", "channels": [4], "hidden": [], "dropout": 0.2}, "columns": PIXELS, "image": IMAGE},
    "images for a user's model": {"model": {"factory": "training_models:convolution"}, "columns": PIXELS, "image": IMAGE},
    "images as a vector": {"model": {"name": "mlp", "hidden": [5]}, "columns": PIXELS, "image": IMAGE},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_streamed_stages_have_the_bits_of_resident_ones(case, tmp_path):
    ours = recipe(**CASES[case])
    counts = [9, 0, 8]
    columns = images(counts, size=192) if "images" in case else numbers(counts)
    resident, streaming = StageState(), StageState()
    for number in (1, 2, 3):
        seen = columns.through(number)
        resident = stage(ours, seen, number=number, parent=resident)
        streaming = stage(ours, on_disk(ours, seen, tmp_path), number=number, parent=streaming)
        assert full_digest(streaming) == full_digest(resident)


def test_a_block_that_is_fetched_wrongly_gives_other_bits(tmp_path):
    """The test above can fail: two records changed places."""
    ours, columns = recipe(), numbers([17])
    rows = on_disk(ours, columns, tmp_path)
    rows.places_N[[3, 4]] = rows.places_N[[4, 3]]
    assert full_digest(stage(ours, rows)) != full_digest(stage(ours, columns))


@pytest.mark.parametrize("case", ["dropout and statistics", "a model that draws", "images"])
def test_a_streamed_stage_goes_on_from_any_step_whichever_way_it_began(case, tmp_path, monkeypatch):
    monkeypatch.setattr(stage_module, "LOOK_UP_S", 0.0)
    ours = recipe(**CASES[case])
    columns = images([14], size=192) if "images" in case else numbers([14])
    rows = on_disk(ours, columns, tmp_path)
    kept: list[StageState] = []

    def trained(which, *, amid=None, keep=None):
        return train_stage(
            recipe=ours, class_count=3, shard=0, stage=1, epochs=2, parent=StageState(), columns=which, keys=KEYS,
            should_stop=lambda: False, on_progress=lambda _: None, amid=amid,
            keeping=keep and Keeping(every_s=0.0, keep=keep, unfit=lambda: pytest.fail("unfit")),
        )  # fmt: skip

    def keep(amid, _):
        kept.append(StageState({n: a.copy() for n, a in amid.tensors.items()}, dict(amid.scalars)))

    straight = full_digest(trained(columns))
    assert full_digest(trained(rows, keep=keep)) == straight
    assert len(kept) == 7
    for amid in kept:
        assert full_digest(trained(rows, amid=amid)) == straight
        assert full_digest(trained(columns, amid=amid)) == straight


def mixed_columns(*, seed, count=700):
    """Every kind of feature, with values that are missing, extreme, constant or not finite."""
    rng = np.random.default_rng(seed)
    numeric = rng.normal(1e3, 10, (9, count)) ** 3
    numeric[1, rng.random(count) < 0.5] = np.nan
    numeric[2] = 7.5
    numeric[3] = np.nan
    numeric[4, :] *= 1e298
    numeric[5, 3] = np.inf
    numeric[6, :] = -0.0
    numeric[7, 1:] = np.nan
    floats = rng.normal(0, 1, (count, 5)).astype(np.float32)
    floats[rng.random((count, 5)) < 0.2] = np.nan
    texts = [None if rng.random() < 0.1 else f"v{rng.integers(0, 30)}" for _ in range(count)]
    return Columns(
        numeric_NP=numeric.T,
        categories=(category(*texts), category(*[None] * count)),
        vectors=(floats, rng.integers(0, 256, (count, 3)).astype(np.uint8), np.zeros((count, 2), np.uint8)),
        labels_N=rng.integers(0, 3, count),
        uids_N=rng.integers(0, 2**63, count).astype(np.uint64),
        slices_N=np.repeat([2, 4], [count - 60, 60]).astype(np.int32),
    )


def mixed_specs(**declared):
    specs = {f"n{i}": ColumnSpec(type="numeric") for i in range(9)}
    specs |= {"c0": ColumnSpec(type="categorical"), "c1": ColumnSpec(type="categorical")}
    specs |= {f"v{i}": ColumnSpec(type="vector", size=size) for i, size in enumerate((5, 3, 2))}
    return specs | declared


DECLARED = {
    "nothing is declared": {},
    "some is": {
        "n0": ColumnSpec(type="numeric", mean=3.0, std=2.0),
        "c0": ColumnSpec(type="categorical", values=["v1", "elsewhere"]),
        "v0": ColumnSpec(type="vector", size=5, mean=0.5, std=0.25),
    },
}


@pytest.mark.parametrize("declared", DECLARED)
@pytest.mark.parametrize("count", [61, 190, 700, 1300])
def test_scalers_and_vocabularies_are_fitted_to_the_same_bits(declared, count, tmp_path):
    ours = recipe(columns=mixed_specs(**DECLARED[declared]))
    columns = mixed_columns(seed=count, count=count)
    expected = Preprocessor.fit(ours, columns.first_slice())
    rows = on_disk(ours, columns, tmp_path)
    found = rows.fit(ours)
    assert found.numeric_scale_2P.tobytes() == expected.numeric_scale_2P.tobytes()
    assert found.vector_scale_2V.tobytes() == expected.vector_scale_2V.tobytes()
    assert found.vocabularies == expected.vocabularies
    assert (
        found.transform(rows.known(found.vocabularies).rows(slice(None))).tobytes()
        == expected.transform(columns).tobytes()
    )


@pytest.mark.parametrize("count", [*range(1, 20), 127, 128, 129, 255, 256, 257, 1000, 4096, 99_991])
@pytest.mark.parametrize("piece", [128, 1000])
def test_numbers_that_come_in_pieces_add_up_to_the_same_bits(count, piece):
    values = np.random.default_rng(count).normal(0, 1e3, count) ** 3
    total = PairwiseSum(count, piece=piece)
    for part in np.array_split(values, 7):
        total.add(part)
    assert total.total().tobytes() == np.add.reduce(values).tobytes()


def test_a_plain_sum_would_have_other_bits():
    values = np.random.default_rng(1).normal(0, 1e3, 4096)
    assert sum(values.tolist()) != float(np.add.reduce(values))


def test_a_numpy_that_adds_up_otherwise_is_refused(tmp_path, monkeypatch):
    rows = on_disk(recipe(), numbers([9]), tmp_path)
    real = streamed.PairwiseSum.total
    monkeypatch.setattr(streamed.PairwiseSum, "total", lambda self: np.nextafter(real(self), np.inf))
    with pytest.raises(UserError, match="adds up in another order"):
        rows.fit(recipe())


def test_rows_come_back_as_they_were():
    ours = recipe(columns=mixed_specs())
    columns = mixed_columns(seed=3)
    shape = RowFormat.of(ours, wide=frozenset({0}))
    dictionaries = [Dictionary(), Dictionary()]
    packed_NW = shape.pack(columns, dictionaries, first=0)
    back = shape.unpack(packed_NW, [d.values for d in dictionaries])
    assert shape.width % 8 == 0
    assert back.numeric_NP.tobytes() == np.ascontiguousarray(columns.numeric_NP).tobytes()
    assert [v.tobytes() for v in back.vectors] == [v.tobytes() for v in columns.vectors]
    assert back.labels_N.tolist() == columns.labels_N.tolist()
    for one, other in zip(back.categories, columns.categories, strict=True):
        assert [(*one.values, None)[c] for c in one.codes_N] == [(*other.values, None)[c] for c in other.codes_N]
    with pytest.raises(TooNarrowError):
        RowFormat.of(ours).pack(columns, dictionaries, first=0)


def test_every_bit_of_a_row_and_its_place_are_checked():
    ours = recipe(columns={**PIXELS, "n": ColumnSpec(type="numeric")})
    plain = images([3], size=192)
    columns = Columns(np.ones((3, 1)), (), plain.vectors, plain.labels_N, plain.uids_N, plain.slices_N)
    shape = RowFormat.of(ours)
    rows_NW = shape.pack(columns, [], first=10)
    places_N = np.array([10, 11, 12])
    assert shape.whole(rows_NW, places_N)
    for bit in range(shape.width * 8):
        hurt = rows_NW.copy()
        hurt[1, bit // 8] ^= 1 << bit % 8
        assert not shape.whole(hurt, places_N)
    assert not shape.whole(rows_NW[[1, 0, 2]], places_N)
    assert not shape.whole(np.zeros_like(rows_NW), places_N)


def test_a_damaged_row_is_never_trained_on(tmp_path):
    ours, columns = recipe(), numbers([17])
    rows = on_disk(ours, columns, tmp_path)

    def hurt(places_B):
        taken = rows.take(places_B)
        taken[:1, 20] ^= 4
        return taken

    with pytest.raises(DamagedError, match="a row that waited on disk"):
        stage(ours, StreamedRows(rows.format, hurt, rows.values, rows.places_N, rows.uids_N, rows.first))


# --- whole stores -----------------------------------------------------------------------------------

STORES = {
    "numbers, categories, vectors": (tables.mixed(40, seed=3), tables.mixed_recipe()),
    "bits, statistics, adam": (tables.binary(50), tables.binary_recipe()),
    "images": (tables.images(24), tables.images_recipe()),
    "slices without rows": (tables.mixed(6, seed=4), tables.mixed_recipe(sisa={"slices": 6})),
}


@pytest.mark.parametrize("case", STORES)
def test_a_streamed_store_is_the_resident_one_after_a_deletion_too(case, tmp_path):
    table, content = STORES[case]
    one = train(tmp_path, {**content, "workers": NEVER}, table, name="streamed")
    other = train(tmp_path, {**content, "workers": ALWAYS}, table, name="resident")
    assert_same(one, other)
    victims = [records[0] for records in slices(one).values()][:3]
    one.delete(records=victims, executor="inline")
    other.delete(records=victims, executor="inline")
    assert_same(one, other)
    scratch(one, tmp_path, {**content, "workers": NEVER}, tables.without(table, records=victims))
    assert one.verify(replay="all", executor="inline").problems == []
    assert [path.name for path in one.opened.layout.root.glob("scratch/*")] == []


def test_vectors_of_bits_of_which_some_are_missing_are_widened(tmp_path):
    """Only a later batch tells; what was written by then is written anew."""
    table = tables.binary(60)
    values = [row if index % 17 else [None, *row[1:]] for index, row in enumerate(table["x"].to_pylist())]
    table = table.set_column(1, "x", pa.array(values, pa.list_(pa.uint8(), 12)))
    content = tables.binary_recipe()
    closed: list[bool] = []
    real = WaitingRows.close

    def close(self):
        closed.append(bool(self._rows) and 0 not in self.format.wide)
        real(self)

    with mock.patch.object(WaitingRows, "close", close):
        one = train(tmp_path, {**content, "workers": NEVER}, table, name="streamed")
    assert any(closed)
    assert_same(one, train(tmp_path, {**content, "workers": ALWAYS}, table, name="resident"))


def test_the_choice_is_no_part_of_the_recipes_identity():
    parsed = [parse_recipe({**tables.mixed_recipe(), "workers": workers}) for workers in (NEVER, ALWAYS, {})]
    assert len({recipe_digest(one) for one in parsed}) == 1
    assert len({str(fingerprint(one)) for one in parsed}) == 1


def test_two_processes_stream_to_the_same_bits(tmp_path):
    content = tables.mixed_recipe(
        model={"dropout": 0.2}, sisa={"shards": 1, "slices": 2}, training={"epochs": 2, "batch_size": 5}
    )
    stores = [
        train(tmp_path, {**content, "workers": {"devices_per_shard": 2, **workers}}, tables.mixed(30), name=name)
        for name, workers in (("streamed", NEVER), ("resident", ALWAYS))
    ]
    assert_same(*stores)


@pytest.mark.parametrize(("memory", "streams"), [(40_000_000, False), (4_000, True)], ids=["much", "little"])
@pytest.mark.parametrize("declared", [True, False])
def test_auto_streams_where_rows_take_more_than_half_of_the_memory(memory, streams, declared, tmp_path):
    columns = {"job": {"type": "categorical", "values": ["baker", "smith"]}} if declared else {}
    content = tables.mixed_recipe(data={"columns": {"grade": {"type": "categorical"}, **columns}})
    opened: list[int] = []
    real = WaitingRows.rows

    def rows(self):
        opened.append(1)
        return real(self)

    with mock.patch.object(WaitingRows, "rows", rows):
        train(tmp_path, {**content, "workers": {"memory": memory}}, tables.mixed(40))
    assert bool(opened) == streams


def test_a_vocabulary_that_nobody_declared_counts_too(tmp_path):
    """Forty rows of three numbers are nothing, but every person is a category of its own."""
    table = tables.mixed(40)
    content = tables.mixed_recipe(data={"features": ["age", "name"], "columns": {}}, sisa={"shards": 1, "slices": 1})
    table = table.append_column("name", pa.array([f"n{i}" for i in range(table.num_rows)]))
    with mock.patch.object(WaitingRows, "rows", side_effect=RuntimeError("streamed")):
        train(tmp_path, {**content, "workers": {"memory": 80_000}}, table, name="fits")
        with pytest.raises(RuntimeError, match="streamed"):
            train(tmp_path, {**content, "workers": {"memory": 20_000}}, table, name="streams")


def test_what_is_left_is_what_the_container_has_left(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:       80 kB\n")
    assert available_bytes(tmp_path, tmp_path / "none") == 80 * 1024
    (tmp_path / "memory.max").write_text("50000\n")
    (tmp_path / "memory.current").write_text("20000\n")
    assert available_bytes(tmp_path, tmp_path) == 30_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path, tmp_path) == 80 * 1024
    assert available_bytes(tmp_path / "none", tmp_path / "none") > 0


# --- reading ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed_store(tmp_path_factory):
    return train(tmp_path_factory.mktemp("read"), tables.mixed_recipe(), tables.mixed(40, seed=3))


def test_a_slice_read_in_batches_is_the_slice(mixed_store):
    opened = mixed_store.opened
    for shard, slice_ in [(0, 1), (1, 2)]:
        keys = shard_keys(KEY, shard)
        whole = read_partition(opened.layout, opened.recipe, keys, shard, slice_)
        parts: list[pa.Table] = []
        read = read_batches(opened.layout, opened.recipe, keys, slice_, parts.append)
        assert len(parts) > 2
        assert read.membership == whole.membership
        rows = pa.concat_tables(parts).take(pa.array(read.order_N))
        assert repr(rows.to_pydict()) == repr(whole.table.to_pydict())  # NaN is no equal of itself


@pytest.mark.parametrize("step", range(0, 100, 7))
def test_a_flipped_bit_is_damage_here_too(step, mixed_store, tmp_path):
    store = copied(mixed_store, tmp_path)
    path = partition(store, 0, 1)
    content = bytearray(path.read_bytes())
    content[len(content) * step // 100] ^= 1 << step % 8
    path.write_bytes(content)
    with pytest.raises(DamagedError, match="slice=01"):
        read_batches(store.opened.layout, store.opened.recipe, shard_keys(KEY, 0), 1, lambda _: None)


def test_other_rows_than_the_ledger_expects_are_not_trained_on(mixed_store):
    opened = mixed_store.opened
    expected = tuple(p.membership for p in opened.ledger.partitions.all(0) if p.slice > 0)
    task = SimpleNamespace(
        shard=0, recipe=opened.recipe, keys=shard_keys(KEY, 0), rows_in_memory="never", memberships=expected
    )
    with contextlib.closing(ShardRows(task, opened.layout)) as rows:
        assert rows.through(2, StageState()).count == sum(len(slices(mixed_store)[0, s]) for s in (1, 2))
    task.memberships = (expected[0], expected[0], *expected[2:])
    with (
        contextlib.closing(ShardRows(task, opened.layout)) as rows,
        pytest.raises(StaleError, match="slice 2 of shard 0"),
    ):
        rows.through(2, StageState())


# --- people's rows ----------------------------------------------------------------------------------


def test_the_file_is_private_and_has_no_name(tmp_path):
    folder = tmp_path / "scratch" / "rows-0000"
    with nameless_file(folder) as file:
        file.write(b"somebody")
        file.flush()
        found = os.fstat(file.fileno())
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert found.st_nlink == 0
        assert list(tmp_path.rglob("*")) == [tmp_path / "scratch"]


def test_without_nameless_files_the_name_goes_at_once(tmp_path):
    real = os.open

    def refusing(path, flags, *rest, **named):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return real(path, flags, *rest, **named)

    folder = tmp_path / "scratch" / "rows-0000"
    with mock.patch("os.open", refusing), nameless_file(folder) as file:
        found = os.fstat(file.fileno())
        assert (stat.S_IMODE(found.st_mode), found.st_nlink) == (0o600, 0)
        assert list(tmp_path.rglob("*")) == [tmp_path / "scratch"]


def test_a_scratch_area_that_is_swept_meanwhile_is_made_again(tmp_path):
    folder, left = tmp_path / "scratch" / "rows-0000", [3]
    real, asked = waiting._opened, waiting.require_nameless

    def swept(path, **more):
        if left[0]:
            left[0] -= 1
            path.rmdir()
        return real(path, **more) if more else asked(path)

    with mock.patch.object(waiting, "_opened", swept):
        nameless_file(folder).close()
    left[0] = 3
    with mock.patch.object(waiting, "require_nameless", swept):  # by another process of the same shard
        nameless_file(folder, never_named=True).close()
    folder.write_bytes(b"")
    with pytest.raises(DamagedError, match="expected a folder"):
        nameless_file(folder)


def test_a_full_disk_is_an_error_with_a_name(tmp_path):
    rows = WaitingRows(Layout(tmp_path), recipe(), 0)
    rows._file.close()
    with Path("/dev/full").open("wb", buffering=0) as rows._file, pytest.raises(StoreError, match="No space left"):
        rows.append(numbers([4]))
    rows.close()


SLOW = """
import time
import torch
from torch import nn

class Slow(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.out = nn.Linear(width, classes)

    def forward(self, X):
        if self.training:
            time.sleep(0.02)
        return self.out(X)

def build(feature_shape, class_count):
    return Slow(feature_shape[0], class_count)
"""


@pytest.fixture
def running(tmp_path):
    """A training in another process that streams and takes its time, with the people whose rows it has."""
    (tmp_path / "slow_model.py").write_text(SLOW)
    table = tables.mixed(40, seed=3)
    content = tables.mixed_recipe(
        training={"epochs": 400},
        sisa={"shards": 1, "slices": 2},
    )
    content["model"] = {"factory": "slow_model:build"}
    source = write(table, tmp_path / "table.parquet")
    whole = at(tmp_path, {**content, "workers": {**NEVER, "snapshot_every_s": None}}, source)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(whole))
    with subprocess.Popen(
        [*command(), "train", "recipe.yaml", "--store", "store", "--executor", "inline"],
        cwd=tmp_path, env=surroundings(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        wait_until(lambda: nameless_bytes(process.pid, tmp_path / "store"))
        yield process, tmp_path / "store"
        process.kill()


def nameless_bytes(pid, root):
    """What is in the files of waiting rows that a process has open; by their names nobody finds them."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(link.readlink())
            if target.startswith(str(root)) and "rows-0000" in target:
                found.append(link.read_bytes())
    return b"".join(found)


def wait_until(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_after_a_kill_nothing_of_the_rows_is_left(running):
    process, root = running
    assert not list((root / "scratch").iterdir())  # nobody finds them while it runs, either
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((root / "scratch").rglob("*"))


def test_rows_count_as_erased_when_a_running_training_has_let_them_go(running):
    process, root = running
    store = sisa.open_store(root)
    rows = pq_rows(partition(store, 0, 1))
    victim, age = next((record, age) for record, age in rows if age is not None)
    needle = struct.pack("<d", age)
    wait_until(lambda: needle in nameless_bytes(process.pid, root))
    held: dict[str, bool] = {}
    requests = type(store.opened.ledger.requests)
    real = requests.advance

    def advance(self, request, state, **more):
        held[state] = needle in nameless_bytes(process.pid, root)
        return real(self, request, state, **more)

    with mock.patch.object(requests, "advance", advance):
        store.delete(records=[victim], defer=True)
    assert held == {"rows_erased": False, "stages_purged": False}
    assert process.poll() is None  # it trains on, without the row


def pq_rows(path):
    """(record, age) of each row of a partition."""
    table = papq.read_table(path, partitioning=None)
    return list(zip(table["_sisa_record"].to_pylist(), table["age"].to_pylist(), strict=True))


def left(root: Path) -> Path:
    """What a killed process may have left on a file system without nameless files."""
    path = root / "scratch" / "rows-0001" / "0123456789abcdef"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"the rows of somebody")
    return path


def test_rows_that_were_left_are_told_and_go_with_the_next_run_or_a_deletion(mixed_store, tmp_path):
    content = {**tables.mixed_recipe(), "workers": NEVER}
    for number, act in enumerate((
        lambda store: store.delete(records=[slices(store)[1, 2][0]], defer=True),
        lambda store: store.repair(executor="inline"),
    )):  # fmt: skip
        store = copied(mixed_store, tmp_path, name=f"copy-{number}")
        path = left(store.opened.layout.root)
        (problem,) = store.verify().problems
        assert problem.startswith("scratch/rows-0001: left by a command that was killed; `sisa repair` removes it")
        act(store)
        assert not path.exists()
        assert list(holding(store.opened.layout.root, "the rows of somebody")) == []
    started = train(tmp_path, content, tables.mixed(40, seed=3), name="fresh")
    path = left(started.opened.layout.root)
    shutil.rmtree(stage_folder(started, 1, 3))
    started.repair(executor="inline")
    assert not path.exists()


def test_a_strangers_file_in_the_scratch_area_is_told(mixed_store, tmp_path):
    store = copied(mixed_store, tmp_path)
    for name in ("rows-0007", "rows-0001x"):
        (store.opened.layout.root / "scratch" / name).mkdir(parents=True)
    assert sorted(problem.partition(":")[0] for problem in store.verify().problems) == [
        "scratch/rows-0001x",
        "scratch/rows-0007",
    ]
    assert all("nobody answers" in problem for problem in store.verify().problems)


# --- memory -----------------------------------------------------------------------------------------
# --- memory -----------------------------------------------------------------------------------------


def measured(root, records, choice):
    """Memory that a stage takes in a process of its own, and the digest of what it gives."""
    kit = Path(streaming_kit.__file__)
    done = subprocess.run(
        [sys.executable, str(kit), str(root), str(records), choice], env=surroundings(), capture_output=True, check=True
    )
    return json.loads(done.stdout)


def test_memory_does_not_grow_with_the_shard(tmp_path):
    """Four times the rows, of which each takes more than 3 kB in memory; streamed, a few numbers of each are there."""
    few, many = 16_000, 64_000
    for records in (few, many):
        streaming_kit.write_slice(tmp_path / str(records), records=records)
    small, large = (measured(tmp_path / str(records), records, "never") for records in (few, many))
    held = measured(tmp_path / str(many), many, "always")
    assert held["digest"] == large["digest"]
    assert held["bytes"] > 3_000 * many  # the measurement sees rows that are held
    assert large["bytes"] - small["bytes"] < 300 * (many - few)
    assert large["bytes"] < held["bytes"] / 3
