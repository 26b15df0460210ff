"""Edits of layers that one call computes: made within it, once, and as hooks make them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaModel

from reft_runtime.base import compiled_layer
from reft_runtime.base.compiled_layer import CompiledLayer
from reft_runtime.engine.events import Explained, Traced
from reft_runtime.kernels.cpu.decoder_layer import LayerRun
from reft_runtime.kernels.operators import cpu_operators
from reft_runtime.loading.loader import adopt_model
from reft_runtime.schedule.request import Request
from tests.base.test_fused import looping
from tests.helpers.models import (
    DEVICE,
    Answer,
    applied,
    intervention,
    loreft,
    make_core,
    prompt,
    request,
    run,
    step,
    tiny,
)

LAYERS = range(4)

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="a CPU's layers")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each call that computes layers: how many, and how many of them are edited."""
    found: list[tuple[int, int]] = []
    own = LayerRun.compute

    def compute(self: LayerRun, *args: Any) -> Any:
        found.append((len(self), sum(edits is not None for edits in args[5])))
        return own(self, *args)

    monkeypatch.setattr(LayerRun, "compute", compute)
    return found


def everywhere(seed: int, positions: str = "all", strength: float = 1) -> Any:
    edits = [loreft(layer, positions, seed=10 * seed + layer) for layer in LAYERS]
    return applied(*edits, strength=strength)


def one_by_one(monkeypatch: pytest.MonkeyPatch, requests: list[Request]) -> Any:
    """The answers where each layer is computed by itself, and edited by its hook."""
    with monkeypatch.context() as patch:
        patch.setattr(compiled_layer, "AHEAD_ROWS", 0)
        return run(make_core(), requests)


def test_edits_of_all_layers_are_made_in_one_call(
    monkeypatch: pytest.MonkeyPatch, computed: list[tuple[int, int]]
) -> None:
    requests = [
        request("a", prompt(5), everywhere(1), max_tokens=8),
        request("b", prompt(7), everywhere(2, strength=0.5), max_tokens=8),
        request("base", prompt(6), max_tokens=8),
    ]
    wanted = one_by_one(monkeypatch, requests)
    assert set(computed) == {(1, 0)}
    computed.clear()
    assert run(make_core(), requests) == wanted
    # Each step of it all is one call; the last layer is left to its hook.
    assert computed == [(4, 3)] * 8
    assert run(make_core(), [replace(one, interventions=()) for one in requests]) != wanted


@pytest.mark.parametrize("seed", range(6))
def test_mixed_edits_are_those_of_hooks(
    seed: int, monkeypatch: pytest.MonkeyPatch, computed: list[tuple[int, int]]
) -> None:
    """Of some layers, several of one row, of prompts alone, traced, with sampled neighbours."""
    one = loreft(seed % 3, "all", seed=seed)
    requests = [
        request("one", prompt(4), applied(one), max_tokens=12),
        request("two", prompt(9), everywhere(seed), everywhere(seed + 1), max_tokens=7),
        request("prompt", prompt(11), intervention(seed), max_tokens=9),
        request("beyond", prompt(3), everywhere(seed, "l1"), temperature=1.0, max_tokens=10),
        replace(request("traced", prompt(8), everywhere(seed), max_tokens=5), trace=True),
    ]
    del requests[1 : 1 + seed % 3]
    with monkeypatch.context() as patch:
        patch.setattr(compiled_layer, "AHEAD_ROWS", 0)
        wanted = tokens_and_traces(requests)
    computed.clear()
    assert tokens_and_traces(requests) == wanted
    assert wanted[1], "what the traced one's edits did"
    assert any(edited for _, edited in computed)
    assert any(count < len(LAYERS) for count, _ in computed), "up to what only a hook can do"


def tokens_and_traces(requests: list[Request]) -> tuple[Any, list[Explained | Traced]]:
    found: dict[str, Answer] = {}
    core = make_core()
    for one in requests:
        core.add(one)
    traces: list[Explained | Traced] = []
    while not core.idle:
        traces += [one for one in step(core, found) if isinstance(one, Explained | Traced)]
    return {name: (answer.tokens, answer.failed) for name, answer in found.items()}, traces


def test_a_callers_hook_sees_what_the_edits_did_not_change_yet(
    monkeypatch: pytest.MonkeyPatch, computed: list[tuple[int, int]]
) -> None:
    asked = [request("a", prompt(5), everywhere(1), max_tokens=4)]

    def seen() -> list[Tensor]:
        model = tiny("llama")
        core = make_core(adopt_model(model))
        found: list[Tensor] = []
        layer = model.model.layers[1]
        layer.register_forward_hook(lambda _, args, output: found.append(output.clone()))
        run(core, asked)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(compiled_layer, "AHEAD_ROWS", 0)
        wanted = seen()
    computed.clear()
    assert all(map(torch.equal, seen(), wanted))
    assert computed[-2:] == [(2, 1), (2, 1)], "up to the layer with a hook, and from there on"


@pytest.mark.parametrize("faster", [False, True])
def test_a_layer_that_is_computed_again_is_edited_again(
    faster: bool, monkeypatch: pytest.MonkeyPatch, computed: list[tuple[int, int]]
) -> None:
    flipped = looping(lambda rows: rows if faster else rows.flip(-1), faster=faster)
    monkeypatch.setattr(LlamaModel, "forward", flipped)
    asked = [request("a", prompt(5), everywhere(1), max_tokens=8)]

    made: list[CompiledLayer] = []
    own = CompiledLayer.__init__

    def kept(self: CompiledLayer, *args: Any) -> None:
        own(self, *args)
        made.append(self)

    monkeypatch.setattr(CompiledLayer, "__init__", kept)

    def answer() -> Any:
        core = make_core(adopt_model(tiny("llama")))
        for layer in made:
            layer._takes_output = True  # forget what the check at load showed
        computed.clear()
        return run(core, asked)

    with monkeypatch.context() as patch:
        patch.setattr(compiled_layer, "AHEAD_ROWS", 0)
        wanted = answer()
    assert answer() == wanted
    assert computed[0] == (4, 3)


def test_edits_that_no_operator_takes_are_left_to_hooks(
    monkeypatch: pytest.MonkeyPatch, computed: list[tuple[int, int]]
) -> None:
    asked = [request("a", prompt(5), everywhere(1), max_tokens=8)]
    operators = cpu_operators()
    assert operators is not None
    monkeypatch.setattr(operators, "_largest_rank", 3)
    wanted = one_by_one(monkeypatch, asked)
    computed.clear()
    assert run(make_core(), asked) == wanted
    assert set(computed) == {(1, 0)}
