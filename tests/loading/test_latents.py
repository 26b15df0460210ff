"""What layers keep: latents where they are smaller and nothing speaks against it, and keys once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from reft_runtime.base.attention import LayerShape
from reft_runtime.base.latent import latent_of
from reft_runtime.base.model import LoadedModel
from reft_runtime.loading.loader import adopt_model
from tests.helpers.models import generate, make_core, prompt, request, run, tiny

LATENT = LayerShape(1, 16 + 8, 16, values_in_keys=True)
EXPANDED = LayerShape(4, 16 + 8, 12)


def check(model: PreTrainedModel, loaded: LoadedModel) -> None:
    found = run(make_core(loaded), [request("a", prompt(20))])
    assert found["a"][0] == generate(model, prompt(20))


def test_latents_are_kept_where_they_are_smaller() -> None:
    model = tiny("deepseek_v3")
    loaded = adopt_model(copy.deepcopy(model))
    assert loaded.shapes == (LATENT,) * 3
    assert loaded.kv_bytes_per_token == 3 * 4 * (16 + 8)
    assert loaded.group == 4
    check(model, loaded)
    large = tiny("deepseek_v3", kv_lora_rank=200)
    assert adopt_model(large).shapes == (EXPANDED,) * 3


def hook(module: Any) -> None:
    module.kv_b_proj.register_forward_hook(lambda *_: None)


def bias(module: Any) -> None:
    module.kv_b_proj.bias = nn.Parameter(torch.zeros(len(module.kv_b_proj.weight)))


class Other(nn.Linear):
    """Stands for a quantised layer."""


def other(module: Any) -> None:
    module.kv_b_proj.__class__ = Other


@pytest.mark.parametrize("change", [hook, bias, other])
def test_other_layers_keep_keys_and_values(change: Callable[[Any], None]) -> None:
    model: Any = tiny("deepseek_v3")
    change(model.model.layers[1].self_attn)
    loaded = adopt_model(copy.deepcopy(model))
    assert loaded.shapes == (LATENT, EXPANDED, LATENT)
    check(model, loaded)


def test_a_module_that_makes_other_keys_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny("deepseek_v3")
    kind = type(model.model.layers[0].self_attn)
    expand = kind.expand_kv

    def twice(self: Any, latent: Any, rotated: Any) -> Any:
        keys, values = expand(self, latent, rotated)
        return 2 * keys, values

    monkeypatch.setattr(kind, "expand_kv", twice)
    loaded = adopt_model(copy.deepcopy(model))
    assert loaded.shapes == (EXPANDED,) * 3
    check(model, loaded)


def test_a_training_expands_latents() -> None:
    loaded = adopt_model(tiny("deepseek_v3"), differentiable=True)
    assert loaded.shapes == (EXPANDED,) * 3
    assert not any(latent_of(module) for module in loaded.model.modules())


def test_shared_keys_and_values_are_kept_once() -> None:
    loaded = adopt_model(tiny("gemma4_text"))
    own = LayerShape(2, 8, 8), LayerShape(2, 16, 16)
    shared = LayerShape(2, 8, 8, source=0), LayerShape(2, 16, 16, source=1)
    assert loaded.shapes == (*own, *shared)
    assert loaded.kv_bytes_per_token == 4 * 2 * (8 + 8 + 16 + 16)


def test_llama_4_is_served_up_to_where_it_scales_queries_by_position() -> None:
    model = tiny("llama4_text", floor_scale=24, attn_scale=5.0)
    loaded = adopt_model(copy.deepcopy(model))
    assert loaded.max_model_len == 23
    # Together they are longer than that, in one step.
    got = run(make_core(loaded), [request(str(n), prompt(n), max_tokens=3) for n in (20, 19, 18)])
    assert [got[str(n)][0] for n in (20, 19, 18)] == [
        generate(model, prompt(n), 3) for n in (20, 19, 18)
    ]
