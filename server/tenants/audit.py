"""The audit: one line of the log for every change of what is served, and for every refused one."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from server.tenants.tenant import Tenant

if TYPE_CHECKING:
    from reft_runtime.interventions.registry.entry import Change

logger = logging.getLogger("reft.audit")

SHOWN_DIGITS = 12
"""Digits of a digest in a line of text; JSON has all of them."""


def audit_change(request_id: str, tenant: Tenant, action: str, name: str, change: Change) -> None:
    """Log that a tenant changed what `name` stands for."""
    _log(request_id, tenant, action, name, {"before": change.before, "after": change.after})


def audit_refusal(request_id: str, tenant: Tenant, action: str, name: str, status: int) -> None:
    """Log that a change was refused with this HTTP status, and so nothing changed.

    `name` is empty where it stands in a body that was not read.
    """
    _log(request_id, tenant, action, name, {"refused": status})


def _log(request_id: str, tenant: Tenant, action: str, name: str, outcome: dict[str, Any]) -> None:
    fields = {
        "id": request_id,
        "tenant": tenant.name,
        "action": action,
        "name": quote(name),  # a client chose it
        **outcome,
    }
    if "refused" in outcome:
        what = f"refused={outcome['refused']}"
    else:
        what = f"{_shown(outcome['before'])} -> {_shown(outcome['after'])}"
    line = f"audit: {action} {fields['name'] or '-'} {what} tenant={tenant.name} id={request_id}"
    logger.info("%s", line, extra={"request": fields})


def _shown(digest: str | None) -> str:
    return "none" if digest is None else digest[:SHOWN_DIGITS]
