"""Every option of the server, in one class: keyword, `REFT_*` variable and command-line option."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from reft_runtime.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

SHIPPED = Path("interventions")
"""The interventions that come with the project, seen from its root."""

ENGINE_OPTIONS = (
    "interventions",
    "state_dir",
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
)
"""The fields that the engine takes, under the same names; one left unset is the engine's choice."""


class Settings(BaseSettings):
    """Options of `reft serve`: field `x` is `--x` or `REFT_X`; an empty variable is unset."""

    model_config = SettingsConfigDict(
        env_prefix="REFT_", env_ignore_empty=True, extra="forbid", frozen=True
    )

    model: str = Field(
        default="demo",
        min_length=1,
        description="Base model: 'demo', a Hugging Face id or a folder.",
    )
    interventions: Path | None = Field(
        default_factory=lambda: SHIPPED if SHIPPED.is_dir() else None,
        description="Folder of NAME.safetensors files to serve; by default ./interventions, "
        "where there is one.",
    )
    state_dir: Path | None = Field(
        default=None,
        description="Folder that keeps uploaded interventions; by default memory does.",
    )
    allow_base: str | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        description="Shell pattern: take files made for base models of such names where hidden "
        "size and layers fit, though architecture or vocabulary differ.",
    )
    intervention_bytes: int | None = Field(
        default=None,
        ge=2**28,
        description="Memory for interventions, in bytes, by default 1 GiB: those used least "
        "recently give way, uploads without --state-dir stay.",
    )
    state_bytes: int | None = Field(
        default=None,
        ge=2**26,
        description="Most bytes of uploads in --state-dir, by default 16 GiB; the next is answered "
        "507.",
    )
    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(
        default=8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one."
    )
    metrics_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="Serve /metrics on this port as well, without a key.",
    )
    api_key: SecretStr | None = Field(
        default=None,
        min_length=1,
        description="Key that clients send as 'Authorization: Bearer KEY'.",
    )
    allowed_origins: str | None = Field(
        default=None,
        min_length=1,
        description="Origins whose pages browsers let use this server (CORS): '*', or "
        "'https://a.example', several with commas or as a JSON list; by default none.",
    )
    device: str = Field(
        default="cpu",
        description="Where the model runs: cpu, cuda or cuda:N (not yet measured on a device).",
    )
    dtype: Dtype = Field(
        default="auto",
        description="Number format of the base model's weights; "
        "auto is the fast one for the device.",
    )
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        description="Longest prompt plus answer, in tokens; by default the model's.",
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
        description="Most requests that wait, by default 1024; the next is answered 503.",
    )
    max_queued_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most prompt tokens that wait, by default 1000000; "
        "the next request is answered 503.",
    )
    max_step_tokens: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="Most tokens of one engine step, by default 2048, on a CUDA device 8192; "
        "while answers are being made it takes fewer prompt tokens, by measured times.",
    )
    kv_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Size of the key-value cache, in tokens; by default what fits into 30 % of "
        "the available memory, or into nine tenths of a CUDA device's.",
    )
    prefix_cache: bool = Field(
        default=True,
        description="Reuse keys and values where prompts begin alike and are edited alike.",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="CPU threads of the engine; by default one a core that affinity and the "
        "container's CPU quota leave.",
    )
    first_token_timeout: float = Field(
        default=300.0, gt=0, le=86400, description="Seconds a request may wait for its first token."
    )
    request_timeout: float = Field(
        default=3600.0, gt=0, le=86400, description="Seconds a request may take in all."
    )
    drain_seconds: float = Field(
        default=30.0,
        ge=0,
        le=3600,
        description="Seconds that running requests get to finish on SIGTERM.",
    )
    max_body_bytes: int = Field(
        default=4 * 2**20, ge=1024, le=2**30, description="Largest JSON body accepted, in bytes."
    )
    log_format: LogFormat = Field(
        default="text", description="Lines of the log: text, or json, an object a line."
    )
    log_level: LogLevel = Field(default="info", description="Least severe message that is logged.")

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, value: str | None) -> str | None:
        for origin in _origins(value):
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ValueError("write '*', or origins such as https://a.example or a JSON list")
        return value

    @property
    def origins(self) -> list[str]:
        """The allowed origins, each by itself."""
        return _origins(self.allowed_origins)

    def engine_options(self) -> dict[str, Any]:
        """Keyword arguments for the engine, those that are set."""
        values = {name: getattr(self, name) for name in ENGINE_OPTIONS}
        return {name: value for name, value in values.items() if value is not None}


def load_settings(options: Mapping[str, Any]) -> Settings:
    """Settings from `options` (those that are not None), then the environment, then the defaults.

    Raises `ConfigError` with one line a problem; no line repeats a value, which may be a key.
    """
    try:
        return Settings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        lines = [_problem(tuple(item["loc"]), item["msg"]) for item in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _origins(value: str | None) -> list[str]:
    """Origins written with commas between them, or as a JSON list, as vLLM takes them."""
    if value is None:
        return []
    if value.startswith("["):
        try:
            listed = json.loads(value)
        except ValueError:
            listed = [""]
        return [str(origin) for origin in listed]
    return [origin.strip() for origin in value.split(",")]


def _problem(loc: tuple[int | str, ...], message: str) -> str:
    name, message = str(loc[0]), message.removeprefix("Value error, ")
    option, variable = f"--{name.replace('_', '-')}", f"REFT_{name.upper()}"
    return f"{option} (or {variable}): {message[:1].lower()}{message[1:]}."
