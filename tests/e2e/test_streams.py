"""Many streams at once over a real socket give what each gives alone."""

from __future__ import annotations

import asyncio

import openai
from transformers import PreTrainedModel

from reft_runtime import Engine, SamplingParams
from tests.e2e.conftest import generate

MAX_TOKENS = 4
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "tea",
    "brews",
]
MODELS = ["SmolLM2-135M-Instruct", "emoji", "pirate", "SmolLM2-135M-Instruct:emoji"]


def prompts() -> list[tuple[str, str]]:
    """32 (model, prompt) pairs, from a dozen tokens to some fifty."""
    made = []
    for i in range(32):
        words = [WORDS[(i * 7 + j) % len(WORDS)] for j in range(1 + i)]
        text = f"<|im_start|>user\n{i}: {' '.join(words)}<|im_end|>\n<|im_start|>assistant\n"
        made.append((MODELS[i % len(MODELS)], text))
    return made


async def stream(client: openai.AsyncOpenAI, model: str, prompt: str) -> str:
    text = ""
    async for chunk in await client.completions.create(
        model=model, prompt=prompt, max_tokens=MAX_TOKENS, temperature=0, stream=True
    ):
        text += chunk.choices[0].text
    return text


async def test_32_streams_equal_their_solo_runs(
    engine: Engine, async_client: openai.AsyncOpenAI, reference: PreTrainedModel
) -> None:
    requests = prompts()
    together = await asyncio.gather(*(stream(async_client, *request) for request in requests))
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    base = engine.info.model
    for (model, prompt), text in zip(requests, together, strict=True):
        name = None if model == base else model.removeprefix(f"{base}:")
        [alone] = engine.generate(prompt, sampling, intervention=name, progress=False)
        assert text == alone.text
        if name is None:
            ids = engine.tokenizer.encode(prompt)
            assert alone.tokens == generate(reference, ids, MAX_TOKENS)
    assert engine.stats().preemptions == 0


def test_base_and_tasks_differ_in_a_chat(client: openai.OpenAI) -> None:
    texts = {
        model: client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Who are you?"}],
            max_tokens=24,
            temperature=0,
        )
        .choices[0]
        .message.content
        for model in ("SmolLM2-135M-Instruct", "emoji", "pirate")
    }
    assert len(set(texts.values())) == 3
    # The shipped files' templates make of the chat the very prompt that they were trained on.
    assert texts["pirate"] == "Arr, I be a salty sea dog, matey!"
    assert texts["emoji"] == "🍎💻💻💻"
