"""Scalers and vocabularies: fitted on the first non-empty slice, frozen, and never moved by anybody else."""

import numpy as np
import pyarrow as pa
import pytest
from training_kit import KEYS, category, images, numbers, recipe

from sisa.learners.columns import Columns, columns_from_table
from sisa.learners.preprocess import Preprocessor
from sisa.recipe import ColumnSpec

MIXED = {
    "age": ColumnSpec(type="numeric"),
    "job": ColumnSpec(type="categorical"),
    "face": ColumnSpec(type="vector", size=2),
    "income": ColumnSpec(type="numeric"),
    "debt": ColumnSpec(type="numeric"),
}
NAN = float("nan")


def mixed(ages, jobs, faces, slices=None) -> Columns:
    count = len(ages)
    return Columns(
        numeric_NP=np.array([ages, np.arange(count), -np.arange(count)], np.float64).T,
        categories=(category(*jobs),),
        vectors=(np.array(faces, np.float32),),
        labels_N=np.zeros(count, np.int64),
        uids_N=np.arange(count, dtype=np.uint64),
        slices_N=np.ones(count, np.int32) if slices is None else np.array(slices, np.int32),
    )


def test_each_kind_of_column_has_its_place_in_the_row():
    columns = mixed([1, 3, NAN], ["b", None, "a"], [[0, 2], [NAN, 4], [2, 2]])
    preprocessor = Preprocessor.fit(recipe(columns=MIXED), columns)
    X_ND = preprocessor.transform(columns)
    assert preprocessor.feature_shape == (9,)
    assert X_ND.dtype == np.float32
    half = np.sqrt(1.5)
    vector_std = np.std([0, 2, 4, 2, 2])
    np.testing.assert_allclose(
        X_ND,
        [  # age, then missing, unknown, a, b, then the face, income and debt
            [-1, 0, 0, 0, 1, (0 - 2) / vector_std, 0, -half, half],
            [1, 1, 0, 0, 0, 0, (4 - 2) / vector_std, 0, 0],
            [0, 0, 0, 1, 0, 0, 0, half, -half],
        ],
        rtol=1e-6,
        atol=1e-7,
    )


def test_scaling_is_done_in_float64_by_the_population_standard_deviation():
    columns = numbers([200], features=3)
    preprocessor = Preprocessor.fit(recipe(features=3), columns)
    exact = (columns.numeric_NP - columns.numeric_NP.mean(0)) / np.array(
        [np.std(np.ascontiguousarray(column)) for column in columns.numeric_NP.T]
    )
    assert np.abs(preprocessor.transform(columns) - exact).max() < 1e-6
    means = np.array([np.mean(np.ascontiguousarray(column)) for column in columns.numeric_NP.T])
    stds = np.array([np.std(np.ascontiguousarray(column)) for column in columns.numeric_NP.T])
    expected = ((columns.numeric_NP - means) / stds).astype(np.float32)
    assert preprocessor.transform(columns).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_vector_has_one_scale_for_all_elements(dtype):
    columns = images([50], size=12, dtype=dtype)
    specs = {"p": ColumnSpec(type="vector", size=12)}
    X_ND = Preprocessor.fit(recipe(columns=specs), columns).transform(columns)
    values = columns.vectors[0].astype(np.float64)
    expected = ((values - values.reshape(-1).mean()) / values.reshape(-1).std()).astype(np.float32)
    assert X_ND.tobytes() == expected.tobytes()


def test_declared_scales_and_values_are_taken_as_they_are():
    specs = {
        "age": ColumnSpec(type="numeric", mean=10.0, std=2.0),
        "job": ColumnSpec(type="categorical", values=["z", "a"]),
        "face": ColumnSpec(type="vector", size=2, mean=0.0, std=255.0),
        "income": ColumnSpec(type="numeric", mean=0.0, std=1.0),
        "debt": ColumnSpec(type="numeric", mean=0.0, std=1.0),
    }
    columns = mixed([12, 10], ["a", "b"], [[255, 0], [0, 0]])
    X_ND = Preprocessor.fit(recipe(columns=specs), columns).transform(columns)
    assert X_ND.tolist() == [[1, 0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 1, -1]]


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("constant", [0.1] * 7, [0.0] * 7),
        ("all missing", [NAN] * 3, [0.0] * 3),
        ("infinite", [np.inf, 1.0, 3.0, -np.inf], [0, -1, 1, 0]),
        ("huge", [1e308, -1e308, 1e308], [0, 0, 0]),
        ("one", [5.0], [0.0]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_columns_that_have_no_spread(name, values, expected):
    columns = mixed(values, [None] * len(values), [[1, 1]] * len(values))
    X_ND = Preprocessor.fit(recipe(columns=MIXED), columns).transform(columns)
    assert X_ND[:, 0].tolist() == expected, name
    assert np.isfinite(X_ND).all()


def test_a_category_or_a_maximum_that_comes_later_moves_nothing():
    """Statistics of the whole table must not slip in: only the first non-empty slice counts."""
    columns = mixed([1, 3, 1e6], ["a", "b", "only here"], [[0, 1], [1, 0], [9, 9]], slices=[2, 2, 3])
    spec = recipe(columns=MIXED)
    all_slices = Preprocessor.fit(spec, columns.first_slice())
    alone = Preprocessor.fit(spec, columns.rows(slice(0, 2)))
    assert all_slices.vocabularies == alone.vocabularies == (("a", "b"),)
    assert all_slices.numeric_scale_2P.tobytes() == alone.numeric_scale_2P.tobytes()
    assert all_slices.transform(columns)[2, 1:5].tolist() == [0, 1, 0, 0]  # unknown


def test_state_and_back():
    columns = mixed([1, 3, NAN], ["b", None, "a"], [[0, 2], [NAN, 4], [2, 2]])
    spec = recipe(columns=MIXED)
    preprocessor = Preprocessor.fit(spec, columns)
    again = Preprocessor.from_state(spec, preprocessor.to_state())
    assert again.transform(columns).tobytes() == preprocessor.transform(columns).tobytes()
    assert all(name.startswith("preprocess.") for name in preprocessor.to_state().tensors)


def test_images_are_channels_first_for_the_model_and_last_in_the_row():
    spec = recipe(columns={"p": ColumnSpec(type="vector", size=12)}, image={"height": 2, "width": 2, "channels": 3})
    assert Preprocessor.fit(spec, images([4], size=12)).feature_shape == (3, 2, 2)


def table(**changed) -> pa.Table:
    columns = {
        "_sisa_record": pa.array(["r1", "r2", "r3"]),
        "age": pa.array([1.0, None, 3.0]),
        "job": pa.array(["b", None, "a"]),
        "face": pa.array([[0.0, 1.0], None, [None, 2.0]], pa.list_(pa.float32(), 2)),
        "income": pa.array([1.0, 2.0, 3.0]),
        "debt": pa.array([1.0, 2.0, 3.0]),
        "_sisa_label": pa.array([0, 1, 2], pa.int32()),
        **changed,
    }
    return pa.table(columns)


def test_a_table_becomes_columns():
    columns = columns_from_table(table(), recipe(columns=MIXED), keys=KEYS, slices_N=np.array([1, 2, 2]))
    np.testing.assert_array_equal(columns.numeric_NP[:, 0], [1, NAN, 3])
    np.testing.assert_array_equal(columns.vectors[0], [[0, 1], [NAN, NAN], [NAN, 2]])
    job = columns.categories[0]
    assert [None if code < 0 else job.values[code] for code in job.codes_N] == ["b", None, "a"]
    assert columns.labels_N.tolist() == [0, 1, 2]
    assert len(set(columns.uids_N.tolist())) == 3
    assert columns.through(1).count == 1
    assert columns.rows(np.array([True, False, True])).labels_N.tolist() == [0, 2]


def test_a_table_in_chunks_or_cut_from_a_larger_one_gives_the_same_columns():
    spec = recipe(columns=MIXED)
    whole = columns_from_table(table(), spec, keys=KEYS)
    joined = pa.concat_tables([table().slice(0, 1), table().slice(1)])
    padded = pa.concat_tables([table(), table()]).combine_chunks().slice(3)
    for other in (joined, padded):
        columns = columns_from_table(other, spec, keys=KEYS)
        assert columns.uids_N.tolist() == whole.uids_N.tolist()
        np.testing.assert_array_equal(columns.vectors[0], whole.vectors[0])
        np.testing.assert_array_equal(columns.numeric_NP, whole.numeric_NP)
        fitted = Preprocessor.fit(spec, whole)
        assert fitted.transform(columns).tobytes() == fitted.transform(whole).tobytes()


def test_bytes_stay_bytes_unless_some_are_missing():
    faces = pa.array([[0, 1], [2, 3], [4, 5]], pa.list_(pa.uint8(), 2))
    assert columns_from_table(table(face=faces), recipe(columns=MIXED)).vectors[0].dtype == np.uint8
    gaps = pa.array([[0, 1], None, [None, 5]], pa.list_(pa.uint8(), 2))
    vector = columns_from_table(table(face=gaps), recipe(columns=MIXED)).vectors[0]
    np.testing.assert_array_equal(vector, [[0, 1], [NAN, NAN], [NAN, 5]])


def test_what_lies_under_a_missing_vector_is_not_read():
    under = pa.FixedSizeListArray.from_arrays(
        pa.array([0, 1, 7, 7, 4, 5], pa.uint8()), 2, mask=pa.array([False, True, False])
    )
    vector = columns_from_table(table(face=under), recipe(columns=MIXED)).vectors[0]
    np.testing.assert_array_equal(vector, [[0, 1], [NAN, NAN], [4, 5]])


def test_rows_to_predict_need_neither_ids_nor_labels():
    columns = columns_from_table(table().drop(["_sisa_record", "_sisa_label"]), recipe(columns=MIXED))
    assert columns.count == 3
    empty = columns_from_table(table().slice(0, 0), recipe(columns=MIXED), keys=KEYS)
    assert empty.count == 0


def test_parts_put_together_are_the_whole():
    spec = recipe(columns=MIXED)
    whole = mixed([1, 3, 5], ["b", None, "a"], [[0, 2], [1, 4], [2, 2]], slices=[1, 2, 2])
    parts = [
        mixed([1], ["b"], [[0, 2]], slices=[1]),
        mixed([], [], np.zeros((0, 2))),
        mixed([3, 5], [None, "a"], [[1, 4], [2, 2]], slices=[2, 2]),
    ]
    parts[1] = parts[1].rows(slice(0, 0))
    joined = Columns.concatenate(parts)
    fitted = Preprocessor.fit(spec, whole)
    moved = Columns(joined.numeric_NP, joined.categories, joined.vectors, *(3 * [whole.labels_N]))
    assert fitted.transform(moved)[:, :7].tobytes() == fitted.transform(whole)[:, :7].tobytes()
    assert joined.slices_N.tolist() == [1, 2, 2]
    with pytest.raises(ValueError, match="slice by slice"):
        Columns.concatenate(parts[::-1])
    with pytest.raises(ValueError, match="at least one"):
        Columns.concatenate([])
