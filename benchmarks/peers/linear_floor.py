"""The floor: what the model's linear layers take, with our products, and nothing else.

One pass over all prompts, then one for each further token; the output head computes one row a
request in each pass. Configuration: `model` (a folder), `dtype`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.peers.worker import Job, Result, Run, serve
from reft_runtime.base.linears import prepack


def load(config: Mapping[str, Any]) -> Run:
    """The linear layers, ready to run jobs whose requests are equally long."""
    model = AutoModelForCausalLM.from_pretrained(
        config["model"], dtype=config["dtype"], trust_remote_code=False
    )
    prepack(model)
    return lambda job: run_layers(model, job)


@torch.inference_mode()
def run_layers(model: Any, job: Job) -> Result:
    """The passes of one closed batch."""
    [prompt], [answer] = {len(p) for p in job["prompts"]}, set(job["answers"])
    n, head = len(job["prompts"]), model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = {
        (rows, module.in_features): torch.randn(rows, module.in_features).to(model.dtype)
        for module in linears
        for rows in (n, n * prompt)
    }
    start = time.perf_counter()
    for step in range(answer):
        rows = n * prompt if step == 0 else n
        for module in linears:
            module(inputs[n if module is head else rows, module.in_features])
    return {"seconds": time.perf_counter() - start, "tokens": [0] * answer}


if __name__ == "__main__":
    serve(load)
