"""A short way for ``POST /predict``: the same door, limits, log and handler, without the framework's routing.

Routing, dependencies and exception layers cost more than answering a row does. All other requests take the usual way,
and this one does too where the application runs without the shortcut: it answers the same.
"""

from __future__ import annotations

from types import SimpleNamespace

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from sisa.errors import SisaError
from sisa.serving import doors, limits, logs
from sisa.serving.app import Service

PATH = "/predict"


class Shortcut:
    """An application with a short way for predictions."""

    def __init__(self, app: FastAPI) -> None:
        service: Service = app.state.service
        serving = service.serving
        self._app = app
        self._service = service
        self._door: doors.Door = app.state.door
        self._predictions = service.predictions
        self._route = SimpleNamespace(path=PATH)
        limited = limits.TimeLimit(
            limits.BodyLimit(self._answer, max_bytes=serving.max_bytes), max_seconds=serving.max_seconds
        )
        self._predict = logs.AccessLog(limited, observe=service.metrics.observe, lines=app.state.access)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (ASGI)."""
        if scope["type"] == "http" and scope["path"] == PATH and scope["method"] == "POST":
            scope["route"] = self._route  # for the log
            await self._predict(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            await self._door.enter(request, "predict")
            response = await self._predictions.predict(request)
        except HTTPException as error:
            response = await doors.answer_refusal(request, error)
        except SisaError as error:
            response = await self._service.answer_error(request, error)
        await response(scope, receive, send)
