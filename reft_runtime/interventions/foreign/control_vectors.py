"""Control vectors in GGUF, as repeng, EasySteer and llama.cpp have them: read, and written.

`direction.L` [d] is added to the output of block L, counted from 0, at every token. llama.cpp has
no block 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.interventions.foreign.steering import Layers, steering_edits
from reft_runtime.interventions.format.intervention import Intervention
from reft_runtime.interventions.format.manifest import BaseShape

ARCHITECTURES = ("controlvector", "steeringvector")
"""What `general.architecture` says of a control vector; EasySteer has also written the second."""

_NAME = re.compile(r"direction\.([0-9]{1,5})")

_MOST = 10_000
"""Most fields, and most tensors, of a file that is read: each takes 0.1 ms."""


def import_control_vector(
    source: str | Path,
    *,
    base: BaseShape,
    layer: Layers = None,
    positions: str = "all",
    scale: float = 1.0,
    template: str | None = None,
) -> Intervention:
    """Read a GGUF file of directions, one for each block that is steered; `layer` chooses.

    Strength 1 is then their coefficient `scale`. `base` is the base model's shape
    (`reft_runtime.base_shape`). Raises `InvalidFile`, and `ConfigError` for a wrong `layer`.
    """
    fields, directions = _read(Path(source))
    architecture = str(fields.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        raise InvalidFile(f"{source}: holds a model ({architecture[:80]}), no control vector.")
    for name, value in fields.items():
        if name.endswith(".mode") and value != "add":
            raise InvalidFile(
                f"{source}: {name[:80]} is {str(value)[:80]!r}; only directions that are added can"
                " be served."
            )
    vectors = {}
    for name, data in directions.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise InvalidFile(f"{source}: {name[:80]!r} is no direction of a block.")
        block = int(match[1])
        if block >= base.num_layers or data.shape != (base.hidden_size,):
            raise InvalidFile(
                f"{source}: {name} has {' x '.join(map(str, data.shape))} numbers, but {base.model}"
                f" has blocks 0 to {base.num_layers - 1}, {base.hidden_size} wide; check --base."
            )
        if data.dtype.kind != "f":
            raise InvalidFile(f"{source}: {name} is quantised; write it as F32.")
        if block in vectors:
            raise InvalidFile(f"{source}: has two directions of block {block}.")
        vectors[block] = torch.from_numpy(data.astype(np.float32))
    edits = steering_edits(source, vectors, base, positions=positions, layers=layer, scale=scale)
    training = {"source": "control vector", "model_hint": fields.get(f"{architecture}.model_hint")}
    return Intervention.build(base, edits, template=template, training=training)


def export_control_vector(intervention: Intervention, path: str | Path) -> None:
    """Write an intervention that adds vectors to the outputs of blocks, at all positions.

    Raises `InvalidFile` for one that does anything else, and `ConfigError` for a file that exists.
    """
    from gguf import GGUFWriter
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    directions: dict[int, Tensor] = {}
    for index, edit in enumerate(intervention.canonical()):
        vector = None if edit.rank or edit.gain is not None else edit.offset
        if vector is None or edit.component != "block_output" or not edit.positions.everything:
            raise InvalidFile(
                f"edits.{index}: a control vector adds one vector to a block's output at all"
                " positions, and nothing else."
            )
        if edit.layer == 0:
            raise InvalidFile(f"edits.{index}.layer: llama.cpp steers no block 0.")
        before = directions.get(edit.layer)
        directions[edit.layer] = vector if before is None else before + vector
    if Path(path).exists():
        raise ConfigError(f"{path}: exists already.", param="to")
    base = intervention.manifest.base
    types = {name: kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    writer = GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", types.get(base.architecture, base.architecture))
    writer.add_uint32("controlvector.layer_count", len(directions))
    for layer, vector in sorted(directions.items()):
        writer.add_tensor(f"direction.{layer}", vector.numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError:
        with suppress(OSError):
            writer.close()
        Path(path).unlink(missing_ok=True)
        raise


def _read(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The fields of a GGUF file that are no lists, and its tensors."""
    from gguf import GGUFReader

    class Bounded(GGUFReader):
        """Reads no more than there is: a list may say that it has 2**62 items, all empty."""

        def _get(self, offset: Any, dtype: Any, count: Any = 1, *order: Any, **options: Any) -> Any:
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it is cut off, or says that it has more than it has")
            return super()._get(offset, dtype, count, *order, **options)

        def _build_fields(self, offs: Any, count: Any) -> Any:
            return super()._build_fields(offs, _checked(count, "fields"))

        def _build_tensor_info(self, offs: Any, count: Any) -> Any:
            return super()._build_tensor_info(offs, _checked(count, "tensors"))

    try:
        reader = Bounded(path)
        single = {name: field for name, field in reader.fields.items() if len(field.types) == 1}
        fields = {name: field.contents() for name, field in single.items()}
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.", param="source") from None
    except Exception as error:  # it raises what its parts raise of damaged bytes
        raise InvalidFile(f"{path}: not readable as GGUF: {str(error)[:200]}.") from None
    return fields, {tensor.name: tensor.data for tensor in reader.tensors}


def _checked(count: Any, what: str) -> Any:
    """How many there are of something; raises `ValueError` if nobody needs so many."""
    if count > _MOST:
        raise ValueError(f"it has {count} {what}, and at most {_MOST} are read")
    return count
