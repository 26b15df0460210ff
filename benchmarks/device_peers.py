"""The same requests through transformers on the same device: `generate`, and its batching.

Both with its defaults, on a model of the same shape. `generate` gets all requests as one batch of
equal lengths, which flatters it; continuous batching keeps its manager, and so its graphs, from run
to run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from benchmarks.measuring import SECONDS, Figures

GENERATE = "transformers: generate"
CONTINUOUS = "transformers: continuous batching"


class Transformers:
    """A model of random weights, as transformers runs it."""

    def __init__(self, config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        with device:
            self._model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype
            ).eval()
        self._vocabulary = config.vocab_size

    def case(
        self, label: str, n: int, prompt_tokens: int, answer_tokens: int
    ) -> Callable[[int], Figures]:
        """n requests at once, greedy."""
        settings = GenerationConfig(
            max_new_tokens=answer_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        ask = self._generate if label == GENERATE else self._batch

        def run(number: int) -> Figures:
            rng = random.Random(f"{label} {n} {number}")
            prompts = [
                [rng.randrange(self._vocabulary) for _ in range(prompt_tokens)] for _ in range(n)
            ]
            begin = time.perf_counter()
            made = ask(prompts, settings)
            seconds = time.perf_counter() - begin
            assert made == n * answer_tokens, f"{label} gave {made} tokens"
            return {SECONDS: seconds}

        return run

    def _generate(self, prompts: list[list[int]], settings: GenerationConfig) -> int:
        self._model.set_attn_implementation("sdpa")
        ids = torch.tensor(prompts, device=self._model.device)
        mask = torch.ones_like(ids)
        found = self._model.generate(ids, attention_mask=mask, generation_config=settings)
        made: int = found[:, ids.shape[1] :].cpu().numel()
        return made

    def _batch(self, prompts: list[list[int]], settings: GenerationConfig) -> int:
        # A request of this manager always has an end; random tokens do not meet this one.
        settings.eos_token_id = self._vocabulary
        found = self._model.generate_batch(
            inputs=prompts, generation_config=settings, persistent_manager=True
        )
        return sum(len(each.generated_tokens) for each in found.values())
