"""transformers' own continuous batching, with its sdpa attention.

Configuration: `model` (a folder), `dtype`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.peers.worker import Job, Result, Run, serve

KV_BLOCKS = 64
"""Blocks of 256 tokens. By default it takes nearly all memory, which others need here."""


def load(config: Mapping[str, Any]) -> Run:
    """The model, ready to run jobs whose answers are equally long."""
    model = AutoModelForCausalLM.from_pretrained(
        config["model"],
        dtype=config["dtype"],
        attn_implementation="sdpa",
        trust_remote_code=False,
    )

    def run(job: Job) -> Result:
        [answer] = set(job["answers"])
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, max_new_tokens=answer, eos_token_id=-1
        )
        start = time.perf_counter()
        found = model.generate_batch(
            job["prompts"],
            config,
            ContinuousBatchingConfig(num_blocks=KV_BLOCKS, max_batch_tokens=2048),
        )
        seconds = time.perf_counter() - start
        answers = [output.generated_tokens for output in found.values()]
        assert [len(tokens) for tokens in answers] == job["answers"]
        return {"seconds": seconds, "tokens": answers[0]}

    return run


if __name__ == "__main__":
    serve(load)
