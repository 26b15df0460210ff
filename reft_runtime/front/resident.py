"""A base model in memory, from its loading to its end: sized, with the core that computes it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_runtime.base.shape import shape_of
from reft_runtime.base.stages import stage
from reft_runtime.engine.core import EngineCore
from reft_runtime.engine.kv_budget import kv_bytes, memory_bytes, recurrent_bytes
from reft_runtime.engine.sizing import Limits, config_for
from reft_runtime.interventions.format.manifest import BaseShape
from reft_runtime.loading.base import load_base
from reft_runtime.machine.dtypes import name_of
from reft_runtime.parallel.launch import Launcher
from reft_runtime.parallel.ranks import Ranks
from reft_runtime.stats import EngineInfo
from reft_runtime.text import Tokenizer


class ResidentModel:
    """One base model that stays in memory until `close`, computed by `core`.

    The arguments are those of `Engine`: `ranks` is its `tensor_parallel`. Above 1 that many
    processes compute the model together, of which this is the first. Raises `ConfigError` or
    `UnsupportedModel`; then a model object is as it was, and no other process is left.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        limits: Limits,
        *,
        device: str,
        dtype: str,
        ranks: int,
        launcher: Launcher | None,
    ) -> None:
        self._others: Ranks | None = None
        with ExitStack() as started:
            if ranks > 1:
                self._others = Ranks(
                    model, ranks, limits, device=device, dtype=dtype, launcher=launcher
                )
                started.callback(self._others.close)
            with nullcontext() if self._others is None else self._others.starting():
                self.name, loaded, own = load_base(
                    model, tokenizer, dtype, limits.max_model_len, device=device, ranks=ranks
                )
                lent = isinstance(model, PreTrainedModel)
                started.callback(loaded.give_back if lent else loaded.discard)
                self.config = config_for(loaded, limits)
                with stage("Setting up the cache"):
                    leader = None if self._others is None else self._others.leader
                    self.core = EngineCore(loaded, self.config, followers=leader)
            self.tokenizer = Tokenizer(own, loaded.max_model_len)
            self._started = started.pop_all()

    @property
    def shape(self) -> BaseShape:
        """What files are checked against."""
        return shape_of(self.name, self.core.loaded)

    def info(self, intervention_bytes: int) -> EngineInfo:
        """What is loaded, and how much memory serving takes, counted from what it takes now."""
        loaded, config = self.core.loaded, self.config
        return EngineInfo(
            model=self.name,
            architecture=loaded.architecture,
            dtype=name_of(loaded.dtype),
            device=str(loaded.device),
            threads=torch.get_num_threads(),
            max_model_len=loaded.max_model_len,
            max_running=config.max_running,
            vocab_size=loaded.vocab_size,
            parameters=loaded.model.num_parameters(),
            memory_bytes=memory_bytes(
                loaded,
                config.kv_tokens,
                config.max_running,
                config.max_step_tokens,
                config.snapshots,
            ),
            intervention_bytes=intervention_bytes,
            kv_bytes=kv_bytes(loaded, config.kv_tokens, config.max_running),
            kv_tokens=config.kv_tokens,
            recurrent_bytes=recurrent_bytes(loaded, config.max_running, config.snapshots),
        )

    def serve(self, on_loss: Callable[[str], None]) -> None:
        """End the start; from now on `on_loss` is told, on another thread, if a rank ends."""
        if self._others is not None:
            self._others.serve(on_loss)

    def close(self) -> None:
        """Give a model object back as it was, or free the model; end its other processes.

        It may be called again. The core's thread has ended before.
        """
        self._started.close()
