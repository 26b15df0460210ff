"""Random edits of every kind, and what they mean: plain formulas in plain hooks, no cache."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from reft_runtime.interventions import BaseShape, Edit, Intervention
from reft_runtime.schedule.request import AppliedIntervention
from tests.helpers.models import HIDDEN, VOCABULARY

BASE = BaseShape(
    model="tiny",
    architecture="LlamaForCausalLM",
    hidden_size=HIDDEN,
    num_layers=4,
    vocab_size=VOCABULARY,
)

SHAPES: dict[str, tuple[str, ...]] = {
    "loreft": ("W", "R", "b"),
    "noreft": ("W", "W2", "b", "b2"),
    "direft": ("W", "R", "b"),
    "nodireft": ("W", "W2", "b"),
    "consreft": ("c", "R"),
    "lobireft": ("c", "R"),
    "steering": ("v",),
    "red": ("s", "b"),
    "reft_r1": ("w", "factor"),
}
"""Tensors by kind."""


@dataclass(frozen=True)
class RandomEdit:
    """One edit of random tensors, as a file holds it; `formula` says what it does to a row."""

    kind: str
    positions: str
    layer: int = 1
    component: str = "block_output"
    width: int = HIDDEN
    rank: int = 3
    act: str | None = None
    dtype: torch.dtype = torch.float32
    size: float = 1.0
    seed: int = 0
    tensors: dict[str, Tensor] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return self.size * torch.randn(shape, generator=generator)

        d, r = self.width, self.rank
        row = self.kind in ("steering", "red", "reft_r1")
        found: dict[str, Tensor] = {}
        for name in SHAPES[self.kind]:
            match name:
                case "W":
                    found[name] = random(r, d)
                case "W2":
                    found[name] = random(r, d) / d**0.5
                case "R":
                    found[name] = torch.linalg.qr(torch.randn(d, r, generator=generator))[0]
                case "factor":
                    found[name] = torch.tensor([1.5])
                case _:
                    found[name] = random(d if row else r)
            if name != "R":
                found[name] = found[name].to(self.dtype)
        object.__setattr__(self, "tensors", found)

    @property
    def stored(self) -> Edit:
        """As `Intervention.build` takes it."""
        return Edit(
            self.layer,
            self.positions,
            self.tensors,
            self.kind,
            self.component,
            act=self.act,
            width=self.width,
        )

    def formula(self, h: Tensor, subspace: SequenceOf[int] | None = None) -> Tensor:
        """The edited rows of h [..., d], float32: the table of pyreft's kinds, and the papers'."""
        t = {name: tensor.float() for name, tensor in self.tensors.items()}
        if subspace is not None:
            chosen = list(subspace)
            t = {name: x[:, chosen] if name == "R" else x[chosen] for name, x in t.items()}
        learned = h.new_zeros(())
        if "W" in t:
            W, b = t["W"].to(self.dtype), t["b"].to(self.dtype)
            learned = ACT2FN[self.act or "linear"](linear(h.to(self.dtype), W, b)).float()
        match self.kind:
            case "loreft":
                return h + (learned - h @ t["R"]) @ t["R"].T
            case "noreft":
                return h + (learned - linear(h, t["W2"], t["b2"])) @ t["W2"]
            case "direft":
                return h + learned @ t["R"].T
            case "nodireft":
                return h + learned @ t["W2"]
            case "consreft":
                return h + (t["c"] - h @ t["R"]) @ t["R"].T
            case "lobireft":
                return h + t["c"] @ t["R"].T
            case "steering":
                return h + t["v"]
            case "red":
                return t["s"] * h + t["b"]
            case _:
                return h + t["factor"] * t["w"]


@dataclass(frozen=True)
class Applied:
    """Edits of one intervention, with its strength and subspace."""

    edits: tuple[RandomEdit, ...]
    strength: float = 1.0
    subspace: tuple[int, ...] | None = None

    @cached_property
    def intervention(self) -> AppliedIntervention:
        """The form in which the engine takes it; the digest is as good as a real one in tests."""
        built = Intervention.build(BASE, [edit.stored for edit in self.edits])
        edits = built.canonical()
        if self.subspace is not None:
            edits = tuple(edit.subset(self.subspace) for edit in edits)
        return AppliedIntervention(repr(self.edits), edits, self.strength, self.subspace)


def applied(*edits: RandomEdit, strength: float = 1.0) -> Applied:
    """An intervention of these edits."""
    return Applied(edits, strength)


def edited(positions: str, n: int, length: int) -> list[int]:
    """Indices that are edited in a text of `length` tokens, of which n are the prompt."""
    if positions == "all":
        return list(range(length))
    found: set[int] = set()
    for term in positions.split("+"):
        if term == "decode":
            found |= set(range(n, length))
        elif term == "prompt":
            found |= set(range(n))
        elif term.startswith("decode["):
            first, stop = (int(bound) if bound else None for bound in term[7:-1].split(":"))
            found |= set(range(n, length)[first:stop])
        elif ":" in term:
            start, stop = (int(bound) if bound else None for bound in term[1:-1].split(":"))
            found |= set(range(n)[start:stop])
        elif term.startswith("["):
            listed = [int(index) for index in term[1:-1].split(",")]
            found |= {range(n)[i] for i in listed if -n <= i < n}
        else:
            count = min(n // 2, int(term[1:]))
            found |= set(range(count) if term[0] == "f" else range(n - count, n))
    return sorted(found)


def place(model: PreTrainedModel, layer: int, component: str) -> tuple[nn.Module, str]:
    """Module and side of a component, written out by architecture."""
    if "." in component:
        path, _, side = component.replace("[", ".").replace("]", "").rpartition(".")
        return model.get_submodule(path), side
    layers, attention, projection, act = {
        "gpt2": ("transformer.h", "attn", "c_proj", "act"),
        "gpt_neox": ("gpt_neox.layers", "attention", "dense", "act"),
    }.get(model.config.model_type, ("model.layers", "self_attn", "o_proj", "act_fn"))
    mixer = {"qwen3_5_text": "linear_attn", "falcon_h1": "mamba", "lfm3": "conv"}
    mlp = {"falcon_h1": "feed_forward", "lfm3": "feed_forward"}.get(model.config.model_type, "mlp")
    path, side = {
        "block_input": ("", "input"),
        "block_output": ("", "output"),
        "mlp_input": (f".{mlp}", "input"),
        "mlp_output": (f".{mlp}", "output"),
        "mlp_activation": (f".mlp.{act}", "output"),
        "attention_input": (f".{attention}", "input"),
        "attention_output": (f".{attention}", "output"),
        "attention_value_output": (f".{attention}.{projection}", "input"),
        "mixer_input": (f".{mixer.get(model.config.model_type)}", "input"),
        "mixer_output": (f".{mixer.get(model.config.model_type)}", "output"),
        "query_output": (f".{attention}.q_proj", "output"),
        "key_output": (f".{attention}.k_proj", "output"),
        "value_output": (f".{attention}.v_proj", "output"),
    }[component]
    return model.get_submodule(f"{layers}.{layer}{path}"), side


def _hook(stack: ExitStack, module: nn.Module, side: str, change: Any) -> None:
    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if side == "input"
        else module.register_forward_hook(after)
    )
    stack.callback(handle.remove)


@torch.inference_mode()
def logits(
    model: PreTrainedModel,
    text: SequenceOf[int],
    n: int,
    interventions: SequenceOf[Applied] = (),
    sizes: dict[tuple[int, int, int], float] | None = None,
    rows: dict[tuple[int, int, int], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Logits [text, vocabulary] of one whole forward; the first n tokens are the prompt.

    `sizes` gets the relative size of every change by intervention, edit and position, and `rows`
    the rows before and after it.
    """

    def change(place: tuple[int, int], intervention: Applied, edit: RandomEdit) -> Any:
        def changed(hidden: Tensor) -> Tensor:
            hidden = hidden.clone()
            chosen = edited(edit.positions, n, len(text))
            old = hidden[0, chosen]
            new = edit.formula(old, intervention.subspace)
            hidden[0, chosen] = old + intervention.strength * (new - old)
            for row, before in zip(chosen, old, strict=True):
                after = hidden[0, row]
                if sizes is not None:
                    sizes[*place, row] = float((after - before).norm() / before.norm())
                if rows is not None:
                    rows[*place, row] = before, after.clone()
            return hidden

        return changed

    with ExitStack() as stack:
        for i, intervention in enumerate(interventions):
            for j, edit in enumerate(intervention.edits):
                module, side = place(model, edit.layer, edit.component)
                _hook(stack, module, side, change((i, j), intervention, edit))
        found: Tensor = model(input_ids=torch.tensor([list(text)]), use_cache=False).logits[0]
        return found


def generate_applied(
    model: PreTrainedModel,
    tokens: SequenceOf[int],
    interventions: SequenceOf[Applied],
    max_tokens: int = 8,
) -> list[int]:
    """The greedy answer; decode step j is the forward whose input is generated token j."""
    text = list(tokens)
    for _ in range(max_tokens):
        text.append(int(logits(model, text, len(tokens), interventions)[-1].argmax()))
    return text[len(tokens) :]


def log_ratios(
    model: PreTrainedModel,
    tokens: SequenceOf[int],
    made: SequenceOf[int],
    interventions: SequenceOf[Applied],
) -> list[float]:
    """Log-probability of each token made, less the base model's after the same tokens."""
    text, n = [*tokens, *made], len(tokens)
    own = logits(model, text, n, interventions).double().log_softmax(-1)
    base = logits(model, text, n).double().log_softmax(-1)
    return [float((own - base)[n - 1 + i, token]) for i, token in enumerate(made)]
