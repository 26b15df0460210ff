"""The kinds of edits a file may hold, and the formula of each.

A kind is added by one entry in `KINDS`. Shapes are symbolic: `d` is the width of the edited rows,
`r` the edit's rank, 1 <= r <= d.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers.activations import ACT2CLS

from reft_runtime.errors import InvalidFile
from reft_runtime.machine.dtypes import name_of

# How far RᵀR may be from I, element-wise: rounding of the entries to each stored dtype, and more
# for float32, where R comes out of thousands of optimiser steps.
ORTHONORMAL_TOLERANCE = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 2e-2}

ACTS = frozenset(ACT2CLS)

_T = TypeVar("_T")


class TensorInfo(NamedTuple):
    """Dtype (torch's name, such as `float32`) and shape of one stored tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The dtype and shape that a kind expects of one tensor.

    An orthonormal tensor (its columns are) may have any of the float dtypes, as pyreft keeps R in
    float32 beside a bfloat16 W; all others have the edit's dtype.
    """

    shape: tuple[str, ...]
    optional: bool = False
    orthonormal: bool = False


@dataclass(frozen=True, slots=True)
class Formula:
    """The formula h + g * h + c + (act(h Wᵀ + b) + h Pᵀ + q) U; a kind may lack some parts.

    `U` is [r, d]; `learned` is (W [r, d], b [r]), whose product and act are computed in the stored
    dtype; `plain` is (P [r, d], q [r]), computed in float32; `gain` g and `offset` c are [d].
    """

    U: Tensor | None = None
    learned: tuple[Tensor, Tensor] | None = None
    plain: tuple[Tensor, Tensor] | None = None
    gain: Tensor | None = None
    offset: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind's tensors by name, the formula of their float32 values, and whether it has an act."""

    tensors: Mapping[str, TensorSpec]
    formula: Callable[[Mapping[str, Tensor]], Formula]
    has_act: bool = False


def _bias(tensors: Mapping[str, Tensor], name: str = "b") -> Tensor:
    weight = tensors["W"]
    return tensors.get(name, weight.new_zeros(weight.shape[0]))


def _loreft(tensors: Mapping[str, Tensor]) -> Formula:
    # h + (act(h Wᵀ + b) - h R) Rᵀ, arXiv 2404.03592 eq. 2; R is stored as pyreft does, [d, r].
    W, U = tensors["W"], tensors["R"].T
    return Formula(U, learned=(W, _bias(tensors)), plain=(-U, U.new_zeros(U.shape[0])))


def _noreft(tensors: Mapping[str, Tensor]) -> Formula:
    # h + (act(h Wᵀ + b) - (h W2ᵀ + b2)) W2: LoReFT without orthonormal directions.
    W, U = tensors["W"], tensors["W2"]
    return Formula(U, learned=(W, _bias(tensors)), plain=(-U, -_bias(tensors, "b2")))


def _direft(tensors: Mapping[str, Tensor]) -> Formula:
    # h + act(h Wᵀ + b) Rᵀ
    return Formula(tensors["R"].T, learned=(tensors["W"], _bias(tensors)))


def _nodireft(tensors: Mapping[str, Tensor]) -> Formula:
    # h + act(h Wᵀ + b) W2; this, without orthonormal directions, is the paper's DiReFT (eq. 3).
    return Formula(tensors["W2"], learned=(tensors["W"], _bias(tensors)))


def _consreft(tensors: Mapping[str, Tensor]) -> Formula:
    # h + (c - h R) Rᵀ
    U = tensors["R"].T
    return Formula(U, plain=(-U, tensors["c"]))


def _lobireft(tensors: Mapping[str, Tensor]) -> Formula:
    # h + c Rᵀ; no offset, so that single directions can be chosen
    U = tensors["R"].T
    return Formula(U, plain=(torch.zeros_like(U), tensors["c"]))


def _steering(tensors: Mapping[str, Tensor]) -> Formula:
    # h + v
    return Formula(offset=tensors["v"])


def _red(tensors: Mapping[str, Tensor]) -> Formula:
    # s * h + b, arXiv 2402.15179
    return Formula(gain=tensors["s"] - 1, offset=tensors["b"])


def _reft_r1(tensors: Mapping[str, Tensor]) -> Formula:
    # h + factor * w, how AxBench (arXiv 2501.17148) steers with its rank-1 ReFT
    return Formula(offset=tensors["factor"] * tensors["w"])


_W = TensorSpec(("r", "d"))
_R = TensorSpec(("d", "r"), orthonormal=True)
_BIAS = TensorSpec(("r",), optional=True)
_C = TensorSpec(("r",))
_ROW = TensorSpec(("d",))

KINDS: Mapping[str, Kind] = {
    "loreft": Kind({"W": _W, "R": _R, "b": _BIAS}, _loreft, has_act=True),
    "noreft": Kind({"W": _W, "W2": _W, "b": _BIAS, "b2": _BIAS}, _noreft, has_act=True),
    "direft": Kind({"W": _W, "R": _R, "b": _BIAS}, _direft, has_act=True),
    "nodireft": Kind({"W": _W, "W2": _W, "b": _BIAS}, _nodireft, has_act=True),
    "consreft": Kind({"c": _C, "R": _R}, _consreft),
    "lobireft": Kind({"c": _C, "R": _R}, _lobireft),
    "steering": Kind({"v": _ROW}, _steering),
    "red": Kind({"s": _ROW, "b": _ROW}, _red),
    "reft_r1": Kind({"w": _ROW, "factor": TensorSpec(("1",))}, _reft_r1),
}


def by_edit(count: int, items: Mapping[str, _T]) -> list[dict[str, _T]]:
    """Sort items named `edits.<index>.<tensor>` by edit: for each of `count` edits, a dictionary.

    Its keys are the names of tensors. Raises `InvalidFile` for an item that belongs to no edit.
    """
    places = {f"edits.{index}": index for index in range(count)}
    groups: list[dict[str, _T]] = [{} for _ in places]
    for name, item in items.items():
        place, _, tensor = name.rpartition(".")
        if place not in places:
            raise InvalidFile(f"{name[:200]}: no edit of the manifest has this tensor.")
        groups[places[place]][tensor] = item
    return groups


def check_tensors(
    kind: str, prefix: str, infos: Mapping[str, TensorInfo], *, dtype: str, width: int
) -> None:
    """Check names, dtypes and shapes of one edit's tensors, without their values.

    `infos` are keyed by the kind's tensor names, `prefix` is what precedes these in the file, and
    `width` is d. Raises `InvalidFile` that names the tensor.
    """
    specs = KINDS[kind].tensors
    sizes = {"d": width, "1": 1}
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
    if not 1 <= sizes.get("r", 1) <= width:
        raise InvalidFile(f"{prefix}*: rank {sizes['r']}; it must be 1 to {width}.")


def formula(kind: str, prefix: str, tensors: Mapping[str, Tensor]) -> Formula:
    """The formula of one edit's tensors, its parts in float32.

    Names, dtypes and shapes must have passed `check_tensors`. Raises `InvalidFile` that names a
    tensor which is not finite, or not orthonormal although the kind promises it.
    """
    found = KINDS[kind]
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidFile(f"{prefix}{name}: holds NaN or infinite values.")
        if found.tensors[name].orthonormal:
            _check_orthonormal(f"{prefix}{name}", tensor)
    return found.formula({name: tensor.float() for name, tensor in tensors.items()})


def orthonormal_error(R: Tensor) -> float:
    """How far the columns of R [d, r] are from orthonormal: max |RᵀR - I|."""
    # In numpy, whose thin products stay on this thread: torch's wait for all threads of OpenMP,
    # which takes far longer than the product where the cores are busy.
    exact = R.double().numpy()
    return float(np.abs(exact.T @ exact - np.eye(R.shape[1])).max())


def _check_orthonormal(name: str, R: Tensor) -> None:
    error = orthonormal_error(R)
    tolerance = ORTHONORMAL_TOLERANCE[name_of(R.dtype)]
    if error > tolerance:
        raise InvalidFile(
            f"{name}: columns are not orthonormal (max |RᵀR - I| is {error:.2g}, allowed"
            f" {tolerance:g})."
        )
