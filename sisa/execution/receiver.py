"""Who is told how chains go on, wherever they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sisa.errors import SisaError
from sisa.training.events import Event


class Receiver(Protocol):
    """The driver's side of a build."""

    def events(self, events: Sequence[Event]) -> None:
        """Take what chains report, in order; what is a stage is durable when this returns."""

    def failure(self, shard: int, error: SisaError) -> None:
        """Hear what ended a chain."""

    def restarted(self, shard: int) -> None:
        """Hear that a chain's worker is gone and that another begins again from what is on disk."""

    def note(self, text: str) -> None:
        """Hear one line for people."""
