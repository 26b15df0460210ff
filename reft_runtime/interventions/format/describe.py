"""Describes a file: its edits, their sizes, and how exact its rotations are."""

from __future__ import annotations

from typing import Any

from reft_runtime.interventions.format.canonical import canonical_edits
from reft_runtime.interventions.format.file import tensors_of
from reft_runtime.interventions.format.header import header_of
from reft_runtime.interventions.format.kinds import KINDS, by_edit, orthonormal_error
from reft_runtime.machine.dtypes import name_of


def describe(data: bytes, base_parameters: int | None = None) -> dict[str, Any]:
    """Describe a whole file in plain values. Raises `InvalidFile` if it is broken.

    `share` is its number of parameters divided by `base_parameters`. For every edit,
    `orthonormality_error` is max |RᵀR - I|, None for a kind without such a tensor.
    """
    header = header_of(data)
    manifest, stored = header.manifest, tensors_of(header, data)
    edits: list[dict[str, Any]] = []
    for spec, canonical, tensors in zip(
        manifest.edits,
        canonical_edits(manifest, stored),
        by_edit(len(manifest.edits), stored),
        strict=True,
    ):
        errors = [
            orthonormal_error(tensors[name])
            for name, expected in KINDS[spec.kind].tensors.items()
            if expected.orthonormal
        ]
        edits.append(
            {
                "layer": spec.layer,
                "component": spec.component,
                "kind": spec.kind,
                "positions": str(spec.positions),
                "suffix_offset": spec.suffix_offset,
                "act": spec.act,
                "dtype": spec.dtype,
                "directions": canonical.directions,
                "parameters": sum(tensor.numel() for tensor in tensors.values()),
                "orthonormality_error": max(errors) if errors else None,
                "tensors": {
                    name: {
                        "dtype": name_of(tensor.dtype),
                        "shape": list(tensor.shape),
                    }
                    for name, tensor in sorted(tensors.items())
                },
            }
        )
    parameters = sum(edit["parameters"] for edit in edits)
    return {
        "digest": header.digest,
        "size_bytes": header.size_bytes,
        "parameters": parameters,
        "share": None if base_parameters is None else parameters / base_parameters,
        "edits": edits,
        "manifest": manifest.model_dump(mode="json"),
    }
