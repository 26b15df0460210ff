"""How large an engine is: what was asked of it, within what its model, device and memory allow."""

from __future__ import annotations

from dataclasses import dataclass

from reft_runtime.base.model import LoadedModel
from reft_runtime.base.ranks import smallest
from reft_runtime.engine.core import EngineConfig
from reft_runtime.engine.device import sizes_for
from reft_runtime.engine.kv_budget import kv_budget, snapshot_places


@dataclass(frozen=True, slots=True)
class Limits:
    """What is asked of an engine; None is what suits its model and device.

    The fields are those of `Engine`.
    """

    max_model_len: int | None = None
    max_running: int | None = None
    max_step_tokens: int | None = None
    kv_tokens: int | None = None
    prefix_cache: bool = True


def config_for(loaded: LoadedModel, limits: Limits) -> EngineConfig:
    """The configuration of an engine on a loaded model; all ranks of one model call it together.

    Raises `ConfigError` if the memory that is free now is too little, as `kv_budget` does.
    """
    sizes = sizes_for(loaded.device)
    running = sizes.max_running if limits.max_running is None else limits.max_running
    tokens = sizes.max_step_tokens if limits.max_step_tokens is None else limits.max_step_tokens
    tokens = max(tokens, running)  # a step has a token for each that decodes
    snapshots = snapshot_places(loaded, running) if limits.prefix_cache else 0
    held = kv_budget(loaded, running, tokens, limits.kv_tokens, snapshots)
    if loaded.ranks > 1:
        held = smallest(held, loaded.device)
    return EngineConfig(running, tokens, held, limits.prefix_cache, snapshots)
