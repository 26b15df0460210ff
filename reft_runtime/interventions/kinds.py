"""The kinds of edits a file may hold, and how each becomes the canonical form.

A kind is added by one entry in `KINDS`. Shapes are symbolic: `d` is the base model's hidden size,
`r` the edit's rank, 1 <= r <= d.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from reft_runtime.errors import InvalidFile

# How far RᵀR may be from I, element-wise: rounding of the entries to each stored dtype, and more
# for float32, where R comes out of thousands of optimiser steps.
ORTHONORMAL_TOLERANCE = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 2e-2}


class TensorInfo(NamedTuple):
    """Dtype (torch's name, such as `float32`) and shape of one stored tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a kind expects of one tensor.

    An orthonormal tensor (columns) may have any of the float dtypes, as pyreft keeps R in float32
    beside a bfloat16 W; all others have the edit's dtype.
    """

    shape: tuple[str, ...]
    optional: bool = False
    orthonormal: bool = False


@dataclass(frozen=True, slots=True)
class Kind:
    """Tensors of a kind by name, and the conversion of their float32 values to (V, b, U)."""

    tensors: Mapping[str, TensorSpec]
    convert: Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor, Tensor]]


def _loreft(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    # h + ((h Wᵀ + b) - h R) Rᵀ, arXiv 2404.03592 eq. 2; R is stored as pyreft does, [d, r].
    W, directions = tensors["W"], tensors["R"].T
    return W - directions, tensors.get("b", W.new_zeros(W.shape[0])), directions


KINDS: Mapping[str, Kind] = {
    "loreft": Kind(
        tensors={
            "W": TensorSpec(("r", "d")),
            "R": TensorSpec(("d", "r"), orthonormal=True),
            "b": TensorSpec(("r",), optional=True),
        },
        convert=_loreft,
    ),
}


def check_tensors(
    kind: str, prefix: str, infos: Mapping[str, TensorInfo], *, dtype: str, hidden_size: int
) -> None:
    """Check names, dtypes and shapes of one edit's tensors, without their values.

    `infos` are keyed by the kind's tensor names; `prefix` is what they are called by in the file.
    Raises `InvalidFile` that names the tensor.
    """
    specs = KINDS[kind].tensors
    sizes = {"d": hidden_size}
    unknown = sorted(infos.keys() - specs.keys())
    if unknown:
        raise InvalidFile(
            f"{prefix}{unknown[0]}: a {kind} edit has no such tensor; it takes {', '.join(specs)}."
        )
    for name, spec in specs.items():
        info = infos.get(name)
        if info is None:
            if spec.optional:
                continue
            raise InvalidFile(f"{prefix}{name}: missing; a {kind} edit needs it.")
        if info.dtype not in ORTHONORMAL_TOLERANCE:
            raise InvalidFile(
                f"{prefix}{name}: dtype {info.dtype}; store float32, float16 or bfloat16."
            )
        if info.dtype != dtype and not spec.orthonormal:
            raise InvalidFile(
                f"{prefix}{name}: dtype {info.dtype}, but the manifest's edit says {dtype}."
            )
        if len(info.shape) == len(spec.shape):
            for symbol, size in zip(spec.shape, info.shape, strict=True):
                sizes.setdefault(symbol, size)
        expected = tuple(sizes.get(symbol, 0) for symbol in spec.shape)
        if info.shape != expected:
            symbols = ", ".join(
                f"{symbol}={sizes[symbol]}" if symbol in sizes else symbol for symbol in spec.shape
            )
            raise InvalidFile(f"{prefix}{name}: shape {list(info.shape)}, expected [{symbols}].")
    if not 1 <= sizes["r"] <= hidden_size:
        raise InvalidFile(f"{prefix}*: rank {sizes['r']}; it must be 1 to {hidden_size}.")


def convert(kind: str, prefix: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Turn one edit's tensors into (V [r, d], b [r], U [r, d]), contiguous float32.

    Names, dtypes and shapes have passed `check_tensors`. Raises `InvalidFile` that names a tensor
    which is not finite, or not orthonormal where the kind promises it.
    """
    found = KINDS[kind]
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidFile(f"{prefix}{name}: holds NaN or infinite values.")
        if found.tensors[name].orthonormal:
            _check_orthonormal(f"{prefix}{name}", tensor)
    V, b, U = found.convert({name: tensor.float() for name, tensor in tensors.items()})
    return V.contiguous(), b.contiguous(), U.contiguous()


def _check_orthonormal(name: str, R: Tensor) -> None:
    exact = R.double()
    identity = torch.eye(R.shape[1], dtype=torch.float64)
    error = float((exact.T @ exact - identity).abs().max())
    tolerance = ORTHONORMAL_TOLERANCE[str(R.dtype).removeprefix("torch.")]
    if error > tolerance:
        raise InvalidFile(
            f"{name}: columns are not orthonormal (max |RᵀR - I| is {error:.2g}, allowed"
            f" {tolerance:g})."
        )
