"""Metrics and access logs: what is told, and that nothing else is."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from cli_kit import surroundings
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import Response, StreamingResponse

from sisa.errors import DamagedError
from sisa.ledger import STATES, Ledger, Partition, StageRow, Target
from sisa.serving.doors import TOKEN_KEY
from sisa.serving.logs import AccessLines, AccessLog, BrokenAnswerError, Exchange, JsonLines
from sisa.serving.metrics import CONTENT_TYPE, Facts, Metrics, read_facts

SHARDS, SLICES = 3, 2
FACTS = Facts(
    version=7, constituents={"live": 2, "absent": 1}, deletions={"repaired": 4}, oldest_open_s=12.5, lease_age_s=0.25
)
SECRETS = ["alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi", "ivan", "judy"]
"""Each comes in by another way; none may come out."""


def samples(metrics):
    """Each sample by name and labels, as a scraper reads it."""
    families = text_string_to_metric_families(metrics.text().decode())
    return {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}


def exchange(**changes):
    values = {"method": "GET", "route": "/", "status": 200, "seconds": 0.1, "sent_bytes": 1, "token": ""}
    return Exchange(**{**values, **changes})


@pytest.fixture
def ledger(tmp_path):
    """A ledger of a trained store, version 1 live."""
    made = Ledger.create(tmp_path / "ledger.db")
    made.partitions.replace_all([Partition(k, s, 5, 5, "m") for k in range(SHARDS) for s in range(SLICES + 1)])
    for shard in range(SHARDS):
        for stage in range(1, SLICES + 1):
            parent = f"{shard}-{stage - 1}" if stage > 1 else ""
            row = StageRow(f"{shard}-{stage}", "p", "c", shard, stage, parent, 5, "s", "f", "w", 1.0, "t")
            assert made.stages.enter(row, changes={})
    made.versions.publish_newest(cause="train", shards=SHARDS, code="c", platform="p")
    return made


# --- metrics ---


def test_where_the_store_stands_is_read_at_each_scrape():
    facts = [FACTS]
    metrics = Metrics(lambda: facts[0])
    found = samples(metrics)
    assert found["sisa_ledger_readable",] == 1
    assert found["sisa_version",] == 7
    assert found["sisa_oldest_open_deletion_age_seconds",] == 12.5
    assert found["sisa_lease_age_seconds",] == 0.25
    states = {key[1][1]: value for key, value in found.items() if key[0] == "sisa_constituents"}
    assert states == {"live": 2, "quarantined": 0, "absent": 1}
    states = {key[1][1]: value for key, value in found.items() if key[0] == "sisa_deletions"}
    assert states == {**dict.fromkeys(STATES, 0), "repaired": 4}
    facts[0] = Facts(version=8, constituents={}, deletions={}, oldest_open_s=0)
    found = samples(metrics)
    assert found["sisa_version",] == 8
    assert ("sisa_lease_age_seconds",) not in found


def test_nothing_is_read_before_the_first_scrape():
    Metrics(lambda: pytest.fail("read"))


def test_a_ledger_that_cannot_be_read_costs_no_other_metric():
    def broken():
        raise DamagedError("gone")

    metrics = Metrics(broken)
    metrics.observe(exchange())
    found = samples(metrics)
    assert found["sisa_ledger_readable",] == 0
    assert not [key for key in found if key[0] == "sisa_version"]
    assert [value for key, value in found.items() if key[0] == "sisa_http_request_seconds_count"] == [1]


def test_times_are_by_template_and_status():
    metrics = Metrics(lambda: FACTS)
    for seconds in (0.002, 0.3):
        metrics.observe(exchange(route="/deletions/{id}", seconds=seconds))
    metrics.observe(exchange(route="/deletions/{id}", status=404))
    found = samples(metrics)
    labels = (("method", "GET"), ("route", "/deletions/{id}"), ("status", "200"))
    assert found["sisa_http_request_seconds_count", *labels] == 2
    assert found["sisa_http_request_seconds_sum", *labels] == pytest.approx(0.302)
    assert found["sisa_http_request_seconds_bucket", ("le", "0.0025"), *labels] == 1
    assert found["sisa_http_request_seconds_count", *labels[:2], ("status", "404")] == 1


def test_answers_are_counted_by_path_of_evaluation():
    metrics = Metrics(lambda: FACTS)
    for rows in (3, 4):
        metrics.answered("stacked", rows=rows)
    found = samples(metrics)
    assert (found["sisa_answers_total", ("path", "stacked")], found["sisa_answered_rows_total", ("path", "stacked")]) == (2, 7)  # fmt: skip


def test_two_processes_of_one_test_have_registries_of_their_own():
    one, other = Metrics(lambda: FACTS), Metrics(lambda: FACTS)
    one.answered("stacked", rows=1)
    assert ("sisa_answers_total", ("path", "stacked")) not in samples(other)
    assert CONTENT_TYPE.startswith("text/plain")


def test_facts_follow_a_deletion(ledger):
    facts = read_facts(ledger, lease_age_s=1.5)
    assert (facts.version, facts.constituents, facts.deletions) == (1, {"live": 3}, {})
    assert (facts.oldest_open_s, facts.lease_age_s) == (0, 1.5)
    accepted = ledger.requests.accept([Target("subject", b"a" * 16, ((0, 1), (1, 2)))], reason="")
    facts = read_facts(ledger)
    assert facts.version == 2
    assert facts.constituents == {"live": 1, "quarantined": 1, "absent": 1}
    assert facts.deletions == {"accepted": 1}
    assert 0 <= facts.oldest_open_s < 60
    long_ago = (datetime.now(UTC) - timedelta(days=31)).isoformat(timespec="milliseconds")
    ledger.database.rows("UPDATE requests SET created_at = ?", (long_ago,))
    assert read_facts(ledger).oldest_open_s == pytest.approx(31 * 86400, abs=60)
    ledger.requests.advance(accepted.request.id, "repaired")
    facts = read_facts(ledger)
    assert (facts.deletions, facts.oldest_open_s) == ({"repaired": 1}, 0)


def test_facts_of_a_store_that_was_never_trained(tmp_path):
    facts = read_facts(Ledger.create(tmp_path / "ledger.db"))
    assert (facts.version, facts.constituents, facts.deletions, facts.oldest_open_s) == (0, {}, {}, 0)


# --- logs, in this process ---


def served(app, method, path, *, lines=None, **more):
    """Ask through an access log; return the answer and what was observed."""
    seen = []
    if isinstance(app, FastAPI):
        app.add_middleware(AccessLog, observe=seen.append, lines=lines)
    else:
        app = AccessLog(app, observe=seen.append, lines=lines)

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path, **more)

    answer = asyncio.run(ask())
    (one,) = seen
    return answer, one


def tiny():
    app = FastAPI(openapi_url=None)

    @app.get("/people/{person}")
    async def person(person: str):
        return Response(person * 10)

    @app.get("/broken")
    async def broken():
        raise ValueError("alice")

    return app


def test_an_access_line_has_its_fields_and_no_others():
    stream = io.StringIO()
    lines, headers = AccessLines(stream), {"User-Agent": "carol"}
    answer, seen = served(tiny(), "GET", "/people/alice?q=bob", lines=lines, headers=headers)
    assert (seen.method, seen.route, seen.status, seen.sent_bytes) == ("GET", "/people/{person}", 200, 50)
    assert len(answer.content) == 50
    line = json.loads(stream.getvalue())
    assert line.keys() == {"time", "method", "route", "status", "milliseconds", "bytes", "token"}
    assert datetime.fromisoformat(line["time"]).tzinfo is not None
    assert (line["route"], line["status"], line["bytes"], line["token"]) == ("/people/{person}", 200, 50, "")
    assert line["milliseconds"] == pytest.approx(seen.seconds * 1000, abs=0.001)


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/alice", ("GET", "unknown", 404)),
        ("POST", "/people/alice", ("POST", "/people/{person}", 405)),
        ("ALICE", "/people/alice", ("unknown", "/people/{person}", 405)),
        ("GET", "/people/alice/", ("GET", "unknown", 307)),
    ],
)
def test_what_no_route_has_is_unknown(method, path, expected):
    _, seen = served(tiny(), method, path)
    assert (seen.method, seen.route, seen.status) == expected


def test_a_fault_is_answered_in_form_and_logged_without_its_text(caplog):
    answer, seen = served(tiny(), "GET", "/broken")
    assert (answer.status_code, seen.status) == (500, 500)
    assert answer.json()["error"].keys() == {"message", "hint"}
    (record,) = (record for record in caplog.records if record.name == "sisa.faults")
    line = json.loads(JsonLines().format(record))
    assert line["message"] == "ValueError"
    assert any(place.endswith(" broken") for place in line["places"])
    assert "alice" not in json.dumps(line) + answer.text


def test_an_answer_that_fails_half_way_is_cut_without_the_reason():
    async def parts():
        yield b"x"
        raise ValueError("alice")

    async def failing(scope, receive, send):
        await StreamingResponse(parts())(scope, receive, send)

    with pytest.raises(BrokenAnswerError) as caught:
        served(failing, "GET", "/")
    assert caught.value.__suppress_context__


def test_the_token_is_named_by_its_id():
    async def behind_a_door(scope, receive, send):
        scope[TOKEN_KEY] = "0123456789abcdef"
        await Response()(scope, receive, send)

    assert served(behind_a_door, "GET", "/")[1].token == "0123456789abcdef"


def test_requests_that_end_in_one_turn_each_have_a_line_and_a_log_that_is_gone_stops_nothing():
    stream = io.StringIO()
    lines = AccessLines(stream)

    async def three():
        for number in range(3):
            lines.add(Exchange("GET", "/", 200 + number, 0.001, 1, ""))
        await asyncio.sleep(0)

    asyncio.run(three())
    assert [json.loads(line)["status"] for line in stream.getvalue().splitlines()] == [200, 201, 202]
    stream.close()
    asyncio.run(three())


def test_a_client_that_left_is_told_apart():
    seen = []

    async def waiting(*_):
        await asyncio.sleep(30)

    async def leave():
        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        task = asyncio.create_task(AccessLog(waiting, observe=seen.append)(scope, None, None))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    assert [one.status for one in seen] == [499]


def test_of_a_message_only_the_first_line_is_written_and_of_an_exception_its_type():
    try:
        raise ValueError("alice")
    except ValueError:
        record = logging.LogRecord("asyncio", logging.ERROR, "f", 1, "%s\n%s", ("never", "bob"), sys.exc_info())
    line = json.loads(JsonLines().format(record))
    assert (line["message"], line["exception"]) == ("never", "ValueError")
    assert "alice" not in json.dumps(line)


# --- logs, of a server ---

PROGRAM = """
import asyncio, socket, sys
from pathlib import Path
import uvicorn
from fastapi import Depends, FastAPI
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from sisa.ledger import Ledger
from sisa.serving.doors import Door, answer_in_one_form, anyone
from sisa.serving.limits import BodyLimit, TimeLimit
from sisa.serving.logs import AccessLines, AccessLog, log_config

ledger = Ledger.open(Path(sys.argv[1]))
door = Door(lambda: ledger)
app = FastAPI(openapi_url=None)
app.add_middleware(BodyLimit, max_bytes=100_000)
app.add_middleware(TimeLimit, max_seconds=20)
app.add_middleware(AccessLog, lines=AccessLines(sys.stderr))
answer_in_one_form(app)

async def person(person: str): return Response("fine")
async def number(number: int): return Response("fine")
async def broken(request: Request): raise ValueError((await request.body()).decode())
async def half():
    async def parts():
        yield b"x"
        raise ValueError("judy")
    return StreamingResponse(parts())
async def forgotten(request: Request):
    text = (await request.body()).decode()
    async def failing(): raise ValueError(text)
    asyncio.get_running_loop().create_task(failing())
    await asyncio.sleep(0.05)
    import gc; gc.collect()
    return Response("fine")

app.add_api_route("/people/{person}", person, dependencies=[Depends(door.require("read"))])
app.add_api_route("/numbers/{number}", number, dependencies=[Depends(anyone)])
app.add_api_route("/broken", broken, methods=["POST"], dependencies=[Depends(door.require("read"))])
app.add_api_route("/half", half, dependencies=[Depends(anyone)])
app.add_api_route("/forgotten", forgotten, methods=["POST"], dependencies=[Depends(anyone)])
door.seal(app)
listening = socket.socket()
listening.bind(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config(app, log_config=log_config(), access_log=False, ws="none")).run(sockets=[listening])
"""


@pytest.fixture
def server(tmp_path):
    """A server in a process of its own: its address, a ledger, and a way to end it and read what it wrote."""
    ledger = Ledger.create(tmp_path / "ledger.db")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with subprocess.Popen(
        [sys.executable, program, ledger.database.path], env=surroundings(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        port = int(running.stdout.readline())

        def written():
            running.terminate()
            return running.communicate(timeout=30)[1]

        try:
            yield f"http://127.0.0.1:{port}", ledger, written
        finally:
            running.kill()


def test_a_server_writes_no_value_of_any_request(server):
    address, ledger, written = server
    text, token = ledger.tokens.create(["read"])
    good = {"Authorization": f"Bearer {text}"}
    with httpx.Client(base_url=address, timeout=20) as client:
        _wait_for(client)
        assert client.get("/people/alice?who=bob", headers={**good, "X-Who": "carol"}).status_code == 200
        assert client.get("/people/alice", headers={"Authorization": "Bearer sisa_dave"}).status_code == 401
        assert client.get("/erin/frank").status_code == 404
        assert client.get("/numbers/grace").status_code == 422
        assert client.post("/broken", content="heidi", headers=good).status_code == 500
        assert client.post("/forgotten", content="ivan").status_code == 200
        assert client.post("/broken", content=b"heidi" * 40_000, headers=good).status_code == 413
        assert client.post("/broken", content=(b"heidi" * 4_000 for _ in range(20)), headers=good).status_code == 413
        with pytest.raises(httpx.RemoteProtocolError):
            client.get("/half")
        ledger.tokens.revoke(token.id)  # by another process than the server's
        assert client.get("/people/alice", headers=good).status_code == 401
    err = written()
    assert not [secret for secret in [*SECRETS, text, text[22:]] if secret in err], err
    lines = [json.loads(line) for line in err.splitlines()]
    access = [(line["route"], line["status"], line["token"]) for line in lines if "milliseconds" in line]
    assert [line for line in access if line[0] != "/numbers/{number}" or line[1] != 200] == [
        ("/people/{person}", 200, token.id),
        ("/people/{person}", 401, ""),
        ("unknown", 404, ""),
        ("/numbers/{number}", 422, ""),
        ("/broken", 500, token.id),
        ("/forgotten", 200, ""),
        ("unknown", 413, ""),
        ("/broken", 413, token.id),
        ("/half", 200, ""),
        ("/people/{person}", 401, ""),
    ]
    assert {line["message"] for line in lines if line.get("logger") == "sisa.faults"} == {"ValueError"}
    assert any(line.get("logger") == "asyncio" and line["exception"] == "ValueError" for line in lines)


def _wait_for(client):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            client.get("/numbers/1")
        except httpx.ConnectError:
            time.sleep(0.05)
        else:
            return
