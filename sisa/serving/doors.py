"""Who may ask for what: each route has a door, and a route without one keeps the application from starting.

A door looks the token up in the ledger for each request, so that a revocation holds from the next one on, in every
process. That is done on the event loop, where it takes microseconds; while another process commits, which SQLite would
wait for, it is done in a worker thread.

A door opens before anything else of the request is read. That takes two things which :meth:`Door.seal` checks: each
route names its door (:func:`anyone` for those that need no token), and no route declares a body, because FastAPI would
read and parse it before it asks the door. No answer and no log line repeats what came in a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sisa.errors import BusyError, SisaError
from sisa.ledger import Ledger, Scope, Token
from sisa.serving.limits import RateLimit, Refused, error_body

TOKEN_KEY = "sisa.token"  # noqa: S105 - a name
"""Under this key the ASGI scope of a request holds the id of its token, once the token was found good."""
DAY_S = 86_400
HINT = "Send the header `Authorization: Bearer TOKEN`; `sisa token create` makes one."

Entrance = Callable[[Request], Awaitable[None]]


async def anyone() -> None:
    """Be the door of a route that needs no token."""


class _Turn:
    """Who was let in since an event loop last looked for something new."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self.loop = loop
        self.tokens: dict[bytes, Token] = {}
        """By a digest of their text."""
        self.told: set[asyncio.Task[object] | None] = set()

    def end(self) -> None:
        """Forget them."""
        self.tokens.clear()
        self.told.clear()


class Door:
    """The doors of one application."""

    def __init__(
        self,
        ledger_of: Callable[[], Ledger],
        *,
        open_prediction: bool = False,
        rate: RateLimit | None = None,
        always_waits: bool = False,
    ) -> None:
        """Keep what the doors need.

        Args:
            ledger_of: Returns a ledger that the calling thread may use: the event loop's, or a worker's.
            open_prediction: Whether predictions need no token.
            rate: How often each token (or, without one, each peer) may ask; None for no limit.
            always_waits: Whether looking a token up is a question to a server, which the event loop had better not ask.
        """
        self._always_waits = always_waits
        self._ledger_of = ledger_of
        self._open_prediction = open_prediction
        self._rate = rate
        self._entrances: dict[Scope, Entrance] = {}
        self._days: dict[str, int] = {}
        self._turn = _Turn(None)

    def require(self, scope: Scope) -> Entrance:
        """Return the FastAPI dependency that lets in who may ``scope``: ``dependencies=[Depends(require("read"))]``."""
        if scope not in self._entrances:

            async def entrance(request: Request) -> None:
                await self.enter(request, scope)

            self._entrances[scope] = entrance
        return self._entrances[scope]

    async def enter(self, request: Request, scope: Scope) -> None:
        """Let a request in, and note its token's id for the access log.

        Raises:
            Refused: 401 without a good token, 403 with one for other things, 429 if it came too often.
            StoreError: The ledger can't be read; then nobody gets in.
        """
        is_open = scope == "predict" and self._open_prediction
        text = bearer([str(value, "latin-1") for name, value in request.scope["headers"] if name == b"authorization"])
        if text is None:
            if not is_open:
                raise Refused(401, "this needs a token", hint=HINT, headers={"www-authenticate": "Bearer"})
            caller = f"peer {request.client.host if request.client else ''}"
        else:
            token = await self._identified(text)
            request.scope[TOKEN_KEY] = caller = token.id
            if not (is_open or token.allows(scope)):
                raise _lacking(scope)
        if self._rate is not None:
            self._rate.take(caller)

    async def _identified(self, text: str) -> Token:
        try:
            if self._always_waits:
                raise BusyError("the ledger lies on a server")
            token = self._identified_at_once(text)
        except BusyError:
            token = await run_in_threadpool(self.identify, text)
        today = int(time.time() // DAY_S)
        if self._days.get(token.id) != today:
            self._days[token.id] = today  # tried once a day, and nobody waits for it
            if not token.used_today:
                asyncio.get_running_loop().run_in_executor(None, self._remember_use, token)
        return token

    def _identified_at_once(self, text: str) -> Token:
        """Ask the ledger once for the requests of one turn of the event loop that carry the same token.

        Their heads had come before it was asked, so a token that was revoked before they were sent opens nothing. A task
        that comes again may have waited for a revocation in between: it is not told what it was told before.
        """
        digest, task = hashlib.sha256(text.encode()).digest(), asyncio.current_task()
        loop = asyncio.get_running_loop()
        if self._turn.loop is not loop:  # that loop may have ended in the midst of its turn
            self._turn = _Turn(loop)
        token = self._turn.tokens.get(digest)
        if token is None or task in self._turn.told:
            if not self._turn.tokens:
                loop.call_soon(self._turn.end)
            self._turn.tokens.pop(digest, None)
            token = self._turn.tokens[digest] = self.identify(text, wait=False)
        self._turn.told.add(task)
        return token

    def _remember_use(self, token: Token) -> None:
        with contextlib.suppress(SisaError):  # a day that can't be written is no reason to refuse
            self._ledger_of().tokens.used(token)

    def identify(self, text: str, *, wait: bool = True) -> Token:
        """Return the token that a text is.

        Raises:
            Refused: 401: there is none.
            BusyError: The ledger is being committed to, and ``wait`` is false.
            StoreError: The ledger can't be read.
        """
        token = self._ledger_of().tokens.find(text, wait=wait)
        if token is None:
            challenge = {"www-authenticate": 'Bearer error="invalid_token"'}  # RFC 6750, section 3.1
            raise Refused(401, "the token is not one of this store's, or was revoked", hint=HINT, headers=challenge)
        return token

    def seal(self, app: FastAPI) -> None:
        """Make sure that every route has a door. Call it when all are there.

        Raises:
            RuntimeError: A route has no door, or declares a body.
        """
        doors = {anyone, *self._entrances.values()}
        for context in iter_route_contexts(app.router.routes):
            path = context.path
            if not isinstance(context.original_route, APIRoute):
                raise RuntimeError(f"route {path}: expected one that dependencies apply to")
            if not any(dependency.call in doors for dependency in context.dependant.dependencies):
                raise RuntimeError(f"route {path}: it has no door")
            if context.body_field is not None:
                raise RuntimeError(f"route {path}: a declared body is read before the door is asked")


def bearer(headers: Sequence[str]) -> str | None:
    """Return what the ``Authorization`` headers of a request carry as a bearer token; two headers carry none.

    >>> bearer(["Bearer abc"]), bearer(["Basic abc"]), bearer([])
    ('abc', None, None)
    """
    if len(headers) != 1:
        return None
    scheme, _, text = headers[0].partition(" ")
    return text.strip() if scheme.lower() == "bearer" else None


def _lacking(scope: Scope) -> Refused:
    return Refused(
        403,
        f"the token has not the scope that this needs: {scope}",
        hint=f"Use a token made with --scope {scope} (or admin).",
        headers={"www-authenticate": f'Bearer error="insufficient_scope", scope="{scope}"'},
    )


def answer_in_one_form(app: FastAPI) -> None:
    """Have refusals, unknown paths and wrong parameters answered with ``{"error": {"message", "hint"}}``."""
    app.add_exception_handler(HTTPException, answer_refusal)
    app.add_exception_handler(RequestValidationError, _answer_invalid)


async def answer_refusal(_: Request, error: Exception) -> Response:
    """Return the JSON of a refusal."""
    assert isinstance(error, HTTPException)
    hint = error.hint if isinstance(error, Refused) else ""
    return JSONResponse(error_body(str(error.detail), hint), error.status_code, dict(error.headers or {}))


async def _answer_invalid(_: Request, error: Exception) -> Response:
    """Name the parameters that are wrong, not what came in them."""
    assert isinstance(error, RequestValidationError)
    names = sorted({".".join(map(str, problem["loc"][1:])) for problem in error.errors()})
    return JSONResponse(error_body(f"not understood: {', '.join(names)}", "See the page of the HTTP API."), 422)
