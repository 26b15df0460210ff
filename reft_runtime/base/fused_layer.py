"""A decoder layer of the Llama family as one function of its rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from reft_runtime.base.compiled_layer import CompiledLayer, layer_of_weights
from reft_runtime.base.plans import Compute, NormPlan, PartPlan, Plan, hooks_of, or_own
from reft_runtime.base.probe import ProbedLayer
from reft_runtime.kernels.cpu import Kernels
from reft_runtime.kernels.operators import (
    DecoderLayer,
    Norm,
    NormForm,
    Operators,
    ProductOperators,
)

_PARTS = {"input_layernorm", "post_attention_layernorm", "self_attn", "mlp"}


@dataclass(frozen=True, slots=True)
class LayerPlan(Plan):
    """The plan of a decoder layer, and what it is `compiled` to, if it is."""

    compiled: CompiledLayer | None


def is_llama_like(layer: nn.Module) -> bool:
    """Whether it has the parts of a Llama layer, all of one dtype."""
    parts = dict(layer.named_children())
    return parts.keys() == _PARTS and len({weight.dtype for weight in layer.parameters()}) == 1


def layer_plan(
    layer: Any, plans: Mapping[nn.Module, Plan], asked: ProbedLayer, operators: Operators
) -> LayerPlan | None:
    """The plan of a layer that `is_llama_like`, made of the `plans` of its parts.

    None if one of them has none, or a norm is not of Llama's form.
    """
    before, after = plans.get(layer.input_layernorm), plans.get(layer.post_attention_layernorm)
    attention, mlp = plans.get(layer.self_attn), plans.get(layer.mlp)
    if not (isinstance(before, NormPlan) and isinstance(after, NormPlan)):
        return None
    if not (isinstance(attention, PartPlan) and isinstance(mlp, PartPlan)):
        return None
    if not (before.form is after.form is NormForm.LLAMA):
        return None
    attend, o, activate, down = attention.compute, attention.last, mlp.compute, mlp.last

    def compute(rows: Tensor, cos: Tensor, sin: Tensor, step: Any) -> Tensor:
        normal = operators.rms_norm(rows, before.weight, before.epsilon)
        rows, normal = operators.add_rms_norm(
            rows, o(attend(normal, cos, sin, step)), after.weight, after.epsilon
        )
        rows += down(activate(normal))
        return rows

    inner = hooks_of(module for module in layer.modules() if module is not layer)
    compiled: CompiledLayer | None = None
    chosen: Compute = compute
    if isinstance(operators, Kernels):

        def make() -> DecoderLayer | None:
            norms = Norm(before.weight, before.epsilon), Norm(after.weight, after.epsilon)
            heads = asked.shape.kv_heads, asked.shape.key_dim
            return layer_of_weights(
                operators, norms, attention.merged, o, mlp.merged, down, heads, asked.scoring
            )

        made_of = CompiledLayer(layer, layer.self_attn.layer_idx, inner, make)

        def compute_at_once(rows: Tensor, cos: Tensor, sin: Tensor, step: Any) -> Tensor:
            made = made_of.compute(rows, cos, sin, step)
            return compute(rows, cos, sin, step) if made is None else made

        chosen, compiled = compute_at_once, made_of
    joined = mlp.merged.weight
    products = operators if isinstance(operators, ProductOperators) else None
    if products is not None and joined is not None and _plain(o, down, *mlp.merged.parts):

        def compute_in_place(rows: Tensor, cos: Tensor, sin: Tensor, step: Any) -> Tensor:
            # No other code uses the layer's input any more, so it may be overwritten.
            normal = products.rms_norm(rows, before.weight, before.epsilon)
            normal = products.add_product_and_norm(
                rows, attend(normal, cos, sin, step), o.weight, after.weight, after.epsilon
            )
            return products.add_product_(rows, products.gated_product(normal, joined), down.weight)

        chosen = compute_in_place
    width = asked.shape.key_dim
    forward = or_own(operators, chosen, layer.forward, inner, width)
    return LayerPlan(forward, attention.width, compiled)


def chain(plans: Iterable[Plan | None]) -> None:
    """Let each compiled layer know its place; `plans` are those of a model's layers, in order."""
    known = [plan if isinstance(plan, LayerPlan) else None for plan in plans]
    for plan, after in pairwise([*known, None]):
        if plan is not None and plan.compiled is not None:
            plan.compiled.place(plan.forward, None if after is None else after.compiled)


def _plain(*linears: nn.Linear) -> bool:
    """Whether the products with their weights are all that these linear layers compute."""
    return all(type(linear) is nn.Linear and linear.bias is None for linear in linears)
