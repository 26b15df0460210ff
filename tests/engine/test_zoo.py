"""Greedy answers of the packed loop are those of `model.generate`, for every kind of attention."""

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from transformers import PreTrainedModel

from reft_runtime.base.model import LoadedModel
from reft_runtime.kernels.operators import cpu_operators
from reft_runtime.loading.loader import adopt_model
from tests.helpers.models import (
    WINDOW,
    answers,
    applied,
    generate,
    generate_edited,
    loreft,
    make_core,
    prompt,
    request,
    run,
    tiny,
)
from tools.models import DOCUMENT, SERVED, examine

MODELS = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "olmo2",
    "phi3",
    "stablelm",
    "nemotron",
    "gemma2",
    "gpt_oss",
    "llama4_text",
    "deepseek_v3",
    "gemma4_text",
)
OWN_ATTENTION = MODELS[-5:]
"""Models with soft-capping, sinks, chunks, latents and shared keys."""
SAMPLE = (
    *("falcon", "gptj", "codegen", "gpt_neo", "dbrx", "mixtral", "phimoe", "olmo3", "cohere2"),
    *("gemma4_text", "bert", "trocr", "bloom", "doge"),
)
"""Families whose rows of docs/models.md are looked at."""

LENGTHS = (1, 2, 5, WINDOW, WINDOW + 1, 3 * WINDOW)
NEW_TOKENS = WINDOW + 4


@pytest.fixture(scope="module", params=["compiled", "torch"])
def operators(request: pytest.FixtureRequest) -> Iterator[None]:
    """With the compiled operators, and as on a machine without a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr("reft_runtime.kernels.operators.kernels", lambda: None)
        yield


@cache
def own(model_type: str) -> tuple[PreTrainedModel, list[list[int]]]:
    """A model and its own answers."""
    model = tiny(model_type)
    wanted = [generate(model, prompt(length), NEW_TOKENS) for length in LENGTHS]
    assert len({token for tokens in wanted for token in tokens}) > len(LENGTHS)
    return model, wanted


@pytest.fixture(scope="module", params=MODELS)
def pair(
    request: pytest.FixtureRequest, operators: None
) -> tuple[PreTrainedModel, LoadedModel, list[list[int]]]:
    """A model, the same as the engine runs it, and its own answers."""
    model, wanted = own(request.param)
    return model, adopt_model(copy.deepcopy(model)), wanted


@pytest.mark.parametrize("max_step_tokens", [512, 3], ids=lambda n: f"step{n}")
def test_a_mixed_batch_gives_the_tokens_of_generate(
    pair: tuple[PreTrainedModel, LoadedModel, list[list[int]]], max_step_tokens: int
) -> None:
    _, loaded, wanted = pair
    core = make_core(
        loaded, max_running=min(len(LENGTHS), max_step_tokens), max_step_tokens=max_step_tokens
    )
    got = run(
        core,
        [request(str(n), prompt(n), max_tokens=NEW_TOKENS) for n in LENGTHS],
    )
    assert [got[str(n)][0] for n in LENGTHS] == wanted


@pytest.mark.parametrize("model_type", sorted(SAMPLE))
def test_the_table_of_models_says_what_is_so(model_type: str) -> None:
    row = examine(model_type)
    told = [part.strip() for part in str(row).split("|")]
    written = [
        [part.strip() for part in line.split("|")]
        for line in DOCUMENT.read_text().splitlines()
        if line.startswith(f"| {model_type} |")
    ]
    if row.outcome == SERVED:
        measured = told.index("its own") - 1  # the distance, which is another on other machines
        assert float(told[measured]) <= 1e-4
        for each in (told, *written):
            del each[measured]
            if cpu_operators() is None:
                del each[-2]
    assert written == [told]


def test_rows_grow_past_their_first_capacity(operators: None) -> None:
    model = tiny("mistral")
    loaded = adopt_model(copy.deepcopy(model))
    lengths = (3, 120, 126)
    got = run(make_core(loaded), [request(str(n), prompt(n), max_tokens=20) for n in lengths])
    assert [got[str(n)][0] for n in lengths] == [generate(model, prompt(n), 20) for n in lengths]


def test_the_longest_sequence_ends_at_the_models_limit() -> None:
    model = tiny("gpt2", max_position_embeddings=24)
    loaded = adopt_model(copy.deepcopy(model))
    assert loaded.max_model_len == 24
    found = answers(
        make_core(loaded), [request(str(n), prompt(n), max_tokens=None) for n in (4, 23, 24)]
    )
    assert found["4"].tokens[0] == generate(model, prompt(4), 20)
    assert [len(found[n].tokens[0]) for n in ("4", "23", "24")] == [20, 1, 1]
    assert {found[n].reasons[0] for n in found} == {"length"}


@pytest.mark.parametrize("model_type", OWN_ATTENTION)
def test_choices_kept_blocks_preemption_and_edits(model_type: str) -> None:
    model: Any = tiny(model_type, max_position_embeddings=96)
    core = make_core(adopt_model(copy.deepcopy(model)), kv_tokens=9 * 16)
    long = prompt(40)
    wanted = generate(model, long, 24)
    for _ in range(2):  # in the second round the prompt's blocks are kept
        got = run(core, [request("a", long, max_tokens=8, n=3)])
        assert got["a"] == dict.fromkeys(range(3), wanted[:8])
    assert core.scheduler.preemptions == 0
    edits = [(loreft(layer, "f2+l3", seed=layer, size=0.3), 1.0) for layer in (0, 2)]
    crowd = [
        request("plain", long, max_tokens=24),
        request("other", long[3:], max_tokens=24),
        request("edited", long[5:], applied(*(edit for edit, _ in edits)), max_tokens=24),
    ]
    got = run(core, crowd)
    assert core.scheduler.preemptions > 0
    assert got["plain"][0] == wanted
    assert got["other"][0] == generate(model, long[3:], 24)
    edited = generate_edited(model, model.model.layers, long[5:], edits, 24)
    assert got["edited"][0] == edited != generate(model, long[5:], 24)
