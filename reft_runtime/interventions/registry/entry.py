"""Entries of the listing, for a name and for a version."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal, NamedTuple

from reft_runtime.interventions.format.intervention import validate_manifest
from reft_runtime.interventions.format.manifest import Manifest
from reft_runtime.interventions.format.summary import Summary
from reft_runtime.interventions.registry.version import Origin

Tier = Literal["disk", "host"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the listing.

    `versions` are the digests that can be addressed, the current one first. `in_flight`,
    `requests`, their tokens and `last_used` (Unix time) count all versions of the name. `tier` says
    where the current version's tensors are: still on `disk`, or in `host` memory; those of a
    `pinned` name stay there. `problem` says
    what is wrong with the name's file if the version cannot be used or is an older one. `hides`
    lists what else has the name, and would be served if this were removed. `modified` (Unix time)
    is when the current version's file was written.
    """

    name: str
    digest: str
    versions: tuple[str, ...]
    origin: Origin
    tier: Tier
    pinned: bool
    in_flight: int
    requests: int
    prompt_tokens: int
    generation_tokens: int
    last_used: float | None
    size_bytes: int
    modified: float
    problem: str | None
    hides: tuple[Origin, ...]
    summary: Summary
    manifest_json: bytes

    @property
    def manifest(self) -> Manifest:
        """What the file says about itself; parsed anew at every call."""
        return validate_manifest(json.loads(self.manifest_json))


@dataclass(frozen=True, slots=True)
class Change:
    """What one change did to a name.

    `before` is the digest that the name stood for, None if for nothing. `left` is the name's line
    of the listing as the change left it, None if the name stands for nothing now.
    """

    before: str | None
    left: Entry | None

    @property
    def entry(self) -> Entry:
        """The entry that a change other than a removal made."""
        assert self.left is not None
        return self.left

    @property
    def after(self) -> str | None:
        """The digest that the name stands for now; None if for nothing."""
        return None if self.left is None else self.left.digest


@dataclass(frozen=True, slots=True)
class VersionEntry:
    """One version that can be addressed; `kept` says whether a name can be rolled back to it."""

    digest: str
    origin: Origin
    size_bytes: int
    modified: float
    in_flight: int
    current: bool
    kept: bool


@dataclass(frozen=True, slots=True)
class Page:
    """One page of the listing.

    `total` is how many names match the search, on all pages. `next` is where the next page begins,
    None on the last one.
    """

    entries: tuple[Entry, ...]
    total: int
    next: str | None


class SourceState(NamedTuple):
    """One configured source, and whether it can be read."""

    number: int
    """Its place among the configured ones, from 1."""
    kind: str
    """The word `folder`, or a URL's scheme."""
    label: str
    """The path, or the URL without user, password and query."""
    problem: str | None
    """Why it cannot be read now, without paths and URLs; what it served is served on."""
