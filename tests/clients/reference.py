"""Transformers' own numbers for the demo model, in float32; run by the server's Python.

Takes `{"pairs": [[context, continuation], ...], "prompts": [...], "max_tokens": n}` on stdin, and
answers `{"loglikelihoods": [[sum, greedy], ...], "texts": [...]}` on stdout.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reft_runtime.base.demo import demo_model


@torch.inference_mode()
def main() -> None:
    """Answer one job."""
    job = json.load(sys.stdin)
    model: Any = AutoModelForCausalLM.from_pretrained(str(demo_model()), dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(demo_model()))
    loglikelihoods = []
    for context, continuation in job["pairs"]:
        start = len(tokenizer.encode(context))
        ids = torch.tensor([tokenizer.encode(context + continuation)])
        logprobs = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        chosen = logprobs.gather(1, ids[0, start:, None])
        greedy = bool((logprobs.argmax(-1) == ids[0, start:]).all())
        loglikelihoods.append([float(chosen.sum()), greedy])
    texts = []
    for prompt in job["prompts"]:
        ids = torch.tensor([tokenizer.encode(prompt)])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=job["max_tokens"],
        )
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    json.dump({"loglikelihoods": loglikelihoods, "texts": texts}, sys.stdout)


if __name__ == "__main__":
    main()
