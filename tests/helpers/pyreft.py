"""pyreft itself, for comparison: random interventions of its classes, and checkpoints it saves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reft_runtime.interventions import BaseShape

interventions = pytest.importorskip(
    "pyreft.interventions", reason="pyreft is not installed; `make test` does it"
)
pyreft = pytest.importorskip("pyreft")
pyvene = pytest.importorskip("pyvene")

CLASSES = {
    "loreft": "LoreftIntervention",
    "noreft": "NoreftIntervention",
    "direft": "DireftIntervention",
    "nodireft": "NodireftIntervention",
    "consreft": "ConsreftIntervention",
    "lobireft": "LobireftIntervention",
}
WIDTH, INNER, LAYERS = 16, 24, 4
BASE = BaseShape(
    model="tiny",
    architecture="LlamaForCausalLM",
    hidden_size=WIDTH,
    num_layers=LAYERS,
    vocab_size=64,
)


def module(
    kind: str,
    *,
    seed: int = 0,
    rank: int = 4,
    width: int = WIDTH,
    act: str | None = None,
    dtype: torch.dtype = torch.float32,
    add_bias: bool = True,
) -> Any:
    """An intervention of pyreft's class for a kind, with random weights, as if trained."""
    torch.manual_seed(seed)
    made = getattr(interventions, CLASSES[kind])(
        embed_dim=width, low_rank_dimension=rank, act_fn=act, dtype=dtype, add_bias=add_bias
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if not name.startswith("act_fn"):  # moving R away from where it was initialised, too
                parameter.add_(0.3 * torch.randn_like(parameter))
            if name.endswith("weight.original"):
                parameter.diagonal().fill_(-1)
    return made.eval()


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.train(False)
    return model


def reft_model(places: Sequence[tuple[int, str]], modules: Sequence[Any]) -> Any:
    """A live model of pyreft's with interventions at (layer, component), in this order."""
    representations = [
        {
            "layer": layer,
            "component": component,
            "low_rank_dimension": 4,
            "intervention": intervention,
        }
        for (layer, component), intervention in zip(places, modules, strict=True)
    ]
    config = pyreft.ReftConfig(representations=representations)
    return pyreft.get_reft_model(tiny_model(), config)


def save(folder: Path, places: Sequence[tuple[int, str]], modules: Sequence[Any]) -> Path:
    """A checkpoint that pyreft saved."""
    reft_model(places, modules).save(str(folder))
    return folder
