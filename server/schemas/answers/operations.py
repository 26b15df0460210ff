"""Answers about the server itself: who asks, how busy it is, what was used, and its health."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from server.schemas.answers.base import described
from server.tenants.tenant import Role

Status = Literal["ok", "starting", "draining", "engine not running", "no replica answers"]
"""What health routes say; the last is a cluster's."""


@described
class RequestLimits(TypedDict):
    """The most that one request may ask for; null means no limit."""

    max_tokens: int | None
    """Longest answer in tokens; also the length where a request gives none."""
    n: int | None
    """Most answers to one prompt."""


@described
class Me(TypedDict):
    """The tenant of the key, and the base model that answers it."""

    object: Literal["tenant"]
    """Always `tenant`."""
    tenant: str
    """Its name; without keys `(owner)`."""
    role: Role
    """Whether it is an admin."""
    interventions: list[str]
    """Patterns of the names that it sees."""
    upload: bool
    """Whether it may upload, replace and remove."""
    prefix: str | None
    """What the names that it may change begin with; null means any that it sees."""
    sees_server: bool
    """Whether it may read `/v1/stats`, `/metrics` and everybody's `/v1/usage`."""
    weight: float
    """Its share of a busy server beside others'."""
    requests_per_minute: int | None
    """Its quota; null means no limit."""
    tokens_per_minute: int | None
    """Its quota; null means no limit."""
    concurrent_requests: int | None
    """Its quota; null means no limit."""
    limits: RequestLimits
    """The most that one request may ask for."""
    model: str
    """The base model's name."""


@described
class TokenRates(TypedDict):
    """Tokens per second."""

    prompt: float
    """Computed tokens of prompts."""
    generation: float
    """Generated tokens."""
    seconds: float
    """Over how many last seconds."""


@described
class LastDurations(TypedDict):
    """How long something took lately."""

    p50: float | None
    """Median, in seconds; null if there was none."""
    p95: float | None
    """95th percentile, in seconds; null if there was none."""
    count: int
    """How many there were."""
    seconds: float
    """In how many last seconds."""


@described
class KvCacheStats(TypedDict):
    """How much memory keys and values have."""

    usage: float
    """Share that is in use: 1 is all."""
    tokens: int
    """How many tokens' keys and values it holds."""
    bytes: int
    """Its size."""


@described
class KeptStates(TypedDict):
    """Recurrent states that are kept for reuse."""

    kept: int
    """How many are kept now."""
    places: int
    """How many there may be."""
    hits: int
    """How often a prompt went on from one."""
    evictions: int
    """How many were evicted for others."""


@described
class PrefixCache(TypedDict):
    """Reuse of prompts' keys and values since the start."""

    queries: int
    """Tokens that were looked for."""
    hits: int
    """Tokens that were found."""
    hit_rate: float | None
    """Their share; null if none was looked for."""
    blocks: int
    """Blocks that are kept now."""
    snapshots: KeptStates | None
    """Recurrent states; null for models without recurrent layers."""


@described
class InterventionStats(TypedDict):
    """How many interventions there are, and their memory."""

    registered: int
    """How many are served."""
    loaded: int
    """How many are in memory."""
    waiting: int
    """Requests that wait for memory."""
    bytes: int
    """Memory that they take."""
    max_bytes: int
    """Memory that they may take."""


@described
class Stats(TypedDict):
    """The server at a glance."""

    object: Literal["stats"]
    """Always `stats`."""
    version: str
    """The server's version."""
    model: str
    """The base model's name."""
    device: str
    """What it runs on."""
    dtype: str
    """The type of its numbers."""
    status: Status
    """As `/readyz` says it."""
    problems: list[str]
    """What else is wrong, such as a source that is away."""
    time: float
    """Now, in Unix seconds."""
    uptime_seconds: float
    """Seconds since the start."""
    running: int
    """Sequences in the batch."""
    max_running: int
    """Most sequences there may be."""
    waiting: int
    """Requests in the queue."""
    preemptions: int
    """Preemptions since the start."""
    prompt_tokens: int
    """Prompts' tokens since the start."""
    generation_tokens: int
    """Generated tokens since the start."""
    tokens_per_second: TokenRates
    """How fast tokens were computed lately."""
    time_to_first_token_seconds: LastDurations
    """From a request's arrival to its first token."""
    time_per_output_token_seconds: LastDurations
    """Between two tokens of an answer."""
    kv_cache: KvCacheStats
    """Memory of keys and values."""
    prefix_cache: PrefixCache | None
    """Reuse of prompts; null if the cache is off."""
    interventions: InterventionStats
    """Interventions, and their memory."""
    finished: dict[str, int]
    """Choices that ended since the start, by reason."""
    replicas: NotRequired[int]
    """In a cluster: how many servers these are the sum of."""


@described
class UsageTotal(TypedDict):
    """What was used."""

    requests: int
    """Requests."""
    prompt_tokens: int
    """Their prompts' tokens."""
    cached_tokens: int
    """Those of them that came from the prefix cache."""
    completion_tokens: int
    """Generated tokens."""


@described
class UsageRow(TypedDict):
    """What was used in one group."""

    day: NotRequired[str]
    """The UTC day, YYYY-MM-DD; unless `group_by` leaves it out."""
    tenant: NotRequired[str]
    """The tenant; unless `group_by` leaves it out."""
    intervention: NotRequired[str]
    """Names with +, or `(base)`; unless `group_by` leaves it out."""
    requests: int
    """Requests."""
    prompt_tokens: int
    """Their prompts' tokens."""
    cached_tokens: int
    """Those of them that came from the prefix cache."""
    completion_tokens: int
    """Generated tokens."""


# Written so because `from` is a word of Python's.
UsageReport = TypedDict(
    "UsageReport",
    {
        "object": Annotated[Literal["usage"], Field(description="Always `usage`.")],
        "from": Annotated[str, Field(description="First UTC day, YYYY-MM-DD.")],
        "to": Annotated[str, Field(description="Last UTC day, included.")],
        "since": Annotated[float, Field(description="When counting began, in Unix seconds.")],
        "kept": Annotated[bool, Field(description="Whether counts outlive a restart.")],
        "problem": Annotated[
            str | None, Field(description="What is wrong with its file, or missing of the counts.")
        ],
        "data": Annotated[list[UsageRow], Field(description="What was used, by group.")],
        "total": Annotated[UsageTotal, Field(description="The sum of the rows.")],
    },
)


@described
class ServerVersion(TypedDict):
    """Which server this is."""

    version: str
    """The server's version."""


@described
class SourceProblem(TypedDict):
    """A source of interventions that cannot be read now."""

    source: int
    """Its place among the configured ones, from 1."""
    kind: str
    """The word `folder`, or a URL's scheme."""
    problem: str
    """Why it cannot be read; what it served is served on."""


@described
class HealthReport(TypedDict):
    """Whether the server is well."""

    status: Status
    """The word `ok`, else why not."""
    sources: NotRequired[list[SourceProblem]]
    """Sources that cannot be read now, if any."""
    problems: NotRequired[list[str]]
    """What else is wrong without keeping the server from answering."""
    state: NotRequired[str]
    """Why the state cannot be read or written, if so."""
