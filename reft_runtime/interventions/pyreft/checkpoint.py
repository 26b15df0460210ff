"""Reads a checkpoint's folder: its configuration, the files it names, and args.json."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from reft_runtime.errors import InvalidFile
from reft_runtime.interventions.format.manifest import MAX_EDITS
from reft_runtime.interventions.pyreft.classes import Stored
from reft_runtime.interventions.pyreft.names import Place, parse_name
from reft_runtime.interventions.pyreft.states import read_states

MAX_JSON_BYTES = 4 << 20

_CLASS = re.compile(r"<class '(?:\w+\.)*(\w+)'>")

# Positional representations by today's names; pyvene 0.0.x had other names and fewer fields.
_PLACE = ["layer", "component", "unit", "max_number_of_units", "low_rank_dimension"]
_REST = ["subspace_partition", "group_key", "intervention_link_key", "moe_key"]
_SOURCES = ["source_representation", "hidden_source_representation"]
_FIELDS = [*_PLACE, "intervention_type", "intervention", *_REST, *_SOURCES, "latent_dim"]
_FIRST_FIELDS = [*_PLACE, *_REST, *_SOURCES]
_RENAMED = {
    "intervenable_layer": "layer",
    "intervenable_representation_type": "component",
    "intervenable_unit": "unit",
    "intervenable_low_rank_dimension": "low_rank_dimension",
    "intervenable_moe": "moe_key",
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The interventions of a checkpoint, in the order of its list.

    Without a config.json they are in the order of their names. `ordered` says whether this order
    agrees with the list's as far as halves go (all first ones of a place, then all second ones).
    `args` is what pyreft's training script wrote beside the checkpoint.
    """

    interventions: tuple[Stored, ...]
    args: Mapping[str, Any]
    ordered: bool


def read_checkpoint(source: Path) -> Checkpoint:
    """Read a folder that pyreft, pyvene or their trainer wrote; raises `InvalidFile`."""
    if not os.path.isdir(source):  # pathlib's raises where a name is too long
        raise InvalidFile(
            f"{source}: not a folder that holds intkey_*.bin, as pyreft's do, and no other file"
            " that can be imported."
        )
    folder = source
    if not [*source.glob("intkey_*")] and (source / "intervenable_model").is_dir():
        folder = source / "intervenable_model"  # a trainer's checkpoint
    files = {path.name: path for path in sorted(folder.glob("intkey_*"))}
    if not files:
        hint = ""
        if (folder / "adapter_config.json").exists():
            hint = " An adapter_config.json is another library's format."
        raise InvalidFile(f"{source}: no intkey_*.bin files, so no pyreft checkpoint.{hint}")
    if len(files) > MAX_EDITS:
        raise InvalidFile(f"{source}: {len(files)} files; at most {MAX_EDITS} are read.")
    args = _args(folder)
    if (folder / "config.json").exists():
        named = _from_config(read_json(folder / "config.json"), files)
        ordered = True
    else:
        named, ordered = _from_names(files, args.get("intervention_type"))
    states = read_states([files[each.file] for each in named])
    stored = tuple(
        Stored(
            each.file, each.place.layer, each.place.component, each.class_name, state, each.width
        )
        for each, state in zip(named, states, strict=True)
    )
    return Checkpoint(stored, args, ordered)


class _Named(NamedTuple):
    """One intervention's file, and what the checkpoint says of it."""

    file: str
    place: Place
    class_name: str | None
    width: int | None = None


def _from_config(config: Mapping[str, Any], files: Mapping[str, Path]) -> list[_Named]:
    first = "intervenable_representations" in config
    listed = config.get("intervenable_representations" if first else "representations")
    listed = [listed] if isinstance(listed, dict) else listed
    if not isinstance(listed, list) or not listed:
        raise InvalidFile("config.json, representations: missing; not a configuration of pyvene's.")
    if config.get("mode", "parallel") != "parallel":
        raise InvalidFile(
            f"config.json, mode: {str(config['mode'])[:40]!r} feeds one intervention to the next,"
            " which cannot be served; only parallel ones can."
        )
    classes = _classes(config, "intervenable_interventions_type" if first else None, len(listed))
    sourced = _per_intervention(config, "intervention_constant_sources", len(listed))
    widths = _per_intervention(config, "intervention_dimensions", len(listed))
    numbers: Counter[Place] = Counter()
    named: list[_Named] = []
    for index, (entry, class_name) in enumerate(zip(listed, classes, strict=True)):
        where = f"config.json, representations.{index}"
        place = _place(_fields(entry, _FIRST_FIELDS if first else _FIELDS, where), where)
        if sourced is not None and sourced[index] is not True:
            raise InvalidFile(
                f"{where}: {class_name} takes its values from the run of another prompt, which"
                " cannot be served."
            )
        names = place.names(numbers[place])
        numbers[place] += 1
        found = [name for name in names if name in files]
        if not found:
            raise InvalidFile(f"{names[0]}: missing, though config.json lists it.")
        width = widths[index] if widths is not None else None
        named.append(_Named(found[0], place, class_name, width if type(width) is int else None))
    left = files.keys() - {each.file for each in named}
    if left:
        raise InvalidFile(f"{min(left)[:200]}: config.json does not list it.")
    return named


def _from_names(files: Mapping[str, Path], class_name: object) -> tuple[list[_Named], bool]:
    parsed = {name: parse_name(name) for name in files}
    order = sorted(parsed, key=lambda name: (parsed[name][1], *_sort_key(parsed[name][0])))
    numbers = Counter(number for _, number in parsed.values())
    known = class_name if isinstance(class_name, str) else None
    return [_Named(name, parsed[name][0], known) for name in order], numbers[0] == numbers[1]


def _sort_key(place: Place) -> tuple[int, list[int], str]:
    inside = [int(number) for number in re.findall(r"\[(\d+)\]", place.component)]
    return place.layer, inside, place.component


def _classes(config: Mapping[str, Any], old: str | None, count: int) -> list[str]:
    key = old or "intervention_types"
    listed = config.get(key)
    listed = [listed] * count if isinstance(listed, str) else listed
    if not isinstance(listed, list) or len(listed) != count:
        raise InvalidFile(f"config.json, {key}: must name the class of each of {count}.")
    names = []
    for text in listed:
        match = _CLASS.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise InvalidFile(f"config.json, {key}: {str(text)[:80]!r} is no class.")
        names.append(match[1])
    return names


def _per_intervention(config: Mapping[str, Any], key: str, count: int) -> list[Any] | None:
    listed = config.get(key)
    if listed is None:
        return None
    if not isinstance(listed, list) or len(listed) != count:
        raise InvalidFile(f"config.json, {key}: must have one entry for each of {count}.")
    return listed


def _fields(entry: object, names: list[str], where: str) -> dict[str, Any]:
    if isinstance(entry, list) and 2 <= len(entry) <= len(names):
        return dict(zip(names, entry, strict=False))
    if isinstance(entry, dict):
        return {_RENAMED.get(name, str(name)): value for name, value in entry.items()}
    raise InvalidFile(f"{where}: must be a list of 2 to {len(names)} fields, or an object.")


def _place(fields: Mapping[str, Any], where: str) -> Place:
    layer, component = fields.get("layer", 0), fields.get("component")
    unit, units = fields.get("unit", "pos"), fields.get("max_number_of_units", 1)
    if not isinstance(component, str) or not component:
        raise InvalidFile(f"{where}, component: must be a string.")
    if layer is None and "." in component:
        layer = 0
    for name, value in (("layer", layer), ("max_number_of_units", units)):
        if type(value) is not int or value < 0:
            raise InvalidFile(f"{where}, {name}: must be a whole number, not {str(value)[:40]}.")
    if unit != "pos":
        raise InvalidFile(f"{where}, unit: {str(unit)[:40]!r}; only `pos` can be served.")
    for name, reason in (
        ("intervention_link_key", "feeds one intervention's output to the next"),
        ("subspace_partition", "edits parts of a row by partition"),
        ("moe_key", "edits one expert's rows"),
    ):
        if fields.get(name) is not None:
            raise InvalidFile(f"{where}, {name}: {reason}, which cannot be served.")
    return Place(layer, component, unit, units)


def _args(folder: Path) -> dict[str, Any]:
    """The content of args.json beside the checkpoint, or above a trainer's checkpoint."""
    places = [folder]
    if folder.name == "intervenable_model":
        places += [folder.parent, folder.parent.parent]
    for place in places:
        if (place / "args.json").is_file():
            return read_json(place / "args.json")
    return {}


def read_json(path: Path, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object that a file holds, of at most so many bytes; raises `InvalidFile`."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise ValueError(f"more than {most} bytes")
        value = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidFile(f"{path.name}: not readable as JSON: {str(error)[:200]}.") from None
    if not isinstance(value, dict):
        raise InvalidFile(f"{path.name}: must be a JSON object.")
    return value
