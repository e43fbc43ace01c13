"""Stages that several processes train together: the first one's side.

The first process is the one that walks the chain. It starts the others on the same machine, tells each over a pipe
which stage of which shard to train, and waits until all have read their rows; then they train in step. The others read
rows and the parent's state themselves, write nothing that has a name, and end as soon as the first one is gone. A stage counts only if
all of them end in the same state, down to the last bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sisa.errors import DamagedError, FootingError, SisaError, StaleError, StoreError, UserError
from sisa.learners.shared import ALONE
from sisa.recipe import Recipe, dump_recipe
from sisa.state import StageState, full_digest
from sisa.training.group import Group, LostError
from sisa.training.stage import Stopped, TrainingError, train_stage

if TYPE_CHECKING:
    from sisa.training.chain import ChainTask

GO = "go\n"
LOOK_UP_S = 0.1
LAST_WORDS_S = 5.0
"""How long a process that left the group may take to say why."""
KINDS: dict[str, type[SisaError]] = {
    kind.__name__: kind for kind in (DamagedError, FootingError, StaleError, StoreError, TrainingError, UserError)
}


def task_data(task: ChainTask) -> dict[str, Any]:
    """Return a task as plain data, for another process."""
    plain = {field.name: getattr(task, field.name) for field in fields(task)}
    keys = {"shard": task.keys.shard, "order": task.keys.order.hex(), "digest": task.keys.digest.hex()}
    layout = {**vars(task.layout), "root": str(task.layout.root)}
    return {**plain, "recipe": dump_recipe(task.recipe), "keys": keys, "layout": layout}


@dataclass
class _Peer:
    """Another process, and how to talk to it."""

    rank: int
    process: subprocess.Popen[str]
    words: IO[str]
    """What it is told; its end is the end of the process."""
    answers: IO[str]


class Together:
    """The processes that train one chain's stages with this one; they start when the first stage needs them."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._size = recipe.workers.devices_per_shard
        self._undo = contextlib.ExitStack()
        self._peers: list[_Peer] = []
        self._folder = Path()

    def close(self) -> None:
        """End the other processes."""
        self._peers = []
        self._undo.close()

    def train(
        self, told: dict[str, Any], *, should_stop: Callable[[], bool], stage: int, shard: int, **arguments: Any
    ) -> StageState:
        """Train a stage; this process is the first of ``workers.devices_per_shard``.

        Args:
            told: What the others need to find the stage's inputs, as plain data.
            should_stop: Asked several times a second.
            stage: 1..R.
            shard: 0..S-1.
            arguments: Further ones of :func:`sisa.training.stage.train_stage`.

        Raises:
            Stopped: ``should_stop`` said so.
            StoreError: One of the processes died.
            UserError: They ended in different states, or what :func:`sisa.training.stage.train_stage` raises.
        """
        self._start()
        meeting = self._folder / f"meeting-{stage}"
        for peer in self._peers:
            request = {**told, "stage": stage, "rank": peer.rank, "size": self._size, "meeting": str(meeting)}
            _tell(peer, json.dumps(request) + "\n")
        _wait_until_ready(self._peers, should_stop)
        try:
            for peer in self._peers:
                _tell(peer, GO)
            group = Group(meeting, rank=0, size=self._size, device=self._recipe.training.device)
            state = train_stage(should_stop=should_stop, stage=stage, shard=shard, group=group, **arguments)
            same = group.agree(full_digest(state))
        except LostError as error:
            raise _last_words(self._peers, shard) from error
        if not same:
            raise UserError(
                f"workers.devices_per_shard: the processes that trained stage {stage} of shard {shard} ended in "
                "different states: the model keeps something that depends on the rows it sees, which is not supported yet",
                hint=ALONE,
            )
        return state

    def _start(self) -> None:
        if self._peers:
            return
        self._folder = Path(self._undo.enter_context(tempfile.TemporaryDirectory(prefix="sisa-group-")))
        for rank in range(1, self._size):
            peer = _started(rank, self._recipe.training.device)
            self._undo.callback(_ended, peer)
            self._peers.append(peer)


def _started(rank: int, device: str) -> _Peer:
    paths = [path or str(Path.cwd()) for path in sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}  # a user's model is found where we find it
    if device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[rank] if visible else str(rank)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "sisa.training.peer"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # what a user's model prints may be somebody's values
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    return _Peer(rank, process, process.stdin, process.stdout)


def _ended(peer: _Peer) -> None:
    """End a process: it holds rows and weights that may be about to be erased, and has nothing to put away."""
    peer.process.kill()
    peer.process.wait()
    with contextlib.suppress(OSError):
        peer.words.close()
    peer.answers.close()


def _tell(peer: _Peer, line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # it is dead: that is noticed where it is waited for
        peer.words.write(line)
        peer.words.flush()


def _wait_until_ready(peers: list[_Peer], should_stop: Callable[[], bool]) -> None:
    """Wait until every process has read what it needs; reading may take a while.

    Raises:
        Stopped: ``should_stop`` said so.
        SisaError: One can't.
    """
    with selectors.DefaultSelector() as waiting:
        for peer in peers:
            waiting.register(peer.answers, selectors.EVENT_READ, peer)
        while waiting.get_map():
            if should_stop():
                raise Stopped("a training was stopped before its processes were ready")
            for key, _ in waiting.select(LOOK_UP_S):
                answer = key.data.answers.readline()
                if answer != "ready\n":
                    raise _error(answer, key.data)
                waiting.unregister(key.fileobj)


def _last_words(peers: list[_Peer], shard: int) -> SisaError:
    """Find out which process left the group, and why."""
    with selectors.DefaultSelector() as waiting:
        for peer in peers:
            waiting.register(peer.answers, selectors.EVENT_READ, peer)
        for key, _ in waiting.select(LAST_WORDS_S):
            return _error(key.data.answers.readline(), key.data)
    return StoreError(
        f"the processes that train shard {shard} together lost each other",
        hint="Run the command again: finished stages are kept.",
    )


def _error(answer: str, peer: _Peer) -> SisaError:
    try:
        said = json.loads(answer)
        return KINDS.get(said["kind"], TrainingError)(said["message"], hint=said["hint"])
    except (ValueError, KeyError, TypeError):
        return StoreError(
            f"process {peer.rank} of those that train a shard together died",
            hint="It may have run out of memory. Run the command again: finished stages are kept.",
        )
