"""Attention with norms of queries and keys and a gate for its output, as one function.

It is that of Qwen3.5: the first projection gives each head's query and gate side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from reft_runtime.base.linears import Merged
from reft_runtime.base.probe import ProbedLayer
from reft_runtime.kernels.operators import Operators

_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}


def gated_attention(
    module: nn.Module, asked: ProbedLayer, operators: Operators
) -> tuple[Callable[[Tensor, Tensor, Tensor, Any], Tensor], Merged] | None:
    """What maps rows [T, d], rotary cosines and sines [1, T, width] and the step to what the output
    projection gets, and the merged projections; None if the module has not the parts for it.

    Whether the module computes this must be tried.
    """
    parts: dict[str, Any] = dict(module.named_children())
    if parts.keys() != _PARTS:
        return None
    projections = tuple(parts[f"{name}_proj"] for name in "qkv")
    shape, scoring, heads = asked.shape, asked.scoring, asked.heads
    dim, kv_heads = shape.key_dim, shape.kv_heads
    widths = [2 * heads * dim, kv_heads * dim, kv_heads * dim]
    if shape.value_dim != dim or not Merged.possible(projections):
        return None
    if [projection.out_features for projection in projections] != widths:
        return None
    merged, query_norm, key_norm = Merged(projections), parts["q_norm"], parts["k_norm"]
    index: Any = module.layer_idx

    def compute(rows: Tensor, cos: Tensor, sin: Tensor, step: Any) -> Tensor:
        both, key, value = merged.product(rows).split_with_sizes(widths, 1)
        query, gate = both.view(len(rows), heads, 2, dim).unbind(2)
        key, value = (part.view(len(rows), kv_heads, dim) for part in (key, value))
        query = query_norm.forward(query.contiguous())
        key = key_norm.forward(key.contiguous())
        width = cos.shape[-1]
        turned = query[..., :width], key[..., :width]
        assert operators.rotates(*turned)  # where not, a trial fails, and the module is not fused
        operators.rotate_(*turned, cos, sin)
        mixed = step.attend(index, query, key, value, scoring)
        made: Tensor = (mixed * gate.sigmoid()).flatten(1)
        return made

    return compute, merged
