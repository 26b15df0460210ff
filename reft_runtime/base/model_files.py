"""Checks the files of a model's folder before anything is read: faults are told in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

from reft_runtime.errors import ConfigError
from reft_runtime.interventions.registry.urls import is_url, shown

_READ_BY_NAME = (
    "*.json",
    "tokenizer.model",
    "*.jinja",
    "model*.safetensors",
    "pytorch_model*.bin",
)
"""Files of a folder that are checked before transformers reads them."""

_LFS = b"version https://git-lfs.github.com/"

_ADAPTER = "adapter_config.json"
ADAPTERS = (
    "of adapters (LoRA), which are not applied: merge them into their model with PEFT's"
    " merge_and_unload, and serve what that gives."
)

_GGUF = (
    "holds GGUF, whose blocks are not multiplied as they are: transformers dequantises them. Give"
    " the model's own folder, or what AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME)"
    " and save_pretrained write."
)

_SHOWN = 4


def check_named(model: str) -> None:
    """`check_files` of what a user named, before torch is imported; `demo` is no folder."""
    if model != "demo":
        check_files(model)


def check_files(path: str) -> None:
    """Check the files of a folder; a name from the hub has none yet.

    Raises `ConfigError` for a folder that is not there, and for a file that is missing or cut.
    """
    if is_url(path):
        what = "is a URL; give a folder, or a model's id on the hub (OWNER/NAME)."
        raise ConfigError(f"model: {shown(path)} {what}", param="model")
    folder = Path(path)
    if os.path.isfile(folder):
        what = _GGUF if folder.suffix == ".gguf" else "is a file; give the folder that it lies in."
        raise _broken(folder, what)
    if not os.path.isdir(folder):
        if path.startswith(("/", ".", "~")):
            raise ConfigError(f"model: there is no folder {path}.", param="model")
        return
    if (folder / _ADAPTER).exists():
        raise _broken(folder / _ADAPTER, f"is {ADAPTERS}")
    if not (folder / "config.json").is_file() and list(folder.glob("*.gguf")):
        raise _broken(folder, _GGUF)
    if not (folder / "config.json").is_file():
        raise _broken(folder / "config.json", "is not there; is this a model's folder?")
    for file in sorted({file for pattern in _READ_BY_NAME for file in folder.glob(pattern)}):
        try:
            with file.open("rb") as content:
                head = content.read(len(_LFS))
        except OSError as error:
            raise _broken(file, f"cannot be read ({error.strerror}).") from None
        if head == _LFS:
            raise _broken(file, "is a Git LFS pointer, not the file itself: run `git lfs pull`.")
        if file.suffix == ".safetensors":
            _check_length(file)
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        _check_shards(index)


def _check_length(file: Path) -> None:
    """Check a safetensors file's size against the one that its header implies."""
    size = file.stat().st_size
    try:
        with file.open("rb") as content:
            header = int.from_bytes(content.read(8), "little")
            tensors = json.loads(content.read(min(header, size)))
        ends = [t["data_offsets"][1] for name, t in tensors.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise _broken(file, "is damaged or cut; fetch it again.") from None
    wanted = 8 + header + max(ends, default=0)
    if size != wanted:
        raise _broken(file, f"has {size:,} bytes instead of {wanted:,}; fetch it again.")


def _check_shards(index: Path) -> None:
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _broken(index, "is damaged; fetch it again.") from None
    missing = [name for name in shards if not (index.parent / str(name)).is_file()]
    if missing:
        raise _broken(index, f"names files that are not there: {listed(missing)}; fetch them.")


def _broken(file: Path, what: str) -> ConfigError:
    return ConfigError(f"model: {file} {what}", param="model")


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
