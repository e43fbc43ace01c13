"""Running chains in the calling process, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sisa.errors import SisaError
from sisa.training.chain import ChainTask, run_chain
from sisa.training.events import Report

OnFailure = Callable[[int, SisaError], None]


def run_inline(tasks: Sequence[ChainTask], report: Report, on_failure: OnFailure) -> None:
    """Run each chain; one that fails is reported by its shard and doesn't stop the others."""
    for task in tasks:
        try:
            run_chain(task, report)
        except SisaError as error:
            on_failure(task.shard, error)
