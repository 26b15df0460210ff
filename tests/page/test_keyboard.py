"""The page by the keyboard and with a screen reader: where the focus is, and what is read."""

from __future__ import annotations

import json

import httpx
from playwright.sync_api import expect

from tests.page.conftest import Tab
from tests.page.make import answered, answers, say, short

CHAT = "/v1/chat/completions"


def test_the_keyboard_alone_is_enough(tab: Tab) -> None:
    page = tab.open()
    expect(page.get_by_role("region", name="Column A")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    # A column's intervention is chosen in its list.
    page.get_by_role("button", name="emoji").first.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("combobox", name="Another intervention")).to_be_focused()
    page.keyboard.type("telegram")
    page.keyboard.press("Enter")
    expect(page.get_by_role("slider", name="Strength of telegram")).to_be_visible()
    expect(page.get_by_role("button", name="telegram").first).to_be_focused()
    page.get_by_role("button", name="Column", exact=True).press("Enter")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Column", exact=True)).to_be_focused()
    short(page, 4)
    page.locator(".composer textarea").focus()
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    answered(page)
    assert len(answers(page)) == 3
    # A screen reader says the answers when they are there.
    said = [
        f"{name}: {text}"
        for name, text in zip(("Base model", "pirate", "telegram"), answers(page), strict=True)
    ]
    assert page.locator("p.unseen").text_content() == "\n".join(said)
    # What opens takes the focus, and gives it back.
    page.get_by_role("button", name="Paste a request into column B").press("Enter")
    page.get_by_role("dialog").get_by_role("button", name="Close").press("Enter")
    expect(page.get_by_role("button", name="Paste a request into column B")).to_be_focused()
    page.get_by_role("button", name="Edit this turn").press("Enter")
    expect(page.get_by_label("The turn's text")).to_be_focused()
    page.get_by_role("button", name="Cancel").press("Enter")
    expect(page.get_by_role("button", name="Edit this turn")).to_be_focused()
    token = page.locator(".token").first
    token.press("Enter")
    page.get_by_role("button", name="Close the alternatives").first.press("Escape")
    expect(page.get_by_role("region", name="Alternatives")).to_have_count(0)
    expect(token).to_be_focused()


def test_an_answer_is_read_as_text_with_one_button(tab: Tab) -> None:
    page = tab.open()
    short(page)
    say(page, "Why is the sky blue?")
    base = page.get_by_role("region", name="Answer of Base model")
    tokens, buttons = base.locator(".token"), base.locator(".text [role=button], .text [tabindex]")
    expect(tokens).to_have_count(5)
    expect(buttons).to_have_count(1)
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(2)).to_be_focused()
    expect(buttons).to_have_count(1)
    # Tab comes to where the arrow keys went, from both sides.
    page.keyboard.press("Shift+Tab")
    expect(base.locator(":focus")).to_have_count(0)
    page.keyboard.press("Tab")
    expect(tokens.nth(2)).to_be_focused()
    page.keyboard.press("Tab")
    expect(base.get_by_role("button", name="Answer again")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Space")
    expect(tokens.nth(1)).to_have_attribute("aria-pressed", "true")
    tokens.nth(4).click()
    expect(tokens.nth(4)).to_be_focused()
    expect(buttons).to_have_count(1)
    page.keyboard.press("Escape")
    expect(base.get_by_role("region", name="Alternatives")).to_have_count(0)


def test_the_arrow_keys_go_through_all_blocks_of_a_long_answer(tab: Tab) -> None:
    texts = ["\n" if i % 10 == 9 else f" {i}" for i in range(150)]
    scored = [
        {"token": text, "logprob": -1, "bytes": [*text.encode()], "top_logprobs": []}
        for text in texts
    ]
    choice = {
        "index": 0,
        "delta": {"content": "".join(texts)},
        "logprobs": {"content": scored},
        "token_ids": [*range(1000, 1150)],
        "finish_reason": "stop",
        "prompt_token_ids": [1, 2, 3],
    }
    stream = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    tab.page.context.route(f"**{CHAT}", lambda route: route.fulfill(body=stream))
    page = tab.open()
    say(page, "Count.")
    answer = page.get_by_role("region", name="Answer of Base model")
    expect(answer.locator(".text")).to_have_text("".join(texts))
    blocks = answer.locator(".block")
    expect(blocks).to_have_count(3)  # whole lines: 70 tokens, 70 and the last 10
    blocks.nth(0).get_by_text("68").click()
    page.keyboard.press("ArrowRight")
    expect(blocks.nth(0).get_by_role("button", name="line break")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(blocks.nth(1).locator(".token").first).to_be_focused()
    # Each has its colours when they are known.
    page.get_by_role("combobox", name="Colour").select_option("distance")
    for i, count in enumerate((70, 70, 10)):
        expect(blocks.nth(i).locator(".token:is(.d0, .d1, .d2, .d3, .d4)")).to_have_count(count)
    # On paper all are there.
    page.emulate_media(media="print")
    hidden = "() => getComputedStyle(document.querySelector('.block')).contentVisibility"
    assert page.evaluate(hidden) == "visible"


def test_keys_of_an_input_method_send_and_choose_nothing(tab: Tab) -> None:
    page = tab.open()
    # Safari's Enter that ends a composition is like any other, but for its code.
    enter = {"key": "Enter", "keyCode": 229, "bubbles": True, "cancelable": True}
    box = page.get_by_label("Ask something")
    box.fill("犬")
    box.dispatch_event("keydown", enter)
    page.get_by_role("button", name="Column", exact=True).click()
    expect(page.get_by_role("option", name="Base model")).to_be_visible()
    picker = page.get_by_role("combobox", name="The new column's intervention")
    picker.dispatch_event("keydown", enter)
    picker.press("Escape")
    expect(picker).to_have_count(0)
    expect(page.locator(".card")).to_have_count(3)
    expect(box).to_have_value("犬")
    assert not tab.requests(CHAT)


def test_what_is_removed_leaves_the_focus_beside_it(tab: Tab) -> None:
    page = tab.open()
    page.get_by_role("button", name="Remove column C").press("Enter")
    expect(page.get_by_role("region", name="Columns")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Paste a request into column A")).to_be_focused()
    # An intervention is taken out of its column by choosing the base.
    page.get_by_role("button", name="pirate", exact=True).press("Enter")
    expect(page.get_by_role("option", name="Base model")).to_be_visible()
    page.keyboard.press("Enter")
    expect(page.get_by_role("region", name="Column B")).to_be_focused()
    page.get_by_role("button", name="Remove column B").press("Enter")
    expect(page.get_by_role("region", name="Columns")).to_be_focused()


def test_the_first_of_more_rows_takes_the_focus(tab: Tab) -> None:
    listed = httpx.get(f"{tab.url}/v1/interventions?limit=2").json()
    pages = [listed, listed | {"data": [listed["data"][0] | {"id": "last"}], "next": None}]
    context = tab.page.context
    context.route("**/v1/interventions?*", lambda route: route.fulfill(json=pages.pop(0)))
    page = tab.open("#/interventions")
    more = page.get_by_role("button", name="Show more")
    more.press("Enter")
    expect(page.locator("tbody tr").nth(2)).to_be_focused()
    expect(more).to_have_count(0)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="last")).to_be_focused()

    counts = dict.fromkeys(("requests", "prompt_tokens", "cached_tokens", "completion_tokens"), 1)
    rows = [{"intervention": f"task-{i}", **counts} for i in range(60)]
    used = httpx.get(f"{tab.url}/v1/usage").json() | {"data": rows, "total": counts}
    context.route("**/v1/usage?*", lambda route: route.fulfill(json=used))
    tab.open("#/server/usage")
    page.get_by_role("button", name="By intervention").click()
    more.press("Enter")
    expect(page.locator("tbody tr").nth(50)).to_be_focused()


def test_the_arrow_keys_keep_what_they_choose_in_sight(tab: Tab) -> None:
    page = tab.open()
    page.get_by_role("button", name="Column", exact=True).click()
    options = page.get_by_role("listbox").get_by_role("option")
    expect(options).to_have_count(9)
    listed = page.get_by_role("listbox").bounding_box()
    page.keyboard.press("ArrowUp")  # from the first to the last
    chosen = page.locator("[role=option][aria-selected=true]")
    expect(chosen).to_have_text(options.last.text_content() or "")
    shown = chosen.bounding_box()
    assert listed is not None
    assert shown is not None
    assert listed["y"] <= shown["y"]
    assert shown["y"] + shown["height"] <= listed["y"] + listed["height"]
