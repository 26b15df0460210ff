"""Bodies of vLLM's load and unload routes."""

from __future__ import annotations

from pydantic import Field

from server.schemas.common import RequestBody


class LoadRequest(RequestBody):
    """Serve the file at `lora_path`, inside the configured folder, as `lora_name`."""

    lora_name: str = Field(min_length=1, max_length=64)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False


class UnloadRequest(RequestBody):
    """Serve `lora_name` no longer."""

    lora_name: str = Field(min_length=1, max_length=64)
