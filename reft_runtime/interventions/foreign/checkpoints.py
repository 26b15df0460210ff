"""Edits that lie among a model's own weights in a checkpoint: LoFiT's, JoLA's and steerling's.

No more than the edits is read, however large the files are.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.interventions.foreign import heads, steerling
from reft_runtime.interventions.foreign.damage import check_floats, not_safetensors
from reft_runtime.interventions.foreign.folders import folder_of
from reft_runtime.interventions.format.intervention import Intervention
from reft_runtime.interventions.format.manifest import BaseShape
from reft_runtime.interventions.pyreft.states import read_named
from reft_runtime.interventions.pyreft.unpickle import plain_state

_FILE = re.compile(r"(?:pytorch_)?model(?:-\d{5}-of-(?P<count>\d{5}))?\.(?P<kind>safetensors|bin)")
_WANTED = f"{heads.NAMES}|{steerling.NAMES}"


def is_checkpoint(path: Path) -> bool:
    """Whether this is a folder with a model's weights, or a file of them by its name."""
    if not os.path.isdir(path):
        return _FILE.fullmatch(path.name) is not None
    try:
        names = os.listdir(path)
    except OSError:
        return False
    # pyreft, too, can save its model, beside its interventions.
    pyreft = any(name.startswith(("intkey_", "intervenable_model")) for name in names)
    return any(map(_FILE.fullmatch, names)) and not pyreft


def import_checkpoint(
    source: str | Path,
    *,
    base: BaseShape,
    act: str | None = None,
    positions: str | None = None,
    template: str | None = None,
) -> Intervention:
    """Read the edits in a folder that a Trainer saved, whole or in shards, or in a file of it.

    `positions` are `all` unless others are given, and `act` is the nonlinearity of steerling's
    adapters, which is not recorded. Pickles are read by a process of their own. `base` is the base
    model's shape (`reft_runtime.base_shape`). Raises `ConfigError` and `InvalidFile`.
    """
    path = Path(source)
    found = _read(_files(path))
    if not found:
        raise InvalidFile(
            f"{path}: a model's weights, without edits of LoFiT, JoLA or steerling among them; only"
            " edits can be imported."
        )
    if not steerling.has_edits(found):
        if act is not None:
            raise ConfigError("act: scaled and moved heads have none; leave it out.", param="act")
        edits, training = heads.head_edits(found, base, positions)
    else:
        edits, training = steerling.steering(found, base, positions, act)
        if positions is None:
            training["assumed"] = steerling.ASSUMED
    return Intervention.build(base, edits, template=template, training=training)


def _files(path: Path) -> list[Path]:
    """The files of the save that was named, or of the first that is there, the whole one first."""
    folder = folder_of(path)
    there = [match for name in sorted(os.listdir(folder)) if (match := _FILE.fullmatch(name))]
    named = None if os.path.isdir(path) else _FILE.fullmatch(path.name)
    one = named or min(there, key=lambda each: (each["kind"] == "bin", each["count"] or ""))
    files = [each for each in there if each.group("kind", "count") == one.group("kind", "count")]
    count = int(one["count"] or 1)
    if len(files) != count:
        raise InvalidFile(
            f"{folder}: has {len(files)} of the {count} files that {files[0][0]} is one of; its"
            " edits may be in any."
        )
    return [folder / each[0] for each in files]


def _read(files: list[Path]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if files[0].suffix == ".bin":
        states = read_named(files, _WANTED)
    else:
        states = [_of_safetensors(file) for file in files]
    for file, state in zip(files, states, strict=True):
        for name, tensor in state.items():
            check_floats(file, tensor, name)
            found[name] = tensor
    return found


def _of_safetensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise InvalidFile(f"{file}: not a regular file.")  # whoever reads a pipe may wait for ever
    try:
        with safe_open(file, "pt") as content:
            names: list[str] = list(content.keys())
            wanted = [name for name in names if re.fullmatch(_WANTED, name)]
            return plain_state({name: content.get_tensor(name) for name in wanted})
    except (OSError, SafetensorError) as error:
        raise not_safetensors(file, error) from None
