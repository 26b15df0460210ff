"""The options of the server: each is a keyword, a `REFT_*` variable and a command-line option."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from reft_runtime.errors import ConfigError
from reft_runtime.interventions.registry.urls import is_url, local_folder
from reft_runtime.machine.cache import cache_folder

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LogFormat = Literal["text", "json"]
ToolParser = Literal[
    "hermes",
    "llama3",
    "llama4_json",
    "pythonic",
    "llama4_pythonic",
    "mistral",
    "harmony",
    "qwen3_coder",
    "glm45",
    "gemma4",
    "deepseek_v31",
    "deepseek_v3",
    "minimax_m2",
    "kimi_k2",
    "seed_oss",
    "lfm2",
    "olmo3",
    "granite",
    "phi4_mini_json",
    "hunyuan_a13b",
    "hy_v3",
    "nemotron_json",
]
LogLevel = Literal["debug", "info", "warning", "error"]

SHIPPED = Path("interventions")
"""Folder of the interventions that ship with the project, relative to the project's root."""

BUILT_IN_TEMPLATE = "hermes"
"""Value of `tool_template` for the template that comes with the server."""

ENGINE_OPTIONS = (
    "interventions",
    "state_dir",
    "shared_state",
    "allow_base",
    "intervention_bytes",
    "state_bytes",
    "device",
    "dtype",
    "max_model_len",
    "max_running",
    "max_queued",
    "max_queued_tokens",
    "max_step_tokens",
    "kv_tokens",
    "prefix_cache",
    "threads",
    "tensor_parallel",
)
"""Fields that the engine takes under the same names; it chooses the value of an unset one."""


class Settings(BaseSettings):
    """Options of `reft serve`: field `x` is `--x` or `REFT_X`; an empty variable is ignored."""

    model_config = SettingsConfigDict(
        env_prefix="REFT_", env_ignore_empty=True, extra="forbid", frozen=True
    )

    model: str = Field(
        default="demo",
        min_length=1,
        description="Base model: 'demo', a Hugging Face id or a folder.",
    )
    interventions: Annotated[tuple[str, ...], NoDecode] = Field(
        default_factory=lambda: (str(SHIPPED),) if SHIPPED.is_dir() else (),
        description="Folder or URL (s3://bucket/folder) of NAME.safetensors files to serve; may be "
        "given several times, in the variable with commas or as a JSON list, and the first with a "
        "name counts; by default ./interventions, if it exists.",
    )
    state_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder or URL that keeps uploaded interventions and pins; by default they are "
        "kept in a temporary folder and lost at a restart.",
    )
    shared_state: bool = Field(
        default=False,
        description="The folder of --state-dir is one that other servers have mounted and change, "
        "too; all of them need this option. At a URL servers share the state in any case.",
    )
    allow_base: str | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        description="Shell pattern of base model names: files made for such a base are accepted if "
        "hidden size and layers fit, even if architecture or vocabulary differ.",
    )
    intervention_bytes: int | None = Field(
        default=None,
        ge=2**28,
        description="Memory for interventions, in bytes, by default 1 GiB: the least recently used "
        "are evicted; requests wait where those in use fill it.",
    )
    state_bytes: int | None = Field(
        default=None,
        ge=2**26,
        description="Most bytes of uploaded files, by default 16 GiB; an upload beyond that is "
        "answered 507.",
    )
    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(
        default=8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one."
    )
    metrics_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="Second port that serves /metrics, without a key; by default none.",
    )
    api_key: SecretStr | None = Field(
        default=None,
        min_length=1,
        description="Key that clients must send as 'Authorization: Bearer KEY'; by default none.",
    )
    keys: Path | None = Field(
        default=None,
        description="File that says which tenants there are, by which keys, and what each may do; "
        "`reft key new` makes a key. By default none.",
    )
    insecure: bool = Field(
        default=False,
        description="Listen where other machines can reach the server although it needs no key.",
    )
    quota_url: SecretStr | None = Field(
        default=None,
        min_length=1,
        description="Redis or Valkey that counts quotas for several servers together: "
        "redis://HOST:PORT/DB, or rediss:// for TLS; by default each server counts for itself.",
    )
    allowed_origins: str | None = Field(
        default=None,
        min_length=1,
        description="Origins whose pages may use this server from a browser (CORS): '*', or "
        "'https://a.example', several with commas or as a JSON list; by default none.",
    )
    device: str = Field(
        default="cpu",
        description="Device that runs the model: cpu, cuda or cuda:N.",
    )
    dtype: Dtype = Field(
        default="auto",
        description="Number format of the base model's weights; auto is bfloat16 where the device "
        "multiplies it natively, else float32.",
    )
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        description="Longest prompt plus answer, in tokens; by default the model's own limit.",
    )
    max_running: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="Most sequences in one engine step; by default 64, on a CUDA device 256.",
    )
    max_queued: int | None = Field(
        default=None,
        ge=1,
        description="Most waiting requests, by default 1024; a request beyond that is answered "
        "503.",
    )
    max_queued_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most prompt tokens of waiting requests, by default 1000000; a request beyond "
        "that is answered 503.",
    )
    max_step_tokens: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="Most tokens in one engine step, by default 2048, on a CUDA device 8192; while "
        "sequences decode, a step takes fewer prompt tokens, according to measured times.",
    )
    kv_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Size of the key-value cache, in tokens; by default what fits into 30 % of "
        "the available memory, or into 90 % of a CUDA device's free memory.",
    )
    prefix_cache: bool = Field(
        default=True,
        description="Reuse keys and values of prompts that begin with the same tokens and edits.",
    )
    shared_prefix_cache: bool = Field(
        default=False,
        description="Let tenants share the prefix cache: timing then tells one whether another has "
        "sent the same beginning of a prompt. By default each has its own.",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="CPU threads of the engine; by default one per physical core that affinity and "
        "the container's CPU quota leave, or fewer where OMP_NUM_THREADS says so.",
    )
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Processes that compute one model together, each a part of it on a device of "
        "its own (--device cuda), or on a part of the CPU threads; by default one.",
    )
    tool_parser: ToolParser | None = Field(
        default=None,
        description="Format in which the model writes tool calls; by default it is found from the "
        "chat template.",
    )
    tool_template: str | None = Field(
        default=None,
        min_length=1,
        description="File with a chat template for chats with tools, or 'hermes' for the built-in "
        "one, which is for ChatML models; by default the model's own.",
    )
    first_token_timeout: float = Field(
        default=300.0,
        gt=0,
        le=86400,
        description="Seconds a request may wait for its first token; then it is answered 503.",
    )
    request_timeout: float = Field(
        default=3600.0, gt=0, le=86400, description="Seconds a request may take in all."
    )
    drain_seconds: float = Field(
        default=30.0,
        ge=0,
        le=3600,
        description="Seconds that running requests have to finish after SIGTERM.",
    )
    max_body_bytes: int = Field(
        default=4 * 2**20,
        ge=1024,
        le=2**30,
        description="Largest JSON body, in bytes; a larger one is answered 413.",
    )
    log_format: LogFormat = Field(
        default="text", description="Format of the log: text, or json with one object per line."
    )
    log_level: LogLevel = Field(default="info", description="Least severe message that is logged.")
    otlp_traces_endpoint: SecretStr | None = Field(
        default=None,
        min_length=1,
        description="URL of an OpenTelemetry collector that gets a span for every request, such as "
        "http://localhost:4318/v1/traces; by default none.",
    )

    @field_validator("interventions", mode="before")
    @classmethod
    def _split_sources(cls, value: object) -> object:
        if isinstance(value, str):  # from the variable
            value = _several(value)
        if isinstance(value, list | tuple) and not all(str(place) for place in value):
            raise ValueError("give folders or URLs, several with commas or as a JSON list")
        return value

    @field_validator("allowed_origins", mode="before")
    @classmethod
    def _join_origins(cls, value: object) -> object:
        # A cluster's file may have a list, as it has of interventions.
        return ",".join(map(str, value)) or None if isinstance(value, list) else value

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, value: str | None) -> str | None:
        for origin in _origins(value):
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ValueError("write '*', or origins such as https://a.example or a JSON list")
        return value

    @field_validator("api_key")
    @classmethod
    def _check_key(cls, value: SecretStr | None) -> SecretStr | None:
        key = "" if value is None else value.get_secret_value()
        if key != key.strip() or not key.isprintable():
            raise ValueError(
                "it has a space or a line break at an end, or a character that no header can have"
            )
        return value

    @field_validator("quota_url")
    @classmethod
    def _check_quota_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return value
        url = value.get_secret_value()
        if not re.fullmatch(r"rediss?://[^/?#\s]+(/\d+)?", url) or not _has_address(url):
            raise ValueError(
                "write it as redis://HOST:PORT/DB, or with rediss:// for TLS; in a password write"
                " /, ? and # percent-encoded"
            )
        if not _has_package("redis"):
            raise ValueError("it needs the package redis: pip install 'reft-server[redis]'")
        return value

    @field_validator("otlp_traces_endpoint")
    @classmethod
    def _check_collector(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return value
        url = value.get_secret_value()
        if not re.fullmatch(r"https?://[^/?#\s]+/\S+", url) or not _has_address(url):
            raise ValueError("write it as http://HOST:4318/v1/traces, or with https://")
        if not _has_package("opentelemetry.exporter.otlp.proto.http"):
            raise ValueError("it needs more packages: pip install 'reft-server[otel]'")
        return value

    @field_validator("tool_template")
    @classmethod
    def _check_template(cls, value: str | None) -> str | None:
        if value not in (None, BUILT_IN_TEMPLATE) and not Path(str(value)).is_file():
            raise ValueError(f"give a file that exists, or {BUILT_IN_TEMPLATE}")
        return value

    @property
    def needs_key(self) -> bool:
        """Whether clients need a key."""
        return self.api_key is not None or self.keys is not None

    @property
    def folders(self) -> list[Path]:
        """Those of the sources of interventions that are folders on this machine."""
        return [local_folder(place) for place in self.interventions if not is_url(place)]

    @property
    def state_folder(self) -> Path | None:
        """Folder on this machine for what only this server keeps; None without a state.

        For a state that other servers have, too, it is a part of the cache.
        """
        if self.state_dir is None:
            return None
        if not self.shared_state and not is_url(self.state_dir):
            return local_folder(self.state_dir)
        name = hashlib.sha256(self.state_dir.encode()).hexdigest()[:16]
        return cache_folder() / "states" / name

    @property
    def origins(self) -> list[str]:
        """List of the allowed origins; empty where none is allowed."""
        return _origins(self.allowed_origins)

    def engine_options(self) -> dict[str, Any]:
        """Keyword arguments for the engine: those of its options that are set."""
        values = {name: getattr(self, name) for name in ENGINE_OPTIONS}
        return {name: value for name, value in values.items() if value is not None}


def load_settings(options: Mapping[str, Any]) -> Settings:
    """Build settings from `options` that were given, the environment and the defaults.

    None and an empty list stand for an option that was not given.

    An option wins over the environment, and the environment over the default. Raises
    `ConfigError` with one line per problem; no line repeats a value, which may be a key.
    """
    try:
        given = {name: value for name, value in options.items() if value not in (None, [])}
        return Settings(**given)
    except ValidationError as error:
        lines = [_problem(tuple(item["loc"]), item["msg"]) for item in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _origins(value: str | None) -> list[str]:
    """Split origins that are written with commas or, as vLLM takes them, as a JSON list."""
    return [] if value is None else _several(value)


def _several(value: str) -> list[str]:
    """Split values that are written with commas or as a JSON list; an empty one is a mistake."""
    if value.startswith("["):
        try:
            listed = json.loads(value)
        except ValueError:
            listed = [""]
        return [str(one) for one in listed]
    return [one.strip() for one in value.split(",")]


def _has_package(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _has_address(url: str) -> bool:
    """Whether host and port of a URL can be read."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _problem(loc: tuple[int | str, ...], message: str) -> str:
    name, message = str(loc[0]), message.removeprefix("Value error, ")
    option, variable = f"--{name.replace('_', '-')}", f"REFT_{name.upper()}"
    return f"{option} (or {variable}): {message[:1].lower()}{message[1:]}."
