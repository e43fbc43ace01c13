"""The Open Inference Protocol, spoken by a stock client that knows nothing of this project."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
import serving_kit
import tables
from serving_kit import NAME, Server, expected, features, serving

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the client and its libraries warn of when they are imported is theirs
    triton = pytest.importorskip("tritonclient.http")
    from tritonclient.utils import InferenceServerException

if TYPE_CHECKING:
    from tritonclient.http import InferenceServerClient

mixed_store = serving_kit.mixed_store
binary_store = serving_kit.binary_store


@pytest.fixture(scope="module")
def server(mixed_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(mixed_store, tmp_path_factory.mktemp("served"), "--no-repair") as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[InferenceServerClient]:
    made = triton.InferenceServerClient(server.address.removeprefix("http://"))
    yield made
    made.close()


@pytest.fixture
def token(server: Server) -> dict[str, str]:
    """The header that opens predictions, and nothing else; the client adds to what it is given."""
    return {"authorization": f"Bearer {server.token('predict')}"}


def tensors(rows: pa.Table, *, binary: bool = False) -> list[Any]:
    """One input for each column, as somebody fills it who has read the model's metadata."""
    made = []
    for name in rows.column_names:
        values = rows[name].to_pylist()
        if name == "code":
            array = np.array([[0 if v is None else v for v in row or [0, 0, 0]] for row in values], np.float32)
        elif name in {"job", "grade"}:
            array = np.array([["none" if value is None else str(value)] for value in values], np.object_)
        else:
            array = np.array([[0.0 if value is None else float(value)] for value in values], np.float64)
        kind = {"float32": "FP32", "float64": "FP64", "object": "BYTES"}[str(array.dtype)]
        made.append(triton.InferInput(name, array.shape, kind))
        made[-1].set_data_from_numpy(array, binary_data=binary)
    return made


def whole(table: pa.Table) -> pa.Table:
    """The table without what is missing, since tensors have no null."""
    rows = table.select(["age", "job", "hours", "code", "grade"]).to_pylist()
    keep = [
        all(value is not None for value in row.values()) and all(x is not None for x in row["code"]) for row in rows
    ]
    return table.filter(pa.array(keep))


def test_the_server_and_its_model_are_live_and_ready(client: InferenceServerClient, token: dict[str, str]) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(NAME, headers=token)
    assert client.is_model_ready(NAME, "1", headers=token)
    assert not client.is_model_ready(NAME, "99", headers=token)
    assert not client.is_model_ready("other", headers=token)
    assert not client.is_model_ready(NAME)  # without a token


def test_metadata_say_what_to_send(client: InferenceServerClient, token: dict[str, str]) -> None:
    assert client.get_server_metadata()["extensions"] == []
    told = client.get_model_metadata(NAME, headers=token)
    assert told == client.get_model_metadata(NAME, "1", headers=token)
    assert (told["name"], told["versions"]) == (NAME, ["1"])
    assert told["parameters"]["classes"] == tables.CLASSES
    assert [(each["name"], each["datatype"], each["shape"]) for each in told["inputs"]] == [
        ("age", "FP64", [-1, 1]), ("job", "BYTES", [-1, 1]), ("hours", "FP64", [-1, 1]), ("code", "FP32", [-1, 3]),
        ("grade", "BYTES", [-1, 1]),
    ]  # fmt: skip
    assert [each["name"] for each in told["outputs"]] == ["prediction", "scores", "version"]


@pytest.mark.parametrize("version", ["", "1"])
@pytest.mark.parametrize("named", [True, False], ids=["outputs named", "all outputs"])
def test_inference_is_prediction(
    server: Server, client: InferenceServerClient, token: dict[str, str], version: str, named: bool
) -> None:
    rows = whole(features(server.store, tables.mixed()))
    labels, scores_BC = expected(server.store, rows)
    names = ["scores", "prediction", "version"]
    wanted = [triton.InferRequestedOutput(name, binary_data=False) for name in names] if named else None
    answer = client.infer(NAME, tensors(rows), model_version=version, outputs=wanted, request_id="r-17", headers=token)
    assert answer.get_response()["id"] == "r-17"
    assert answer.get_response()["model_version"] == "1"
    assert answer.as_numpy("prediction").tolist() == labels
    assert answer.as_numpy("version").tolist() == [1]
    np.testing.assert_allclose(answer.as_numpy("scores"), scores_BC, atol=1e-6)


def test_integer_classes_are_integers(binary_store: Path, tmp_path: Path) -> None:
    with serving(binary_store, tmp_path, "--open-prediction", "--no-repair") as opened:
        client = triton.InferenceServerClient(opened.address.removeprefix("http://"))
        bits = np.array(tables.binary()["x"].to_pylist(), np.uint8)
        asked = triton.InferInput("x", bits.shape, "UINT8")
        asked.set_data_from_numpy(bits, binary_data=False)
        answer = client.infer(NAME, [asked])
        labels, scores_BC = expected(opened.store, features(opened.store, tables.binary()))
        assert answer.as_numpy("prediction").dtype == np.int64
        assert answer.as_numpy("prediction").tolist() == labels
        np.testing.assert_allclose(answer.as_numpy("scores"), scores_BC, atol=1e-6)
        client.close()


def refused(client: InferenceServerClient, *arguments: Any, **options: Any) -> str:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(*arguments, **options)
    return str(caught.value)


def test_binary_tensors_are_refused_with_the_way_out(
    server: Server, client: InferenceServerClient, token: dict[str, str]
) -> None:
    rows = whole(features(server.store, tables.mixed())).slice(0, 2)
    said = refused(client, NAME, tensors(rows, binary=True), headers=token)
    assert "415" in said
    assert "binary_data=False" in said


def test_mistakes_are_told_to_the_client(server: Server, client: InferenceServerClient, token: dict[str, str]) -> None:
    rows = whole(features(server.store, tables.mixed())).slice(0, 2)
    assert "[404] there is no model of this name" in refused(client, "other", tensors(rows), headers=token)
    assert "the live one" in refused(client, NAME, tensors(rows), model_version="99", headers=token)
    assert "'grade' is missing" in refused(client, NAME, tensors(rows)[:-1], headers=token)
    assert "401" in refused(client, NAME, tensors(rows))
