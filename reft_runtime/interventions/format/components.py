"""Where in a layer an edit acts: the named components, and module paths for all other places.

The names are pyvene's, but for `mixer_input` and `mixer_output`: of what a recurrent layer has in
attention's place, or beside it. A path is written as pyvene writes it,
`model.layers[15].mlp.output`: the module's path in the model, indices in brackets, then `input` or
`output`.
"""

from __future__ import annotations

import re

from reft_runtime.errors import InvalidFile

# Components whose rows are as wide as the model's hidden states in every architecture.
HIDDEN_SIZED = frozenset(
    {
        "block_input",
        "block_output",
        "mlp_input",
        "mlp_output",
        "attention_input",
        "attention_output",
        "mixer_input",
        "mixer_output",
    }
)
NAMED = HIDDEN_SIZED | {
    "mlp_activation",
    "attention_value_output",
    "query_output",
    "key_output",
    "value_output",
}

_PATH = re.compile(r"[A-Za-z_]\w*(\[\d{1,4}\]|\.[A-Za-z_]\w*)*\.(input|output)", re.ASCII)
_IN_LAYER = re.compile(r"(model\.layers|transformer\.h|gpt_neox\.layers)\[(\d+)\](.*)")
_PEFT = "base_model.model."

# For each list of layers: the rest of a path, and the component that it stands for.
_LLAMA = {
    ".input": "block_input",
    ".output": "block_output",
    ".mlp.input": "mlp_input",
    ".mlp.output": "mlp_output",
    ".mlp.act_fn.output": "mlp_activation",
    ".self_attn.output": "attention_output",
    ".self_attn.o_proj.input": "attention_value_output",
    ".self_attn.q_proj.output": "query_output",
    ".self_attn.k_proj.output": "key_output",
    ".self_attn.v_proj.output": "value_output",
    ".linear_attn.input": "mixer_input",
    ".linear_attn.output": "mixer_output",
    ".mamba.input": "mixer_input",
    ".mamba.output": "mixer_output",
    ".conv.input": "mixer_input",
    ".conv.output": "mixer_output",
}
_GPT2 = {
    ".input": "block_input",
    ".output": "block_output",
    ".mlp.input": "mlp_input",
    ".mlp.output": "mlp_output",
    ".mlp.act.output": "mlp_activation",
    ".attn.resid_dropout.output": "attention_output",
    ".attn.c_proj.input": "attention_value_output",
}
_GPT_NEOX = {
    ".input": "block_input",
    ".output": "block_output",
    ".mlp.input": "mlp_input",
    ".mlp.output": "mlp_output",
    ".mlp.act.output": "mlp_activation",
    ".attention.output": "attention_output",
    ".attention.dense.input": "attention_value_output",
}
_SAME_AS = {"model.layers": _LLAMA, "transformer.h": _GPT2, "gpt_neox.layers": _GPT_NEOX}


def normalise(layer: int, component: str) -> tuple[int, str]:
    """The one way to write a place: a named component if there is one, else its path.

    A path's layer is the one inside it, whatever `layer` says; a path outside the layers keeps
    `layer`. `head_attention_value_output` is another name of `attention_value_output`, and the
    prefix that PEFT puts before a model's modules is dropped. Raises `InvalidFile` for what is
    neither a name nor a path.
    """
    if component == "head_attention_value_output":
        component = "attention_value_output"
    if component in NAMED:
        return layer, component
    if not _PATH.fullmatch(component):
        raise InvalidFile(
            f"component: {component[:80]!r} is neither one of {', '.join(sorted(NAMED))} nor a"
            " module path such as `model.layers[3].mlp.output`."
        )
    component = component.removeprefix(_PEFT)
    match = _IN_LAYER.fullmatch(component)
    if match is None:
        return layer, component
    return int(match[2]), _SAME_AS[match[1]].get(match[3], component)


def module_path(component: str) -> tuple[str, str]:
    """Split a path component into the path for `get_submodule` and `input` or `output`."""
    path, _, side = component.rpartition(".")
    return re.sub(r"\[(\d+)\]", r".\1", path), side
