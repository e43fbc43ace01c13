"""Requests that arrive together are answered together: one evaluation, one version, for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sisa.ensemble.live import Answer
from sisa.errors import SisaError, UserError
from sisa.learners.columns import Columns

MOST_ROWS = 64
"""Of one evaluation on the event loop."""


@dataclass(frozen=True)
class _Waiting:
    rows: Sequence[Any]
    answer: asyncio.Future[Answer | None]


class Gatherer:
    """Collects the rows of requests of one turn of the event loop, and has them answered at its end."""

    def __init__(self, read: Callable[[Sequence[Any]], Columns], answer: Callable[[Columns], Answer | None]) -> None:
        """Take who reads rows and who answers: without waiting, or with None if that isn't possible now."""
        self._read = read
        self._answer = answer
        self._waiting: list[_Waiting] = []

    async def answer(self, rows: Sequence[Any]) -> Answer | None:
        """Return the scores of some rows, or None if nobody can answer at once.

        Raises:
            UserError: A row isn't what the recipe says it is.
            NoConstituentError: No clean constituent is left.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(rows, loop.create_future())
        if not self._waiting:
            loop.call_soon(self._flush)
        self._waiting.append(waiting)
        return await waiting.answer

    def _flush(self) -> None:
        asked, self._waiting = self._waiting, []
        part: list[_Waiting] = []
        for waiting in asked:
            if part and sum(len(other.rows) for other in part) + len(waiting.rows) > MOST_ROWS:
                self._settle(part)
                part = []
            part.append(waiting)
        self._settle(part)

    def _settle(self, asked: list[_Waiting]) -> None:
        try:
            whole = self._answer(self._read([row for waiting in asked for row in waiting.rows]))
        except UserError as error:
            if len(asked) > 1:  # somebody else's mistake: each for itself, and positions are right then
                for waiting in asked:
                    self._settle([waiting])
            elif not asked[0].answer.done():
                asked[0].answer.set_exception(error)
            return
        except (SisaError, ValueError, RuntimeError) as error:
            for waiting in asked:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
            return
        start = 0
        for waiting in asked:
            end = start + len(waiting.rows)
            if not waiting.answer.done():  # else its client left
                waiting.answer.set_result(whole.rows(start, end) if whole is not None else None)
            start = end
