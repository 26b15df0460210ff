"""The header of an intervention file, read without its data and without trusting it.

A file is in the safetensors format: 8 bytes with the length of the header (little-endian), the
header in JSON, and the tensors' data. The header's metadata holds one key, `reft`: the manifest in
JSON, with the SHA-256 of the data beside its fields. A file's identity, its digest, is the SHA-256
of the length and the header.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from json import JSONDecoder
from typing import Any

from reft_runtime.errors import InvalidFile
from reft_runtime.interventions.format.identity import LENGTH_BYTES, METADATA_KEY
from reft_runtime.interventions.format.intervention import check_layout, validate_manifest
from reft_runtime.interventions.format.kinds import TensorInfo
from reft_runtime.interventions.format.manifest import Manifest
from reft_runtime.interventions.format.recognise import HEAD_BYTES, what_file
from reft_runtime.interventions.format.strict_json import load_strict

MAX_HEADER_BYTES = 1 << 20

MOST_LAYOUTS, MOST_LAYOUT_BYTES = 256, 1 << 16
"""Most layouts of tensors that are remembered, and the longest header that is looked up."""

_known_layouts: dict[tuple[str, int], Mapping[str, TensorInfo]] = {}
"""Tensors by how they lie, as JSON, and their bytes: thousands of files have the same few."""

_BEGIN = f'{{"__metadata__":{{"{METADATA_KEY}":"'.encode()

_DTYPES = {"F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Header:
    """A file's header: enough to list the file, and to verify its data when it is loaded."""

    digest: str
    manifest: Manifest
    data_sha256: str
    tensors: Mapping[str, TensorInfo]
    data_start: int
    """Offset of the tensors' data, in bytes."""

    size_bytes: int
    """Size of the whole file."""


def header_length(start: bytes) -> int:
    """Length in bytes of the header's JSON, from the first `HEAD_BYTES` or more of a file.

    Raises `InvalidFile`, which says what the file is instead if that can be told.
    """
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if len(start) >= LENGTH_BYTES and 2 <= length <= MAX_HEADER_BYTES:
        return length
    if not start:
        raise InvalidFile("Cut off: the file is empty.")
    if what := what_file(start[:HEAD_BYTES]):
        raise InvalidFile(f"Not an intervention file but {what}.")
    if len(start) < LENGTH_BYTES:
        raise InvalidFile(f"Cut off: {len(start)} bytes are too few for a safetensors file.")
    raise InvalidFile(
        f"Header length {length}; it must be 2 to {MAX_HEADER_BYTES} bytes. Not a safetensors"
        " file, or a damaged one."
    )


def header_of(data: bytes) -> Header:
    """The header of a file held in memory. Raises `InvalidFile`, as `parse_header` does."""
    return parse_header(data, len(data))


def parse_header(start: bytes, size: int) -> Header:
    """Read the header of a file of `size` bytes that begins with `start`, which holds all of it.

    Raises `InvalidFile` that says what is wrong, and where.
    """
    end = LENGTH_BYTES + header_length(start)
    head = start[:end]
    if len(head) < end:
        raise InvalidFile("Cut off inside the header.")
    stored, layout = _split(head[LENGTH_BYTES:])
    tensors = None if layout is None else _known_layouts.get((layout, size - end))
    if tensors is None:
        fields = _object(head[LENGTH_BYTES:], "header")
        metadata = fields.pop("__metadata__", None)
        stored = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
        if not isinstance(stored, str):
            if what := what_file(head):
                raise InvalidFile(f"Not an intervention file but {what}.")
            raise InvalidFile(
                f"header: no manifest under __metadata__.{METADATA_KEY}; not an intervention file."
            )
    content = _object(stored, "manifest")
    data_sha256 = content.pop("data_sha256", None)
    if not isinstance(data_sha256, str) or not _SHA256.fullmatch(data_sha256):
        raise InvalidFile("manifest, data_sha256: must be 64 hexadecimal digits, lower case.")
    manifest = validate_manifest(content)
    if tensors is None:
        tensors = _tensors(fields, size - end)
        if layout is not None and len(_known_layouts) < MOST_LAYOUTS:
            _known_layouts[layout, size - end] = tensors
    check_layout(manifest, tensors)
    digest = hashlib.sha256(head).hexdigest()
    return Header(digest, manifest, data_sha256, tensors, end, size)


def _split(header: bytes) -> tuple[Any, str | None]:
    """The manifest's text, and what stands behind it: how the tensors lie, in JSON.

    Only for headers that are written as nearly all are: the metadata first, and nothing in it but
    the manifest. For others, and long ones, the second is None.
    """
    if len(header) > MOST_LAYOUT_BYTES or not header.startswith(_BEGIN):
        return "", None
    try:
        text = header.decode()
        stored, end = JSONDecoder().raw_decode(text, len(_BEGIN) - 1)
        stored.encode()  # not if half of a surrogate pair is in it
    except ValueError:
        return "", None
    layout = text[end:]
    return (stored, layout) if layout.startswith("},") else ("", None)


def _object(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        value = load_strict(text)
    except ValueError as error:
        raise InvalidFile(f"{what}: not valid JSON: {str(error)[:200]}.") from None
    if not isinstance(value, dict):
        raise InvalidFile(f"{what}: must be a JSON object.")
    return value


def _tensors(fields: Mapping[str, Any], data_size: int) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in fields.items():
        where = f"header, {name[:200]}"
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise InvalidFile(f"{where}: must have dtype, shape and data_offsets, and no more.")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise InvalidFile(f"{where}: dtype {str(dtype)[:20]}; store F32, F16 or BF16.")
        if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
            raise InvalidFile(f"{where}: shape and data_offsets must be lists of natural numbers.")
        torch_name, width = _DTYPES[dtype]
        if offsets[1] - offsets[0] != math.prod(shape) * width:
            raise InvalidFile(f"{where}: data_offsets do not fit the shape.")
        infos[name] = TensorInfo(torch_name, tuple(shape))
        spans.append((offsets[0], offsets[1], where))
    end = 0
    for start, stop, where in sorted(spans):
        if start != end:
            raise InvalidFile(f"{where}: data_offsets overlap another tensor's, or leave a gap.")
        end = stop
    if end != data_size:
        raise InvalidFile(
            f"The data has {data_size} bytes, but the header describes {end}: the file is cut off"
            " or has something appended."
        )
    return infos


def _naturals(value: object) -> bool:
    if not isinstance(value, list) or len(value) > 8:
        return False
    return not value or (set(map(type, value)) == {int} and min(value) >= 0)
