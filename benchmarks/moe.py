"""A mixture of experts (random weights, Qwen 3's pattern) beside transformers' `generate`.

`python -m benchmarks.moe`: decoding n sequences at once, and one long prompt.
"""

from __future__ import annotations

import argparse
import copy
import random

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from benchmarks.measuring import Case, measure, median, speed_ratio, table, timed
from benchmarks.workload import random_tokens
from reft_runtime.engine.core import EngineConfig, EngineCore
from reft_runtime.loading.loader import adopt_model
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.request import Request

VOCABULARY = 8192
PROMPT, ANSWER = 8, 24
LONG_PROMPT = 512
BATCHES = (1, 8, 32)

OURS, THEIRS = "reft-server", "generate"


def mixture(dtype: torch.dtype) -> PreTrainedModel:
    """230 M parameters in 8 layers of 32 experts, 4 of which a token gets."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=VOCABULARY,
        hidden_size=768,
        moe_intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=dtype, trust_remote_code=False
    )
    model.generation_config = GenerationConfig(do_sample=False)  # type: ignore[no-untyped-call]
    model.train(False)
    return model


def cases(model: PreTrainedModel, core: EngineCore, n: int, length: int, answer: int) -> list[Case]:
    """One run of `n` random prompts of `length` tokens with `answer` tokens each: ours, theirs."""

    def prompts(number: int) -> list[list[int]]:
        rng = random.Random(number)
        return [random_tokens(rng, VOCABULARY, length) for _ in range(n)]

    def ours(number: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
        for index, ids in enumerate(prompts(number)):
            core.add(Request(f"{number}-{index}", tuple(ids), params, seed=0))
        while not core.idle:
            core.step()

    @torch.inference_mode()
    def theirs(number: int) -> None:
        ids = torch.tensor(prompts(number))
        mask = torch.ones_like(ids)
        model.generate(  # type: ignore[operator]
            ids, attention_mask=mask, max_new_tokens=answer, pad_token_id=0
        )

    return [timed(ours), timed(theirs)]


def main() -> None:
    """Print a table of tokens a second, with the ratio to `generate`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    chosen = parser.parse_args()
    model = mixture(getattr(torch, chosen.dtype))
    core = EngineCore(adopt_model(copy.deepcopy(model)), EngineConfig(32, 512, 32 * 1024, False))
    rows = []
    for n, length, answer in [*((n, PROMPT, ANSWER) for n in BATCHES), (1, LONG_PROMPT, 1)]:
        setting = {"n": n, "length": length, "answer": answer, "dtype": chosen.dtype}
        ours, theirs = cases(model, core, n, length, answer)
        rounds = measure({OURS: ours, THEIRS: theirs}, chosen.rounds, setting)
        tokens = n * (answer if answer > 1 else length)
        speeds = [round(tokens / median(rounds, label)) for label in (OURS, THEIRS)]
        rows.append((f"{n} x {length} + {answer}", *speeds, speed_ratio(rounds, OURS, THEIRS)))
    print(table(("prompts", OURS, THEIRS, "ratio"), rows))


if __name__ == "__main__":
    main()
