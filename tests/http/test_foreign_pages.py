"""A server without keys, and pages of other sites in the browser of who uses it."""

from __future__ import annotations

import httpx
import pytest
from pydantic import SecretStr

from server.settings import Settings
from tests.http.conftest import completion

ROLLBACK = "/v1/interventions/pirate/rollback"
"""A change that needs no body, and so no preflight request of a browser."""

PAGES = [
    {"origin": "https://a.example"},
    {"origin": "null"},
    {"origin": "http://localhost:9999", "sec-fetch-site": "same-site"},
    {"origin": "https://a.example", "sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "cross-site"},
]


@pytest.fixture(params=["alone", "insecure", "allowing", "with a key"])
def settings(request: pytest.FixtureRequest) -> Settings:
    if request.param == "with a key":
        return Settings(api_key=SecretStr("sesame"))
    allowed = "https://b.example" if request.param == "allowing" else None
    return Settings(insecure=request.param == "insecure", allowed_origins=allowed)


async def test_a_page_of_another_site_changes_nothing(
    client: httpx.AsyncClient, settings: Settings
) -> None:
    for headers in PAGES:
        response = await client.post(ROLLBACK, headers=headers)
        assert response.status_code == (401 if settings.needs_key else 403), headers
        if not settings.needs_key:
            assert response.json()["error"]["code"] == "forbidden"
            assert (await client.get("/v1/models", headers=headers)).status_code == 200


async def test_the_own_page_an_allowed_one_and_programs_do(
    client: httpx.AsyncClient, settings: Settings
) -> None:
    own = [{}, {"origin": "http://test"}, {"sec-fetch-site": "none"}]
    own.append({"origin": "https://through.a.proxy", "sec-fetch-site": "same-origin"})
    if settings.allowed_origins:
        own.append({"origin": "https://b.example", "sec-fetch-site": "cross-site"})
    if settings.needs_key:
        own = [{**one, "authorization": "Bearer sesame"} for one in (*own, *PAGES)]
    for headers in own:
        response = await client.post("/v1/completions", json=completion(), headers=headers)
        assert response.status_code == 200, headers


@pytest.mark.parametrize("host", ["a.example", "a.example:8000", "127.0.0.1.a.example", "[x"])
async def test_a_page_has_no_name_of_its_own_for_this_machine(
    client: httpx.AsyncClient, settings: Settings, host: str
) -> None:
    """A page whose name is made to stand for 127.0.0.1 is of the server's own site to a browser."""
    headers = {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}
    status = 401 if settings.needs_key else 200 if settings.insecure else 403
    response = await client.get("/v1/models", headers=headers)
    assert response.status_code == status
    assert (await client.get("/livez", headers=headers)).status_code == 200


@pytest.mark.parametrize("settings", [Settings(host="here.example")])
async def test_addresses_and_private_names_are_answered(client: httpx.AsyncClient) -> None:
    for host in ("127.0.0.1:8000", "[::1]:8000", "localhost", "a.localhost:1", "gpu-3"):
        assert (await client.get("/version", headers={"host": host})).status_code == 200, host
    for host in ("host.docker.internal:8000", "gpu.local.", "Here.example:80"):
        assert (await client.get("/version", headers={"host": host})).status_code == 200, host
