"""PEFT: one static batch in which every request has a LoRA of its own (`adapter_names`).

Configuration: `model` (a folder), `dtype`, `loras` (adapter folders).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.peers.transformers_generate import run_static
from benchmarks.peers.worker import Job, Result, Run, serve


def load(config: Mapping[str, Any]) -> Run:
    """The model with all adapters, ready to run jobs whose requests are equally long."""
    model = AutoModelForCausalLM.from_pretrained(
        config["model"], dtype=config["dtype"], trust_remote_code=False
    )
    names = [f"lora-{i}" for i in range(len(config["loras"]))]
    first, *others = zip(config["loras"], names, strict=True)
    peft = PeftModel.from_pretrained(
        model, first[0], adapter_name=first[1], autocast_adapter_dtype=False
    )
    for folder, name in others:
        peft.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
    peft.eval()

    def run(job: Job) -> Result:
        chosen = [names[i % len(names)] for i in range(len(job["prompts"]))]
        return run_static(peft, job, adapter_names=chosen)

    return run


if __name__ == "__main__":
    serve(load)
