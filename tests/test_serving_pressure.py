"""A server under pressure: nobody's large, slow or silent request keeps others from being answered, or deletions out."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import serving_kit
import store_kit
import tables
from serving_kit import ARROW, Server, serving, stream, wait_for

from sisa.ensemble.stacked import Panel
from sisa.layout import Layout
from sisa.learners import flags
from sisa.learners.columns import columns_from_table
from sisa.learners.predict import BATCH_SIZE
from sisa.records.features import feature_table
from sisa.serving.app import Service, Serving
from sisa.serving.replica import wait_until_serving

mixed_store = serving_kit.mixed_store
holdout_store = serving_kit.holdout_store
WAITING = 120
ROW = {"age": 41.5, "job": "baker", "hours": 38, "code": [0.5, None, -1], "grade": 1}


@contextlib.contextmanager
def held_elsewhere() -> Iterator[None]:
    """Another thread has the flags for the length of a ``with`` block."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with flags.FLAGS:
            held.set()
            done.wait()

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    try:
        yield
    finally:
        done.set()
        other.join()


def test_who_can_not_wait_for_the_flags_is_told() -> None:
    with held_elsewhere(), pytest.raises(flags.FlagsTakenError), flags.FLAGS.without_waiting(), flags.FLAGS:
        pytest.fail("another thread has them")
    with flags.FLAGS.without_waiting(), flags.FLAGS, flags.FLAGS:
        pass  # nobody has them any more, and one thread may enter again


@pytest.fixture
def busy(mixed_store: Path) -> Iterator[Service]:
    """What a server's routes share, in this process."""
    service = Service(Serving(layout=Layout(mixed_store), repairs=False))
    service.start()
    wait_until_serving(service.replica, timeout_s=60)
    yield service
    service.stop()


def panel_of(service: Service) -> Panel:
    """The constituents that answer."""
    bound = service.replica._bound
    assert bound is not None
    assert bound.loaded.panel is not None
    return bound.loaded.panel


def test_the_event_loop_never_waits_for_a_large_batch(busy: Service) -> None:
    """What a thread evaluates holds the flags; a single row is then left to a thread, and the loop goes on."""
    columns = columns_from_table(feature_table(pa.Table.from_pylist([ROW]), busy.recipe), busy.recipe)
    panel_of(busy)._groups = []  # as for modules that can't be stacked without the flags
    assert busy.replica.answer_now(columns) is not None
    with held_elsewhere():
        assert busy.replica.answer_now(columns) is None
    assert busy.replica.answer_now(columns) is not None


@pytest.mark.parametrize("how", ["floor", "lease", "era"])
def test_an_answer_that_is_overtaken_while_it_is_computed_is_never_given(
    busy: Service, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is checked before is checked again after: a quarantine may come in between."""
    columns = columns_from_table(feature_table(pa.Table.from_pylist([ROW]), busy.recipe), busy.recipe)
    replica, panel = busy.replica, panel_of(busy)
    lease, scores = replica._lease, panel.scores
    changes = {"floor": {"floor": lease.version + 1}, "lease": {"until_s": 0.0}, "era": {"era": lease.era + 1}}
    monkeypatch.setattr(replica, "_renew", lambda _: None)  # nobody else moves the lease meanwhile

    def overtaken(*arguments: Any) -> Any:
        answer = scores(*arguments)
        replica._lease = replace(replica._lease, **changes[how])
        return answer

    replica._lease = replace(lease, until_s=math.inf)
    assert replica.answer_now(columns) is not None
    monkeypatch.setattr(panel, "scores", overtaken)
    assert replica.answer_now(columns) is None


def test_what_nobody_foresaw_is_told_without_its_words(busy: Service, caplog: pytest.LogCaptureFixture) -> None:
    told = busy.replica._told(KeyError("a person's name"), before="")
    assert told == "unexpected KeyError"
    assert "person" not in caplog.messages[-1]


def test_many_rows_have_the_bits_of_each_constituents_own(busy: Service) -> None:
    table = pa.concat_tables([tables.mixed(seed=seed) for seed in range(40)])
    columns = columns_from_table(feature_table(table.select(list(ROW)), busy.recipe), busy.recipe)
    assert columns.count > BATCH_SIZE
    panel = panel_of(busy)
    alone = np.stack([constituent.posteriors(columns) for constituent in panel.constituents])
    assert panel.posteriors(columns).tobytes() == alone.tobytes()


def test_deletions_do_not_queue_behind_predictions_that_wait(mixed_store: Path, tmp_path: Path) -> None:
    """A damaged stage lets each prediction wait for its patience; a deletion is acknowledged all the same."""
    with serving(mixed_store, tmp_path, "--no-repair") as server:
        for chunk in server.store.rglob("c.*"):
            content = bytearray(chunk.read_bytes())
            content[7] ^= 1
            chunk.write_bytes(content)
        asking = server.client()
        first = asking.post("/deletions", json={"subjects": [serving_kit.trained_subject(server.store, slice_=3)]})
        assert first.status_code == 202  # its version has to be loaded: from here on predictions wait

        token = server.token("predict")
        waiting = [threading.Thread(target=predict, args=(server, token)) for _ in range(WAITING)]
        for thread in waiting:
            thread.start()
        wait_for(lambda: open_connections(server) > WAITING * 0.9, what=lambda: "they wait")
        second = asking.post("/deletions", json={"subjects": ["nobody"], "ignore_missing": True})
        assert second.status_code == 202
        assert asking.get("/state").status_code == 200
        # Behind 40 threads that wait in turn it would come when all but 40 have been answered.
        assert sum(thread.is_alive() for thread in waiting) > WAITING / 2
        told = asking.get("/readyz").json()["reason"]
        assert "damaged" in told
        assert str(tmp_path) not in told + server.stderr()
        assert "shard-0" not in told + server.stderr()
    for thread in waiting:
        thread.join()


def predict(server: Server, token: str) -> None:
    """Ask once; the answer doesn't matter."""
    with httpx.Client(base_url=server.address, timeout=serving_kit.PATIENCE_S, trust_env=False) as client:
        headers = {"authorization": f"Bearer {token}"}
        with contextlib.suppress(httpx.HTTPError):  # the server may be stopped meanwhile
            client.post("/predict", json={"rows": [ROW]}, headers=headers)


def open_connections(server: Server) -> int:
    """How many the system counts."""
    port = f"{int(server.address.rpartition(':')[2]):04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(line[1].endswith(f":{port}") and line[3] == "01" for line in lines)


FRAGILE = """
import torch

class Fragile(torch.nn.Module):
    def __init__(self, features, classes):
        super().__init__()
        self.linear = torch.nn.Linear(features, classes)

    def forward(self, rows):
        largest = rows.abs().max()
        if largest > 1e12:
            raise KeyError(float(largest))
        scores = self.linear(rows)
        return scores * float("inf") if largest > 1e6 else scores

def make(feature_shape, classes, **_):
    return Fragile(feature_shape[0], classes)
"""


@pytest.fixture
def fragile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of a user's model that fails on large numbers, and gives none for quite large ones."""
    (tmp_path / "fragile_model.py").write_text(FRAGILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    recipe = tables.mixed_recipe(training={"epochs": 2}) | {"model": {"factory": "fragile_model:make"}}
    store = store_kit.train(tmp_path / "made", recipe, tables.mixed(), name="fragile")
    store.opened.ledger.close()
    with serving(Path(store.opened.layout.root), tmp_path) as server:
        yield server


def test_a_row_without_scores_is_refused_not_guessed(fragile: Server) -> None:
    """Neither NaN in JSON, nor the first class."""
    asking, large = fragile.client(), {**ROW, "age": 1e10}
    answer = asking.post("/predict", json={"rows": [large]})
    assert answer.status_code == 422
    assert answer.json()["error"]["message"].startswith("rows[0]: ")
    table = pa.Table.from_pylist([large])
    answer = asking.post("/predict", content=stream(table), headers={"content-type": ARROW})
    assert answer.status_code == 422
    assert answer.json()["error"]["message"].startswith("rows[0]: ")


def test_a_model_that_fails_fails_for_nobody_else(fragile: Server) -> None:
    """Requests that arrive together are evaluated together; those beside the bad one are answered."""
    token = fragile.token("predict")
    statuses: dict[int, int] = {}

    def ask(number: int) -> None:
        age = 1e30 if number == 7 else 40.0 + number
        with httpx.Client(base_url=fragile.address, timeout=serving_kit.PATIENCE_S, trust_env=False) as client:
            client.headers["authorization"] = f"Bearer {token}"
            for _ in range(10):
                told = client.post("/predict", json={"rows": [{**ROW, "age": age}]})
                statuses[number] = told.status_code
                if number == 7:
                    assert "KeyError" in told.json()["error"]["message"]
                    assert "1e+30" not in told.text

    asking = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert statuses == {number: 422 if number == 7 else 200 for number in range(12)}


# --- connections ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said", [b"", b"POST /predict HTTP/1.1\r\nhost: x\r\n", b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\nGET"]
)
def test_a_connection_that_asks_nothing_is_closed(
    said: bytes, mixed_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sisa.serving.connections as connections\nconnections.HEAD_S = 0.5\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with serving(mixed_store, tmp_path) as server:
        host, _, port = server.address.removeprefix("http://").rpartition(":")
        with socket.create_connection((host, int(port))) as silent:
            silent.settimeout(serving_kit.PATIENCE_S)
            silent.sendall(said)
            while silent.recv(65536):
                pass  # the answer to a whole request, then the end
        assert server.client().post("/predict", json={"rows": [ROW]}).status_code == 200


def test_a_connection_stays_open_between_requests_and_while_one_is_answered(
    mixed_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sisa.serving.connections as connections\nconnections.HEAD_S = 1.0\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    body = json.dumps({"rows": [ROW]}).encode()
    with serving(mixed_store, tmp_path) as server:
        asking = server.client()

        def slowly() -> Iterator[bytes]:
            yield body[:9]
            time.sleep(1.5)  # longer than a head may take
            yield body[9:]

        for _ in range(2):
            headers = {"content-type": "application/json"}
            assert asking.post("/predict", content=slowly(), headers=headers).status_code == 200
            time.sleep(0.3)


def test_a_peer_is_who_is_connected(mixed_store: Path, tmp_path: Path) -> None:
    """A header that anybody can write lifts no rate limit."""
    with serving(mixed_store, tmp_path, "--open-prediction", "--rate", "0.01") as server:
        asking = server.client(token="")
        statuses = [
            asking.post("/predict", json={"rows": [ROW]}, headers={"x-forwarded-for": f"10.0.0.{i}"}).status_code
            for i in range(4)
        ]
    assert statuses == [200, 429, 429, 429]
