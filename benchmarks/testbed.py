"""What all throughput cases of one dtype share. Each part is loaded when it is first asked for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache, cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.peers.client import Peer
from benchmarks.serving import served
from benchmarks.workload import random_intervention, settings, write_lora
from reft_runtime import Engine

KV_TOKENS = 32_768
"""Enough for every case here. All engines together have to fit into one machine's memory."""

VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONPATH": str(Path(__file__).with_name("peers") / "text_only"),
}
"""2 GiB of keys and values, which hold at least `KV_TOKENS` tokens; and no torchvision."""

NEEDS = {"vllm_cpu": "vllm", "peft_lora": "peers", "pyreft_serial": "peers"}
"""The Python environment of each peer. A peer that is not named runs in this one."""

MAX_TASKS = 64
MAX_LORAS = 32


class Testbed:
    """Engine, server, interventions, adapters and peers for one base model in one dtype."""

    def __init__(self, model: str, dtype: str, pythons: Mapping[str | None, Path | None]) -> None:
        self.model, self.dtype = model, dtype
        self.layers: int = AutoConfig.from_pretrained(
            model, trust_remote_code=False
        ).num_hidden_layers
        self._pythons = pythons
        self._stack = ExitStack()
        self.peer = cache(self._peer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @cached_property
    def engine(self) -> Engine:
        """Our engine in this process; it knows the interventions."""
        engine = Engine(self.model, dtype=self.dtype, kv_tokens=KV_TOKENS)
        return self._stack.enter_context(engine)

    @cached_property
    def port(self) -> int:
        """The port of our server in a process of its own; it knows the interventions."""
        options = {"kv_tokens": KV_TOKENS, "interventions": self._interventions}
        return self._stack.enter_context(served(self.model, self.dtype, options)).port

    @cached_property
    def reference(self) -> nn.Module:
        """The model as transformers loads it."""
        loaded: nn.Module = AutoModelForCausalLM.from_pretrained(
            self.model, dtype=getattr(torch, self.dtype), trust_remote_code=False
        )
        return loaded

    def names(self, setting: str) -> list[str]:
        """The interventions of one of `workload.settings`; engine and server know them."""
        assert self._interventions.is_dir()
        return _names(self.layers, setting)

    def _peer(self, name: str, loras: int = 0) -> Peer:
        config: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            "loras": [str(self._loras / str(i)) for i in range(loras)],
        }
        needed, environment = NEEDS.get(name), {}
        if name == "vllm_cpu":
            # Left to itself, it keeps one core free for its scheduler: of two, that is half.
            cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
            environment = {**VLLM_ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": cores}
        python = self._pythons[needed]
        assert python is not None
        return self._stack.enter_context(
            Peer(f"benchmarks.peers.{name}", python, config, environment)
        )

    @cached_property
    def _interventions(self) -> Path:
        """A folder with the interventions; the engine gets them too."""
        folder = self._folder()
        torch.manual_seed(0)
        for label, setting in settings(self.layers).items():
            for name in _names(self.layers, label):
                file = random_intervention(self.engine.registry.base, *setting)
                self.engine.registry.put(name, file)
                (folder / f"{name}.safetensors").write_bytes(file)
        return folder

    @cached_property
    def _loras(self) -> Path:
        folder = self._folder()
        torch.manual_seed(0)
        for i in range(MAX_LORAS):
            write_lora(folder / str(i), self.reference)
        return folder

    def _folder(self) -> Path:
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory()))


def _names(layers: int, setting: str) -> list[str]:
    number = list(settings(layers)).index(setting)
    return [f"task-{number}-{i}" for i in range(MAX_TASKS)]
