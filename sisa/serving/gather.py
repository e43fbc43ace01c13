"""Requests that arrive together are answered together: one evaluation, one version, for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sisa.ensemble.live import Answer
from sisa.errors import SisaError
from sisa.learners.columns import Columns

MOST_ROWS = 64
"""Of one evaluation on the event loop."""


class Gatherer:
    """Collects the rows of requests of one turn of the event loop, and has them answered at its end."""

    def __init__(self, answer: Callable[[Columns], Answer | None]) -> None:
        """Take who answers: without waiting, or with None if that isn't possible now."""
        self._answer = answer
        self._waiting: list[tuple[Columns, asyncio.Future[Answer | None]]] = []

    async def answer(self, columns: Columns) -> Answer | None:
        """Return the scores of some rows, or None if nobody can answer at once.

        Raises:
            NoConstituentError: No clean constituent is left.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer | None] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._flush)
        self._waiting.append((columns, future))
        return await future

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        while waiting:
            part, rows = 0, 0
            while part < len(waiting) and (not part or rows + waiting[part][0].count <= MOST_ROWS):
                rows += waiting[part][0].count
                part += 1
            self._settle(waiting[:part])
            waiting = waiting[part:]

    def _settle(self, asked: list[tuple[Columns, asyncio.Future[Answer | None]]]) -> None:
        try:
            whole = self._answer(Columns.concatenate([columns for columns, _ in asked]))
        except (SisaError, ValueError, RuntimeError) as error:
            for _, future in asked:
                if not future.done():
                    future.set_exception(error)
            return
        start = 0
        for columns, future in asked:
            if not future.done():
                future.set_result(whole.rows(start, start + columns.count) if whole is not None else None)
            start += columns.count
