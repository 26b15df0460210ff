"""Puts fused operators in the place of a model's small ones, where they give the same.

Patterns of the Llama family, each tried on random rows before it is used, so that what has the
same names and computes something else keeps its own code. Modules stay where they are, with their
hooks: a layer with a hook anywhere inside it runs its own code, module by module.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from reft_runtime.engine.attention import ProbedLayer, ShapeProbe
from reft_runtime.engine.native import Kernels, kernels, supports

_ROTARY = "apply_rotary_pos_emb"
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
_ROWS = 3

Operator = Callable[..., Any]


def fuse(model: nn.Module, layers: SequenceOf[nn.Module], probed: SequenceOf[ProbedLayer]) -> int:
    """Replace what can be; returns the number of modules changed (0 without a compiler).

    `layers` are the decoder layers, and `probed` is what their attention asks for.
    """
    operators = kernels()
    if operators is None or model.dtype not in _TOLERANCE:
        return 0
    rotating: dict[Operator, Operator | None] = {}
    # Modules with another forward than their class's are somebody's already.
    changed = sum(
        _fuse_norm(module, operators)
        or _fuse_mlp(module, operators)
        or _fuse_rotary(module, operators, rotating)
        for module in model.modules()
        if "forward" not in vars(module)
    )
    for layer, asked in zip(layers, probed, strict=True):
        if "forward" not in vars(layer):
            changed += _fuse_layer(layer, asked, operators)
    return changed


def _fuse_norm(module: nn.Module, operators: Kernels) -> bool:
    if not type(module).__name__.endswith("RMSNorm") or list(module._parameters) != ["weight"]:
        return False
    own, weight = module.forward, module.weight
    epsilon = _epsilon(module)
    if not isinstance(weight, Tensor) or epsilon is None:
        return False

    def forward(hidden_states: Tensor) -> Any:
        if not supports(hidden_states, weight):
            return own(hidden_states)
        return operators.rms_norm(hidden_states, weight, epsilon)

    return _replace(module, forward, (_random(weight.shape[-1], weight.dtype),), {})


def _fuse_mlp(module: nn.Module, operators: Kernels) -> bool:
    parts = dict(module.named_children())
    if parts.keys() != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    gate, up, down, act = (parts[n] for n in ("gate_proj", "up_proj", "down_proj", "act_fn"))
    if type(gate) is not nn.Linear:
        return False
    own = module.forward

    def forward(hidden_states: Tensor) -> Any:
        if _hooked((act,)):
            return own(hidden_states)
        gated, upper = gate(hidden_states), up(hidden_states)
        if not supports(gated, upper):
            return own(hidden_states)
        return down(operators.silu_mul_(gated, upper))

    return _replace(module, forward, (_random(gate.in_features, _dtype(module)),), {})


def _fuse_rotary(
    module: nn.Module, operators: Kernels, known: dict[Operator, Operator | None]
) -> bool:
    """Run an attention module's own code, with the name of its rotary function bound to ours."""
    own = type(module).forward
    if not isinstance(own, FunctionType) or _ROTARY not in own.__code__.co_names:
        return False
    rotary = own.__globals__[_ROTARY]
    if rotary not in known:
        known[rotary] = _rotate(rotary, operators)
    if known[rotary] is None:
        return False
    names = {**own.__globals__, _ROTARY: known[rotary]}
    forward = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    module.forward = MethodType(forward, module)
    return True


def _rotate(rotary: Operator, operators: Kernels) -> Operator | None:
    """A function like `rotary` that works in place; None if it does not give the same."""

    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        # As a linear layer gave them, [1, T, heads, dim], they are nobody else's.
        query, key = q.transpose(1, 2), k.transpose(1, 2)
        whole = cos.shape[-1] == q.shape[-1] == k.shape[-1] and len(q) == len(cos) == 1
        if args or kwargs or not whole or not supports(query, key, cos, sin):
            rotated: tuple[Tensor, Tensor] = rotary(q, k, cos, sin, *args, **kwargs)
            return rotated
        operators.rotate_(query[0], key[0], cos, sin)
        return q, k

    heads = [_random(n * 8, torch.float32).view(1, _ROWS, n, 8).transpose(1, 2) for n in (2, 1)]
    angles = _angles(8, torch.float32)
    wanted = rotary(*heads, *angles)
    given = rotate(*heads, *angles)
    same = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(wanted, given, strict=True))
    return rotate if same else None


def _fuse_layer(layer: nn.Module, asked: ProbedLayer, operators: Kernels) -> bool:
    """Run a whole Llama-like layer as one function, calling no module between its linear ones."""
    inner = {name: module for name, module in layer.named_modules() if name}
    expected = {f"self_attn.{p}_proj" for p in "qkvo"} | {
        f"mlp.{n}" for n in ("gate_proj", "up_proj", "down_proj", "act_fn")
    }
    norms = {"input_layernorm", "post_attention_layernorm"}
    if inner.keys() != expected | norms | {"self_attn", "mlp"}:
        return False
    if not all(type(inner[n]) is nn.Linear for n in expected if n.endswith("proj")):
        return False
    modules = tuple(inner.values())
    before, after = (inner[n] for n in sorted(norms))
    first_epsilon, second_epsilon = _epsilon(before), _epsilon(after)
    if first_epsilon is None or second_epsilon is None:
        return False
    q, k, v, o = (inner[f"self_attn.{p}_proj"].forward for p in "qkvo")
    gate, up, down = (inner[f"mlp.{p}_proj"].forward for p in ("gate", "up", "down"))
    own = layer.forward
    index: Any = inner["self_attn"].layer_idx
    width, kv_heads, scaling, window = (
        asked.shape.key_dim,
        asked.shape.kv_heads,
        asked.scaling,
        asked.window,
    )

    def forward(
        hidden_states: Tensor,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor],
        step: Any = None,
        **kwargs: Any,
    ) -> Any:
        cos, sin = position_embeddings
        plain = step is not None and cos.shape[-1] == width and not _hooked(modules)
        if not plain or not supports(hidden_states, cos, sin):
            kwargs |= {"position_embeddings": position_embeddings}
            return own(hidden_states, *args, **kwargs, **({} if step is None else {"step": step}))
        rows = hidden_states[0]
        normal = operators.rms_norm(rows, before.weight, first_epsilon)
        query = q(normal).view(len(rows), -1, width)
        key, value = k(normal).view(-1, kv_heads, width), v(normal).view(-1, kv_heads, width)
        operators.rotate_(query, key, cos, sin)
        attended = step.attend(index, query, key, value, scaling, window)
        rows, normal = operators.add_rms_norm(
            rows, o(attended.flatten(1)), after.weight, second_epsilon
        )
        rows += down(operators.silu_mul_(gate(normal), up(normal)))
        return rows[None]

    dtype = _dtype(layer)
    given = {"position_embeddings": _angles(width, dtype)}
    rows = _random(before.weight.shape[-1], dtype)
    return _replace(layer, forward, (rows,), given, needs_step=True)


def _hooked(modules: SequenceOf[nn.Module]) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


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


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _random(width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, _ROWS, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def _angles(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = _random(width // 2, torch.float32).repeat(1, 1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)
