"""Puts fused operators in the place of a model's small ones, where they give the same.

Patterns of the Llama family, each tried on random rows before it is used (`trial`), so that what
has the same names and computes something else keeps its own code. Modules stay where they are,
with their hooks: a layer with a hook anywhere inside it runs its own code, module by module.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reft_runtime.engine.attention import ProbedLayer
from reft_runtime.engine.linears import Merged
from reft_runtime.engine.operators import Operators, operators_for
from reft_runtime.engine.trial import ROWS, TOLERANCE, Operator, Trials, angles, random_rows

_ROTARY = "apply_rotary_pos_emb"
_PLAIN_ATTENTION = {
    _ROTARY,
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
"""Names that the code of an attention module may use: one with more does more."""

Compute = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
"""From rows [T, d], the rotary cosines and sines [1, T, dim] and the step to rows [T, d]."""


def fuse(
    model: PreTrainedModel, layers: SequenceOf[nn.Module], probed: SequenceOf[ProbedLayer]
) -> int:
    """Replace what can be; returns the number of modules changed (0 without a compiler).

    `layers` are the decoder layers, and `probed` is what their attention asks for. Linear layers
    must not be packed yet.
    """
    operators = operators_for(model.device)
    if operators is None or model.dtype not in TOLERANCE:
        return 0
    fuser = _Fuser(operators, model)
    for layer, asked in zip(layers, probed, strict=True):
        fuser.decide(layer, asked)
    for module in model.modules():
        fuser.decide_alone(module)
    return fuser.install()


@dataclass(frozen=True, slots=True)
class _Plan:
    """A module's other forward, and the width of the rows that it takes.

    `compute` is what of it a whole layer uses, and `merged` the linear layers that it merges.
    """

    forward: Operator
    width: int
    compute: Operator | None = None
    merged: Merged | None = None


class _Fuser:
    """Decides module by module, and replaces nothing until all is decided.

    A trial runs modules' own code, down to the linear layers.
    """

    def __init__(self, operators: Operators, model: PreTrainedModel) -> None:
        self._operators = operators
        self._device = model.device
        self._width: int = model.config.hidden_size
        self._trials = Trials()
        self._rotary: dict[Operator, Operator | None] = {}
        self._decided: dict[nn.Module, _Plan] = {}

    def decide(self, layer: nn.Module, asked: ProbedLayer) -> None:
        """Decide about a decoder layer and the modules in it."""
        head = asked.shape.key_dim
        for module in layer.modules():
            if module is layer or self.decide_alone(module) or not _rotates(module):
                continue
            for build in (self._attention, self._rotation):
                if self._try(module, partial(build, asked=asked), head, (build.__name__, asked)):
                    break
        build_layer = partial(self._layer, asked=asked, plans={})
        if self._try(layer, build_layer, head, ("layer", asked), adds=True):
            # Its parts are those that are replaced themselves, and merged once.
            plan = self._layer(layer, asked, self._decided)
            assert plan is not None
            self._decided[layer] = plan

    def decide_alone(self, module: nn.Module) -> bool:
        """Decide about a module that needs no step; whether it is replaced."""
        return self._try(module, self._norm) or self._try(module, self._mlp)

    def install(self) -> int:
        """Replace what was decided; returns how many modules that are."""
        for module, plan in self._decided.items():
            module.forward = plan.forward
            if plan.merged is not None:
                plan.merged.merge()
        return len(self._decided)

    def _try(
        self,
        module: nn.Module,
        build: Callable[[Any], _Plan | None],
        head: int | None = None,
        kind: Hashable = None,
        *,
        adds: bool = False,
    ) -> bool:
        # Modules with another forward than their class's are somebody's already.
        if module in self._decided or "forward" in vars(module):
            return module in self._decided
        plan = build(module)
        if plan is None:
            return False

        def forward(one: Any) -> Operator | None:
            made = build(one)
            return None if made is None else made.forward

        fits = self._trials.fits(
            module, forward, plan.width, kind=kind or build, head=head, adds=adds
        )
        if fits:
            self._decided[module] = plan
        return fits

    def _norm(self, module: Any) -> _Plan | None:
        if not type(module).__name__.endswith("RMSNorm") or list(module._parameters) != ["weight"]:
            return None
        own, weight, operators = module.forward, module.weight, self._operators
        epsilon = _epsilon(module)
        if not isinstance(weight, Tensor) or epsilon is None:
            return None

        def forward(hidden_states: Tensor) -> Any:
            if not operators.supports(hidden_states, weight):
                return own(hidden_states)
            return operators.rms_norm(hidden_states, weight, epsilon)

        return _Plan(forward, weight.shape[-1])

    def _mlp(self, module: Any) -> _Plan | None:
        parts: dict[str, Any] = dict(module.named_children())
        if parts.keys() != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
            return None
        gate, up, down, act = (parts[n] for n in ("gate_proj", "up_proj", "down_proj", "act_fn"))
        if not Merged.possible((gate, up)):
            return None
        own, operators, merged = module.forward, self._operators, Merged((gate, up))
        inner = _hooks((gate, up, act))

        def compute(rows: Tensor) -> Any:
            return down(operators.silu_mul(merged.product(rows)))

        def forward(hidden_states: Tensor) -> Any:
            if any(inner) or not operators.supports(hidden_states):
                return own(hidden_states)
            return compute(hidden_states)

        return _Plan(forward, gate.in_features, compute, merged)

    def _attention(self, module: Any, asked: ProbedLayer) -> _Plan | None:
        """Run an attention module's work as one function; it must be a plain one."""
        parts: dict[str, Any] = dict(module.named_children())
        if parts.keys() != {f"{p}_proj" for p in "qkvo"}:
            return None
        shape, scaling, window = asked.shape, asked.scaling, asked.window
        if not _PLAIN_ATTENTION.issuperset(type(module).forward.__code__.co_names):
            return None
        projections = tuple(parts[f"{p}_proj"] for p in "qkv")
        if shape.key_dim != shape.value_dim or not self._rotates_halves(module):
            return None
        if not Merged.possible(projections):
            return None
        o, operators = parts["o_proj"], self._operators
        merged, inner = Merged(projections), _hooks((*projections, o))
        index: Any = module.layer_idx
        width, kv_heads = shape.key_dim, shape.kv_heads
        heads = projections[0].out_features // width

        def compute(rows: Tensor, cos: Tensor, sin: Tensor, step: Any) -> Any:
            every = merged.product(rows).view(len(rows), -1, width)
            query, key, value = every.split_with_sizes((heads, kv_heads, kv_heads), 1)
            operators.rotate_(query, key, cos, sin)
            return o(step.attend(index, query, key, value, scaling, window).flatten(1))

        guarded = _or_own(operators, compute, module.forward, inner, width)

        def forward(*args: Any, **kwargs: Any) -> Any:
            rows = guarded(*args, **kwargs)
            return rows if isinstance(rows, tuple) else (rows, None)

        return _Plan(forward, projections[0].in_features, compute, merged)

    def _rotation(self, module: Any, asked: ProbedLayer) -> _Plan | None:
        """Run an attention module's own code, its rotary function's name bound to ours."""
        if not self._rotates_halves(module):
            return None
        own = type(module).forward
        names = {**own.__globals__, _ROTARY: self._rotary[own.__globals__[_ROTARY]]}
        forward = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
        forward.__kwdefaults__ = own.__kwdefaults__
        return _Plan(MethodType(forward, module), self._width)

    def _rotates_halves(self, module: nn.Module) -> bool:
        rotary = type(module).forward.__globals__[_ROTARY]
        if rotary not in self._rotary:
            self._rotary[rotary] = _rotate(rotary, self._operators, self._device)
        return self._rotary[rotary] is not None

    def _layer(
        self, layer: Any, asked: ProbedLayer, plans: Mapping[nn.Module, _Plan]
    ) -> _Plan | None:
        """Run a whole Llama-like layer as one function, calling no module but the linear ones.

        `plans` are those of its parts, where they are made already.
        """
        parts: dict[str, Any] = dict(layer.named_children())
        norms = ("input_layernorm", "post_attention_layernorm")
        if parts.keys() != {*norms, "self_attn", "mlp"} or not _rotates(parts["self_attn"]):
            return None
        attending = plans.get(parts["self_attn"]) or self._attention(parts["self_attn"], asked)
        widening = plans.get(parts["mlp"]) or self._mlp(parts["mlp"])
        attention = None if attending is None else attending.compute
        mlp = None if widening is None else widening.compute
        before, after = (parts[n] for n in norms)
        first_epsilon, second_epsilon = _epsilon(before), _epsilon(after)
        one_dtype = len({weight.dtype for weight in layer.parameters()}) == 1
        if attention is None or mlp is None or not one_dtype:
            return None
        if first_epsilon is None or second_epsilon is None:
            return None
        operators = self._operators
        inner = _hooks(module for module in layer.modules() if module is not layer)

        def compute(rows: Tensor, cos: Tensor, sin: Tensor, step: Any) -> Tensor:
            normal = operators.rms_norm(rows, before.weight, first_epsilon)
            rows, normal = operators.add_rms_norm(
                rows, attention(normal, cos, sin, step), after.weight, second_epsilon
            )
            rows += mlp(normal)
            return rows

        forward = _or_own(operators, compute, layer.forward, inner, asked.shape.key_dim)
        return _Plan(forward, self._width)


def _rotates(module: nn.Module) -> bool:
    own = type(module).forward
    return isinstance(own, FunctionType) and _ROTARY in own.__code__.co_names


def _rotate(rotary: Operator, operators: Operators, device: torch.device) -> Operator | None:
    """A function like `rotary` that works in place; None if it does not give the same."""

    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        # As a linear layer gave them, [1, T, heads, dim], they are nobody else's.
        query, key = q.transpose(1, 2)[0], k.transpose(1, 2)[0]
        whole = cos.shape[-1] == q.shape[-1] == k.shape[-1] and len(q) == len(cos) == 1
        if (
            args
            or kwargs
            or not whole
            or not operators.packs(query, key)
            or not operators.supports(cos, sin)
            or cos.dtype != q.dtype  # what a model computes in a wider dtype stays its own
        ):
            rotated: tuple[Tensor, Tensor] = rotary(q, k, cos, sin, *args, **kwargs)
            return rotated
        operators.rotate_(query, key, cos, sin)
        return q, k

    like = torch.empty(0, device=device)
    heads = [random_rows(n * 8, like).view(1, ROWS, n, 8).transpose(1, 2) for n in (2, 1)]
    wanted = rotary(*heads, *angles(8, like))
    given = rotate(*heads, *angles(8, like))
    same = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(wanted, given, strict=True))
    return rotate if same else None


def _or_own(
    operators: Operators,
    compute: Compute,
    own: Operator,
    inner: SequenceOf[dict[int, Any]],
    width: int,
) -> Operator:
    """A forward that computes the rows of a plain step, and runs a module's `own` for all else.

    Not plain is what has hooks `inner`, or rotates less than the `width` of its heads.
    """

    def forward(
        hidden_states: Tensor,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor],
        step: Any = None,
        **kwargs: Any,
    ) -> Any:
        cos, sin = position_embeddings
        plain = step is not None and cos.shape[-1] == width and not any(inner)
        if plain and operators.supports(hidden_states, cos, sin):
            return compute(hidden_states[0], cos, sin, step)[None]
        kwargs |= {} if step is None else {"step": step}
        return own(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)

    return forward


def _hooks(modules: Iterable[nn.Module]) -> list[dict[int, Any]]:
    """The modules' hooks, to be looked at in every step: any of these is not empty."""
    return [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]


def _epsilon(norm: nn.Module) -> float | None:
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return epsilon if isinstance(epsilon, float) else None
