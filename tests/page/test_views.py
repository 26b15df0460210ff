"""Interventions, Server, the reference; and of every view: no fault by axe-core, room for all."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from reft_runtime import Engine
from tests.page.conftest import INTERVENTIONS, Tab, overflow, violations
from tests.page.make import KEY, answered, body, say, short

PIRATE, EMOJI = (INTERVENTIONS / f"{name}.safetensors" for name in ("pirate", "emoji"))


@pytest.fixture
def mine(engine: Engine) -> Iterator[str]:
    """A name that a test may upload to; it is served no longer afterwards."""
    yield "mine"
    if "mine" in [entry.name for entry in engine.registry.entries()]:
        engine.registry.remove("mine")


def upload(page: Page, source: Path, name: str, folder: Path) -> None:
    """Give the page a file called `name` with the content of `source`."""
    file = folder / name
    file.write_bytes(source.read_bytes())
    page.get_by_label("Files to upload").set_input_files(file)


def test_the_table_is_searched_sorted_and_paged_by_the_server(tab: Tab) -> None:
    page = tab.open("#/interventions")
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(8)
    expect(page.get_by_text("8 served")).to_be_visible()
    page.get_by_label("Search names").fill("PIRATE")
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("Answers in the voice of a pirate.")
    expect(rows).to_contain_text("36,896")
    page.get_by_label("Search names").fill("no such thing")
    expect(page.get_by_text("Nothing is found")).to_be_visible()
    page.get_by_label("Search names").fill("")
    expect(rows).to_have_count(8)
    page.get_by_role("button", name="Size").click()
    expect(page.locator("th[aria-sort=descending]")).to_contain_text("Size")
    page.get_by_role("button", name="Size").click()
    expect(rows.first).to_contain_text("cheerful")
    last = tab.requests("/v1/interventions")[-1].url
    assert last.endswith("?limit=50&sort=size")


def test_more_than_a_page_is_asked_for_when_it_is_wanted(tab: Tab) -> None:
    entries = httpx.get(f"{tab.url}/v1/interventions?limit=2").json()
    answer = {**entries, "total": 10_000}
    tab.page.context.route("**/v1/interventions?*", lambda route: route.fulfill(json=answer))
    page = tab.open("#/interventions")
    expect(page.get_by_text("2 of 10,000")).to_be_visible()
    page.get_by_role("button", name="Show more").click()
    expect(page.get_by_text("4 of 10,000")).to_be_visible()
    assert f"after={entries['next']}" in tab.requests("/v1/interventions")[-1].url
    # After a change all that was shown is shown again.
    answer["data"] = [entries["data"][0] | {"id": f"task-{i}"} for i in range(60)]
    page.get_by_role("button", name="Show more").click()
    expect(page.locator("tbody tr")).to_have_count(64)
    tab.page.context.route(
        "**/v1/interventions/new", lambda route: route.fulfill(json=answer["data"][0])
    )
    page.get_by_label("Files to upload").set_input_files(
        {"name": "new.safetensors", "mimeType": "", "buffer": b"new"}
    )
    expect(page.locator("tbody tr")).to_have_count(60)
    assert "limit=64" in tab.requests("/v1/interventions")[-1].url


def test_upload_replace_roll_back_download_and_delete(tab: Tab, mine: str, tmp_path: Path) -> None:
    page = tab.open("#/interventions")
    upload(page, PIRATE, "mine.safetensors", tmp_path)
    uploads = page.get_by_role("list", name="Uploads")
    expect(uploads).to_contain_text("mine is served, version")
    expect(page.locator("tbody tr")).to_have_count(9)
    # A name that is taken is replaced only when that is said.
    upload(page, EMOJI, "mine.safetensors", tmp_path)
    expect(uploads).to_contain_text("mine is served already.")
    (tmp_path / "mine.safetensors").unlink()
    page.get_by_role("button", name="Replace it").click()
    expect(uploads.get_by_role("alert")).to_contain_text("mine.safetensors cannot be read")
    expect(uploads.get_by_role("listitem").last).to_be_focused()  # the button is gone
    page.get_by_role("button", name="Dismiss mine.safetensors").last.click()
    expect(page.get_by_role("button", name="Dismiss mine.safetensors")).to_be_focused()
    upload(page, EMOJI, "mine.safetensors", tmp_path)
    page.get_by_role("button", name="Replace it").click()
    expect(uploads.locator(".done")).to_have_count(2)

    page.get_by_role("link", name="mine").click()
    dialog = page.get_by_role("dialog", name="mine")
    expect(dialog).to_contain_text("Answers in emoji only.")
    expect(dialog.get_by_role("region", name="Versions").get_by_role("listitem")).to_have_count(2)
    dialog.get_by_role("button", name="Roll back to").click()
    expect(dialog).to_contain_text("Answers in the voice of a pirate.")
    served = dialog.get_by_role("listitem").filter(has_text="served")
    expect(served).to_be_focused()  # the button is gone
    expect(page.locator("tbody tr", has_text="mine")).to_contain_text("voice of a pirate")
    with page.expect_download() as download:
        dialog.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "mine.safetensors"
    assert download.value.path().read_bytes() == PIRATE.read_bytes()
    dialog.get_by_label("A new file for mine").set_input_files(EMOJI)
    expect(dialog).to_contain_text("Answers in emoji only.")

    dialog.get_by_role("button", name="Delete", exact=True).click()
    dialog.get_by_role("button", name="Keep it").click()
    dialog.get_by_role("button", name="Delete", exact=True).click()
    dialog.get_by_role("button", name="Delete mine").click()
    expect(dialog).to_have_count(0)
    expect(page.locator("tbody tr")).to_have_count(8)
    expect(page.get_by_role("link", name="pirate")).to_be_focused()  # the row below


def test_a_drop_that_is_refused_says_why_in_place(tab: Tab) -> None:
    page = tab.open("#/interventions")
    expect(page.locator("tbody tr")).to_have_count(8)
    dropped = page.evaluate_handle(
        """() => {
            const data = new DataTransfer();
            data.items.add(new File(["not an intervention"], "broken.safetensors"));
            return data;
        }"""
    )
    page.dispatch_event("header", "dragover", {"dataTransfer": dropped})
    expect(page.locator(".drop.over")).to_be_visible()
    page.dispatch_event("header", "drop", {"dataTransfer": dropped})
    answer = httpx.put(f"{tab.url}/v1/interventions/broken", content=b"not an intervention")
    said = answer.json()["error"]["message"]
    expect(page.locator(".uploads").get_by_role("alert")).to_have_text(said)
    page.get_by_role("button", name="Dismiss broken.safetensors").click()
    expect(page.locator(".uploads")).to_have_count(0)


def test_a_name_that_is_none_is_said(tab: Tab) -> None:
    page = tab.open("#/interventions/%")
    expect(page.get_by_role("dialog", name="%").get_by_role("alert")).to_be_visible()


def test_a_change_of_another_is_not_undone(tab: Tab, mine: str) -> None:
    url = f"{tab.url}/v1/interventions/mine"
    httpx.put(url, content=PIRATE.read_bytes())
    page = tab.open("#/interventions/mine")
    dialog = page.get_by_role("dialog", name="mine")
    expect(dialog).to_contain_text("voice of a pirate")
    httpx.put(url, content=EMOJI.read_bytes())
    dialog.get_by_role("button", name="Delete", exact=True).click()
    dialog.get_by_role("button", name="Delete mine").click()
    expect(dialog.get_by_role("alert")).to_be_visible()
    assert httpx.get(url).status_code == 200


def test_try_it_opens_compare(tab: Tab) -> None:
    page = tab.open("#/interventions/telegram")
    page.get_by_role("button", name="Try it").click()
    expect(page.get_by_role("slider", name="Strength of telegram")).to_be_visible()
    expect(page.get_by_role("region", name="Column C")).to_have_count(0)
    assert page.title() == "Compare · SmolLM2-135M-Instruct"


def test_edits_by_layer_are_those_of_the_trace(tab: Tab) -> None:
    page = tab.open("#/look")
    expect(page.get_by_text("Press Look to see")).to_be_visible()
    page.get_by_label("Max tokens").fill("4")
    page.get_by_role("button", name="Look", exact=True).click()
    edited = page.locator(".heat td[title]")
    # f3+l3 at four layers of a prompt of 13 tokens.
    expect(edited).to_have_count(4 * 6)
    expect(page.locator(".heat tbody th")).to_have_text(["24", "18", "12", "6"])
    tokens = page.locator(".heat thead span")
    expect(tokens.first).to_have_text("<|im_start|>")
    expect(tokens).to_have_count(13)
    asked = next(request for request in tab.requests("/v1/chat") if request.post_data)
    response = asked.response()
    assert response is not None
    trace = response.json()["trace"][0]
    sizes = [edit["relative_size"] for edit in trace["edits"] if edit["layer"] == 24]
    row = page.locator(".heat tbody tr").first.locator("td[title]").all_text_contents()
    assert [float(text) for text in row] == pytest.approx(sizes, rel=0.06)
    expect(page.get_by_role("region", name="Edits")).to_contain_text(f"{trace['kl']:.3f} nats")
    expect(page.get_by_role("region", name="Answer").locator(".token")).to_have_count(4)
    expect(page.get_by_role("img", name="Nats from the base")).to_be_visible()
    assert len(tab.requests("/v1/c")) == 2


def test_a_fan_asks_at_every_strength(tab: Tab) -> None:
    page = tab.open("#/look")
    page.get_by_role("button", name="Fan of strengths").click()
    for label, value in (("Max tokens", "4"), ("From", "0"), ("To", "1"), ("Step", "0.5")):
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_role("button", name="Ask at 3 strengths").click()
    expect(page.get_by_role("img", name="Mean distance").first).to_have_attribute(
        "aria-label", re.compile(r"distance \d")
    )
    sent = [body(request) for request in tab.requests("/v1/chat")]
    assert [one.get("interventions") for one in sent] == [
        [{"name": "pirate", "strength": 0}],
        [{"name": "pirate", "strength": 0.5}],
        None,  # as trained: the model's own name says it
    ]
    assert sent[2]["model"] == "pirate"
    lines = page.get_by_role("list", name="Answers by strength").get_by_role("listitem")
    expect(lines).to_have_count(3)
    expect(lines.last).to_contain_text("Arr")
    expect(page.get_by_text('pirate, over "Who are you?"')).to_be_visible()
    assert len(tab.requests("/v1/completions")) == 1


def test_the_server_is_looked_at_while_its_view_is_open(tab: Tab) -> None:
    tab.page.clock.install()
    page = tab.open("#/server")
    expect(page.get_by_role("heading", name="Server")).to_be_visible()
    expect(page.get_by_role("status")).to_have_text("ready")
    for title in ("Tokens a second", "Requests", "Cache", "First token", "Between tokens"):
        expect(page.get_by_role("img", name=title)).to_be_visible()
    with page.expect_request("**/v1/stats"):
        page.clock.run_for(2000)
    page.get_by_role("link", name="Interventions").click()
    expect(page.locator("tbody tr")).to_have_count(8)
    asked = len(tab.requests("/v1/stats"))
    page.clock.run_for(10_000)
    assert len(tab.requests("/v1/stats")) == asked


def test_what_is_wrong_with_the_server_is_told(tab: Tab) -> None:
    ago = [400, 2]

    def wrong(route: Route) -> None:
        answer = route.fetch()
        told = answer.json() | {"problems": ["s3://tasks: The source is away."]}
        told["time"] -= ago.pop(0) if ago else 0
        route.fulfill(response=answer, json=told)

    tab.page.clock.install()
    tab.page.route("**/v1/stats", wrong)
    page = tab.open("#/server")
    expect(page.get_by_role("alert")).to_contain_text("The source is away")
    expect(page.get_by_role("status")).to_have_text("ready")
    # One reading has one time; the second is later by more than the charts show.
    ends = page.locator(".ends").first
    expect(ends).to_have_text("now")
    page.clock.run_for(2000)
    expect(page.locator(".chart")).to_have_count(5)
    page.wait_for_function("() => true")
    expect(ends).to_have_text("now")
    page.clock.run_for(2000)
    expect(ends).to_have_text("2 s agonow")


def test_the_reference_shows_every_route_and_its_fields(tab: Tab) -> None:
    page = tab.open("docs")
    document = httpx.get(f"{tab.url}/openapi.json").json()
    operations = sum(len(methods) for methods in document["paths"].values())
    expect(page.locator(".operation")).to_have_count(operations)
    page.get_by_label("Search routes").fill("/v1/chat")
    page.locator(".operation summary").first.click()
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    shown = page.locator(".operation[open] > .stack > .fields-list > div > dt > code")
    expect(shown).to_have_count(len(fields))
    assert set(shown.all_text_contents()) == set(fields)
    about = page.locator(".operation[open] > .stack > .fields-list > div > dd").all_text_contents()
    said = dict(zip(shown.all_text_contents(), about, strict=True))
    assert "922337203685477" not in said["priority"]
    assert "must be empty" in said["bad_words"]
    expect(page.locator(".operation[open] .code")).to_contain_text("Who are you?")
    answers = page.locator(".operation[open] .answers")
    answers.get_by_text("text/event-stream").click()
    expect(answers.get_by_role("heading", name="ChatCompletionChunk")).to_be_visible()
    page.get_by_role("link", name="Compare").click()
    expect(page.get_by_role("region", name="Column A")).to_be_visible()


def compare(page: Page) -> None:
    short(page)
    say(page, "Who are you?")
    page.locator(".token").first.click()
    page.get_by_role("button", name="Settings").click()
    page.get_by_text("Directions").first.click()
    expect(page.locator(".toggles")).to_be_visible()


def dialog(page: Page) -> None:
    page.get_by_role("button", name="Paste a request into column A").click()


def picker(page: Page) -> None:
    page.get_by_role("button", name="Column", exact=True).click()
    expect(page.get_by_role("listbox").get_by_role("option").nth(2)).to_be_visible()


def details(page: Page) -> None:
    expect(page.get_by_role("region", name="Versions").get_by_role("listitem")).to_have_count(1)
    page.get_by_text("Prompt template").click()


def table(page: Page) -> None:
    expect(page.locator("tbody tr")).to_have_count(8)


def charts(page: Page) -> None:
    expect(page.locator(".chart")).to_have_count(5)


def used(page: Page) -> None:
    expect(page.locator(".used tbody tr")).to_have_count(7)


def inside(page: Page) -> None:
    page.get_by_label("Max tokens").fill("4")
    page.get_by_role("button", name="Look", exact=True).click()
    expect(page.locator(".heat")).to_be_visible()


def fan(page: Page) -> None:
    page.get_by_role("button", name="Fan of strengths").click()
    page.get_by_label("Max tokens").fill("2")
    page.get_by_role("button", name="Ask at 7 strengths").click()
    expect(page.get_by_role("button", name="Ask at 7 strengths")).to_be_visible()


def reference(page: Page) -> None:
    page.locator(".operation summary", has_text="/v1/completions").click()


@pytest.mark.parametrize(("dark", "looked_at"), [(False, 400), (True, 1280)], ids=["light", "dark"])
def test_every_view_is_accessible_and_fits(
    new_tab: Callable[..., Tab], dark: bool, looked_at: int
) -> None:
    tab = new_tab(width=400, height=800, dark=dark)
    page = tab.page
    for place, prepare in (
        ("#/compare", compare),
        ("#/look", inside),
        ("#/look", fan),
        ("#/interventions", table),
        ("#/interventions/pirate", details),
        ("#/server", charts),
        ("#/server/usage", used),
        ("docs", reference),
        ("#/compare", picker),
        ("", dialog),
    ):
        tab.open(place)
        prepare(page)
        for width in (400, 1280):
            page.set_viewport_size({"width": width, "height": 800})
            assert overflow(page) == 0, (place, width)
            if width == looked_at:
                assert violations(page) == [], (place, width)
        page.set_viewport_size({"width": 400, "height": 800})


def test_the_colours_are_chosen_and_kept(tab: Tab) -> None:
    page = tab.open()
    # What was typed is kept, too, in other views and when the page is loaded again.
    page.get_by_label("Ask something").fill("Who")
    page.get_by_role("link", name="Interventions").click()
    page.get_by_role("link", name="Compare").click()
    expect(page.get_by_label("Ask something")).to_have_value("Who")
    page.get_by_role("button", name="Dark colours").click()
    page.reload()
    expect(page.get_by_label("Ask something")).to_have_value("Who")
    expect(page.get_by_role("button", name="Light colours")).to_be_visible()
    scheme = page.evaluate("() => getComputedStyle(document.documentElement).colorScheme")
    assert scheme == "dark"
    answered(page)


def test_a_browser_that_blocks_all_storage_keeps_nothing_but_shows_the_page(
    keyed_url: str, new_tab: Callable[..., Tab]
) -> None:
    tab = new_tab(keyed_url)
    page = tab.page
    page.add_init_script(
        "for (const name of ['localStorage', 'sessionStorage']) Object.defineProperty(window, name,"
        " { get() { throw new DOMException('Access is denied.', 'SecurityError'); } });"
    )
    tab.open()
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("API key").press("Enter")
    page.get_by_label("Ask something").fill("Who")
    page.get_by_role("button", name="Dark colours").click()
    page.get_by_role("link", name="Interventions").click()
    expect(page.locator("tbody tr")).to_have_count(8)  # the key is asked for once
    page.get_by_role("link", name="Compare").click()
    expect(page.get_by_label("Ask something")).to_have_value("Who")
    page.reload()
    expect(page.get_by_role("button", name="Dark colours")).to_be_visible()
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("API key").press("Enter")
    expect(page.get_by_label("Ask something")).to_have_value("")
    tab.open("docs")
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("API key").press("Enter")
    expect(page.locator(".operation").first).to_be_visible()


@pytest.mark.parametrize("width", [320, 360, 768, 1000, 1100])
def test_the_ways_to_all_views_fit_beside_a_key(
    keyed_url: str, new_tab: Callable[..., Tab], width: int
) -> None:
    tab = new_tab(keyed_url, width=width)
    tab.use(KEY)
    page = tab.open()
    expect(page.get_by_role("button", name="(owner) admin")).to_be_visible()
    hidden = page.evaluate(
        "() => { const nav = document.querySelector('.top nav');"
        " return nav.scrollWidth - nav.clientWidth; }"
    )
    assert hidden == 0
    assert page.evaluate("() => document.documentElement.scrollWidth") == width
    assert page.evaluate("() => document.querySelector('.brand').offsetHeight") < 30  # one line


def test_fields_on_a_touch_screen_have_text_that_ios_does_not_enlarge(
    browser: Browser, url: str
) -> None:
    context = browser.new_context(
        viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True
    )
    page = context.new_page()
    for place, ready in (("#/compare", ".card"), ("#/look", ".look-subject .name")):
        page.goto(f"{url}/{place}")
        expect(page.locator(ready).first).to_be_visible()
        if place == "#/compare":
            page.get_by_role("button", name="Settings").tap()
            page.get_by_role("button", name="Paste a request into column A").tap()
        sizes = page.locator("input:not([type=range], [type=file]), select, textarea")
        script = "(all) => all.map((one) => parseFloat(getComputedStyle(one).fontSize))"
        assert min(sizes.evaluate_all(script)) >= 16
        assert overflow(page) == 0
    context.close()


def test_a_text_runs_as_its_script_does(tab: Tab) -> None:
    page = tab.open()
    box = page.get_by_label("Ask something")
    box.fill("שלום.")
    first, last = page.evaluate(
        "() => { const said = document.createElement('p'); said.className = 'text';"
        " said.textContent = 'שלום.'; document.querySelector('main').append(said);"
        " const at = (i) => { const range = document.createRange();"
        " range.setStart(said.firstChild, i); range.setEnd(said.firstChild, i + 1);"
        " return range.getBoundingClientRect().left; }; return [at(0), at(4)]; }"
    )
    assert first > last, "the full stop is at the left end, behind the last letter"
    for place in ("textarea", ".text"):
        style = f"() => getComputedStyle(document.querySelector('{place}')).unicodeBidi"
        assert page.evaluate(style) == "plaintext"


def test_high_contrast_shows_what_is_chosen_and_what_colours_say(tab: Tab) -> None:
    page = tab.page
    page.emulate_media(forced_colors="active")

    def styles(selector: str, name: str) -> int:
        """How many values a property has in these elements."""
        script = (
            "([selector, name]) => new Set([...document.querySelectorAll(selector)]"
            ".map((one) => getComputedStyle(one)[name])).size"
        )
        found: int = page.evaluate(script, [selector, name])
        return found

    tab.open("#/look")
    inside(page)
    assert styles(".heat td[class]", "backgroundColor") > 3
    assert styles(".legend i", "backgroundColor") == 9
    chosen = page.locator(".segmented [aria-pressed=true]").evaluate(
        "(chosen) => { const before = getComputedStyle(chosen).backgroundColor;"
        " chosen.style.backgroundColor = 'Highlight';"
        " return before === getComputedStyle(chosen).backgroundColor; }"
    )
    assert chosen, "it has the system's colour of what is selected"
    assert styles(".top nav a", "borderBottomColor") == 2
    assert styles(".text .token", "backgroundColor") > 1
    page.goto(f"{tab.url}/#/compare")
    picker(page)
    assert styles("[role=option]", "backgroundColor") == 2


def test_on_paper_a_comparison_is_dark_on_white_and_whole(tab: Tab) -> None:
    page = tab.open()
    page.get_by_role("button", name="Dark colours").click()
    short(page, 2)
    say(page, "Hello " * 500)
    page.emulate_media(media="print")
    assert page.evaluate("() => getComputedStyle(document.documentElement).colorScheme") == "light"
    expect(page.locator(".composer")).to_be_hidden()
    hidden = "(said) => said.scrollHeight - said.clientHeight"
    assert page.locator(".said").evaluate(hidden) == 0
