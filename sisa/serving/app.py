"""The aggregator's application: routes, their doors, and what every failure is answered with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from fastapi import Depends, FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Match

from sisa import __version__
from sisa.errors import SisaError, UnknownIdsError, UserError
from sisa.layout import Layout
from sisa.opening import open_store
from sisa.serving import doors, inference, limits, logs, metrics
from sisa.serving.answer import MAX_ROWS, Predictions, json_response
from sisa.serving.deletions import Deletions, unknown_ids
from sisa.serving.measurer import Measurer
from sisa.serving.openapi import describe
from sisa.serving.overview import etag, overview
from sisa.serving.repairer import Repairer
from sisa.serving.replica import LEASE_S, PATIENCE_S, Replica
from sisa.serving.stores import ThreadStores, without_path

Answering = Callable[[], Awaitable[Response]]
PAGE = Path(__file__).parent / "page"
OVERVIEW = "GET /openapi.json says what is served, and how to ask."
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a store is served."""

    layout: Layout
    lease_s: float = LEASE_S
    open_prediction: bool = False
    repairs: bool = True
    """Whether this process retrains after deletions, in the background."""
    executor: str = "auto"
    address: str | None = None
    """A running Ray cluster: repairs train on it, and replicas run on it."""
    max_rows: int = MAX_ROWS
    max_bytes: int = limits.MAX_BODY_BYTES
    max_seconds: float = limits.MAX_SECONDS
    rate_per_second: float | None = None


class Service:
    """What the routes of one process share."""

    def __init__(self, serving: Serving) -> None:
        opened = open_store(serving.layout)
        self.serving = serving
        self.name = serving.layout.name
        self.recipe = opened.recipe
        self.asks_a_server = opened.ledger.database.remote
        opened.close()
        self.stores = ThreadStores(serving.layout)
        self.replica = Replica(serving.layout, lease_s=serving.lease_s)
        self.metrics = metrics.Metrics(self.facts)
        self.repairer = Repairer(serving.layout, executor=serving.executor, address=serving.address)
        self.predictions = Predictions(
            self.recipe,
            self.replica,
            self.metrics,
            max_rows=serving.max_rows,
            patience_s=min(PATIENCE_S, serving.max_seconds / 2),
        )
        self.deletions = Deletions(self.stores, self.repairer)
        self.measurer = Measurer(self.stores, self.replica)

    def facts(self) -> metrics.Facts:
        """Read what Prometheus is told."""
        left_s = self.replica.standing.lease_left_s
        age_s = self.serving.lease_s - left_s if left_s > 0 else None
        return metrics.read_facts(self.stores.get().ledger, lease_age_s=age_s)

    def start(self) -> None:
        """Begin to serve."""
        self.replica.start()
        self.measurer.start()
        if self.serving.repairs:
            self.repairer.start()

    def stop(self) -> None:
        """Stop answering, let go of the lease, and stop a repair that runs."""
        self.measurer.stop()
        self.replica.stop()
        if self.serving.repairs:
            self.repairer.stop()

    async def answer_error(self, _: Request, error: Exception) -> Response:
        """A caller's mistake is 4xx, a store that can't answer now 503; neither ids nor the store's path are repeated."""
        assert isinstance(error, SisaError)
        message, hint = without_path(error.message, self.serving.layout), error.hint or OVERVIEW
        if isinstance(error, UnknownIdsError):
            message = unknown_ids(error)
            hint = 'Check the ids, or send "ignore_missing": true to delete those that are there.'
        status = 404 if isinstance(error, UnknownIdsError) else 422 if isinstance(error, UserError) else 503
        response = json_response(limits.error_body(message, hint), status=status)
        if status == 503:
            response.headers["retry-after"] = "1"
        return response


def create_app(serving: Serving, *, access: TextIO | None = None) -> FastAPI:
    """Make the application that serves a store.

    Args:
        serving: What is served, and how.
        access: Where a line about each request is written; None for nowhere.

    Raises:
        UserError: There is no store.
        StoreError: It is damaged.
    """
    service = Service(serving)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await asyncio.get_running_loop().run_in_executor(None, service.stop)

    app = FastAPI(
        title=f"sisa: {service.name}", version=__version__, openapi_url=None, redirect_slashes=False, lifespan=lifespan
    )
    app.state.service = service
    rate = limits.RateLimit(per_second=serving.rate_per_second) if serving.rate_per_second else None
    door = doors.Door(
        lambda: service.stores.get().ledger,
        open_prediction=serving.open_prediction,
        rate=rate,
        always_waits=service.asks_a_server,
    )
    app.state.door = door
    _add_health(app, service)
    _add_predictions(app, service, door)
    _add_deletions(app, service, door)
    _add_operations(app, service, door)
    door.seal(app)
    doors.answer_in_one_form(app)
    app.add_exception_handler(SisaError, service.answer_error)
    app.add_exception_handler(404, _answer_unknown)
    app.add_exception_handler(405, _answer_method)
    app.add_middleware(limits.BodyLimit, max_bytes=serving.max_bytes)
    app.add_middleware(limits.TimeLimit, max_seconds=serving.max_seconds)
    app.add_middleware(inference.PlainErrors)
    app.state.access = logs.AccessLines(access) if access is not None else None
    app.add_middleware(logs.AccessLog, observe=service.metrics.observe, lines=app.state.access)
    return app


def _add_health(app: FastAPI, service: Service) -> None:
    """Health needs no token: a load balancer has none."""

    async def live() -> Response:
        return json_response({"live": True})

    async def ready() -> Response:
        standing = service.replica.standing
        told = {"ready": not standing.trouble, "version": standing.version, "reason": standing.trouble}
        return json_response(told, status=503 if standing.trouble else 200)

    async def server() -> Response:
        return json_response({"name": "sisa", "version": __version__, "extensions": []})

    for path in ("/livez", "/v2/health/live"):
        _open_to_all(app, path)(live)
    for path in ("/readyz", "/v2/health/ready"):
        _open_to_all(app, path)(ready)
    _open_to_all(app, "/v2")(server)


def _open_to_all(app: FastAPI, path: str) -> Callable[[Answering], Answering]:
    """Return what makes a route of a function: nobody needs a token, and HEAD is answered, which load balancers ask."""
    return app.api_route(path, methods=["GET", "HEAD"], dependencies=[Depends(doors.anyone)])


def _add_predictions(app: FastAPI, service: Service, door: doors.Door) -> None:
    enter = [Depends(door.require("predict"))]

    def named(name: str) -> None:
        if name != service.name:
            raise limits.Refused(404, "there is no model of this name", hint="GET /v2 and see what is served.")

    @app.post("/predict", dependencies=enter)
    async def predict(request: Request) -> Response:
        return await service.predictions.predict(request)

    # Without a version each of these is about the live one; with one, that has to be the live one.
    @app.get("/v2/models/{name}", dependencies=enter)
    @app.get("/v2/models/{name}/versions/{version}", dependencies=enter)
    async def model(name: str, version: str | None = None) -> Response:
        named(name)
        live = service.replica.standing.version
        inference.check_version(version, live)
        return json_response(inference.model_metadata(service.name, service.recipe, version=live))

    @app.get("/v2/models/{name}/ready", dependencies=enter)
    @app.get("/v2/models/{name}/versions/{version}/ready", dependencies=enter)
    async def model_ready(name: str, version: str | None = None) -> Response:
        named(name)
        standing = service.replica.standing
        inference.check_version(version, standing.version)
        told = {"ready": not standing.trouble, "reason": standing.trouble}
        return json_response(told, status=503 if standing.trouble else 200)

    @app.post("/v2/models/{name}/infer", dependencies=enter)
    @app.post("/v2/models/{name}/versions/{version}/infer", dependencies=enter)
    async def infer(name: str, request: Request, version: str | None = None) -> Response:
        named(name)
        return await inference.infer(request, service.name, service.predictions, wanted=version)


def _add_deletions(app: FastAPI, service: Service, door: doors.Door) -> None:
    @app.post("/deletions", dependencies=[Depends(door.require("delete"))], status_code=202)
    async def submit(request: Request) -> Response:
        return await service.deletions.submit(request)

    @app.get("/deletions", dependencies=[Depends(door.require("read"))])
    async def deletions(request: Request) -> Response:
        return json_response(await run_in_threadpool(service.deletions.page, request.query_params))

    @app.get("/deletions/{request_id}", dependencies=[Depends(door.require("read"))])
    async def deletion(request_id: str) -> Response:
        return json_response(await run_in_threadpool(service.deletions.one, request_id))


def _add_operations(app: FastAPI, service: Service, door: doors.Door) -> None:
    read = [Depends(door.require("read"))]

    @app.get("/metrics", dependencies=read)
    def scrape() -> Response:
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)

    @app.get("/state", dependencies=read)
    async def state(request: Request) -> Response:
        told = await run_in_threadpool(lambda: overview(service.stores.get(), lease_s=service.serving.lease_s))
        tag = etag(told)
        if tag in _tags(request):
            return Response(status_code=304, headers={"etag": tag})
        response = json_response(told)
        response.headers["etag"] = tag
        return response

    @_open_to_all(app, "/openapi.json")
    async def openapi() -> Response:
        return json_response(described)

    described: dict[str, Any] = describe(service.name, service.recipe)
    for path, name in (("/", "index.html"), ("/page/style.css", "style.css"), ("/page/app.js", "app.js")):
        _open_to_all(app, path)(_page(PAGE / name))


def _tags(request: Request) -> list[str]:
    """Return the entity tags that a client has; a proxy that packs answers makes weak ones of them."""
    tags = ",".join(request.headers.getlist("if-none-match")).split(",")
    return [tag.strip().removeprefix("W/") for tag in tags]


def _page(path: Path) -> Any:
    headers = {
        "content-security-policy": POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }

    async def page() -> Response:
        return FileResponse(path, headers=headers)

    return page


async def _answer_unknown(_: Request, error: Exception) -> Response:
    """Answer for a path that no route has; a route's own 404 says what it didn't find."""
    if isinstance(error, limits.Refused):
        return json_response(limits.error_body(error.detail, error.hint), status=404)
    return json_response(limits.error_body("nothing is served at this path", OVERVIEW), status=404)


async def _answer_method(request: Request, _: Exception) -> Response:
    """Name every method of the path: it may have several routes, of which the router knows one at a time."""
    found = (route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE)
    allowed = sorted({method for route in found for method in getattr(route, "methods", None) or ()})
    body = limits.error_body(f"expected the method {' or '.join(allowed)} for this path", OVERVIEW)
    response = json_response(body, status=405)
    response.headers["allow"] = ", ".join(allowed)
    return response
