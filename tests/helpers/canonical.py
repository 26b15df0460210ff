"""The canonical form as its definition says it, for comparison with faster code."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from reft_runtime.interventions import CanonicalEdit


def apply(edit: CanonicalEdit, h: Tensor, strength: float = 1.0) -> Tensor:
    """The edited rows h [..., d], in their own dtype."""
    k, dtype = edit.learned, edit.dtype
    learned = linear(h.to(dtype), edit.V[:k].to(dtype), edit.b[:k].to(dtype))
    if edit.act is not None:
        learned = ACT2FN[edit.act](learned)
    x = h.float()
    change = torch.cat([learned.float(), linear(x, edit.V[k:], edit.b[k:])], dim=-1) @ edit.U
    if edit.gain is not None:
        change = change + edit.gain * x
    if edit.offset is not None:
        change = change + edit.offset
    return (x + strength * change).to(h.dtype)
