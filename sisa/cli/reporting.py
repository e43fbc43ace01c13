"""Progress for people: one live line on a terminal, plain lines elsewhere; always on stderr.

The view is the same for four shards and for a thousand: how much is done, stages made of all, cost so far, records a
second, time left. Elsewhere a line is a whole line, every some seconds, and never one that takes another back.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from sisa.cli.pace import Pace

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
        self._pace: Pace | None = None
        self._said = 0.0

    def begin(self, what: str, total: int | None) -> None:
        """Remember what is going on."""
        self._pace = Pace(what, total)
        self._said = self._pace.started + QUIET_S - LINE_EVERY_S

    def advance(self, amount: int) -> None:
        """Say a line now and then."""
        if self._pace is not None:
            self._pace.advance(amount)
            self._say(self._pace)

    def found(self, amount: int) -> None:
        """Count what needn't be done."""
        if self._pace is not None:
            self._pace.found(amount)

    def stages(self, done: int, total: int) -> None:
        """Remember how many stages are made."""
        if self._pace is not None:
            self._pace.stages = (done, total)

    def note(self, text: str) -> None:
        """Say one line."""
        click.echo(text, err=True)

    def end(self) -> None:
        """Say how long it took, if it took long."""
        pace, self._pace = self._pace, None
        if pace is not None and pace.seconds > QUIET_S:
            click.echo(f"{pace.what}: done in {pace.seconds:.1f} s", err=True)

    def _say(self, pace: Pace) -> None:
        now = time.monotonic()
        if now - self._said >= LINE_EVERY_S:
            self._said = now
            click.echo(f"{pace.what}: {', '.join(pace.parts())}", err=True)


class Bar:
    """A live line with a bar."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._pace = Pace("", None)

    def begin(self, what: str, total: int | None) -> None:
        """Show the bar."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
        from rich.table import Column

        self._pace = Pace(what, total)
        words = TextColumn("{task.fields[said]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=16), words,
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task(what, total=total or None, said="")
        self._bar.start()

    def advance(self, amount: int) -> None:
        """Move the bar."""
        self._pace.advance(amount)
        self._show()

    def found(self, amount: int) -> None:
        """Move the bar over what needn't be done."""
        self._pace.found(amount)
        self._show()

    def stages(self, done: int, total: int) -> None:
        """Show how many stages are made."""
        self._pace.stages = (done, total)
        self._show()

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

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._pace.done, said="  ".join(self._pace.parts()))
