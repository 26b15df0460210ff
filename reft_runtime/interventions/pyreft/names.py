"""The names that pyvene gave to the files of a checkpoint, in its three eras.

A component of a layer, and a module path:

- 0.0.1 to 0.0.6: `layer.0.repr.block_output.unit.pos.nunit.1#0`; no paths
- 0.0.7 to 0.1.6: `layer.0.comp.block_output.unit.pos.nunit.1#0`,
  `comp.model.layers[1].output.unit.pos.nunit.1#0`
- 0.1.7 on: `layer_0_comp_block_output_unit_pos_nunit_1#0`,
  `comp_model_layers[1]_output_unit_pos_nunit_1#0`

`#k` counts the interventions of one place. A file is `intkey_<name>.bin`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from reft_runtime.errors import InvalidFile

_IN_LAYER = re.compile(
    r"layer([._])(\d{1,5})\1(?:comp|repr)\1(\w+?)\1unit\1([\w.]+?)\1nunit\1(\d+)#(\d{1,5})"
)
_BY_PATH = re.compile(r"comp([._])(.+?)\1unit\1([\w.]+?)\1nunit\1(\d+)#(\d{1,5})")

# Module names that contain an underscore, which is the separator in names of the newest era.
_UNDERSCORED = (
    "self_attn",
    "o_proj",
    "q_proj",
    "k_proj",
    "v_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "act_fn",
    "resid_dropout",
    "attn_dropout",
    "c_proj",
    "c_attn",
    "c_fc",
    "dense_h_to_4h",
    "dense_4h_to_h",
    "query_key_value",
    "gpt_neox",
    "base_model",
    "input_layernorm",
    "post_attention_layernorm",
    "ln_1",
    "ln_2",
    "ln_f",
    "embed_tokens",
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an intervention acts; `layer` is 0 and means nothing for a component that is a path."""

    layer: int
    component: str
    unit: str = "pos"
    units: int = 1

    def names(self, number: int) -> tuple[str, ...]:
        """The file names that the `number`-th intervention of this place has had, newest first."""
        fields = [("unit", self.unit), ("nunit", str(self.units))]
        if "." in self.component:
            spellings = [("_", [("comp", self.component)]), (".", [("comp", self.component)])]
        else:
            layer = ("layer", str(self.layer))
            spellings = [
                ("_", [layer, ("comp", self.component)]),
                (".", [layer, ("comp", self.component)]),
                (".", [layer, ("repr", self.component)]),
            ]
        names = []
        for separator, start in spellings:
            parts = [part for field in (*start, *fields) for part in field]
            if separator == "_":
                parts = [part.replace(".", "_") for part in parts]
            names.append(f"intkey_{separator.join(parts)}#{number}.bin")
        return tuple(names)


def parse_name(name: str) -> tuple[Place, int]:
    """The place and the number that a file's name stands for. Raises `InvalidFile`."""
    key = name.removeprefix("intkey_").removesuffix(".bin")
    if match := _IN_LAYER.fullmatch(key):
        _, layer, component, unit, units, number = match.groups()
        return Place(int(layer), component, unit, int(units)), int(number)
    if match := _BY_PATH.fullmatch(key):
        separator, component, unit, units, number = match.groups()
        if separator == "_":
            component = _with_dots(component)
        return Place(0, component, unit, int(units)), int(number)
    raise InvalidFile(f"{name[:200]}: not a name that pyvene gives to a file.")


def _with_dots(path: str) -> str:
    kept = re.compile("|".join(rf"(?<![a-z0-9]){name}(?![a-z0-9])" for name in _UNDERSCORED))
    marked = kept.sub(lambda match: match[0].replace("_", "\0"), path)
    return marked.replace("_", ".").replace("\0", "_")
