"""Requests that arrive together are answered together: one evaluation, one version, for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sisa.learners.columns import Columns

MOST_ROWS = 64
"""Of one evaluation on the event loop."""


@dataclass(frozen=True)
class Answered:
    """An answer as plain data, all of it from one version."""

    version: int
    path: str
    """How the constituents were evaluated; the label is the same on each path."""
    voters: int
    predictions: list[bool | int | str]
    """B classes."""
    scores: list[list[float]]
    """B rows of one probability for each class."""

    def rows(self, start: int, end: int) -> Answered:
        """Return the answer for some of the rows."""
        return Answered(self.version, self.path, self.voters, self.predictions[start:end], self.scores[start:end])


@dataclass(frozen=True)
class _Waiting:
    rows: Sequence[Any]
    answer: asyncio.Future[Answered | None]


class Gatherer:
    """Collects the rows of requests that arrive together, and has them answered when no more come."""

    def __init__(self, read: Callable[[Sequence[Any]], Columns], answer: Callable[[Columns], Answered | None]) -> None:
        """Take who reads rows and who answers: without waiting, or with None if that isn't possible now."""
        self._read = read
        self._answer = answer
        self._waiting: list[_Waiting] = []
        self._rows = self._seen = 0

    async def answer(self, rows: Sequence[Any]) -> Answered | None:
        """Return the answer for some rows, or None if nobody can answer at once.

        Raises:
            UserError: A row isn't what the recipe says it is, or the user's model fails on it.
            NoConstituentError: No clean constituent is left.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(rows, loop.create_future())
        if not self._waiting:
            loop.call_soon(self._flush, loop)
        self._waiting.append(waiting)
        self._rows += len(rows)
        return await waiting.answer

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        """Answer, unless this turn of the event loop brought more: then others are on their way. A turn costs little."""
        if self._seen < len(self._waiting) and self._rows < MOST_ROWS:
            self._seen = len(self._waiting)
            loop.call_soon(self._flush, loop)
            return
        asked, self._waiting = self._waiting, []
        self._rows = self._seen = 0
        part: list[_Waiting] = []
        count = 0
        for waiting in asked:
            if part and count + len(waiting.rows) > MOST_ROWS:
                self._settle(part)
                part, count = [], 0
            part.append(waiting)
            count += len(waiting.rows)
        self._settle(part)

    def _settle(self, asked: list[_Waiting]) -> None:
        try:
            whole = self._answer(self._read([row for waiting in asked for row in waiting.rows]))
        except Exception as error:  # noqa: BLE001 - whatever a model raises: else those who wait would wait for ever
            if len(asked) > 1:  # may be somebody else's mistake: each for itself, and positions are right then
                for waiting in asked:
                    self._settle([waiting])
            elif not asked[0].answer.done():
                asked[0].answer.set_exception(error)
            return
        start = 0
        for waiting in asked:
            end = start + len(waiting.rows)
            if not waiting.answer.done():  # else its client left
                waiting.answer.set_result(whole.rows(start, end) if whole is not None else None)
            start = end
