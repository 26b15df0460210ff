"""What is asked of every engine: requests, random interventions, random LoRA adapters."""

from __future__ import annotations

import json
import random
import statistics
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.measuring import SECONDS, Figures
from benchmarks.peers.worker import Job, Result
from reft_runtime.interventions import BaseShape, Edit, Intervention, serialise
from reft_runtime.sampling import Grammar

PROMPT_TOKENS = 64
ANSWER_TOKENS = 64

MIXED_REQUESTS = 48
MIXED_PROMPTS = (16, 1024)
MIXED_ANSWERS = (8, 256)
MIXED_RATE = 6
"""Arrivals a second. Two cores do not keep up with them, so many answers are made at once."""

LORA_RANK = 8


def random_tokens(rng: random.Random, vocabulary: int, count: int) -> list[int]:
    """Token ids of a prompt, each drawn from the whole vocabulary."""
    return [rng.randrange(vocabulary) for _ in range(count)]


def closed(vocabulary: int, n: int, seed: str, answer: int = ANSWER_TOKENS) -> Job:
    """n requests at once: 64 random prompt tokens, 64 tokens to answer.

    Every case and round has prompts of its own, so that no prefix cache knows them.
    """
    rng = random.Random(seed)
    prompts = [random_tokens(rng, vocabulary, PROMPT_TOKENS) for _ in range(n)]
    return {"prompts": prompts, "answers": [answer] * n}


def mixed(vocabulary: int, seed: str, requests: int = MIXED_REQUESTS) -> Job:
    """Requests that arrive at random (Poisson); lengths are log-uniform.

    Lengths and arrivals are always the same; only the prompts' tokens depend on the seed.
    """
    shape, tokens = random.Random(0), random.Random(seed)

    def length(bounds: tuple[int, int]) -> int:
        low, high = bounds
        drawn: float = low * (high / low) ** shape.random()
        return round(drawn)

    job: Job = {"prompts": [], "answers": [], "arrivals": []}
    now = 0.0
    for _ in range(requests):
        job["prompts"].append(random_tokens(tokens, vocabulary, length(MIXED_PROMPTS)))
        job["answers"].append(length(MIXED_ANSWERS))
        job["arrivals"].append(now)
        now += shape.expovariate(MIXED_RATE)
    return job


def figures(result: Result) -> Figures:
    """The seconds of a job and, where it streamed, to first tokens and between tokens."""
    found = {SECONDS: result["seconds"]}
    if stamps := result.get("stamps"):
        first = [times[0] for times in stamps]
        gaps = [b - a for times in stamps for a, b in pairwise(times)]
        found |= {
            "ttft_median": statistics.median(first),
            "ttft_p95": percentile(first, 95),
            "gap_p95": percentile(gaps, 95),
        }
    return found


def percentile(values: list[float], percent: int) -> float:
    """The smallest value that `percent` percent of all do not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


L1 = "n tasks: 4 layers, r=4, l1"
F3L3 = "n tasks: 4 layers, r=4, f3+l3"
PAPER = "n tasks: all layers, r=8, f7+l7"
"""The setting of most experiments of the LoReFT paper (arXiv 2404.03592)."""
DECODE = "n tasks: all layers, r=8, decode"


def settings(layers: int) -> dict[str, tuple[list[int], int, str]]:
    """Intervention settings by label: layers, rank, positions."""
    four = [layers * i // 5 for i in range(1, 5)]
    every = list(range(layers))
    return {
        L1: (four, 4, "l1"),
        F3L3: (four, 4, "f3+l3"),
        PAPER: (every, 8, "f7+l7"),
        DECODE: (every, 8, "decode"),
    }


def random_intervention(base: BaseShape, layers: list[int], rank: int, positions: str) -> bytes:
    """A valid LoReFT file with random weights."""
    d = base.hidden_size
    edits = [
        Edit(
            layer,
            positions,
            {
                "W": torch.randn(rank, d) * 0.02,
                "R": torch.linalg.qr(torch.randn(d, rank)).Q,
                "b": torch.randn(rank) * 0.02,
            },
        )
        for layer in layers
    ]
    return serialise(Intervention.build(base, edits))


def schemas(count: int) -> list[Grammar]:
    """JSON Schemas with names of their own, of answers that are longer than `ANSWER_TOKENS`."""
    kinds: list[dict[str, object]] = [
        {"type": "string", "minLength": 8, "maxLength": 40},
        {"type": "integer", "minimum": 0, "maximum": 100_000},
        {"enum": ["very low", "low", "medium", "high", "very high"]},
        {"type": "array", "items": {"type": "string", "minLength": 3}, "minItems": 2},
        {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
    ]
    words = ["order", "street", "customer", "city", "product", "amount", "reason", "comment"]

    def schema(number: int) -> dict[str, object]:
        rng = random.Random(number)
        names = [f"{rng.choice(words)}_{rng.choice(words)}_{i}" for i in range(16)]
        properties = {name: rng.choice(kinds) for name in names}
        return {
            "type": "object",
            "properties": properties,
            "required": names,
            "additionalProperties": False,
        }

    return [Grammar("json_schema", json.dumps(schema(number))) for number in range(count)]


def patterns(count: int) -> list[Grammar]:
    """Regular expressions that leave a choice at every token, of answers without an end."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [
        Grammar("regex", f"([A-Z]?[{letters[: 10 + number % 16]}]+[,;]? ){{400,{500 + number}}}")
        for number in range(count)
    ]


def write_lora(folder: Path, model: nn.Module) -> None:
    """A LoRA adapter in PEFT's format: rank 8 on all linear layers of the blocks, random weights.

    The weights are small, as after training, and not zero, so that nothing can be left out.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    tensors = {}
    for name, module in linears.items():
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(LORA_RANK, module.in_features) * 0.02
        tensors[f"{key}.lora_B.weight"] = torch.randn(module.out_features, LORA_RANK) * 0.02
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": LORA_RANK,
        "lora_alpha": LORA_RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in linears}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
