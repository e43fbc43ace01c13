"""A Ray cluster of the tests' own: on loopback, with its own folder, ports and token; stopped by the ids of its processes."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cli_kit import ROOT, command, surroundings

START_S = 60


@dataclass(frozen=True)
class RunningCluster:
    """Where a cluster is, and how one gets in."""

    address: str
    """host:port, for a command that runs on it."""
    dashboard: str
    """http://host:port, for jobs."""
    folder: Path
    """Where Ray keeps logs and sessions."""
    environment: dict[str, str]

    def run(self, *words: object, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
        """Run ``sisa`` with what it takes to be let in."""
        environment = surroundings(**self.environment, **more)
        return subprocess.run(command(*words), cwd=folder, env=environment, capture_output=True, text=True, check=False)

    def submit(self, *words: object, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
        """Run ``scripts/submit``."""
        words = (ROOT / "scripts" / "submit", "--address", self.dashboard, *words)
        return subprocess.run(
            list(map(str, words)), cwd=folder, env={**os.environ, **self.environment, **more}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip


@contextlib.contextmanager
def cluster(*, cpus: int = 2, **variables: str) -> Iterator[RunningCluster]:
    """Start a head with a dashboard; ``variables`` are set for everything that runs there."""
    folder = Path(tempfile.mkdtemp(prefix="sisa-test-ray-", dir="/tmp"))
    port, dashboard, agent = _free_ports(3)
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    entry = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    words = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port", port,
        "--include-dashboard", "true", "--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard,
        "--dashboard-agent-listen-port", agent, "--temp-dir", folder / "ray", "--num-cpus", cpus,
        "--object-store-memory", 100 * 2**20, "--disable-usage-stats",
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # `python` is this one, as in an image
    environment = surroundings(**entry, **variables, PATH=path)
    with (folder / "out").open("w") as out:
        process = subprocess.Popen(
            list(map(str, words)), env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        found = RunningCluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", folder / "ray", entry)
        _wait_for(found, process, folder / "out")
        yield found
    finally:
        _stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(found: RunningCluster, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the job server answers."""
    token = Path(found.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(f"{found.dashboard}/api/version", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(request, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise AssertionError(f"Ray didn't start: {log.read_text()[-3000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a cluster's processes: those of the session that its first one leads, and nobody else's."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(contextlib.closing(socket.create_server(("127.0.0.1", 0)))) for _ in range(count)]
        return [server.getsockname()[1] for server in sockets]
