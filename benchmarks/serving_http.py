"""What the HTTP API costs: requests per second against an empty FastAPI route, and how soon a deletion is acknowledged.

**Requests**: a real server of a small store, asked for one row by connections that are kept alive, with a token. Beside
it a FastAPI route that does nothing, on the same server software, with the same body: once declared as FastAPI's users
declare it (``body: dict``), once taking the bare request. They run in turn, several times; medians are compared.

**Acknowledgement**: from the call to ``accept`` to its return, while a replica in this process answers; and once with a
replica that is dead, which costs one lease.

    python benchmarks/serving_http.py [--seconds N] [--rounds N] [--deletions N] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _machine
import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq

import sisa
from sisa.deletion.accept import accept
from sisa.layout import Layout
from sisa.serving.replica import Replica, wait_until_serving

PEOPLE = 2_000
CONNECTIONS = (8, 50)
HTTP_TARGET = 0.7
ACK_TARGET_MS = 100.0
EMPTY = """
import sys
from typing import Any
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response

app = FastAPI(openapi_url=None)

@app.post("/declared")
async def declared(body: dict[str, Any]) -> dict[str, Any]:
    return {}

@app.post("/bare")
async def bare(request: Request) -> Response:
    await request.body()
    return Response("{}", media_type="application/json")

config = uvicorn.Config(app, port=0, log_level="info", access_log=False, ws="none")
uvicorn.Server(config).run()
"""


def make_store(folder: Path) -> sisa.Store:
    """Train an ensemble of 20 small models on made-up people."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, PEOPLE)
    table = {
        "person": [f"p{i}" for i in range(PEOPLE)],
        "age": rng.integers(18, 90, PEOPLE).astype(float),
        "hours": rng.normal(38, 8, PEOPLE) + 4 * labels,
        "education": rng.integers(1, 16, PEOPLE).astype(float) + labels,
        "occupation": rng.choice(["clerk", "sales", "craft", "farming"], PEOPLE),
        "sex": rng.choice(["female", "male"], PEOPLE),
        "income": np.where(labels, ">50K", "<=50K"),
    }
    papq.write_table(pa.table(table), folder / "people.parquet")
    recipe = {
        "data": {
            "source": str(folder / "people.parquet"),
            "record_id": "person",
            "label": "income",
            "classes": ["<=50K", ">50K"],
            "features": ["age", "hours", "education", "occupation", "sex"],
        },
        "model": {"name": "mlp", "hidden": [64], "activation": "tanh"},
        "training": {"epochs": 3, "batch_size": 32, "optimizer": {"name": "sgd", "lr": 0.05}, "seed": 1},
        "sisa": {"shards": 20, "slices": 2},
    }
    return sisa.train(recipe, store=folder / "store", executor="inline")


ROW = {"age": 41, "hours": 40.5, "education": 11, "occupation": "clerk", "sex": "female"}


@contextlib.contextmanager
def running(*words: str) -> Iterator[int]:
    """Run a server until its port is known, and stop it by its own id afterwards."""
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            if found:
                break
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        yield int(found.group(1)) if found else 0
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        drain.wait(10)


def request_bytes(path: str, body: bytes, token: str) -> bytes:
    """One HTTP request."""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {token}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def hammer(port: int, content: bytes, *, connections: int, seconds: float) -> float:
    """Ask over several connections for a while; return answers per second."""
    ends = time.perf_counter() + seconds

    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        count = 0
        while time.perf_counter() < ends:
            writer.write(content)
            head = await reader.readuntil(b"\r\n\r\n")
            assert b" 200 " in head.split(b"\r\n", 1)[0] + b" ", head
            length = int(re.search(rb"content-length: (\d+)", head.lower()).group(1))  # type: ignore[union-attr]
            await reader.readexactly(length)
            count += 1
        writer.close()
        return count

    started = time.perf_counter()
    counts = await asyncio.gather(*(one() for _ in range(connections)))
    return sum(counts) / (time.perf_counter() - started)


def requests_per_second(store: sisa.Store, *, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Compare the API with empty routes, for each number of connections."""
    token, _ = store.opened.ledger.tokens.create(["predict"])
    body = json.dumps({"rows": [ROW]}).encode()
    root = str(store.opened.layout.root)
    with (
        running(sys.executable, "-m", "sisa", "serve", "--store", root, "--port", "0", "--no-repair") as ours,
        running(sys.executable, "-c", EMPTY) as empty,
    ):
        time.sleep(2)  # both have started
        asked = (("sisa", ours, "/predict"), ("declared", empty, "/declared"), ("bare", empty, "/bare"))
        contents = [(name, port, request_bytes(path, body, token)) for name, port, path in asked]
        return [compared(contents, connections=n, seconds=seconds, rounds=rounds) for n in CONNECTIONS]


def compared(
    contents: list[tuple[str, int, bytes]], *, connections: int, seconds: float, rounds: int
) -> dict[str, Any]:
    """Ask the servers in turn, and compare the medians; the first round warms up."""
    rates: dict[str, list[float]] = {name: [] for name, _, _ in contents}
    for _ in range(rounds + 1):
        for name, port, content in contents:
            rates[name].append(asyncio.run(hammer(port, content, connections=connections, seconds=seconds)))
    medians = {name: round(statistics.median(values[1:]), 1) for name, values in rates.items()}
    return {
        "connections": connections,
        **medians,
        "ratio_to_declared": round(medians["sisa"] / medians["declared"], 3),
        "ratio_to_bare": round(medians["sisa"] / medians["bare"], 3),
        "target": HTTP_TARGET,
    }


def acknowledgements(store: sisa.Store, *, deletions: int) -> dict[str, Any]:
    """Time acceptances while a replica answers, and one with a dead replica."""
    layout = Layout.at(store.opened.layout.root)
    replica = Replica(layout)
    replica.start()
    wait_until_serving(replica, timeout_s=30)
    times_ms = []
    for number in range(deletions):
        started = time.perf_counter()
        accept(store.opened, subjects=[f"p{number}"])
        times_ms.append((time.perf_counter() - started) * 1e3)
    replica.stop()
    store.opened.ledger.replicas.register("dead", lease_s=replica.lease_s)
    started = time.perf_counter()
    accept(store.opened, subjects=[f"p{deletions}"])
    dead_s = time.perf_counter() - started
    ordered = sorted(times_ms)
    return {
        "deletions": deletions,
        "p50_ms": round(statistics.median(ordered), 1),
        "p99_ms": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 1),
        "target_ms": ACK_TARGET_MS,
        "dead_replica_s": round(dead_s, 2),
        "lease_s": replica.lease_s,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--deletions", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ["PYTHONUNBUFFERED"] = "1"
    with tempfile.TemporaryDirectory() as name:
        store = make_store(Path(name))
        asked = requests_per_second(store, seconds=options.seconds, rounds=options.rounds)
        acked = acknowledgements(store, deletions=options.deletions)
        store.close()
    if options.json:
        found = {"machine": _machine.describe(), "requests": asked, "acknowledgements": acked}
        print(json.dumps({"benchmark": "serving_http", **found}))
        return
    print("Requests per second, one row, 20 constituents, with a token and an access log\n")
    print("  connections  POST /predict  empty route, body: dict  ratio (wanted: 0.70)  empty route, bare  ratio")
    for row in asked:
        print(
            f"  {row['connections']:>11}  {row['sisa']:>13.0f}  {row['declared']:>23.0f}  {row['ratio_to_declared']:>20.2f}"
            f"  {row['bare']:>17.0f}  {row['ratio_to_bare']:>5.2f}"
        )
    print(
        f"\nAcknowledgement of {acked['deletions']} deletions: p50 {acked['p50_ms']} ms, p99 {acked['p99_ms']} ms (wanted: 100 ms)"
    )
    print(f"with a dead replica: {acked['dead_replica_s']} s (lease {acked['lease_s']} s)\n\n{_machine.one_line()}")


if __name__ == "__main__":
    main()
