from __future__ import annotations

import pytest

from reft_runtime.errors import InvalidFile
from reft_runtime.interventions.format.components import module_path, normalise


@pytest.mark.parametrize(
    ("component", "expected"),
    [
        ("block_output", (7, "block_output")),
        ("head_attention_value_output", (7, "attention_value_output")),
        ("model.layers[15].output", (15, "block_output")),
        ("model.layers[15].input", (15, "block_input")),
        ("base_model.model.model.layers[2].output", (2, "block_output")),
        ("model.layers[3].mlp.output", (3, "mlp_output")),
        ("model.layers[3].mlp.act_fn.output", (3, "mlp_activation")),
        ("model.layers[0].self_attn.o_proj.input", (0, "attention_value_output")),
        ("model.layers[0].self_attn.q_proj.output", (0, "query_output")),
        (
            "model.layers[0].mlp.down_proj.output",
            (0, "model.layers[0].mlp.down_proj.output"),
        ),
        ("transformer.h[4].attn.resid_dropout.output", (4, "attention_output")),
        ("model.layers[2].linear_attn.input", (2, "mixer_input")),
        ("model.layers[2].mamba.output", (2, "mixer_output")),
        (
            "model.layers[2].linear_attn.out_proj.input",
            (2, "model.layers[2].linear_attn.out_proj.input"),
        ),
        ("transformer.h[4].mlp.act.output", (4, "mlp_activation")),
        ("gpt_neox.layers[1].attention.dense.input", (1, "attention_value_output")),
        ("gpt_neox.layers[1].mlp.act_fn.output", (1, "gpt_neox.layers[1].mlp.act_fn.output")),
        ("model.norm.output", (7, "model.norm.output")),
        ("base_model.model.model.norm.input", (7, "model.norm.input")),
    ],
)
def test_normalise(component: str, expected: tuple[int, str]) -> None:
    assert normalise(7, component) == expected
    assert normalise(*expected) == expected


@pytest.mark.parametrize(
    "component",
    [
        "",
        "output",
        "blocks",
        "model.layers[1]",
        "model.layers[1].outputs",
        "model.layers[x].output",
        "model.layers[-1].output",
        "model.layers[1].output\n",
        "model..layers[1].output",
        "model.layers[1]output",
        ".output",
        "m\u00f6del.output",
    ],
)
def test_what_is_no_component(component: str) -> None:
    with pytest.raises(InvalidFile, match="component: "):
        normalise(0, component)


def test_module_path() -> None:
    assert module_path("model.layers[15].mlp.output") == ("model.layers.15.mlp", "output")
    assert module_path("model.norm.input") == ("model.norm", "input")
