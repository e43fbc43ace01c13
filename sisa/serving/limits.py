"""How large, how slow and how frequent a request may be. Plain ASGI: each layer is one call and one comparison.

=====  =================================================================================================
 413   the body is larger than allowed, by its Content-Length, or by what came of it if it has none
 408   the time ran out while the body was still coming: the client was slow
 503   the time ran out while the answer was computed: this server was slow
 429   the token (or, without one, the peer) asked too often; said by the doors, which know the token
=====  =================================================================================================

When the time runs out the request's coroutine is cancelled, but a thread that it waits for isn't: what has begun in
a thread ends there, whole. So what must follow an acceptance belongs into the thread that accepts.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Mapping

from anyio import CapacityLimiter
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sisa.errors import UserError
from sisa.serving.deadlines import Deadlines

MAX_BODY_BYTES = 16 * 2**20
MAX_SECONDS = 60.0
REMEMBERED = 10_000
"""Buckets that are kept; beyond it those that are full again are dropped, then all."""


class Refused(HTTPException):
    """The request is not served; ``detail`` says why, ``hint`` what to do next. Both hold no value of the request."""

    def __init__(self, status: int, message: str, *, hint: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, message, headers)
        self.hint = hint


def error_body(message: str, hint: str) -> dict[str, dict[str, str]]:
    """Return what every failure is answered with."""
    return {"error": {"message": message, "hint": hint}}


async def refuse(send: Send, refused: Refused) -> None:
    """Send a refusal as a whole response."""
    body = json.dumps(error_body(refused.detail, refused.hint)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **(refused.headers or {})}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status_code, "headers": raw})
    await send({"type": "http.response.body", "body": body})


class Threads:
    """At most so many threads at a time for one kind of work; made when it is first asked for, on an event loop."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._limiter: CapacityLimiter | None = None

    def get(self) -> CapacityLimiter:
        """Return what ``anyio.to_thread.run_sync`` takes as ``limiter``."""
        if self._limiter is None:
            self._limiter = CapacityLimiter(self._most)
        return self._limiter


class BodyLimit:
    """Refuses larger bodies, those in chunks without a length included; nothing is kept of them."""

    def __init__(self, app: ASGIApp, *, max_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif (length := _content_length(scope)) is None:
            await self._counted(scope, receive, send)
        elif length > self._max_bytes:
            await refuse(send, self._too_large())
        else:  # the HTTP parser hands on no more than was announced
            await self._app(scope, receive, send)

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        came_bytes, started = 0, False

        async def counting() -> Message:
            nonlocal came_bytes
            if came_bytes > self._max_bytes:
                raise self._too_large()
            message = await receive()
            came_bytes += len(message.get("body", b""))
            if came_bytes > self._max_bytes:
                raise self._too_large()
            return message

        async def checked(message: Message) -> None:
            nonlocal started
            if came_bytes > self._max_bytes and not started:
                return  # whatever the application made of the failed reading, the answer is ours
            started = True
            await send(message)

        try:
            await self._app(scope, counting, checked)
        except Exception:
            if started or came_bytes <= self._max_bytes:
                raise
        if came_bytes > self._max_bytes and not started:
            await refuse(send, self._too_large())

    def _too_large(self) -> Refused:
        return Refused(
            413,
            f"the body is larger than {self._max_bytes:,} bytes",
            hint="Send fewer rows at a time.",
            headers={"connection": "close"},  # what is left of the body is not read
        )


def _content_length(scope: Scope) -> int | None:
    """Return the announced length; 0 if there is no body, None if it comes in chunks."""
    length: int | None = 0
    for name, value in scope["headers"]:
        if name == b"transfer-encoding":
            return None
        if name == b"content-length":
            length = int(value) if value.isdigit() else None
    return length


class TimeLimit:
    """Ends requests that take too long."""

    def __init__(self, app: ASGIApp, *, max_seconds: float = MAX_SECONDS) -> None:
        self._app = app
        self._max_seconds = max_seconds
        self._limits = Deadlines(max_seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, waiting, coming = False, False, _content_length(scope) != 0

        async def watched() -> Message:
            nonlocal waiting, coming
            waiting = True
            message = await receive()
            waiting, coming = False, bool(message.get("more_body", False))
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        limit = self._limits.one()
        try:
            with limit:
                await self._app(scope, watched if coming else receive, noted)
        except TimeoutError:
            if started or not limit.expired:
                raise
            await refuse(send, self._too_late(coming=coming and waiting))

    def _too_late(self, *, coming: bool) -> Refused:
        if coming:
            message = f"the request did not arrive within {self._max_seconds:g} s"
            return Refused(408, message, hint="Send it again, or in parts.", headers={"connection": "close"})
        message = f"no answer was ready within {self._max_seconds:g} s"
        return Refused(503, message, hint="Try again later, or with fewer rows.", headers={"retry-after": "1"})


class RateLimit:
    """A token bucket for each caller, in this process: ``burst`` requests at once, ``per_second`` in the long run.

    Raises:
        UserError: The rate is no positive number.
    """

    def __init__(
        self, *, per_second: float, burst: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not 0 < per_second < math.inf:
            raise UserError(f"rate limit: expected a positive number of requests per second, got {per_second:g}")
        self._per_second = per_second
        self._burst = float(burst if burst is not None else max(1, math.ceil(per_second)))
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()  # doors are passed in several threads

    def take(self, caller: str) -> None:
        """Count one request.

        Raises:
            Refused: The caller's bucket is empty.
        """
        with self._lock:
            moment_s = self._clock()
            if len(self._buckets) >= REMEMBERED and caller not in self._buckets:
                self._forget(moment_s)
            left = self._level(caller, moment_s)
            if left >= 1:
                self._buckets[caller] = (left - 1, moment_s)
                return
        wait_s = max(1, math.ceil((1 - left) / self._per_second))
        raise Refused(
            429,
            f"more than {self._per_second:g} requests per second",
            hint=f"Wait {wait_s} s, then ask again.",
            headers={"retry-after": str(wait_s)},
        )

    def _level(self, caller: str, moment_s: float) -> float:
        left, since_s = self._buckets.get(caller, (self._burst, moment_s))
        return min(self._burst, left + (moment_s - since_s) * self._per_second)

    def _forget(self, moment_s: float) -> None:
        """A bucket that is full again is the same as none. Many that aren't are many peers: all begin anew."""
        full = [caller for caller in self._buckets if self._level(caller, moment_s) >= self._burst]
        for caller in full:
            del self._buckets[caller]
        if not full:
            self._buckets.clear()
