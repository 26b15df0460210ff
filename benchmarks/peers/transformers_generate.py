"""`model.generate` with one static batch. Configuration: `model` (a folder), `dtype`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers.worker import Job, Result, Run, serve


def load(config: Mapping[str, Any]) -> Run:
    """The model, ready to run jobs whose requests are equally long."""
    model = AutoModelForCausalLM.from_pretrained(
        config["model"], dtype=config["dtype"], trust_remote_code=False
    )
    return lambda job: run_static(model, job)


def run_static(model: Any, job: Job, **options: Any) -> Result:
    """One batch, greedy, none ends early; `options` are further ones of `generate`."""
    [answer] = set(job["answers"])
    start = time.perf_counter()
    ids = torch.tensor(job["prompts"])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=answer,
        max_new_tokens=answer,
        **options,
    )
    seconds = time.perf_counter() - start
    assert out.shape[1] == ids.shape[1] + answer
    return {"seconds": seconds, "tokens": out[0, ids.shape[1] :].tolist()}


if __name__ == "__main__":
    serve(load)
