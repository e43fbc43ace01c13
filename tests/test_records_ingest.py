"""Ingest: everything is checked before anything is written, and what is written is exactly the survivors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as papq
import pytest
from records_tools import KEY, SHARDS, SLICES, everything, memberships, people, resolved, saved, stored, written

from sisa.errors import DamagedError, RecipeError, SourceError
from sisa.layout import Layout
from sisa.records import ingest
from sisa.records import write as writing
from sisa.records.names import RECORD, SUBJECT
from sisa.records.partition import partition_file, present_ids
from sisa.records.schema import undeclared_text
from sisa.records.strays import stray_files
from sisa.routing import Router


def excluding(*people_gone: str) -> Any:
    def excluded(_: pa.StringArray, subjects: pa.StringArray) -> npt.NDArray[np.bool_]:
        return np.isin(subjects.to_numpy(zero_copy_only=False), people_gone)

    return excluded


def test_rows_lie_where_the_router_says(tmp_path: Path) -> None:
    recipe = resolved(saved(tmp_path, people()))
    layout, counts = stored(tmp_path / "store", recipe)
    router = Router(KEY, shards=SHARDS, slices=SLICES, holdout_fraction=0.2)
    for (shard, slice_), rows in everything(layout, recipe).items():
        for subject in rows.table[SUBJECT].to_pylist():
            assert router.route_one(subject) == (shard, slice_)
    assert [(count.shard, count.slice) for count in counts] == [
        (k, r) for k in range(SHARDS) for r in range(SLICES + 1)
    ]
    assert sum(count.records for count in counts) == 200


def test_scan_counts_and_writes_nothing(tmp_path: Path) -> None:
    table = people()
    recipe = resolved(saved(tmp_path / "in", table))
    before = sorted(tmp_path.rglob("*"))
    report = ingest.scan(recipe, routing_key=KEY, excluded=excluding("p1", "p2"))
    owners = table["owner"].to_pylist()
    gone = owners.count("p1") + owners.count("p2")
    assert gone
    assert (report.records, report.excluded_records) == (200 - gone, gone)
    assert report.subjects == len(set(owners) - {"p1", "p2"})
    assert 0 < report.holdout_records < report.records
    assert sorted(tmp_path.rglob("*")) == before


def test_the_store_without_a_person_is_the_store_of_the_others(tmp_path: Path) -> None:
    table = people()
    person = table["owner"][0].as_py()
    whole = memberships(stored(tmp_path / "s0", resolved(saved(tmp_path / "all", table)))[1])
    without = stored(tmp_path / "s1", resolved(saved(tmp_path / "all", table)), excluded=excluding(person))
    others = table.filter(pa.array([owner != person for owner in table["owner"].to_pylist()]))
    fresh = memberships(stored(tmp_path / "s2", resolved(saved(tmp_path / "others", others)))[1])
    assert memberships(without[1]) == fresh
    place = Router(KEY, shards=SHARDS, slices=SLICES, holdout_fraction=0.2).route_one(person)
    assert [where for where in whole if whole[where] != fresh[where]] == [place]
    assert person not in present_ids(without[0], *place)[1].to_pylist()


def test_a_deleted_persons_bad_row_is_not_even_looked_at(tmp_path: Path) -> None:
    table = people()
    labels = [
        "?" if owner == "p1" else label
        for owner, label in zip(table["owner"].to_pylist(), table["label"].to_pylist(), strict=True)
    ]
    recipe = resolved(saved(tmp_path, table.set_column(7, "label", pa.array(labels))))
    with pytest.raises(SourceError, match="outside"):
        ingest.scan(recipe, routing_key=KEY)
    ingest.scan(recipe, routing_key=KEY, excluded=excluding("p1"))


@pytest.mark.parametrize("budget_bytes", [1, 5_000, 1_000_000_000])
def test_memory_budget_changes_nothing(tmp_path: Path, budget_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sisa.records.formats.LEAST_ROWS", 7)
    monkeypatch.setattr("sisa.records.formats.BATCH_BYTES", 1)
    monkeypatch.setattr("sisa.records.spool.FINE", 5)
    recipe = resolved(saved(tmp_path, people()))
    monkeypatch.setitem(writing.write.__kwdefaults__, "budget_bytes", budget_bytes)
    layout, counts = stored(tmp_path / "store", recipe)
    monkeypatch.undo()
    assert memberships(counts) == memberships(stored(tmp_path / "other", recipe)[1])
    assert {where: rows.membership for where, rows in everything(layout, recipe).items()} == memberships(counts)
    assert not list((tmp_path / "store").glob("tmp-*"))


def test_more_partitions_than_records(tmp_path: Path) -> None:
    recipe = resolved(saved(tmp_path, people(5)))
    recipe = recipe.model_copy(update={"sisa": recipe.sisa.model_copy(update={"shards": 300, "slices": 9})})
    layout, counts = stored(tmp_path / "store", recipe)
    assert len(counts) == 3000
    assert sum(count.records for count in counts) == 5
    assert len(list(layout.records.rglob("*.parquet"))) == len([count for count in counts if count.records]) <= 5
    assert stray_files(layout, 300, 9) == []


def test_many_partitions_need_few_open_files(tmp_path: Path) -> None:
    recipe = resolved(saved(tmp_path, people(3000)))
    recipe = recipe.model_copy(update={"sisa": recipe.sisa.model_copy(update={"shards": 200, "slices": 9})})
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "from pathlib import Path; from sisa.layout import Layout; from sisa.records import ingest\n"
        "from sisa.recipe import load_recipe\n"
        "ingest.write(load_recipe(sys.argv[1]), Layout(Path(sys.argv[2])), routing_key=bytes(32))\n"
    )
    run_with(code, recipe, tmp_path)
    assert len(list((tmp_path / "store" / "records").rglob("*.parquet"))) > 500


def run_with(code: str, recipe: Any, folder: Path) -> None:
    from sisa.recipe import dump_recipe

    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder / "store").mkdir(exist_ok=True)
    arguments = [str(folder / "recipe.yaml"), str(folder / "store")]
    root = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env={**os.environ, "PYTHONPATH": root})


@pytest.mark.parametrize("moment", ["arrivals", "_write_partition", "publish_folder"])
def test_killed_in_an_ingest_the_old_records_stay_and_the_next_one_is_whole(tmp_path: Path, moment: str) -> None:
    """A real SIGKILL: nothing is cleaned up by the process that dies."""
    recipe = resolved(saved(tmp_path, people()))
    code = (
        "import os, sys; from pathlib import Path; from sisa.layout import Layout\n"
        "from sisa.records import ingest, write; from sisa.recipe import load_recipe\n"
        f"original, calls = write.{moment}, []\n"
        "def dying(*a, **k):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 5 or original.__name__ != '_write_partition': os.kill(os.getpid(), 9)\n"
        "    return original(*a, **k)\n"
        f"write.{moment} = dying\n"
        "ingest.write(load_recipe(sys.argv[1]), Layout(Path(sys.argv[2])), routing_key=bytes(range(32)))\n"
    )
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run_with(code, recipe, tmp_path)
    assert caught.value.returncode == -signal.SIGKILL
    layout = Layout(tmp_path / "store")
    assert not layout.records.exists()
    assert list(layout.root.glob("tmp-*"))
    _, counts = stored(layout.root, recipe)
    assert {where: rows.membership for where, rows in everything(layout, recipe).items()} == memberships(counts)
    assert [path.name for path in layout.root.iterdir()] == ["records"]


def test_interrupted_while_several_write_nothing_is_left(tmp_path: Path) -> None:
    """Ctrl-C reaches the main thread alone: the others have to be told, or they would write into a folder that is removed."""
    recipe = resolved(saved(tmp_path, people()))
    code = (
        "import os, signal, sys, threading; from pathlib import Path; from sisa.layout import Layout\n"
        "from sisa.records import ingest, write; from sisa.recipe import load_recipe\n"
        "original, calls = write._write_partition, []\n"
        "def interrupted(*a, **k):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return original(*a, **k)\n"
        "write._write_partition, write.WRITERS = interrupted, 3\n"
        "try: ingest.write(load_recipe(sys.argv[1]), Layout(Path(sys.argv[2])), routing_key=bytes(range(32)))\n"
        "except KeyboardInterrupt: sys.exit(0 if threading.active_count() == 1 else 4)\n"
        "sys.exit(3)\n"
    )
    run_with(code, recipe, tmp_path)
    assert not list((tmp_path / "store").iterdir())


def test_how_many_write_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = resolved(saved(tmp_path, people()))
    monkeypatch.setattr("sisa.records.parts.MOST_ROWS", 7)
    found = []
    for writers in (1, 3):
        monkeypatch.setattr(writing, "WRITERS", writers)
        monkeypatch.setattr(writing.os, "sched_getaffinity", lambda _: range(8))
        layout, counts = stored(tmp_path / f"by-{writers}", recipe)
        files = {path.relative_to(layout.root): path.read_bytes() for path in layout.records.rglob("*.parquet")}
        found.append((counts, files))
    assert found[0] == found[1]


def test_what_a_killed_ingest_left_does_not_get_in(tmp_path: Path) -> None:
    recipe = resolved(saved(tmp_path, people(3)))
    leftover = tmp_path / "store" / "tmp-records" / "records" / "shard=0000" / "slice=01" / "part-00000.parquet"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"somebody's rows")
    (leftover.parent / "notes").write_bytes(b"more of them")
    layout, counts = stored(tmp_path / "store", recipe)
    assert {where: rows.membership for where, rows in everything(layout, recipe).items()} == memberships(counts)
    assert stray_files(layout, SHARDS, SLICES) == []


def test_a_failed_ingest_leaves_the_records_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = resolved(saved(tmp_path, people()))
    layout, counts = stored(tmp_path / "store", recipe)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "write_rows", full)
    with pytest.raises(OSError, match="space"):
        stored(tmp_path / "store", recipe)
    monkeypatch.undo()
    assert {where: rows.membership for where, rows in everything(layout, recipe).items()} == memberships(counts)
    assert [path.name for path in layout.root.iterdir()] == ["records"]


def test_progress_adds_up(tmp_path: Path) -> None:
    recipe = resolved(saved(tmp_path, people()))
    for work in (
        lambda told: ingest.scan(recipe, routing_key=KEY, on_progress=told, excluded=excluding("p1")),
        lambda told: stored(tmp_path / "store", recipe, on_progress=told, excluded=excluding("p1")),
        lambda told: ingest.compare(recipe, Layout(tmp_path / "store"), routing_key=KEY, on_progress=told),
    ):
        told: list[int] = []
        work(told.append)
        assert sum(told) == 200 == ingest.rows(recipe)
        assert all(amount > 0 for amount in told)


# --- what a scan refuses -------------------------------------------------------------------------


def changed(name: str, values: Any) -> pa.Table:
    table = people(50)
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (changed("rid", [*range(48), 3, 3]), "'rid' must not repeat, but 1 record ids occur more than once: '3'"),
        (changed("rid", [*range(49), None]), "'rid': 1 of 50 ids are missing"),
        (changed("owner", [""] * 2 + ["p"] * 48), "'owner': 2 of 50 ids are empty"),
        (changed("label", ["no"] * 49 + ["maybe"]), "outside data.classes: 'maybe'"),
        (changed("label", ["no"] * 49 + [None]), "1 of 50 records read so far have no label"),
        (changed("pay", [1.0] * 49 + [float("inf")]), "'pay' has 1 infinite"),
    ],
)
def test_a_bad_record_is_refused_before_anything_is_written(table: pa.Table, message: str, tmp_path: Path) -> None:
    recipe = resolved(saved(tmp_path, table))
    with pytest.raises(SourceError, match=message):
        ingest.scan(recipe, routing_key=KEY)


def test_duplicates_are_found_across_files_and_forms(tmp_path: Path) -> None:
    table = people(40)
    saved(tmp_path, table, "a.parquet")
    again = table.slice(7, 1)
    saved(tmp_path, again, "b.parquet")
    with pytest.raises(SourceError, match="1 record ids occur more than once: '21'"):
        ingest.scan(resolved(tmp_path / "*.parquet"), routing_key=KEY)


def test_a_hash_that_meets_another_is_no_duplicate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sisa.records import scan

    monkeypatch.setattr(scan, "siphash_text", lambda _, ids: np.full(len(ids), 7, np.uint64))
    assert ingest.scan(resolved(saved(tmp_path, people(50))), routing_key=KEY).records == 50


PROSE = ["this sentence about somebody has quite a few words"] * 50


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (PROSE, "looks like free text .*9 words on average.* not supported yet"),
        (["x" * 101] * 50, "101 characters on average"),
        ([f"c{i}" for i in range(50)], "more than 40 distinct values"),
    ],
)
def test_free_text_is_not_supported_yet(values: list[str], message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("sisa.records.scan.MOST_CATEGORIES", 40)
    source = saved(tmp_path, changed("city", values))
    asked = written(source)
    recipe = resolved(source)
    assert undeclared_text(asked, recipe) == ["city"]
    with pytest.raises(SourceError, match=message) as caught:
        ingest.scan(recipe, routing_key=KEY, undeclared_text=undeclared_text(asked, recipe))
    assert "columns.city.type: categorical" in caught.value.hint
    declared = written(source, columns={"city": {"type": "categorical"}})
    assert undeclared_text(declared, recipe) == []
    assert resolved(source, columns={"city": {"type": "categorical"}}) == recipe
    ingest.scan(recipe, routing_key=KEY)


# --- a second source for the holdout ---------------------------------------------------------------


def test_a_second_source_is_held_out_as_a_whole(tmp_path: Path) -> None:
    table = people()
    saved(tmp_path, table.slice(0, 150), "train.parquet")
    second = table.slice(150).set_column(6, "pixels", table.slice(150)["pixels"].cast(pa.list_(pa.int16(), 4)))
    saved(tmp_path, second, "test.parquet")
    recipe = resolved(tmp_path / "train.parquet", holdout={"source": str(tmp_path / "test.parquet")})
    assert ingest.scan(recipe, routing_key=KEY).holdout_records == 50
    layout, counts = stored(tmp_path / "store", recipe)
    held_out = [
        r for (_, s), rows in everything(layout, recipe).items() if s == 0 for r in rows.table[RECORD].to_pylist()
    ]
    assert sorted(held_out, key=int) == [str(i * 3) for i in range(150, 200)]
    assert ingest.compare(recipe, layout, routing_key=KEY).same == sum(count.records for count in counts) == 200


def test_a_second_source_must_fit_and_must_not_repeat(tmp_path: Path) -> None:
    table = people()
    source = saved(tmp_path, table, "train.parquet")
    saved(tmp_path, table.drop_columns(["age"]), "less.parquet")
    with pytest.raises(RecipeError, match="no column 'age'"):
        ingest.scan(resolved(source, holdout={"source": str(tmp_path / "less.parquet")}), routing_key=KEY)
    saved(tmp_path, table.slice(0, 1), "same.parquet")
    with pytest.raises(SourceError, match="'0'"):
        ingest.scan(resolved(source, holdout={"source": str(tmp_path / "same.parquet")}), routing_key=KEY)


# --- comparing ---------------------------------------------------------------------------------------


def test_the_same_source_brings_nothing_new(tmp_path: Path) -> None:
    recipe = resolved(saved(tmp_path, people()))
    layout, _ = stored(tmp_path / "store", recipe, excluded=excluding("p1"))
    found = ingest.compare(recipe, layout, routing_key=KEY, excluded=excluding("p1"))
    assert found.clean
    assert (found.new, found.changed, found.missing) == (0, 0, 0)
    assert ingest.compare(recipe, layout, routing_key=KEY).new == people()["owner"].to_pylist().count("p1")


def test_new_changed_and_missing_rows_are_counted(tmp_path: Path) -> None:
    table = people()
    recipe = resolved(saved(tmp_path, table))
    layout, _ = stored(tmp_path / "store", recipe)
    ages = table["age"].to_pylist()
    ages[20] = 1000
    owners = table["owner"].to_pylist()
    owners[21] = "somebody else"
    other = table.set_column(2, "age", pa.array(ages, pa.int32())).set_column(1, "owner", pa.array(owners))
    rids = table["rid"].to_pylist()
    rids[30] = 9999
    papq.write_table(other.set_column(0, "rid", pa.array(rids)).slice(5), tmp_path / "people.parquet")
    found = ingest.compare(recipe, layout, routing_key=KEY)
    assert (found.new, found.changed, found.missing, found.same) == (1, 2, 6, 192)
    assert not found.clean


def test_a_row_that_moved_out_of_the_holdout_has_changed(tmp_path: Path) -> None:
    table = people(60)
    saved(tmp_path, table.slice(0, 40), "train.parquet")
    saved(tmp_path, table.slice(40), "test.parquet")
    recipe = resolved(tmp_path / "train.parquet", holdout={"source": str(tmp_path / "test.parquet")})
    layout, _ = stored(tmp_path / "store", recipe)
    saved(tmp_path, table.slice(0, 41), "train.parquet")
    saved(tmp_path, table.slice(41), "test.parquet")
    found = ingest.compare(recipe, layout, routing_key=KEY)
    assert (found.new, found.changed, found.missing, found.same) == (0, 1, 0, 59)


def test_every_changed_value_is_noticed(tmp_path: Path) -> None:
    table = people(60)
    recipe = resolved(saved(tmp_path, table))
    layout, _ = stored(tmp_path / "store", recipe)
    for name in ["age", "pay", "city", "vector", "pixels", "label"]:
        position = table.schema.get_field_index(name)
        values = table[name].to_pylist()
        current = values[59]
        values[59] = {
            "label": "no" if current == "yes" else "yes",
            "city": "Aachen",
            "vector": [1.0, 2.0, 3.0],
            "pixels": [1, 2, 3, 4],
        }.get(name, 77)
        column = pa.array(values, table.schema.field(name).type)
        papq.write_table(table.set_column(position, name, column), tmp_path / "people.parquet")
        found = ingest.compare(recipe, layout, routing_key=KEY)
        assert (found.new, found.changed, found.missing) == (0, 1, 0), name


def test_comparing_notices_damage_and_repeated_ids(tmp_path: Path) -> None:
    recipe = resolved(saved(tmp_path, people()))
    layout, _ = stored(tmp_path / "store", recipe)
    saved(tmp_path, pa.concat_tables([people(), people().slice(3, 1)]))
    with pytest.raises(SourceError, match="more than once"):
        ingest.compare(recipe, layout, routing_key=KEY)
    path = partition_file(layout, 1, 1)
    content = bytearray(path.read_bytes())
    content[60] ^= 255
    path.write_bytes(content)
    with pytest.raises(DamagedError):
        ingest.compare(recipe, layout, routing_key=KEY)


def test_an_empty_source(tmp_path: Path) -> None:
    recipe = resolved(saved(tmp_path, people(20).slice(0, 0)))
    assert ingest.scan(recipe, routing_key=KEY).records == 0
    layout, counts = stored(tmp_path / "store", recipe)
    assert sum(count.records for count in counts) == 0
    assert layout.records.is_dir()
    assert ingest.compare(recipe, layout, routing_key=KEY).clean


@pytest.mark.slow
def test_peak_memory_is_bounded(tmp_path: Path) -> None:
    """Two million rows, ten times the batch budget, in less than a gibibyte."""
    rows = 2_000_000
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "rid": np.arange(rows),
            **{f"x{i}": rng.normal(size=rows) for i in range(8)},
            "label": pa.array(["no", "yes"] * (rows // 2)),
        }
    )
    recipe = resolved(saved(tmp_path, table), subject_id=None)
    code = (
        "import resource, sys; from pathlib import Path; from sisa.layout import Layout\n"
        "from sisa.records import ingest; from sisa.recipe import load_recipe\n"
        "recipe = load_recipe(sys.argv[1]); ingest.scan(recipe, routing_key=bytes(32))\n"
        "ingest.write(recipe, Layout(Path(sys.argv[2])), routing_key=bytes(32))\n"
        "sys.exit(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 2**20)\n"
    )
    started = time.monotonic()
    run_with(code, recipe, tmp_path)
    assert time.monotonic() - started < 300
