"""The aggregator as a stranger meets it: ``sisa serve`` in a process of its own, asked over HTTP.

Stores are trained once for a module and copied for each server, so that no test sees another's deletions. A module
takes the fixtures by name: ``mixed_store = serving_kit.mixed_store``.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq
import pytest
import store_kit
import tables

import sisa
from sisa.ledger import Ledger

ROOT = Path(__file__).resolve().parent.parent
ARROW = "application/vnd.apache.arrow.stream"
PATIENCE_S = 120.0
"""How long a test waits for a server: a loaded machine is slow, a broken server is slow for ever."""
ALL_SCOPES = ("predict", "delete", "read")
NAME = "shop"
"""What the store's folder, and so the model, is called."""


class Server:
    """One ``sisa serve``, from its start until its process has ended."""

    def __init__(self, store: Path, *options: str) -> None:
        self.store = store
        self.err = store.parent / "stderr.txt"
        command = [sys.executable, "-m", "sisa", "serve", "--store", str(store), "--port", "0", *options]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        with self.err.open("wb") as err:
            self.process = subprocess.Popen(command, stderr=err, stdin=subprocess.DEVNULL, env=environment)
        self.address = self._address()
        self._clients: list[httpx.Client] = []

    def _address(self) -> str:
        return wait_for(self._told_address, what=lambda: f"the server says where it is:\n{self.stderr()}").group(1)

    def _told_address(self) -> re.Match[str] | None:
        if self.process.poll() is not None:
            pytest.fail(f"the server ended with {self.process.returncode}:\n{self.stderr()}")
        return re.search(r"^serving (https?://\S+)$", self.stderr(), re.MULTILINE)

    def stderr(self) -> str:
        """All that the server wrote so far."""
        return self.err.read_text(errors="replace")

    def token(self, *scopes: str) -> str:
        """Make a token with the library."""
        with ledger(self.store) as opened:
            return opened.tokens.create(scopes or ALL_SCOPES)[0]

    def client(self, *scopes: str, token: str | None = None, **options: Any) -> httpx.Client:
        """A client with a token for these scopes, or for everything that a test needs; ``token=""`` for none."""
        text = self.token(*scopes) if token is None else token
        headers = {"authorization": f"Bearer {text}"} if text else {}
        made = httpx.Client(base_url=self.address, headers=headers, timeout=PATIENCE_S, trust_env=False, **options)
        self._clients.append(made)
        return made

    def wait_ready(self, **options: Any) -> None:
        """Wait until predictions are answered."""
        with httpx.Client(base_url=self.address, timeout=PATIENCE_S, trust_env=False, **options) as asking:
            wait_for(
                lambda: asking.get("/readyz").status_code == 200,
                what=lambda: f"it is ready: {asking.get('/readyz').text}",
            )

    def stop(self) -> int:
        """Ask the process to end, and return its exit code."""
        for client in self._clients:
            client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@contextmanager
def serving(template: Path, folder: Path, *options: str, ready: bool = True, **ask: Any) -> Iterator[Server]:
    """Copy a store and serve the copy."""
    store = folder / NAME
    shutil.copytree(template, store)
    server = Server(store, *options)
    try:
        if ready:
            server.wait_ready(**ask)
        yield server
    finally:
        server.stop()


def certificate(folder: Path) -> tuple[tuple[str, ...], ssl.SSLContext]:
    """Make a certificate for loopback: the options that serve with it, and what a client needs to trust it."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command to make a certificate with")
    made, key = folder / "cert.pem", folder / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, *names, "-keyout", key, "-out", made], check=True, capture_output=True)
    options = ("--tls-certificate", str(made), "--tls-key", str(key))
    return options, ssl.create_default_context(cafile=str(made))


@contextmanager
def ledger(store: Path) -> Iterator[Ledger]:
    """The ledger of a store, for as long as it takes."""
    opened = Ledger.open(store / "ledger.db")
    try:
        yield opened
    finally:
        opened.close()


def wait_for(found: Callable[[], Any], *, what: Callable[[], str]) -> Any:
    """Ask until the answer is true; fail the test if it never is."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not (answer := found()):
        if time.monotonic() > deadline_s:
            pytest.fail(f"it never happened that {what()}")
        time.sleep(0.02)
    return answer


# --- Stores ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Numbers, categories and a vector, with people of several records."""
    return _trained(tmp_path_factory, tables.mixed_recipe(training={"epochs": 2}), tables.mixed())


@pytest.fixture(scope="module")
def binary_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vector of bits; classes are integers, and a person is a record."""
    return _trained(tmp_path_factory, tables.binary_recipe(training={"epochs": 2}), tables.binary())


@pytest.fixture(scope="module")
def holdout_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like the mixed one, but a third of the people are held out, and measured on."""
    recipe = tables.mixed_recipe(training={"epochs": 2})
    recipe["data"]["holdout"] = {"fraction": 0.33}
    return _trained(tmp_path_factory, recipe, tables.mixed(90))


def trained_subject(store: Path, *, slice_: int = 1) -> str:
    """Somebody whose rows were trained on."""
    path = min(store.glob(f"records/shard=*/slice={slice_:02d}/*.parquet"))
    return str(papq.read_table(path, partitioning=None)["_sisa_subject"][0].as_py())


def _trained(factory: pytest.TempPathFactory, recipe: dict[str, Any], table: pa.Table) -> Path:
    store = store_kit.train(factory.mktemp("template"), recipe, table, name=NAME)
    store.opened.ledger.close()
    return Path(store.opened.layout.root)


# --- Rows -----------------------------------------------------------------------------------------


def features(store: Path, table: pa.Table) -> pa.Table:
    """The columns of a table that a store's model is asked about."""
    return table.select(list(sisa.open_store(store).opened.recipe.data.features))


def expected(store: Path, rows: pa.Table) -> tuple[list[Any], Any]:
    """Labels and (B, C) scores as the library answers them, in this process."""
    opened = sisa.open_store(store)
    classes = opened.opened.classes
    scores_BC = opened.predict_proba(rows)
    return [classes[index] for index in np.argmax(scores_BC, axis=1)], scores_BC


def stream(table: pa.Table, **options: Any) -> bytes:
    """A table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())
