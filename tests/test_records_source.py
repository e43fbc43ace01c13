"""Opening tables: every format gives the same rows, every mistake a message that names the file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.ipc as paipc
import pyarrow.parquet as papq
import pytest
from records_tools import people, resolved, saved

from sisa.errors import SourceError, UserError
from sisa.records.features import feature_table, open_input, table_writer
from sisa.records.formats import LEAST_ROWS, MOST_ROWS, batch_rows
from sisa.records.ids import read_ids
from sisa.records.source import open_source


def simple() -> pa.Table:
    return pa.table({"id": ["a", "b", "c"], "x": [1.5, None, -2.0], "word": ["u", None, "w"]})


def as_parquet(table: pa.Table, folder: Path) -> Path:
    papq.write_table(table, folder / "t.parquet")
    return folder / "t.parquet"


def as_file(table: pa.Table, folder: Path) -> Path:
    with paipc.new_file(folder / "t.anything", table.schema) as writer:
        writer.write_table(table)
    return folder / "t.anything"


def as_stream(table: pa.Table, folder: Path) -> Path:
    with paipc.new_stream(folder / "t.arrows", table.schema) as writer:
        writer.write_table(table)
    return folder / "t.arrows"


@pytest.mark.parametrize("writer", [as_parquet, as_file, as_stream])
def test_typed_formats(writer: Callable[[pa.Table, Path], Path], tmp_path: Path) -> None:
    source = open_source(str(writer(simple(), tmp_path)))
    assert not source.csv
    for _ in range(2):
        assert pa.Table.from_batches(source.batches()).equals(simple())
    assert pa.Table.from_batches(source.batches(["word", "id"])).schema.names == ["word", "id"]
    assert open_source(f"file://{writer(simple(), tmp_path)}").schema == simple().schema


def test_csv_is_text_until_the_recipe_says_otherwise(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('\ufeffid,x,"a, b"\n007,1.0,"two\nlines"\n8,,""\n')
    source = open_source(str(tmp_path / "t.csv"))
    assert source.csv
    assert source.rows is None
    table = pa.Table.from_batches(source.batches())
    assert table.to_pydict() == {"id": ["007", "8"], "x": ["1.0", None], "a, b": ["two\nlines", ""]}
    (tmp_path / "none.csv").write_text("id,x\n")
    assert list(open_source(str(tmp_path / "none.csv")).batches()) == []


def test_a_glob_is_read_in_order_of_names(tmp_path: Path) -> None:
    for name in ["b", "a", "c"]:
        papq.write_table(pa.table({"id": [name]}), tmp_path / f"{name}.parquet")
    source = open_source(str(tmp_path / "*.parquet"))
    assert pa.Table.from_batches(source.batches())["id"].to_pylist() == ["a", "b", "c"]
    assert source.rows == 3
    odd = tmp_path / "odd[1].parquet"
    papq.write_table(pa.table({"id": ["literal"]}), odd)
    assert open_source(str(odd)).rows == 1


def test_batches_are_bounded(tmp_path: Path) -> None:
    wide = pa.schema([("x", pa.list_(pa.float32(), 100_000))])
    assert batch_rows(wide) == LEAST_ROWS
    assert batch_rows(pa.schema([("x", pa.int8())])) == MOST_ROWS
    table = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(1000 * 9000, np.uint8)), 9000)})
    for writer in (as_parquet, as_file, as_stream):
        batches = list(open_source(str(writer(table, tmp_path))).batches())
        assert max(batch.nbytes for batch in batches) < 10 * 2**20
        assert sum(batch.num_rows for batch in batches) == 1000


def test_wide_rows_of_csv_come_in_numbers_too(tmp_path: Path) -> None:
    """Each batch costs time for each column: with a few rows a batch, a wide table would take that for each row."""
    row = b"x" * 20_000
    source = open_source(write(tmp_path, "t.csv", b"a,b\n" + b"\n".join([row + b",1"] * 600)))
    counts = [batch.num_rows for batch in source.batches()]
    assert sum(counts) == 600
    assert counts[0] > LEAST_ROWS - 2


def test_digits() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    source = open_source("builtin:digits")
    table = pa.Table.from_batches(source.batches())
    assert source.rows == table.num_rows == 1797
    assert table.schema == source.schema
    assert table["record_id"].to_pylist() == list(range(1797))
    original = datasets.load_digits()
    assert np.array_equal(table["pixels"].combine_chunks().values.to_numpy().reshape(-1, 64), original.data)
    assert np.array_equal(table["digit"].to_numpy(), original.target)
    assert set(table["digit"].to_pylist()) == set(range(10))
    assert table["pixels"].combine_chunks().values.to_numpy().max() == 16
    assert pa.Table.from_batches(source.batches(["digit"])).schema.names == ["digit"]


def write(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


def mixed(folder: Path, one: pa.Table, two: pa.Table) -> str:
    saved(folder, one, "1.parquet")
    saved(folder, two, "2.parquet")
    return str(folder / "*.parquet")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (lambda f: str(f / "absent.parquet"), "absent.parquet.*no such file"),
        (lambda f: str(f / "*.nothing"), "no file matches"),
        (str, "is a folder; expected a file or a glob"),
        (lambda f: write(f, "t.parquet", b"hello"), "t.parquet' is no table"),
        (lambda f: write(f, "t.parquet", b""), "t.parquet' is an empty file"),
        (lambda f: write(f, "t.parquet", b"PAR1 and nothing more"), "t.parquet' can't be read"),
        (lambda f: write(f, "t.pq", b"PAR1 and the end of another: PAR1"), "t.pq' can't be read"),
        (lambda f: write(f, "t.txt", b"PAR1 and nothing more"), "t.txt' is no table"),
        (lambda f: write(f, "t.arrow", b"ARROW1\0\0 and nothing more"), "t.arrow' can't be read"),
        (lambda f: write(f, "t.arrow", b"ARROW1 and nothing more"), "t.arrow' is no table"),
        (lambda f: write(f, "t.csv", b""), "t.csv' is an empty file"),
        (lambda f: write(f, "t.csv", b"a,a\n1,2\n"), "more than one column named 'a'"),
        (lambda f: write(f, "t.csv", b"a,b\n1,2\n3\n"), "a row has 1 fields where the header has 2"),
        (lambda f: write(f, "t.csv", b"\xff\xfea\n1\n"), "t.csv' can't be read"),
        (lambda _: "builtin:iris", "no such built-in table"),
        (
            lambda f: mixed(f, pa.table({"a": [1]}), pa.table({"b": [1]})),
            "2.parquet' has other columns or types than .*1.parquet': column 'a' is absent here, int64 there",
        ),
        (lambda f: mixed(f, pa.table({"a": [1]}), pa.table({"a": ["x"]})), "column 'a' is text here, int64 there"),
    ],
)
def test_what_is_no_table_is_named(uri: Callable[[Path], str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        list(open_source(uri(tmp_path)).batches())
    assert caught.value.hint


@pytest.mark.parametrize("header", ["PAR1", "ARROW1", "ARROW1-2"])
def test_a_csv_file_may_start_like_another_format(header: str, tmp_path: Path) -> None:
    source = open_source(write(tmp_path, "t.csv", f"{header},x\n1,PAR1".encode()))
    assert source.csv
    assert pa.Table.from_batches(source.batches()).to_pydict() == {header: ["1"], "x": ["PAR1"]}


@pytest.mark.parametrize("writer", [as_parquet, as_file, as_stream])
def test_names_of_columns_that_are_no_text_are_damage(writer: Callable[[pa.Table, Path], Path], tmp_path: Path) -> None:
    path = writer(pa.table({"name": [1]}), tmp_path)
    path.write_bytes(path.read_bytes().replace(b"name", b"na\xffe"))
    with pytest.raises(SourceError, match="can't be read: it is damaged"):
        open_source(str(path))


def test_lists_of_no_numbers_are_named(tmp_path: Path) -> None:
    """The reader of Parquet takes them for damage."""
    papq.write_table(pa.table({"id": [1], "none": pa.array([[]], pa.list_(pa.float32(), 0))}), tmp_path / "t.parquet")
    source = open_source(str(tmp_path / "t.parquet"))
    assert next(source.batches(["id"])).num_rows == 1
    with pytest.raises(SourceError, match="column 'none' is a list of 0 elements; expected at least 1"):
        list(source.batches())


def test_a_wide_table_is_described_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A description takes time for each column: one for each column would be slow with thousands of them."""
    papq.write_table(pa.table({f"c{i}": [i] for i in range(100)}), tmp_path / "t.parquet")
    described = 0
    schema_arrow = papq.ParquetFile.schema_arrow

    def counted(file: papq.ParquetFile) -> pa.Schema:
        nonlocal described
        described += 1
        return schema_arrow.fget(file)

    monkeypatch.setattr(papq.ParquetFile, "schema_arrow", property(counted))
    source = open_source(str(tmp_path / "t.parquet"))
    assert next(source.batches()).num_columns == 100
    assert described == 2  # when it is opened, and when it is read


def test_mistakes_show_no_row(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", b"a,b\nsecret\n")
    with pytest.raises(SourceError) as caught:
        list(open_source(path).batches())
    assert "secret" not in caught.value.message + caught.value.hint


def test_object_stores_come_later() -> None:
    with pytest.raises(UserError, match="not supported yet"):
        open_source("s3://bucket/t.parquet")


def test_a_damaged_page_of_the_source_is_noticed(tmp_path: Path) -> None:
    table = pa.table({"x": np.random.default_rng(0).normal(size=1000)})
    papq.write_table(table, tmp_path / "t.parquet", write_page_checksum=True, compression="none")
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    content[3000] ^= 1
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(SourceError, match="damaged"):
        list(open_source(str(tmp_path / "t.parquet")).batches())


# --- prediction input --------------------------------------------------------------------------------


def test_rows_in_memory_in_every_form(tmp_path: Path) -> None:
    table = people(30)
    recipe = resolved(saved(tmp_path, table), features=["age", "pay", "vector"])
    expected = feature_table(table, recipe)
    assert expected.schema.names == ["age", "pay", "vector"]
    columns = {name: table[name].to_pylist() for name in recipe.data.features}
    assert str(feature_table(columns, recipe).to_pylist()) == str(expected.to_pylist())
    columns["vector"] = np.array(columns["vector"])
    assert str(feature_table(columns, recipe).to_pylist()) == str(expected.to_pylist())
    batch = table.to_batches()[0]
    assert str(feature_table(batch, recipe).to_pylist()) == str(expected.to_pylist())
    assert feature_table(table.slice(0, 0), recipe).num_rows == 0


def test_arrays_stand_for_numbers_or_one_vector(tmp_path: Path) -> None:
    source = saved(tmp_path, people(30))
    numbers = resolved(source, features=["pay", "age"])
    rows = feature_table(np.array([[1.0, 2.0], [3.0, np.nan]]), numbers)
    assert str(rows.to_pydict()) == "{'pay': [1.0, 3.0], 'age': [2.0, nan]}"
    image = resolved(source, features=["pixels"])
    assert feature_table(np.zeros((5, 2, 2), np.uint8), image)["pixels"].type.list_size == 4
    for array in [np.zeros((3, 3)), np.zeros(3)]:
        with pytest.raises(UserError, match="expected one column for each of 2 features"):
            feature_table(array, numbers)
    with pytest.raises(UserError, match="only if every feature is numeric"):
        feature_table(np.zeros((3, 5)), resolved(source))
    with pytest.raises(UserError, match="can't be read as a table"):
        feature_table({"pay": object()}, numbers)
    with pytest.raises(SourceError, match="another length"):
        feature_table({"pixels": [[1, 2, 3]]}, image)
    with pytest.raises(SourceError, match="no column 'pay', no column 'age'"):
        feature_table({"x": [1]}, numbers)


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_texts_in_memory_must_be_texts(type_: pa.DataType, tmp_path: Path) -> None:
    recipe = resolved(saved(tmp_path, people(30)), features=["city", "age"])
    city = pa.array([b"K\xf6ln", b"Ulm", None]).view(pa.string()).cast(type_)
    for array in (city, city.dictionary_encode()) if type_ != pa.string_view() else (city,):
        with pytest.raises(SourceError, match="column 'city': 1 of 3 texts read so far are not valid UTF-8"):
            feature_table(pa.table({"city": array, "age": [1, 2, 3]}), recipe)


def test_input_files_must_have_the_features(tmp_path: Path) -> None:
    recipe = resolved(saved(tmp_path, people(30)))
    assert open_input(str(tmp_path / "people.parquet"), recipe, added=["scores"]).rows == 30
    saved(tmp_path, people(30).drop_columns(["city"]), "less.parquet")
    with pytest.raises(SourceError, match="no column 'city'"):
        open_input(str(tmp_path / "less.parquet"), recipe)
    with pytest.raises(SourceError, match="has a column 'age' already"):
        open_input(str(tmp_path / "people.parquet"), recipe, added=["age"])


def test_answers_are_written_batch_by_batch(tmp_path: Path) -> None:
    table = simple()
    with table_writer(tmp_path / "out.parquet", table.schema) as writer:
        for batch in table.to_batches(max_chunksize=2):
            writer.write_batch(batch)
    assert papq.read_table(tmp_path / "out.parquet").equals(table)
    with (
        pytest.raises(UserError, match="can't be written to"),
        table_writer(tmp_path / "no" / "out.parquet", table.schema),
    ):
        pass


# --- ids of a request ----------------------------------------------------------------------------------


def ids_in(path: str | Path) -> Any:
    return read_ids(path, subject_column="owner", record_column="rid")


def test_ids_from_lines_and_tables(tmp_path: Path) -> None:
    assert ids_in(write(tmp_path, "ids.txt", b"\xef\xbb\xbfp1\np2\n\np1\ne\xcc\x81\n")) == (
        "subject",
        ["p1", "p2", "é"],
    )
    papq.write_table(pa.table({"owner": ["b", "a", "b"], "rid": [1, 2, 3]}), tmp_path / "ids.parquet")
    assert ids_in(tmp_path / "ids.parquet") == ("subject", ["b", "a"])
    pacsv.write_csv(pa.table({"rid": [7, 8]}), tmp_path / "ids.csv")
    assert ids_in(tmp_path / "ids.csv") == ("record", ["7", "8"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ids.txt", b"", "holds no id"),
        ("ids.txt", b"\n\r\n\n", "holds no id"),
        ("ids.txt", b"PAR1\xff\n", "neither a table nor UTF-8 text"),
        ("ids.parquet", b"PAR1, but cut short", "can't be read: it is damaged"),
        ("ids.txt", b"\xff\xfe\x00", "neither a table nor UTF-8 text"),
        ("ids.csv", b"owners\n1\n", "no column 'owner' .did you mean 'owners'?"),
        ("ids.csv", b"owner,x\n,1\n", "1 of 1 ids are missing"),
    ],
)
def test_files_without_ids_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        ids_in(write(tmp_path, name, content))
    with pytest.raises(UserError, match="can't be read: No such file"):
        ids_in(tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a \n a\nb\t\n", ["a ", " a", "b\t"]),
        (b"a\r\nb \r\n\r\nc", ["a", "b ", "c"]),
        (b" \n\xc2\xa0\n", [" ", "\u00a0"]),
        (b"a\rb\nc\x0cd\n", ["a\rb", "c\x0cd"]),
    ],
    ids=["spaces", "line ends of Windows", "nothing but spaces", "other control characters"],
)
def test_a_line_is_an_id_as_it_stands(content: bytes, expected: list[str], tmp_path: Path) -> None:
    """Tables may have such ids, so "a " must not delete "a"."""
    assert ids_in(write(tmp_path, "ids.txt", content)) == ("subject", expected)
    papq.write_table(pa.table({"owner": expected}), tmp_path / "ids.parquet")
    assert ids_in(tmp_path / "ids.parquet") == ("subject", expected)


@pytest.mark.parametrize("lines", [["ARROYO-1", "b"], ["ARROW1", "b"], ["PAR1-7", "b"], ["PAR1", "PAR1"], ["PAR1"]])
def test_ids_that_look_like_a_format_are_ids(lines: list[str], tmp_path: Path) -> None:
    for end in ("", "\n"):
        content = ("\n".join(lines) + end).encode()
        assert ids_in(write(tmp_path, "ids.txt", content)) == ("subject", list(dict.fromkeys(lines)))


def test_tables_of_ids_are_known_by_their_content(tmp_path: Path) -> None:
    for writer in (as_parquet, as_file, as_stream):
        table = writer(pa.table({"owner": ["PAR1"]}), tmp_path)
        assert ids_in(table.rename(tmp_path / "ids.txt")) == ("subject", ["PAR1"])


def test_ids_that_are_no_text_are_refused(tmp_path: Path) -> None:
    papq.write_table(pa.table({"owner": pa.array([b"p\xe4", b"p2"]).view(pa.string())}), tmp_path / "ids.parquet")
    with pytest.raises(SourceError, match=r"ids.parquet': column 'owner': 1 of 2 texts .* not valid UTF-8"):
        ids_in(tmp_path / "ids.parquet")


def test_a_pipe_is_no_file_of_ids() -> None:
    """It can be read once only, and what is read to tell its format would be lost."""
    reading, writing = os.pipe()
    os.write(writing, b"a\n" * 10)
    os.close(writing)
    with os.fdopen(reading, "rb"), pytest.raises(UserError, match="can't be read: it is no file"):
        ids_in(f"/dev/fd/{reading}")
