"""Jobs run by this project: in process, as streams, and over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from itertools import cycle

from benchmarks.peers.worker import Job, Result, Run
from benchmarks.serving import ask_all, request_bytes
from reft_runtime import Engine, SamplingParams, Use
from reft_runtime.sampling import Grammar


def at_once(
    engine: Engine, names: Sequence[str], grammars: Sequence[Grammar | None] = (None,)
) -> Run:
    """Jobs run by `Engine.generate`. Request i takes name i; without names all take the base.

    Its answer has the form of grammar i, the first one's again behind the last.
    """

    def run(job: Job) -> Result:
        [answer] = set(job["answers"])
        sampling = [
            SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, grammar=grammar)
            for _, grammar in zip(job["prompts"], cycle(grammars), strict=False)
        ]
        start = time.perf_counter()
        found = engine.generate(
            job["prompts"],
            sampling,
            intervention=list(names[: len(job["prompts"])]) if names else None,
            progress=False,
        )
        seconds = time.perf_counter() - start
        assert all(len(one.tokens) == answer for one in found)
        return {"seconds": seconds, "tokens": found[0].tokens}

    return run


async def stream(
    engine: Engine, prompt: list[int], answer: int, uses: Sequence[Use], arrival: float
) -> tuple[list[int], list[float]]:
    """One request: its `answer` tokens, and the seconds from its `arrival` to each of them."""
    sampling = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
    tokens: list[int] = []
    stamps: list[float] = []
    async for deltas in await engine.open(prompt, sampling, uses):
        for delta in deltas:
            tokens += delta.tokens
            stamps += [time.perf_counter() - arrival] * len(delta.tokens)
    assert len(tokens) == answer
    return tokens, stamps


def streamed(engine: Engine, names: Sequence[str]) -> Run:
    """Jobs run by `Engine.open`: a stream for each request, begun at its arrival."""

    async def one(job: Job, i: int, begin: float) -> tuple[list[int], list[float]]:
        arrival = begin + (job["arrivals"][i] if "arrivals" in job else 0.0)
        await asyncio.sleep(max(0.0, arrival - time.perf_counter()))
        uses = (Use(names[i]),) if names else ()
        return await stream(engine, job["prompts"][i], job["answers"][i], uses, arrival)

    async def run_all(job: Job) -> Result:
        begin = time.perf_counter()
        done = await asyncio.gather(*(one(job, i, begin) for i in range(len(job["prompts"]))))
        return {
            "seconds": time.perf_counter() - begin,
            "tokens": done[0][0],
            "stamps": [stamps for _, stamps in done],
        }

    return lambda job: asyncio.run(run_all(job))


def over_http(port: int, base: str, names: Sequence[str]) -> Run:
    """Jobs run by `reft serve` on this machine, streamed, with a connection for each request."""

    def run(job: Job) -> Result:
        requests = [
            request_bytes(names[i] if names else base, prompt, stream=True, answer=answer)
            for i, (prompt, answer) in enumerate(zip(job["prompts"], job["answers"], strict=True))
        ]
        start = time.perf_counter()
        answers = ask_all(port, requests, len(requests))
        seconds = time.perf_counter() - start
        for answer, tokens in zip(answers, job["answers"], strict=True):
            assert b'"completion_tokens":%d' % tokens in answer, answer[:500]
        return {"seconds": seconds, "tokens": []}

    return run
