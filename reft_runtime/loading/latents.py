"""Lets layers with multi-head latent attention keep latents, where these are smaller."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from reft_runtime.base.attention import LayerShape
from reft_runtime.base.latent import EXPAND, Latent
from reft_runtime.base.probe import ProbedLayer
from reft_runtime.base.trial import TOLERANCE, near


def keep_latents(
    model: nn.Module, probed: SequenceOf[ProbedLayer]
) -> tuple[tuple[ProbedLayer, ...], frozenset[nn.Module]]:
    """Let the model's layers keep latents instead of keys and values, where these are smaller.

    Returns the layers as they ask from now on, and the linear layers that are not called any more.
    Nothing changes on a device: latents are wider than the heads that its kernels take.
    """
    if next(model.parameters()).device.type != "cpu":
        return tuple(probed), frozenset()
    layers = list(probed)
    unused: set[nn.Module] = set()
    module: Any
    for module in model.modules():
        if not _expands(module):
            continue
        index, latent = module.layer_idx, Latent(module)
        kept = latent.rank + module.qk_rope_head_dim
        shape = LayerShape(1, kept, latent.rank, values_in_keys=True)
        if shape.numbers < layers[index].shape.numbers:
            setattr(module, EXPAND, latent)
            layers[index] = replace(layers[index], shape=shape)
            unused.add(module.kv_b_proj)
    return tuple(layers), frozenset(unused)


def _expands(module: nn.Module) -> bool:
    """Whether a module makes its keys and values of latents, and a `Latent` can stand for that.

    The weight must be a plain one without bias and hooks.
    """
    linear: Any = getattr(module, "kv_b_proj", None)
    return (
        hasattr(type(module), EXPAND)
        and EXPAND not in vars(module)
        and type(linear) is nn.Linear
        and linear.bias is None
        and "forward" not in vars(linear)
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and linear.weight.dtype in TOLERANCE
        and _stands(module)
    )


def _stands(module: Any) -> bool:
    """Whether a `Latent` gives the products and the values of the module's own keys and values."""
    weight: Tensor = module.kv_b_proj.weight
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight)

    try:
        own = Latent(module)
        latent, rotated = random(1, 1, 3, own.rank), random(1, 1, 3, module.qk_rope_head_dim)
        keys, values = module.expand_kv(latent, rotated)
        query = random(*keys.shape)
        wanted = query @ keys.mT, values
        key, value = own(latent, rotated)
        mixed = value[0].transpose(0, 1).expand(-1, keys.shape[1], -1)
        found = own.absorbed(query) @ key.mT, own.values(mixed).transpose(0, 1)[None]
        return all(near(a, b) for a, b in zip(found, wanted, strict=True))
    except (AttributeError, RuntimeError, TypeError):
        return False  # a module with the same names that computes something else
