"""Bodies of the routes that change what is served, including vLLM's."""

from __future__ import annotations

from pydantic import Field

from server.schemas.base import RequestBody


class LoadRequest(RequestBody):
    """Serve the file at `lora_path`, inside the configured sources, as `lora_name`."""

    lora_name: str = Field(min_length=1, max_length=64, description="The name to serve it under.")
    lora_path: str = Field(
        min_length=1,
        max_length=4096,
        description="A file inside a source: absolute, relative to the source, or its whole URL.",
    )
    load_inplace: bool = Field(default=False, description="Replace what has the name already.")
    base_model_name: str = Field(
        default="", max_length=512, description="Accepted and not used: the file names its base."
    )


class UnloadRequest(RequestBody):
    """Stop serving `lora_name`."""

    lora_name: str = Field(min_length=1, max_length=64, description="The name to remove.")
    lora_int_id: int | None = Field(
        default=None, description="Accepted and not used: names are ids."
    )


class RollbackRequest(RequestBody):
    """Serve a kept version of an upload again."""

    digest: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{8,64}$",
        description="8 or more digits of its digest; by default the version served before.",
    )
