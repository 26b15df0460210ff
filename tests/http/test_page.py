"""The page's files: what they are answered with, and that nothing of others was changed in them."""

from __future__ import annotations

import re

import httpx
import pytest
from pydantic import SecretStr

from server.settings import Settings
from server.static import FOLDER, page
from tools.vendor import problems

MAX_BYTES = 300_000
"""Of all files together, as they lie: the vendored ones, and their licences, among them."""


@pytest.fixture
def settings() -> Settings:
    return Settings(api_key=SecretStr("sesame"))


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_html_needs_no_key_and_is_asked_for_anew(
    client: httpx.AsyncClient, path: str
) -> None:
    response = await client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    again = await client.get(path, headers={"if-none-match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    head = await client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["etag"] == response.headers["etag"]


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_all_that_html_names_is_there_and_kept_for_good(
    client: httpx.AsyncClient, path: str
) -> None:
    named = re.findall(r'(?:href|src)="([^"]+)"', (await client.get(path)).text)
    assert len(named) >= 4
    for file in named:
        response = await client.get(f"/{file}")
        assert response.status_code == 200
        assert "immutable" in response.headers["cache-control"]


async def test_modules_name_only_what_is_there(client: httpx.AsyncClient) -> None:
    scripts = {name: file for name, file in page().files.items() if name.endswith(".js")}
    for name, file in scripts.items():
        named = re.findall(r'from ?"([\w./-]+)"', file.content.decode())
        for other in named:
            assert other.startswith("./"), f"{name} imports {other}"
            folder = name.rpartition("/")[0]
            assert f"{folder}/{other.removeprefix('./')}" in scripts, f"{name} imports {other}"


def test_every_rule_of_a_stylesheet_is_closed() -> None:
    for name, file in page().files.items():
        if name.endswith(".css"):  # a brace too many makes browsers pass over the rule behind it
            assert file.content.count(b"{") == file.content.count(b"}"), name


async def test_the_policy_is_strict_everywhere(client: httpx.AsyncClient) -> None:
    for path in ("/", "/docs", f"/page/{page().digest}/js/app.js"):
        headers = (await client.get(path)).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    for file in page().files.values():
        if file.media_type.startswith("text/html"):
            assert not re.search(rb"<script>|<style|\son\w+=|\sstyle=", file.content)


async def test_files_are_compressed_where_that_is_taken(client: httpx.AsyncClient) -> None:
    path = f"/page/{page().digest}/js/app.js"
    packed = await client.get(path, headers={"accept-encoding": "gzip"})
    plain = await client.get(path, headers={"accept-encoding": "identity"})
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert int(packed.headers["content-length"]) < len(plain.content) == len(packed.content)
    assert packed.headers["vary"] == plain.headers["vary"] == "accept-encoding"


@pytest.mark.parametrize("file", ["js/none.js", "%2e%2e/app.py", "js", ""])
async def test_what_is_not_there_is_answered_as_everywhere(
    client: httpx.AsyncClient, file: str
) -> None:
    for digest in (page().digest, "0" * 16):
        response = await client.get(f"/page/{digest}/{file}")
        assert response.status_code == 404
        assert "error" in response.json()


async def test_it_changes_nothing(client: httpx.AsyncClient) -> None:
    assert (await client.post("/")).status_code == 405
    assert (await client.get("/v1/stats")).status_code == 401


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < MAX_BYTES


def test_libraries_are_as_they_were_fetched() -> None:
    assert problems() == []
