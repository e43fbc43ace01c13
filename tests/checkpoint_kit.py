"""What the tests of checkpoints share: states, and a reader that uses nothing of the code under test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from sisa.checkpoints import CheckpointStore, Manifest, StageId
from sisa.state import StageState

STAGE = StageId(shard=3, stage=2, key="ab" * 32, platform="0123456789ab")


def make_state(seed: int = 0) -> StageState:
    rng = np.random.default_rng(seed)
    return StageState(
        {
            "model.0.weight": rng.standard_normal((13, 7)).astype(np.float32),
            "model.0.bias": np.zeros(13, np.float32),
            "buffer.1.num_batches_tracked": np.array(7, np.int64),
            "preprocess.mean": np.array([0.1, -0.0, np.nan]),
            "optimizer.0.momentum": rng.standard_normal((13, 7)).astype(np.float32),
        },
        {"preprocess.vocabulary": ["a", "\u00e9"], "optimizer.0.lr": 0.05, "schedule.last_epoch": 3},
    )


def write(store: CheckpointStore, state: StageState, stage_id: StageId = STAGE, **changed: object) -> Manifest:
    described = {
        "parent_key": "cd" * 32,
        "records": 120,
        "seconds": 1.5,
        "worker": "host:7",
        "fingerprint": {"torch": "2.13.0", "threads": 1},
        "epochs": 4,
        "steps": 32,
        **changed,
    }
    return store.write(stage_id, state, **described)


def same(left: StageState, right: StageState) -> bool:
    return left.scalars == right.scalars and {
        name: (array.dtype.newbyteorder("<"), array.shape, array.astype(array.dtype.newbyteorder("<")).tobytes())
        for name, array in left.tensors.items()
    } == {name: (array.dtype, array.shape, array.tobytes()) for name, array in right.tensors.items()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def crc32c(content: bytes) -> int:
    """Castagnoli's CRC, a bit at a time: RFC 3720, appendix B.4."""
    register = 0xFFFFFFFF
    for byte in content:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def read_by_hand(folder: Path) -> StageState:
    """Read a stage as someone would who has the bytes and no library."""
    content = json.loads((folder / "zarr.json").read_text())["attributes"]["sisa"]
    row = b""
    for number in range(content["chunks"]):
        chunk = (folder / "state" / f"c.{number}").read_bytes()
        if int.from_bytes(chunk[-4:], "little") != crc32c(chunk[:-4]):
            raise ValueError(f"chunk {number}")
        row += chunk[:-4]
    tensors = {}
    for entry in content["index"]:
        dtype = np.dtype(entry["dtype"]).newbyteorder("<")
        count = int(np.prod(entry["shape"], dtype=int))
        tensors[entry["name"]] = np.frombuffer(row, dtype, count, entry["offset"]).reshape(entry["shape"])
    return StageState(tensors, content["scalars"])
