"""Which places are URLs, and how a URL is shown."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from reft_runtime.errors import ConfigError


def is_url(place: str | Path) -> bool:
    """Whether a place is at a URL that fsspec reads; a `file://` URL is a folder like others."""
    return isinstance(place, str) and "://" in place and not place.startswith("file://")


def local_folder(place: str | Path) -> Path:
    """The folder that a path or a `file://` URL stands for."""
    if isinstance(place, str) and place.startswith("file://"):
        parts = urlsplit(place)
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(
                f"{shown(place)}: a file:// URL has three slashes, file:///FOLDER; give the path."
            )
        return Path(unquote(parts.path))
    return Path(place)


def shown(url: str) -> str:
    """A URL as logs and metrics may show it: without user, password, query and fragment."""
    scheme, _, rest = url.partition("://")
    rest = rest.partition("?")[0].partition("#")[0]
    host, slash, path = rest.partition("/")
    # An @ elsewhere may be part of a path: hf://owner/name@revision.
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}".rstrip("/")


def secrets_of(url: str) -> list[str]:
    """The parts of a URL that must not be shown: the user with a password, and the query."""
    rest = url.partition("://")[2].partition("#")[0]
    host, _, query = rest.partition("?")
    user, at, _ = host.partition("/")[0].rpartition("@")
    return [part for part in (user if at else "", query) if part]
