"""Plain vectors that numpy or torch saved: read as steering edits.

A file holds one vector [d], a table with a row for each layer, or vectors by the layer's number. In
a table of transformers' `hidden_states`, one row more than there are layers, the first row is that
of the embeddings, and is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.interventions.control_vectors import check_regular, steering_edits
from reft_runtime.interventions.format.intervention import Intervention
from reft_runtime.interventions.format.manifest import BaseShape
from reft_runtime.interventions.pyreft.states import read_states
from reft_runtime.interventions.pyreft.unpickle import ALONE

OF_NUMPY = (".npy", ".npz")
"""How names of numpy's files end; all others are torch's."""

MOST_BYTES = 1 << 28
"""Most bytes of numpy's arrays, as of torch's tensors: a compressed file may hold a thousand times
its size."""

_LAYER = re.compile(r"[0-9]{1,5}")


def import_vectors(
    source: str | Path,
    *,
    base: BaseShape,
    layer: int | None = None,
    positions: str = "all",
    template: str | None = None,
) -> Intervention:
    """Read vectors, each of which is added to the output of its layer, counted from 0.

    A vector alone needs the `layer`; of several it chooses one. torch's files are read by a process
    of their own, with `weights_only`. `base` is the base model's shape (`reft_runtime.base_shape`).
    Raises `ConfigError` and `InvalidFile`.
    """
    path = Path(source)
    check_regular(path)
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.", param="source") from None
    found = _of_numpy(path) if path.suffix.lower() in OF_NUMPY else read_states([path])[0]
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InvalidFile(f"{path}: holds {kind} numbers{_named(name)}; save floats.")
    single = found[ALONE] if found.keys() == {ALONE} else None
    by_layer = _by_name(path, found, base) if single is None else _rows(path, single, base, layer)
    edits = steering_edits(path, by_layer, base, positions, layer)
    return Intervention.build(base, edits, template=template, training={"source": "vector"})


def _rows(path: Path, tensor: Tensor, base: BaseShape, layer: int | None) -> dict[int, Tensor]:
    """The vectors of a tensor alone, by layer."""
    rows = _flat(tensor)
    if rows.shape == (base.hidden_size,):
        if layer is None:
            raise ConfigError(
                f"layer: {path} holds one vector; say to which layer's output it is added.",
                param="layer",
            )
        return {layer: rows}
    if rows.ndim == 2 and rows.shape[1] == base.hidden_size:
        if len(rows) == base.num_layers + 1:
            rows = rows[1:]
        if len(rows) == base.num_layers:
            return dict(enumerate(rows))
    raise InvalidFile(
        f"{path}: has {_size(tensor)} numbers, but {base.model} is {base.hidden_size} wide and has"
        f" {base.num_layers} layers; give a vector of {base.hidden_size}, a table of"
        f" {base.num_layers} x {base.hidden_size}, or vectors by the number of their layer."
    )


def _by_name(path: Path, found: Mapping[str, Tensor], base: BaseShape) -> dict[int, Tensor]:
    """Vectors by layer, from those by the text of its number."""
    vectors: dict[int, Tensor] = {}
    for name, tensor in found.items():
        if not _LAYER.fullmatch(name):
            raise InvalidFile(
                f"{path}: {name[:80]!r} is no layer's number; name each vector by it, such as '14'."
            )
        vector = _flat(tensor)
        if vector.shape != (base.hidden_size,):
            raise InvalidFile(
                f"{path}: has {_size(tensor)} numbers{_named(name)}, but {base.model} is"
                f" {base.hidden_size} wide; check --base."
            )
        if int(name) in vectors:
            raise InvalidFile(f"{path}: has two vectors for layer {int(name)}; keep one.")
        vectors[int(name)] = vector
    return vectors


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
        reason = (str(error) or type(error).__name__).splitlines()[0][:200].rstrip(".")
        raise InvalidFile(f"{path}: not readable as numpy's arrays of numbers: {reason}.") from None


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
