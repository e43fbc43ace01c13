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
    """So many records more went through a shard's model once."""

    shard: int
    record_epochs: int


@dataclass(frozen=True)
class Resumed:
    """A stage goes on from a recovery snapshot, behind which so much work lies."""

    shard: int
    stage: int
    record_epochs: int


@dataclass(frozen=True)
class Kept:
    """A recovery snapshot of a stage is durable: its chain got further."""

    shard: int
    stage: int


@dataclass(frozen=True)
class Said:
    """One line for people, with places in it and no values."""

    text: str


Event = StageDone | Trained | Resumed | Kept | Said
Report = Callable[[Event], None]
