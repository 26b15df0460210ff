"""Puts fused operators in the place of a model's small ones, where they give the same.

Patterns of the Llama family, each tried on random rows before it is used, so that what has the
same names and computes something else keeps its own code. Modules stay where they are, with their
hooks: a layer with a hook anywhere inside it runs its own code, module by module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reft_runtime.engine.attention import ProbedLayer, ShapeProbe
from reft_runtime.engine.linears import Merged
from reft_runtime.engine.operators import Operators, ProductOperators, operators_for

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

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}
_ROWS = 3

Operator = Callable[..., Any]

Compute = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
"""From rows [T, d], the rotary cosines and sines [1, T, dim] and the step to rows [T, d]; of
attention to what its output projection gets."""


def fuse(
    model: PreTrainedModel, layers: SequenceOf[nn.Module], probed: SequenceOf[ProbedLayer]
) -> int:
    """Replace what can be; returns the number of modules changed (0 without a compiler).

    `layers` are the decoder layers, and `probed` is what their attention asks for. Linear layers
    must not be packed yet.
    """
    operators = operators_for(model.device)
    if operators is None or model.dtype not in _TOLERANCE:
        return 0
    fuser = _Fuser(operators, model.device)
    # Modules with another forward than their class's are somebody's already.
    changed = sum(
        fuser.norm(module) or fuser.mlp(module)
        for module in model.modules()
        if "forward" not in vars(module)
    )
    for layer, asked in zip(layers, probed, strict=True):
        attentions = [m for m in layer.modules() if "forward" not in vars(m) and _rotates(m)]
        changed += sum(fuser.attention(m, asked) or fuser.rotary(m) for m in attentions)
        if "forward" not in vars(layer):
            changed += fuser.layer(layer)
    return changed


class _Fuser:
    """Replaces forwards, and remembers what it made: a layer is put together from its parts."""

    def __init__(self, operators: Operators, device: torch.device) -> None:
        self._operators = operators
        self._device = device
        self._rotary: dict[Operator, Operator | None] = {}
        # Of modules: what they compute before their last product, and the layer that does that.
        self._mlps: dict[nn.Module, tuple[Callable[[Tensor], Tensor], Merged, nn.Linear]] = {}
        self._attentions: dict[nn.Module, tuple[Compute, nn.Linear]] = {}

    def norm(self, module: nn.Module) -> bool:
        if not type(module).__name__.endswith("RMSNorm") or list(module._parameters) != ["weight"]:
            return False
        own, weight, operators = module.forward, module.weight, self._operators
        epsilon = _epsilon(module)
        if not isinstance(weight, Tensor) or epsilon is None:
            return False

        def forward(hidden_states: Tensor) -> Any:
            if not operators.supports(hidden_states, weight):
                return own(hidden_states)
            return operators.rms_norm(hidden_states, weight, epsilon)

        return _replace(module, forward, (_random(weight.shape[-1], weight),), {})

    def mlp(self, module: nn.Module) -> bool:
        parts: dict[str, Any] = dict(module.named_children())
        if parts.keys() != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
            return False
        gate, up, down, act = (parts[n] for n in ("gate_proj", "up_proj", "down_proj", "act_fn"))
        if not Merged.possible((gate, up)):
            return False
        own, operators, merged = module.forward, self._operators, Merged((gate, up))
        inner = _hooks((gate, up, act))

        def compute(rows: Tensor) -> Any:
            return operators.silu_mul(merged.product(rows))

        def forward(hidden_states: Tensor) -> Any:
            if any(inner) or not operators.supports(hidden_states):
                return own(hidden_states)
            return down(compute(hidden_states))

        rows = _random(gate.in_features, gate.weight)
        if not _replace(module, forward, (rows,), {}):
            return False
        merged.merge()
        self._mlps[module] = compute, merged, down
        return True

    def attention(self, module: nn.Module, asked: ProbedLayer) -> bool:
        """Run an attention module's work as one function; it must be a plain one."""
        parts: dict[str, Any] = dict(module.named_children())
        if parts.keys() != {f"{p}_proj" for p in "qkvo"}:
            return False
        shape, scaling, window = asked.shape, asked.scaling, asked.window
        if not _PLAIN_ATTENTION.issuperset(type(module).forward.__code__.co_names):
            return False
        projections = tuple(parts[f"{p}_proj"] for p in "qkv")
        if shape.key_dim != shape.value_dim or not self._rotates_halves(module):
            return False
        if not Merged.possible(projections):
            return False
        o, operators = parts["o_proj"], self._operators
        merged, inner = Merged(projections), _hooks((*projections, o))
        index: Any = module.layer_idx
        width, kv_heads = shape.key_dim, shape.kv_heads
        heads = projections[0].out_features // width

        def compute(rows: Tensor, cos: Tensor, sin: Tensor, step: Any) -> Any:
            every = merged.product(rows).view(len(rows), -1, width)
            query, key, value = every.split_with_sizes((heads, kv_heads, kv_heads), 1)
            if getattr(step, "rotates", False):
                mixed = step.attend_rotated(index, query, key, value, (cos, sin), scaling, window)
            else:
                operators.rotate_(query, key, cos, sin)
                mixed = step.attend(index, query, key, value, scaling, window)
            return mixed.flatten(1)

        def whole(rows: Tensor, cos: Tensor, sin: Tensor, step: Any) -> Any:
            return o(compute(rows, cos, sin, step))

        guarded = _or_own(operators, whole, module.forward, inner, width)

        def forward(*args: Any, **kwargs: Any) -> Any:
            rows = guarded(*args, **kwargs)
            return rows if isinstance(rows, tuple) else (rows, None)

        weight = projections[0].weight
        rows = _random(projections[0].in_features, weight)
        given = {"position_embeddings": _angles(width, weight), "attention_mask": None}
        if not _replace(module, forward, (rows,), given, needs_step=True):
            return False
        merged.merge()
        self._attentions[module] = compute, o
        return True

    def rotary(self, module: nn.Module) -> bool:
        """Run an attention module's own code, its rotary function's name bound to ours."""
        if not self._rotates_halves(module):
            return False
        own = type(module).forward
        names = {**own.__globals__, _ROTARY: self._rotary[own.__globals__[_ROTARY]]}
        forward = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
        forward.__kwdefaults__ = own.__kwdefaults__
        module.forward = MethodType(forward, module)
        return True

    def _rotates_halves(self, module: nn.Module) -> bool:
        rotary = type(module).forward.__globals__[_ROTARY]
        if rotary not in self._rotary:
            self._rotary[rotary] = _rotate(rotary, self._operators, self._device)
        return self._rotary[rotary] is not None

    def layer(self, layer: nn.Module) -> bool:
        """Run a whole Llama-like layer as one function, calling no module but the linear ones."""
        parts: dict[str, Any] = dict(layer.named_children())
        norms = ("input_layernorm", "post_attention_layernorm")
        if parts.keys() != {*norms, "self_attn", "mlp"}:
            return False
        attention = self._attentions.get(parts["self_attn"])
        mlp = self._mlps.get(parts["mlp"])
        before, after = (parts[n] for n in norms)
        first_epsilon, second_epsilon = _epsilon(before), _epsilon(after)
        if attention is None or mlp is None or first_epsilon is None or second_epsilon is None:
            return False
        operators = self._operators
        inner = _hooks(module for module in layer.modules() if module is not layer)
        width = parts["self_attn"].head_dim
        (attend, o), (activate, gate_up, down) = attention, mlp

        def compute(rows: Tensor, cos: Tensor, sin: Tensor, step: Any) -> Tensor:
            normal = operators.rms_norm(rows, before.weight, first_epsilon)
            rows, normal = operators.add_rms_norm(
                rows, o(attend(normal, cos, sin, step)), after.weight, second_epsilon
            )
            rows += down(activate(normal))
            return rows

        joined = gate_up.weight
        products = operators if isinstance(operators, ProductOperators) else None
        if products is not None and joined is not None and _plain(o, down, *gate_up.parts):

            def compute_in_place(rows: Tensor, cos: Tensor, sin: Tensor, step: Any) -> Tensor:
                # A layer's input is nobody's but its own: what gave it is done.
                normal = products.rms_norm(rows, before.weight, first_epsilon)
                normal = products.add_product_and_norm(
                    rows, attend(normal, cos, sin, step), o.weight, after.weight, second_epsilon
                )
                return products.add_product_(
                    rows, products.gated_product(normal, joined), down.weight
                )

            compute = compute_in_place
        forward = _or_own(operators, compute, layer.forward, inner, width)
        given = {"position_embeddings": _angles(width, before.weight)}
        rows = _random(before.weight.shape[-1], before.weight)
        return _replace(layer, forward, (rows,), given, needs_step=True)


def _plain(*linears: nn.Linear) -> bool:
    """Whether products with these layers' weights are all that they do."""
    return all(type(linear) is nn.Linear and linear.bias is None for linear in linears)


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
        ):
            rotated: tuple[Tensor, Tensor] = rotary(q, k, cos, sin, *args, **kwargs)
            return rotated
        operators.rotate_(query, key, cos, sin)
        return q, k

    like = torch.empty(0, device=device)
    heads = [_random(n * 8, like).view(1, _ROWS, n, 8).transpose(1, 2) for n in (2, 1)]
    angles = _angles(8, like)
    wanted = rotary(*heads, *angles)
    given = rotate(*heads, *angles)
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


def _replace(
    module: nn.Module,
    forward: Operator,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Any],
    *,
    needs_step: bool = False,
) -> bool:
    """Give a module another forward, if it gives the same for these arguments."""

    def call(function: Operator) -> Tensor:
        step = {"step": ShapeProbe()} if needs_step else {}
        result = function(*(a.clone() for a in args), **kwargs, **step)
        rows: Tensor = result[0] if isinstance(result, tuple) else result
        return rows.float()

    wanted = call(module.forward)
    if not (call(forward) - wanted).norm() <= _TOLERANCE[args[0].dtype] * wanted.norm():
        return False
    module.forward = forward
    return True


def _epsilon(norm: nn.Module) -> float | None:
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return epsilon if isinstance(epsilon, float) else None


def _random(width: int, like: Tensor) -> Tensor:
    """The same numbers on any device, on the device and with the dtype of `like`."""
    return torch.randn(1, _ROWS, width, generator=torch.Generator().manual_seed(0)).to(like)


def _angles(width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    angles = _random(width // 2, like.float()).repeat(1, 1, 2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)
