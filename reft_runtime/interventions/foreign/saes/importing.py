"""One feature of a sparse autoencoder as a steering edit.

Steering along a feature adds its row of the decoder, as it is, to the activations that the SAE
reads. No more than that row is read.
"""

from __future__ import annotations

import os
from pathlib import Path

from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.interventions.foreign.saes.layouts import LAYOUTS, Layout, Place
from reft_runtime.interventions.foreign.saes.rows import read_row
from reft_runtime.interventions.foreign.steering import (
    Layers,
    one_layer,
    steering_edits,
    width_of,
)
from reft_runtime.interventions.format.intervention import Intervention
from reft_runtime.interventions.format.manifest import BaseShape


def is_sae(path: Path) -> bool:
    """Whether a path is one that `import_sae` reads."""
    return _layout(path) is not None


def import_sae(
    source: str | Path,
    *,
    base: BaseShape,
    feature: int | None = None,
    layer: Layers = None,
    component: str | None = None,
    positions: str = "all",
    scale: float = 1.0,
    template: str | None = None,
) -> Intervention:
    """Read one feature: its row of the decoder is added where the SAE reads.

    Most layouts say where that is. What one does not is to be given: the `layer`, and the
    `component` if it is not `block_output`. `component` also names a place that is said in another
    library's words, and `scale` multiplies the row. `base` is the base model's shape
    (`reft_runtime.base_shape`). Raises `ConfigError` and `InvalidFile`.
    """
    path, layer = Path(source), one_layer(layer)
    layout = _layout(path)
    if layout is None:
        raise ConfigError(f"{path}: is no SAE of a known layout.", param="source")
    folder = path if os.path.isdir(path) else path.parent
    said = layout.place(folder / layout.config if layout.config else path, base)
    layer, component = _where(path, base, said, layer, component)
    weights = folder / layout.weights if layout.weights else path
    row = said.scale * read_row(weights, layout.decoders, feature).float()
    width = width_of(component, base)
    if width not in (None, len(row)):
        raise InvalidFile(
            f"{path}: its decoder is {len(row)} wide, but {component} of {base.model} {width};"
            " check --base, and --component."
        )
    edits = steering_edits(
        path,
        {layer: row},
        base,
        positions=positions,
        layers=layer,
        scale=scale,
        component=component,
    )
    training = {"source": "SAE", "feature": feature, **said.about}
    return Intervention.build(base, edits, template=template, training=training)


def _layout(path: Path) -> Layout | None:
    return next((each for each in LAYOUTS if each.fits(path)), None)


def _where(
    path: Path, base: BaseShape, said: Place, layer: int | None, component: str | None
) -> tuple[int, str]:
    """The layer and the component, of what a layout says and what is given."""
    if said.layer is None and layer is None:
        raise ConfigError(f"layer: {path} does not say it; give --layer.", param="layer")
    if said.layer is not None and layer not in (None, said.layer):
        raise ConfigError(
            f"layer: {path} is of {said.words}; leave it out, or give {said.layer}.", param="layer"
        )
    found = layer if said.layer is None else said.layer
    assert found is not None
    component = component or said.component
    if component is None:
        raise ConfigError(
            f"component: {path} is of {said.words}, and where that is in a {base.architecture} is"
            " not known; give --component, by the names of the model's modules, such as"
            f" model.layers[{found}].NORM.output in a Llama for what a norm gives.",
            param="component",
        )
    return found, component
