"""Who asks, and whether it may: dependencies of every router but the public one."""

from __future__ import annotations

import hashlib

from fastapi import Request

from reft_runtime.caller import Caller
from server.context import Context
from server.errors import ApiError
from server.foreign_pages import check_page
from server.tenants.access import ACCESS, check_change, check_role
from server.tenants.audit import audit_refusal
from server.tenants.keys import Keys
from server.tenants.tenant import OWNER, Tenant

_ACTIONS = {"/v1/load_lora_adapter": "load", "/v1/unload_lora_adapter": "delete"}
"""What the audit calls routes whose path does not say it."""


async def require_key(request: Request) -> None:
    """Note whose key the request carries; answer 401 unless it is known, if one is configured.

    Without keys, what pages of other sites send is answered 403.
    """
    context: Context = request.app.state.context
    if not context.keys.configured:
        check_page(request.method, request.headers, context.settings)
    request.state.tenant = tenant_for(context.keys, request.headers.get("authorization", ""))


def tenant_for(keys: Keys, authorization: str) -> Tenant:
    """The tenant whose key the header `Authorization` has; raises `ApiError` (401) if none has it.

    Without keys whoever asks is the owner.
    """
    if not keys.configured:
        return OWNER
    scheme, _, given = authorization.partition(" ")
    # Starlette decodes headers as latin-1; the key's bytes are what the client sent.
    tenant = keys.tenant_of(given.strip(" \t").encode("latin-1"))
    if scheme.lower() != "bearer" or tenant is None:
        raise ApiError(
            401,
            "A valid API key is needed: send it as 'Authorization: Bearer KEY'.",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
    return tenant


async def require_access(request: Request) -> None:
    """Answer 403 unless the key's tenant may use the route, and change the intervention it names.

    Nothing of the body is read before. A name that the tenant does not see is left to the handler,
    which answers 404 as for an unknown one; but `PUT` may make a name, so it is told at once.
    """
    tenant: Tenant = request.state.tenant
    method, path = request.method, request.scope["route"].path
    name = request.path_params.get("name", "")
    try:
        check_role(tenant, method, path)
        changes = ACCESS.get(f"{method} {path}") == "change"
        if changes and (method == "PUT" or tenant.sees(name)):
            check_change(tenant, name)
    except ApiError as refused:
        if method != "GET":
            action = _ACTIONS.get(
                path, path.rpartition("/")[2] if method == "POST" else method.lower()
            )
            audit_refusal(request.state.request_id, tenant, action, name, refused.status)
        raise


def caller_of(context: Context) -> Caller:
    """The context's tenant, as the engine knows it."""
    tenant = context.tenant
    return Caller(
        tenant.name, tenant.weight, cache_salt(context), tenant.sees, tenant.limits.max_tokens
    )


def cache_salt(context: Context) -> bytes:
    """Salt of the prefix cache's block keys: one for each tenant, empty where all share.

    It is no secret, and need not be: no request can name a salt, and no two tenants have one name.
    """
    if context.settings.shared_prefix_cache or not context.keys.configured:
        return b""
    return hashlib.sha256(b"prefix cache of " + context.tenant.name.encode()).digest()
