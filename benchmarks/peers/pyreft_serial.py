"""pyreft, whose models apply one intervention at a time: one request after another.

Random LoReFT of rank 8 at all layers, on the first and last 7 tokens. One intervention serves for
all requests, so swapping weights costs it nothing. Configuration: `model` (a folder), `dtype`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pyreft
import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers.worker import Job, Result, Run, serve

RANK = 8
SPAN = 7


def load(config: Mapping[str, Any]) -> Run:
    """The model with its interventions, ready to run jobs."""
    dtype = getattr(torch, config["dtype"])
    model = AutoModelForCausalLM.from_pretrained(
        config["model"], dtype=dtype, trust_remote_code=False
    )
    layers = model.config.num_hidden_layers
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": RANK,
            "intervention": pyreft.LoreftIntervention(
                embed_dim=model.config.hidden_size, low_rank_dimension=RANK, dtype=dtype
            ),
        }
        for layer in range(layers)
    ]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))
    reft.set_device("cpu")
    reft.eval()

    def one(prompt: list[int], answer: int) -> list[int]:
        ids = torch.tensor([prompt])
        n = len(prompt)
        places = [*range(min(SPAN, n // 2)), *range(n - min(SPAN, n // 2), n)]
        _, out = reft.generate(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            unit_locations={"sources->base": (None, [[places]] * layers)},
            intervene_on_prompt=True,
            do_sample=False,
            min_new_tokens=answer,
            max_new_tokens=answer,
        )
        tokens: list[int] = out[0, n:].tolist()
        assert len(tokens) == answer
        return tokens

    @torch.inference_mode()
    def run(job: Job) -> Result:
        start = time.perf_counter()
        answers = [one(*pair) for pair in zip(job["prompts"], job["answers"], strict=True)]
        return {"seconds": time.perf_counter() - start, "tokens": answers[0]}

    return run


if __name__ == "__main__":
    serve(load)
