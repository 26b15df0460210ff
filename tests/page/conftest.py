"""The page in Chromium, against the demo model, with no network but the server itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, Request, Route, expect, sync_playwright
from pydantic import SecretStr

from reft_runtime import Engine
from server.app import create_app
from server.connections import Limits
from server.lifecycle import HttpServer
from server.settings import Settings
from tests.helpers.serving import listening
from tests.page.make import KEY, keys_file

INTERVENTIONS = Path(__file__).parents[2] / "interventions"
AXE = (Path(__file__).parent / "vendor/axe.min.js").read_text()
PATIENCE_MS = 30_000
"""How long a state of the page is waited for: the machine may have much to do."""


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(
        "demo",
        interventions=INTERVENTIONS,
        state_dir=tmp_path_factory.mktemp("state"),
        dtype="float32",
        max_model_len=1024,
    ) as engine:
        yield engine


def page_server(engine: Engine, settings: Settings) -> HttpServer:
    """A server of the page, which is still to listen."""
    return HttpServer(create_app(engine, settings), Limits(100))


@pytest.fixture(scope="session")
def url(engine: Engine) -> Iterator[str]:
    with listening(page_server(engine, Settings())) as address:
        yield address


@pytest.fixture
def keyed_url(engine: Engine) -> Iterator[str]:
    """The address of a server that asks for `KEY`."""
    with listening(page_server(engine, Settings(api_key=SecretStr(KEY)))) as address:
        yield address


@pytest.fixture
def tenants_url(engine: Engine, tmp_path: Path) -> Iterator[str]:
    """The address of a server with the tenants of `KEYS`, and `KEY` for its owner."""
    file = tmp_path / "keys.toml"
    file.write_text(keys_file())
    settings = Settings(keys=file, api_key=SecretStr(KEY))
    with listening(page_server(engine, settings)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium. It is closed after each module: Playwright keeps an event loop running in this
    thread, beside which no asynchronous test of another module could have its own."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("the page is tried in Chromium, and there is none (apt-get install chromium)")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """One page of the browser: what it asked for, and what went wrong in it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.asked: list[Request] = []
        self.faults: list[str] = []
        page.context.route("**/*", self._only_the_server)
        page.on("request", lambda request: self.asked.append(request))
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", lambda said: self._look(said.type, said.text))

    def open(self, place: str = "") -> Page:
        """Open a place of the server's page."""
        self.page.goto(f"{self.url}/{place}")
        return self.page

    def use(self, key: str) -> None:
        """Show this key with every request, as if it had been given before."""
        self.page.add_init_script(f"sessionStorage.setItem('reft-key', '{key}')")

    def requests(self, path: str = "/v1/") -> list[Request]:
        """Requests so far whose path begins so."""
        return [request for request in self.asked if urlsplit(request.url).path.startswith(path)]

    def _only_the_server(self, route: Route) -> None:
        if route.request.url.startswith((self.url, "blob:")):
            route.fallback()
        else:
            self.faults.append(f"asked for {route.request.url}")
            route.abort()

    def _look(self, kind: str, text: str) -> None:
        # An error that the API answers is shown by the page; Chromium writes it down as well.
        if kind in ("error", "warning") and "the server responded with a status of" not in text:
            self.faults.append(text)


@pytest.fixture
def new_tab(browser: Browser, url: str) -> Iterator[Callable[..., Tab]]:
    """Makes tabs; at the end of a test nothing must have gone wrong in any.

    A test names it behind the fixtures of the servers that it opens: the tabs are closed first.
    """
    tabs: list[Tab] = []

    def make(at: str = url, width: int = 1280, height: int = 800, dark: bool = False) -> Tab:
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",  # colours on their way to others have any contrast
            permissions=["clipboard-read", "clipboard-write"],
        )
        context.set_default_timeout(PATIENCE_MS)
        tabs.append(Tab(context.new_page(), at))
        return tabs[-1]

    yield make
    for tab in tabs:
        tab.page.context.close()
    assert [fault for tab in tabs for fault in tab.faults] == []


@pytest.fixture
def tab(new_tab: Callable[..., Tab]) -> Tab:
    return new_tab()


def violations(page: Page) -> list[str]:
    """What axe-core finds wrong with the page as it stands."""
    if not page.evaluate("() => 'axe' in window"):
        page.evaluate(AXE)
    found = page.evaluate("() => axe.run()")["violations"]
    return [
        f"{one['id']}: {node['html'][:200]} {node['failureSummary']}"
        for one in found
        for node in one["nodes"]
    ]


def overflow(page: Page) -> int:
    """By how many pixels the page is wider than the window."""
    script = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
    wider: int = page.evaluate(script)
    return wider
