"""vLLM on a CPU, base or with LoRA, through its AsyncLLM.

Default settings throughout; answers are not detokenised. Configuration: `model` (a folder),
`dtype`, `loras` (adapter folders, all resident at once). For jobs whose requests are all there at
once, `LLM.generate` was measured to be as fast.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from itertools import count
from typing import Any

from vllm import SamplingParams, TokensPrompt
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from benchmarks.peers.worker import Job, Result, Run, serve

POLLING_SECONDS = 1.2
"""A job ends this late: vLLM's worker polls on a whole core for a second after its last step."""


def load(config: Mapping[str, Any]) -> Run:
    """An engine that runs jobs."""
    loras = [LoRARequest(f"lora-{i}", i + 1, folder) for i, folder in enumerate(config["loras"])]
    options: dict[str, Any] = {"model": config["model"], "dtype": config["dtype"]}
    if loras:
        options |= {"enable_lora": True, "max_loras": len(loras), "max_cpu_loras": len(loras)}
        options |= {"max_lora_rank": 8}
    loop = asyncio.new_event_loop()

    async def start() -> AsyncLLM:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**options))

    engine = loop.run_until_complete(start())
    names = count()

    async def one(job: Job, i: int, begin: float) -> tuple[list[int], list[float]]:
        arrival = begin + (job["arrivals"][i] if "arrivals" in job else 0.0)
        await asyncio.sleep(max(0.0, arrival - time.perf_counter()))
        sampling = SamplingParams(
            temperature=0,
            max_tokens=job["answers"][i],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        tokens: list[int] = []
        stamps: list[float] = []
        async for answer in engine.generate(
            TokensPrompt(prompt_token_ids=job["prompts"][i]),
            sampling,
            request_id=f"request-{next(names)}",
            lora_request=loras[i % len(loras)] if loras else None,
        ):
            new = answer.outputs[0].token_ids
            tokens += new
            stamps += [time.perf_counter() - arrival] * len(new)
        assert len(tokens) == job["answers"][i]
        return tokens, stamps

    async def run_all(job: Job) -> Result:
        begin = time.perf_counter()
        done = await asyncio.gather(*(one(job, i, begin) for i in range(len(job["prompts"]))))
        seconds = time.perf_counter() - begin
        await asyncio.sleep(POLLING_SECONDS)
        return {"seconds": seconds, "tokens": done[0][0], "stamps": [times for _, times in done]}

    return lambda job: loop.run_until_complete(run_all(job))


if __name__ == "__main__":
    serve(load)
