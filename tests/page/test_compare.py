"""Compare: what columns show is what the API answers; every control does what it says."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from playwright.sync_api import Request, Route, expect
from pydantic import SecretStr

from reft_runtime import Engine
from server.settings import Settings
from tests.helpers.serving import listening
from tests.page.conftest import Tab, overflow, page_server, violations
from tests.page.make import KEY, add_column, answered, answers, body, say, short

CHAT = "/v1/chat/completions"
PIRATE_COLUMN = {"parts": [{"name": "pirate", "strength": 0.5, "directions": None}]}


def alone(url: str, sent: dict[str, Any]) -> tuple[str, int]:
    """Text of a request by itself, not streamed, and how many tokens it has."""
    asked = {
        name: value for name, value in sent.items() if name not in ("stream", "stream_options")
    }
    answer = httpx.post(f"{url}{CHAT}", json=asked, timeout=60).json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]


def test_four_columns_give_what_four_requests_give(tab: Tab) -> None:
    page = tab.open()
    add_column(page, "formal")
    last = page.get_by_role("region", name="Column D")
    last.get_by_role("button", name="Compose with another").click()
    last.get_by_role("combobox").fill("cheer")
    last.get_by_role("option", name="cheerful").click()
    last.get_by_role("slider", name="Strength of formal").fill("0.5")
    short(page, 8)
    before = len(tab.asked)
    begun_before_an_end: list[int] = []

    def ended(request: Request) -> None:
        if request.url.endswith(CHAT):  # others, such as a search, may end late
            begun_before_an_end.append(len(tab.requests(CHAT)))

    page.on("requestfinished", ended)
    say(page, "What is a dog?")
    asked = tab.asked[before:]
    # One request for each column, nothing else, all under way before the first has ended.
    asked = [request for request in asked if not request.url.endswith("icon.svg")]
    assert [request.url for request in asked] == [f"{tab.url}{CHAT}"] * 4
    assert begun_before_an_end[0] == 4
    sent = [body(request) for request in asked]
    assert [one["model"] for one in sent[:3]] == ["SmolLM2-135M-Instruct", "pirate", "emoji"]
    assert sent[3]["interventions"] == [{"name": "formal", "strength": 0.5}, {"name": "cheerful"}]
    expected = [alone(tab.url, one) for one in sent]
    assert answers(page) == [text for text, _ in expected]
    figures = page.locator(".figures").all_text_contents()
    for said, (_, tokens) in zip(figures, expected, strict=True):
        assert said.startswith(f"{tokens} tokens")
        for part in ("first ", "tok/s", "cached"):
            assert part in said


def test_opening_asks_for_no_more_than_it_shows(tab: Tab) -> None:
    page = tab.open()
    expect(page.get_by_role("region", name="Column C")).to_be_visible()
    assert [request.url.removeprefix(tab.url) for request in tab.requests()] == [
        "/v1/me",
        "/v1/interventions?limit=50",
    ]
    short(page, 4)
    page.get_by_role("button", name="What's a dog?").click()
    answered(page)
    page.wait_for_timeout(400)  # longer than it takes until the address is written
    assert len(tab.requests()) == 5


def test_stop_keeps_what_came(tab: Tab, engine: Engine) -> None:
    page = tab.open()
    short(page, 700)
    page.get_by_role("button", name="Text", exact=True).click()
    page.locator(".composer textarea").fill("This is a very long story about a ship.")
    page.locator(".composer textarea").press("Control+Enter")
    base = page.get_by_role("region", name="Answer of Base model")
    expect(base.locator(".token")).not_to_have_count(0)
    page.get_by_role("button", name="Stop", exact=True).click()
    answered(page)
    expect(base).to_contain_text("stopped")
    assert answers(page)[0]
    # The text is still in its box, and the button is the one that sends it: it is not sent again.
    expect(page.get_by_role("button", name="Run", exact=True)).to_be_focused()
    assert len(tab.requests("/v1/completions")) == 3


def test_turns_go_on_are_edited_and_answered_again(tab: Tab) -> None:
    page = tab.open()
    page.get_by_role("button", name="Remove column C").click()
    short(page)
    say(page, "Who are you?")
    first = answers(page)
    say(page, "And who am I?")
    sent = [body(request) for request in tab.requests(CHAT)[-2:]]
    assert [turn["role"] for turn in sent[0]["messages"]] == ["user", "assistant", "user"]
    assert sent[0]["messages"][1]["content"] == first[0]
    # The pirate's own template takes one turn; the server says so, where the answer would be.
    expect(page.get_by_role("region", name="Answer of pirate").last).to_contain_text("one")
    assert page.locator(".problem").count() == 1

    # An answer is headed by what gave it, whatever its column applies now.
    page.get_by_role("slider", name="Strength of pirate").fill("0.5")
    expect(page.get_by_role("region", name="Answer of pirate", exact=True)).to_have_count(2)
    page.get_by_role("button", name="Strength of pirate back to 1").click()

    page.get_by_role("button", name="Edit this turn").first.click()
    page.get_by_label("The turn's text").fill("What's a dog?")
    page.get_by_role("button", name="Ask this instead").click()
    answered(page)
    expect(page.locator(".turn")).to_have_count(1)
    assert answers(page) != first
    again = answers(page)
    before = len(tab.requests(CHAT))
    page.get_by_role("button", name="Answer again: pirate").click()
    answered(page)
    assert len(tab.requests(CHAT)) == before + 1
    assert answers(page) == again
    # A conversation that was left is where the browser's way back leads.
    page.get_by_role("button", name="New", exact=True).click()
    expect(page.locator(".turn")).to_have_count(0)
    page.wait_for_timeout(400)  # longer than it takes until the address is written
    page.go_back()
    expect(page.locator(".turn .said")).to_have_text("What's a dog?")
    assert answers(page) == again


def test_strength_directions_and_settings_are_what_is_sent(tab: Tab) -> None:
    page = tab.open()
    card = page.get_by_role("region", name="Column B")
    card.get_by_role("slider").fill("-0.5")
    expect(card.get_by_role("status")).to_have_text("-0.50")
    card.get_by_text("Directions").click()
    card.get_by_role("button", name="3", exact=True).click()
    page.get_by_role("button", name="Settings").click()
    for label, value in (
        ("Temperature", "0.7"),
        ("Seed", "7"),
        ("Top k", "40"),
        ("Max tokens", "4"),
    ):
        page.get_by_label(label).fill(value)
    page.get_by_label("Stop texts").fill("END\n###")
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Remove column C").click()
    say(page, "Hello")
    base, edited = (body(request) for request in tab.requests(CHAT))
    for sent in (base, edited):
        assert (sent["temperature"], sent["seed"], sent["top_k"]) == (0.7, 7, 40)
        assert (sent["max_tokens"], sent["stop"]) == (4, ["END", "###"])
        assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
        assert "top_p" not in sent
    assert edited["interventions"] == [
        {"name": "pirate", "strength": -0.5, "subspace": [0, 1, 2, 4, 5, 6, 7]}
    ]
    card.get_by_role("button", name="Strength of pirate back to 1").click()
    expect(card.get_by_role("status")).to_have_text("1.00")


def test_tokens_show_what_else_was_likely(tab: Tab) -> None:
    page = tab.open()
    short(page)
    say(page, "Why is the sky blue?")
    base = page.get_by_role("region", name="Answer of Base model")
    base.locator(".token").nth(2).click()
    shown = base.get_by_role("region", name="Alternatives")
    expect(shown.get_by_role("listitem")).to_have_count(5)
    expect(shown.locator(".chosen")).to_have_count(1)
    # The keyboard goes from token to token.
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(base.locator(".token").nth(3)).to_have_attribute("aria-pressed", "true")
    page.get_by_role("combobox", name="Colour").select_option("none")
    expect(page.locator(".token")).to_have_count(0)


def test_tokens_show_how_far_they_are_from_the_base(tab: Tab) -> None:
    page = tab.open()
    short(page, 8)
    say(page, "Who are you?")
    before = len(tab.requests())
    page.get_by_role("combobox", name="Colour").select_option("distance")
    pirate = page.get_by_role("region", name="Answer of pirate")
    expect(pirate.locator(".d4")).not_to_have_count(0)
    # The base is asked once, about the tokens of all answers, and finds its own as it did.
    [asked] = tab.requests()[before:]
    sent = body(asked)
    assert (sent["model"], len(sent["prompt"])) == ("SmolLM2-135M-Instruct", 3)
    base = page.get_by_role("region", name="Answer of Base model")
    expect(base.locator(".token.d0")).to_have_count(8)
    pirate.locator(".d4").first.click()
    said = pirate.get_by_role("region", name="Alternatives").locator("p").text_content() or ""
    [share] = re.findall(r"gives it ([\d.]+) %", said)
    answer = json.loads(asked.response().text())["choices"][1]["logprobs"]  # type: ignore[union-attr]
    shown = pirate.locator(".token").all_text_contents()
    place = next(i for i, token in enumerate(reversed(answer["tokens"])) if token == shown[-1])
    assert place <= 1  # the answer's last token, but for what ended it
    assert 0 <= float(share) <= 100
    page.get_by_role("combobox", name="Colour").select_option("probability")
    page.get_by_role("combobox", name="Colour").select_option("distance")
    assert len(tab.requests()) == before + 1


def test_emoji_made_of_several_tokens_are_whole(tab: Tab) -> None:
    page = tab.open()
    short(page, 12)
    page.get_by_role("button", name="Who are you?").click()
    answered(page)
    emoji = page.get_by_role("region", name="Answer of emoji")
    pieces = emoji.locator(".token").all_text_contents()
    assert pieces
    assert "�" not in "".join(pieces)
    assert "".join(pieces) == answers(page)[2]


def test_what_a_model_thinks_stands_above_its_answer(tab: Tab) -> None:
    scored = [
        {"token": text, "logprob": -0.5, "bytes": [*text.encode()], "top_logprobs": []}
        for text in ("<think>", "Hm", ".", "</think>", "\n\n", "Well", "!")
    ]
    said = [
        ({"role": "assistant", "content": ""}, [], []),
        ({"reasoning_content": "Hm"}, [0, 1], scored[:2]),
        ({"reasoning_content": "."}, [2], scored[2:3]),
        ({}, [3, 4], scored[3:5]),
        ({"content": "Well"}, [5], scored[5:6]),
        ({"content": "!"}, [6], scored[6:]),
    ]
    choices = [
        {"index": 0, "delta": delta, "token_ids": ids, "logprobs": {"content": logprobs}}
        for delta, ids, logprobs in said
    ]
    events = [json.dumps({"choices": [choice | {"finish_reason": None}]}) for choice in choices]
    stream = "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])
    tab.page.context.route(
        f"**{CHAT}", lambda route: route.fulfill(body=stream, content_type="text/event-stream")
    )
    page = tab.open()
    say(page, "How?")
    answered(page)
    answer = page.get_by_role("region", name="Answer of pirate")
    expect(answer.locator(".thought")).to_have_text("ThinkingHm.")
    expect(answer.get_by_text("Hm.")).to_be_hidden()
    answer.get_by_text("Thinking").click()
    expect(answer.get_by_text("Hm.")).to_be_visible()
    assert answers(page) == ["Well!"] * 3
    tokens = answer.locator(".token")
    assert tokens.all_text_contents() == ["Well", "!"]
    expect(tokens.first).to_have_attribute("tabindex", "0")
    tokens.last.click()
    expect(answer.get_by_role("region", name="Alternatives")).to_contain_text("!")
    assert not violations(page)


def test_text_mode_continues_a_text(tab: Tab) -> None:
    page = tab.open()
    page.get_by_role("button", name="Text", exact=True).click()
    short(page, 6)
    page.locator(".composer textarea").fill("The capital of France is")
    page.locator(".composer textarea").press("Control+Enter")
    answered(page)
    sent = [body(request) for request in tab.requests("/v1/completions")]
    assert [one["prompt"] for one in sent] == ["The capital of France is"] * 3
    expect(page.get_by_role("region", name="Answer of Base model")).to_contain_text("Paris")
    expect(page.locator(".token")).not_to_have_count(0)


def test_labels_are_shown_as_bars(tab: Tab, new_tab: Callable[..., Tab], engine: Engine) -> None:
    page = tab.open()
    page.get_by_role("button", name="Remove column C").click()
    add_column(page, "sentiment")
    add_column(page, "question-type")
    page.get_by_role("button", name="Text", exact=True).click()
    short(page, 3)
    text = "Review: one long string of cliches .\nSentiment:"
    page.locator(".composer textarea").fill(text)
    page.locator(".composer textarea").press("Control+Enter")
    answered(page)
    # The listings said which name labels: only these two are asked for them.
    sent = [body(request) for request in tab.requests("/v1/classify")]
    assert sent == [{"model": name, "input": text} for name in ("sentiment", "question-type")]
    assert not tab.requests("/v1/interventions/")
    [found] = engine.classify(text, intervention="sentiment")
    bars = page.get_by_role("list", name="Labels of sentiment").get_by_role("listitem")
    shown = [f"{label}{100 * prob:.1f} %" for label, prob in found.ranked()]
    assert [re.sub(r"\s*\n\s*", "", bar) for bar in bars.all_inner_texts()] == shown
    expect(page.get_by_role("list", name="Labels of question-type").locator("li")).to_have_count(6)
    expect(page.locator(".labels")).to_have_count(2)

    page.wait_for_url(re.compile("#/compare/.{40}"))
    other = new_tab(width=400, height=800, dark=True)
    seen = other.open(page.url.removeprefix(f"{tab.url}/"))
    expect(seen.get_by_role("list", name="Labels of sentiment").locator("li")).to_have_count(2)
    assert not other.requests("/v1/classify")
    assert violations(seen) == []
    assert overflow(seen) == 0
    # A comparison from a link has seen no listing: the names are asked for, once.
    seen.get_by_role("button", name="Answer again: sentiment").click()
    answered(seen)
    assert len(other.requests("/v1/interventions/sentiment")) == 1
    assert len(other.requests("/v1/classify")) == 1


def test_requests_are_copied_and_pasted(tab: Tab) -> None:
    page = tab.open()
    short(page)
    page.get_by_role("slider", name="Strength of pirate").fill("1.5")
    say(page, "It's a dog's life, isn't it?")
    shown = answers(page)[1]
    page.get_by_role("button", name="The request of pirate").click()
    dialog = page.get_by_role("dialog")

    def copied(form: str) -> str:
        dialog.get_by_role("button", name=form, exact=True).click()
        dialog.get_by_role("button", name="Copy").click()
        expect(dialog.get_by_role("button", name="Copied")).to_be_visible()
        text: str = page.evaluate("() => navigator.clipboard.readText()")
        return text

    with redirect_stdout(StringIO()) as printed:
        exec(copied("Python"), {})
    assert printed.getvalue() == f"{shown}\n"
    curl = subprocess.run(
        ["bash", "-c", copied("curl")], capture_output=True, text=True, check=True
    )
    assert json.loads(curl.stdout)["choices"][0]["message"]["content"] == shown
    request = json.loads(copied("JSON"))
    assert request["interventions"] == [{"name": "pirate", "strength": 1.5}]
    page.keyboard.press("Escape")

    request |= {"temperature": 0.25, "interventions": [{"name": "emoji", "strength": 2}]}
    page.get_by_role("button", name="Paste a request into column A").click()
    dialog.get_by_role("textbox").fill("{")
    # A press that begins in the text and ends beside the dialog selects; it does not close.
    dialog.get_by_role("textbox").hover()
    page.mouse.down()
    page.mouse.move(2, 400)
    page.mouse.up()
    dialog.get_by_role("button", name="Take it over").click()
    expect(dialog.get_by_role("alert")).to_contain_text("not JSON")
    dialog.get_by_role("textbox").fill(json.dumps(request))
    dialog.get_by_role("button", name="Take it over").click()
    card = page.get_by_role("region", name="Column A")
    expect(card.get_by_role("slider", name="Strength of emoji")).to_have_value("2")
    expect(
        page.get_by_role("region", name="Answer of emoji \N{MULTIPLICATION SIGN} 2")
    ).to_contain_text("Not asked yet")
    page.get_by_role("button", name="Answer again", exact=True).click()
    answered(page)
    assert body(tab.requests(CHAT)[-3])["temperature"] == 0.25


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"interventions": ["pirate"]}, 'interventions must be a list of objects, such as {"name'),
        ({"interventions": {"name": "pirate"}}, "interventions must be a list of objects"),
        ({"interventions": [None]}, "interventions must be a list of objects"),
        ({"interventions": [{"name": "pirate", "strength": "x"}]}, "interventions must be a list"),
        ({"interventions": [{"name": "pirate", "subspace": "x"}]}, "interventions must be a list"),
        ({"messages": [None]}, "messages must be a list of objects"),
        ({"messages": ["Hi"]}, "messages must be a list of objects"),
        ({"messages": [{"role": "user", "content": {"text": "Hi"}}]}, "with texts alone"),
        ({"model": 5}, "model must be a name."),
        ({"stop": {"a": 1}}, "stop must be a text or a list of texts."),
        ({"temperature": "1"}, "temperature must be a number."),
    ],
)
def test_a_pasted_request_that_is_none_is_told(tab: Tab, fields: dict[str, Any], told: str) -> None:
    page = tab.open()
    page.get_by_role("button", name="Paste a request into column B").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("textbox").fill(json.dumps({"prompt": "Hi", **fields}))
    dialog.get_by_role("button", name="Take it over").click()
    expect(dialog.get_by_role("alert")).to_contain_text(told)
    dialog.get_by_role("textbox").fill(json.dumps({"prompt": "Hi", "interventions": None}))
    dialog.get_by_role("button", name="Take it over").click()
    expect(dialog).to_have_count(0)
    expect(page.get_by_role("region", name="Column B")).to_contain_text("as it is")


def test_a_link_and_a_file_show_the_same(
    tab: Tab, new_tab: Callable[..., Tab], tmp_path: Path
) -> None:
    page = tab.open()
    short(page)
    page.get_by_role("slider", name="Strength of pirate").fill("0.8")
    say(page, "Who are you?")
    shown = answers(page)
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    link = page.evaluate("() => navigator.clipboard.readText()")
    page.wait_for_url(link)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    file = tmp_path / "comparison.json"
    download.value.save_as(file)

    other = new_tab()
    seen = other.open(link.removeprefix(f"{tab.url}/"))
    expect(seen.locator(".text")).to_have_text(shown)
    expect(seen.get_by_role("slider", name="Strength of pirate")).to_have_value("0.8")
    assert [request.url for request in other.requests()] == [f"{tab.url}/v1/me"]

    third = new_tab()
    seen = third.open()
    seen.get_by_label("A comparison's file").set_input_files(file)
    expect(seen.locator(".text")).to_have_text(shown)
    expect(seen.locator(".token")).not_to_have_count(0)
    whole = json.loads(file.read_text())
    [turn] = whole["turns"]
    broken: dict[str, Any]
    for broken in (
        {},
        whole | {"mode": "song"},
        whole | {"colour": "red"},
        whole | {"columns": [{}]},
        whole | {"columns": [{"parts": [{"name": "pirate"}]}]},
        whole | {"turns": [{}]},
        whole | {"turns": [turn | {"answers": [{"text": "Aye."}]}]},
        whole | {"turns": [turn | {"answers": [turn["answers"][0] | {"figures": {}}]}]},
        whole | {"turns": [turn | {"answers": [turn["answers"][0] | {"pieces": [{}]}]}]},
    ):
        other_file = tmp_path / "broken.json"
        other_file.write_text(json.dumps(broken))
        seen.get_by_label("A comparison's file").set_input_files(other_file)
        expect(seen.get_by_role("alert")).to_contain_text("no comparison")
        seen.get_by_label("A comparison's file").set_input_files(file)
        expect(seen.get_by_role("alert")).to_have_count(0)
        expect(seen.locator(".text")).to_have_text(shown)
    other.open("#/compare/nonsense")
    expect(other.page.get_by_role("alert")).to_contain_text("no comparison")


def test_the_key_is_asked_for_once(
    keyed_url: str, new_tab: Callable[..., Tab], monkeypatch: pytest.MonkeyPatch
) -> None:
    tab = new_tab(keyed_url)
    page = tab.open()
    dialog = page.get_by_role("dialog", name="This server needs a key")
    dialog.get_by_label("API key").fill("wrong")
    dialog.get_by_label("API key").press("Enter")
    expect(dialog.get_by_role("alert")).to_contain_text("did not take")
    dialog.get_by_label("API key").fill(KEY)
    dialog.get_by_role("button", name="Use this key").click()
    short(page, 4)
    say(page, "Hello")
    expect(dialog).to_have_count(0)
    page.get_by_role("button", name="The request of pirate").click()
    copied = page.get_by_role("dialog")
    copied.get_by_role("button", name="Python", exact=True).click()
    monkeypatch.setenv("REFT_API_KEY", KEY)
    with redirect_stdout(StringIO()) as printed:
        exec(copied.locator("pre").text_content() or "", {})
    assert printed.getvalue() == f"{answers(page)[1]}\n"
    page.keyboard.press("Escape")
    page.reload()
    expect(page.get_by_role("region", name="Column A")).to_be_visible()
    page.get_by_role("button", name="(owner) admin").click()
    page.get_by_role("button", name="Forget key").click()
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("alert")).to_contain_text("API key")
    assert tab.page.evaluate("() => localStorage.length") == 0


def test_a_key_may_have_any_letters(new_tab: Callable[..., Tab], engine: Engine) -> None:
    settings = Settings(api_key=SecretStr("clé-ключ"))
    with listening(page_server(engine, settings)) as url:
        page = new_tab(url).open()
        dialog = page.get_by_role("dialog", name="This server needs a key")
        dialog.get_by_label("API key").fill("clé-ключ")
        dialog.get_by_label("API key").press("Enter")
        expect(page.get_by_role("button", name="(owner) admin")).to_be_visible()
        page.goto("about:blank")  # it asks for more, and the server ends


def test_a_server_that_is_gone_is_said(tab: Tab) -> None:
    page = tab.page
    page.context.route("**/v1/me", lambda route: route.abort())
    tab.open()
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    page.context.unroute("**/v1/me")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("region", name="Column A")).to_be_visible()
    tab.faults = [fault for fault in tab.faults if "net::ERR_FAILED" not in fault]


def test_an_answer_that_breaks_off_is_said(tab: Tab) -> None:
    context = tab.page.context
    begun = {"index": 0, "delta": {"content": "Aye"}, "finish_reason": None}
    event = f"data: {json.dumps({'choices': [begun]})}\n\n"
    context.route(f"**{CHAT}", lambda route: route.fulfill(body=event))
    page = tab.open()
    say(page, "Hello " * 500)
    answer = page.get_by_role("region", name="Answer of pirate")
    expect(answer.get_by_role("alert")).to_have_text("The answer broke off.")
    expect(answer.locator(".text")).to_have_text("Aye")
    # A long turn leaves room for its answers.
    asked = page.locator(".said").bounding_box()
    assert asked is not None
    assert asked["height"] <= 0.4 * 800
    assert not violations(page)
    context.route("**/v1/interventions/pirate", lambda route: route.fulfill(body="<html>"))
    page.goto(f"{tab.url}/#/interventions/pirate")
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("answer broke off, or")
    # Without the server there is nothing to look into, until it is back; and none may be served.
    listing = "**/v1/interventions?limit=50"
    context.route(listing, lambda route: route.abort())
    page.goto(f"{tab.url}/#/look")
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    context.unroute(listing)
    context.route(listing, lambda route: route.fulfill(json={"data": [], "total": 0}))
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_text("No intervention is served")).to_be_visible()
    tab.faults = [fault for fault in tab.faults if "net::ERR_FAILED" not in fault]


def test_what_is_too_long_for_a_link_is_kept_and_told(
    tab: Tab, new_tab: Callable[..., Tab]
) -> None:
    page = tab.open()
    text = Random(7).randbytes(60_000).hex()
    saved = {"version": 1, "turns": [{"user": text, "answers": [None]}], "columns": [PIRATE_COLUMN]}
    file = {"name": "long.json", "mimeType": "", "buffer": json.dumps(saved).encode()}
    page.get_by_label("A comparison's file").set_input_files(file)  # type: ignore[arg-type]
    said = page.locator(".turn .said")
    expect(said).to_have_text(text)
    page.wait_for_url(re.compile("#/compare/."))
    assert len(page.url) < 60_000
    page.reload()
    expect(said).to_have_text(text)
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_role("alert")).to_contain_text("The link holds the columns")
    link = page.evaluate("() => navigator.clipboard.readText()")
    # What was dropped is found again by the browser's way back.
    page.get_by_role("button", name="New", exact=True).click()
    expect(said).to_have_count(0)
    page.wait_for_timeout(400)  # longer than it takes until the address is written
    page.go_back()
    expect(said).to_have_text(text)
    # The link to the view that is open changes nothing, also when the page is loaded again.
    page.get_by_role("link", name="Compare").click()
    page.wait_for_url(re.compile("#/compare/."))
    page.reload()
    expect(said).to_have_text(text)

    other = new_tab().open(link.removeprefix(f"{tab.url}/"))
    expect(other.get_by_role("slider", name="Strength of pirate")).to_have_value("0.5")
    expect(other.locator(".turn")).to_have_count(0)


def test_a_link_is_there_when_it_is_to_be_copied(tab: Tab) -> None:
    page = tab.open()
    page.wait_for_url(re.compile("#/compare/."))
    # Safari copies what a press has at once, and nothing that comes later.
    page.evaluate("() => { window.CompressionStream = null; }")
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("() => navigator.clipboard.readText()") == page.url


def test_an_answer_says_what_it_waits_for_and_counts_from_its_sending(tab: Tab) -> None:
    page = tab.page
    held: list[Route] = []
    page.context.route(f"**{CHAT}", lambda route: held.append(route))
    me = httpx.get(f"{tab.url}/v1/me").json() | {"concurrent_requests": 1}
    page.context.route("**/v1/me", lambda route: route.fulfill(json=me))
    page.clock.install()
    tab.open()
    page.get_by_role("button", name="Remove column C").click()
    page.get_by_role("button", name="Who are you?").click()
    figures = page.locator(".figures")
    expect(figures).to_have_text(["waits for a connection", "waits until another has ended"])
    page.clock.run_for(60_000)
    choice = {"index": 0, "delta": {"content": "Aye"}, "token_ids": [5], "finish_reason": "stop"}
    stream = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    held[0].fulfill(body=stream)
    expect(figures.first).to_contain_text(re.compile(r"first 6\d\.\d\d s"))
    expect(figures.last).to_have_text("waits for a connection")
    held[1].fulfill(body=stream)
    answered(page)
    # The minute that it waited for its turn is not the server's.
    expect(figures.last).to_contain_text("first ")
    expect(figures.last).not_to_contain_text(re.compile(r"first 6\d\.\d\d s"))
