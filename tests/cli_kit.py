"""The command line as a stranger uses it: a table, a recipe and words typed in a folder of one's own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq
import yaml

import sisa
from sisa.cli.main import run

ROOT = Path(__file__).resolve().parent.parent
KEY = bytes(range(100, 132))
"""The routing key of every store here: the same people go to the same places."""
CLASSES = ["<=50K", ">50K"]

NUMBER = (int, float)
DELETION = {
    "request": str, "state": str, "subjects": int, "records": int, "missing": [str], "shards": [int],
    "stages_retrained": int, "version_before": int, "version_quarantine": (int, NoneType),
    "version_after": (int, NoneType), "seconds_to_quarantine": float, "seconds": float,
}  # fmt: skip
"""Fields and types of what ``delete`` answers."""


@dataclass(frozen=True)
class Said:
    """What a command left behind."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Failure:
    """What a command that failed said."""

    message: str
    hint: str


class Cli:
    """Runs commands in this process, and holds each answer against what all answers promise."""

    def __init__(self, capsys: Any) -> None:
        self._capsys = capsys
        self.folder = Path.cwd()

    def __call__(self, *words: object) -> Said:
        """Run a command."""
        self._capsys.readouterr()
        code = run([str(word) for word in words])
        out, err = self._capsys.readouterr()
        assert "Traceback" not in out + err
        return Said(code, out, err)

    def json(self, *words: object, code: int = 0) -> dict[str, Any]:
        """Run a command with ``--json``; return the one object that stdout then is."""
        said = self(*words, "--json")
        assert said.code == code, said
        return one_object(said.out)

    def refused(self, *words: object, code: int = 2) -> Failure:
        """Run a command that must fail, without and with ``--json``; return what it says."""
        plain = self(*words)
        assert plain.code == code, plain
        assert plain.out == ""
        answer = self.json(*words, code=code)
        assert answer.keys() == {"error"}
        assert answer["error"].keys() == {"message", "hint"}
        failure = Failure(**answer["error"])
        assert f"error: {failure.message}\n" in plain.err
        assert not failure.hint or f"hint: {failure.hint}\n" in plain.err
        assert failure.message
        return failure


def one_object(text: str) -> dict[str, Any]:
    """The one JSON object that ``text`` is, and nothing else."""
    answer = json.loads(text)
    assert isinstance(answer, dict)
    assert text.count("\n") == 1
    return answer


def assert_fields(answer: dict[str, Any], fields: dict[str, Any]) -> None:
    """Each field is there and has its type; a bool is no int."""
    wrong = {name: answer.get(name, "absent") for name, kind in fields.items() if not _is(answer.get(name), kind)}
    assert not wrong
    assert not fields.keys() - answer.keys()


def _is(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and all(_is(entry, kind[0]) for entry in value)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return type(value) in kinds


def process(*words: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a process of its own."""
    return subprocess.run(command(*words), cwd=folder, env=surroundings(**environment), capture_output=True, text=True, check=False)  # fmt: skip


def command(*words: object) -> list[str]:
    """The words of a process that runs a command."""
    return [sys.executable, "-m", "sisa", *map(str, words)]


def surroundings(**more: str) -> dict[str, str]:
    """The environment of such a process."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def people(count: int = 60, *, seed: int = 4) -> pa.Table:
    """Two people a household; ids are text, features are two numbers and a category."""
    rng = np.random.default_rng(seed)
    age = rng.normal(40, 12, count)
    return pa.table(
        {
            "person": [f"p{i:03d}" for i in range(count)],
            "household": [f"h{i // 2:03d}" for i in range(count)],
            "age": age,
            "hours": rng.integers(0, 60, count),
            "job": rng.choice(["baker", "cook", "smith"], count),
            "income": [CLASSES[int(x > 40)] for x in age],
        }
    )


def recipe(**changes: Any) -> dict[str, Any]:
    """A recipe for :func:`people`; ``changes`` replace sections' fields."""
    plain: dict[str, Any] = {
        "store": "store",
        "data": {
            "source": "people.parquet",
            "record_id": "person",
            "subject_id": "household",
            "label": "income",
            "classes": CLASSES,
            "features": ["age", "hours", "job"],
            "holdout": {"fraction": 0.2},
        },
        "model": {"name": "mlp", "hidden": [4], "activation": "tanh"},
        "training": {"epochs": 2, "batch_size": 16, "optimizer": {"name": "sgd", "lr": 0.05}, "seed": 7},
        "sisa": {"shards": 3, "slices": 2},
        "routing": {"key_file": "routing.key"},
    }
    return {**plain, **{name: {**plain.get(name, {}), **fields} for name, fields in changes.items()}}


def prepare(folder: Path, table: pa.Table | None = None, **changes: Any) -> Path:
    """Write table, key and recipe; return the recipe's path."""
    folder.mkdir(exist_ok=True)
    (folder / "routing.key").write_text(KEY.hex())
    papq.write_table(people() if table is None else table, folder / "people.parquet")
    config = folder / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe(**changes), sort_keys=False))
    return config


def trained(folder: Path, table: pa.Table | None = None, **changes: Any) -> Path:
    """Prepare a folder and train in it; return the store."""
    prepare(folder, table, **changes)
    found = list(sys.path)
    with contextlib.chdir(folder):
        code = run(["train", "recipe.yaml", "--executor", "inline"])
    sys.path[:] = found
    assert code == 0
    return folder / "store"


def changed(table: pa.Table, **columns: Any) -> pa.Table:
    """The table with other values in some columns."""
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    return table


def place_of(store: Path, subject: str) -> tuple[int, int]:
    """(shard, slice) of a subject; slice 0 is the holdout."""
    opened = sisa.open_store(store)
    try:
        return opened.opened.router.route_one(subject)
    finally:
        opened.close()


def households(store: Path, *, held_out: bool) -> list[str]:
    """The subjects that are held out, or those that are trained on."""
    names = sorted(set(people()["household"].to_pylist()))
    return [name for name in names if (place_of(store, name)[1] == 0) == held_out]


def documented(verb: str) -> set[str]:
    """Names of the JSON fields that the page lists for a command."""
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    section = page.split(f"\n## sisa {verb}\n")[1].split("\n## ")[0]
    table = section.split("| JSON field | type | meaning |\n")[1].split("\n\n")[0]
    return {name for row in table.splitlines()[1:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def content(store: Path) -> dict[str, bytes]:
    """Every byte of a store but its locks, which mean nothing when no process is alive."""
    paths = (path for path in sorted(store.rglob("*")) if path.is_file())
    return {str(path): path.read_bytes() for path in paths if "locks" not in path.relative_to(store).parts}
