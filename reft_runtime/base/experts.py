"""Experts of a mixture with packed weights: each expert's products as those of linear layers.

transformers keeps the weights of all experts of a layer in one tensor, whose products on a CPU take
1.2 to 2.2 times as long as those with packed weights (`linears`). Modules are replaced that
transformers can compute by several implementations, since their attributes say what they compute.
Each is compared with its own code before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reft_runtime.base.linears import Product, packable, product_of
from reft_runtime.base.trial import near

ROWS = 5

_FORMULA = ("has_gate", "has_bias", "is_transposed")
"""Attributes that transformers' decorator for experts sets."""

_OTHERWISE = ("has_post_expert_norm", "_is_expert_parallel")
"""Attributes of newer releases, which say that it is computed otherwise."""


def pack_experts(model: nn.Module) -> int:
    """Pack the weights of all experts on a CPU; returns how many modules of experts that were."""
    return sum(_pack(module) for module in model.modules())


def plain_experts(module: nn.Module, name: str) -> Tensor | None:
    """The weight of all experts that a module had before it was packed; None if it is not one."""
    forward = vars(module).get("forward")
    if not isinstance(forward, partial) or forward.func is not _mix or name not in forward.args[0]:
        return None
    weights: list[Tensor] = forward.args[0][name]
    plain = torch.stack([weight.to_dense() for weight in weights])
    return plain.transpose(1, 2).contiguous() if forward.keywords["transposed"] else plain


def _pack(module: Any) -> bool:
    if not all(hasattr(module, name) for name in _FORMULA) or "forward" in vars(module):
        return False
    if any(getattr(module, name, False) for name in _OTHERWISE):
        return False
    first, last = "gate_up_proj" if module.has_gate else "up_proj", "down_proj"
    if not all(packable(getattr(module, name)) for name in (first, last)):
        return False
    products, packed = {}, {}
    for name in (first, last):
        made = [product_of(*each) for each in _of_experts(module, name)]
        products[name] = [product for product, _ in made]
        packed[name] = [weight for _, weight in made]
    forward = partial(
        _mix,
        packed,
        products[first],
        module._apply_gate if module.has_gate else module.act_fn,
        products[last],
        transposed=module.is_transposed,
    )
    if not _same(module, forward, len(packed[first])):
        return False
    module.forward = forward
    for name in (first, last):
        setattr(module, name, nn.Parameter(getattr(module, name).new_empty(0), False))
    return True


def _of_experts(module: Any, name: str) -> list[tuple[Tensor, Tensor | None]]:
    """Weight [out, in] and bias [out] of each expert."""
    weights = getattr(module, name).detach()
    if module.is_transposed:
        weights = weights.transpose(1, 2)
    biases = getattr(module, f"{name}_bias").detach() if module.has_bias else [None] * len(weights)
    return [(weight.contiguous(), bias) for weight, bias in zip(weights, biases, strict=True)]


def _mix(
    packed: dict[str, list[Tensor]],
    first: list[Product],
    activate: Callable[[Tensor], Tensor],
    last: list[Product],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    transposed: bool,
) -> Tensor:
    """What experts make of rows [T, d]: the sum of those that `top_k_index` [T, k] names.

    Rows are put in the order of their experts, so that each expert computes one product.
    """
    per_row = top_k_index.shape[-1]
    experts, order = top_k_index.flatten().sort()
    counts = torch.bincount(experts, minlength=len(first))[: len(first)].tolist()
    rows = hidden_states[order // per_row]
    parts, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            mine = rows[start : start + count]
            parts.append(last[expert](activate(first[expert](mine))))
            start += count
    shares = top_k_weights.flatten()[:, None]
    made = hidden_states.new_zeros(len(order), hidden_states.shape[-1], dtype=shares.dtype)
    if parts:
        mine = order[:start]
        made[mine] = torch.cat(parts) * shares[mine]
    return made.view(len(hidden_states), per_row, -1).sum(1).to(hidden_states.dtype)


def _same(module: Any, forward: Callable[..., Tensor], count: int) -> bool:
    """Whether `forward` gives what the module gives for random rows that reach many experts."""
    weight = module.down_proj
    width = weight.shape[2] if module.is_transposed else weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    per_row = min(2, count)
    rows = torch.randn(ROWS, width, generator=generator).to(weight.dtype)
    index = torch.rand(ROWS, count, generator=generator).topk(per_row).indices
    shares = torch.rand(ROWS, per_row, generator=generator).to(weight.dtype)
    try:
        wanted, found = module.forward(rows, index, shares), forward(rows, index, shares)
    except Exception:
        return False  # it takes other arguments
    return near(found, wanted)
