"""An intervention in memory: its manifest and its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import JsonValue, ValidationError
from torch import Tensor

from reft_runtime.errors import InvalidFile
from reft_runtime.interventions.format.canonical import CanonicalEdit, canonical_edits
from reft_runtime.interventions.format.components import normalise
from reft_runtime.interventions.format.kinds import KINDS, TensorInfo, by_edit, check_tensors
from reft_runtime.interventions.format.manifest import (
    BaseShape,
    CompletionPrefix,
    Manifest,
    SystemTurn,
    Texts,
)
from reft_runtime.machine.dtypes import name_of


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """One edit as it is stored, for `Intervention.build`.

    LoReFT takes `W` [r, d], `R` [d, r] with orthonormal columns, and optionally `b` [r]; `KINDS`
    lists the tensors of the other kinds. `component` and the other fields are those of `EditSpec`;
    a component may be written in any of the ways that `components.normalise` knows.
    """

    layer: int
    positions: str
    tensors: Mapping[str, Tensor]
    kind: str = "loreft"
    component: str = "block_output"
    act: str | None = None
    width: int | None = None
    suffix_offset: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Intervention:
    """A manifest and the tensors it describes, named `edits.<index>.<tensor>`."""

    manifest: Manifest
    tensors: Mapping[str, Tensor]

    @classmethod
    def build(
        cls,
        base: BaseShape,
        edits: Sequence[Edit],
        *,
        template: str | None = None,
        system: SystemTurn | None = None,
        completion_prefix: CompletionPrefix | None = None,
        texts: Texts | None = None,
        labels: Sequence[str] | None = None,
        description: str = "",
        license: str | None = None,
        metrics: Mapping[str, JsonValue] | None = None,
        training: Mapping[str, JsonValue] | None = None,
    ) -> Intervention:
        """Make an intervention from tensors. Raises `InvalidFile` for what would not load again.

        Untied weights are two edits of one layer, such as at positions `f2` and `l2`.
        """
        tensors = {
            f"edits.{index}.{name}": _own_copy(tensor)
            for index, edit in enumerate(edits)
            for name, tensor in edit.tensors.items()
        }
        specs = [_spec(edit) for edit in edits]
        manifest = validate_manifest(
            {
                "base": base,
                "edits": specs,
                "template": template,
                "system": system,
                "completion_prefix": completion_prefix,
                "texts": texts,
                "labels": None if labels is None else list(labels),
                "description": description,
                "license": license,
                "metrics": dict(metrics or {}),
                "training": dict(training or {}),
            }
        )
        infos = {
            name: TensorInfo(_dtype_name(tensor), tuple(tensor.shape))
            for name, tensor in tensors.items()
        }
        check_layout(manifest, infos)
        intervention = cls(manifest, tensors)
        intervention.canonical()
        return intervention

    def canonical(self) -> tuple[CanonicalEdit, ...]:
        """Check the tensors' values and convert every edit, in the manifest's order; packed."""
        return canonical_edits(self.manifest, self.tensors)


def validate_manifest(fields: Mapping[str, object]) -> Manifest:
    """Make a manifest from plain values; raises `InvalidFile` that names the field at fault."""
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        where = f"manifest, {place[:200]}" if place else "manifest"
        reason = first["msg"].removeprefix("Value error, ").removesuffix(".")
        raise InvalidFile(f"{where}: {reason}.") from None


def check_layout(manifest: Manifest, infos: Mapping[str, TensorInfo]) -> None:
    """Check that exactly the tensors that the manifest's edits need are there, in dtype and shape.

    Raises `InvalidFile`.
    """
    sound: set[tuple[object, ...]] = set()  # most edits of a file are alike
    for index, own in enumerate(by_edit(len(manifest.edits), infos)):
        spec, width = manifest.edits[index], manifest.width_of(index)
        alike = (spec.kind, spec.dtype, width, *own.items())
        if alike not in sound:
            check_tensors(spec.kind, f"edits.{index}.", own, dtype=spec.dtype, width=width)
            sound.add(alike)


def _spec(edit: Edit) -> dict[str, object]:
    layer, component = normalise(edit.layer, edit.component)
    return {
        "layer": layer,
        "component": component,
        "kind": edit.kind,
        "positions": edit.positions,
        "dtype": _stored_dtype(edit),
        "act": None if edit.act == "linear" else edit.act,
        "width": edit.width,
        "suffix_offset": edit.suffix_offset,
    }


def _own_copy(tensor: Tensor) -> Tensor:
    # A copy, so that later changes and shared storage of the caller's tensors do not matter.
    return tensor.detach().to(device="cpu", copy=True, memory_format=torch.contiguous_format)


def _dtype_name(tensor: Tensor) -> str:
    return name_of(tensor.dtype)


def _stored_dtype(edit: Edit) -> str:
    specs = KINDS[edit.kind].tensors if edit.kind in KINDS else {}
    for name, tensor in edit.tensors.items():
        if name in specs and not specs[name].orthonormal:
            return _dtype_name(tensor)
    return "float32"
