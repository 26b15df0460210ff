"""Control vectors in GGUF: imported, exported, and refused."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.interventions import Edit, Intervention, parse, serialise
from reft_runtime.interventions.foreign.control_vectors import (
    export_control_vector,
    import_control_vector,
)
from tests.interventions.make import BASE, loreft_tensors

ONES = np.ones(16, np.float32)
DIRECTIONS = {f"direction.{layer}": np.full(16, layer, np.float32) for layer in (3, 1)}


def written(
    path: Path,
    tensors: Mapping[str, Any] = DIRECTIONS,
    architecture: str = "controlvector",
    **fields: str,
) -> Path:
    """A file as repeng writes it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(f"{architecture}.model_hint", "llama")
    writer.add_uint32(f"{architecture}.layer_count", len(tensors))
    for name, value in fields.items():
        writer.add_string(name.replace("_", "."), value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def adding(layer: int, value: float = 1, positions: str = "all", **where: Any) -> Edit:
    return Edit(layer, positions, {"v": torch.full((16,), float(value))}, "steering", **where)


@pytest.mark.parametrize("architecture", ["controlvector", "steeringvector"])
def test_each_direction_is_added_to_the_output_of_its_block(
    architecture: str, tmp_path: Path
) -> None:
    tensors: dict[str, Any] = {**DIRECTIONS, "direction.0": np.full(16, 0.5, np.float16)}
    tensors["direction.2"] = np.zeros(16, np.float32)
    file = written(tmp_path / "v.gguf", tensors, architecture)
    made = parse(serialise(import_control_vector(file, base=BASE)))
    places = [(e.layer, e.component, e.kind, str(e.positions)) for e in made.manifest.edits]
    assert places == [(layer, "block_output", "steering", "all") for layer in (0, 1, 3)]
    for edit, value in zip(made.canonical(), (0.5, 1, 3), strict=True):
        torch.testing.assert_close(
            edit.edited(torch.ones(2, 16), -1), torch.full((2, 16), 1.0 - value)
        )
    assert made.manifest.training == {"source": "control vector", "model_hint": "llama"}
    other = import_control_vector(file, base=BASE, layer=3, positions="decode", template="chat")
    assert [edit.layer for edit in other.manifest.edits] == [3]
    assert str(other.manifest.edits[0].positions) == "decode"
    assert other.manifest.template == "chat"


@pytest.mark.parametrize(
    ("tensors", "architecture", "fields", "message"),
    [
        (DIRECTIONS, "llama", {}, r"holds a model \(llama\), no control vector"),
        (DIRECTIONS, "controlvector", {"glp_mode": "project"}, "glp.mode is 'project'; only"),
        ({"direction.4": ONES}, "controlvector", {}, "has blocks 0 to 3, 16 wide"),
        ({"direction.1": ONES[:8]}, "controlvector", {}, "has 8 numbers, but tiny"),
        ({"direction.1": ONES, "direction.01": ONES}, "controlvector", {}, "two .* of block 1"),
        ({"direction.\u0661": ONES}, "controlvector", {}, "is no direction"),
        ({"direction.x": ONES}, "controlvector", {}, "'direction.x' is no direction"),
        ({"direction.1": ONES.astype(np.int8)}, "controlvector", {}, "is quantised"),
        ({"direction.1": 0 * ONES}, "controlvector", {}, "no direction that is not zero"),
        ({"direction.1": np.nan * ONES}, "controlvector", {}, "NaN or infinite"),
    ],
)  # fmt: skip
def test_what_cannot_be_added_is_refused(
    tensors: Mapping[str, Any],
    architecture: str,
    fields: dict[str, str],
    message: str,
    tmp_path: Path,
) -> None:
    file = written(tmp_path / "v.gguf", tensors, architecture, **fields)
    with pytest.raises(InvalidFile, match=message):
        import_control_vector(file, base=BASE)


def test_a_file_that_is_cut_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "v.gguf")
    data = file.read_bytes()
    for length in (0, 3, 20, 100, len(data) - 8):
        file.write_bytes(data[:length])
        with pytest.raises(InvalidFile, match="not readable as GGUF"):
            import_control_vector(file, base=BASE)
    with pytest.raises(ConfigError, match="No such file"):
        import_control_vector(tmp_path / "missing.gguf", base=BASE)


@pytest.mark.parametrize(
    "value",
    [
        struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8, 1 << 16),
        struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING, 1 << 16),
        struct.pack("<IQ", gguf.GGUFValueType.STRING, 1 << 62),
    ],
)
def test_what_a_file_says_that_it_has_is_not_believed(tmp_path: Path, value: bytes) -> None:
    file = tmp_path / "v.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + value)
    with pytest.raises(InvalidFile, match="it is cut off, or says that it has more than it has"):
        import_control_vector(file, base=BASE)


@pytest.mark.parametrize(("tensors", "fields"), [(1 << 40, 0), (0, 1 << 40)])
def test_not_everything_is_read_that_a_file_has(tmp_path: Path, tensors: int, fields: int) -> None:
    file = tmp_path / "v.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, fields))
    with pytest.raises(InvalidFile, match="at most 10000 are read"):
        import_control_vector(file, base=BASE)


def test_an_export_is_what_was_imported(tmp_path: Path) -> None:
    edits = [adding(3), adding(1, 2), adding(3, 0.5)]
    export_control_vector(Intervention.build(BASE, edits), tmp_path / "v.gguf")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert {tensor.name: float(tensor.data[0]) for tensor in reader.tensors} == {
        "direction.1": 2,
        "direction.3": 1.5,
    }
    assert reader.fields["controlvector.layer_count"].contents() == 2
    made = import_control_vector(tmp_path / "v.gguf", base=BASE)
    assert made.manifest.training["model_hint"] == "llama"
    with pytest.raises(ConfigError, match="exists already"):
        export_control_vector(made, tmp_path / "v.gguf")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (adding(0), "llama.cpp steers no block 0"),
        (adding(1, positions="l1"), "at all positions"),
        (adding(1, component="mlp_output"), "a block's output"),
        (Edit(1, "all", loreft_tensors()), "and nothing else"),
        (Edit(1, "all", {"s": torch.ones(16), "b": torch.ones(16)}, "red"), "and nothing else"),
    ],
)
def test_what_a_control_vector_cannot_say_is_refused(
    edit: Edit, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidFile, match=message):
        export_control_vector(Intervention.build(BASE, [edit]), tmp_path / "v.gguf")
    assert not (tmp_path / "v.gguf").exists()
