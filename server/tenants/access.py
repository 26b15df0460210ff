"""Who may use which route: the one table of it, and what it says of a tenant."""

from __future__ import annotations

from typing import Literal

from server.errors import ApiError
from server.tenants.tenant import Tenant

Access = Literal["use", "change", "admin", "server"]
"""What a route needs of the tenant whose key was shown.

`use`: any tenant, within what it sees. `change`: that it may change the intervention in the path.
`admin`: the role admin; what it sees bounds what it may change. `server`: an admin that sees every
intervention, because the route tells of all of them.
"""

ACCESS: dict[str, Access] = {
    "POST /v1/chat/completions": "use",
    "POST /v1/completions": "use",
    "POST /v1/responses": "use",
    "GET /v1/responses/{response_id}": "use",
    "DELETE /v1/responses/{response_id}": "use",
    "POST /v1/classify": "use",
    "GET /v1/models": "use",
    "GET /v1/models/{model:path}": "use",
    "GET /v1/interventions": "use",
    "GET /v1/interventions/{name}": "use",
    "GET /v1/interventions/{name}/file": "use",
    "GET /v1/interventions/{name}/versions": "use",
    "PUT /v1/interventions/{name}": "change",
    "DELETE /v1/interventions/{name}": "change",
    "POST /v1/interventions/{name}/rollback": "change",
    "POST /v1/interventions/{name}/pin": "change",
    "POST /v1/interventions/{name}/unpin": "change",
    "POST /v1/interventions/{name}/warm": "change",
    "POST /tokenize": "use",
    "POST /detokenize": "use",
    "GET /tokenizer_info": "use",
    "GET /v1/me": "use",
    "GET /v1/usage": "use",
    "GET /version": "use",
    "GET /openapi.json": "use",
    "POST /v1/load_lora_adapter": "admin",
    "POST /v1/unload_lora_adapter": "admin",
    "GET /v1/stats": "server",
    "GET /metrics": "server",
}
"""What each route needs, by method and path. A route that is not here needs `server`."""


def check_role(tenant: Tenant, method: str, path: str) -> None:
    """Raise `ApiError` (403) unless the tenant's role permits a route.

    `path` is the route's, with its parameters in braces. What a tenant may change is for
    `check_change`.
    """
    access = ACCESS.get(f"{method} {path}", "server")
    if access in ("admin", "server") and tenant.role != "admin":
        raise forbidden(f"{method} {path} is for admins, and the tenant `{tenant.name}` is a user.")
    if access == "server" and not tenant.sees_server:
        raise forbidden(
            f"{method} {path} tells of all interventions, and the admin `{tenant.name}` does not"
            " see all of them: leave `interventions` out of its part of the keys file."
        )


def check_change(tenant: Tenant, name: str) -> None:
    """Raise `ApiError` (403) unless the tenant may change an intervention of this name.

    The answer depends on the tenant and the name alone, not on what is served.
    """
    if tenant.may_change(name):
        return
    if tenant.role == "admin":
        why = "may change what it sees; the keys file says which names that are"
    elif tenant.upload:
        why = f"may change names that begin with `{tenant.prefix}`; choose one"
    else:
        why = (
            "may change nothing; `upload = true` in its part of the keys file lets it change names"
            f" that begin with `{tenant.prefix}`"
        )
    raise forbidden(f"The tenant `{tenant.name}` {why}.")


def usage_seen(tenant: Tenant, asked: str | None) -> str | None:
    """Whose usage a tenant is told where it asks for that of `asked`; None means everybody's.

    All but admins that see everything are told their own. Raises `ApiError` (403) for another's,
    whether there is such a tenant or not.
    """
    if tenant.sees_server:
        return asked
    if asked not in (None, tenant.name):
        raise forbidden(
            f"The tenant `{tenant.name}` is told its own usage alone; leave `tenant` out."
        )
    return tenant.name


def forbidden(message: str) -> ApiError:
    """The error (403) for what a tenant's role or prefix does not permit."""
    return ApiError(403, message, code="forbidden")
