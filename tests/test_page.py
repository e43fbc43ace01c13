"""The operator's page in a real browser, against a server whose store moves when a test says so."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import page_kit
import pytest
from page_kit import NARROW, PAGE, READER, TOKEN, WIDE, FakeServer, FakeStore, check_accessible, opened, sign_in

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

browser = page_kit.browser

PEOPLE = ["p000017", "p000018", "p000019"]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as started:
        yield started


@pytest.fixture
def page(browser: Browser, server: FakeServer) -> Iterator[Page]:
    with opened(browser, server.address) as shown:
        sign_in(shown)
        yield shown


def ask(page: Page, ids: list[str], *, regime: str = "", reason: str = "") -> None:
    """Fill the form, and go as far as the confirmation."""
    page.locator("#ids").fill("\n".join(ids))
    page.locator("#reason").fill(reason)
    page.locator("#regime").select_option(regime)
    page.get_by_role("button", name="Review the deletion").click()


def confirm(page: Page) -> str:
    """Confirm, and return the request's id as the page shows it."""
    page.locator("#confirm-go").click()
    page.locator("#delete-done").wait_for()
    return re.search(r"del-\w+", page.locator("#delete-done-title").inner_text()).group()


def wait_text(page: Page, selector: str, text: str) -> None:
    page.locator(selector).filter(has_text=text).first.wait_for()


def press_until(page: Page, key: str, selector: str) -> None:
    """Press a key until the element has the focus, as a person without a mouse does."""
    for _ in range(80):
        if page.evaluate("s => document.activeElement?.matches(s) ?? false", selector):
            return
        page.keyboard.press(key)
    pytest.fail(f"{key} never reaches {selector}")


# --- The files ---------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_holds_no_script_or_style_of_its_own() -> None:
    for tag, attributes in Elements((PAGE / "index.html").read_text()).found:
        assert tag != "style"
        assert not any(name == "style" or name.startswith("on") for name in attributes), (tag, attributes)
        assert tag != "script" or attributes.get("src") == "page/app.js"


def test_the_page_takes_nothing_from_elsewhere() -> None:
    for path in PAGE.iterdir():
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[\w./-]*", path.read_text()))
        assert addresses <= {"http://www.w3.org/2000/svg"}, path.name  # a name, not an address to fetch


@pytest.mark.parametrize(
    "word",
    ["innerHTML", "insertAdjacentHTML", "document.write", "eval(", "console.", "localStorage", "location", "history."],
)
def test_the_script_never_parses_logs_or_leaves_traces(word: str) -> None:
    assert word not in (PAGE / "app.js").read_text()


def test_fields_of_tokens_and_ids_are_not_part_of_a_form() -> None:
    fields = [a for tag, a in Elements((PAGE / "index.html").read_text()).found if tag in {"input", "textarea"}]
    assert {a["id"] for a in fields if "name" in a} == {"kind-subject", "kind-record"}


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_only_ci_insists_on_a_browser(monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="no browser here"):
        page_kit.demand("no browser here")


# --- A deletion ----------------------------------------------------------------------------------


def test_a_deletion_from_the_form_to_its_evidence(page: Page, server: FakeServer) -> None:
    assert page.locator("#tile-state").inner_text() == "Ready"
    ask(page, PEOPLE, regime="gdpr", reason="ticket 4711")
    assert page.locator("#confirm-ids li").all_inner_texts() == PEOPLE
    assert page.locator("#confirm-title").inner_text() == "Delete 3 subjects?"
    assert server.store.posts == []  # nothing is sent before it is confirmed
    request = confirm(page)
    assert request == server.store.requests[0]["request"]
    (post,) = server.store.posts
    assert post == {"subjects": PEOPLE, "reason": "ticket 4711", "regime": "gdpr", "key": post["key"]}
    assert len(post["key"]) == 32

    wait_text(page, "#map td", "Quarantined")
    wait_text(page, "#tile-version", "v2")
    shown = page.locator(".request").filter(has_text=request)
    wait_text(page, ".request [aria-current=step]", "Accepted")
    assert "41 ms" in shown.inner_text()
    assert re.search(r"\d+ \w+ 20\d\d, 29 days left", shown.inner_text())
    for word in ("Rows erased", "Stages purged", "Repairing"):
        server.store.advance()
        wait_text(page, ".request [aria-current=step]", word)
        assert page.locator("#map .stage-retraining").count() == (2 if word == "Repairing" else 0)
    server.store.advance()
    wait_text(page, "#tile-version", "v3")
    steps = page.locator(".request .steps li").all_text_contents()
    assert steps == [f"{word}, done" for word in ("Accepted", "Rows erased", "Stages purged", "Repairing", "Repaired")]
    assert page.locator("#tile-open").inner_text() == "0"
    assert page.locator("#tile-oldest").inner_text() == "\N{EN DASH}"

    shown.get_by_role("button", name="Details").click()
    page.locator("#detail-content").wait_for()
    assert page.locator("#detail-timeline li").first.inner_text().endswith("Accepted")
    assert page.locator("#detail-timeline li").last.inner_text().endswith("Repaired")
    assert page.locator("#purged-body th, #purged-body td:nth-child(2)").all_inner_texts() == [
        "Shard 1", "Stage 2", "Shard 1", "Stage 3",
    ]  # fmt: skip
    assert page.locator("#retrained-body td:last-child").all_inner_texts() == ["worker-0", "worker-0"]
    assert "v1 before → v2 quarantine → v3 repaired" in page.locator("#detail-facts").inner_text()
    page.get_by_role("button", name="Close").click()
    assert not page.locator("#detail").is_visible()


def test_the_open_details_follow_the_deletion(page: Page, server: FakeServer) -> None:
    ask(page, ["p1"])
    confirm(page)
    page.get_by_role("button", name="Follow it").click()
    wait_text(page, "#purged-body", "None yet")
    server.store.advance()
    server.store.advance()
    wait_text(page, "#purged-body", "Stage 2")
    wait_text(page, "#detail [aria-current=step]", "Stages purged")
    wait_text(page, "#detail .live", "Stages purged")  # what lies outside of an open dialog is not read out


def test_the_keyboard_is_enough(browser: Browser, server: FakeServer) -> None:
    with opened(browser, server.address) as page:
        press_until(page, "Tab", "#token")  # which has the focus already
        page.keyboard.type(TOKEN)
        page.keyboard.press("Enter")
        page.locator("#board").wait_for()
        assert page.evaluate("document.activeElement.id") == "store"
        press_until(page, "Tab", "#kind-subject")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Tab")
        page.keyboard.type("r1")
        page.keyboard.press("Enter")
        page.keyboard.type("r2")
        press_until(page, "Tab", "#delete-form button")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "confirm-back"  # the harmless one
        press_until(page, "Tab", "#confirm-go")
        page.keyboard.press("Enter")
        page.locator("#delete-done").wait_for()
        assert server.store.posts[0]["records"] == ["r1", "r2"]
        assert page.evaluate("document.activeElement.id") == "delete-done"
        press_until(page, "Tab", "#delete-done-details")
        page.keyboard.press("Enter")
        page.locator("#detail-content").wait_for()
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.id") == "delete-done-details"  # back to where it came from
        press_until(page, "Shift+Tab", "#sign-out")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "token"


def test_the_confirmation_says_what_became_of_the_lines(page: Page, server: FakeServer) -> None:
    ask(page, ["a", " b", "", "a", "   "])
    notes = page.locator("#confirm-notes").inner_text()
    assert notes == "1 repeated line was left out. 1 id begins or ends with a space, which is taken as part of the id."
    confirm(page)
    assert server.store.posts[0]["subjects"] == ["a", " b"]


def test_going_back_sends_nothing_and_keeps_the_form(page: Page, server: FakeServer) -> None:
    ask(page, PEOPLE)
    page.get_by_role("button", name="Go back").click()
    assert page.locator("#ids").input_value() == "\n".join(PEOPLE)
    assert server.store.posts == []


def test_a_form_without_ids_says_so(page: Page) -> None:
    ask(page, ["", " "])
    assert "No id was given" in page.locator("#delete-error").inner_text()
    assert page.evaluate("document.activeElement.id") == "ids"


def test_unknown_ids_are_told_with_the_hint(page: Page, server: FakeServer) -> None:
    ask(page, ["p1", "nobody-1"])
    page.locator("#confirm-go").click()
    wait_text(page, "#confirm-error", "unknown ids: nobody-1")
    wait_text(page, "#confirm-error", "Nothing was changed.")
    assert server.store.requests == []


def test_an_answer_that_is_lost_is_asked_for_again_with_the_same_key(page: Page, server: FakeServer) -> None:
    ask(page, ["p1"])
    page.route("**/deletions", lambda route: (route.fetch(), route.abort()), times=1)
    page.locator("#confirm-go").click()
    wait_text(page, "#confirm-error", "No answer came")
    confirm(page)
    assert "Already accepted" in page.locator("#delete-done-title").inner_text()
    first, second = server.store.posts
    assert first == second
    assert len(server.store.requests) == 1
    ask(page, ["p1"])
    confirm(page)
    assert server.store.posts[2]["key"] != first["key"]  # a new wish is a new request


def test_ids_are_in_no_address_no_storage_and_no_log(browser: Browser, server: FakeServer) -> None:
    with opened(browser, server.address) as page:  # which fails on anything in the console
        sign_in(page)
        ask(page, PEOPLE)
        confirm(page)
        page.locator(".request").first.wait_for()
        kept = page.evaluate("JSON.stringify([location.href, {...sessionStorage}, {...localStorage}, document.cookie])")
        left = page.locator("html").inner_html()
    told = json.dumps(server.asked) + kept + left
    assert not any(id_ in told for id_ in PEOPLE)


# --- Keeping up ----------------------------------------------------------------------------------


def test_polling_is_cheap_and_quicker_while_something_is_open(page: Page, server: FakeServer) -> None:
    page.wait_for_timeout(2500)
    assert len(server.statuses("/state")) <= 2  # every five seconds
    ask(page, ["p1"])
    confirm(page)
    asked = len(server.statuses("/state"))
    page.wait_for_timeout(3500)
    polls = server.statuses("/state")[asked:]
    assert 2 <= len(polls) <= 5  # every second
    assert polls.count(304) >= len(polls) - 1


def test_changes_are_announced_once_and_clocks_are_not(page: Page, server: FakeServer) -> None:
    page.evaluate(
        """() => {
            window.heard = [];
            new MutationObserver(() => { const text = document.querySelector("#live").textContent; if (text) heard.push(text); })
                .observe(document.querySelector("#live"), { childList: true, characterData: true, subtree: true });
        }"""
    )
    ask(page, ["p1"])
    request = confirm(page)
    page.wait_for_timeout(2500)
    server.store.advance()
    page.wait_for_timeout(2500)
    assert page.evaluate("heard") == [
        f"{request}: Accepted. Version 2 is live. The store\N{RIGHT SINGLE QUOTATION MARK}s state: repair due.",
        f"{request}: Rows erased.",
    ]
    assert page.locator("[aria-live] [data-since], [role=alert] [data-since]").count() == 0


def test_a_lost_connection_is_told_and_found_again(page: Page, server: FakeServer) -> None:
    ask(page, ["p1"])
    confirm(page)
    server.lost = True
    wait_text(page, "#connection-text", "Connection lost, retrying.")
    wait_text(page, "#live", "Connection lost, retrying.")
    assert page.locator("#freshness").inner_text() == "Not up to date"
    assert page.locator("#map td").first.is_visible()  # what was known stays
    server.lost = False
    page.get_by_role("button", name="Retry now").click()
    page.locator("#connection").wait_for(state="hidden")
    wait_text(page, "#freshness", "Up to date")


def test_retries_come_ever_more_slowly(browser: Browser, server: FakeServer) -> None:
    with opened(browser, server.address) as page:
        page.clock.install()
        sign_in(page)
        server.lost = True
        tries = []
        page.on("requestfailed", lambda request: tries.append(request.url))
        page.clock.run_for(5_100)
        page.locator("#connection").wait_for()
        for wait_s in (1, 2, 4, 8):
            before = len(tries)
            page.clock.run_for(wait_s * 1000 - 100)
            assert len(tries) == before
            page.clock.run_for(200)
            page.wait_for_timeout(200)
            assert len(tries) > before


def test_a_revoked_token_leads_to_the_door_with_the_reason(page: Page, server: FakeServer) -> None:
    ask(page, ["p1"])
    confirm(page)
    server.revoked = True
    wait_text(page, "#token-error", "expected a valid token")
    wait_text(page, "#token-error", "sisa token create")
    assert not page.locator("#board").is_visible()
    assert page.evaluate("sessionStorage.length") == 0
    assert page.locator("#request-list li").count() == 0


def test_a_token_that_may_not_delete_leads_to_the_door_and_the_form_stays(browser: Browser, server: FakeServer) -> None:
    with opened(browser, server.address) as page:
        sign_in(page, READER)
        ask(page, PEOPLE)
        page.locator("#confirm-go").click()
        wait_text(page, "#token-error", "lacks the scope 'delete'")
        sign_in(page, TOKEN)
        assert page.locator("#ids").input_value() == "\n".join(PEOPLE)


@pytest.mark.parametrize(
    ("token", "told"), [("wrong", "expected a valid token"), ("", "Enter a token"), ("ö", "ASCII")]
)
def test_a_token_that_opens_nothing(browser: Browser, server: FakeServer, token: str, told: str) -> None:
    with opened(browser, server.address) as page:
        page.get_by_label("Access token").fill(token)
        page.get_by_role("button", name="Sign in").click()
        wait_text(page, "#token-error", told)
        assert page.evaluate("sessionStorage.length") == 0


def test_a_tab_stays_signed_in_until_it_signs_out(page: Page) -> None:
    page.reload()
    page.locator("#board").wait_for()
    page.locator("#ids").fill("p1")
    page.get_by_role("button", name="Sign out").click()
    assert page.evaluate("sessionStorage.length") == 0
    assert page.locator("#ids").input_value() == ""
    assert "digits" not in page.locator("main").inner_html()
    sign_in(page)
    page.get_by_role("img", name="Accuracy over versions").wait_for()
    page.get_by_role("button", name="Sign out").click()
    page.reload()
    page.locator("#door").wait_for()


# --- What is shown -------------------------------------------------------------------------------


def test_text_from_elsewhere_stays_text(browser: Browser) -> None:
    nasty = "<img src=x onerror=alert(1)><b>bold</b>"
    store = FakeStore()
    store.accept({"subjects": ["p1"], "reason": nasty}, "key")
    store.requests[0]["note"] = nasty
    store.requests[0]["timeline"][0]["what"] = nasty
    with FakeServer(store) as server, opened(browser, server.address) as page:
        sign_in(page)
        assert nasty in page.locator(".request").inner_text()
        page.get_by_role("button", name="Details").click()
        wait_text(page, "#detail-timeline", nasty)
        assert page.locator("img, b").count() == 0


def test_a_thousand_shards_stay_in_hand(browser: Browser) -> None:
    store = FakeStore(shards=1000, slices=8)
    store._out = {(777, stage): "quarantined" for stage in range(3, 9)}
    with FakeServer(store) as server, opened(browser, server.address) as page:
        sign_in(page)
        rows = page.locator("#map-body tr")
        assert rows.count() == 50
        assert page.locator("#map-caption").inner_text() == "Shards 1 to 50 of 1,000; 1 with stages out of service"
        page.get_by_role("button", name="Next").click()
        assert rows.first.locator("th").inner_text() == "Shard 50"
        page.get_by_label("Page", exact=True).select_option("20")
        assert rows.last.locator("th").inner_text() == "Shard 999"
        page.get_by_label("Out of service first").check()
        assert rows.first.locator("th").inner_text() == "Shard 777"
        assert rows.first.locator("td").nth(1).inner_text().startswith("Serving")
        assert rows.first.locator("td").nth(2).inner_text().startswith("Quarantined")
        assert rows.nth(1).locator("th").inner_text() == "Shard 0"


def test_many_requests_and_versions_are_unfolded_on_demand(browser: Browser) -> None:
    store = FakeStore()
    for number in range(8):
        store.accept({"subjects": ["p1"]}, f"key {number}")
        if number:
            for _ in range(4):
                store.advance()
    with FakeServer(store) as server, opened(browser, server.address) as page:
        sign_in(page)
        assert page.locator(".request").count() == 5
        page.get_by_role("button", name="Show more (3)").click()
        assert page.locator(".request").count() == 8
        page.get_by_label("Open only").check()
        assert page.locator(".request").count() == sum(r["state"] != "repaired" for r in store.requests)
        page.get_by_role("button", name="Show all versions").click()
        assert page.locator("#versions-body tr").count() == len(store.versions)


def test_the_plot_has_words_and_numbers(page: Page, server: FakeServer) -> None:
    ask(page, ["p1"])
    confirm(page)
    wait_text(page, "#tile-version", "v2")
    plot = page.get_by_role("img", name="Accuracy over versions")
    assert "Lowest 96.1 % (version 2), highest 97.8 % (version 1)" in plot.locator("desc").text_content()
    assert plot.locator(".mark").count() == 2
    cells = page.locator("#versions-body tr").first.locator("th, td").all_inner_texts()
    assert cells[:4] == ["v2 live", "Quarantine", "3", "96.1 %"]
    server.store.versions[1]["accuracy"] = None
    wait_text(page, "#versions-body", "not measured")
    assert plot.locator(".mark").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_it_is_accessible(browser: Browser, server: FakeServer, scheme: str, width: int) -> None:
    with opened(browser, server.address, width=width, scheme=scheme, bypass_csp=True) as page:
        page.get_by_role("button", name="Sign in").click()
        page.locator("#token-error").wait_for()
        check_accessible(page)
        sign_in(page)
        page.locator(".meanings summary").click()
        check_accessible(page)
        ask(page, PEOPLE, regime="ccpa", reason="ticket 4711")
        check_accessible(page)
        confirm(page)
        wait_text(page, "#map td", "Quarantined")
        check_accessible(page)
        for _ in range(3):
            server.store.advance()
        wait_text(page, "#map td", "Retraining")
        server.lost = True
        page.locator("#connection").wait_for()
        check_accessible(page)
        server.lost = False
        page.get_by_role("button", name="Follow it").click()
        page.locator("#detail-content").wait_for()
        check_accessible(page)
        too_wide = page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
        assert not too_wide


def test_nothing_is_cut_off_on_the_smallest_screen(browser: Browser, server: FakeServer) -> None:
    server.store.accept({"subjects": ["p1"], "regime": "gdpr", "reason": "ticket 4711"}, "key")
    with opened(browser, server.address, width=320) as page:
        sign_in(page)
        # The tables scroll in frames of their own; whatever else is wider than its panel would be cut or make the page scroll.
        cut = page.evaluate(
            """() => [...document.querySelectorAll(".panel *")].filter((node) => !node.closest(".scroll, .hush, svg")
                && node.getBoundingClientRect().right > node.closest(".panel").getBoundingClientRect().right - 17)
                .map((node) => node.outerHTML.slice(0, 80))"""
        )
        assert cut == []
