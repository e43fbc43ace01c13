"""How long work tells people about itself. The library is silent unless it is given a reporter."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Somebody who wants to know how far the work is."""

    def begin(self, what: str, total: int | None) -> None:
        """Start a piece of work of ``total`` units (None: unknown)."""

    def advance(self, amount: int) -> None:
        """Say that ``amount`` units more are done."""

    def found(self, amount: int) -> None:
        """Say that ``amount`` units needn't be done, as they were before; below 0: that so many are lost again."""

    def stages(self, done: int, total: int) -> None:
        """Say how many stages are made, of how many; the units are record-epochs then."""

    def note(self, text: str) -> None:
        """Say one line."""

    def end(self) -> None:
        """Close the piece of work."""


class Silent:
    """A reporter that says nothing."""

    def begin(self, what: str, total: int | None) -> None:
        """Say nothing."""

    def advance(self, amount: int) -> None:
        """Say nothing."""

    def found(self, amount: int) -> None:
        """Say nothing."""

    def stages(self, done: int, total: int) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def end(self) -> None:
        """Say nothing."""
