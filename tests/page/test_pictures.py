"""The pictures of docs/images: `REFT_PICTURES=1 pytest tests/page/test_pictures.py`."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.page.conftest import Tab
from tests.page.make import add_column, answered, say, short

IMAGES = Path(__file__).parents[2] / "docs/images"
MAX_BYTES = 150_000

pytestmark = pytest.mark.skipif(
    not os.environ.get("REFT_PICTURES"), reason="pictures are made when REFT_PICTURES is set"
)


def compare(page: Page) -> None:
    page.get_by_role("button", name="Remove column C").click()
    add_column(page, "telegram")
    add_column(page, "formal")
    last = page.get_by_role("region", name="Column D")
    last.get_by_role("button", name="Compose with another").click()
    last.get_by_role("combobox").fill("cheerful")
    last.get_by_role("option", name="cheerful").click()
    last.get_by_role("slider", name="Strength of cheerful").fill("0.5")
    page.get_by_role("combobox", name="Colour").select_option("distance")
    short(page, 32)
    say(page, "What's a dog?")
    expect(page.locator(".token.d4").first).to_be_visible()


def tokens(page: Page) -> None:
    page.get_by_role("button", name="Remove column C").click()
    page.get_by_role("button", name="Who are you?").click()
    answered(page)
    page.get_by_role("region", name="Answer of pirate").locator(".token").nth(5).click()


def look(page: Page) -> None:
    page.get_by_role("button", name="Look", exact=True).click()
    expect(page.get_by_role("img", name="Nats from the base")).to_be_visible()


def fan(page: Page) -> None:
    page.get_by_role("button", name="Fan of strengths").click()
    for label, value in (("From", "0"), ("To", "1.5"), ("Step", "0.25")):
        page.get_by_label(label, exact=True).fill(value)
        page.get_by_label(label, exact=True).press("Tab")
    page.get_by_role("button", name="Ask at 7 strengths").click()
    expect(page.get_by_role("button", name="Ask at 7 strengths")).to_be_visible()
    expect(page.get_by_role("img", name="Mean distance").first).to_be_visible()


def interventions(page: Page) -> None:
    expect(page.locator("tbody tr")).to_have_count(8)


def server(page: Page) -> None:
    expect(page.locator(".chart")).to_have_count(5)
    route = page.url.partition("#")[0] + "v1/chat/completions"

    def ask(number: int) -> None:
        body = {
            "model": ["pirate", "telegram", "formal"][number % 3],
            "messages": [{"role": "user", "content": "Who are you, and what is a dog?"}],
            "max_tokens": 24,
            "ignore_eos": True,
        }
        httpx.post(route, json=body, timeout=60)

    # The page's own requests pass through this thread, so others make the load.
    with ThreadPoolExecutor(8) as pool:
        for count in (1, 6, 3, 8, 2, 5, 7):
            pool.map(ask, range(count))
            page.wait_for_timeout(2500)


def usage(page: Page) -> None:
    route = page.url.partition("#")[0] + "v1/completions"
    for number, model in enumerate(("pirate", "formal", "telegram", "emoji+", "pirate", "formal")):
        names = [{"name": name} for name in (model.removesuffix("+"), "cheerful")]
        body = {
            "model": page.title().partition(" · ")[2],
            "interventions": names if model.endswith("+") else names[:1],
            "prompt": "Who are you, and what is a dog?",
            "max_tokens": 12 + 3 * number,
            "ignore_eos": True,
        }
        httpx.post(route, json=body, timeout=60)
    page.get_by_role("button", name="By intervention").click()
    expect(page.get_by_text("emoji+cheerful")).to_be_visible()


def reference(page: Page) -> None:
    page.locator(".operation summary", has_text="/v1/chat/completions").click()


@pytest.mark.parametrize(
    ("name", "place", "prepare", "width", "height", "dark"),
    [
        ("compare", "", compare, 1280, 900, False),
        ("compare-dark", "", compare, 1280, 900, True),
        ("compare-phone", "", tokens, 400, 800, False),
        ("look", "#/look", look, 1280, 960, False),
        ("fan", "#/look", fan, 1280, 800, True),
        ("interventions", "#/interventions", interventions, 1280, 800, False),
        ("server", "#/server", server, 1280, 760, False),
        ("usage", "#/server/usage", usage, 1280, 560, False),
        ("reference", "docs", reference, 1280, 800, False),
    ],
)
def test_picture(
    new_tab: Callable[..., Tab],
    name: str,
    place: str,
    prepare: Callable[[Page], None],
    width: int,
    height: int,
    dark: bool,
) -> None:
    tab = new_tab(width=width, height=height, dark=dark)
    page = tab.open(place)
    prepare(page)
    page.mouse.move(0, 0)
    page.evaluate("() => document.activeElement?.blur()")
    IMAGES.mkdir(exist_ok=True)
    file = IMAGES / f"page-{name}.png"
    page.screenshot(path=file, animations="disabled", caret="hide")
    assert file.stat().st_size < MAX_BYTES
