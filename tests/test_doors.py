"""Doors: who gets in. Limits: how large, how slow, how often."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

from sisa.errors import DamagedError, UserError
from sisa.ledger import SCOPES, Ledger
from sisa.ledger.tokens import Tokens
from sisa.serving.doors import TOKEN_KEY, Door, answer_in_one_form, anyone, bearer
from sisa.serving.limits import REMEMBERED, BodyLimit, RateLimit, Refused, TimeLimit


class Kit:
    """A tiny application behind doors."""

    def __init__(self, folder, **options):
        self.path = folder / "ledger.db"
        if not self.path.exists():
            Ledger.create(self.path).close()
        self._local = threading.local()
        self.door = Door(self.ledger, **options)
        self.app = FastAPI(openapi_url=None)
        answer_in_one_form(self.app)
        self.app.add_api_route("/livez", lambda: "fine", dependencies=[Depends(anyone)])
        self.app.add_api_route("/number/{n}", self.number, dependencies=[Depends(anyone)])
        for scope in SCOPES:
            self.app.add_api_route(
                f"/{scope}", self.echo, methods=["GET", "POST"], dependencies=[Depends(self.door.require(scope))]
            )
        self.door.seal(self.app)

    def ledger(self):
        """A ledger for the calling thread."""
        if not hasattr(self._local, "ledger"):
            self._local.ledger = Ledger.open(self.path)
        return self._local.ledger

    def token(self, *scopes):
        return self.ledger().tokens.create(scopes)[0]

    @staticmethod
    async def echo(request: Request):
        return JSONResponse({"bytes": len(await request.body()), "token": request.scope.get(TOKEN_KEY, "")})

    @staticmethod
    async def number(n: int):
        return n

    def ask(self, path, *, token=None, headers=(), app=None, method="GET", **more):
        fields = [*headers, *([("Authorization", f"Bearer {token}")] if token is not None else [])]
        return asyncio.run(ask(app or self.app, method, path, headers=fields, **more))


async def ask(app, method, path, **more):
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return await client.request(method, path, **more)


def assert_refused(answer, status):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.json().keys() == {"error"}
    assert answer.json()["error"].keys() == {"message", "hint"}
    return answer.json()["error"]


@pytest.fixture
def kit(tmp_path):
    return Kit(tmp_path)


# --- doors ---


@pytest.mark.parametrize("scope", SCOPES)
def test_each_door_opens_to_its_scope_and_to_admin(kit, scope):
    for held in SCOPES:
        answer = kit.ask(f"/{scope}", token=kit.token(held))
        if held in {scope, "admin"}:
            assert answer.status_code == 200
            continue
        error = assert_refused(answer, 403)
        assert scope in error["message"]
        assert f"--scope {scope}" in error["hint"]
        assert answer.headers["www-authenticate"] == f'Bearer error="insufficient_scope", scope="{scope}"'


@pytest.mark.parametrize("scope", SCOPES)
def test_nobody_gets_in_without_a_token(kit, scope):
    answer = kit.ask(f"/{scope}")
    assert "token" in assert_refused(answer, 401)["message"]
    assert answer.headers["www-authenticate"] == "Bearer"


def test_health_needs_no_token_and_minds_none(kit):
    assert kit.ask("/livez").status_code == kit.ask("/livez", token="wrong").status_code == 200


def test_an_open_prediction_needs_no_token_and_opens_nothing_else(tmp_path):
    kit = Kit(tmp_path, open_prediction=True)
    assert kit.ask("/predict").json()["token"] == ""
    assert kit.ask("/predict", headers=[("Authorization", "Basic abc")]).status_code == 200
    assert kit.ask("/predict", token=kit.token("read")).json()["token"]
    assert_refused(kit.ask("/predict", token="sisa_wrong"), 401)
    for scope in ("delete", "read", "admin"):
        assert_refused(kit.ask(f"/{scope}"), 401)


def test_wrong_tokens_are_refused_and_not_repeated(kit):
    good = kit.token("read")
    cases = [good[:-1], good + "x", good.swapcase(), "x" * 10_000, "", "sisa_0123456789abcdef_" + "A" * 43, "\t"]
    for wrong in cases:
        answer = kit.ask("/read", token=wrong)
        assert_refused(answer, 401)
        assert not wrong.strip() or wrong not in answer.text + str(answer.headers)
        assert answer.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    twice = [("Authorization", f"Bearer {good}")] * 2
    assert_refused(kit.ask("/read", headers=twice), 401)
    assert_refused(kit.ask("/read", params={"access_token": good, "token": good}), 401)
    assert kit.ask("/read", headers=[("authorization", f"BEARER  {good} ")]).status_code == 200


def test_a_revoked_token_opens_nothing_from_the_next_request_on(kit):
    text = kit.token("read")

    async def before_and_after():
        first = await ask(kit.app, "GET", "/read", headers={"Authorization": f"Bearer {text}"})
        elsewhere = Ledger.open(kit.path)
        elsewhere.tokens.revoke(text)
        elsewhere.close()
        return first, await ask(kit.app, "GET", "/read", headers={"Authorization": f"Bearer {text}"})

    first, second = asyncio.run(before_and_after())
    assert first.status_code == 200
    assert_refused(second, 401)


def test_the_day_of_use_is_remembered_and_nobody_waits_for_it(kit):
    text = kit.token("read")
    assert kit.ask("/read", token=text).status_code == 200
    deadline = time.monotonic() + 10
    while not kit.ledger().tokens.find(text).used_today and time.monotonic() < deadline:
        time.sleep(0.01)
    assert kit.ledger().tokens.find(text).used_today


def test_a_commit_elsewhere_holds_up_its_own_requests_only(kit):
    text = kit.token("read")

    async def beside_a_commit():
        with contextlib.closing(sqlite3.connect(kit.path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            waiting = asyncio.create_task(ask(kit.app, "GET", "/read", headers={"Authorization": f"Bearer {text}"}))
            await asyncio.sleep(0.2)
            alive = await ask(kit.app, "GET", "/livez")
            held_up = not waiting.done()
            other.execute("COMMIT")
        return alive, held_up, await waiting

    alive, held_up, answer = asyncio.run(beside_a_commit())
    assert (alive.status_code, held_up, answer.status_code) == (200, True, 200)


def test_a_ledger_that_cannot_be_read_lets_nobody_in(kit):
    text = kit.token("admin")
    kit.ledger().database.rows("DROP TABLE tokens")
    with pytest.raises(DamagedError):
        kit.ask("/read", token=text)
    assert_refused(kit.ask("/read"), 401)


def inside(app, _):
    router = APIRouter()
    router.add_api_route("/inner", lambda: 1)
    app.include_router(router)


def taking_a_body(body: dict):
    return body


def with_a_body(app, door):
    app.add_api_route("/body", taking_a_body, methods=["POST"], dependencies=[Depends(door.require("delete"))])


def with_the_door_of_another(app, _):
    app.add_api_route("/other", lambda: 1, dependencies=[Depends(Door(Ledger.open).require("read"))])


@pytest.mark.parametrize(
    ("add", "reason"),
    [
        (lambda app, _: app.add_api_route("/open", lambda: 1), "route /open: it has no door"),
        (lambda app, _: app.mount("/files", FastAPI()), "dependencies apply"),
        (lambda app, _: app.add_route("/plain", lambda _: None), "dependencies apply"),
        (lambda app, _: app.add_api_websocket_route("/socket", lambda _: None), "dependencies apply"),
        (inside, "route /inner: it has no door"),
        (with_a_body, "declared body"),
        (with_the_door_of_another, "route /other: it has no door"),
    ],
)
def test_a_route_without_a_door_keeps_the_application_from_starting(kit, add, reason):
    add(kit.app, kit.door)
    with pytest.raises(RuntimeError, match=reason):
        kit.door.seal(kit.app)


def test_the_pages_of_the_framework_are_routes_too(kit):
    with pytest.raises(RuntimeError, match="openapi"):
        kit.door.seal(FastAPI())


def test_routes_of_a_router_may_have_its_door(kit):
    router = APIRouter()
    router.add_api_route("/inner", lambda: 1)
    kit.app.include_router(router, dependencies=[Depends(kit.door.require("read"))])
    kit.door.seal(kit.app)
    assert_refused(kit.ask("/inner"), 401)
    assert kit.ask("/inner", token=kit.token("read")).status_code == 200


def test_every_failure_has_one_form_and_repeats_no_value(kit):
    assert_refused(kit.ask("/nowhere/alice"), 404)
    assert_refused(kit.ask("/livez", method="POST"), 405)
    answer = kit.ask("/number/alice")
    assert "n" in assert_refused(answer, 422)["message"]
    assert "alice" not in answer.text


@pytest.mark.parametrize(
    ("headers", "text"),
    [
        ([], None), (["Basic x"], None), (["Bearer"], ""), (["Bearer x"], "x"), (["bearer  x "], "x"),
        (["Bearer x", "Bearer x"], None), (["Bearerx"], None),
    ],
)  # fmt: skip
def test_what_a_header_carries(headers, text):
    assert bearer(headers) == text


# --- how often ---


def test_a_bucket_lets_a_burst_through_and_then_the_rate():
    moment = [0.0]
    limit = RateLimit(per_second=0.5, burst=3, clock=lambda: moment[0])
    for _ in range(3):
        limit.take("a")
    with pytest.raises(Refused) as caught:
        limit.take("a")
    assert caught.value.headers == {"retry-after": "2"}
    limit.take("b")
    moment[0] = 1.9
    with pytest.raises(Refused):
        limit.take("a")
    moment[0] = 2.0
    limit.take("a")
    with pytest.raises(Refused):
        limit.take("a")
    moment[0] = 1e6
    for _ in range(3):
        limit.take("a")
    with pytest.raises(Refused):
        limit.take("a")


def test_buckets_do_not_pile_up():
    moment = [0.0]
    limit = RateLimit(per_second=1, clock=lambda: moment[0])
    for peer in range(3 * REMEMBERED):
        moment[0] += 0.001
        limit.take(f"peer {peer}")
    assert len(limit._buckets) <= REMEMBERED


@pytest.mark.parametrize("rate", [0, -1, float("inf"), float("nan")])
def test_a_rate_is_a_positive_number(rate):
    with pytest.raises(UserError, match="positive number"):
        RateLimit(per_second=rate)


def test_a_token_that_asks_too_often_is_told_when_to_come_again(tmp_path):
    kit = Kit(tmp_path, rate=RateLimit(per_second=0.01, burst=2), open_prediction=True)
    busy, calm = kit.token("read"), kit.token("read")
    assert [kit.ask("/read", token=busy).status_code for _ in range(2)] == [200, 200]
    answer = kit.ask("/read", token=busy)
    assert_refused(answer, 429)
    assert int(answer.headers["retry-after"]) > 50
    guessed = f"{busy[:-8]}AAAAAAAA"
    for _ in range(5):  # who knows only the id can't use up what the token has
        assert_refused(kit.ask("/read", token=guessed), 401)
    assert kit.ask("/read", token=calm).status_code == 200
    assert [kit.ask("/predict").status_code for _ in range(3)] == [200, 200, 429]
    assert kit.ask("/livez").status_code == 200


# --- how large ---


async def chunks(*sizes):
    for size in sizes:
        yield b"x" * size


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (lambda: b"", 200),
        (lambda: b"x" * 1000, 200),
        (lambda: b"x" * 1001, 413),
        (lambda: chunks(500, 500), 200),
        (lambda: chunks(500, 500, 1), 413),
        (lambda: chunks(10_000), 413),
    ],
)
def test_a_body_has_a_limit_with_and_without_a_length(kit, content, status):
    token = kit.token("read")
    answer = kit.ask("/read", app=BodyLimit(kit.app, max_bytes=1000), method="POST", token=token, content=content())
    assert answer.status_code == status
    if status == 413:
        assert "1,000 bytes" in assert_refused(answer, 413)["message"]


def test_a_large_body_is_not_read_to_its_end(kit):
    sent = []

    async def endless():
        while True:
            sent.append(1)
            yield b"x" * 100

    app = BodyLimit(kit.app, max_bytes=1000)
    assert_refused(kit.ask("/read", app=app, method="POST", token=kit.token("read"), content=endless()), 413)
    assert len(sent) < 15


def test_a_large_body_is_refused_whatever_the_application_makes_of_it():
    async def swallowing(scope, receive, send):
        with contextlib.suppress(Exception):
            while (await receive()).get("more_body"):
                pass
        await JSONResponse({"fine": True})(scope, receive, send)

    async def failing(_, receive, __):
        try:
            while (await receive()).get("more_body"):
                pass
        except Refused:
            raise ValueError("unreadable") from None

    for app in (swallowing, failing):
        limited = BodyLimit(app, max_bytes=10)
        answer = asyncio.run(ask(limited, "POST", "/", content=chunks(8, 8)))
        assert_refused(answer, 413)


# --- how slow ---


def test_a_slow_answer_is_503_and_a_slow_body_408():
    async def computing(_, receive, __):
        while (await receive()).get("more_body"):
            pass
        await asyncio.sleep(30)

    async def trickle():
        yield b"x"
        await asyncio.sleep(30)
        yield b"x"

    def wait_for(content):
        started = time.monotonic()
        answer = asyncio.run(asgi(TimeLimit(computing, max_seconds=0.2), content))
        assert time.monotonic() - started < 5
        return answer

    assert wait_for(chunks(1, 1)) == 503
    assert wait_for(trickle()) == 408


async def asgi(app, content):
    """Call an application with a body that comes while it is awaited (httpx would read it first); the status."""
    sent = []
    source = aiter(content)

    async def receive():
        body = await anext(source, None)
        return {"type": "http.request", "body": body or b"", "more_body": body is not None}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"transfer-encoding", b"chunked")]}
    await app(scope, receive, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    return sent[0]["status"]


def test_work_in_a_thread_is_answered_in_time_and_ends_whole():
    done = threading.Event()
    app = FastAPI(openapi_url=None)

    @app.get("/")
    def slow():
        time.sleep(0.6)
        done.set()

    async def timed():
        started = time.monotonic()
        answer = await ask(TimeLimit(app, max_seconds=0.2), "GET", "/")
        return answer, time.monotonic() - started

    answer, seconds = asyncio.run(timed())
    assert_refused(answer, 503)
    assert answer.headers["retry-after"] == "1"
    assert seconds < 0.55
    assert done.wait(5)


def test_a_timeout_of_the_application_itself_is_not_taken_for_ours(kit):
    async def failing(*_):
        raise TimeoutError("theirs")

    with pytest.raises(TimeoutError, match="theirs"):
        kit.ask("/", app=TimeLimit(failing, max_seconds=5))


def test_an_answer_that_began_is_cut_off():
    async def parts():
        yield b"x"
        await asyncio.sleep(30)

    async def slow(scope, receive, send):
        await StreamingResponse(parts())(scope, receive, send)

    with pytest.raises(TimeoutError):
        asyncio.run(ask(TimeLimit(slow, max_seconds=0.2), "GET", "/"))


def test_a_client_that_leaves_is_no_timeout_and_nothing_is_left_on_the_event_loop():
    async def waiting(*_):
        await asyncio.sleep(30)

    async def left():
        limited = TimeLimit(waiting, max_seconds=20)
        asked = [asyncio.create_task(limited({"type": "http", "headers": []}, None, None)) for _ in range(3)]
        await asyncio.sleep(0)
        for task in asked:
            task.cancel()
        ended = await asyncio.gather(*asked, return_exceptions=True)
        return ended, asyncio.get_running_loop()._scheduled

    ended, timers = asyncio.run(left())
    assert [type(error) for error in ended] == [asyncio.CancelledError] * 3
    assert all(timer.cancelled() for timer in timers)


def test_each_request_has_its_own_time():
    async def sleeping(scope, _, __):
        await asyncio.sleep(scope["seconds"])

    async def several():
        limited = TimeLimit(sleeping, max_seconds=0.4)
        sent = {name: [] for name in "abc"}

        async def ask_for(name, seconds):
            async def send(message):
                sent[name].append(message)

            await limited({"type": "http", "headers": [], "seconds": seconds}, None, send)

        first = asyncio.create_task(ask_for("a", 30))
        await asyncio.sleep(0.2)
        await asyncio.gather(first, ask_for("b", 30), ask_for("c", 0.01))
        return sent

    sent = asyncio.run(several())
    assert [sent[name][0]["status"] if sent[name] else None for name in "abc"] == [503, 503, None]


def test_the_ledger_is_asked_once_a_turn_and_in_the_next_a_revoked_token_is_refused(kit, monkeypatch):
    text = kit.token("read")
    asked = []
    whole = Tokens.find
    monkeypatch.setattr(Tokens, "find", lambda self, text, **more: asked.append(1) or whole(self, text, **more))
    door = Door(kit.ledger)

    async def enter():
        await door.enter(Request({"type": "http", "headers": [(b"authorization", f"Bearer {text}".encode())]}), "read")

    async def before_and_after():
        await asyncio.gather(*(enter() for _ in range(5)))
        elsewhere = Ledger.open(kit.path)
        elsewhere.tokens.revoke(text)
        elsewhere.close()
        return await asyncio.gather(*(enter() for _ in range(5)), return_exceptions=True)

    refused = asyncio.run(before_and_after())
    assert [error.status_code for error in refused] == [401] * 5
    assert len(asked) == 1 + 5  # who isn't let in is asked for again


def test_a_turn_that_never_ended_lets_nobody_in_later(kit):
    text = kit.token("read")
    kit.ledger().tokens.used(kit.ledger().tokens.find(text))  # else a thread would write that, beside the loop
    door = Door(kit.ledger)
    request = Request({"type": "http", "headers": [(b"authorization", f"Bearer {text}".encode())]})

    async def interrupted():
        await door.enter(request, "read")
        raise KeyboardInterrupt

    loop = asyncio.new_event_loop()
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(interrupted())
    loop.close()
    kit.ledger().tokens.revoke(text)
    with pytest.raises(Refused):
        asyncio.run(door.enter(request, "read"))
