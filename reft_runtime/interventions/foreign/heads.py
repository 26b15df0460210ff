"""LoFiT (arXiv 2406.01563) and JoLA (arXiv 2502.01179): gains and offsets of attention's heads.

LoFiT makes (1 + A) h + v of what a head gives the output projection, JoLA (1 + g2 A) h + g1 v with
gates that it has trained: g = min(max(1.2 sigmoid(log_g) - 0.1, 0), 1).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from reft_runtime.errors import InvalidFile
from reft_runtime.interventions.foreign.modules import edit_at
from reft_runtime.interventions.format.identity import MAX_FILE_BYTES
from reft_runtime.interventions.format.intervention import Edit
from reft_runtime.interventions.format.manifest import BaseShape

NAMES = r".*\.(?:attn_[Av]\..*|log_g[12])"
"""The names of what is read, as a regular expression."""

_NAME = re.compile(r"model\.layers\.(\d{1,4})\.self_attn\.(?:(attn_[Av])\.(\d{1,4})|(log_g[12]))")
_QWEN = "Qwen2ForCausalLM"
_AS_WIDE_AS_HIDDEN = frozenset({"LlamaForCausalLM", _QWEN})
"""Architectures whose heads are together as wide as hidden states, or neither trains them."""


def head_edits(
    weights: Mapping[str, Tensor], base: BaseShape, positions: str | None
) -> tuple[list[Edit], dict[str, str]]:
    """The edits of all layers that are changed, and whose they are.

    A head that is not among the weights stays as it is. Raises `InvalidFile`.
    """
    parts: dict[int, dict[str, dict[int, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    gates: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in weights.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise InvalidFile(f"{name[:200]!r}: no tensor of LoFiT's or JoLA's.")
        if match[2]:
            parts[int(match[1])][match[2]][int(match[3])] = tensor
        else:
            gates[int(match[1])][match[4]] = tensor
    if gates and base.architecture == _QWEN:
        raise InvalidFile(
            "log_g1: of a Qwen2 JoLA applies these gates in eager attention alone, and no file says"
            " which one it was trained with. If it was sdpa, save it without log_g1 and log_g2; if"
            " it was eager, save g2 * attn_A and g1 * attn_v in place of all four."
        )
    size, count = _heads(weights, base)
    if 8 * len(parts) * count * size > MAX_FILE_BYTES:
        raise InvalidFile(
            f"attn_A: {len(parts)} layers of {count} heads of {size}, which is more than a file of"
            f" {MAX_FILE_BYTES} bytes can hold."
        )
    edits = []
    for layer, found in sorted(parts.items()):
        A, v = (torch.zeros(count, size) for _ in range(2))
        for part, rows in ((A, found["attn_A"]), (v, found["attn_v"])):
            for head, row in rows.items():
                part[head] = row.float()
        if gates:
            g1, g2 = (_gate(gates[layer], layer, name, count) for name in ("log_g1", "log_g2"))
            A, v = g2 * A, g1 * v
        if A.any() or v.any():
            place = f"model.layers.{layer}.self_attn.o_proj.input"
            tensors = {"s": 1 + A.flatten(), "b": v.flatten()}
            edits.append(edit_at(base, positions, place, "red", tensors))
    if not edits:
        raise InvalidFile("attn_A: no head is changed; was it trained?")
    return edits, {"source": "JoLA" if gates else "LoFiT"}


def _heads(weights: Mapping[str, Tensor], base: BaseShape) -> tuple[int, int]:
    """How wide a head is, and how many there are."""
    rows = {name: each for name, each in weights.items() if ".attn_" in name}
    if not rows:
        raise InvalidFile("attn_A: missing beside log_g1.")
    size = next(iter(rows.values())).shape[-1:].numel()
    for name, row in rows.items():
        if row.shape != (size,) or not size:
            raise InvalidFile(f"{name[:200]}: shape {list(row.shape)}, expected [{size or 'd'}].")
    count = 1 + max(int(name.rpartition(".")[2]) for name in rows)
    if base.architecture not in _AS_WIDE_AS_HIDDEN:
        return size, count
    if base.hidden_size % size or count * size > base.hidden_size:
        raise InvalidFile(
            f"attn_A: {count} heads of {size}, but {base.model} is {base.hidden_size} wide; check"
            " --base."
        )
    return size, base.hidden_size // size


def _gate(found: Mapping[str, Tensor], layer: int, name: str, count: int) -> Tensor:
    tensor = found.get(name)
    if tensor is None or tensor.shape != (count, 1):
        shape = "missing" if tensor is None else f"shape {list(tensor.shape)}"
        raise InvalidFile(f"model.layers.{layer}.self_attn.{name}: {shape}, expected [{count}, 1].")
    return (1.2 * tensor.float().sigmoid() - 0.1).clamp(0, 1)
