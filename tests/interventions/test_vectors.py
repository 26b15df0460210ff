"""Plain vectors of numpy and torch: imported, and refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reft_runtime.errors import ConfigError, InvalidFile, ReftError
from reft_runtime.interventions import parse, serialise
from reft_runtime.interventions.foreign import vectors
from reft_runtime.interventions.foreign.formats import import_foreign
from reft_runtime.interventions.foreign.vectors import import_vectors
from reft_runtime.interventions.pyreft.unpickle import read_state
from tests.interventions.make import BASE

TABLE = np.random.default_rng(0).normal(size=(4, 16))
STATES = np.concatenate([np.ones((1, 16)), TABLE])  # as transformers' hidden_states
SOME = {"1": TABLE[1].astype(np.float16), "3": TABLE[3].astype(np.float16)}


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "read_states", lambda paths: [read_state(p) for p in paths])


def saved(folder: Path, suffix: str, value: Any) -> Path:
    path = folder / f"v{suffix}"
    if suffix == ".npz":
        np.savez(path, **value)
    elif suffix == ".npy":
        np.save(path, value)
    else:
        tensors = (
            {int(name): torch.tensor(part) for name, part in value.items()}
            if isinstance(value, dict)
            else torch.tensor(value)
        )
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize(
    ("suffix", "value", "layer", "layers"),
    [
        (".npy", TABLE[1], 1, [1]),
        (".pt", TABLE[1].astype(np.float32), 1, [1]),
        (".PTH", TABLE[None, 1], 1, [1]),
        (".npy", TABLE, None, [0, 1, 2, 3]),
        (".pt", TABLE[:, None], 2, [2]),
        (".npy", STATES.astype(np.float32), None, [0, 1, 2, 3]),
        (".pt", STATES, 3, [3]),
        (".npy", TABLE[1].astype(">f4"), 1, [1]),
        (".npy", TABLE[1].astype(np.longdouble), 1, [1]),
        (".npz", SOME, None, [1, 3]),
        (".pt", SOME, 3, [3]),
    ],
)
def test_each_vector_is_added_to_the_output_of_its_layer(
    suffix: str, value: Any, layer: int | None, layers: list[int], tmp_path: Path
) -> None:
    made = import_vectors(saved(tmp_path, suffix, value), base=BASE, layer=layer, template="chat")
    made = parse(serialise(made))
    assert [(e.layer, e.component, e.kind, str(e.positions)) for e in made.manifest.edits] == [
        (each, "block_output", "steering", "all") for each in layers
    ]
    assert made.manifest.template == "chat"
    for edit in made.canonical():
        wanted = 1 - 0.5 * TABLE[edit.layer][None].repeat(2, 0)
        np.testing.assert_allclose(edit.edited(torch.ones(2, 16), -0.5), wanted, atol=1e-3)


def test_a_vector_of_torch_is_read_by_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    path = tmp_path / "v.pt"
    torch.save(torch.nn.Parameter(torch.ones(16, dtype=torch.bfloat16)), path)
    made = import_vectors(path, base=BASE, layer=2, positions="l1")
    assert made.tensors["edits.0.v"].equal(torch.ones(16))
    assert str(made.manifest.edits[0].positions) == "l1"

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({1: Evil()}, path)
    with pytest.raises(InvalidFile, match=r"v\.pt: its pickle asks for 'posix mkdir'"):
        import_vectors(path, base=BASE)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("suffix", "value", "layer", "error", "message"),
    [
        (".npy", TABLE[1], None, ConfigError, "layer: .*v.npy holds one vector; say to which"),
        (".npy", TABLE[1], 4, ConfigError, "layer: 4; tiny has 0 to 3"),
        (".npy", TABLE, -1, ConfigError, "layer: -1; tiny has 0 to 3"),
        (".npz", SOME, 2, ConfigError, "layer: .*v.npz has none for 2, but for 1, 3"),
        (".npz", {"4": TABLE[1]}, None, InvalidFile, "has layer 4, but tiny has 0 to 3"),
        (".npz", {"up": TABLE[1]}, None, InvalidFile, "'up' is no layer's number"),
        (".npz", {"\u0661": TABLE[1]}, None, InvalidFile, "is no layer's number"),
        (".npz", {"1": TABLE[1], "01": TABLE[2]}, None, InvalidFile, "has layer 1 twice"),
        (".npz", {"1": TABLE[1, :8]}, None, InvalidFile, "has 8 numbers for '1', but tiny is 16"),
        (".npz", {"1": TABLE}, None, InvalidFile, "has 4 x 16 numbers for '1', but tiny is 16"),
        (".npy", TABLE[1, :8], 1, InvalidFile, "has 8 numbers, but tiny is 16 wide and has 4 lay"),
        (".pt", TABLE[:3], 1, InvalidFile, "has 3 x 16 numbers, .* a table of 4 x 16"),
        (".npy", np.float32(3), 1, InvalidFile, "has no row of numbers"),
        (".npy", np.arange(16), 1, InvalidFile, "holds int64 numbers; save floats"),
        (".npy", 0 * TABLE[1], 1, InvalidFile, "has no direction that is not zero"),
        (".npy", TABLE[1] * np.nan, 1, InvalidFile, "NaN or infinite"),
        (".npy", TABLE[1] * 1e300, 1, InvalidFile, "NaN or infinite"),
        (".npy", {"1": TABLE[1]}, None, InvalidFile, "not readable as numpy's arrays of numbers"),
        (".npy", np.array(["a"]), 1, InvalidFile, "not readable as numpy's arrays of numbers"),
    ],
)
def test_what_cannot_be_added_is_refused(
    suffix: str,
    value: Any,
    layer: int | None,
    error: type[ReftError],
    message: str,
    tmp_path: Path,
) -> None:
    path = saved(tmp_path, suffix, value)
    with pytest.raises(error, match=message):
        import_vectors(path, base=BASE, layer=layer)


def test_the_scale_multiplies_every_vector(tmp_path: Path) -> None:
    made = import_vectors(saved(tmp_path, ".npz", SOME), base=BASE, scale=-80)
    wanted = -80 * torch.tensor(SOME["3"]).float()
    assert made.tensors["edits.1.v"].equal(wanted)


@pytest.mark.parametrize("scale", [0, float("inf"), float("nan")])
def test_scales_that_are_none(scale: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scale: must be a finite number other than 0"):
        import_vectors(saved(tmp_path, ".npz", SOME), base=BASE, scale=scale)


def test_a_small_file_of_large_arrays_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "MOST_BYTES", 100_000)
    path = tmp_path / "v.npz"
    np.savez_compressed(path, np.zeros(20_000))
    assert path.stat().st_size < 1000
    with pytest.raises(InvalidFile, match="more than 100000 bytes"):
        import_vectors(path, base=BASE)


def test_files_that_are_cut_or_missing(tmp_path: Path) -> None:
    for suffix, value in ((".npy", TABLE), (".npz", SOME)):
        path = saved(tmp_path, suffix, value)
        data = path.read_bytes()
        for length in (0, 3, 20, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:length])
            with pytest.raises(InvalidFile, match="not readable as numpy's arrays"):
                import_vectors(path, base=BASE)
    for name in ("missing.npy", "missing.pt"):
        with pytest.raises(ConfigError, match=f"{name}: No such file"):
            import_vectors(tmp_path / name, base=BASE)


@pytest.mark.parametrize("name", ["v.npy", "v.npz", "v.pt", "v.gguf", "v"])
def test_nobody_waits_for_a_pipe(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    writer = os.open(tmp_path / name, os.O_RDWR | os.O_NONBLOCK)  # an opened pipe does not wait
    os.write(writer, b"no vector")
    with pytest.raises(InvalidFile, match="not a regular file"):
        import_foreign(tmp_path / name, base=BASE)
    os.close(writer)
