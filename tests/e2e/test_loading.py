"""The demo model's start."""

import torch
from transformers import PreTrainedModel

from reft_runtime.base.demo import demo_model
from reft_runtime.base.pretrained import read_model
from reft_runtime.loading.loader import adopt_model


@torch.no_grad()
def test_a_slightly_changed_model_is_served_in_bfloat16() -> None:
    # Its logits after special tokens turn on rounding: its own attention implementations differ
    # there by as much as another model would.
    model: PreTrainedModel = read_model(str(demo_model()), torch.float32)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.mul_(1 + 0.003 * torch.randn_like(parameter))
    adopt_model(model.bfloat16())
