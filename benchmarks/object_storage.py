"""Compare a stage's checkpoint in object storage with a plain multipart put and get of the same bytes, in one run.

A server of S3's protocol is started on loopback in a process of its own (moto, which keeps everything in memory),
unless AWS_ENDPOINT_URL names one; then give ``--bucket`` too. The plain way uses the same library with the same size of
parts and neither hashes nor verifies. The stage's way packs, checksums each chunk, digests the whole, and verifies all
of it on reading. The two take turns, and medians are compared.

    python benchmarks/object_storage.py [--megabytes N]... [--repeats N] [--bucket NAME] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import obstore
from _machine import describe

from sisa.checkpoints import StageId, checkpoints_at
from sisa.state import StageState
from sisa.storage import object_storage_at
from sisa.storage.objects import PART_BYTES

SIZES_MB = (16, 94, 376)
STAGE = StageId(shard=0, stage=1, key="0" * 64, platform="0" * 12)


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Start a server and make a bucket; yield its name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        object_storage_at("s3://benchmark/store").client.create_bucket(Bucket="benchmark")
        yield "benchmark"
    finally:
        process.terminate()
        process.wait()


def timed_ms(work: Callable[[], object]) -> float:
    """Return how long ``work`` takes."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def measure(megabytes: int, repeats: int, bucket: str) -> dict[str, float | int]:
    """Return medians in milliseconds and ratios of throughput."""
    count = megabytes * 10**6 // 4
    generator = np.random.default_rng(megabytes)
    state = StageState({f"model.{n}.weight": generator.standard_normal(count // 8, np.float32) for n in range(8)})
    plain = b"".join(tensor.tobytes() for tensor in state.tensors.values())
    uri = f"s3://{bucket}/store"
    storage, store = object_storage_at(uri), checkpoints_at(uri, "checkpoints")

    def write() -> None:
        store.write(STAGE, state, parent_key="", records=0, seconds=0.0, worker="", fingerprint={})

    def put() -> None:
        obstore.put(storage.objects, "plain", plain, chunk_size=PART_BYTES, max_concurrency=16)

    times: dict[str, list[float]] = {"put": [], "write": [], "get": [], "read": []}
    for _ in range(repeats + 1):
        times["put"].append(timed_ms(put))
        times["write"].append(timed_ms(write))
        times["get"].append(timed_ms(lambda: obstore.get(storage.objects, "plain").bytes()))
        times["read"].append(timed_ms(lambda: store.load(STAGE)))
        store.remove(STAGE)
        storage.remove("plain")
    # The first round pays for imports, for connections and for Zarr's event loop.
    medians = {f"{name}_ms": round(statistics.median(values[1:]), 1) for name, values in times.items()}
    return {
        "megabytes": megabytes,
        **medians,
        "write_share": round(medians["put_ms"] / medians["write_ms"], 2),
        "read_share": round(medians["get_ms"] / medians["read_ms"], 2),
    }


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, action="append", help="size of the state; may be repeated")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bucket", help="a bucket of the server that AWS_ENDPOINT_URL names")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with contextlib.nullcontext(options.bucket) if options.bucket else server() as bucket:
        results = [measure(size, options.repeats, bucket) for size in options.megabytes or SIZES_MB]
    if options.json:
        print(json.dumps({"machine": describe(), "repeats": options.repeats, "results": results}))
        return 0
    print(", ".join(f"{name} {value}" for name, value in describe().items()))
    print(f"{'MB':>6} {'put ms':>9} {'write ms':>9} {'share':>6} {'get ms':>9} {'read ms':>9} {'share':>6}")
    for row in results:
        print(
            f"{row['megabytes']:>6} {row['put_ms']:>9.1f} {row['write_ms']:>9.1f} {row['write_share']:>6.2f}"
            f" {row['get_ms']:>9.1f} {row['read_ms']:>9.1f} {row['read_share']:>6.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
