"""Says what a file or folder is that was mistaken for an intervention file.

It goes by first bytes and by names. Nothing is parsed, and at most `HEAD_BYTES` or the file's
header are looked at.
"""

from __future__ import annotations

import os
import re
from itertools import islice
from pathlib import Path

HEAD_BYTES = 4096
"""This many first bytes of a file are enough to recognise it."""

_MOST_NAMES = 1000
"""At most this many names of a folder are looked at."""

_SUFFIX = ".safetensors"
_TRAIN = "`reft train` makes an intervention of rows"
_ADAPTER = (
    "an adapter, such as a LoRA, which is not applied here, nor turned into an intervention; train"
    " one from the same rows (`reft train`)"
)
_EDITS = (
    "an adapter that edits hidden states; `reft import` makes an intervention file of its folder"
)
_MODEL = "a model's weights; --model takes the folder that they are in"

_MAGIC = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run `git lfs pull`",
    b"GGUF": "a model in the GGUF format",
    b"PK\x03\x04": (
        "a PyTorch or pickle file, which is never read here; `reft import` takes a file of vectors,"
        " and of an adapter or of a checkpoint of pyreft the folder"
    ),
    b"\x93NUMPY": "an array of numpy; `reft import` makes an intervention file of a vector",
    b"\x80": (
        "a PyTorch or pickle file, which is never read here; of an adapter or of a"
        " checkpoint of pyreft `reft import` takes the folder"
    ),
    b"PAR1": f"a Parquet file; {_TRAIN}",
    b"\x1f\x8b": "a gzip archive; unpack it first",
}
_CONTROL_VECTOR = re.compile(
    rb"general\.architecture.{12}(controlvector|steeringvector)", re.DOTALL
)
_SAE = "an SAE; `reft import` makes an intervention file of a feature"
_VECTORS = "vectors by layer; `reft import` makes an intervention file of them"
_DECODER_NAME = re.compile(rb"^W_dec$")
_VECTOR_NAME = re.compile(rb"^(layer_)?\d{1,5}$")
_DIRECTIONS = re.compile(r'^\{\s*"model_type":[^{}]*"directions":')
_KEY = re.compile(rb'"([^"]*+)":')
_LORA_NAME = re.compile(rb"\blora_")
_EDITS_NAME = re.compile(
    rb"\.(ia3_l|beft_bias|hra_u)$|\.ln_tuning_layers\.|\.reft_layer\.refts\."
    rb"|\.attn_[Av]\.\d+$|^(adapters|deltas)\.layer\d+_"
)
_ADAPTER_NAME = re.compile(rb"^base_model\.model\.")
_WEIGHT_NAME = re.compile(
    rb"(^|\.)((layers|h|blocks)\.\d+\..|(embed_tokens|wte|lm_head|embed_in)\.weight$)"
)


def what_file(start: bytes) -> str | None:
    """What a file that begins with `start` is, and what to do with it; None if that is unknown.

    A safetensors file is recognised by the names of its tensors, as far as they are in `start`.
    """
    if start.startswith(b"GGUF") and _CONTROL_VECTOR.search(start):
        return "a control vector; `reft import` makes an intervention file of it"
    sized = start[4:8] == bytes(4)  # a header's length may begin as a pickle does
    for magic, what in _MAGIC.items():
        if start.startswith(magic) and not (sized and start[8:9] == b"{"):
            return what
    if start[8:9] == b"{":
        # Key by key, and so in time linear in the header, whoever wrote it.
        names = _KEY.findall(start)
        for pattern, what in (
            (_LORA_NAME, _ADAPTER),
            (_EDITS_NAME, _EDITS),
            (_ADAPTER_NAME, _ADAPTER),
            (_DECODER_NAME, _SAE),
            (_VECTOR_NAME, _VECTORS),
            (_WEIGHT_NAME, _MODEL),
        ):
            if any(map(pattern.search, names)):
                return what
        return None
    return _what_text(start[:HEAD_BYTES])


def what_folder(path: str | Path) -> str:
    """What a folder is, and what to do with it."""
    try:
        with os.scandir(path) as entries:
            names = {entry.name for entry in islice(entries, _MOST_NAMES)}
    except OSError:
        return "a folder"
    if "adapter_config.json" in names:
        return (
            "the folder of an adapter; `reft import` makes an intervention file of one that edits"
            " hidden states, and says of another, such as a LoRA, why it cannot"
        )
    if "intervenable_model" in names or any(name.startswith("intkey_") for name in names):
        return "a checkpoint of pyreft; `reft import` makes an intervention file of it"
    if {"cfg.json", "sae_weights.safetensors"} <= names:
        return _SAE
    if "direction.pt" in names:
        return "a direction to ablate; `reft import` makes an intervention file of it"
    if "delta_vector.pth" in names:
        return "edits of RED or BREP; `reft import` makes an intervention file of them"
    if "config.json" in names:
        return "a model's folder, which --model takes"
    files = sorted(name for name in names if name.endswith(_SUFFIX))
    return f"a folder; name a file in it, such as {files[0]}" if files else "a folder"


def _what_text(start: bytes) -> str | None:
    try:
        text = start.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3:  # the last character may be cut
            return None
        text = start[: error.start].decode("utf-8-sig")
    if any(not (letter.isprintable() or letter in "\t\r\n") for letter in text):
        return None
    text = text.lstrip()
    if text.startswith("<"):
        return "a web page; what was downloaded is not the file itself"
    if _DIRECTIONS.match(text):
        return _VECTORS
    if text.startswith(("{", "[")):
        return f"a JSON file; {_TRAIN}"
    first, _, rest = text.partition("\n")
    second = rest.partition("\n")[0]
    for mark in ",;\t":
        if 0 < first.count(mark) == second.count(mark):
            return f"a table of texts; {_TRAIN}"
    return "a text file"
