"""ReFT adapters of AdapterHub's library, `adapters`: its LoReFT, NoReFT and DiReFT.

A unit computes h + (act(W h + b) - P h) P, a DiReFT's h + act(W h + b) P. The first unit of a layer
is for the first tokens of the prompt, the second one for the last; tied ones are one. In a step
with a cache the one token is the first and the last, so that generated tokens are edited, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.interventions.foreign.folders import (
    CONFIG,
    field,
    folder_of,
    is_adapter,
    read_config,
    read_weights,
)
from reft_runtime.interventions.format.intervention import Edit, Intervention
from reft_runtime.interventions.format.kinds import ACTS
from reft_runtime.interventions.format.manifest import BaseShape
from reft_runtime.interventions.format.positions import Positions
from reft_runtime.interventions.pyreft.checkpoint import read_json

FILES = ("adapter.safetensors", "pytorch_adapter.bin")
"""Where the weights are: the first one that is there."""

_HEAD = "head_config.json"
_PARTS = ("learned_source.weight", "learned_source.bias", "projection.weight")
_UNIT = re.compile(
    r"(?:[a-z_]+\.)?(?:layers|h)\.(\d{1,4})\.reft_layer\.refts\.(.+)\.units\.([01])\.(.+)"
)
_IN = "config."
_USED = frozenset(
    {
        "architecture", "layers", "prefix_positions", "suffix_positions", "r", "orthogonality",
        "tied_weights", "non_linearity", "output_reft", "subtract_projection",
    }
)  # fmt: skip
_OF_TRAINING = frozenset({"dropout", "dtype", "init_weights_seed"})
_OTHERS = {
    None: "a bottleneck adapter",
    "lora": "a LoRA or IA3 of this library's; docs/from-lora.md says what to do instead",
    "union": "several adapters in one; save its ReFT alone",
}


def is_adapterhub(path: Path) -> bool:
    """Whether a folder, or a file in it, is of an adapter of this library's, of any method."""
    if not is_adapter(path):
        return False
    try:
        return "config" in read_config(path)
    except InvalidFile:
        return False


def import_adapterhub(
    source: str | Path,
    *,
    base: BaseShape,
    positions: str | None = None,
    kind: str | None = None,
    template: str | None = None,
) -> Intervention:
    """Read a folder that `save_adapter` wrote, or one of the files in it.

    The files do not say whether the projection is subtracted: `kind` tells a `noreft` from a
    `nodireft` (its DiReFT), and a `loreft` (by default) from a `direft`. `positions` are by default
    those of the library's steps with a cache, such as `[:3]+decode`. Pickles are read by a process
    of their own. `base` is the base model's shape (`reft_runtime.base_shape`). Raises `ConfigError`
    and `InvalidFile`.
    """
    path = Path(source)
    whole = read_config(path)
    config = field(whole, "config", dict)
    _check(path, whole, config, base)
    kind = _kind(config, kind)
    places = _places(config, positions)
    layers = config["layers"]
    layers = range(base.num_layers) if layers == "all" else sorted(set(layers))
    units = _units(path, whole, config, base, layers)
    act = config["non_linearity"]
    edits = []
    for layer in layers:
        for unit, where in places:
            W, b, P = (_tensor(units, layer, unit, part) for part in _PARTS)
            projection = {"R": P.T} if config["orthogonality"] else {"W2": P}
            tensors = {"W": W, "b": b, **projection}
            edits.append(Edit(layer, where, tensors, kind, act=_act(act)))
    training = {"source": "adapters", "version": str(whole.get("version"))[:80]}
    return Intervention.build(base, edits, template=template, training=training)


def _check(
    path: Path, whole: Mapping[str, Any], config: Mapping[str, Any], base: BaseShape
) -> None:
    """Raise `InvalidFile` unless this is a ReFT for this base model, and all of it is known."""
    architecture = config.get("architecture")
    if architecture != "reft":
        known = _OTHERS.get(architecture) if isinstance(architecture, str | None) else None
        what = known or f"an adapter of architecture {str(architecture)[:80]!r}"
        raise InvalidFile(f"{path}: {what}; of this library only a ReFT can be served.")
    model_type = field(whole, "model_type", str)
    if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) != base.architecture:
        raise InvalidFile(
            f"{CONFIG}, model_type: it is for {model_type[:80]!r}, but {base.model} is a"
            f" {base.architecture}; check --base."
        )
    width = field(whole, "hidden_size", int)
    if width != base.hidden_size:
        raise InvalidFile(
            f"{CONFIG}, hidden_size: {width}, but {base.model} is {base.hidden_size} wide; check"
            " --base."
        )
    for name in ("prefix_positions", "suffix_positions", "r"):
        if field(config, name, int, where=_IN) < (name == "r"):
            raise InvalidFile(f"{CONFIG}, {_IN}{name}: {config[name]} is too small.")
    for name in ("orthogonality", "tied_weights"):
        field(config, name, bool, where=_IN)
    layers = field(config, "layers", str, list, where=_IN)
    if layers != "all" and (type(layers) is str or not all(type(each) is int for each in layers)):
        raise InvalidFile(f'{CONFIG}, {_IN}layers: must be "all" or a list of whole numbers.')
    for layer in () if layers == "all" else layers:
        if not 0 <= layer < base.num_layers:
            raise InvalidFile(
                f"{CONFIG}, {_IN}layers: {layer}, but {base.model} has layers 0 to"
                f" {base.num_layers - 1}; check --base."
            )
    act = field(config, "non_linearity", str, type(None), where=_IN)
    if act is not None and _act(act) not in ACTS:
        raise InvalidFile(f"{CONFIG}, {_IN}non_linearity: {act[:80]!r} is no act that is known.")
    if config.get("output_reft", True) is not True:
        raise InvalidFile(f"{CONFIG}, {_IN}output_reft: must be true.")
    for name, value in config.items():
        if name not in _USED | _OF_TRAINING and value not in (None, False):
            raise InvalidFile(
                f"{CONFIG}, {_IN}{name[:80]}: {str(value)[:80]!r} is unknown here, and could change"
                " what the adapter does."
            )
    head = folder_of(path) / _HEAD
    if head.is_file():
        found = read_json(head)
        # A causal model's own head is saved with every adapter, and was not trained with it.
        if found.get("config") is not None or found.get("model_class") != base.architecture:
            raise InvalidFile(
                f"{_HEAD}: a prediction head beside the adapter, which cannot be served; save the"
                " adapter with_head=False if it works with the base model's own."
            )


def _kind(config: Mapping[str, Any], kind: str | None) -> str:
    subtracting, adding = (
        ("loreft", "direft") if config["orthogonality"] else ("noreft", "nodireft")
    )
    recorded = config.get("subtract_projection")
    if recorded is not None:
        stored = subtracting if field(config, "subtract_projection", bool, where=_IN) else adding
        fitting = [stored]
    else:
        fitting = [subtracting, adding]
    if kind is None and recorded is None and not config["orthogonality"]:
        raise ConfigError(
            "kind: the files do not say whether this is a NoReFT (give --kind noreft) or a DiReFT"
            " (--kind nodireft), and `adapters` itself runs both as a NoReFT when it loads them.",
            param="kind",
        )
    if kind is not None and kind not in fitting:
        raise ConfigError(
            f"kind: {kind[:80]!r} contradicts {CONFIG}; give {' or '.join(fitting)}.", param="kind"
        )
    return kind or fitting[0]


def _places(config: Mapping[str, Any], positions: str | None) -> list[tuple[int, str]]:
    """The units that act, and where each does."""
    first, last = config["prefix_positions"], config["suffix_positions"]
    texts = [text for count, text in ((first, f"[:{first}]"), (last, f"[-{last}:]")) if count]
    if not texts:
        raise InvalidFile(f"{CONFIG}, {_IN}prefix_positions: 0, as suffix_positions: no edit.")
    both = "+".join(texts)
    if config["tied_weights"] or not (first and last):
        unit = 0 if first or config["tied_weights"] else 1
        return [(unit, f"{both}+decode" if positions is None else positions)]
    asked = Positions.parse(f"{both}+decode" if positions is None else positions)
    decode = "+decode" if asked.decode else ""
    if asked != Positions.parse(both + decode):
        raise ConfigError(
            f"positions: each layer has an edit for the first and one for the last tokens: give"
            f" `{both}`, or `{both}+decode`, or leave it out.",
            param="positions",
        )
    return [(0, texts[0]), (1, texts[1] + decode)]


def _units(
    path: Path,
    whole: Mapping[str, Any],
    config: Mapping[str, Any],
    base: BaseShape,
    layers: Sequence[int],
) -> dict[tuple[int, int, str], Tensor]:
    """The tensors by layer, unit and part; each one that is stored is known, and of its shape."""
    name, rank = field(whole, "name", str), config["r"]
    shapes = dict(zip(_PARTS, ((rank, base.hidden_size), (rank,)) * 2, strict=False))
    found: dict[tuple[int, int, str], Tensor] = {}
    for key, tensor in read_weights(path, FILES).items():
        match = _UNIT.fullmatch(key)
        if match is None or match[2] != name or match[4] not in shapes:
            raise InvalidFile(f"{key[:200]!r}: no tensor of the ReFT {name[:80]!r}.")
        layer, unit, part = int(match[1]), int(match[3]), match[4]
        if layer not in layers:
            raise InvalidFile(
                f"{key[:200]}: {CONFIG} has no such layer among its own, or {base.model} has none;"
                " check --base."
            )
        if unit and config["tied_weights"]:
            raise InvalidFile(f"{key[:200]}: stored, though {CONFIG} says tied_weights.")
        if tensor.shape != shapes[part]:
            raise InvalidFile(
                f"{key[:200]}: shape {list(tensor.shape)}, expected {list(shapes[part])}."
            )
        found[layer, unit, part] = tensor
    return found


def _tensor(
    units: Mapping[tuple[int, int, str], Tensor], layer: int, unit: int, part: str
) -> Tensor:
    if (layer, unit, part) not in units:
        raise InvalidFile(f"layer {layer}, units.{unit}.{part}: missing among the weights.")
    return units[layer, unit, part]


def _act(name: str | None) -> str | None:
    name = None if name is None else name.lower()
    return "leaky_relu" if name == "leakyrelu" else name
