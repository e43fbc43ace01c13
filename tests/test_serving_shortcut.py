"""Predictions by the short way and by the usual one: the same door, the same answers, the same refusals."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crash_kit as kit
import httpx
import pytest

from sisa.layout import Layout
from sisa.serving.app import Serving, create_app
from sisa.serving.replica import wait_until_serving
from sisa.serving.shortcut import Shortcut

ROW = {"x": 0.5, "z": -1.0}
GOOD = json.dumps({"rows": [ROW, ROW]}).encode()
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Any, Any, dict[str, str]]]:
    """The application with the shortcut and without it, and a token for each scope."""
    with kit.fast_folder() as folder:
        store = kit.trained(kit.make_recipe(folder, kit.people(12)), folder / "store")
        tokens = {scope: store.opened.ledger.tokens.create([scope])[0] for scope in ("predict", "read")}
        store.close()
        app = create_app(Serving(layout=Layout(Path(folder / "store")), repairs=False, max_rows=3, max_bytes=2_000))
        service = app.state.service
        service.start()
        wait_until_serving(service.replica, timeout_s=60)
        yield Shortcut(app), app, tokens
        service.stop()


def asked(app: Any, method: str, headers: dict[str, str], body: bytes) -> tuple[int, str, Any]:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, "/predict", headers=headers, content=body)

    answer = asyncio.run(ask())
    return answer.status_code, answer.headers["content-type"], answer.json()


@pytest.mark.parametrize(
    ("method", "scope", "headers", "body", "status"),
    [
        ("POST", "predict", JSON, GOOD, 200),
        ("POST", "predict", {}, GOOD, 200),
        ("POST", "predict", JSON, json.dumps({"rows": []}).encode(), 200),
        ("POST", "predict", JSON, json.dumps({"rows": [{"x": 1}]}).encode(), 422),
        ("POST", "predict", JSON, json.dumps({"rows": [ROW] * 4}).encode(), 413),
        ("POST", "predict", JSON, b" " * 3_000, 413),
        ("POST", "predict", JSON, b"{", 400),
        ("POST", "predict", {"content-type": "text/csv"}, GOOD, 415),
        ("POST", "read", JSON, GOOD, 403),
        ("POST", "", JSON, GOOD, 401),
        ("GET", "predict", {}, b"", 405),
    ],
)
def test_both_ways_answer_alike(
    both: tuple[Any, Any, dict[str, str]], *, method: str, scope: str, headers: dict[str, str], body: bytes, status: int
) -> None:
    short, usual, tokens = both
    if scope:
        headers = {**headers, "authorization": f"Bearer {tokens[scope]}"}
    answer = asked(short, method, headers, body)
    assert answer == asked(usual, method, headers, body)
    assert answer[0] == status


def test_requests_that_arrive_together_are_answered_each_with_its_own(both: tuple[Any, Any, dict[str, str]]) -> None:
    short, _, tokens = both
    headers = {**JSON, "authorization": f"Bearer {tokens['predict']}"}
    bodies = [{"rows": [{"x": float(i), "z": 0.0}] * (1 + i % 3)} for i in range(40)]
    bodies[7] = {"rows": [ROW, {"x": "no number", "z": 0.0}]}

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=short), base_url="http://here") as client:
            return await asyncio.gather(*(client.post("/predict", headers=headers, json=body) for body in bodies))

    answers = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [422 if i == 7 else 200 for i in range(40)]
    assert answers[7].json()["error"]["message"].startswith("rows[1].x: expected a number")
    for index, (body, answer) in enumerate(zip(bodies, answers, strict=True)):
        if index != 7:
            alone = asked(short, "POST", headers, json.dumps(body).encode())[2]
            assert answer.json()["predictions"] == alone["predictions"]
            assert len(answer.json()["scores"]) == len(body["rows"])
