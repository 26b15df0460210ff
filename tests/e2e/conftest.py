"""The demo model behind a real socket: what a user gets, with the shipped interventions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import torch
import uvicorn
from transformers import AutoModelForCausalLM, PreTrainedModel

from reft_runtime import Engine
from reft_runtime.base.demo import demo_model
from server.app import create_app
from server.replicas import Replicas
from server.settings import Settings
from tests.helpers.serving import listening

INTERVENTIONS = Path(__file__).parents[2] / "interventions"


@pytest.fixture(scope="package")
def demo_engine() -> Iterator[Engine]:
    with Engine("demo", interventions=INTERVENTIONS, dtype="float32", max_model_len=1024) as engine:
        yield engine


@pytest.fixture
def engine(demo_engine: Engine) -> Iterator[Engine]:
    """The engine, which must be empty again after every test."""
    yield demo_engine
    deadline = time.monotonic() + 10
    while demo_engine.stats().running and time.monotonic() < deadline:
        time.sleep(0.05)  # an aborted request goes at the next step
    demo_engine.check_integrity()
    stats = demo_engine.stats()
    assert (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0)
    assert all(entry.in_flight == 0 for entry in demo_engine.registry.entries())


@contextmanager
def served(engine: Engine, settings: Settings, replicas: Replicas | None = None) -> Iterator[str]:
    """The address of a server of `engine`, as long as the block lasts."""
    app = create_app(engine, settings, replicas)
    config = uvicorn.Config(app, http="h11", ws="none", log_level="warning")
    with listening(uvicorn.Server(config)) as address:
        yield address


@pytest.fixture
def url(engine: Engine) -> Iterator[str]:
    with served(engine, Settings()) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    async with client:
        yield client


@pytest.fixture(scope="package")
def reference() -> PreTrainedModel:
    """The same model as transformers runs it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(demo_model()), dtype=torch.float32
    )
    return model


def generate(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy tokens of `model.generate` with a neutral configuration."""
    ids = torch.tensor([prompt])
    out = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_tokens,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens
