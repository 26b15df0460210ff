"""An intervention file's name, its largest size, and what identifies it."""

from __future__ import annotations

import hashlib
import json

SUFFIX = ".safetensors"

MAX_FILE_BYTES = 64 << 20

METADATA_KEY = "reft"
"""Key of a header's metadata that holds the manifest, and with it the data's SHA-256."""

LENGTH_BYTES = 8
"""Bytes at a file's start that hold the length of its header, little-endian."""


def names_file(reference: str) -> bool:
    """Whether a user's word for an intervention is a file's path, not a name."""
    return reference.endswith(SUFFIX) or "/" in reference


def is_whole(data: bytes, digest: str) -> bool:
    """Whether `data` is the whole file of that digest.

    The digest is that of the header with its length; the header holds the digest of the data. Both
    are SHA-256 in hexadecimal digits.
    """
    start = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
    if hashlib.sha256(data[:start]).hexdigest() != digest:
        return False
    manifest = json.loads(json.loads(data[LENGTH_BYTES:start])["__metadata__"][METADATA_KEY])
    return bool(hashlib.sha256(data[start:]).hexdigest() == manifest["data_sha256"])
