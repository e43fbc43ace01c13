"""Progress for people: a bar on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

QUIET_S = 2.0
"""Work shorter than this is not worth a line."""
LINE_EVERY_S = 10.0
"""How often a log gets a line about long work."""


def reporter() -> Bar | Lines:
    """Return what suits the place that stderr goes to."""
    return Bar() if sys.stderr.isatty() else Lines()


class Lines:
    """Plain lines for logs."""

    def __init__(self) -> None:
        self._what, self._total, self._done = "", 0, 0
        self._started = self._said = 0.0

    def begin(self, what: str, total: int | None) -> None:
        """Remember what is going on."""
        self._what, self._total, self._done = what, total or 0, 0
        self._started = time.monotonic()
        self._said = self._started + QUIET_S - LINE_EVERY_S

    def advance(self, amount: int) -> None:
        """Say a line now and then."""
        self._done += amount
        if time.monotonic() - self._said >= LINE_EVERY_S:
            self._said = time.monotonic()
            share = f" {100 * self._done // self._total} %" if self._total else f" {self._done:,}"
            click.echo(f"{self._what}:{share}", err=True)

    def note(self, text: str) -> None:
        """Say one line."""
        click.echo(text, err=True)

    def end(self) -> None:
        """Say how long it took, if it took long."""
        seconds = time.monotonic() - self._started
        if seconds > QUIET_S:
            click.echo(f"{self._what}: done in {seconds:.1f} s", err=True)


class Bar:
    """A progress bar."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None

    def begin(self, what: str, total: int | None) -> None:
        """Show the bar."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        left = [TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn()] if total else []
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), *left, TimeElapsedColumn(),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task(what, total=total)
        self._bar.start()

    def advance(self, amount: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.advance(self._task, amount)

    def note(self, text: str) -> None:
        """Say one line, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            click.echo(text, err=True)

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
