"""The page with keys: whose they are, what each may do and is offered, and what was used."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import httpx
from playwright.sync_api import expect

from reft_runtime import Engine
from tests.page.conftest import INTERVENTIONS, Tab, overflow, violations
from tests.page.make import KEYS, say, short

PIRATE = INTERVENTIONS / "pirate.safetensors"


def test_what_a_user_may_not_do_is_not_offered(
    tenants_url: str, new_tab: Callable[..., Tab]
) -> None:
    tab = new_tab(tenants_url, width=400)
    tab.use(KEYS["team-b"])
    page = tab.open("#/interventions/pirate")
    dialog = page.get_by_role("dialog", name="pirate")
    expect(dialog.get_by_role("button")).to_have_text(["", "Try it", "Download"])
    expect(page.locator("tbody tr")).to_have_count(1)
    expect(page.get_by_label("Files to upload")).to_have_count(0)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="team-b user").click()
    rights = page.get_by_role("dialog", name="The key of team-b")
    expect(rights.locator("dd")).to_have_text(["user", "pirate", "nothing", "1 requests a minute"])
    assert violations(page) == []
    page.keyboard.press("Escape")
    page.get_by_role("link", name="Server", exact=True).click()
    expect(page.get_by_role("heading", name="Usage of team-b")).to_be_visible()
    expect(page.locator(".used tbody tr")).to_have_count(7)
    expect(page.get_by_role("button", name="By tenant")).to_have_count(0)
    expect(page.get_by_text("is told to admins, and team-b is a user")).to_be_visible()
    assert violations(page) == []
    assert overflow(page) == 0
    assert not tab.requests("/v1/stats")
    # A key that is taken no longer is asked for anew, and whose it is then is shown.
    page.evaluate("() => sessionStorage.setItem('reft-key', 'expired')")
    page.get_by_role("link", name="Interventions").click()
    page.get_by_label("API key").fill(KEYS["team-a"])
    page.get_by_label("API key").press("Enter")
    expect(page.get_by_role("button", name="team-a user")).to_be_visible()
    expect(page.get_by_role("button", name="Upload")).to_be_visible()


def test_a_quota_that_is_used_up_says_until_when(
    tenants_url: str, new_tab: Callable[..., Tab]
) -> None:
    tab = new_tab(tenants_url)
    tab.use(KEYS["team-b"])
    page = tab.open()
    short(page, 2)
    say(page, "Hello")
    told = page.locator(".answer").get_by_role("alert")
    expect(told.first).to_have_text(
        re.compile(r"may send 1 requests a minute.* again at \d\d:\d\d:\d\d\.")
    )


def test_columns_wait_for_each_other_where_a_tenant_may_ask_one_at_a_time(
    tenants_url: str, new_tab: Callable[..., Tab]
) -> None:
    tab = new_tab(tenants_url)
    tab.use(KEYS["team-a"])
    page = tab.open("#/interventions/telegram")
    page.get_by_role("button", name="Try it").click()
    short(page, 8)
    say(page, "Hello")
    expect(page.locator(".figures", has_text="8 tokens")).to_have_count(2)
    expect(page.get_by_role("alert")).to_have_count(0)
    assert len(tab.requests("/v1/chat/completions")) == 2


def test_a_tenants_own_is_uploaded_pinned_and_removed(
    tenants_url: str, new_tab: Callable[..., Tab], engine: Engine, tmp_path: Path
) -> None:
    tab = new_tab(tenants_url)
    tab.use(KEYS["team-a"])
    tab.page.context.unroute("**/*")  # the browser's cache, too, must not keep what was before
    page = tab.open("#/interventions")
    file = tmp_path / "mine.safetensors"
    file.write_bytes(PIRATE.read_bytes())
    page.get_by_label("Files to upload").set_input_files(file)
    expect(page.get_by_role("list", name="Uploads")).to_contain_text("team-a.mine is served")
    expect(page.locator("tbody tr")).to_have_count(2)
    page.get_by_role("link", name="team-a.mine").click()
    dialog = page.get_by_role("dialog", name="team-a.mine")
    dialog.get_by_role("button", name="Pin", exact=True).click()
    row = page.locator("tbody tr", has_text="team-a.mine")
    expect(row).to_contain_text("in memory pinned")
    assert engine.registry.entry("team-a.mine").pinned
    dialog.get_by_role("button", name="Unpin").click()
    expect(row.get_by_text("pinned")).to_have_count(0)
    dialog.get_by_role("button", name="Delete", exact=True).click()
    dialog.get_by_role("button", name="Delete team-a.mine").click()
    expect(page.locator("tbody tr")).to_have_count(1)
    # What is not its own can be used alone, and its answers are as long as it may have them.
    page.get_by_role("link", name="telegram").click()
    expect(page.get_by_role("button", name="Delete", exact=True)).to_have_count(0)
    page.get_by_role("button", name="Try it").click()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Max tokens")).to_have_value("8")
    page.get_by_role("link", name="Look inside").click()
    expect(page.get_by_label("Max tokens")).to_have_value("8")


def test_one_on_disk_is_warmed(tab: Tab, engine: Engine) -> None:
    entry = {**httpx.get(f"{tab.url}/v1/interventions/formal").json(), "tier": "disk"}
    tab.page.context.route("**/v1/interventions/formal", lambda route: route.fulfill(json=entry))
    page = tab.open("#/interventions/formal")
    with page.expect_response("**/v1/interventions/formal/warm") as answer:
        page.get_by_role("button", name="Warm").click()
    assert answer.value.json()["tier"] == engine.registry.entry("formal").tier == "host"


def test_usage_is_shown_by_day_tenant_and_intervention(tab: Tab) -> None:
    body = {"model": "emoji", "prompt": "Hello", "max_tokens": 2}
    assert httpx.post(f"{tab.url}/v1/completions", json=body, timeout=60).is_success
    page = tab.open("#/server/usage")
    rows = page.locator(".used tbody tr")
    expect(rows).to_have_count(7)
    page.get_by_role("button", name="30 days").click()
    expect(rows).to_have_count(30)
    page.get_by_role("button", name="By tenant").click()
    rows.get_by_role("button", name="(owner)").click()
    emoji = page.locator(".used tr", has_text="emoji").first
    usage = httpx.get(f"{tab.url}/v1/usage?tenant=(owner)&group_by=intervention").json()
    counts = [*next(row for row in usage["data"] if row["intervention"] == "emoji").values()]
    expect(emoji.locator("td.number")).to_have_text([f"{count:,}" for count in counts[1:]])
    total = [f"{count:,}" for count in usage["total"].values()]
    expect(page.locator("tfoot td.number")).to_have_text(total)
    expect(page.get_by_text("forgets it when it stops")).to_be_visible()
    asked = tab.requests("/v1/usage")
    assert len(asked) == 4
    assert "group_by=intervention&tenant=%28owner%29" in asked[-1].url
    page.get_by_role("button", name="Tenant (owner): show all").click()
    expect(page.get_by_role("button", name="By tenant")).to_be_visible()
    page.get_by_role("button", name="Now").click()
    expect(page.get_by_role("status")).to_have_text("ready")
