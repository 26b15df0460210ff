"""Replaces a model's small operators by fused ones where they give the same.

The patterns are those of the Llama family. Each is tried on random rows before it is used
(`trial`), so that a module with the same names that computes something else keeps its own code.
Modules stay where they are, with their hooks: a layer with a hook anywhere inside it runs its own
code, module by module.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from reft_runtime.base.fused_layer import chain, is_llama_like, layer_plan
from reft_runtime.base.gated_attention import gated_attention
from reft_runtime.base.linears import Merged
from reft_runtime.base.plans import (
    Compute,
    Hooks,
    NormPlan,
    PartPlan,
    Plan,
    epsilon_of,
    hooks_of,
    or_own,
)
from reft_runtime.base.probe import ProbedLayer
from reft_runtime.base.rebinding import code_of, rebound
from reft_runtime.base.rotary import ROTARY, rotary_width, rotates, rotating
from reft_runtime.base.trial import TOLERANCE, Operator, Trials, random_rows
from reft_runtime.kernels.operators import NormForm, Operators, operators_for

_PLAIN_ATTENTION = {
    ROTARY,
    "shape",
    "head_dim",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "view",
    "transpose",
    "reshape",
    "contiguous",
    "config",
    "layer_idx",
    "update",
    "ALL_ATTENTION_FUNCTIONS",
    "get_interface",
    "_attn_implementation",
    "eager_attention_forward",
    "training",
    "attention_dropout",
    "scaling",
    "sliding_window",
    "getattr",
    "nn",
    "functional",
    "dropout",
    "residual_dropout",
}
"""Names that the code of a plain attention module uses; one with others does more."""


@dataclass(frozen=True, slots=True)
class Fused:
    """How many decoder layers run as one function, and how many others run fused in parts."""

    whole: int = 0
    in_parts: int = 0


def fuse(
    model: PreTrainedModel, layers: SequenceOf[nn.Module], probed: SequenceOf[ProbedLayer]
) -> Fused:
    """Replace what can be replaced, and return how much that was (nothing without a compiler).

    `layers` are the decoder layers, and `probed` is what their attention asks for. Linear layers
    must not be packed yet.
    """
    operators = operators_for(model.device)
    if operators is None or model.dtype not in TOLERANCE:
        return Fused()
    fuser = _Fuser(operators, model)
    for layer, asked in zip(layers, probed, strict=True):
        fuser.fuse(layer, asked)
    for module in model.modules():
        fuser.fuse_alone(module)
    fuser.chain(layers)
    return fuser.fused(layers)


class _Fuser:
    """Replaces forwards and keeps their plans, because a layer is put together from its parts."""

    def __init__(self, operators: Operators, model: PreTrainedModel) -> None:
        self._operators = operators
        self._model = model
        self._width: int = model.config.hidden_size
        self._trials = Trials()
        self._rotary: dict[Operator, Operator | None] = {}
        self._plans: dict[nn.Module, Plan] = {}

    def chain(self, layers: SequenceOf[nn.Module]) -> None:
        """Let these layers, in the model's order, be computed by one call where they can."""
        chain(self._plans.get(layer) for layer in layers)

    def fused(self, layers: SequenceOf[nn.Module]) -> Fused:
        """How many of these layers were replaced, whole or in parts."""
        whole = [layer for layer in layers if layer in self._plans]
        changed = [one for one in layers if not self._plans.keys().isdisjoint(one.modules())]
        return Fused(len(whole), len(changed) - len(whole))

    def fuse(self, layer: nn.Module, asked: ProbedLayer) -> None:
        """Replace a decoder layer, and the modules in it, as far as that is possible."""
        head, kind = rotary_width(self._model, asked.shape.key_dim), ("layer", asked)
        # The copy is tried before the layer's parts are replaced, to show the layer's formula.
        whole = "forward" not in vars(layer) and self._trials.holds(
            layer, partial(self._layer, asked=asked, plans=None), kind, head, adds=True
        )
        for module in layer.modules():
            if module is layer or self.fuse_alone(module) or not rotates(module):
                continue
            for build in (self._attention, self._gated_attention, self._rotation):
                if self._try(module, partial(build, asked=asked), (build.__name__, asked), head):
                    break
        plan = self._layer(layer, asked, self._plans) if whole else None
        if plan is not None and self._trials.same(layer, plan.forward, plan.width, head, adds=True):
            self._install(layer, plan)

    def fuse_alone(self, module: nn.Module) -> bool:
        """Replace a module that needs no step; return whether it is replaced."""
        return self._try(module, self._norm, "norm") or self._try(module, self._mlp, "mlp")

    def _try(
        self,
        module: nn.Module,
        build: Callable[[Any], Plan | None],
        kind: Hashable,
        head: int | None = None,
    ) -> bool:
        # A module with another forward than its class's has been changed already.
        if "forward" in vars(module):
            return module in self._plans
        plan = build(module)
        if plan is None or not self._trials.holds(module, build, kind, head):
            return False
        if not self._trials.same(module, plan.forward, plan.width, head):
            return False
        self._install(module, plan)
        return True

    def _install(self, module: nn.Module, plan: Plan) -> None:
        module.forward = plan.forward
        if isinstance(plan, PartPlan):
            plan.merged.merge()
        self._plans[module] = plan

    def _norm(self, module: Any) -> NormPlan | None:
        if not type(module).__name__.endswith("RMSNorm") or list(module._parameters) != ["weight"]:
            return None
        own, weight, operators = module.forward, module.weight, self._operators
        epsilon = epsilon_of(module)
        if not isinstance(weight, Tensor) or epsilon is None:
            return None
        form = _norm_form(own, weight, epsilon, operators)
        if form is None:
            return None

        def forward(hidden_states: Tensor) -> Any:
            if hidden_states.ndim == 4 and hidden_states.stride(1) > hidden_states.stride(2):
                hidden_states = hidden_states.contiguous()  # heads that are columns of a product
            if not operators.supports(hidden_states, weight):
                return own(hidden_states)
            return operators.rms_norm(hidden_states, weight, epsilon, form)

        return NormPlan(forward, weight.shape[-1], weight, epsilon, form)

    def _mlp(self, module: Any) -> PartPlan | None:
        parts: dict[str, Any] = dict(module.named_children())
        if parts.keys() != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
            return None
        gate, up, down, act = (parts[n] for n in ("gate_proj", "up_proj", "down_proj", "act_fn"))
        if not Merged.possible((gate, up)):
            return None
        own, operators, merged = module.forward, self._operators, Merged((gate, up))
        inner = hooks_of((gate, up, act))

        def compute(rows: Tensor) -> Any:
            return operators.silu_mul(merged.product(rows))

        def forward(hidden_states: Tensor) -> Any:
            if any(inner) or not operators.supports(hidden_states):
                return own(hidden_states)
            return down(compute(hidden_states))

        return PartPlan(forward, gate.in_features, compute, merged, down)

    def _attention(self, module: Any, asked: ProbedLayer) -> PartPlan | None:
        """Run an attention module's work as one function; it must be a plain one."""
        parts: dict[str, Any] = dict(module.named_children())
        if parts.keys() != {f"{p}_proj" for p in "qkvo"}:
            return None
        shape, scoring = asked.shape, asked.scoring
        own = code_of(type(module).forward)
        if own is None or not _PLAIN_ATTENTION.issuperset(own.__code__.co_names):
            return None
        projections = tuple(parts[f"{p}_proj"] for p in "qkv")
        if shape.key_dim != shape.value_dim or not self._rotates_halves(module):
            return None
        if rotary_width(self._model, shape.key_dim) != shape.key_dim:
            return None  # a step rotates whole heads
        if not Merged.possible(projections):
            return None
        o, operators = parts["o_proj"], self._operators
        merged, inner = Merged(projections), hooks_of((*projections, o))
        index: Any = module.layer_idx
        width, kv_heads = shape.key_dim, shape.kv_heads
        heads = projections[0].out_features // width

        def compute(rows: Tensor, cos: Tensor, sin: Tensor, step: Any) -> Any:
            every = merged.product(rows).view(len(rows), -1, width)
            query, key, value = every.split_with_sizes((heads, kv_heads, kv_heads), 1)
            if getattr(step, "rotates", False):
                mixed = step.attend_rotated(index, query, key, value, (cos, sin), scoring)
            else:
                operators.rotate_(query, key, cos, sin)
                mixed = step.attend(index, query, key, value, scoring)
            return mixed.flatten(1)

        forward = self._attending(module, compute, o, inner, width)
        return PartPlan(forward, projections[0].in_features, compute, merged, o)

    def _gated_attention(self, module: Any, asked: ProbedLayer) -> PartPlan | None:
        """Run an attention module with norms and a gate as one function, if it is one."""
        made = gated_attention(module, asked, self._operators)
        if made is None or not self._rotates_halves(module):
            return None
        compute, merged = made
        inner = hooks_of(one for one in module.modules() if one is not module)
        width = rotary_width(self._model, asked.shape.key_dim)
        forward = self._attending(module, compute, module.o_proj, inner, width)
        return PartPlan(forward, merged.parts[0].in_features, compute, merged, module.o_proj)

    def _attending(
        self, module: Any, compute: Compute, last: nn.Module, inner: Hooks, width: int
    ) -> Operator:
        """A forward for an attention module that rotates `width` numbers of its heads."""

        def whole(rows: Tensor, cos: Tensor, sin: Tensor, step: Any) -> Any:
            return last(compute(rows, cos, sin, step))

        guarded = or_own(self._operators, whole, module.forward, inner, width)

        def forward(*args: Any, **kwargs: Any) -> Any:
            rows = guarded(*args, **kwargs)
            return rows if isinstance(rows, tuple) else (rows, None)

        return forward

    def _rotation(self, module: Any, asked: ProbedLayer) -> Plan | None:
        """Run an attention module's own code, its rotary function's name bound to ours."""
        own = code_of(type(module).forward)
        if own is None or not self._rotates_halves(module):
            return None
        names = {ROTARY: self._rotary[own.__globals__[ROTARY]]}
        return Plan(rebound(own, module, names), self._width)

    def _rotates_halves(self, module: nn.Module) -> bool:
        own = code_of(type(module).forward)
        if own is None:
            return False
        rotary = own.__globals__[ROTARY]
        if rotary not in self._rotary:
            self._rotary[rotary] = rotating(rotary, self._operators, self._model.device)
        return self._rotary[rotary] is not None

    def _layer(
        self, layer: Any, asked: ProbedLayer, plans: Mapping[nn.Module, Plan] | None
    ) -> Plan | None:
        """Run a whole Llama-like layer as one function, calling no module but the linear ones.

        `plans` are the finished plans of the layer's parts; without them, new ones are made and
        merged.
        """
        if not is_llama_like(layer):
            return None
        if plans is None:
            plans = self._parts(layer, asked)
        return layer_plan(layer, plans, asked, self._operators)

    def _parts(self, layer: Any, asked: ProbedLayer) -> dict[nn.Module, Plan]:
        """Make and merge the plans of a copied layer's parts."""
        attention = layer.self_attn
        made: dict[nn.Module, Plan | None] = {
            norm: self._norm(norm)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        }
        made[attention] = self._attention(attention, asked) if rotates(attention) else None
        made[layer.mlp] = self._mlp(layer.mlp)
        plans = {module: plan for module, plan in made.items() if plan is not None}
        for plan in plans.values():
            if isinstance(plan, PartPlan):
                plan.merged.merge()
        return plans


def _norm_form(
    own: Operator, weight: Tensor, epsilon: float, operators: Operators
) -> NormForm | None:
    """The form that gives what is nearest to a norm's `own`; None where that cannot be tried."""
    rows = random_rows(weight.shape[-1], weight)
    if not operators.supports(rows, weight):
        return None
    try:
        wanted = own(rows).float()
    except Exception:
        return None  # it wants other arguments, so it is not a norm that is known

    def distance(form: NormForm) -> float:
        return float((operators.rms_norm(rows, weight, epsilon, form).float() - wanted).norm())

    # In float32 nothing is rounded, so that OLMo 2's form is Llama's.
    rounded = weight.dtype.itemsize < 4
    return min((form for form in NormForm if rounded or form is not NormForm.OLMO2), key=distance)
