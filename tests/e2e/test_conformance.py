"""What pyreft trained and saved gives here the tokens and logits that pyreft gave.

The reference is pyreft 0.1.0's own `generate` and forward on the demo model in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from reft_runtime import Engine, base_shape
from reft_runtime.base.model import LoadedModel
from reft_runtime.engine.core import EngineConfig, EngineCore
from reft_runtime.engine.events import Failed, TokenMade
from reft_runtime.interventions import parse, read, serialise
from reft_runtime.interventions.pyreft import import_pyreft
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.blocks import BLOCK_TOKENS, blocks_for
from reft_runtime.schedule.request import AppliedIntervention, Request
from tests.e2e.conftest import INTERVENTIONS

FIXTURES = Path(__file__).parents[1] / "fixtures"
REFERENCE: dict[str, list[dict[str, Any]]] = {
    **json.loads((FIXTURES / "pyreft_reference.json").read_text()),
    **json.loads((FIXTURES / "conformance/reference.json").read_text()),
}
SAMPLING = SamplingParams(temperature=0, max_tokens=24, logprobs=20)


def file_of(name: str) -> bytes:
    """The intervention as a file: shipped, kept as a fixture, or imported from pyreft's folder."""
    folder = FIXTURES / "conformance"
    if (folder / name).is_dir():
        return serialise(import_pyreft(folder / name, base=base_shape("demo")))
    shipped = INTERVENTIONS / f"{name}.safetensors"
    return read(shipped if shipped.exists() else folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {name: file_of(name) for name in REFERENCE}


@pytest.fixture(scope="module")
def loaded(demo_engine: Engine) -> LoadedModel:
    """The engine's, which has nothing to do meanwhile."""
    return demo_engine._loop._core.loaded


@pytest.fixture(scope="module")
def requests(files: dict[str, bytes]) -> list[Request]:
    """All cases of all interventions, in turn, so that neighbours differ."""
    applied = {
        name: AppliedIntervention(name, parse(data).canonical()) for name, data in files.items()
    }
    return [
        Request(f"{name}/{i}", tuple(case["prompt_tokens"]), SAMPLING, 0, (applied[name],))
        for i in range(max(map(len, REFERENCE.values())))
        for name, cases in REFERENCE.items()
        for case in cases[i : i + 1]
    ]


def check(core: EngineCore, requests: list[Request]) -> None:
    """Run the requests together; tokens must be equal, logits within 1e-3."""
    for request in requests:
        core.add(request)
    tokens: dict[str, list[int | None]] = {request.id: [] for request in requests}
    first: dict[str, dict[int, float]] = {}
    while not core.idle:
        for event in core.step():
            assert not isinstance(event, Failed)
            if isinstance(event, TokenMade):
                tokens[event.request_id].append(event.token)
                assert event.logprob is not None
                first.setdefault(event.request_id, dict(event.logprob.top))
    core.check_integrity()
    for request in requests:
        name, _, number = request.id.partition("/")
        case = REFERENCE[name][int(number)]
        assert tokens[request.id] == case["generated_ids"], request.id
        best, logits = zip(*case["last_logits_top5"], strict=True)
        ours = torch.tensor([first[request.id][token] for token in best])
        # Log-probabilities are the logits less one number, the same for all tokens.
        shift = ours - torch.tensor(logits)
        assert float(shift.max() - shift.min()) < 1e-3, request.id


def make_core(loaded: LoadedModel, kv_tokens: int = 16384) -> EngineCore:
    return EngineCore(loaded, EngineConfig(64, 512, kv_tokens))


def test_alone(loaded: LoadedModel, requests: list[Request]) -> None:
    """Every intervention, and every prompt."""
    core = make_core(loaded)
    for request in (*requests[:: len(REFERENCE) + 1], requests[len(REFERENCE) - 1]):
        check(core, [request])


def test_in_one_batch(loaded: LoadedModel, requests: list[Request]) -> None:
    check(make_core(loaded), requests)


@pytest.mark.parametrize(("length", "cases"), [(1, "0"), (2, "01"), (3, "12"), (5, "03")])
def test_in_prefill_chunks(
    loaded: LoadedModel,
    requests: list[Request],
    length: int,
    cases: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every intervention; of the prompts those whose last chunks are of different lengths."""
    core = make_core(loaded)
    schedule: Callable[..., int] = core.scheduler._schedule_prompt
    monkeypatch.setattr(
        core.scheduler,
        "_schedule_prompt",
        lambda plan, sequence, limit: schedule(plan, sequence, min(limit, length)),
    )
    check(core, [request for request in requests if request.id[-1] in cases])


def test_after_preemptions(loaded: LoadedModel, requests: list[Request]) -> None:
    # Room to admit all, and not for all of their answers.
    tight = sum(blocks_for(len(request.prompt) + 1) for request in requests) * BLOCK_TOKENS
    core = make_core(loaded, tight)
    check(core, requests)
    assert core.scheduler.preemptions > 0


def answers(url: str, name: str) -> list[str]:
    """What the server answers to all cases of an intervention, in one request."""
    body = {
        "model": name,
        "prompt": [case["prompt_tokens"] for case in REFERENCE[name]],
        "max_tokens": 24,
        "temperature": 0,
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()
    return [choice["text"] for choice in answer["choices"]]


def test_over_http(engine: Engine, url: str, files: dict[str, bytes]) -> None:
    for name in REFERENCE.keys() - {"emoji", "pirate"}:
        put = httpx.put(f"{url}/v1/interventions/{name}", content=files[name], timeout=60)
        assert put.status_code == 201, put.text
    try:
        with ThreadPoolExecutor(len(REFERENCE)) as pool:
            found = pool.map(partial(answers, url), REFERENCE)
        for texts, cases in zip(found, REFERENCE.values(), strict=True):
            assert texts == [engine.tokenizer.decode(case["generated_ids"]) for case in cases]
    finally:
        for name in REFERENCE.keys() - {"emoji", "pirate"}:
            httpx.delete(f"{url}/v1/interventions/{name}", timeout=60)
