"""RED's and BREP's files do what their formulas do in plain hooks, and the rest is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reft_runtime.base.shape import base_shape
from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.interventions.foreign import red
from reft_runtime.interventions.foreign.formats import import_foreign
from reft_runtime.interventions.format.words import in_words
from reft_runtime.interventions.pyreft.unpickle import read_state
from tests.helpers.models import HIDDEN, tiny
from tests.helpers.reference import BASE
from tests.interventions.hooked import Hook, agrees, random


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(red, "read_states", lambda paths: [read_state(p) for p in paths])


def delta_vector(
    folder: Path, widths: Mapping[str, int], names: tuple[str, ...] = ("scaling", "bias")
) -> tuple[Path, dict[str, Tensor]]:
    """A file of RED's for modules by their paths, and its tensors."""
    state = {
        f"{path}.delta_vector.activation_{name}": random(1, width, seed=2 * i + (name == "bias"))
        + (name == "scaling")
        for i, (path, width) in enumerate(widths.items())
        for name in names
    }
    torch.save(state, folder / "delta_vector.pth")
    return folder / "delta_vector.pth", state


def red_hooks(state: Mapping[str, Tensor], first: int | None = None) -> dict[str, Hook]:
    """RED's activation layers, or with a number of generated tokens BREP's."""

    def hook(scaling: Tensor | None, bias: Tensor | None) -> Hook:
        count = 0

        def change(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            nonlocal count
            count = 0 if output.shape[1] > 1 else count + 1
            if first is not None and count > first:
                return None
            output = output if scaling is None else output * scaling
            return output if bias is None else output + bias

        return change

    paths = {name.rpartition(".delta_vector.")[0] for name in state}
    parts = ("activation_scaling", "activation_bias")
    return {
        path: hook(*(state.get(f"{path}.delta_vector.{part}") for part in parts)) for path in paths
    }


LLAMA = {f"model.layers.{layer}.mlp.down_proj": HIDDEN for layer in range(4)}


@pytest.mark.parametrize("names", [("scaling", "bias"), ("scaling",), ("bias",)])
def test_red(names: tuple[str, ...], tmp_path: Path) -> None:
    path, state = delta_vector(tmp_path, LLAMA, names)
    made = import_foreign(path, base=BASE)
    agrees(made, lambda strength: red_hooks(state))
    assert in_words(made.manifest) == (
        "4 red edits of model.layers[N].mlp.down_proj.output, layers 0 to 3, all positions"
    )
    assert "'prompt+decode[:P]'" in str(made.manifest.training["assumed"])


def test_brep(tmp_path: Path) -> None:
    attention = {"q": HIDDEN, "k": HIDDEN // 2, "v": HIDDEN // 2, "o": HIDDEN}
    for name, width in {**attention, "up": 48}.items():
        block = "mlp" if name == "up" else "self_attn"
        widths = {f"model.layers.{layer}.{block}.{name}_proj": width for layer in (1, 2)}
        _, state = delta_vector(tmp_path, widths)
        made = import_foreign(tmp_path, base=BASE, positions="prompt+decode[:3]")
        agrees(made, lambda strength, state=state: red_hooks(state, 3))  # type: ignore[misc]
        assert "assumed" not in made.manifest.training


def test_red_of_gpt2(tmp_path: Path) -> None:
    model = tiny("gpt2")
    modules = {"attn.c_attn": 3 * HIDDEN, "attn.c_proj": HIDDEN, "mlp.c_proj": HIDDEN}
    widths = {f"transformer.h.1.{name}": width for name, width in modules.items()}
    path, state = delta_vector(tmp_path, widths)
    made = import_foreign(path, base=base_shape(model))
    agrees(made, lambda strength: red_hooks(state), model)


NAME = "model.layers.1.mlp.down_proj.delta_vector."

UNSOUND: dict[str, tuple[dict[str, Tensor], str]] = {
    "norm": ({f"{NAME}activation_ln.weight": torch.ones(HIDDEN)}, "activation_ln.weight: normalis"),
    "name": ({f"{NAME}gate": torch.ones(1, HIDDEN)}, "no tensor of RED, whose names are MODULE"),
    "shape": ({f"{NAME}activation_bias": torch.ones(HIDDEN)}, r"\[32\], expected \[1, 32\]"),
    "number": ({f"{NAME}activation_bias": torch.tensor(1.0)}, r"\[\], expected \[1, 1\]"),
    "width": ({f"{NAME}activation_bias": torch.ones(1, 8)}, "its output is 8 wide, but tiny is 32"),
    "halves": (
        {
            f"{NAME}activation_bias": torch.ones(1, HIDDEN),
            f"{NAME}activation_scaling": torch.ones(1, 8),
        },
        r"activation_scaling: shape \[1, 8\], expected \[1, 32\]",
    ),
    "layer": (
        {"model.layers.4.mlp.up_proj.delta_vector.activation_bias": torch.ones(1, 48)},
        "tiny has layers 0 to 3; check --base",
    ),
    "whole": ({f"{NAME}activation_bias": torch.ones(1, HIDDEN).long()}, "holds int64 numbers"),
    "infinite": ({f"{NAME}activation_bias": torch.full((1, HIDDEN), torch.inf)}, "infinite values"),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_what_is_no_sound_file_of_red(case: str, tmp_path: Path) -> None:
    state, message = UNSOUND[case]
    torch.save(state, tmp_path / "delta_vector.pth")
    with pytest.raises((InvalidFile, ValueError), match=message):
        import_foreign(tmp_path, base=BASE)


def test_options_that_red_lacks(tmp_path: Path) -> None:
    path, _ = delta_vector(tmp_path, LLAMA)
    with pytest.raises(ConfigError, match="layer: a file of RED's has none; leave it out"):
        import_foreign(path, base=BASE, layer=[1])


def test_positions_that_are_empty(tmp_path: Path) -> None:
    path, _ = delta_vector(tmp_path, LLAMA)
    with pytest.raises(InvalidFile, match="positions: '' is not understood"):
        import_foreign(path, base=BASE, positions="")
