"""The HTTP API against a real server: what it answers, what it refuses, how it ends, and what it never says."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import serving_kit
import tables
from serving_kit import ARROW, NAME, Server, expected, features, ledger, serving, stream, trained_subject, wait_for

import sisa

mixed_store = serving_kit.mixed_store
binary_store = serving_kit.binary_store
holdout_store = serving_kit.holdout_store

PEOPLE = [f"p\u00e9rson-{number:03d}" for number in range(24)]
ROW = {"age": 41.5, "job": "baker", "hours": 38, "code": [0.5, None, -1], "grade": 1}
JSON = "application/json"


@pytest.fixture(scope="module")
def server(mixed_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(
        mixed_store, tmp_path_factory.mktemp("served"), "--max-rows", "1000", "--max-megabytes", "1"
    ) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    return server.client()


def repaired(client: httpx.Client, identifier: str) -> dict[str, Any]:
    """Wait until a deletion is repaired."""

    def settled() -> dict[str, Any] | None:
        told = client.get(f"/deletions/{identifier}").json()
        return told if told["state"] == "repaired" else None

    return wait_for(settled, what=lambda: f"{identifier} is repaired")


def assert_refused(answer: httpx.Response, *statuses: int) -> dict[str, str]:
    """A refusal is JSON of one form, says what to change, and holds no trace of the program."""
    assert answer.status_code in statuses, (answer.status_code, answer.text[:500])
    assert answer.headers["content-type"] == JSON
    error = answer.json()["error"]
    assert answer.json().keys() == {"error"}
    if answer.request.url.path.startswith("/v2/"):  # as the protocol has it
        assert isinstance(error, str)
        error = {"message": error, "hint": error}
    assert error.keys() == {"message", "hint"}
    assert error["message"]
    assert error["hint"]
    assert not any(word in answer.text for word in ("Traceback", "File ", "site-packages", "sqlite", "0x"))
    return error


# --- Health and description -----------------------------------------------------------------------


def test_health_needs_no_token(server: Server) -> None:
    asking = server.client(token="")
    for path in ("/livez", "/v2/health/live"):
        assert asking.get(path).json() == {"live": True}
    for path in ("/readyz", "/v2/health/ready"):
        told = asking.get(path).json()
        assert (told["ready"], told["reason"]) == (True, "")
        assert told["version"] >= 1


@pytest.mark.parametrize(
    "path", ["/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/v2", "/openapi.json", "/"]
)
def test_a_load_balancer_may_ask_for_the_head_alone(server: Server, path: str) -> None:
    asking = server.client(token="")
    head, whole = asking.head(path), asking.get(path)
    assert (head.status_code, head.content) == (whole.status_code, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]


def test_a_store_without_an_ensemble_is_alive_but_answers_nobody(mixed_store: Path, tmp_path: Path) -> None:
    shutil.copytree(mixed_store, tmp_path / "untrained")
    with ledger(tmp_path / "untrained") as opened, opened.database.transaction():
        opened.database.rows("DELETE FROM versions")
    with serving(tmp_path / "untrained", tmp_path, "--max-seconds", "4", ready=False) as empty:
        asking = empty.client()
        assert asking.get("/livez").status_code == 200
        answer = asking.post("/predict", json={"rows": [ROW]})
        assert_refused(answer, 503)
        assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/docs/oauth2-redirect"])
def test_the_frameworks_own_pages_are_off(client: httpx.Client, path: str) -> None:
    assert_refused(client.get(path), 404)


def test_metrics_count_what_was_answered(client: httpx.Client) -> None:
    client.post("/predict", json={"rows": [ROW]})
    told = client.get("/metrics")
    assert told.headers["content-type"].startswith("text/plain")
    assert "sisa_" in told.text


@pytest.mark.parametrize("path", ["/", "/page/style.css", "/page/app.js"])
def test_the_page_comes_with_its_policy(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


# --- Predictions ----------------------------------------------------------------------------------


def assert_predicts(asking: httpx.Client, store: Path, table: pa.Table) -> None:
    """JSON and Arrow give what the library gives in this process."""
    rows = features(store, table)
    labels, scores_BC = expected(store, rows)
    told = asking.post("/predict", json={"rows": rows.to_pylist()}).json()
    assert told["predictions"] == labels
    np.testing.assert_allclose(told["scores"], scores_BC, atol=1e-6)
    answer = asking.post("/predict", content=stream(rows), headers={"content-type": ARROW})
    assert answer.headers["content-type"] == ARROW
    with pa.ipc.open_stream(answer.content) as reader:
        found = reader.read_all()
    assert found["prediction"].to_pylist() == labels
    np.testing.assert_allclose(found["scores"].to_pylist(), scores_BC, atol=1e-6)
    metadata = {name.decode(): value.decode() for name, value in found.schema.metadata.items()}
    assert metadata == {name: str(told[name]) for name in ("version", "path", "voters")}


@pytest.mark.parametrize("count", [1, 5, 49])
def test_predictions_are_the_librarys(server: Server, client: httpx.Client, count: int) -> None:
    assert_predicts(client, server.store, tables.mixed().slice(0, count))


def test_many_rows_are_answered_as_few_are(server: Server, client: httpx.Client) -> None:
    table = pa.concat_tables([tables.mixed()] * 20)
    assert_predicts(client, server.store, table)


def test_no_rows_have_no_predictions(server: Server, client: httpx.Client) -> None:
    none = features(server.store, tables.mixed()).slice(0, 0)
    told = client.post("/predict", json={"rows": []}).json()
    assert (told["predictions"], told["scores"]) == ([], [])
    answer = client.post("/predict", content=stream(none), headers={"content-type": ARROW})
    with pa.ipc.open_stream(answer.content) as reader:
        assert reader.read_all().schema.field("prediction").type == pa.string()


def test_predictions_of_integer_classes_and_single_bytes(binary_store: Path, tmp_path: Path) -> None:
    with serving(binary_store, tmp_path, "--open-prediction") as open_to_all:
        anyone = open_to_all.client(token="")
        assert_predicts(anyone, open_to_all.store, tables.binary())
        assert_refused(anyone.get("/state"), 401)
        assert_refused(anyone.post("/deletions", json={"subjects": ["1"]}), 401)
        assert anyone.get(f"/v2/models/{NAME}").status_code == 200
        assert anyone.post("/predict", json={"rows": []}, headers={"authorization": "Bearer junk"}).status_code == 401


def test_encodings_of_the_same_values_are_answered_alike(server: Server, client: httpx.Client) -> None:
    rows = features(server.store, tables.mixed())
    labels, _ = expected(server.store, rows)
    encoded = rows.set_column(1, "job", rows["job"].dictionary_encode())
    large = rows.set_column(1, "job", rows["job"].cast(pa.large_string()))
    listed = rows.set_column(3, "code", pa.array(rows["code"].to_pylist(), pa.list_(pa.float64())))
    for table in (encoded, large, listed):
        answer = client.post("/predict", content=stream(table), headers={"content-type": ARROW})
        assert answer.status_code == 200, answer.text
        with pa.ipc.open_stream(answer.content) as reader:
            assert reader.read_all()["prediction"].to_pylist() == labels


# --- Deletions ------------------------------------------------------------------------------------


def test_a_deletion_from_its_acceptance_to_its_evidence(server: Server, client: httpx.Client) -> None:
    before = client.get("/state")
    tag = {"if-none-match": before.headers["etag"]}
    assert client.get("/state", headers=tag).status_code == 304
    assert client.get("/state", headers={"if-none-match": f'"other", W/{tag["if-none-match"]}'}).status_code == 304
    version = before.json()["version"]

    answer = client.post("/deletions", json={"subjects": [PEOPLE[3]], "reason": "ticket 4711", "regime": "gdpr"})
    assert answer.status_code == 202, answer.text
    receipt = answer.json()
    assert receipt.keys() == {"request", "requests", "state", "version_quarantine", "missing", "repeated"}
    assert receipt["requests"] == [receipt["request"]]
    assert (receipt["missing"], receipt["repeated"]) == ([], False)
    assert receipt["version_quarantine"] == version + 1
    # Acknowledged: nothing older answers any more.
    assert client.post("/predict", json={"rows": [ROW]}).json()["version"] > version

    told = repaired(client, receipt["request"])
    assert told["reason"] == "ticket 4711"
    assert (told["regime"], bool(told["due_at"])) == ("gdpr", True)
    whats = [step["what"] for step in told["timeline"]]
    assert [whats[0], whats[-1]] == ["accepted", "repaired"]
    assert {"rows erased", "stages purged", "repairing", f"version {version + 1} published (quarantine)"} <= set(whats)
    assert [step["at"] for step in told["timeline"]] == sorted(step["at"] for step in told["timeline"])
    evidence = told["evidence"]
    assert evidence["version_quarantine"] == version + 1
    assert evidence["version_after"] == told["version_after"] > version + 1
    assert {(s["shard"], s["stage"]) for s in evidence["stages_purged"]} == {
        (s["shard"], s["stage"]) for s in evidence["stages_retrained"]
    }
    assert len(evidence["stages_retrained"]) == told["stages_retrained"] > 0
    assert all(stage["worker"] for stage in evidence["stages_retrained"])
    (listed,) = (each for each in client.get("/deletions").json()["deletions"] if each["request"] == receipt["request"])
    assert listed == {name: value for name, value in told.items() if name in listed}

    after = client.get("/state", headers=tag)
    assert after.status_code == 200
    assert after.json()["version"] >= evidence["version_after"]
    assert after.json()["subjects"] == before.json()["subjects"] - 1
    assert after.json()["open_requests"] == 0
    wait_for(
        lambda: client.post("/predict", json={"rows": [ROW]}).json()["version"] == evidence["version_after"],
        what=lambda: "the repaired version answers",
    )
    assert_predicts(client, server.store, tables.mixed())

    again = client.post("/deletions", json={"subjects": [PEOPLE[3]], "reason": "ticket 4711", "regime": "gdpr"}).json()
    assert (again["request"], again["repeated"], again["state"]) == (receipt["request"], True, "repaired")


def test_a_quarantine_is_measured_as_long_as_it_is_live(holdout_store: Path, tmp_path: Path) -> None:
    """With the repair put off, the page shows how well the rest of the ensemble answers."""
    with serving(holdout_store, tmp_path, "--no-repair") as waiting:
        asking = waiting.client()
        number = asking.post("/deletions", json={"subjects": [trained_subject(waiting.store)]}).json()[
            "version_quarantine"
        ]

        def measured() -> float | None:
            versions = {row["number"]: row for row in asking.get("/state").json()["versions"]}
            assert versions[number]["cause"] == "quarantine"
            return versions[number]["accuracy"]

        accuracy = wait_for(measured, what=lambda: "the quarantine is measured")
    store = sisa.open_store(waiting.store)
    assert store.version == number
    found = store.measure()
    store.close()
    assert found is not None
    assert accuracy == found.accuracy


def test_an_idempotency_key_stands_for_one_body(client: httpx.Client) -> None:
    key = {"idempotency-key": "0f8fad5b-d9cb-469f-a165-70867728950e"}
    first = client.post("/deletions", json={"subjects": [PEOPLE[4]]}, headers=key)
    assert (first.status_code, first.json()["repeated"]) == (202, False)
    second = client.post("/deletions", json={"subjects": [PEOPLE[4]]}, headers=key)
    assert (second.status_code, second.json()["repeated"]) == (202, True)
    assert second.json()["request"] == first.json()["request"]
    assert_refused(client.post("/deletions", json={"subjects": [PEOPLE[5]]}, headers=key), 422)
    assert client.get("/state").json()["requests"][-1]["request"] == first.json()["request"]
    repaired(client, first.json()["request"])


def test_an_idempotency_key_is_not_used_up_by_a_refusal(client: httpx.Client) -> None:
    headers = {"idempotency-key": "typo"}
    assert_refused(client.post("/deletions", json={"subjects": ["p3rson"]}, headers=headers), 404)
    assert_refused(client.post("/deletions", json={"subjects": [PEOPLE[4]], "reason": "\t"}, headers=headers), 422)
    mended = client.post("/deletions", json={"subjects": [PEOPLE[4]]}, headers=headers)
    assert mended.status_code == 202
    assert_refused(client.post("/deletions", json={"subjects": ["p3rson"]}, headers=headers), 422)
    repaired(client, mended.json()["request"])


def test_records_are_deleted_by_their_own_ids(client: httpx.Client) -> None:
    record = tables.mixed()["record"][0].as_py()
    receipt = client.post("/deletions", json={"records": [record, str(record)]}).json()
    assert repaired(client, receipt["request"])["records"] == 1


def test_unknown_ids_change_nothing_and_are_not_repeated(client: httpx.Client) -> None:
    before = client.get("/state").headers["etag"]
    error = assert_refused(client.post("/deletions", json={"subjects": ["stranger-77", PEOPLE[6]]}), 404)
    assert "stranger-77" not in json.dumps(error)
    assert "nothing was changed" in error["message"]
    assert client.get("/state", headers={"if-none-match": before}).status_code == 304
    answer = client.post("/deletions", json={"subjects": ["stranger-77"], "ignore_missing": True})
    assert answer.status_code == 202
    assert answer.json()["missing"] == ["stranger-77"]
    assert client.get("/state", headers={"if-none-match": before}).status_code == 304


# --- Doors ----------------------------------------------------------------------------------------


def test_a_revoked_token_is_refused_from_the_next_request_on(server: Server) -> None:
    token = server.token("read")
    asking = server.client(token=token)
    assert asking.get("/state").status_code == 200
    with ledger(server.store) as opened:
        opened.tokens.revoke(token)
    assert_refused(asking.get("/state"), 401)


@pytest.mark.parametrize(
    ("scope", "method", "path"),
    [
        ("predict", "GET", "/state"),
        ("predict", "GET", "/deletions"),
        ("predict", "GET", "/deletions/del-0"),
        ("predict", "GET", "/metrics"),
        ("predict", "POST", "/deletions"),
        ("read", "POST", "/deletions"),
        ("read", "POST", "/predict"),
        ("read", "GET", f"/v2/models/{NAME}"),
        ("delete", "POST", f"/v2/models/{NAME}/infer"),
        ("delete", "GET", "/state"),
    ],
)
def test_a_token_opens_its_scopes_only(server: Server, scope: str, method: str, path: str) -> None:
    assert_refused(server.client(scope).request(method, path), 403)
    for wrong in ("", "sisa_0123456789abcdef_" + "A" * 43):
        answer = server.client(token=wrong).request(method, path)
        assert_refused(answer, 401)
        assert answer.headers["www-authenticate"].startswith("Bearer")


def test_an_admin_may_do_everything(server: Server) -> None:
    admin = server.client("admin")
    assert admin.get("/state").status_code == 200
    assert admin.post("/predict", json={"rows": [ROW]}).status_code == 200
    assert_refused(admin.post("/deletions", json={"subjects": ["stranger"]}), 404)


# --- Bad requests ---------------------------------------------------------------------------------


def row(**changes: Any) -> bytes:
    return json.dumps({"rows": [{**ROW, **changes}]}).encode()


def without(*names: str) -> bytes:
    return json.dumps({"rows": [{name: value for name, value in ROW.items() if name not in names}]}).encode()


def ids(*values: Any, **more: Any) -> bytes:
    return json.dumps({"subjects": list(values), **more}).encode()


def tensor(name: str, *data: Any, **changes: Any) -> dict[str, Any]:
    kind = "BYTES" if name in {"job", "grade"} else "FP32" if name == "code" else "FP64"
    shape = [1, 3] if name == "code" else [1, 1]
    return {"name": name, "shape": shape, "datatype": kind, "data": list(data), **changes}


TENSORS = [tensor("age", 1), tensor("job", "a"), tensor("hours", 2), tensor("code", 1, 2, 3), tensor("grade", "1")]


def inference(*tensors: dict[str, Any], **changes: Any) -> bytes:
    """A request of the protocol; given tensors replace those of the same name."""
    given = {each.get("name"): each for each in tensors}
    inputs = [given.pop(each["name"], each) for each in TENSORS] + list(given.values())
    return json.dumps({"inputs": inputs, **changes}).encode()


def nested(depth: int) -> bytes:
    return b'{"rows":' + b"[" * depth + b"]" * depth + b"}"


BAD_JSON: list[tuple[str, str, bytes, tuple[int, ...]]] = [
    ("nothing", "/predict", b"", (400,)),
    ("no JSON", "/predict", b"{rows: 1}", (400,)),
    ("cut short", "/predict", row()[:-3], (400,)),
    ("something after it", "/predict", row() + b"x", (400,)),
    ("a list", "/predict", b"[]", (400,)),
    ("null", "/predict", b"null", (400,)),
    ("bad UTF-8", "/predict", row(job="XX").replace(b"XX", b"\xff\xfe"), (400,)),
    ("a surrogate in UTF-8", "/predict", row(job="XX").replace(b"XX", b"\xed\xa0\x80"), (400,)),
    ("UTF-16", "/predict", row().decode().encode("utf-16"), (400,)),
    ("deep nesting", "/predict", nested(100_000), (400,)),
    ("some nesting", "/predict", nested(400), (422,)),
    ("a long number", "/predict", b'{"rows": [' + b"9" * 100_000 + b"]}", (400,)),
    ("NaN", "/predict", row(age=float("nan")), (400,)),
    ("Infinity", "/predict", row(age=float("inf")), (400,)),
    ("-Infinity", "/predict", row(code=[1, 2, float("-inf")]), (400,)),
    ("1e400", "/predict", row(age=77).replace(b"77", b"1e400"), (422,)),
    ("1e400 in a vector", "/predict", row(code=[1, 2, 77]).replace(b"77", b"-1e400"), (422,)),
    ("10**400", "/predict", row(age=10**400), (422,)),
    ("too large for single precision", "/predict", row(code=[1, 2, 1e39]), (422,)),
    ("no rows", "/predict", b"{}", (422,)),
    ("rows of another type", "/predict", b'{"rows": {"age": [1]}}', (422,)),
    ("a field that is none", "/predict", b'{"rows": [], "row": []}', (422,)),
    ("a row that is none", "/predict", b'{"rows": [1]}', (422,)),
    ("a missing column", "/predict", without("age"), (422,)),
    ("every column missing", "/predict", b'{"rows": [{}]}', (422,)),
    ("an unknown column", "/predict", row(salary=1), (422,)),
    ("an unknown column with half a character", "/predict", row(**{"\ud800": 1}), (422,)),
    ("a text for a number", "/predict", row(age="41"), (422,)),
    ("a list for a number", "/predict", row(age=[41]), (422,)),
    ("a number with a fraction for a text", "/predict", row(job=1.5), (422,)),
    ("an object for a text", "/predict", row(job={}), (422,)),
    ("half a character", "/predict", row(job="\ud800"), (422,)),
    ("a short vector", "/predict", row(code=[1, 2]), (422,)),
    ("a text in a vector", "/predict", row(code=[1, 2, "3"]), (422,)),
    ("a bool for a vector", "/predict", row(code=True), (422,)),
    ("too many rows", "/predict", json.dumps({"rows": [1] * 1001}).encode(), (413,)),
    ("too many bytes", "/predict", b'{"rows": "' + b"x" * 2**20 + b'"}', (413,)),
    ("no ids", "/deletions", b"{}", (422,)),
    ("an empty list of ids", "/deletions", ids(), (422,)),
    ("ids of both kinds", "/deletions", ids("a", records=["b"]), (422,)),
    ("ids that are no list", "/deletions", b'{"subjects": "p1"}', (422,)),
    ("ids named twice", "/deletions", b'{"subjects": ["a"], "subjects": ["b"]}', (400,)),
    ("an id that is a float", "/deletions", ids(1.0), (422,)),
    ("an id that is an object", "/deletions", ids({"id": 1}), (422,)),
    ("an id that is a list", "/deletions", ids(["a"]), (422,)),
    ("an id that is null", "/deletions", ids(None), (422,)),
    ("an id that is a bool", "/deletions", ids(True), (422,)),
    ("an empty id", "/deletions", ids(""), (422,)),
    ("an id of half a character", "/deletions", ids("\udc80"), (422,)),
    ("a path for an id", "/deletions", ids("../../x"), (404,)),
    ("NUL in an id", "/deletions", ids("p\0"), (404,)),
    ("a large integer for an id", "/deletions", ids(10**300), (404,)),
    ("a statement for an id", "/deletions", ids("'; DROP TABLE requests; --"), (404,)),
    ("a field that is none", "/deletions", ids("a", force=True), (422,)),
    ("a reason that is a number", "/deletions", ids(PEOPLE[0], reason=0), (422,)),
    ("a reason that is a bool", "/deletions", ids(PEOPLE[0], reason=False), (422,)),
    ("a reason that is null", "/deletions", ids(PEOPLE[0], reason=None), (422,)),
    ("a reason that is a list", "/deletions", ids(PEOPLE[0], reason=[]), (422,)),
    ("a reason of half a character", "/deletions", ids(PEOPLE[0], reason="\ud800"), (422,)),
    ("a reason with a terminal's commands", "/deletions", ids(PEOPLE[0], reason="\x1b[31mred"), (422,)),
    ("a reason of two lines", "/deletions", ids(PEOPLE[0], reason="a\nb"), (422,)),
    ("a reason that turns the writing round", "/deletions", ids(PEOPLE[0], reason="a\u202eb"), (422,)),
    ("a long reason", "/deletions", ids(PEOPLE[0], reason="x" * 10_001), (422,)),
    ("an unknown regime", "/deletions", ids(PEOPLE[0], regime="lgpd"), (422,)),
    ("a regime that is a number", "/deletions", ids(PEOPLE[0], regime=0), (422,)),
    ("ignore_missing of another type", "/deletions", ids(PEOPLE[0], ignore_missing="yes"), (422,)),
    ("a fraction for an integer", "/infer", inference(tensor("age", 41.5, datatype="UINT8")), (422,)),
    ("an integer out of range", "/infer", inference(tensor("age", 256, datatype="UINT8")), (422,)),
    ("a number below zero for an unsigned", "/infer", inference(tensor("age", -1, datatype="UINT64")), (422,)),
    ("a number for a bool", "/infer", inference(tensor("age", -1, datatype="BOOL")), (422,)),
    ("a bool for a number", "/infer", inference(tensor("age", True)), (422,)),
    ("a number for bytes", "/infer", inference(tensor("job", 1)), (422,)),
    ("rows of different lengths", "/infer", inference(tensor("code", [1, 2], [3])), (422,)),
    ("nested data of another shape", "/infer", inference(tensor("age", [41, 2], shape=[2, 1])), (422,)),
    ("nested data of one dimension", "/infer", inference(tensor("age", [41], shape=[1])), (422,)),
    ("half nested data", "/infer", inference(tensor("code", [1, 2, 3], 4)), (422,)),
    ("no inputs", "/infer", b"{}", (422,)),
    ("inputs of another type", "/infer", b'{"inputs": 1}', (422,)),
    ("an input of another type", "/infer", b'{"inputs": [1]}', (422,)),
    ("an input missing", "/infer", b'{"inputs": []}', (422,)),
    ("an input that is no feature", "/infer", inference(tensor("salary", 1)), (422,)),
    ("an input without a name", "/infer", inference({"shape": [1], "datatype": "FP64", "data": [1]}), (422,)),
    ("an input with a name that is no text", "/infer", json.dumps({"inputs": [{**tensor("age", 1), "name": []}]}).encode(), (422,)),
    ("an input with a strange field", "/infer", inference(tensor("age", 1, size=1)), (422,)),
    ("parameters that are no object", "/infer", inference(tensor("age", 1, parameters=[])), (422,)),
    ("another number of rows", "/infer", inference(tensor("age", 1, 2, shape=[2, 1])), (422,)),
    ("data that don't fill the shape", "/infer", inference(tensor("age", 1, 2)), (422,)),
    ("data that are no list", "/infer", inference(tensor("age", 1, data=1)), (422,)),
    ("an enormous shape", "/infer", inference(tensor("age", 1, shape=[2**62, 1])), (422,)),
    ("a negative shape", "/infer", inference(tensor("age", 1, shape=[-1, -1])), (422,)),
    ("a shape of bools", "/infer", inference(tensor("age", 1, shape=[True, True])), (422,)),
    ("a shape of three", "/infer", inference(tensor("age", 1, shape=[1, 1, 1])), (422,)),
    ("an unknown datatype", "/infer", inference(tensor("age", 1, datatype="FP8")), (422,)),
    ("a datatype of another type", "/infer", inference(tensor("age", 1, datatype=["FP64"])), (422,)),
    ("a text in a number", "/infer", inference(tensor("age", "1")), (422,)),
    ("an unknown output", "/infer", inference(outputs=[{"name": "labels"}]), (422,)),
    ("an output that is no object", "/infer", inference(outputs=["scores"]), (422,)),
    ("outputs of another type", "/infer", inference(outputs={"name": "scores"}), (422,)),
    ("an output named by a list", "/infer", inference(outputs=[{"name": ["scores"]}]), (422,)),
    ("an id of another type", "/infer", inference(id=7), (422,)),
    ("an id of half a character", "/infer", inference(id="\ud800"), (422,)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "statuses"), [case[1:] for case in BAD_JSON], ids=[f"{case[1]} {case[0]}" for case in BAD_JSON]
)
def test_bad_json_is_refused(client: httpx.Client, path: str, body: bytes, statuses: tuple[int, ...]) -> None:
    where = f"/v2/models/{NAME}/infer" if path == "/infer" else path
    assert_refused(client.post(where, content=body, headers={"content-type": JSON}), *statuses)


def test_the_good_request_of_the_bad_ones_is_answered(client: httpx.Client) -> None:
    assert client.post("/predict", content=row()).status_code == 200
    assert (
        client.post(f"/v2/models/{NAME}/infer", content=inference(), headers={"content-type": JSON}).status_code == 200
    )


def arrow(**changes: Any) -> pa.Table:
    """One row as the model wants it; a column that is None is left out."""
    columns = {
        "age": pa.array([1.5]), "job": pa.array(["baker"]), "hours": pa.array([2]),
        "code": pa.array([[1, 2, 3]], pa.list_(pa.float32(), 3)), "grade": pa.array([1]), **changes,
    }  # fmt: skip
    return pa.table({name: column for name, column in columns.items() if column is not None})


def _bad_text() -> pa.Array:
    return pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])


def _huge_offsets() -> bytes:
    content = stream(arrow(job=pa.array(["x" * 0x1234])))
    head, end, tail = content.rpartition(b"\0\0\0\0\x34\x12\0\0")
    assert end
    return head + b"\0\0\0\0\xff\xff\xff\x7f" + tail


def _views() -> pa.Array:
    view = pa.py_buffer((20).to_bytes(4, "little") + b"xxxx" + bytes(8))
    return pa.Array.from_buffers(pa.string_view(), 1, [None, view, pa.py_buffer(b"x" * 20)])


def _large_dictionary() -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int16()), pa.array(["x" * 500_000]))


def _wrong_codes() -> bytes:
    """A dictionary whose code points behind its end."""
    content = stream(
        arrow(job=pa.DictionaryArray.from_arrays(pa.array([0x11223344], pa.int32()), pa.array(["x"]), safe=False))
    )
    assert 0x11223344.to_bytes(4, "little") in content
    return content


def _thousand(job: pa.Array) -> pa.Table:
    whole = pa.concat_tables([arrow()] * 1000).combine_chunks()
    return whole.set_column(1, "job", job)


BAD_ARROW: list[tuple[str, Any, tuple[int, ...]]] = [
    ("nothing", lambda: b"", (400,)),
    ("junk", lambda: b"\xff\xff\xff\xff" + b"\x7f" * 200, (400,)),
    ("JSON", row, (400,)),
    ("cut short", lambda: stream(arrow())[:-40], (400,)),
    ("only a schema's half", lambda: stream(arrow())[:60], (400,)),
    ("bad UTF-8", lambda: stream(arrow(job=_bad_text())), (400,)),
    ("huge offsets", _huge_offsets, (400,)),
    ("wrong codes", _wrong_codes, (400,)),
    ("a missing column", lambda: stream(arrow(age=None)), (422,)),
    ("an unknown column", lambda: stream(arrow(salary=pa.array([1]))), (422,)),
    ("a column twice", lambda: stream(arrow().append_column("age", pa.array([2.0]))), (422,)),
    ("no column", lambda: stream(pa.table({})), (422,)),
    ("a struct", lambda: stream(arrow(age=pa.array([{"a": 1}]))), (422,)),
    ("nested lists", lambda: stream(arrow(code=pa.array([[[1.0], [2.0], [3.0]]]))), (422,)),
    ("a union", lambda: stream(arrow(age=pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])]))), (422,)),
    ("views", lambda: stream(arrow(job=_views())), (422,)),
    ("a date", lambda: stream(arrow(age=pa.array([1], pa.date32()))), (422,)),
    ("text for a number", lambda: stream(arrow(age=pa.array(["old"]))), (422,)),
    ("a fraction for a text", lambda: stream(arrow(job=pa.array([1.5]))), (422,)),
    ("infinity", lambda: stream(arrow(age=pa.array([float("inf")]))), (422,)),
    ("a short vector", lambda: stream(arrow(code=pa.array([[1.0, 2.0]]))), (422,)),
    ("a dictionary of lists", lambda: stream(arrow(code=pa.DictionaryArray.from_arrays([0], pa.array([[1, 2, 3]])))), (422,)),
    ("compressed buffers", lambda: stream(arrow(job=pa.array(["x" * 1000])), compression="zstd"), (422,)),
    ("a compressed dictionary", lambda: stream(arrow(job=pa.array(["x" * 1000]).dictionary_encode()), compression="lz4"), (422,)),
    ("too many rows", lambda: stream(pa.concat_tables([arrow()] * 1001)), (413,)),
    ("too many bytes", lambda: stream(arrow(job=pa.array(["x" * 2**20]))), (413,)),
    ("a dictionary that unpacks to more", lambda: stream(_thousand(_large_dictionary())), (413,)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "statuses"), [case[1:] for case in BAD_ARROW], ids=[case[0].replace(" ", "-") for case in BAD_ARROW]
)
def test_bad_arrow_is_refused(client: httpx.Client, body: Any, statuses: tuple[int, ...]) -> None:
    assert_refused(client.post("/predict", content=body(), headers={"content-type": ARROW}), *statuses)


def test_the_good_table_of_the_bad_ones_is_answered(client: httpx.Client) -> None:
    assert client.post("/predict", content=stream(arrow()), headers={"content-type": ARROW}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/deletions/del-0123456789abcdef",
        "/deletions/../../x",
        "/deletions/%2e%2e",
        "/deletions/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/deletions/%00",
        "/deletions/del-%00",
        "/deletions/%ff%fe",
        "/deletions/" + "x" * 5000,
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "/page/..%2f..%2fapp.py",
        "/v2/models/other",
        "/v2/models/%2e%2e",
        f"/v2/models/{NAME}/versions/99",
        f"/v2/models/{NAME}/versions/x",
        f"/v2/models/{NAME}/versions/99/ready",
        f"/v2/models/{NAME}/config",
        "/nothing",
        "//",
        "/predict/",
    ],
)
def test_what_is_not_there_is_404(client: httpx.Client, path: str) -> None:
    request = client.build_request("GET", "/")
    request.url = request.url.copy_with(raw_path=path.encode())
    assert_refused(client.send(request), 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/predict", "POST"),
        ("PUT", "/deletions", "GET, POST"),
        ("DELETE", "/deletions/del-0", "GET"),
        ("POST", "/state", "GET"),
        ("PATCH", f"/v2/models/{NAME}/infer", "POST"),
        ("TRACE", "/livez", "GET, HEAD"),
    ],
)
def test_another_method_is_405_and_names_the_right_ones(
    client: httpx.Client, method: str, path: str, allowed: str
) -> None:
    answer = client.request(method, path)
    assert_refused(answer, 405)
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/octet-stream", "x"])
def test_another_content_type_is_415(client: httpx.Client, kind: str) -> None:
    for path in ("/predict", "/deletions", f"/v2/models/{NAME}/infer"):
        assert_refused(client.post(path, content=row(), headers={"content-type": kind}), 415)


def test_a_long_idempotency_key_is_refused(client: httpx.Client) -> None:
    assert_refused(client.post("/deletions", content=ids(PEOPLE[0]), headers={"idempotency-key": "k" * 256}), 422)


def test_a_body_in_chunks_is_counted(client: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"rows": "'
        for _ in range(40):
            yield b"x" * 2**16

    try:
        answer = client.post("/predict", content=chunks(), headers={"content-type": JSON})
    except httpx.TransportError:  # refused, and the connection closed, while it was still being sent
        assert client.get("/livez").status_code == 200
    else:
        assert_refused(answer, 413)


def test_refusals_changed_nothing(client: httpx.Client) -> None:
    """Runs behind the bad requests: those that named PEOPLE[0] must not have deleted them."""
    known = client.post("/deletions", json={"subjects": [PEOPLE[0]]}).json()
    assert known["repeated"] is False
    repaired(client, known["request"])


# --- TLS, the end, and the log --------------------------------------------------------------------


def test_https(mixed_store: Path, tmp_path: Path) -> None:
    options, trust = serving_kit.certificate(tmp_path)
    with serving(mixed_store, tmp_path, *options, verify=trust) as secure:
        assert secure.address.startswith("https://")
        assert secure.client(verify=trust).get("/state").status_code == 200


def test_a_server_ends_as_asked(mixed_store: Path, tmp_path: Path) -> None:
    """It lets a request that runs end, takes itself off the ledger, and calls that a success."""
    with serving(mixed_store, tmp_path) as ending:
        asking = ending.client()
        with ledger(ending.store) as opened:
            assert len(opened.replicas.all()) == 1
        answers: list[httpx.Response] = []
        halves = [json.dumps({"rows": [ROW]}).encode()[:20], json.dumps({"rows": [ROW]}).encode()[20:]]
        told = threading.Event()

        def slowly() -> Iterator[bytes]:
            yield halves[0]
            told.wait()
            time.sleep(0.3)
            yield halves[1]

        sending = threading.Thread(
            target=lambda: answers.append(asking.post("/predict", content=slowly(), headers={"content-type": JSON}))
        )
        sending.start()
        time.sleep(0.3)
        ending.process.send_signal(signal.SIGTERM)
        told.set()
        sending.join()
        assert ending.process.wait(serving_kit.PATIENCE_S) == 0
        assert answers[0].status_code == 200
        with ledger(ending.store) as opened:
            assert opened.replicas.all() == []
        assert '"exception"' not in ending.stderr()
        assert '"level": "error"' not in ending.stderr()


def test_ctrl_c_is_an_end_as_asked(binary_store: Path, tmp_path: Path) -> None:
    with serving(binary_store, tmp_path) as ending:
        ending.process.send_signal(signal.SIGINT)
        assert ending.process.wait(serving_kit.PATIENCE_S) == 0


def test_deletions_are_listed_in_pages(client: httpx.Client) -> None:
    whole = client.get("/deletions").json()
    assert whole["next"] is None
    ids = [each["request"] for each in whole["deletions"]]
    assert len(ids) >= 2
    seen, after = [], None
    for _ in ids:
        page = client.get("/deletions", params={"limit": "1"} | ({"after": after} if after else {})).json()
        seen += [each["request"] for each in page["deletions"]]
        after = page["next"]
    assert (seen, after) == (ids, None)
    assert client.get("/deletions", params={"after": ids[-1]}).json() == {"deletions": [], "next": None}


@pytest.mark.parametrize(
    "asked", ["limit=0", "limit=1001", "limit=-1", "limit=ten", "limit=", "limit=%C2%B2", "after=del-0", "after="]
)
def test_a_page_that_cannot_be_is_refused(client: httpx.Client, asked: str) -> None:
    answer = client.get(f"/deletions?{asked}")
    assert answer.status_code == 422
    assert answer.json()["error"]["message"].startswith(asked.partition("=")[0])


def test_the_log_says_nothing_of_what_was_asked(server: Server, client: httpx.Client) -> None:
    """Runs last: after everything above, no id, no value and no token is in what the server wrote."""
    client.post("/predict", content=row(job="marker-job", age=4242.4242))
    client.post("/predict", content=row(age="marker-age"))
    client.post("/deletions", json={"subjects": ["marker-id"], "reason": "marker-reason"})
    client.get("/deletions/marker-path?x=marker-query")
    client.get("/marker-route")
    client.post("/deletions", content=b"{marker-json")
    before = server.stderr().count('"status": 401')
    client.get("/state", headers={"authorization": "Bearer marker-token"})
    wait_for(lambda: server.stderr().count('"status": 401') > before, what=lambda: "the last request is logged")
    log = server.stderr()
    words = (
        "marker",
        "4242.4242",
        "baker",
        "rson-",
        "stranger",
        "4711",
        "sisa_",
        "DROP",
        "0f8fad5b",
        "passwd",
        "Traceback",
    )
    assert [word for word in words if word in log] == []
    lines = [json.loads(line) for line in log.splitlines() if not line.startswith("serving ")]
    assert not [line for line in lines if line.get("level") == "error" or "exception" in line]
    known = {200, 202, 304, 400, 401, 403, 404, 405, 413, 415, 422}
    assert {line["status"] for line in lines if line.get("route", "/readyz") != "/readyz"} <= known
