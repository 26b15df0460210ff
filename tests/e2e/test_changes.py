"""Interventions come, change and go while requests run."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import openai
import torch

from reft_runtime import Engine, Intervention, SamplingParams
from reft_runtime.interventions import Edit, serialise
from tests.e2e.conftest import INTERVENTIONS

PROMPT = "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n"
TOKENS = 24
"""Of an answer: it is still under way when the next change comes."""


def strong(engine: Engine, seed: int) -> bytes:
    """A file whose edit changes the answer for sure: it moves the last row far away."""
    d = engine.registry.base.hidden_size
    generator = torch.Generator().manual_seed(seed)
    R = torch.linalg.qr(torch.randn(d, 4, generator=generator)).Q
    edit = Edit(20, "l1", {"W": torch.zeros(4, d), "R": R, "b": torch.full((4,), 60.0)})
    return serialise(Intervention.build(engine.registry.base, [edit]))


async def read(client: openai.AsyncOpenAI, model: str, tokens: int, begun: asyncio.Event) -> str:
    text = ""
    async for chunk in await client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    ):
        begun.set()
        text += chunk.choices[0].text
    return text


async def test_put_and_replace_under_many_streams(
    engine: Engine, url: str, async_client: openai.AsyncOpenAI
) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    [undisturbed] = engine.generate(PROMPT, sampling, intervention="pirate", progress=False)
    first, second = strong(engine, 1), strong(engine, 2)
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        begun = [asyncio.Event() for _ in range(8)]
        running = [
            asyncio.create_task(read(async_client, "pirate", TOKENS, event)) for event in begun
        ]
        await asyncio.gather(*(event.wait() for event in begun))

        created = await http.put("/v1/interventions/fresh", content=first)
        assert created.status_code == 201, created.text
        old_begun = asyncio.Event()
        old = asyncio.create_task(read(async_client, "fresh", TOKENS, old_begun))
        await old_begun.wait()
        replaced = await http.put("/v1/interventions/fresh", content=second)
        assert replaced.status_code == 200, replaced.text
        new = await read(async_client, "fresh", TOKENS, asyncio.Event())

        assert await asyncio.gather(*running) == [undisturbed.text] * 8
        by_digest = {
            digest: engine.generate(
                PROMPT, sampling, intervention=f"fresh@{digest}", progress=False
            )[0].text
            for digest in (created.json()["digest"], replaced.json()["digest"])
        }
        assert len({undisturbed.text, *by_digest.values()}) == 3
        assert await old == by_digest[created.json()["digest"]]
        assert new == by_digest[replaced.json()["digest"]]

        assert (await http.delete("/v1/interventions/fresh")).is_success
        gone = await http.post("/v1/completions", json={"model": "fresh", "prompt": PROMPT})
        assert gone.status_code == 404


async def test_bad_requests_and_files_leave_nothing_behind(engine: Engine, url: str) -> None:
    pirate = (INTERVENTIONS / "pirate.safetensors").read_bytes()
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        unknown = await http.post("/v1/completions", json={"model": "x", "prompt": PROMPT})
        assert unknown.status_code == 404
        assert unknown.json()["error"]["message"] == "The model `x` does not exist."
        assert unknown.json()["error"]["param"] == "model"

        body = {"model": engine.info.model, "prompt": "long " * 2000}
        long = await http.post("/v1/completions", json=body)
        assert long.status_code == 400
        assert "1024" in long.json()["error"]["message"]

        broken = await http.put("/v1/interventions/broken", content=pirate[:-100])
        assert broken.status_code == 400, broken.text
        assert (await http.get("/v1/interventions/broken")).status_code == 404


async def test_disconnect_frees_the_row(engine: Engine, url: str) -> None:
    body = {
        "model": "pirate",
        "prompt": PROMPT,
        "max_tokens": 900,
        "stream": True,
        "ignore_eos": True,
    }
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_lines():
                break
            assert engine.stats().running == 1
        for _ in range(200):
            if engine.stats().running == 0:
                break
            await asyncio.sleep(0.05)
    assert engine.stats().running == 0
    assert engine.stats().generation_tokens > 0


def test_source_folder_holds_only_valid_files(engine: Engine) -> None:
    shipped = {path.stem for path in Path(INTERVENTIONS).glob("*.safetensors")}
    assert {entry.name for entry in engine.registry.entries()} == shipped
    assert not engine.registry.problems()
