"""The operator's page against a real server and a real store."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import page_kit
import pytest
import serving_kit
from page_kit import check_accessible, opened, sign_in
from serving_kit import Server, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

browser = page_kit.browser
mixed_store = serving_kit.mixed_store

ENDED_MS = 120_000
"""How long a repair may take: it is a process that trains."""


@pytest.fixture(scope="module")
def server(mixed_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(mixed_store, tmp_path_factory.mktemp("served")) as started:
        yield started


def submit(page: Page, person: str) -> str:
    """Ask for a deletion through the form; return the request's id."""
    page.locator("#ids").fill(person)
    page.locator("#reason").fill("ticket 4711")
    page.locator("#regime").select_option("gdpr")
    page.get_by_role("button", name="Review the deletion").click()
    page.locator("#confirm-go").click()
    page.locator("#delete-done").wait_for(timeout=ENDED_MS)
    return re.search(r"del-\w+", page.locator("#delete-done-title").inner_text()).group()


def test_a_deletion_is_watched_from_the_form_to_its_evidence(browser: Browser, server: Server) -> None:
    with opened(browser, server.address) as page:
        sign_in(page, server.token("read", "delete"))
        assert page.locator("#store").inner_text() == serving_kit.NAME
        assert page.locator("#tile-state").inner_text() == "Ready"
        assert page.locator("#tile-version").inner_text() == "v1"
        assert page.locator("#map .stage-serving").count() == 2
        # Every state of the map, as the page goes through them.
        page.evaluate(
            """() => {
                window.seen = new Set();
                const look = () => document.querySelectorAll("#map [class*=stage-]").forEach((cell) => {
                    for (const name of cell.classList) if (name.startsWith("stage-")) seen.add(name);
                });
                new MutationObserver(look).observe(document.querySelector("#map"),
                    { subtree: true, childList: true, attributes: true });
            }"""
        )
        request = submit(page, "p\u00e9rson-003")
        shown = page.locator(".request").filter(has_text=request)
        shown.filter(has_text="ticket 4711").wait_for()
        page.locator("#tile-version").filter(has_text="v3").wait_for(timeout=ENDED_MS)
        page.locator("#tile-open").filter(has_text="0").wait_for(timeout=ENDED_MS)
        assert "stage-quarantined" in page.evaluate("[...seen]")
        steps = page.locator(".request .steps li").all_text_contents()
        assert steps == [
            f"{word}, done" for word in ("Accepted", "Rows erased", "Stages purged", "Repairing", "Repaired")
        ]
        assert page.locator("#map .stage-serving").count() == 2
        assert page.locator("#map .stage-quarantined, #map .stage-retraining").count() == 0

        shown.get_by_role("button", name="Details").click()
        page.locator("#detail-content").wait_for()
        assert page.locator("#detail-timeline li").first.inner_text().endswith("Accepted")
        assert page.locator("#detail-timeline li").last.inner_text().endswith("Repaired")
        assert page.locator("#purged-body tr").count() == page.locator("#retrained-body tr").count() > 0
        assert "v1 before → v2 quarantine → v3 repaired" in page.locator("#detail-facts").inner_text()
        assert "003" not in page.locator("#detail").inner_text()


def test_the_page_says_who_is_unknown_to_the_store(browser: Browser, server: Server) -> None:
    with opened(browser, server.address) as page:
        sign_in(page, server.token("read", "delete"))
        page.locator("#ids").fill("stranger")
        page.get_by_role("button", name="Review the deletion").click()
        page.locator("#confirm-go").click()
        page.locator("#confirm-error").filter(has_text="nothing was changed").wait_for()


def test_a_token_that_may_only_read_sees_the_page(browser: Browser, server: Server) -> None:
    with opened(browser, server.address) as page:
        sign_in(page, server.token("read"))
        assert page.locator("#tile-state").inner_text() == "Ready"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_a_real_store_is_accessible(browser: Browser, server: Server, scheme: str) -> None:
    server.client().post("/deletions", json={"subjects": ["p\u00e9rson-003"]})  # so that there are details to look at
    with opened(browser, server.address, scheme=scheme, bypass_csp=True) as page:
        check_accessible(page)
        sign_in(page, server.token("read", "delete"))
        check_accessible(page)
        page.get_by_role("button", name="Details").first.click()
        page.locator("#detail-content").wait_for()
        check_accessible(page)
