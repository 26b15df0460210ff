"""Says in words what edits do, and where."""

from __future__ import annotations

from collections.abc import Sequence

from reft_runtime.interventions.format.manifest import Manifest


def in_words(manifest: Manifest) -> str:
    """Its edits, such as `14 steering edits of block_output, layers 8 to 21, all positions`."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for edit in manifest.edits:
        # Of a module's path the layer is said apart, as that of a named component.
        component = edit.component.replace(f"[{edit.layer}].", "[N].", 1)
        groups.setdefault((edit.kind, component, str(edit.positions)), []).append(edit.layer)
    said = []
    for (kind, component, positions), layers in groups.items():
        edits = f"1 {kind} edit" if len(layers) == 1 else f"{len(layers)} {kind} edits"
        where = "all positions" if positions == "all" else f"positions {positions}"
        said.append(f"{edits} of {component}, {_numbers(layers)}, {where}")
    return "; ".join(said)


def _numbers(layers: Sequence[int]) -> str:
    numbers = sorted(set(layers))
    if len(numbers) == 1:
        return f"layer {numbers[0]}"
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"layers {numbers[0]} to {numbers[-1]}"
    return f"layers {', '.join(map(str, numbers))}"
