"""Tenants in tests: a request's key is its tenant's name."""

from __future__ import annotations

from fastapi import FastAPI, Request

from server.auth import require_key
from server.tenants.tenant import OWNER, Tenant


def use_tenants(app: FastAPI, *tenants: Tenant) -> None:
    """Let `app` take a tenant's name as its key; requests without a key are the owner's."""
    known = {f"Bearer {tenant.name}": tenant for tenant in tenants}

    async def show(request: Request) -> None:
        request.state.tenant = known.get(request.headers.get("authorization", ""), OWNER)

    app.dependency_overrides[require_key] = show


def key(tenant: Tenant | str) -> dict[str, str]:
    """Headers of a request of this tenant."""
    return {"authorization": f"Bearer {tenant if isinstance(tenant, str) else tenant.name}"}
