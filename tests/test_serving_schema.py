"""What ``/openapi.json`` says and what the server does are held against each other, by requests that nobody thought of.

Schemathesis makes requests from the description (right ones, wrong ones, borderline ones) and holds every answer
against it. It runs in a process of its own, with all its checks.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import serving_kit
import tables
from serving_kit import NAME, Server, serving

mixed_store = serving_kit.mixed_store

CONFIG = """
[auth.openapi.token]
bearer = "${{SISA_TOKEN}}"

[generation]
deterministic = true
# What the parser of HTTP itself refuses never reaches the application.
exclude-header-characters = "{controls}"

# An id that is made up is of nobody.
[[operations]]
include-name = "POST /deletions"
checks.positive_data_acceptance.expected-statuses = ["202", "404"]

# That data fill their shape, and that no tensor comes twice, is more than a schema can say.
[[operations]]
include-path-regex = "/infer$"
checks.positive_data_acceptance.expected-statuses = ["200", "422"]
# The live version; another one is tried elsewhere.
parameters = {{ version = "{version}" }}

[[operations]]
include-path-regex = "versions/[^/]*(/ready)?$"
parameters = {{ version = "{version}" }}

[[operations]]
include-path = "/deletions/{{request_id}}"
parameters = {{ request_id = "{request}" }}

[[operations]]
include-path = "/deletions"
parameters = {{ after = "{request}" }}
"""
HOOKS = """
import itertools

import schemathesis
from hypothesis import strategies as st

TABLE = bytes.fromhex("{table}")


@schemathesis.serializer("{media}")
def as_it_is(context, value):
    return value


schemathesis.openapi.media_type("{media}", st.just(TABLE))
count = itertools.count()


@schemathesis.hook
def before_call(context, case, kwargs):
    # A key stands for one body: each request has one of its own.
    key = (case.headers or {{}}).get("Idempotency-Key")
    if isinstance(key, str):
        stamp = f"-{{next(count)}}"
        case.headers["Idempotency-Key"] = (key if len(key) < 200 else key[: -len(stamp)]) + stamp
"""


@pytest.fixture(scope="module")
def server(mixed_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(mixed_store, tmp_path_factory.mktemp("served"), "--no-repair") as started:
        yield started


def test_the_server_does_what_its_description_says(server: Server, tmp_path: Path) -> None:
    controls = "".join(f"\\u{code:04x}" for code in [*range(9), *range(10, 32), 127])
    with server.client() as asking:
        receipt = asking.post("/deletions", json={"subjects": ["p\u00e9rson-003"], "regime": "gdpr"}).json()
        known = {"request": receipt["request"], "version": asking.get("/readyz").json()["version"]}
    (tmp_path / "schemathesis.toml").write_text(CONFIG.format(controls=controls, **known))
    table = serving_kit.stream(serving_kit.features(server.store, tables.mixed()).slice(0, 2))
    (tmp_path / "hooks.py").write_text(HOOKS.format(media=serving_kit.ARROW, table=table.hex()))
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml", "run"]
    environment = {
        **os.environ,
        "SISA_TOKEN": server.token(),
        "SCHEMATHESIS_HOOKS": "hooks",
        "PYTHONPATH": str(tmp_path),
        "NO_COLOR": "1",
    }
    done = subprocess.run(
        [*command, f"{server.address}/openapi.json", "--max-examples", "25", "--checks", "all", "--request-timeout", "60"],
        capture_output=True, text=True, check=False, timeout=600, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-20_000:]
    assert re.search(r"Coverage.*Fuzzing", done.stdout, re.DOTALL), done.stdout
    log = server.stderr()
    assert '"status": 500' not in log
    assert '"exception"' not in log


def test_the_description_names_every_route(server: Server) -> None:
    with httpx.Client(base_url=server.address, trust_env=False) as asking:
        paths = set(asking.get("/openapi.json").json()["paths"])
    model = f"/v2/models/{NAME}"
    assert paths == {
        "/predict", "/deletions", "/deletions/{request_id}", "/state", "/metrics", "/openapi.json", "/livez", "/readyz",
        "/v2", "/v2/health/live", "/v2/health/ready", model, f"{model}/ready", f"{model}/infer",
        f"{model}/versions/{{version}}", f"{model}/versions/{{version}}/ready", f"{model}/versions/{{version}}/infer",
    }  # fmt: skip


def test_the_description_knows_the_columns_and_classes(server: Server) -> None:
    with httpx.Client(base_url=server.address, trust_env=False) as asking:
        schemas = asking.get("/openapi.json").json()["components"]["schemas"]
    row = schemas["Rows"]["properties"]["rows"]["items"]
    assert row["required"] == ["age", "job", "hours", "code", "grade"]
    assert row["additionalProperties"] is False
    assert row["properties"]["code"]["minItems"] == 3
    assert schemas["Prediction"]["properties"]["predictions"]["items"] == {"enum": tables.CLASSES}
