"""Compare a stage's checkpoint with ``torch.save``/``torch.load`` of the same tensors, in one run.

Both sides are durable (file and folder are synced) and checked (one SHA-256 over the bytes, on write and on
read). The two take turns, and medians are compared; reads come from the page cache on both sides.

    python benchmarks/checkpoints.py [--parameters N]... [--repeats N] [--json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _machine import describe

from sisa.checkpoints import CheckpointStore, StageId
from sisa.files import fsync_path, remove
from sisa.state import StageState

SIZES = (77_186, 11_000_000, 100_000_000)
LARGEST_TENSOR = 4_000_000


def make_tensors(parameters: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Cut that many float32 parameters into layers, small ones among them."""
    sizes, left = [], parameters
    while left:
        for size in (LARGEST_TENSOR, LARGEST_TENSOR // 8, 512):
            sizes.append(min(size, left))
            left -= sizes[-1]
            if not left:
                break
    return {f"model.{number}.weight": generator.standard_normal(n, np.float32) for number, n in enumerate(sizes)}


def hashed(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the bytes of all tensors."""
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def torch_write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write with torch, durably, and hash."""
    torch.save(tensors, path)
    fsync_path(path)
    fsync_path(path.parent)
    hashed(tensors)


def torch_read(path: Path) -> None:
    """Read with torch and hash."""
    hashed(torch.load(path, weights_only=True))


def stage_write(store: CheckpointStore, stage_id: StageId, state: StageState) -> None:
    """Write a stage."""
    store.write(
        stage_id, state, parent_key="", records=0, seconds=0.0, worker="", fingerprint={}, epochs=1, steps=1
    )  # fmt: skip


def timed_ms(work: Callable[[], object]) -> float:
    """Return how long ``work`` takes."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def measure(parameters: int, repeats: int, folder: Path) -> dict[str, float | int]:
    """Return medians in milliseconds and their ratios."""
    arrays = make_tensors(parameters, np.random.default_rng(parameters))
    state, tensors = StageState(arrays), {name: torch.from_numpy(array) for name, array in arrays.items()}
    store, stage_id = (
        CheckpointStore(folder / "checkpoints"),
        StageId(shard=0, stage=1, key="0" * 64, platform="0" * 12),
    )
    path = folder / "state.pt"
    times: dict[str, list[float]] = {"torch_write": [], "write": [], "torch_read": [], "read": []}
    for _ in range(repeats + 1):
        times["torch_write"].append(timed_ms(lambda: torch_write(path, tensors)))
        times["write"].append(timed_ms(lambda: stage_write(store, stage_id, state)))
        times["torch_read"].append(timed_ms(lambda: torch_read(path)))
        times["read"].append(timed_ms(lambda: store.load(stage_id)))
        files = sum(child.is_file() for child in store.path(stage_id).rglob("*"))
        store.remove(stage_id)
        path.unlink()
    remove(folder / "checkpoints")
    # The first round pays for imports and for Zarr's event loop.
    medians = {f"{name}_ms": round(statistics.median(values[1:]), 2) for name, values in times.items()}
    return {
        "parameters": parameters,
        "files": files,
        **medians,
        "write_ratio": round(medians["write_ms"] / medians["torch_write_ms"], 2),
        "read_ratio": round(medians["read_ms"] / medians["torch_read_ms"], 2),
    }


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, action="append", help="float32 parameters; may be repeated")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        results = [measure(size, options.repeats, Path(name)) for size in options.parameters or SIZES]
    if options.json:
        print(json.dumps({"machine": describe(), "repeats": options.repeats, "results": results}))
        return 0
    print(", ".join(f"{name} {value}" for name, value in describe().items()))
    print(f"{'parameters':>12} {'files':>5} {'write ms':>9} {'x torch':>8} {'read ms':>9} {'x torch':>8}")
    for row in results:
        print(
            f"{row['parameters']:>12,} {row['files']:>5} {row['write_ms']:>9.1f} {row['write_ratio']:>8.2f}"
            f" {row['read_ms']:>9.1f} {row['read_ratio']:>8.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
