"""The operator's page in a real browser: a browser fixture, an accessibility check, and a server that plays a store.

``FakeServer`` serves the page's three files under the policy that the page promises to keep, and a state that only
moves when a test says so (``advance``): what a person sees between two steps can be looked at for as long as it takes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Playwright

PAGE = Path(__file__).resolve().parent.parent / "sisa" / "serving" / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/app.js": ("app.js", "text/javascript; charset=utf-8"),
}
TOKEN = "reads-and-deletes"
READER = "reads-only"
STATES = ("accepted", "rows_erased", "stages_purged", "repairing", "repaired")
WIDE, NARROW = 1280, 400
PATIENCE_MS = 15_000
"""How long a test waits for the page: a loaded machine is slow, a broken page is slow for ever."""


# --- The browser ---------------------------------------------------------------------------------


def _absent() -> str:
    """Why no browser can be driven here; nothing if one can."""
    for module in ("playwright", "axe_playwright_python"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = _executable_of(driver)
    return "" if found else "no Chromium found; `playwright install chromium` fetches one, SISA_CHROMIUM names another"


def _executable_of(driver: Playwright) -> str | None:
    """The browser that was named, the one that Playwright fetched, or one that the system has."""
    own = driver.chromium.executable_path
    names = (os.environ.get("SISA_CHROMIUM"), own, "chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def demand(absent: str) -> None:
    """Skip the test for this reason, if there is one; in CI, which has to have a browser, fail it."""
    if absent and os.environ.get("CI"):
        pytest.fail(f"CI checks the page in a browser, but {absent}")
    if absent:
        pytest.skip(absent)


# Of a module, not of the session: a module that wants the browser takes the fixture by name (``browser =
# page_kit.browser``) and has then one of its own, and two drivers can't run in one thread at the same time.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    demand(_absent())
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # Without a sandbox, since containers often forbid one: the browser only ever opens our own page.
        started = driver.chromium.launch(executable_path=_executable_of(driver), args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def opened(
    browser: Browser, address: str, *, width: int = WIDE, scheme: str = "light", bypass_csp: bool = False
) -> Iterator[Page]:
    """Open the page in a fresh context; leaving it fails the test if the console saw an error or the policy a breach.

    What the browser itself logs about an answer of 400 and more, or about none, is left out: tests ask for those.
    """
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce", bypass_csp=bypass_csp
    )
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(f"uncaught: {error}"))
    page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
    try:
        page.goto(address)
        yield page
        told = [line for line in wrong if "Failed to load resource" not in line]
        assert not told, told
    finally:
        context.close()


def sign_in(page: Page, token: str = TOKEN) -> None:
    """Give the token, and wait for the board."""
    page.get_by_label("Access token").fill(token)
    page.get_by_role("button", name="Sign in").click()
    page.locator("#board").wait_for()


def check_accessible(page: Page) -> None:
    """Hold what the page shows now against axe's rules. The page needs a context with ``bypass_csp=True``.

    Raises:
        AssertionError: A rule is violated; each is named with the elements that do.
    """
    from axe_playwright_python.sync_playwright import Axe

    violations = Axe().run(page).response["violations"]
    told = [f"{rule['id']}: {rule['help']}: {[node['html'] for node in rule['nodes'][:3]]}" for rule in violations]
    assert not told, "\n".join(told)


# --- The store that the server plays --------------------------------------------------------------


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass
class FakeStore:
    """A store that answers like a real one, and in which deletions move when they are told to."""

    shards: int = 4
    slices: int = 3
    versions: list[dict[str, Any]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    posts: list[dict[str, Any]] = field(default_factory=list)
    """The bodies of the deletions that were asked for, with their idempotency keys."""
    known: Callable[[str], bool] = lambda id_: not id_.startswith("nobody")
    _out: dict[tuple[int, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._publish("train", accuracy=0.9781)

    def _publish(self, cause: str, *, accuracy: float | None, request: str | None = None) -> int:
        number = len(self.versions) + 1
        voters = self.shards - len({shard for shard, _ in self._out})
        version = {"number": number, "created_at": _text(_now()), "cause": cause, "request": request}
        self.versions.append({**version, "voters": voters, "accuracy": accuracy})
        return number

    @property
    def version(self) -> int:
        return self.versions[-1]["number"]

    def accept(self, body: dict[str, Any], key: str) -> dict[str, Any]:
        """Accept a deletion as the service does: what saw the people is out of service when this returns."""
        repeated = next((r for r in self.requests if r["key"] == key), None)
        self.posts.append({**body, "key": key})
        ids = body.get("subjects") or body.get("records") or []
        request = repeated or self._accepted(body, ids, key)
        return {
            "request": request["request"],
            "requests": [request["request"]],
            "state": request["state"],
            "version_quarantine": request["version_quarantine"],
            "missing": [],
            "repeated": repeated is not None,
        }

    def _accepted(self, body: dict[str, Any], ids: list[str], key: str) -> dict[str, Any]:
        identifier = f"del-{len(self.requests):016x}"
        shard, stage = 1 % self.shards, min(2, self.slices)
        before = self.version
        self._out.update({(shard, s): "quarantined" for s in range(stage, self.slices + 1)})
        version = self._publish("quarantine", accuracy=0.9612, request=identifier)
        at = _now()
        due = {"gdpr": timedelta(days=30), "ccpa": timedelta(days=45)}.get(body.get("regime", ""))
        request = {
            "request": identifier, "state": "accepted", "created_at": _text(at), "updated_at": _text(at),
            "reason": body.get("reason", ""), "regime": body.get("regime", ""), "due_at": _text(at + due) if due else None,
            "subjects": len(ids) if "subjects" in body else 0, "records": 3 * len(ids), "shards": [shard],
            "slices": [stage], "stages_retrained": 0, "version_before": before, "version_quarantine": version,
            "version_after": None, "seconds_to_quarantine": 0.0414, "note": "",
            "key": key, "timeline": [{"at": _text(at), "what": "accepted"}], "purged": [], "retrained": [],
        }  # fmt: skip
        self.requests.append(request)
        return request

    def advance(self) -> str:
        """Move the oldest open deletion on by one state, and return that state."""
        request = next(r for r in self.requests if r["state"] != "repaired")
        request["state"] = state = STATES[STATES.index(request["state"]) + 1]
        request["updated_at"] = at = _text(_now())
        places = sorted(self._out)
        if state == "stages_purged":
            request["purged"] = [{"shard": shard, "stage": stage, "at": at} for shard, stage in places]
            what = [f"stage {stage} of shard {shard} purged" for shard, stage in places]
        elif state == "repairing":
            self._out = dict.fromkeys(places, "retraining")
            what = ["repair began"]
        elif state == "repaired":
            self._repair(request, places, at)
            what = [*(f"stage {stage} of shard {shard} retrained" for shard, stage in places), "repaired"]
        else:
            what = ["rows erased"]
        request["timeline"] += [{"at": at, "what": text} for text in what]
        return state

    def _repair(self, request: dict[str, Any], places: list[tuple[int, int]], at: str) -> None:
        request["retrained"] = [{"shard": c, "stage": s, "at": at, "worker": "worker-0"} for c, s in places]
        request["stages_retrained"] = len(places)
        self._out = {}
        request["version_after"] = self._publish("repair", accuracy=0.9753, request=request["request"])

    def state(self) -> dict[str, Any]:
        """What GET /state answers, but for the time."""
        open_ = [r for r in self.requests if r["state"] != "repaired"]
        words = "repair due" if open_ else "ready"
        return {
            "store": "digits", "version": self.version, "state": words, "shards": self.shards, "slices": self.slices, "generations": 0,
            "records": 1432, "subjects": 1432, "holdout_records": 365, "classes": [str(n) for n in range(10)],
            "aggregation": "mean", "aggregation_in_use": "mean", "stages": [self._stage(c, s) for c in range(self.shards) for s in range(1, self.slices + 1)],
            "versions": self.versions[-200:], "requests": [_shown(r) for r in self.requests[-200:]],
            "open_requests": len(open_), "oldest_open_at": open_[0]["created_at"] if open_ else None,
            "replicas": [{"id": "r-7f3a90c2", "version": self.version, "confirmed": True},
                         {"id": "r-b1048e5d", "version": self.version, "confirmed": not open_}],
            "lease_seconds": 2.0,
        }  # fmt: skip

    def _stage(self, shard: int, stage: int) -> dict[str, Any]:
        state = self._out.get((shard, stage)) or ("serving" if stage == self._top(shard) else "trained")
        return {"shard": shard, "stage": stage, "state": state, "records": 119 * stage + shard, "created_at": None}

    def _top(self, shard: int) -> int:
        return min((stage - 1 for place, stage in self._out if place == shard), default=self.slices)

    def evidence(self, identifier: str) -> dict[str, Any] | None:
        """What GET /deletions/{id} answers."""
        request = next((r for r in self.requests if r["request"] == identifier), None)
        if request is None:
            return None
        evidence = {"stages_purged": request["purged"], "stages_retrained": request["retrained"]}
        evidence |= {name: request[name] for name in ("version_quarantine", "version_after")}
        return {**_shown(request), "timeline": request["timeline"], "evidence": evidence}


def _shown(request: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in request.items() if name not in {"key", "timeline", "purged", "retrained"}}


# --- The server -----------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer

    def do_GET(self) -> None:
        if self.path in FILES:
            name, kind = FILES[self.path]
            return self._send(200, (PAGE / name).read_bytes(), kind=kind)
        if self._refuses("read"):
            return None
        if self.path == "/state":
            return self._state()
        found = self.fake.store.evidence(self.path.removeprefix("/deletions/"))
        return self._json(200, found) if found else self._error(404, "no such request", "See GET /deletions.")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refuses("delete"):
            return None
        ids = body.get("subjects") or body.get("records")
        if missing := [id_ for id_ in ids if not self.fake.store.known(id_)]:
            return self._error(404, f"unknown ids: {', '.join(missing)}", "Nothing was changed.")
        return self._json(202, self.fake.store.accept(body, self.headers["Idempotency-Key"]))

    def _state(self) -> None:
        state = self.fake.store.state()
        tag = f'"{hash(json.dumps(state)):x}"'
        if self.headers["If-None-Match"] == tag:
            return self._send(304, b"")
        return self._json(200, {**state, "now": _text(_now())}, ETag=tag)

    def _refuses(self, scope: str) -> bool:
        """Answer for the token unless it may do this; or not at all, if the connection is to be lost."""
        if self.fake.lost:
            self.close_connection = True
            self.connection.close()
            return True
        scopes = {f"Bearer {TOKEN}": {"read", "delete"}, f"Bearer {READER}": {"read"}}
        granted = scopes.get(self.headers["Authorization"], set())
        if self.fake.revoked or not granted:
            self._error(401, "expected a valid token", "Make one with `sisa token create`.")
            return True
        if scope not in granted:
            self._error(403, f"this token lacks the scope {scope!r}", f"Use one with the scope {scope!r}.")
            return True
        return False

    def _error(self, status: int, message: str, hint: str) -> None:
        self._json(status, {"error": {"message": message, "hint": hint}})

    def _json(self, status: int, value: Any, **headers: str) -> None:
        self._send(status, json.dumps(value).encode(), kind="application/json", **headers)

    def _send(self, status: int, content: bytes, *, kind: str = "text/plain", **headers: str) -> None:
        self.fake.asked.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Security-Policy": POLICY, **headers}.items():
            self.send_header(name, value)
        if status != 304:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class FakeServer:
    """Serves the page and a ``FakeStore`` on a free port of this machine."""

    def __init__(self, store: FakeStore | None = None) -> None:
        self.store = store or FakeStore()
        self.asked: list[tuple[str, str, int]] = []
        """Method, address and status of each request."""
        self.revoked = False
        self.lost = False
        """While true the connection is cut instead of an answer."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": self}))
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}/"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def statuses(self, path: str) -> list[int]:
        """The statuses with which this path was answered."""
        return [status for _, asked, status in self.asked if asked == path]
