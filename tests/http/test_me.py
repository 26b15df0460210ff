"""GET /v1/me: a client learns who it is, and what it may offer."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI

from server.tenants.tenant import OWNER, Limits, Tenant
from tests.http.tenants import key, use_tenants

TEAM = Tenant(
    "team-a", patterns=("shared.*",), upload=True, tokens_per_minute=900, limits=Limits(n=2)
)
SOME = Tenant("ops", "admin", patterns=("shared.*",))


async def test_without_keys_one_is_the_owner(client: httpx.AsyncClient) -> None:
    me = (await client.get("/v1/me")).json()
    assert me == {
        "object": "tenant",
        "tenant": OWNER.name,
        "role": "admin",
        "interventions": ["*"],
        "upload": True,
        "prefix": None,
        "sees_server": True,
        "weight": 1.0,
        "requests_per_minute": None,
        "tokens_per_minute": None,
        "concurrent_requests": None,
        "limits": {"max_tokens": None, "n": None},
        "model": "tiny",
    }


@pytest.mark.parametrize(
    ("tenant", "expected"),
    [
        (
            TEAM,
            {
                "role": "user",
                "interventions": ["shared.*"],
                "upload": True,
                "prefix": "team-a.",
                "sees_server": False,
                "tokens_per_minute": 900,
                "limits": {"max_tokens": None, "n": 2},
            },
        ),
        (SOME, {"role": "admin", "upload": True, "prefix": None, "sees_server": False}),
        (Tenant("team-b"), {"upload": False, "sees_server": False}),
    ],
)
async def test_a_tenant_is_told_what_it_may(
    client: httpx.AsyncClient, app: FastAPI, tenant: Tenant, expected: dict[str, object]
) -> None:
    use_tenants(app, tenant)
    me = (await client.get("/v1/me", headers=key(tenant))).json()
    assert {name: me[name] for name in expected} == expected
    stats = await client.get("/v1/stats", headers=key(tenant))
    assert stats.is_success is me["sees_server"]
    name = f"{me['prefix'] or 'shared.'}new"
    answer = await client.delete(f"/v1/interventions/{name}", headers=key(tenant))
    assert answer.status_code == (404 if me["upload"] else 403)


async def test_an_admin_that_does_not_see_all_is_told_how_it_would(
    client: httpx.AsyncClient, app: FastAPI
) -> None:
    use_tenants(app, SOME)
    refused = await client.get("/metrics", headers=key(SOME))
    assert refused.status_code == 403
    assert "leave `interventions` out of its part" in refused.json()["error"]["message"]
