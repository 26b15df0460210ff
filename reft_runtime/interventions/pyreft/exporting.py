"""Writes an intervention to a folder that pyreft loads."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.interventions.format.intervention import Intervention
from reft_runtime.interventions.format.kinds import KINDS
from reft_runtime.interventions.format.manifest import EditSpec
from reft_runtime.interventions.pyreft.classes import CLASSES, exportable, state_of
from reft_runtime.interventions.pyreft.names import Place
from reft_runtime.interventions.pyreft.unpickle import BASE, ORIGINAL, PLAIN

_MODULES = {"AdditionIntervention": "pyvene.models.interventions"}
_FIELDS = 14
_POSITIONS = re.compile(r"f\d+|(f\d+\+)?l\d+|all")
"""What pyreft's `parse_positions` reads, and `all`: its `generate` without `unit_locations`."""


def export_pyreft(intervention: Intervention, folder: str | Path) -> None:
    """Write `config.json`, `intkey_*.bin` and `args.json`, named as pyvene 0.1.7 and newer do.

    Raises `InvalidFile` for what pyreft cannot say: a kind it has no class for, edits with several
    acts, positions other than fN, lN, fN+lN and all, or neither the same for all edits nor halves.
    Raises `ConfigError` for a folder that exists and is not empty.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: exists and is not an empty folder.", param="to")
    specs = intervention.manifest.edits
    for index, spec in enumerate(specs):
        if not _POSITIONS.fullmatch(text := str(spec.positions)):
            raise InvalidFile(
                f"edits.{index}.positions: pyreft has fN, lN, fN+lN and all, and cannot say"
                f" {text[:80]}; train with one of these to export it."
            )
    order, args = _arguments(specs)
    numbers: Counter[Place] = Counter()
    files: dict[str, dict[str, Tensor]] = {}
    representations, classes, widths = [], [], []
    for index in order:
        spec = specs[index]
        place = Place(0 if "." in spec.component else spec.layer, spec.component)
        name = place.names(numbers[place])[0]
        numbers[place] += 1
        class_name, state, rank = _stored(index, spec, intervention)
        files[name] = state
        fields: list[Any] = [place.layer, place.component, place.unit, place.units, rank]
        fields += [None] * (_FIELDS - len(fields))
        if spec.kind == "steering":
            fields[12] = True  # hidden_source_representation: its source is in the file
        representations.append(fields)
        module = _MODULES.get(class_name, "pyreft.interventions")
        classes.append(f"<class '{module}.{class_name}'>")
        widths.append(intervention.manifest.width_of(index))
    config = {
        "intervention_constant_sources": [True] * len(files),
        "intervention_dimensions": widths,
        "intervention_types": classes,
        "mode": "parallel",
        "representations": representations,
        "sorted_keys": [name.removeprefix("intkey_").removesuffix(".bin") for name in files],
    }
    written = {name: _saved(state) for name, state in files.items()}
    for name, values in (("args.json", args), ("config.json", config)):
        written[name] = (json.dumps(values, indent=2) + "\n").encode()
    _write(target, written)


def _saved(state: dict[str, Tensor]) -> bytes:
    file = io.BytesIO()  # a disk that is full would be a RuntimeError to torch
    torch.save(state, file)
    return file.getvalue()


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Write all files to an empty or missing folder, or leave it as it was."""
    there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError:
        for name in files:
            (folder / name).unlink(missing_ok=True)
        if not there:
            folder.rmdir()
        raise


def _stored(
    index: int, spec: EditSpec, intervention: Intervention
) -> tuple[str, dict[str, Tensor], int | None]:
    """Class, state dict and rank of one edit."""
    if not exportable(spec.kind):
        raise InvalidFile(f"edits.{index}.kind: pyreft has no class for {spec.kind}.")
    prefix = f"edits.{index}."
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in intervention.tensors.items()
        if name.startswith(prefix)
    }
    state = state_of(spec.kind, tensors)
    rank = None
    if PLAIN in state:
        rank = state[PLAIN].shape[1]
        if spec.kind != "loreft":  # only the class of LoReFT stores R itself
            state.update(_parametrised(state.pop(PLAIN)))
    elif "W" in tensors:
        rank = tensors["W"].shape[0]
    if spec.kind != "loreft":
        width = torch.tensor(intervention.manifest.width_of(index))
        state.update(embed_dim=width, interchange_dim=width.clone())
    class_name = next(name for name, kind in CLASSES.items() if kind == spec.kind)
    return class_name, state, rank


def _arguments(specs: Sequence[EditSpec]) -> tuple[list[int], dict[str, Any]]:
    """The order in pyreft's list, and what goes into args.json."""
    acts = {spec.act for spec in specs if KINDS[spec.kind].has_act} or {None}
    offsets = {spec.suffix_offset for spec in specs}
    for name, values in (("act", acts), ("suffix_offset", offsets)):
        if len(values) > 1:
            raise InvalidFile(f"edits.*.{name}: pyreft has one for all edits, not several.")
    texts = sorted({str(spec.positions) for spec in specs})
    args: dict[str, Any] = {"position": texts[0], "share_weights": True, "act_fn": acts.pop()}
    if offset := offsets.pop():
        args["suffix_offset"] = offset
    order = list(range(len(specs)))
    if len(texts) == 1:
        return order, args
    heads = [index for index in order if str(specs[index].positions) == texts[0]]
    tails = [index for index in order if str(specs[index].positions) == texts[-1]]
    text = "+".join(texts)
    if len(heads) != len(tails) or not re.fullmatch(r"f\d+\+l\d+", text):
        raise InvalidFile(
            "edits.*.positions: pyreft has the same for all edits, or fN for one half of them and"
            f" lN for the other; not {', '.join(texts)[:200]}."
        )
    return heads + tails, args | {"position": text, "share_weights": False}


def _parametrised(R: Tensor) -> dict[str, Tensor]:
    """The parametrised pair of tensors for R [d, r], as torch makes it: base @ I = R.

    They have R's dtype, which says how exact its columns are.
    """
    d, r = R.shape
    base = torch.linalg.qr(R.float(), mode="complete").Q
    base[:, :r] = R
    original = torch.zeros(d, r, dtype=R.dtype)
    original.fill_diagonal_(-1)
    return {ORIGINAL: original, BASE: base.to(R.dtype)}
