"""The one form in which every kind of edit is applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize
from transformers.activations import ACT2FN

from reft_runtime.errors import InvalidFile, InvalidRequest
from reft_runtime.interventions.format.kinds import Formula, by_edit, formula
from reft_runtime.interventions.format.manifest import EditSpec, Manifest
from reft_runtime.interventions.format.positions import Positions
from reft_runtime.machine.memory import MappedMemory

_ALIGNED = 4
"""Tensors of a block begin at multiples of this many numbers (16 bytes)."""


EDIT_BYTES = 3 << 10
"""Memory of an edit besides its numbers: mostly that of tensors that are views of a block."""

_MAPPED_BYTES = 1 << 16
"""Bytes from which a block has a mapping of its own."""


@dataclass(frozen=True, slots=True, eq=False)
class CanonicalEdit:
    """One edit of the rows h, of width d, at `positions` of one layer's `component`.

    With strength s the edited rows are h + s * (g * h + c + phi(h Vᵀ + b) U), the sum in float32
    and rounded to h's dtype at the end. `V` and `U` are [k, d], `b` is [k], `gain` (g) and `offset`
    (c) are [d] or None for zero; all are contiguous float32 tensors, on the CPU when they are
    loaded.

    phi depends on the rank row. The first `learned` rows are act(h Vᵀ + b) with h, V and b cast to
    `dtype` and product, bias and act computed in it (V and b hold values of that dtype, so the cast
    is exact); the rest are h Vᵀ + b in float32. `act` is a name in transformers' `ACT2FN`, None for
    the identity. Rank row i belongs to direction i % `directions`.
    """

    layer: int
    component: str
    positions: Positions
    V: Tensor
    b: Tensor
    U: Tensor
    learned: int = 0
    act: str | None = None
    dtype: torch.dtype = torch.float32
    gain: Tensor | None = None
    offset: Tensor | None = None
    directions: int = 0

    @property
    def rank(self) -> int:
        """Number of rank rows, k; it may be 0."""
        return self.b.shape[0]

    @property
    def axes(self) -> Tensor:
        """The directions that the edit has, [r, d]; none of `red`, which scales all of a row."""
        if self.directions or self.offset is None:
            return self.U[: self.directions]
        return self.offset[None] if self.gain is None else self.U[:0]

    def coordinates(self, rows: Tensor) -> Tensor:
        """Products [..., r] of rows [..., d] with the edit's directions, these at length 1."""
        return linear(rows, normalize(self.axes, dim=-1))

    @property
    def nbytes(self) -> int:
        """Memory of the edit's tensors, in bytes."""
        tensors = (self.V, self.b, self.U, self.gain, self.offset)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def edited(self, rows: Tensor, strength: float = 1.0) -> Tensor:
        """The edited rows [n, d], in float32; `rows` themselves do not change.

        It is differentiable in the rows and in the edit's tensors, because training uses it as
        well.
        """
        old, learned = rows.float(), self.learned
        change = torch.zeros_like(old)
        if learned:
            low_rank = linear(
                old.to(self.dtype), self.V[:learned].to(self.dtype), self.b[:learned].to(self.dtype)
            )
            if self.act is not None:
                low_rank = _act(self.act, low_rank.device)(low_rank)
            change = change + low_rank.float() @ self.U[:learned]
        if learned < self.rank:
            low_rank = torch.addmm(self.b[learned:], old, self.V[learned:].T)
            change = torch.addmm(change, low_rank, self.U[learned:])
        if self.gain is not None:
            change = torch.addcmul(change, old, self.gain)
        if self.offset is not None:
            change = change + self.offset
        return torch.add(old, change, alpha=strength)

    def to(self, device: torch.device) -> CanonicalEdit:
        """The same edit with its tensors on a device.

        Nobody waits for copies of page-locked tensors; see `PackedEdits`.
        """
        waits = device.type == "cpu"
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=not waits)
            for name, tensor in _tensors(self).items()
        }
        return replace(self, **moved)

    def subset(self, subspace: tuple[int, ...]) -> CanonicalEdit:
        """The same edit along some of its directions only (columns of LoReFT's R).

        Raises `InvalidRequest` for an edit without directions, and for a direction that it does
        not have or that is named twice.
        """
        if not self.directions:
            raise InvalidRequest(
                f"subspace: the edit of layer {self.layer} has no directions to choose from; leave"
                " it out.",
                param="subspace",
            )
        if not subspace or len(set(subspace)) < len(subspace):
            raise InvalidRequest(
                "subspace: name each direction to edit once, such as [0, 2].", param="subspace"
            )
        for direction in subspace:
            if not 0 <= direction < self.directions:
                raise InvalidRequest(
                    f"subspace: {direction} is out of range; the edit of layer {self.layer} has"
                    f" directions 0 to {self.directions - 1}.",
                    param="subspace",
                )
        chosen = sorted(subspace)
        rows = [
            first + direction
            for first in range(0, self.rank, self.directions)
            for direction in chosen
        ]
        return replace(
            self,
            V=self.V[rows].contiguous(),
            b=self.b[rows].contiguous(),
            U=self.U[rows].contiguous(),
            learned=sum(row < self.learned for row in rows),
            directions=len(chosen),
        )


def memory_of(edits: Sequence[CanonicalEdit]) -> int:
    """Memory that edits take with their objects, in bytes."""
    return sum(edit.nbytes + EDIT_BYTES for edit in edits)


class PackedEdits(tuple[CanonicalEdit, ...]):
    """Edits whose tensors lie in one `block` of the CPU's memory (float32, 1-D).

    A device therefore gets all of them by one copy. If this process uses a CUDA device, the block
    is page-locked: the copy takes as long as the bus needs, and nobody waits for it.
    """

    block: Tensor

    @classmethod
    def of(cls, edits: Sequence[CanonicalEdit]) -> PackedEdits:
        """The same edits, packed; returns `edits` itself if they are packed already."""
        if isinstance(edits, cls):
            return edits
        tensors = [tensor for edit in edits for tensor in _tensors(edit).values()]
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.numel() // _ALIGNED) * _ALIGNED
        block = _block(end)
        places = iter(starts)

        def moved(tensor: Tensor) -> Tensor:
            first = next(places)
            place = block[first : first + tensor.numel()].view(tensor.shape)
            return place.copy_(tensor)

        found = []
        for edit in edits:
            parts: dict[str, Any] = {name: moved(t) for name, t in _tensors(edit).items()}
            found.append(replace(edit, **parts))
        made = cls(found)
        made.block = block
        return made


def _block(size: int) -> Tensor:
    """Memory for float32 numbers [size], zero, which goes back to the system when it is freed.

    From the allocator it would leave holes, which other interventions do not fit into.
    """
    if _uses_cuda():
        return torch.zeros(size, pin_memory=True)
    if size * torch.float32.itemsize >= _MAPPED_BYTES:
        with suppress(MemoryError):  # there may be so many mappings, and no more
            return MappedMemory(size, torch.float32).numbers
    return torch.zeros(size)


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _tensors(edit: CanonicalEdit) -> dict[str, Tensor]:
    found = {name: getattr(edit, name) for name in ("V", "b", "U", "gain", "offset")}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def canonical_edits(manifest: Manifest, tensors: Mapping[str, Tensor]) -> PackedEdits:
    """Check the tensors' values and convert every edit, in the manifest's order; packed.

    The tensors are named `edits.<index>.<tensor>`. Raises `InvalidFile`.
    """
    edits = []
    for index, own in enumerate(by_edit(len(manifest.edits), tensors)):
        spec = manifest.edits[index]
        parts = formula(spec.kind, f"edits.{index}.", own)
        edits.append(canonical_edit(spec, parts, manifest.width_of(index)))
    return PackedEdits.of(edits)


def canonical_edit(spec: EditSpec, parts: Formula, width: int) -> CanonicalEdit:
    """The canonical form of one edit of rows of this width.

    Where nothing is computed in another dtype or through an act, rank rows that share a direction
    collapse into one: LoReFT has then r of them, and otherwise 2r.
    """
    act = None if spec.act == "linear" else spec.act
    dtype: torch.dtype = getattr(torch, spec.dtype)
    linear = act is None and dtype == torch.float32
    groups = [group for group in (parts.learned, parts.plain) if group is not None]
    if linear and len(groups) == 2:
        (W, b), (P, q) = groups
        groups = [(W + P, b + q)]
    learned = 0 if linear or parts.learned is None else parts.learned[1].shape[0]
    if act is not None:
        _check_act(act, dtype)
    U = torch.empty(0, width) if parts.U is None else parts.U
    return CanonicalEdit(
        layer=spec.layer,
        component=spec.component,
        positions=replace(spec.positions, suffix_offset=spec.suffix_offset),
        V=torch.cat([V for V, _ in groups]).contiguous() if groups else U,
        b=torch.cat([b for _, b in groups]).contiguous() if groups else torch.empty(0),
        U=U.repeat(max(len(groups), 1), 1).contiguous(),
        learned=learned,
        act=act if learned else None,
        dtype=dtype if learned else torch.float32,
        gain=parts.gain,
        offset=parts.offset,
        directions=U.shape[0],
    )


@cache
def _act(name: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    act: Callable[[Tensor], Tensor] = ACT2FN[name].to(device)  # some acts have parameters
    return act


def _check_act(act: str, dtype: torch.dtype) -> None:
    # prelu keeps its parameter in float32 and takes no other dtype, in pyreft as well.
    try:
        ACT2FN[act](torch.zeros(1, dtype=dtype))
    except RuntimeError as error:
        raise InvalidFile(f"act: {act} cannot be computed in {dtype} ({error}).") from None
