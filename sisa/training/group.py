"""A group of processes on one machine that pass tensors around.

Of its own, not torch's default one: whoever calls us may be in a group already, and a worker that is used again must
not find the last one's. Addresses meet in a file of a private folder, and sockets are bound to loopback.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sisa.errors import StoreError

PATIENCE = timedelta(minutes=5)
"""How long the others may take to give their part of a batch."""


class LostError(StoreError):
    """Another process of the group is gone."""


class Group:
    """This process's place in a group."""

    def __init__(self, meeting: Path, *, rank: int, size: int, device: str) -> None:
        """Join, and wait for the others.

        Args:
            meeting: A file in a folder that nobody else can enter.
            rank: Which of the processes this is, from 0.
            size: How many there are.
            device: ``cpu`` or ``cuda``.

        Raises:
            LostError: Another one didn't come.
        """
        self.rank = rank
        self.size = size
        self._device = device
        try:
            self._inner = _process_group(meeting, rank=rank, size=size, device=device)
        except RuntimeError as error:
            raise LostError("a process of the group didn't come") from error

    def gather(self, mine: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return what each process gave, in their order.

        Raises:
            LostError: Another one is gone, or frozen.
        """
        all_of_them = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            self._inner.allgather([all_of_them], [mine]).wait()
        except RuntimeError as error:
            raise LostError("a process of the group is gone") from error
        return all_of_them

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
