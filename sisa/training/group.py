"""A group of processes on one machine that pass tensors around.

Of its own, not torch's default one: whoever calls us may be in a group already, and a worker that is used again must
not find the last one's. Addresses meet in a file of a private folder, and sockets are bound to loopback.

Whoever waits for the others looks up several times a second, whether it should stop: one of them may stand still.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sisa.errors import StoreError
from sisa.training.stage import Stopped

LOOK_UP = timedelta(seconds=0.1)
"""How often whoever waits for the others looks whether it should stop."""
GPU_POLL_S = 0.0002
PATIENCE = timedelta(minutes=5)
"""How long the others may take to give their part of a batch."""


class LostError(StoreError):
    """Another process of the group is gone."""


class Group:
    """This process's place in a group."""

    def __init__(
        self, meeting: Path, *, rank: int, size: int, device: str, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Join, and wait for the others.

        Args:
            meeting: A file in a folder that nobody else can enter.
            rank: Which of the processes this is, from 0.
            size: How many there are.
            device: ``cpu`` or ``cuda``.
            should_stop: Asked several times a second while this process waits for another one, here and later.

        Raises:
            LostError: Another one didn't come.
            Stopped: ``should_stop`` said so.
        """
        self.rank = rank
        self.size = size
        self._device = device
        self._should_stop = should_stop
        self._inner = self._joined(meeting)
        self.met = backend(device) == "gloo"
        """Whether nobody looks into the file any more: NCCL may for as long as the group lives."""
        if self.met:
            self.gather(torch.zeros(1))  # all have come: whoever gives something has connected to everybody

    def _joined(self, meeting: Path) -> Any:
        """Join in a thread: nothing else can be left before the others have come."""
        came: list[Any] = []
        failed: list[RuntimeError] = []

        def join() -> None:
            try:
                came.append(_process_group(meeting, rank=self.rank, size=self.size, device=self._device))
            except RuntimeError as error:
                failed.append(error)

        thread = threading.Thread(target=join, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(LOOK_UP.total_seconds())
            if thread.is_alive():
                self._look_up()
        if not came:
            raise LostError("a process of the group didn't come") from next(iter(failed), None)
        return came.pop()

    def _look_up(self) -> None:
        if self._should_stop():
            raise Stopped("a training was stopped while its processes waited for each other")

    def gather(self, mine: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return what each process gave, in their order.

        Raises:
            LostError: Another one is gone, or has been frozen for too long.
            Stopped: This one should stop.
        """
        all_of_them = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            work = self._inner.allgather([all_of_them], [mine])
            while not self._is_done(work):
                self._look_up()
            work.wait()
        except RuntimeError as error:
            raise LostError("a process of the group is gone") from error
        return all_of_them

    def _is_done(self, work: Any) -> bool:
        """Wait for some work, until it is time to look up."""
        if backend(self._device) == "gloo":
            with contextlib.suppress(RuntimeError):  # it takes longer than that, or has failed: then it is done
                work.wait(LOOK_UP)
            return bool(work.is_completed())
        due = time.monotonic() + LOOK_UP.total_seconds()
        while not work.is_completed() and time.monotonic() < due:  # to wait is to queue up behind it, not to wait
            time.sleep(GPU_POLL_S)
        return bool(work.is_completed())

    def abandon(self) -> None:
        """Give up what is waited for, when the other processes are dead: before that it could not be let go."""
        self._inner.abort()

    def agree(self, digest: str) -> bool:
        """Say whether all processes have the same digest (hex)."""
        mine = torch.from_numpy(np.frombuffer(bytes.fromhex(digest), np.uint8).copy()).to(self._device)
        return all(torch.equal(mine, other) for other in self.gather(mine))


def backend(device: str) -> str:
    """Return the library that passes tensors around."""
    return "nccl" if device == "cuda" else "gloo"


def _process_group(meeting: Path, *, rank: int, size: int, device: str) -> Any:
    distributed: Any = importlib.import_module("torch.distributed")  # whose stubs leave out what we need
    store = distributed.FileStore(str(meeting), size)
    if backend(device) == "nccl":
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        chosen = distributed.ProcessGroupNCCL.Options()
        chosen._timeout = PATIENCE
        return distributed.ProcessGroupNCCL(distributed.PrefixStore("nccl", store), rank, size, chosen)
    options = distributed.ProcessGroupGloo._Options()
    options._devices = [distributed.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = PATIENCE
    return distributed.ProcessGroupGloo(distributed.PrefixStore("gloo", store), rank, size, options)
