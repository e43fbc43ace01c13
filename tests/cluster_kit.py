"""A Ray cluster of several machines on this one: each is a raylet with workers of its own, and can be lost by itself."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

PATIENCE_S = 120.0


def wait_for(happened: Callable[[], Any], *, what: str) -> Any:
    """Wait until something is true, and return it."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := happened()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)
    return found


class Machines:
    """A head that runs nothing, and machines of one processor each; they are kept by a process of its own.

    Ray's objects for them leave pipes and processes to the garbage collector, which are errors in a test's process.
    """

    def __init__(self, count: int) -> None:
        environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.variables = {name: environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
        self.folder = Path(tempfile.mkdtemp(prefix="rc", dir="/tmp"))
        self._log = (self.folder / "keeper.log").open("w")
        words = [sys.executable, __file__, str(self.folder), str(count)]
        self._keeper = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.address = self._heard()

    def _heard(self) -> str:
        assert self._keeper.stdout is not None
        said = self._keeper.stdout.readline().strip()
        assert said, (self.folder / "keeper.log").read_text()[-2000:]
        return said

    def _told(self, word: str) -> None:
        assert self._keeper.stdin is not None
        self._keeper.stdin.write(word + "\n")
        self._keeper.stdin.flush()
        assert self._heard() == word

    def lose(self) -> None:
        """Lose a machine with all its processes, as when its power goes."""
        self._told("lose")

    def join(self) -> None:
        """Bring a machine."""
        self._told("join")

    def kill_head(self) -> None:
        """Kill the head's processes: whoever was connected loses the cluster."""
        self._told("kill_head")

    def close(self) -> None:
        """Stop what is left."""
        with contextlib.suppress(OSError, AssertionError):
            self._told("close")
        self._keeper.communicate(timeout=60)
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def keep(folder: str, count: int) -> None:
    """Be the process that keeps the machines: do what is said, a word a line, until the tests' end."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": folder}
    # Not the machine's own "current cluster": others run theirs here.
    with mock.patch("ray._private.utils.write_ray_address"):
        cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(wait=False, num_cpus=1) for _ in range(count)]
    gone = {"check_alive": False, "allow_graceful": False, "wait": True}
    try:
        cluster.wait_for_nodes()
        print(cluster.address, flush=True)
        for word in map(str.strip, sys.stdin):
            if word == "lose":
                cluster.remove_node(nodes.pop(0), allow_graceful=False)
            elif word == "join":
                nodes.append(cluster.add_node(wait=False, num_cpus=1))
            elif word == "kill_head":
                cluster.head_node.kill_all_processes(**gone)
            else:
                break
            print(word, flush=True)
    finally:
        for node in [*nodes, cluster.head_node]:
            with contextlib.suppress(Exception):
                node.kill_all_processes(**gone)
        print("close", flush=True)


@contextlib.contextmanager
def machines(count: int) -> Iterator[Machines]:
    """A cluster for the length of a ``with`` block."""
    made = Machines(count)
    try:
        yield made
    finally:
        made.close()


class Driver:
    """``sisa train`` in a process of its own."""

    def __init__(self, recipe: dict[str, Any], root: Path, machines: Machines, *words: str) -> None:
        words = ("--address", machines.address, *words)
        config = root.with_suffix(".yaml")
        config.write_text(json.dumps(recipe))  # JSON is YAML
        self.root = root
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sisa", "train", str(config), "--store", str(root), "--json", *words],
            env={**os.environ, **machines.variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def worker(self, shard: int) -> int:
        """The process that trains a shard now, by the shard's lock."""
        lock = self.root / "locks" / f"shard-{shard:04d}.lock"

        def named() -> int:
            assert self.process.poll() is None, self.process.communicate()
            said = lock.read_text().removeprefix("process ") if lock.exists() else ""
            return int(said) if said.isdigit() and Path(f"/proc/{said}").exists() else 0

        return int(wait_for(named, what=f"a worker of shard {shard}"))

    def snapshot(self, shard: int, stage: int) -> Path:
        """Wait for a snapshot of a stage: its training is in the middle."""

        def there() -> list[Path]:
            assert self.process.poll() is None, self.process.communicate()
            return sorted(self.root.glob(f"checkpoints/shard-{shard:04d}/snapshot-{stage:02d}-*"))

        return Path(wait_for(there, what=f"a snapshot of stage {stage} of shard {shard}")[0])

    def kill(self) -> None:
        """End it as the kernel ends a process."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def ended(self) -> tuple[int, str, str]:
        """Wait for its end and return its exit code, stdout and stderr."""
        try:
            out, err = self.process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the command doesn't end: {self.process.communicate()}") from None
        return self.process.returncode, out, err


if __name__ == "__main__":
    keep(sys.argv[1], int(sys.argv[2]))
