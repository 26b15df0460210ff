"""Features of sparse autoencoders: of SAELens's folders, and of Gemma Scope's `params.npz`.

Steering along a feature adds its row of the decoder, as it is, to the activations that the SAE
reads. No more than that row is read.
"""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reft_runtime.errors import ConfigError, InvalidFile, ReftError
from reft_runtime.interventions.foreign.steering import (
    PLAIN,
    Layers,
    one_layer,
    read_object,
    steering_edits,
    width_of,
)
from reft_runtime.interventions.format.components import normalise
from reft_runtime.interventions.format.intervention import Intervention
from reft_runtime.interventions.format.manifest import BaseShape

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
DECODER = "W_dec"

ARCHITECTURES = (
    "standard",
    "gated",
    "topk",
    "abstopk",
    "batchtopk",
    "matryoshka_batchtopk",
    "jumprelu",
    "matching_pursuit",
)
"""Those of SAELens that write back to where they read, row by row of W_dec."""

_AT_RUN_TIME = (None, False, "none", "layer_norm", "constant_norm_rescale")
"""What `normalize_activations` may be; any other normalisation is to be folded into W_dec."""

_HOOK = re.compile(r"blocks\.(\d{1,5})\.([a-z_.]+)")
_COMPONENTS = {
    "hook_resid_pre": "block_input",
    "hook_resid_post": "block_output",
    "attn.hook_z": "attention_value_output",
}
_IN_PLAIN = {"hook_attn_out": "attention_output", "hook_mlp_out": "mlp_output"}
"""Where a block adds them to the residual stream; elsewhere a norm may come before."""


def is_sae(path: Path) -> bool:
    """Whether a path is one that `import_sae` reads."""
    if path.name == WEIGHTS:
        return True
    if path.suffix.lower() == ".npz":
        try:
            with zipfile.ZipFile(path) as archive:
                return f"{DECODER}.npy" in archive.namelist()
        except Exception:  # damaged bytes raise what its parts raise; the next reader tells of them
            return False
    return any(os.path.exists(path / name) for name in (CONFIG, WEIGHTS))


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
    """Read one feature: its row of W_dec is added where the SAE reads.

    SAELens's `cfg.json` says where that is; a `params.npz` needs `layer`, and takes `block_output`
    for the `component` unless another one is given. `component` also names a place that the hook of
    a `cfg.json` does not, and `scale` multiplies the row. `base` is the base model's shape
    (`reft_runtime.base_shape`). Raises `ConfigError` and `InvalidFile`.
    """
    path, layer = Path(source), one_layer(layer)
    training: dict[str, Any] = {"source": "SAE", "feature": feature}
    if path.suffix.lower() == ".npz":
        if layer is None:
            raise ConfigError(f"layer: {path} does not say it; give --layer.", param="layer")
        component = component or "block_output"
        row = _of_numpy(path, feature)
    else:
        folder = path.parent if path.name == WEIGHTS else path
        config = read_object(folder / CONFIG)
        layer, component = _place(folder / CONFIG, config, base, layer, component)
        row = _of_safetensors(folder / WEIGHTS, feature)
        metadata = _metadata(folder / CONFIG, config)
        training |= {key: str(metadata.get(key))[:200] for key in ("model_name", "hook_name")}
    width = width_of(component, base)
    if width not in (None, len(row)):
        raise InvalidFile(
            f"{path}: {DECODER} is {len(row)} wide, but {component} of {base.model} {width}; check"
            " --base, and --component."
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
    return Intervention.build(base, edits, template=template, training=training)


def _place(
    path: Path, config: dict[str, Any], base: BaseShape, layer: int | None, component: str | None
) -> tuple[int, str]:
    """The layer and the component that an SAE reads and writes, from its cfg.json."""
    architecture = config.get("architecture", "standard")
    if architecture not in ARCHITECTURES:
        raise InvalidFile(
            f"{path}: architecture {str(architecture)[:80]!r} is not served; only those that write"
            f" where they read are: {', '.join(ARCHITECTURES)}."
        )
    normalised = config.get("normalize_activations")
    if normalised not in _AT_RUN_TIME:
        raise InvalidFile(
            f"{path}: normalize_activations is {str(normalised)[:80]!r}; fold it into the weights"
            " with SAELens (fold_activation_norm_scaling_factor, fold_activation_whitening), and"
            " save that."
        )
    metadata = _metadata(path, config)
    hook, head = metadata.get("hook_name"), metadata.get("hook_head_index")
    if head is not None:
        raise InvalidFile(f"{path}: hook_head_index is {str(head)[:80]!r}; single heads are not.")
    if not isinstance(hook, str):
        raise InvalidFile(f"{path}: hook_name: missing.")
    match = _HOOK.fullmatch(hook)
    found: tuple[int, str | None] | None = None
    if metadata.get("model_class_name") == "AutoModelForCausalLM":  # a module of transformers'
        path_of_module = re.sub(r"\.(\d+)", r"[\1]", hook) + ".output"
        found = normalise(-1, path_of_module) if path_of_module.isascii() else None
    elif match is not None:
        plain = _IN_PLAIN if base.architecture in PLAIN else {}
        found = int(match[1]), (_COMPONENTS | plain).get(match[2])
    if found is None or found[0] < 0:
        raise InvalidFile(f"{path}: hook_name {hook[:80]!r} is in no block.")
    if layer not in (None, found[0]):
        raise ConfigError(
            f"layer: {path} is of {hook[:80]}; leave it out, or give {found[0]}.", param="layer"
        )
    component = component or found[1]
    if component is None:
        raise ConfigError(
            f"component: {path} is of {hook[:80]}, and where that is in a {base.architecture} is"
            f" not known; give --component, such as model.layers[{found[0]}].NORM.output for what"
            " a norm gives.",
            param="component",
        )
    return found[0], component


def _metadata(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What is said of the model; before SAELens 6 it was among the other settings."""
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise InvalidFile(f"{path}: metadata: must be an object.")
    found = {**config, **metadata}
    found.setdefault("hook_name", config.get("hook_point"))
    found.setdefault("hook_head_index", config.get("hook_point_head_index"))
    return found


def _of_safetensors(path: Path, feature: int | None) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            if DECODER not in file.keys():  # noqa: SIM118 (it is no dictionary)
                raise InvalidFile(f"{path}: has no {DECODER}.")
            rows = file.get_slice(DECODER)
            row: Tensor = rows[_index(path, rows.get_shape(), feature)]
    except FileNotFoundError:
        raise ConfigError(f"{path}: No such file or directory.", param="source") from None
    except (OSError, SafetensorError) as error:
        raise InvalidFile(f"{path}: not readable as safetensors: {str(error)[:200]}.") from None
    if not row.is_floating_point():
        raise InvalidFile(f"{path}: {DECODER} must be floats.")
    return row


def _of_numpy(path: Path, feature: int | None) -> Tensor:
    # np.load reads whole arrays, of gigabytes.
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{DECODER}.npy") as file:
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, by_column, dtype = read(file)
            index = _index(path, list(shape), feature)
            if by_column or dtype.kind != "f":
                raise InvalidFile(f"{path}: {DECODER} must be floats, row by row.")
            size = shape[1] * dtype.itemsize
            file.seek(index * size, 1)
            data = file.read(size)
            if len(data) < size:
                raise ValueError("it is cut off")
    except ReftError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}.", param="source") from None
    except Exception as error:  # damaged bytes raise what numpy's parts and zlib raise
        raise InvalidFile(
            f"{path}: not readable as numpy's arrays of numbers: {str(error)[:200]}."
        ) from None
    return torch.from_numpy(np.frombuffer(data, dtype).astype(np.float32))


def _index(path: Path, shape: list[int], feature: int | None) -> int:
    if len(shape) != 2:
        raise InvalidFile(f"{path}: {DECODER} has {len(shape)} dimensions; it must have two.")
    if feature is None or not 0 <= feature < shape[0]:
        given = "" if feature is None else f" {feature};"
        raise ConfigError(
            f"feature:{given} {path} has 0 to {shape[0] - 1}; say which (--feature).",
            param="feature",
        )
    return feature
