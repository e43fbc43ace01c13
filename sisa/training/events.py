"""What a chain tells its driver while it runs. Plain values: they cross process borders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sisa.ledger import StageRow


@dataclass(frozen=True)
class StageDone:
    """A stage lies in the checkpoints, whole and durable."""

    row: StageRow
    reused: bool
    """It was there already: nothing was trained."""


@dataclass(frozen=True)
class Trained:
    """So many records more went through a model once."""

    record_epochs: int


Event = StageDone | Trained
Report = Callable[[Event], None]
