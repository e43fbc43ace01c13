"""Ceph's object gateway on loopback: one monitor, one OSD that keeps everything in memory, one gateway, no root needed.

Requests reach it through a server of this process, so that faults can be put in its way as in moto's.
"""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from postgres_kit import free_port
from s3_kit import Environ, S3Server

PATIENCE_S = 120.0
PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
CONFIG = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{port}
public addr = 127.0.0.1
ms bind ipv6 = false
auth allow insecure global id reclaim = false
keyring = {folder}/keyring
run dir = {folder}
admin socket = {folder}/$name.asok
pid file = {folder}/$name.pid
log file = {folder}/$name.log
mon data = {folder}/mon
mon data avail crit = 1
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 4294967296
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
mon allow pool size one = true
"""
CAPABILITIES = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *"},
    "client.rgw": {"mon": "allow rw", "osd": "allow rwx"},
    "osd.0": {"mon": "allow profile osd", "osd": "allow *"},
}


class Ceph:
    """The programs of one cluster, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[subprocess.Popen[bytes]] = []
        self.port = free_port()

    def start(self) -> None:
        """Make a cluster, and a user for the tests."""
        port, identity = free_port(), str(uuid.uuid4())
        (self._folder / "ceph.conf").write_text(CONFIG.format(fsid=identity, port=port, folder=self._folder))
        (self._folder / "osd").mkdir()
        for number, (name, rights) in enumerate(CAPABILITIES.items()):
            made = ["--create-keyring"] if not number else []
            words = [word for what, right in rights.items() for word in ("--cap", what, right)]
            self._run("ceph-authtool", *made, "keyring", "--gen-key", "-n", name, *words, configured=False)
        self._run("monmaptool", "--create", "--fsid", identity, "--addv", "a", f"[v2:127.0.0.1:{port}]", "monmap",
                  configured=False)  # fmt: skip
        self._run("ceph-mon", "--mkfs", "-i", "a", "--keyring", "keyring", "--monmap", "monmap")
        self._start("ceph-mon", "-i", "a")
        disk = str(uuid.uuid4())
        self._run("ceph", "osd", "new", disk)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        self._start("ceph-osd", "-i", "0")
        user = ("--uid", "tests", "--display-name", "tests", "--access-key", "tests", "--secret", "tests")
        self._run("radosgw-admin", "user", "create", *user)
        front = ("--rgw-frontends", f"beast endpoint=127.0.0.1:{self.port}")
        self._start("radosgw", "-n", "client.rgw", "--keyring", "keyring", *front)
        self._wait()

    def stop(self) -> None:
        """Stop what was started, the last first."""
        for process in reversed(self._running):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _run(self, program: str, *words: str, configured: bool = True) -> None:
        config = ("-c", "ceph.conf") if configured else ()
        done = subprocess.run(
            [program, *config, *words], cwd=self._folder, timeout=PATIENCE_S, check=False,
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"

    def _start(self, program: str, *words: str) -> None:
        nowhere = subprocess.DEVNULL
        words = ("-f", "-c", "ceph.conf", *words)
        started = subprocess.Popen([program, *words], cwd=self._folder, stdin=nowhere, stdout=nowhere, stderr=nowhere)
        self._running.append(started)

    def _wait(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.1)
        log = self._folder / "client.rgw.log"
        pytest.fail(f"the gateway doesn't listen: {log.read_text()[-2000:] if log.exists() else 'it wrote no log'}")


class CephServer(S3Server):
    """The gateway, behind what puts faults in its way."""

    def __init__(self, ceph: Ceph) -> None:
        super().__init__()
        self._ceph = ceph
        self._app = self._forward  # type: ignore[assignment]

    def _forward(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        """Hand a request on as it came: its signature covers the host's name."""
        length = int(environ.get("CONTENT_LENGTH") or 0)
        names = {
            name[5:].replace("_", "-").lower(): value for name, value in environ.items() if name.startswith("HTTP_")
        }
        names.pop("expect", None)
        if environ.get("CONTENT_TYPE"):
            names["content-type"] = environ["CONTENT_TYPE"]
        if "CONTENT_LENGTH" in environ:
            names["content-length"] = str(length)
        asked = http.client.HTTPConnection("127.0.0.1", self._ceph.port, timeout=PATIENCE_S)
        with contextlib.closing(asked):
            body = environ["wsgi.input"].read(length) if length else None
            asked.request(environ["REQUEST_METHOD"], environ["RAW_URI"], body, names)
            answer = asked.getresponse()
            content = answer.read()
        told = [(n, v) for n, v in answer.getheaders() if n.lower() not in {"connection", "transfer-encoding"}]
        start_response(f"{answer.status} {answer.reason}", told)
        return [content]


@contextlib.contextmanager
def running(folder: Path) -> Iterator[CephServer]:
    """A gateway with nothing in it. Without Ceph's programs the test is skipped, and says what to install."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: install Debian's packages radosgw, ceph-mon and ceph-osd")
    ceph = Ceph(folder)
    try:
        ceph.start()
        with CephServer(ceph).running() as server:
            yield server
    finally:
        ceph.stop()
