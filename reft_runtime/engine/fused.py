"""Puts fused operators in the place of a model's small ones, where they give the same.

Three patterns of the Llama family, each tried on random rows before it is used, so that what has
the same names and computes something else keeps its own code: RMSNorm, the gated SiLU of an MLP,
and rotary positions. Modules stay where they are, with their hooks; nothing is traced or copied.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reft_runtime.engine.native import Kernels, kernels, supports

_ROTARY = "apply_rotary_pos_emb"
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

Operator = Callable[..., Any]


@torch.inference_mode()
def fuse(model: PreTrainedModel) -> int:
    """Replace what can be; returns the number of modules changed (0 without a compiler)."""
    if model.dtype not in _TOLERANCE or model.device.type != "cpu":
        return 0
    operators = kernels()
    if operators is None:
        return 0
    rotating: dict[Operator, Operator | None] = {}
    return sum(
        _fuse_norm(module, operators)
        or _fuse_mlp(module, operators)
        or _fuse_rotary(module, operators, rotating)
        for module in model.modules()
    )


def _fuse_norm(module: nn.Module, operators: Kernels) -> bool:
    if not type(module).__name__.endswith("RMSNorm") or list(module._parameters) != ["weight"]:
        return False
    own, weight = module.forward, module.weight
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or not isinstance(epsilon, float):
        return False

    def forward(hidden_states: Tensor) -> Any:
        if not supports(hidden_states, weight):
            return own(hidden_states)
        return operators.rms_norm(hidden_states, weight, epsilon)

    return _replace(module, forward, weight.shape[-1], weight.dtype)


def _fuse_mlp(module: nn.Module, operators: Kernels) -> bool:
    parts = dict(module.named_children())
    if parts.keys() != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    gate, up, down, act = (parts[n] for n in ("gate_proj", "up_proj", "down_proj", "act_fn"))
    if type(act).__name__ not in ("SiLU", "SiLUActivation") or type(gate) is not nn.Linear:
        return False
    own = module.forward

    def forward(hidden_states: Tensor) -> Any:
        if act._forward_hooks or act._forward_pre_hooks:  # somebody edits the activation
            return own(hidden_states)
        gated, upper = gate(hidden_states), up(hidden_states)
        if not supports(gated, upper):
            return own(hidden_states)
        return down(operators.silu_mul_(gated, upper))

    return _replace(module, forward, gate.in_features, next(down.parameters()).dtype)


def _fuse_rotary(
    module: nn.Module, operators: Kernels, known: dict[Operator, Operator | None]
) -> bool:
    """Run an attention module's own code, with the name of its rotary function bound to ours."""
    own = type(module).forward
    if not isinstance(own, FunctionType) or _ROTARY not in own.__code__.co_names:
        return False
    rotary = own.__globals__.get(_ROTARY)
    if rotary is None:
        return False
    if rotary not in known:
        known[rotary] = _rotate(rotary, operators)
    fused = known[rotary]
    if fused is None:
        return False
    forward = FunctionType(
        own.__code__,
        {**own.__globals__, _ROTARY: fused},
        own.__name__,
        own.__defaults__,
        own.__closure__,
    )
    forward.__kwdefaults__ = own.__kwdefaults__
    module.forward = MethodType(forward, module)  # type: ignore[method-assign]
    return True


def _rotate(rotary: Operator, operators: Kernels) -> Operator | None:
    """A function like `rotary` that works in place; None if it does not give the same."""

    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        # The heads are as a linear layer gave them, [1, T, heads, dim], and nobody else's.
        query, key = q.transpose(1, 2), k.transpose(1, 2)
        whole = cos.shape[-1] == q.shape[-1] == k.shape[-1] and len(q) == len(cos) == 1
        if args or kwargs or not whole or not supports(query, key, cos, sin):
            rotated: tuple[Tensor, Tensor] = rotary(q, k, cos, sin, *args, **kwargs)
            return rotated
        operators.rotate_(query[0], key[0], cos, sin)
        return q, k

    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(1, 3, n, 8, generator=generator).transpose(1, 2) for n in (2, 1)]
    angles = torch.randn(1, 3, 4, generator=generator).repeat(1, 1, 2)
    try:
        wanted = rotary(*heads, angles.cos(), angles.sin())
        given = rotate(*(h.transpose(1, 2).clone().transpose(1, 2) for h in heads), angles.cos(), angles.sin())
    except Exception:
        return None
    same = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(wanted, given, strict=True))
    return rotate if same else None


def _replace(module: nn.Module, forward: Operator, width: int, dtype: torch.dtype) -> bool:
    """Give a module of rows [..., width] another forward, if it gives the same."""
    rows = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    try:
        wanted = module.forward(rows).float()
    except Exception:
        return False
    error = (forward(rows).float() - wanted).norm() / wanted.norm()
    if not error < _TOLERANCE[dtype]:
        return False
    module.forward = forward  # type: ignore[method-assign]
    return True
