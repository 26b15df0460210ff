"""What pages of other sites may not do at a server without keys, by the browser of its user.

A browser sends to this machine what any page asks it to, and without keys nothing else tells whose
request it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from server.settings import Settings
from server.tenants.access import forbidden

READING = ("GET", "HEAD", "OPTIONS")
"""Methods that change nothing; a browser keeps their answers from pages of other sites."""

PRIVATE = (".localhost", ".local", ".internal")
"""Ends of names that nobody can have in the public domain name system."""


def may_be_asked_as(host: str, settings: Settings) -> bool:
    """Whether a server with these settings answers requests with this header `Host`.

    A page can have a name of its own that stands for this machine's address, and so be of the same
    site for the browser. So unless the server has keys, or is meant for others as well
    (`insecure`), it answers by addresses and private names only.
    """
    return settings.needs_key or settings.insecure or _is_private(host, settings.host)


def check_page(method: str, headers: Headers, settings: Settings) -> None:
    """Raise `ApiError` (403) for a request that a page of another site has sent."""
    host = headers.get("host", "")
    if not may_be_asked_as(host, settings):
        raise forbidden(
            f"Without keys this server answers for this machine only, not as {host}, which could be"
            " any page's name for it. Give it a key (REFT_API_KEY), or start it with --insecure."
        )
    if method not in READING and _is_foreign(headers, host, settings.origins):
        raise forbidden(
            "Without keys a page of another site may change nothing here; --allowed-origins says"
            " whose pages may."
        )


def _is_private(host: str, own: str) -> bool:
    """Whether a header `Host` is an address, or a name that no page on the internet can have."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if "." not in name or name.endswith(PRIVATE) or name == own.lower():
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _is_foreign(headers: Headers, host: str, allowed: Sequence[str]) -> bool:
    """Whether a browser says that a page of another site, that is not allowed, sent a request.

    All browsers of today say so to this machine in `Sec-Fetch-Site`. Older ones, and all for other
    machines without TLS, say in `Origin` where the page is from. Other clients say neither.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site in ("same-origin", "none") or (site is None and origin is None):
        return False
    if "*" in allowed or origin in allowed:
        return False
    return site is not None or str(origin).partition("://")[2] != host
