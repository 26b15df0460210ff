"""What tests of the page have in common, apart from fixtures."""

from __future__ import annotations

import json
from typing import Any

from playwright.sync_api import Page, Request, expect

from server.tenants.keys import digest_of
from server.tenants.keys_file import HASH

KEY = "sesame-42"

KEYS = {"team-a": "sesame-a", "team-b": "sesame-b"}
"""The keys of tenants: `team-a` may upload, and ask one thing at a time; `team-b` only ask, and
once a minute."""


def keys_file() -> str:
    """A keys file with the tenants of `KEYS`."""
    hashes = {name: HASH + digest_of(key.encode()).hex() for name, key in KEYS.items()}
    return f"""
    [tenants.team-a]
    keys = ["{hashes["team-a"]}"]
    interventions = ["telegram"]
    upload = true
    concurrent_requests = 1
    limits.max_tokens = 8

    [tenants.team-b]
    keys = ["{hashes["team-b"]}"]
    interventions = ["pirate"]
    requests_per_minute = 1
    """


def body(request: Request) -> dict[str, Any]:
    """The JSON that a request sent."""
    sent: dict[str, Any] = json.loads(request.post_data or "null")
    return sent


def short(page: Page, tokens: int = 5) -> None:
    """Let answers be short."""
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Max tokens").fill(str(tokens))
    page.get_by_label("Max tokens").press("Tab")
    page.get_by_role("button", name="Settings").click()


def say(page: Page, text: str) -> None:
    """Send a turn, and wait until every column has answered."""
    page.locator(".composer textarea").fill(text)
    page.get_by_role("button", name="Run", exact=True).click()
    answered(page)


def answered(page: Page) -> None:
    """Wait until nothing is being answered."""
    expect(page.get_by_role("button", name="Stop", exact=True)).to_have_count(0)
    expect(page.locator("[aria-busy=true]")).to_have_count(0)


def answers(page: Page) -> list[str]:
    """The texts of the last turn's answers, column by column."""
    return page.locator(".turn").last.locator(".text").all_text_contents()


def add_column(page: Page, name: str) -> None:
    """Add a column for an intervention, found by a part of its name."""
    page.get_by_role("button", name="Column", exact=True).click()
    page.get_by_role("combobox", name="The new column's intervention").fill(name)
    page.get_by_role("option", name=name).first.click()
