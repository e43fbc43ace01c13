"""Ctrl-C, as a terminal sends it: to the command and to everything that it started."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from cli_kit import command, one_object, people, prepare, process, surroundings

from sisa.execution.interrupts import interrupts_deferred


def running():
    """{process: its parent} of what runs and isn't a zombie."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            found[int(path.name)] = int(parent)
    return found


def descendants(root):
    """Processes that a process started, and theirs."""
    parents, found = running(), {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def wait_for(happened, *, seconds):
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert happened()


@pytest.fixture
def place():
    """A temporary folder with a name that is short enough for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="int", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
def test_a_training_on_ray_ends_at_once_leaves_nothing_and_goes_on_later(tmp_path, place):
    """It starts a cluster of its own, too, where another one is named that doesn't concern it."""
    prepare(tmp_path, people(2_000), training={"epochs": 40, "batch_size": 8}, sisa={"shards": 2, "slices": 3})
    words = command("train", "recipe.yaml", "--executor", "ray", "--workers", "2")
    environment = surroundings(TMPDIR=str(place), RAY_ADDRESS="127.0.0.1:9")
    training = subprocess.Popen(
        words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )  # fmt: skip
    try:
        wait_for(lambda: training.poll() is not None or [*tmp_path.glob("store/checkpoints/*/stage-*")], seconds=90)
        started = descendants(training.pid)
        assert len(started) > 4
        assert [path.name[:9] for path in place.iterdir()] == ["sisa-ray-"]
        os.killpg(training.pid, signal.SIGINT)
        time.sleep(0.3)
        os.killpg(training.pid, signal.SIGINT)  # somebody is impatient
        out, err = training.communicate(timeout=30)
    finally:
        training.kill()
    assert training.returncode == 130, err
    assert out == ""
    assert "\nerror: interrupted\nhint: Run the command again: it goes on where it stopped.\n" in err
    assert "Traceback" not in err
    assert not list(place.iterdir())
    wait_for(lambda: not started & running().keys(), seconds=30)
    again = process("train", "recipe.yaml", "--executor", "inline", "--json", folder=tmp_path)
    answer = one_object(again.stdout)
    assert answer["stages_reused"] >= 1
    assert answer["stages_trained"] + answer["stages_reused"] == 6


def test_however_often_it_is_interrupted_it_says_so_and_the_store_is_whole(tmp_path):
    prepare(tmp_path, people(1_000), training={"epochs": 40, "batch_size": 8}, sisa={"shards": 2, "slices": 3})
    words = command("train", "recipe.yaml", "--executor", "inline")
    training = subprocess.Popen(
        words, cwd=tmp_path, env=surroundings(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: training.poll() is not None or [*tmp_path.glob("store/checkpoints/*/stage-*")], seconds=90)
        while training.poll() is None:  # somebody is very impatient
            training.send_signal(signal.SIGINT)
            time.sleep(0.01)
        out, err = training.communicate(timeout=30)
    finally:
        training.kill()
    assert (training.returncode, out) == (130, ""), err
    assert err.count("error: interrupted\n") <= 1  # or was interrupted while it was about to say so
    assert "Traceback" not in err
    answer = one_object(process("train", "recipe.yaml", "--executor", "inline", "--json", folder=tmp_path).stdout)
    assert answer["stages_reused"] >= 1
    assert answer["stages_trained"] + answer["stages_reused"] == 6
    assert one_object(process("verify", "--store", "store", "--json", folder=tmp_path).stdout)["ok"]


LEAVES = """
import atexit, signal, sys
from sisa.cli import main
from sisa.cli.main import click

def run(words):
    if words == ["later"]:  # while a library clears up
        atexit.register(signal.raise_signal, signal.SIGINT)
    if words == ["last"]:  # when everybody has
        return 130
    return 130 if words == ["later"] else real(words)

def echo(*words, **options):
    if not told:
        signal.raise_signal(signal.SIGINT)
    told.append(words)
    write(*words, **options)

def invoked(**_):
    raise KeyboardInterrupt

if sys.argv[1:] == ["last"]:
    atexit.register(signal.raise_signal, signal.SIGINT)
told, real, write = [], main.run, click.echo
main.run, click.echo, main.cli.main = run, echo, invoked
main.main(sys.argv[1:])
"""


@pytest.mark.parametrize("when", ["answered", "later", "last"])
def test_a_second_interrupt_breaks_into_nothing_that_is_done_at_exit(when):
    words = [sys.executable, "-c", LEAVES, when]
    left = subprocess.run(words, env=surroundings(), capture_output=True, text=True, check=False)
    said = "error: interrupted\nhint: Run the command again: it goes on where it stopped.\n"
    assert (left.returncode, left.stdout, left.stderr) == (130, "", said if when == "answered" else "")


def test_an_interrupt_waits_for_the_end_of_what_must_not_be_left_half_done():
    done = []

    def work():
        with interrupts_deferred():
            signal.raise_signal(signal.SIGINT)
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_does_not_wait():
    done = []

    def work():
        with interrupts_deferred():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append("what comes after it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert not done


def test_an_interrupt_is_told_before_an_error_that_came_with_it():
    def work():
        with interrupts_deferred():
            signal.raise_signal(signal.SIGINT)
            raise ConnectionError

    with pytest.raises(KeyboardInterrupt):
        work()


def test_who_is_not_interrupted_is_left_alone():
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_deferred():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)
    seen = []

    def elsewhere():
        with interrupts_deferred():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [handler]
