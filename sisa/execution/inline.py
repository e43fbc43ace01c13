"""Running chains in the calling process, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from sisa.errors import SisaError
from sisa.execution.receiver import Receiver
from sisa.training.chain import ChainTask, run_chain


def run_inline(tasks: Sequence[ChainTask], receiver: Receiver) -> None:
    """Run each chain; one that fails is reported by its shard and doesn't stop the others."""
    for task in tasks:
        try:
            run_chain(task, lambda event: receiver.events([event]))
        except SisaError as error:
            receiver.failure(task.shard, error)
