"""Which interventions a request is about: requests of the same go to the same replica."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

PREFIX = "/v1/interventions/"


def names_of(path: str, body: Any, base: str) -> tuple[str, ...]:
    """Names of the interventions in a request's path, or in its body, which is parsed JSON.

    None for the base model, whose id is `base`, and for whatever the replica will refuse.
    """
    if path.startswith(PREFIX):
        return _plain([path.removeprefix(PREFIX).partition("/")[0]], base)
    if not isinstance(body, dict):
        return ()
    return _plain(_named(body), base)


def key_of(names: Sequence[str]) -> str:
    """What the replica is found by; empty without names, so that these requests spread."""
    if not names:
        return ""
    joined = "+".join(names).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(joined, digest_size=16).hexdigest()


def _named(body: dict[str, Any]) -> Iterator[Any]:
    uses = body.get("interventions")
    if isinstance(uses, list) and uses:
        yield from (use.get("name") for use in uses if isinstance(use, dict))
    else:
        yield body.get("model", body.get("lora_name"))


def _plain(refs: Any, base: str) -> tuple[str, ...]:
    """Names without the base's id before them and without a digest behind them."""
    texts = [ref for ref in refs if isinstance(ref, str) and ref and ref != base]
    return tuple(text.removeprefix(f"{base}:").partition("@")[0] for text in texts)
