"""Leads attention that a model's own code computes to the running step.

Some older models do not call transformers' attention interface: a method of their own computes
attention, or their whole forward does. While a step runs it is replaced, and otherwise it stays as
it is: so the model's own logits are its own. The check at load shows whether the two are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from reft_runtime.base.attention import Scoring, running_step
from reft_runtime.base.probe import AskedMask, ShapeProbe
from reft_runtime.base.rebinding import code_of
from reft_runtime.base.rotary import ROTARY

METHOD = "_attn"
"""The method that computes attention [1, heads, T, dim] in the GPT-J family."""

_SCORED: dict[str, Callable[[Any], Scoring]] = {
    "GPTJAttention": lambda module: Scoring(1 / module.scale_attn),
    "CodeGenAttention": lambda module: Scoring(1 / module.scale_attn),
    "GPTNeoXJapaneseAttention": lambda module: Scoring(1 / module.norm_factor),
    "GPTNeoSelfAttention": lambda module: Scoring(
        1.0, window=module.config.window_size if module.attention_type == "local" else None
    ),
}
"""How the modules with `METHOD` score keys, by their class; newer code of some has it no more."""


def lead_to_step(model: PreTrainedModel) -> None:
    """Replace the modules' own attention; `ModelState` restores it."""
    for module in model.modules():
        name = type(module).__name__
        if name in _SCORED and hasattr(module, METHOD):
            setattr(module, METHOD, _method(module, _SCORED[name](module)))
        elif name == "FalconAttention":
            module.forward = _falcon(module)


def _method(module: Any, scoring: Scoring) -> Callable[..., Any]:
    own = getattr(module, METHOD)
    layer: int = module.layer_id if hasattr(module, "layer_id") else module.layer_idx

    def attend(query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> Any:
        if running_step() is None:
            return own(query, key, value, attention_mask)
        return _attend(layer, query, key, value, attention_mask, scoring).transpose(0, 1)[
            None
        ], None

    return attend


def _falcon(module: Any) -> Callable[..., Any]:
    """Falcon's attention without ALiBi: keys of all its sorts of heads, rotated."""
    code = code_of(type(module).forward)
    assert code is not None
    own, rotate = module.forward, code.__globals__[ROTARY]
    layer, scoring = module.layer_idx, Scoring(1 / module.head_dim**0.5)

    def forward(
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Any,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        if running_step() is None:
            return own(
                hidden_states,
                alibi,
                attention_mask,
                *args,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        heads = module._split_heads(module.query_key_value(hidden_states))
        query, key, value = (each.transpose(1, 2) for each in heads)
        query, key = rotate(query, key, *(position_embeddings or ()))
        mixed = _attend(layer, query, key, value, attention_mask, scoring)
        return module.dense(mixed.flatten(1)[None]), None

    return forward


def _attend(
    layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Any, scoring: Scoring
) -> Tensor:
    """Attention of the running step over heads [1, heads, T, dim]; gives [T, heads, dim]."""
    step = running_step()
    assert step is not None
    if isinstance(step, ShapeProbe) and isinstance(mask, AskedMask):
        mask.reach(step.max_tokens)  # raises unless it is causal
    query, key, value = (e[0].transpose(0, 1).to(value.dtype) for e in (query, key, value))
    return step.attend(layer, query, key, value, scoring)
