"""What an intervention file is called, how large it may be, and what identifies it."""

from __future__ import annotations

import hashlib
import json

SUFFIX = ".safetensors"

MAX_FILE_BYTES = 64 << 20

METADATA_KEY = "reft"
"""Where a header's metadata hold the manifest, and with it the SHA-256 of the data."""

LENGTH_BYTES = 8
"""Bytes at a file's start that hold the length of its header, little-endian."""


def names_file(reference: str) -> bool:
    """Whether what a user gives as an intervention is a file's path, not a name."""
    return reference.endswith(SUFFIX) or "/" in reference


def is_whole(data: bytes, digest: str) -> bool:
    """Whether this is the file of that digest, its data included.

    The digest is that of the header with its length; the header holds the data's. Both are SHA-256
    in hexadecimal digits.
    """
    start = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
    if hashlib.sha256(data[:start]).hexdigest() != digest:
        return False
    manifest = json.loads(json.loads(data[LENGTH_BYTES:start])["__metadata__"][METADATA_KEY])
    return bool(hashlib.sha256(data[start:]).hexdigest() == manifest["data_sha256"])
