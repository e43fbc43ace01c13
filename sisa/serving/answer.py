"""Predictions over HTTP: rows in JSON or Arrow in, scores of one ensemble version out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
from anyio.to_thread import run_sync
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from sisa.ensemble.live import Answer, predicted_classes
from sisa.learners.columns import Columns, columns_from_table
from sisa.recipe import Recipe
from sisa.records.features import feature_table
from sisa.records.streams import write_stream
from sisa.serving.bodies import arrow_table, content_type, json_object, only_known, whole_body
from sisa.serving.gather import MOST_ROWS, Answered, Gatherer
from sisa.serving.limits import Refused, Threads
from sisa.serving.metrics import Metrics
from sisa.serving.replica import Replica
from sisa.serving.rows import RowReader

ARROW = "application/vnd.apache.arrow.stream"
MAX_ROWS = 100_000
THREADS = 16
"""Predictions that are computed, or wait for a version, outside of the event loop at a time."""
LONGEST_ON_LOOP_S = 0.05
IN_THREADS_S = 10.0
"""A model that takes longer is asked in threads for so long; then the event loop tries again."""


class Predictions:
    """Answers the rows of requests from one replica."""

    def __init__(
        self, recipe: Recipe, replica: Replica, metrics: Metrics, *, max_rows: int = MAX_ROWS, patience_s: float = 10.0
    ) -> None:
        self.recipe = recipe
        self.classes = list(recipe.data.classes or [])
        self.reader = RowReader(recipe)
        self._replica = replica
        self._gatherer = Gatherer(self.reader.read, self._answer_now)
        self._metrics = metrics
        self._max_rows = max_rows
        self._patience_s = patience_s
        self._threads = Threads(THREADS)
        self._in_threads_until_s = 0.0

    async def predict(self, request: Request) -> Response:
        """Answer ``POST /predict``.

        Raises:
            Refused: The body can't be understood.
            UserError: A row isn't what the recipe says it is.
            NotServingError: This replica may not answer now.
        """
        if content_type(request) == ARROW:
            answered = await self._in_thread(self._answer_arrow, await whole_body(request))
            return arrow_response(answered, self.classes)
        body = await json_object(request)
        only_known(body, {"rows": "list of objects"}, what="the body")
        rows = body.get("rows")
        if not isinstance(rows, list):
            raise Refused(422, "rows: expected a list of objects", hint=f'For example {{"rows": [{self._example()}]}}.')
        return json_response(vars(await self.answer(rows)))

    def check_count(self, count: int) -> None:
        """Make sure that a request doesn't ask about too many rows.

        Raises:
            Refused: 413.
        """
        if count > self._max_rows:
            raise Refused(
                413, f"{count:,} rows at once; at most {self._max_rows:,} are answered", hint="Send them in parts."
            )

    async def answer(self, rows: list[Any]) -> Answered:
        """Answer JSON rows from one version.

        Raises:
            Refused: 413: too many.
            UserError: A row isn't what the recipe says it is.
            NotServingError: This replica may not answer now.
        """
        self.check_count(len(rows))
        answered = await self._gatherer.answer(rows) if len(rows) <= MOST_ROWS else None
        if answered is None:
            answered = await self._in_thread(lambda: self._wait_for(self.reader.read(rows)))
        self._metrics.answered(answered.path, rows=len(rows))
        return answered

    async def _in_thread(self, work: Callable[..., Answered], *arguments: object) -> Answered:
        """Wait in a thread. Predictions have a few of their own: however many wait, deletions and the rest don't."""
        return await run_sync(work, *arguments, limiter=self._threads.get())

    def _answer_arrow(self, content: bytes) -> Answered:
        table = arrow_table(content, self.recipe.data.features)
        self.check_count(table.num_rows)
        answered = self._wait_for(columns_from_table(feature_table(table, self.recipe), self.recipe))
        self._metrics.answered(answered.path, rows=table.num_rows)
        return answered

    def _answer_now(self, columns: Columns) -> Answered | None:
        """Answer on the event loop, unless the last time took so long there that others had to wait for it."""
        started_s = time.monotonic()
        if started_s < self._in_threads_until_s:
            return None
        answer = self._replica.answer_now(columns)
        if answer is None:
            return None
        answered, ended_s = self._plain(answer), time.monotonic()
        if ended_s - started_s > LONGEST_ON_LOOP_S:
            self._in_threads_until_s = ended_s + IN_THREADS_S
        return answered

    def _wait_for(self, columns: Columns) -> Answered:
        return self._plain(self._replica.answer(columns, patience_s=self._patience_s))

    def _plain(self, answer: Answer) -> Answered:
        predictions = predicted_classes(answer.scores_BC, self.classes)
        return Answered(answer.version, answer.path, answer.voters, predictions, answer.scores_BC.tolist())

    def _example(self) -> str:
        return "{" + ", ".join(f'"{name}": ...' for name in self.reader.names[:3]) + "}"


def json_response(content: object, *, status: int = 200) -> Response:
    """Return plain data as JSON."""
    return Response(to_json(content), status, media_type="application/json")


def arrow_response(answered: Answered, classes: list[bool | int | str]) -> Response:
    """Return an Arrow stream with the columns ``prediction`` and ``scores``; the version is in the schema's metadata."""
    schema = pa.schema(
        [("prediction", pa.array(classes).type), ("scores", pa.list_(pa.float64()))],
        metadata={"version": str(answered.version), "path": answered.path, "voters": str(answered.voters)},
    )
    table = pa.table([answered.predictions, answered.scores], schema=schema)
    return Response(write_stream(table), media_type=ARROW)
