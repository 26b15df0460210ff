"""Plain vectors that numpy, torch or safetensors saved: read as steering edits.

A file holds one vector [d], a table with a row for each layer, vectors by the layer's number, or a
table with a row for each feature, of which one is chosen. In a table of transformers'
`hidden_states`, one row more than there are layers, the first row is that of the embeddings, and is
left out. What steering-vectors pickles says of which modules its vectors are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.interventions.foreign.damage import check_floats, not_numpy, not_safetensors
from reft_runtime.interventions.foreign.steering import (
    PLAIN,
    Layers,
    check_there,
    chosen,
    steering_edits,
    width_of,
)
from reft_runtime.interventions.format.intervention import Intervention
from reft_runtime.interventions.format.manifest import BaseShape
from reft_runtime.interventions.pyreft.states import read_states
from reft_runtime.interventions.pyreft.unpickle import ALONE

OF_NUMPY = (".npy", ".npz")
OF_SAFETENSORS = ".safetensors"
SUFFIXES = (*OF_NUMPY, OF_SAFETENSORS, ".pt", ".pth")
"""How names of files end; the last two are torch's."""

MOST_BYTES = 1 << 28
"""Most bytes of numpy's arrays, as of torch's tensors: a compressed file may hold a thousand times
its size."""

_LAYER = re.compile(r"(?:layer_|([a-z_]+)\.)?([0-9]{1,5})")
"""`14`, saklas's `layer_14`, and `decoder_block.14`: see `unpickle.read_state`."""

_MODULES = {"decoder_block": "block_output", "self_attn": "attention_output", "mlp": "mlp_output"}
"""By `layer_type` of steering-vectors."""

_NORMS = {"input_layernorm": "attention_input", "post_attention_layernorm": "mlp_input"}
"""What reads what they give in plain architectures, and nothing else does."""


def import_vectors(
    source: str | Path,
    *,
    base: BaseShape,
    layer: Layers = None,
    component: str | None = None,
    feature: int | None = None,
    positions: str = "all",
    scale: float = 1.0,
    template: str | None = None,
) -> Intervention:
    """Read vectors, each of which is added to the output of its layer, counted from 0.

    A vector alone needs the `layer`; of several it chooses one, or some. `component` is another
    place of the layer, and `feature` the row of a table that has one for each feature. `scale`
    multiplies all of them. torch's files are read by a process of their own, with `weights_only`.
    `base` is the base model's shape (`reft_runtime.base_shape`). Raises `ConfigError` and
    `InvalidFile`.
    """
    path = Path(source)
    check_there(path)
    found = _read(path)
    for name, tensor in found.items():
        check_floats(path, tensor, "" if name == ALONE else name)
    module, by_number = (None, {}) if ALONE in found else _by_name(path, found)
    place = component or _component(path, module, base)
    width = width_of(place, base)
    if ALONE in found:
        vectors = _rows(path, found[ALONE], base, layer, width, feature)
    elif feature is not None:
        raise ConfigError(
            f"feature: {path} holds vectors by layer, no table with a row for each feature; leave"
            " it out.",
            param="feature",
        )
    else:
        vectors = {number: _vector(path, *each, base, width) for number, each in by_number.items()}
    edits = steering_edits(
        path, vectors, base, positions=positions, layers=layer, scale=scale, component=place
    )
    return Intervention.build(base, edits, template=template, training={"source": "vector"})


def _read(path: Path) -> dict[str, Tensor]:
    suffix = path.suffix.lower()
    if suffix in OF_NUMPY:
        return _of_numpy(path)
    return _of_safetensors(path) if suffix == OF_SAFETENSORS else read_states([path])[0]


def _component(path: Path, module: str | None, base: BaseShape) -> str:
    """The component whose output a module's is; that of blocks if the file does not say it."""
    known = _MODULES | (_NORMS if base.architecture in PLAIN else {})
    component = known.get(module or "decoder_block")
    if component is None:
        raise ConfigError(
            f"component: {path} is of {module}, and what reads it in a {base.architecture} is not"
            " known; give --component.",
            param="component",
        )
    return component


def _rows(
    path: Path,
    tensor: Tensor,
    base: BaseShape,
    layer: Layers,
    width: int | None,
    feature: int | None,
) -> dict[int, Tensor]:
    """The vectors of a tensor alone, by layer."""
    rows = _flat(tensor)
    if feature is not None:
        if rows.ndim != 2 or not 0 <= feature < len(rows):
            raise ConfigError(
                f"feature: {feature}; {path} has {_size(tensor)} numbers, and a feature is a row.",
                param="feature",
            )
        rows = rows[feature]
    if rows.ndim == 1 and rows.shape[0] == (width or rows.shape[0]):
        if layer is None:
            raise ConfigError(
                f"layer: {path} holds one vector; say to which layer's output it is added.",
                param="layer",
            )
        return dict.fromkeys(chosen(layer, base) or (), rows)
    if rows.ndim == 2 and rows.shape[1] == (width or rows.shape[1]):
        if len(rows) == base.num_layers + 1:
            rows = rows[1:]
        if len(rows) == base.num_layers:
            return dict(enumerate(rows))
    wide = width or base.hidden_size
    raise InvalidFile(
        f"{path}: has {_size(tensor)} numbers, but {base.model} is {wide} wide and has"
        f" {base.num_layers} layers; give a vector of {wide}, a table of {base.num_layers} x"
        f" {wide}, vectors by the number of their layer, or of a table of features one (--feature)."
    )


def _by_name(
    path: Path, found: Mapping[str, Tensor]
) -> tuple[str | None, dict[int, tuple[str, Tensor]]]:
    """The modules that vectors are of, if their names say it; and by layer, each with its name."""
    numbers: dict[int, tuple[str, Tensor]] = {}
    modules = set()
    for name, tensor in found.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            raise InvalidFile(
                f"{path}: {name[:80]!r} is no layer's number; name each vector by it, such as '14'."
            )
        modules.add(match[1])
        if int(match[2]) in numbers:
            raise InvalidFile(f"{path}: has layer {int(match[2])} twice; once will do.")
        numbers[int(match[2])] = (name, tensor)
    if len(modules) > 1:
        raise InvalidFile(f"{path}: {', '.join(map(str, modules))}: only of one kind of modules.")
    return (modules.pop() if modules else None), numbers


def _vector(path: Path, name: str, tensor: Tensor, base: BaseShape, width: int | None) -> Tensor:
    vector = _flat(tensor)
    if vector.ndim != 1 or vector.shape[0] != (width or vector.shape[0]):
        raise InvalidFile(
            f"{path}: has {_size(tensor)} numbers{_named(name)}, but {base.model} is"
            f" {width or base.hidden_size} wide; check --base."
        )
    return vector


def _of_safetensors(path: Path) -> dict[str, Tensor]:
    """Vectors by name; a tensor alone has whatever name it was given."""
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if "reft" in (file.metadata() or {}):
                raise InvalidFile(f"{path}: is an intervention file already; serve it as it is.")
            strange = [name for name in names if not _LAYER.fullmatch(name)]
            if len(names) > 1 and strange:  # such as a model's weights, of gigabytes
                raise InvalidFile(
                    f"{path}: {strange[0][:80]!r} is no layer's number; name each vector by it,"
                    " such as '14'."
                )
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise not_safetensors(path, error) from None
    return {ALONE: tensors[strange[0]]} if strange else tensors


def _of_numpy(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {ALONE: _tensor(loaded)}
            size = sum(one.file_size for one in loaded.zip.infolist())
            if size > MOST_BYTES:
                raise ValueError(f"more than {MOST_BYTES} bytes")
            return {name: _tensor(array) for name, array in loaded.items()}
    except Exception as error:  # damaged bytes raise what numpy's parts raise
        raise not_numpy(path, error) from None


def _tensor(array: NDArray[Any]) -> Tensor:
    """An array as a tensor, if its numbers are floats as float64: torch has not all of numpy's."""
    return torch.from_numpy(array.astype(np.float64) if array.dtype.kind == "f" else array)


def _flat(tensor: Tensor) -> Tensor:
    """Without dimensions of size 1 before the last one."""
    return tensor.reshape([size for size in tensor.shape[:-1] if size != 1] + [*tensor.shape[-1:]])


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "no row of"


def _named(name: str) -> str:
    return "" if name == ALONE else f" for {name[:80]!r}"
