"""Reads model folders by transformers: their code is never run, and every fault is one line.

Without `trust_remote_code=False` transformers would ask on the terminal, and run a folder's code if
a person, or a pipe, says yes. Whatever it raises while it reads a folder is about that folder, so
all of it becomes a `ConfigError` that says what is wrong and what to do.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from reft_runtime.base.language import TEXT_KEYS, language_config
from reft_runtime.base.model_files import ADAPTERS, check_files, listed
from reft_runtime.base.quantised import ask_for_plain_weights, keeps_quantised, tell_plain
from reft_runtime.errors import ConfigError

_COMPUTED = re.compile(r"(inv_freq|\.(attn|attention)\.(masked_)?bias|position_ids)$")
"""Keys of old checkpoints that are not weights, because a model computes them itself."""

_INTEGERS = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL"}

_SCALED = {"F8_E4M3", "F8_E5M2"}
_SCALES = ("_scale_inv", "_scale")

_TOKENIZER_FILES = (
    "It takes tokenizer.json, or what transformers makes one of, and tokenizer_config.json"
)

_CHAT_TEMPLATE = "chat_template.json"

_T = TypeVar("_T")


def read_config(path: str) -> PretrainedConfig:
    """Configuration of the language model of a folder or hub id; raises `ConfigError`."""
    return language_config(_whole_config(path))


def _whole_config(path: str, **options: Any) -> PretrainedConfig:
    """Configuration of all that a folder or hub id holds."""
    if "gguf_file" not in options:  # which is all that its folder holds
        check_files(path)
    config: PretrainedConfig = _read(
        "configuration",
        path,
        lambda: AutoConfig.from_pretrained(path, trust_remote_code=False, **options),
    )
    # A folder may name its attention code, even that of a repository, which would be fetched.
    config._attn_implementation = None
    ask_for_plain_weights(config)
    return config


def read_tokenizer(path: str, **options: Any) -> PreTrainedTokenizerBase:
    """Tokenizer of a folder or hub id; raises `ConfigError`."""

    def load() -> tuple[PreTrainedTokenizerBase, set[int]]:
        found = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
        if not found.chat_template:
            found.chat_template = _processors_template(path)
        known = found("Hello there", add_special_tokens=False)["input_ids"]
        return found, set(known) - set(found.all_special_ids)

    tokenizer, known = _read("tokenizer", path, load)
    if not known:  # without files some kinds of tokenizer come empty, and nothing is raised
        raise ConfigError(
            f"model: {path!r} has no tokenizer: not one piece of a text is in its vocabulary."
            f" {_TOKENIZER_FILES}; fetch them too.",
            param="model",
        )
    return tokenizer


def _processors_template(path: str) -> str | None:
    """The chat template that older folders keep for their processor, not for their tokenizer."""
    file = cached_file(path, _CHAT_TEMPLATE, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    found = json.loads(Path(file).read_bytes())["chat_template"]
    return found if isinstance(found, str) else None


def read_model(
    path: str, dtype: torch.dtype, *, gguf_file: str | None = None, ranks: int = 1
) -> PreTrainedModel:
    """The causal language model of a folder or hub id, on the CPU, with every weight from a file.

    `gguf_file` names the file of a folder that holds GGUF, which is dequantised. With several
    `ranks`, whose process group must be there, it is this rank's shard, on its device. Raises
    `ConfigError` if weights are missing, have other shapes, or belong to layers and modules
    that this model does not have; the message names them.
    """
    options: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    whole = _whole_config(path, **options)  # without the attention code that it may name
    config = language_config(whole)
    if config is not whole:
        options["key_mapping"] = TEXT_KEYS
    if ranks > 1:
        options["distributed_config"] = DistributedConfig(tp_size=ranks)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, by name, and refused below
            trust_remote_code=False,
            config=config,
            attn_implementation="eager",
            **options,
        )

    # Faults are reported once, by name, without transformers' own table of them.
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    if bars and not sys.stderr.isatty():  # a bar fills a log, where nothing can overwrite it
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model, found = _read("weights", path, load)
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    if getattr(model, "_hf_peft_config_loaded", False):  # its files were not checked
        raise ConfigError(f"model: {path!r} is {ADAPTERS}", param="model")
    _check_weights(path, model, found, in_another=config is not whole)
    if not keeps_quantised(config):
        tell_plain(model, dtype)
    loaded: PreTrainedModel = model
    return loaded


def _read(what: str, path: str, read: Callable[[], _T]) -> _T:
    try:
        return read()
    except Exception as error:
        raise ConfigError(f"model: {_reason(what, path, error)}", param="model") from error


def _reason(what: str, path: str, error: Exception) -> str:
    """One line that says what is wrong and what to do."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if "trust_remote_code" in str(error):
        return (
            f"the {what} of {path!r} needs Python code of its repository, which is never run."
            " Take a model that transformers knows by itself."
        )
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "alloc" in text:
        return f"the {what} of {path!r} does not fit into memory: {text[:200]}"
    if isinstance(error, SafetensorError):
        text = f"a safetensors file is damaged or cut ({text}); fetch it again"
    elif "weights_only" in text or "PytorchStreamReader" in text:
        text = "a pickled file of weights is damaged, cut, or no plain one; take safetensors"
    elif what == "tokenizer":
        text = f"{text[:200].rstrip('. :')}. {_TOKENIZER_FILES}"
    else:
        text = f"{text[:300] or type(error).__name__}".rstrip(". ")
    where = "the folder" if os.path.isdir(path) else "the name (a gated model needs HF_TOKEN)"
    return f"the {what} of {path!r} cannot be read: {text}. Check {where}, or take another model."


def _check_weights(
    path: str, model: PreTrainedModel, found: dict[str, Any], *, in_another: bool
) -> None:
    missing = sorted(found["missing_keys"])
    stored = {} if keeps_quantised(model.config) else _stored(Path(path))
    whole = sorted(_stored_as_integers(stored, model))
    shapes = [
        f"{key} ({_shape(there)} instead of {_shape(wanted)})"
        for key, there, wanted in sorted(found["mismatched_keys"])
    ]
    parts = {"", model.base_model_prefix} if in_another else set()
    unexpected = sorted(key for key in found["unexpected_keys"] if _matters(key, model, parts))
    faults = [
        f"{text} {listed(keys)}"
        for text, keys in (
            ("without weights for", missing),
            ("with weights of another shape for", shapes),
            ("with integers instead of weights for", whole),
            ("without scales for", sorted(_without_scales(stored))),
            ("with weights that this model has no use for:", unexpected),
            ("with faults:", found["error_msgs"]),
        )
        if keys
    ]
    if faults:
        raise ConfigError(
            f"model: {path!r} is {'; '.join(faults)}. Its weights and its config.json do not belong"
            f" together, or {type(model).__name__} is not what they are of; fetch both again.",
            param="model",
        )


def _stored_as_integers(stored: Mapping[str, str], model: PreTrainedModel) -> Iterable[str]:
    """Names of weights that are `stored` as integers, as quantised models do, without scales."""
    wanted = {name for name, weight in model.named_parameters() if weight.is_floating_point()}
    for name, dtype in stored.items():
        if name in wanted and dtype in _INTEGERS and not _has_scales(name, stored):
            yield name


def _without_scales(stored: Mapping[str, str]) -> Iterable[str]:
    """Names of weights that are `stored` as eight-bit floats, without scales."""
    for name, dtype in stored.items():
        if dtype in _SCALED and name.endswith("weight") and not _has_scales(name, stored):
            yield name


def _has_scales(name: str, stored: Mapping[str, str]) -> bool:
    return any(f"{name}{suffix}" in stored for suffix in _SCALES)


def _stored(folder: Path) -> dict[str, str]:
    """The dtypes of what a folder stores, as safetensors names them, by name."""
    found: dict[str, str] = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118 - it is no dictionary
                found[name] = content.get_slice(name).get_dtype()
    return found


def _matters(key: str, model: PreTrainedModel, shared: Set[str]) -> bool:
    """Whether a checkpoint's key that the model lacks would change what the model computes.

    A key does if it belongs to a module of the model, lies among its layers, or belongs to an
    adapter. A head beside the model (of a reward model, or for speculation) does not, nor does what
    lies directly in a module of a name in `shared`, which a model around this one has too.
    """
    if _COMPUTED.search(key):
        return False
    if ".lora_" in key:
        return True
    modules = dict(model.named_modules())
    # A checkpoint of the model without its head has names without this prefix.
    for name in (key, f"{model.base_model_prefix}.{key}"):
        if name.rpartition(".")[0] in modules.keys() - shared and "." in key:
            return True
        if any(
            name.startswith(f"{place}.")
            for place, module in modules.items()
            if isinstance(module, torch.nn.ModuleList)
        ):
            return True
    return False


def _shape(size: Iterable[int]) -> str:
    return f"[{', '.join(map(str, size))}]"
