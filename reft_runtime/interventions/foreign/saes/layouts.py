"""The layouts in which SAEs are published: by which files each is known, and where it reads."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from reft_runtime.errors import InvalidFile
from reft_runtime.interventions.foreign.saes.rows import Decoders
from reft_runtime.interventions.foreign.steering import PLAIN, read_object
from reft_runtime.interventions.format.components import normalise
from reft_runtime.interventions.format.manifest import BaseShape


class Place(NamedTuple):
    """Where an SAE reads, as far as its layout says it.

    `words` say it in the layout's own. Rows of the decoder times `scale` are of the activations'
    size. `about` is kept in the intervention's file.
    """

    layer: int | None
    component: str | None
    words: str = ""
    scale: float = 1.0
    about: Mapping[str, str] = {}


class Layout(NamedTuple):
    """How one is known, its files of settings and of weights, and what is read of both.

    Without `config` the file itself is what `place` gets, and without `weights` it has the
    decoder.
    """

    fits: Callable[[Path], bool]
    place: Callable[[Path, BaseShape], Place]
    decoders: Decoders
    weights: str = ""
    config: str = ""


W_DEC: Decoders = {"W_dec": 0}
LINEAR: Decoders = {"decoder.weight": 1}
"""Of `torch.nn.Linear`, whose weights are [outputs, inputs]."""

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
_IN_PLAIN = {
    "hook_attn_out": "attention_output",
    "hook_mlp_out": "mlp_output",
    "hook_resid_mid": "attention_output",  # which is added to the stream there, and so moves it
}
"""Where a block adds them to the residual stream; elsewhere a norm may come before."""

_FILE = re.compile(r"(?:layer|.*-SAE-l)(\d{1,5})(?:\.sae)?\.pth?")
"""`layer12.sae.pt` of Qwen Scope, and `Llama-3.1-8B-Instruct-SAE-l19.pth`: output of that layer."""

_MODULE = re.compile(r"(?:layers|h)\.(\d{1,5})(?:\.([a-z_.]+))?")
_MODULES = {
    None: "block_output",
    "mlp": "mlp_output",
    "self_attn": "attention_output",
    "attn": "attention_output",
    "attention": "attention_output",
}


def _of_sae_lens(path: Path, base: BaseShape) -> Place:
    config = read_object(path)
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
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise InvalidFile(f"{path}: metadata: must be an object.")
    metadata = {**config, **metadata}  # before SAELens 6 all was in one object
    hook = metadata.get("hook_name", config.get("hook_point"))
    head = metadata.get("hook_head_index", config.get("hook_point_head_index"))
    if head is not None:
        raise InvalidFile(f"{path}: hook_head_index is {str(head)[:80]!r}; single heads are not.")
    if metadata.get("model_class_name") == "AutoModelForCausalLM":  # a module of transformers'
        said = _of_module(path, "hook_name", f"{hook}.output" if isinstance(hook, str) else None)
    else:
        said = _of_hook(path, "hook_name", hook, base)
    about = {"model_name": str(metadata.get("model_name"))[:200], "hook_name": said.words}
    return said._replace(about=about)


def _of_gemma_scope(path: Path, base: BaseShape) -> Place:
    config = read_object(path)
    point, written = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    if written not in (None, point):
        raise _no_transcoders(path, "hf_hook_point_out", written)
    return _of_module(path, "hf_hook_point_in", point)


def _of_llama_scope(path: Path, base: BaseShape) -> Place:
    config = read_object(path)
    hook, written = config.get("hook_point_in"), config.get("hook_point_out")
    if written not in (None, hook):
        raise _no_transcoders(path, "hook_point_out", written)
    norms = config.get("dataset_average_activation_norm")
    norm = norms.get("in") if isinstance(norms, dict) else None
    # What it reads is brought to a mean length of sqrt(d), and what it writes is brought back.
    if config.get("norm_activation") != "dataset-wise" or not _positive(norm):
        raise InvalidFile(
            f"{path}: norm_activation must be 'dataset-wise', with the norm in"
            " dataset_average_activation_norm.in."
        )
    return _of_hook(path, "hook_point_in", hook, base)._replace(scale=norm / base.hidden_size**0.5)


def _of_sparsify(path: Path, base: BaseShape) -> Place:
    if read_object(path).get("transcode"):
        raise _no_transcoders(path, "transcode", True)
    name = path.resolve().parent.name  # the module, from transformers' model without its head on
    match = _MODULE.fullmatch(name)
    if match is None:
        raise InvalidFile(
            f"{path}: its folder is {name[:80]!r}, but sparsify names it after the module that an"
            " SAE reads, such as layers.10 or h.3.mlp; give it that name again."
        )
    return Place(int(match[1]), _MODULES.get(match[2]), name)


def _of_dictionary_learning(path: Path, base: BaseShape) -> Place:
    trainer = read_object(path).get("trainer")
    if not isinstance(trainer, dict):
        raise InvalidFile(f"{path}: trainer: must be an object.")
    layer, name = trainer.get("layer"), str(trainer.get("submodule_name") or "resid_post")
    if type(layer) is not int or layer < 0:
        raise InvalidFile(f"{path}: trainer.layer must be a layer's number.")
    component = "block_output" if name.startswith("resid_post") else None
    return Place(layer, component, f"layer {layer} ({name[:80]})")


def _of_name(path: Path, base: BaseShape) -> Place:
    match = _FILE.fullmatch(path.name)
    assert match is not None
    return Place(int(match[1]), "block_output", f"layer {match[1]}")


def _of_hook(path: Path, key: str, hook: Any, base: BaseShape) -> Place:
    """A place in TransformerLens's words."""
    if not isinstance(hook, str):
        raise InvalidFile(f"{path}: {key}: missing.")
    match = _HOOK.fullmatch(hook)
    if match is None:
        raise InvalidFile(f"{path}: {key} {hook[:80]!r} is in no block.")
    plain = _IN_PLAIN if base.architecture in PLAIN else {}
    return Place(int(match[1]), (_COMPONENTS | plain).get(match[2]), hook[:80])


def _of_module(path: Path, key: str, point: Any) -> Place:
    """A place that is a module of transformers', and its input or output."""
    if not isinstance(point, str):
        raise InvalidFile(f"{path}: {key}: missing.")
    layer, component = -1, ""
    if point.isascii():
        layer, component = normalise(-1, re.sub(r"\.(\d+)", r"[\1]", point))
    if layer < 0:
        raise InvalidFile(f"{path}: {key} {point[:80]!r} is in no block.")
    return Place(layer, component, point[:80])


def _no_transcoders(path: Path, key: str, value: object) -> InvalidFile:
    return InvalidFile(
        f"{path}: {key} is {str(value)[:80]!r}: it writes elsewhere than it reads, as transcoders"
        " do, and only SAEs are served."
    )


def _positive(number: object) -> bool:
    return isinstance(number, int | float) and 0 < number < float("inf")


def _unsaid(path: Path, base: BaseShape) -> Place:
    return Place(None, "block_output")


def _with(*names: str, needed: str = "") -> Callable[[Path], bool]:
    """Whether a path is a folder with one of some files, or is one; and `needed` is there."""

    def fits(path: Path) -> bool:
        if path.name in names and not os.path.isdir(path):
            folder = path.parent
        elif any(os.path.exists(path / name) for name in names):
            folder = path
        else:
            return False
        return not needed or os.path.exists(folder / needed)

    return fits


def _is_npz(path: Path) -> bool:
    if path.suffix.lower() != ".npz":
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return "W_dec.npy" in archive.namelist()
    except Exception:  # damaged bytes raise what its parts raise; the next reader tells of them
        return False


def _is_named(path: Path) -> bool:
    return _FILE.fullmatch(path.name) is not None


LAYOUTS = (
    Layout(_is_npz, _unsaid, W_DEC),  # Gemma Scope
    Layout(_is_named, _of_name, {"W_dec": 1, **LINEAR, "decoder_linear.weight": 1}),
    Layout(
        _with("sae.safetensors", needed="cfg.json"),
        _of_sparsify,
        {**W_DEC, **LINEAR},
        "sae.safetensors",
        "cfg.json",
    ),
    Layout(
        _with("params.safetensors", needed="config.json"),  # Gemma Scope 2
        _of_gemma_scope,
        {"w_dec": 0},
        "params.safetensors",
        "config.json",
    ),
    Layout(_with("params.safetensors"), _unsaid, {"w_dec": 0}, "params.safetensors"),
    Layout(
        _with("hyperparams.json"),
        _of_llama_scope,
        LINEAR,
        "checkpoints/final.safetensors",
        "hyperparams.json",
    ),
    Layout(
        _with("ae.pt", needed="config.json"),
        _of_dictionary_learning,
        {**W_DEC, **LINEAR},
        "ae.pt",
        "config.json",
    ),
    Layout(
        _with("sae_weights.safetensors", "cfg.json"),
        _of_sae_lens,
        W_DEC,
        "sae_weights.safetensors",
        "cfg.json",
    ),
)
"""In the order in which they are tried."""

FILES = ("params.npz", *(name for each in LAYOUTS for name in (each.weights, each.config) if name))
"""What folders of SAEs hold."""
