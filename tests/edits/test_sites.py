"""Every component is edited where its name says, in every architecture."""

from __future__ import annotations

import copy
import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from reft_runtime import Engine
from reft_runtime.base.model import LoadedModel, forward
from reft_runtime.edits.sites import EditSites
from reft_runtime.engine.core import EngineCore
from reft_runtime.errors import WrongBaseModel
from reft_runtime.interventions import Intervention, serialise
from reft_runtime.loading.loader import adopt_model
from tests.helpers.models import (
    HIDDEN,
    answers,
    generate,
    make_core,
    prompt,
    request,
    tiny,
)
from tests.helpers.reference import RandomEdit, applied, generate_applied, logits
from tests.helpers.tokenizer import tiny_tokenizer

EVERYWHERE = {
    "block_input": HIDDEN,
    "block_output": HIDDEN,
    "mlp_input": HIDDEN,
    "mlp_output": HIDDEN,
    "mlp_activation": 48,
    "attention_input": HIDDEN,
    "attention_output": HIDDEN,
    "attention_value_output": HIDDEN,
}
PROJECTIONS = {"query_output": HIDDEN, "key_output": 16, "value_output": 16}
OWN: dict[str, dict[str, int]] = {
    "llama": PROJECTIONS
    | {
        "model.embed_tokens.output": HIDDEN,
        "model.norm.input": HIDDEN,
        "model.norm.output": HIDDEN,
        "model.layers[1].input_layernorm.output": HIDDEN,
        "model.layers[1].post_attention_layernorm.input": HIDDEN,
        "model.layers[1].mlp.gate_proj.output": 48,
        "model.layers[1].mlp.down_proj.input": 48,
        "model.layers[1].self_attn.o_proj.output": HIDDEN,
    },
    "qwen2": PROJECTIONS,
    "gemma3_text": PROJECTIONS | {"model.layers[1].pre_feedforward_layernorm.output": HIDDEN},
    "gpt2": {
        "transformer.wte.output": HIDDEN,
        "transformer.ln_f.input": HIDDEN,
        "transformer.h[1].attn.c_attn.output": 3 * HIDDEN,
        "transformer.h[1].mlp.c_proj.input": 48,
    },
    "gpt_neox": {
        "gpt_neox.embed_in.output": HIDDEN,
        "gpt_neox.layers[1].attention.query_key_value.output": 3 * HIDDEN,
        "gpt_neox.layers[1].mlp.dense_h_to_4h.output": 48,
        "gpt_neox.final_layer_norm.input": HIDDEN,
    },
}
CASES = [
    (model_type, component, width)
    for model_type, own in OWN.items()
    for component, width in {**EVERYWHERE, **own}.items()
] + [
    (model_type, component, HIDDEN)
    for model_type, others in {
        "qwen3_5_text": ("model.layers[3].self_attn.output",),
        "falcon_h1": ("attention_output", "attention_value_output"),
        "lfm3": (),
    }.items()
    for component in ("block_input", "mlp_output", "mixer_input", "mixer_output", *others)
]


@cache
def models(model_type: str) -> tuple[PreTrainedModel, LoadedModel, EngineCore]:
    """The model as transformers runs it, the same weights as the engine does, and an engine."""
    model = tiny(model_type)
    loaded = adopt_model(copy.deepcopy(model))
    return model, loaded, make_core(loaded)


@cache
def unedited(model_type: str, tokens: tuple[int, ...]) -> tuple[list[int], Tensor]:
    """The model's own answer, and the log-probabilities of its first token."""
    model, _, _ = models(model_type)
    return generate(model, tokens), logits(model, tokens, len(tokens))[-1].log_softmax(-1)


@pytest.mark.parametrize(("model_type", "component", "width"), CASES)
def test_a_component_is_edited_in_its_place(model_type: str, component: str, width: int) -> None:
    model, _, core = models(model_type)
    core.runner.sites.check(1, component, width)
    tokens = prompt(11)
    wanted = {}
    for positions in ("f2+l3", "all"):
        edit = RandomEdit("loreft", positions, component=component, width=width, act="gelu")
        wanted[positions] = [applied(edit), applied(edit, strength=-0.5)]
    requests = [
        request(name, tokens, *(each.intervention for each in interventions), logprobs=20)
        for name, interventions in wanted.items()
    ]
    got = answers(core, [request("base", tokens), *requests])
    base, plain = unedited(model_type, tokens)
    assert got["base"].tokens[0] == base
    for name, interventions in wanted.items():
        assert got[name].tokens[0] == generate_applied(model, tokens, interventions), name
        last = logits(model, tokens, len(tokens), interventions)[-1].log_softmax(-1)
        first = got[name].logprobs[0][0]
        assert first is not None
        ids, values = zip(*first.top, strict=True)
        torch.testing.assert_close(torch.tensor(values), last[list(ids)], rtol=0, atol=1e-4)
        assert (last - plain).abs().max() > 1e-2, name


def test_what_recurrent_layers_do_not_have() -> None:
    sites = models("qwen3_5_text")[2].runner.sites
    sites.check(3, "attention_output", HIDDEN)
    with pytest.raises(WrongBaseModel, match=r"no mixer_output of layer 3 that could be edited\.$"):
        sites.check(3, "mixer_output", HIDDEN)
    with pytest.raises(WrongBaseModel, match="is recurrent: it has mixer_input and mixer_output"):
        sites.check(0, "attention_output", HIDDEN)
    for inside in ("in_proj_qkv.output", "out_proj.input", "norm.output"):
        # It gets the rows of one sequence at a time: no edit would meet its own rows.
        with pytest.raises(WrongBaseModel, match="that could be edited"):
            sites.check(0, f"model.layers[0].linear_attn.{inside}", HIDDEN)


def test_a_mixer_that_has_the_name_of_attention_is_none() -> None:
    _, loaded, _ = models("llama")
    two = torch.arange(2)
    sites = EditSites(
        loaded.model,
        loaded.layers,
        [loaded.layers[1].self_attn],  # type: ignore[list-item]
        lambda step: forward(loaded.model, two, two, two[:1], step),
    )
    sites.check(0, "attention_output", HIDDEN)
    sites.check(1, "mixer_output", HIDDEN)
    for component in ("attention_output", "attention_value_output", "query_output"):
        with pytest.raises(WrongBaseModel, match="is recurrent"):
            sites.check(1, component, HIDDEN)


PYVENE = [
    (model_type, component, width)
    for model_type in ("llama", "gpt2", "gpt_neox")
    for component, width in {
        **EVERYWHERE,
        # pyvene takes the hidden size for keys and values, which grouped queries make narrower
        **({"query_output": HIDDEN} if model_type == "llama" else {}),
    }.items()
]


@pytest.mark.parametrize(("model_type", "component", "width"), PYVENE)
@pytest.mark.filterwarnings("ignore")
def test_as_pyvene_places_it(model_type: str, component: str, width: int) -> None:
    pyvene = pytest.importorskip("pyvene", reason="pyvene is not installed")
    model, _, core = models(model_type)
    edit = RandomEdit("steering", "[0,4,-2]", component=component, width=width)

    class Addition(pyvene.ConstantSourceIntervention):  # type: ignore[misc,name-defined]
        def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
            return base + edit.tensors["v"]

    wrapped = pyvene.IntervenableModel(
        pyvene.IntervenableConfig(
            [
                pyvene.RepresentationConfig(
                    layer=1,
                    component=component,
                    unit="pos",
                    intervention=Addition(embed_dim=width, keep_last_dim=True),
                )
            ]
        ),
        copy.deepcopy(model),
    )
    tokens = prompt(9)
    _, output = wrapped(
        {"input_ids": torch.tensor([tokens])},
        unit_locations={"sources->base": (None, [[[0, 4, 7]]])},
    )
    theirs = output.logits[0, -1].detach().log_softmax(-1)
    asked = request("a", tokens, applied(edit).intervention, max_tokens=1, logprobs=20)
    first = answers(core, [asked])["a"].logprobs[0][0]
    assert first is not None
    ids, values = zip(*first.top, strict=True)
    torch.testing.assert_close(torch.tensor(values), theirs[list(ids)], rtol=0, atol=1e-4)
    _, plain = unedited(model_type, tokens)
    assert (theirs - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("model_type", "component", "width", "message"),
    [
        ("gpt2", "query_output", HIDDEN, "has no query_output of layer 1 that"),
        ("gpt_neox", "value_output", HIDDEN, "has no value_output of layer 1 that"),
        ("llama", "model.layers[1].mlp.no_such.output", HIDDEN, "has no model.layers[1].mlp.no_"),
        ("gpt2", "model.layers[1].mlp.up_proj.input", HIDDEN, "has no model.layers[1].mlp.up_"),
        ("llama", "mlp_activation", HIDDEN, "mlp_activation of layer 1 is 48 wide in the loaded"),
        ("llama", "key_output", HIDDEN, "key_output of layer 1 is 16 wide"),
        ("llama", "model.layers[1].mlp.gate_proj.output", HIDDEN, "is 48 wide in the loaded"),
        # Modules that exist, without one row of each token to edit.
        ("llama", "model.layers.output", HIDDEN, "has no model.layers.output that"),
        ("llama", "model.input", HIDDEN, "has no model.input that"),
        ("llama", "model.output", HIDDEN, "has no model.output that"),
        ("llama", "lm_head.output", 320, "has no lm_head.output that"),
        ("llama", "lm_head.input", HIDDEN, "has no lm_head.input that"),
        ("llama", "model.embed_tokens.input", HIDDEN, "has no model.embed_tokens.input that"),
        ("qwen3", "model.layers[1].self_attn.q_norm.output", 8, "has no model.layers[1].self_attn"),
        ("gpt2", "transformer.drop.training.output", HIDDEN, "has no transformer.drop.training"),
    ],
)
def test_what_the_model_has_not_is_refused_at_once(
    model_type: str, component: str, width: int, message: str
) -> None:
    model = tiny(model_type)
    with Engine(model, tokenizer=tiny_tokenizer(), max_running=2) as engine:
        stored = RandomEdit("loreft", "l1", component=component, width=width).stored
        data = serialise(Intervention.build(engine.registry.base, [stored]))
        with pytest.raises(WrongBaseModel, match=re.escape(message)) as caught:
            engine.registry.put("task", data)
        assert caught.value.message.endswith(("edited.", "in the file."))
        assert not engine.registry.entries()
