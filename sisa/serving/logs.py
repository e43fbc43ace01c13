"""What the server writes to stderr: JSON, one line per request and per message, without a word of what was asked.

An access line holds time, method, route template, status, milliseconds, bytes and the token's id. It holds no path
(ids stand in paths), no query, no header and no body. The text of an exception may quote the value it stumbled over:
of an exception only its type and the places in the code are written, uvicorn's and asyncio's included.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sisa.serving.doors import TOKEN_KEY
from sisa.serving.limits import Refused, refuse

FAULTS = logging.getLogger("sisa.faults")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNKNOWN = "unknown"
"""Stands for a path that no route has, and for a method that the client made up."""
CLIENT_LEFT = 499
"""Logged where the request ended before an answer began; nobody receives it."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its answer, in what may be told of them."""

    method: str
    route: str
    """The template, such as ``/deletions/{id}``."""
    status: int
    seconds: float
    sent_bytes: int
    """Of the answer's body."""
    token: str
    """The id; empty without a good token."""


class AccessLines:
    """Writes a line for each request, those of one turn of the event loop at once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines: list[str] = []

    def add(self, exchange: Exchange) -> None:
        """Write the line of a request at the end of this turn."""
        if not self._lines:
            asyncio.get_running_loop().call_soon(self._flush)
        self._lines.append(json.dumps(_fields(exchange)))

    def _flush(self) -> None:
        lines, self._lines = self._lines, []
        time_ = json.dumps({"time": _moment(datetime.now(UTC))}).removesuffix("}")
        with contextlib.suppress(OSError, ValueError):  # who reads the log has gone: no reason not to answer
            self._stream.write("".join(f"{time_}, {line[1:]}\n" for line in lines))
            self._stream.flush()


class BrokenAnswerError(Exception):
    """Raised to cut the connection when an answer fails half-way; it says nothing of the reason."""


class AccessLog:
    """The outermost layer: measures each request, logs it, and lets no exception out with its text.

    Add it last with ``add_middleware``: around the application it would come after Starlette's own plain 500.
    """

    def __init__(
        self, app: ASGIApp, *, observe: Callable[[Exchange], None] | None = None, lines: AccessLines | None = None
    ) -> None:
        """Wrap an application.

        Args:
            app: The application.
            observe: Told of each request.
            lines: Writes a line about each; None for none.
        """
        self._app = app
        self._observe = observe
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.perf_counter()
        status = sent_bytes = 0
        whole = False

        async def counting(message: Message) -> None:
            nonlocal status, sent_bytes, whole
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                sent_bytes += len(message.get("body", b""))
                whole = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, counting)
        except Exception as error:  # noqa: BLE001 - the last place before the server, which would log its text
            FAULTS.error("%s", type(error).__name__, extra={"fields": {"places": places(error.__traceback__)}})
            if status and not whole:
                raise BrokenAnswerError from None
            if not status:
                await refuse(
                    counting, Refused(500, "internal error", hint="The server's log says where, not with what.")
                )
        finally:
            seconds = time.perf_counter() - started_s
            self._tell(Exchange(*asked(scope), status or CLIENT_LEFT, seconds, sent_bytes, scope.get(TOKEN_KEY, "")))

    def _tell(self, exchange: Exchange) -> None:
        if self._observe is not None:
            self._observe(exchange)
        if self._lines is not None:
            self._lines.add(exchange)


def asked(scope: Scope) -> tuple[str, str]:
    """Return method and route template of a request that was routed."""
    method = scope["method"]
    route = getattr(scope.get("route"), "path", UNKNOWN)
    return (method if method in METHODS else UNKNOWN), route


def _fields(exchange: Exchange) -> dict[str, Any]:
    return {
        "method": exchange.method,
        "route": exchange.route,
        "status": exchange.status,
        "milliseconds": round(exchange.seconds * 1000, 3),
        "bytes": exchange.sent_bytes,
        "token": exchange.token,
    }


def places(trace: TracebackType | None) -> list[str]:
    """Say through which functions an exception came, outermost first."""
    frames = traceback.extract_tb(trace)
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]


class JsonLines(logging.Formatter):
    """One JSON object per record."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line: of a message its first line, of an exception its type and places."""
        # asyncio and uvicorn quote exceptions from the second line on
        message = record.getMessage().partition("\n")[0]
        line = {
            "time": _moment(datetime.fromtimestamp(record.created, UTC)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
        }
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[0] is not None:
            kind, _, trace = record.exc_info
            line |= {"exception": kind.__name__, "places": places(trace)}  # type: ignore[dict-item]
        return json.dumps(line, default=str)


def _moment(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")


def log_config(*, level: str = "INFO") -> dict[str, Any]:
    """Return uvicorn's ``log_config``: everything as JSON lines on stderr, its own access log off."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": "sisa.serving.logs.JsonLines"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stderr"}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {
            "sisa": {"level": level},
            "uvicorn": {"level": level},
            "uvicorn.access": {"level": "CRITICAL", "handlers": [], "propagate": False},
        },
    }
