"""The page's files as answers: read once, compressed, named by their content, with a strict policy.

The page is the files of `server/page`, unchanged but for `PLACE` in HTML. All but the HTML have
addresses with a digest of all files, `page/DIGEST/...`: a browser keeps each for good, and a new
version of the server has other addresses. The HTML refers to them by relative addresses, so the
server may stand behind a path of another server.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import Response

FOLDER = Path(__file__).parent / "page"

PLACE = "{files}"
"""Placeholder in HTML for the address of the folder with all other files."""

SECURITY = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}

TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class StaticFile:
    """One file; `compressed` is its content by gzip."""

    content: bytes
    compressed: bytes
    media_type: str
    etag: str
    cache_control: str

    def answer(self, headers: Headers) -> Response:
        """The answer to a GET or HEAD with these headers: 304 where the client has the file."""
        sent = SECURITY | {
            "cache-control": self.cache_control,
            "etag": self.etag,
            "vary": "accept-encoding",
        }
        if self.etag in headers.get("if-none-match", ""):
            return Response(None, 304, sent)
        content = self.content
        if "gzip" in headers.get("accept-encoding", ""):
            content, sent["content-encoding"] = self.compressed, "gzip"
        return Response(content, 200, sent, media_type=self.media_type)


@dataclass(frozen=True, slots=True)
class Page:
    """All files of the page, by their path in the folder; `digest` is that of all of them."""

    digest: str
    files: dict[str, StaticFile]


@cache
def page() -> Page:
    """The page that this version of the server has."""
    found = {
        path.relative_to(FOLDER).as_posix(): path.read_bytes()
        for path in sorted(FOLDER.rglob("*"))
        if path.is_file()
    }
    whole = hashlib.sha256()
    for name, content in found.items():
        whole.update(f"{name}\n{len(content)}\n".encode() + content)
    digest = whole.hexdigest()[:16]
    return Page(digest, {name: _file(name, found[name], digest) for name in found})


def _file(name: str, content: bytes, digest: str) -> StaticFile:
    cache_control = "public, max-age=31536000, immutable"
    if name.endswith(".html"):
        content = content.replace(PLACE.encode(), f"page/{digest}".encode())
        cache_control = "no-cache"
    return StaticFile(
        content,
        gzip.compress(content, mtime=0),
        TYPES.get(Path(name).suffix, "text/plain; charset=utf-8"),
        f'"{hashlib.sha256(content).hexdigest()[:32]}"',
        cache_control,
    )
