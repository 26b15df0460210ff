"""Answers of the routes that list and change what is served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from reft_runtime.interventions.registry.entry import Tier
from reft_runtime.interventions.registry.version import Origin
from server.schemas.answers.base import described


@described
class Model(TypedDict):
    """The base model, or an intervention of it."""

    id: str
    """What requests call it."""
    object: Literal["model"]
    """Always `model`."""
    created: int
    """When the server was started, in Unix seconds."""
    owned_by: Literal["reft-server"]
    """Always `reft-server`."""
    root: str
    """An intervention's digest; of the base model its id."""
    parent: str | None
    """The base model of an intervention; null for the base model."""
    max_model_len: int
    """Most tokens of a prompt and its answer together."""


@described
class ModelList(TypedDict):
    """The base model, then every intervention."""

    object: Literal["list"]
    """Always `list`."""
    data: list[Model]
    """The base model first, then the interventions by name."""


@described
class InterventionEntry(TypedDict):
    """What is served under a name."""

    id: str
    """The name."""
    object: Literal["intervention"]
    """Always `intervention`."""
    digest: str
    """The version that the name stands for: SHA-256 of its file's header, in hex."""
    versions: Sequence[str]
    """Digests that can be asked for as `NAME@DIGEST`, the current one first."""
    origin: Origin
    """Whether it was uploaded, lies in the served folder, or was loaded by vLLM's route."""
    tier: Tier
    """Where its tensors are: on `disk`, or in `host` memory."""
    pinned: bool
    """Whether its tensors stay in memory."""
    in_flight: int
    """Requests that use it now."""
    requests: int
    """Requests since the start, while the name is served."""
    prompt_tokens: int
    """Their prompts' tokens."""
    generation_tokens: int
    """Their answers' tokens."""
    last_used: float | None
    """When it was last used, in Unix seconds."""
    size_bytes: int
    """The file's size."""
    modified: float
    """When the file was written, in Unix seconds."""
    kinds: Sequence[str]
    """Kinds of its edits."""
    positions: Sequence[str]
    """Positions of its edits."""
    layers: Sequence[int]
    """Layers of its edits."""
    directions: int
    """How many directions every edit has for `subspace`."""
    parameters: int
    """How many numbers its tensors hold."""
    share: float
    """That number over the base model's parameters."""
    problem: str | None
    """What is wrong with its file; null if nothing is."""
    hides: Sequence[Origin]
    """What else has the name, and would be served if this were deleted."""
    manifest: dict[str, Any]
    """What the file says about itself: edits, template, description, metrics."""
    replicas_behind: NotRequired[list[str]]
    """After a change in a cluster: servers that have not taken it in."""


@described
class InterventionList(TypedDict):
    """The interventions, all of them or a page."""

    object: Literal["list"]
    """Always `list`."""
    data: list[InterventionEntry]
    """The interventions."""
    problems: dict[str, str]
    """Why files of the sources are not served, by the file's name; for admins."""
    total: NotRequired[int]
    """Of a page: how many match, on all pages."""
    next: NotRequired[str | None]
    """Of a page: the `after` of the next one; null on the last."""


@described
class InterventionVersion(TypedDict):
    """One version of a name."""

    object: Literal["intervention.version"]
    """Always `intervention.version`."""
    digest: str
    """SHA-256 of its file's header, in hex."""
    origin: Origin
    """Whether it was uploaded, lies in the served folder, or was loaded by vLLM's route."""
    size_bytes: int
    """The file's size."""
    modified: float
    """When the file was written, in Unix seconds."""
    in_flight: int
    """Requests that use it now."""
    current: bool
    """Whether the name stands for it."""
    kept: bool
    """Whether the name can be rolled back to it."""


@described
class InterventionVersions(TypedDict):
    """All versions of a name that requests can use."""

    object: Literal["list"]
    """Always `list`."""
    data: list[InterventionVersion]
    """The versions, the current one first."""


@described
class RemovedIntervention(TypedDict):
    """A name that is served no more."""

    id: str
    """The name."""
    object: Literal["intervention"]
    """Always `intervention`."""
    deleted: Literal[True]
    """Always true."""
    replicas_behind: NotRequired[list[str]]
    """In a cluster: servers that have not taken it in."""
