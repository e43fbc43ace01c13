"""Ray's own folder: of a driver that was killed, and of one that lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sisa.errors import BusyError
from sisa.execution import folder
from sisa.execution.folder import LOCK, sweep, working_folder
from sisa.files import FileLock

ROOT = Path(__file__).resolve().parent.parent
DRIVER = """
import sys
from pathlib import Path
from sisa.execution import folder
folder._short_temporary_folder = lambda: Path(sys.argv[1])
with folder.working_folder() as made:
    (made / "session" / "logs").mkdir(parents=True)
    (made / "session" / "logs" / "raylet.out").write_text("what it said")
    (made / "session_latest").symlink_to("session")
    print(made, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where temporary files lie for this test; any length will do, since no Ray works there."""
    monkeypatch.setattr(folder, "_short_temporary_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def driver(tmp_path):
    """Start processes that hold a folder each; returns (process, folder)."""
    processes = []

    def start():
        command = [sys.executable, "-c", DRIVER, str(tmp_path)]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process, Path(process.stdout.readline().strip())

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_folder_is_private_and_goes_with_its_driver(place):
    with working_folder() as made:
        assert made.parent == place
        assert made.stat().st_mode & 0o777 == 0o700
        (made / "file").touch()
    assert not list(place.iterdir())


def test_what_a_killed_driver_left_is_swept_at_the_next_start_and_a_living_ones_is_not(place, driver):
    dead, left = driver()
    _, living = driver()
    os.kill(dead.pid, signal.SIGKILL)
    dead.wait()
    assert (left / "session" / "logs" / "raylet.out").exists()
    with working_folder() as made:
        assert not left.exists()
        assert (living / "session_latest" / "logs" / "raylet.out").read_text() == "what it said"
        assert {made, living} == set(place.iterdir())


def test_what_is_not_known_to_be_ours_stays(place, tmp_path, monkeypatch):
    (place / "sisa-ray-unlocked").mkdir()
    (place / "sisa-ray-unlocked" / "file").touch()
    (place / "sisa-ray-file").touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / LOCK).touch()
    (place / "sisa-ray-link").symlink_to(outside)
    foreign = place / "sisa-ray-foreign"
    foreign.mkdir()
    (foreign / LOCK).touch()
    before = sorted(place.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: foreign.stat().st_uid + 1)
        sweep(place)
    assert sorted(place.rglob("*")) == before
    sweep(place)
    assert sorted(place.rglob("*")) == [path for path in before if foreign not in {path, path.parent}]


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("holds_it_still", [False, True])
def test_a_folder_that_was_swept_before_it_was_locked_is_made_again(monkeypatch, holds_it_still):
    real, tried = FileLock.acquire, []

    def overtaken(lock, **options):
        tried.append(lock.path.parent)
        if len(tried) == 1 and holds_it_still:
            raise BusyError("a sweep holds it")
        real(lock, **options)
        if len(tried) == 1:
            lock.path.unlink()
            lock.path.parent.rmdir()

    monkeypatch.setattr(FileLock, "acquire", overtaken)
    with working_folder() as made:
        assert [made] == tried[1:]
        assert (made / LOCK).exists()
