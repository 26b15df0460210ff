"""Experts with packed weights give what their own code gives, and are given back."""

import copy
from typing import Any

import pytest
import torch

from reft_runtime.base.experts import pack_experts
from reft_runtime.base.linears import prepack
from reft_runtime.loading.loader import adopt_model
from tests.helpers.packing import needs_packing
from tools.tiny_models import tiny_config, tiny_model

FAMILIES = ["mixtral", "aria_text", "gpt_oss", "nemotron_h"]
"""With plain weights; transposed; with biases and gates of their own; without gates."""

pytestmark = pytest.mark.skipif(
    prepack(torch.nn.Linear(8, 8)).layers == 0, reason="this torch packs no weights"
)


def experts_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("Experts")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_packed_experts_give_what_they_gave(family: str, dtype: torch.dtype) -> None:
    needs_packing(dtype)
    model: Any = tiny_model(tiny_config(family)).to(dtype)  # type: ignore[arg-type]
    own = experts_of(copy.deepcopy(model))
    packed = experts_of(model)
    assert pack_experts(model) == len(packed) > 0
    for one, other in zip(own, packed, strict=True):
        width = one.down_proj.shape[2 if one.is_transposed else 1]
        for rows in (1, 2, 40):
            hidden = torch.randn(rows, width).to(dtype)
            index = torch.rand(rows, one.num_experts).topk(2).indices
            shares = torch.rand(rows, 2).to(dtype)
            wanted, found = one(hidden, index, shares), other(hidden, index, shares)
            near = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(
                found, wanted, rtol=near, atol=near * float(wanted.abs().max())
            )


def test_other_experts_keep_their_code() -> None:
    model: Any = tiny_model(tiny_config("mixtral"))
    for module in experts_of(model):
        module._apply_gate = lambda both: both  # of another width than its last product takes
    assert pack_experts(model) == 0


@pytest.mark.parametrize("family", ["mixtral", "aria_text"])
def test_experts_are_given_back(family: str) -> None:
    model = tiny_model(tiny_config(family))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adopt_model(model).give_back()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
