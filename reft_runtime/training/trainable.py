"""Edits as trainable parameters, in the canonical form that the engine applies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from reft_runtime.interventions import BaseShape, CanonicalEdit, Edit, EditSpec
from reft_runtime.interventions.format.canonical import canonical_edit
from reft_runtime.interventions.format.kinds import KINDS
from reft_runtime.training.settings import TrainSettings


class _Orthonormal(nn.Module):
    """Q [d, r] of X = QT with a positive diagonal of T: X itself, where it is orthonormal."""

    def forward(self, X: Tensor) -> Tensor:
        Q, T = torch.linalg.qr(X)
        signed: Tensor = Q * T.diagonal().sign()
        return signed


class TrainableEdit(nn.Module):
    """One edit: the tensors of its kind as parameters.

    An orthonormal tensor is the Q of its parameter's QR decomposition: it stays orthonormal
    whatever the optimiser does.
    """

    def __init__(self, spec: EditSpec, width: int, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.spec = spec
        self._width = width
        self._names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))
            if KINDS[spec.kind].tensors[name].orthonormal:
                register_parametrization(self, name, _Orthonormal())
        for parameter in self.parameters():  # checkpoints take nothing else
            parameter.data = parameter.data.contiguous()

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the kind, by name, with the graph that leads to the parameters."""
        return {name: getattr(self, name) for name in self._names}

    def canonical(self) -> CanonicalEdit:
        """The form in which the edit is applied, with the graph."""
        return canonical_edit(self.spec, KINDS[self.spec.kind].formula(self.stored()), self._width)


class TrainableEdits(nn.ModuleList):
    """The edits of one intervention, in the order in which they apply."""

    def __iter__(self) -> Iterator[TrainableEdit]:
        return cast(Iterator[TrainableEdit], super().__iter__())

    def canonical(self) -> list[CanonicalEdit]:
        """The forms in which they are applied, with the graph."""
        return [edit.canonical() for edit in self]

    def export(self) -> list[Edit]:
        """What `Intervention.build` takes; it checks that R is orthonormal."""
        return [
            Edit(
                layer=edit.spec.layer,
                positions=str(edit.spec.positions),
                tensors={name: t.detach().cpu().clone() for name, t in edit.stored().items()},
                kind=edit.spec.kind,
            )
            for edit in self
        ]


def new_edits(base: BaseShape, settings: TrainSettings) -> TrainableEdits:
    """Fresh edits for completed settings; all but ConsReFT's begin by changing nothing.

    Their random numbers come from the seed alone.
    """
    assert settings.layers is not None
    generator = torch.Generator().manual_seed(settings.seed)
    width, rank = base.hidden_size, settings.rank or 1
    return TrainableEdits(
        [
            TrainableEdit(
                EditSpec(layer=layer, kind=settings.kind, positions=positions, dtype="float32"),
                width,
                _INITIAL[settings.kind](width, rank, generator),
            )
            for positions in settings.sides
            for layer in settings.layers
        ]
    )


Initial = Callable[[int, int, torch.Generator], dict[str, Tensor]]


def _columns(d: int, r: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal columns [d, r]."""
    Q: Tensor = torch.linalg.qr(torch.randn(d, r, generator=generator)).Q
    return Q.contiguous()


def _loreft(d: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
    R = _columns(d, r, generator)
    return {"W": R.T.clone(), "R": R, "b": torch.zeros(r)}


def _noreft(d: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
    W = _columns(d, r, generator).T.contiguous()
    return {"W": W.clone(), "W2": W, "b": torch.zeros(r), "b2": torch.zeros(r)}


def _direft(d: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"W": torch.zeros(r, d), "R": _columns(d, r, generator), "b": torch.zeros(r)}


def _nodireft(d: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
    W2 = _columns(d, r, generator).T.contiguous()
    return {"W": torch.zeros(r, d), "W2": W2, "b": torch.zeros(r)}


def _constant(d: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"c": torch.zeros(r), "R": _columns(d, r, generator)}


def _steering(d: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"v": torch.zeros(d)}


def _red(d: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"s": torch.ones(d), "b": torch.zeros(d)}


def _reft_r1(d: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"w": _columns(d, 1, generator)[:, 0].clone(), "factor": torch.zeros(1)}


_INITIAL: Mapping[str, Initial] = {
    "loreft": _loreft,
    "noreft": _noreft,
    "direft": _direft,
    "nodireft": _nodireft,
    "consreft": _constant,
    "lobireft": _constant,
    "steering": _steering,
    "red": _red,
    "reft_r1": _reft_r1,
}
