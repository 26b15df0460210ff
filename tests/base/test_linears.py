"""Packed weights: used where torch has the operators, and left alone where it has not."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from reft_runtime.base import linears
from reft_runtime.base.linears import product_of
from reft_runtime.loading.loader import adopt_model
from tests.helpers.models import generate, make_core, prompt, request, run, tiny

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


@pytest.fixture
def fresh() -> Iterator[None]:
    """What torch has is looked at anew, here and afterwards."""
    linears._packing.cache_clear()
    yield
    linears._packing.cache_clear()


@pytest.fixture
def torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are packed for torch's products, whatever the CPU has."""
    monkeypatch.setattr(linears, "_multiplying", lambda weight: None)


def packed(model: nn.Module) -> list[bool]:
    """Whether linear layers have a forward of ours."""
    return ["forward" in vars(m) for m in model.modules() if isinstance(m, nn.Linear)]


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
    reason="torch was built without oneDNN",
)
@pytest.mark.usefixtures("torchs_own")
def test_all_linear_layers_are_packed() -> None:
    """Fails where a new torch has other operators: then everything works, at half the speed."""
    loaded = adopt_model(tiny("llama"))
    assert all(packed(loaded.model))
    assert loaded.packed.layers == len(packed(loaded.model))
    assert all(m.weight.is_mkldnn for m in loaded.model.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_copied_once_where_there_are_products_of_our_own(dtype: torch.dtype) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    nn.Module.to(model, dtype)
    if linears._multiplying(torch.ones(1, 1)) is None:
        pytest.skip("this CPU has no matrix tiles")
    loaded = adopt_model(model)
    assert all(packed(loaded.model))
    assert loaded.packed.layers == len(packed(loaded.model))
    assert loaded.packed.added_bytes == 0
    weight = loaded.model.get_input_embeddings().weight
    assert loaded.model.lm_head.weight is weight
    kept = linears.packed_parts(loaded.model.lm_head)
    assert kept is not None
    assert kept[0].data_ptr() == weight.data_ptr()


def test_layers_that_share_a_weight_share_its_copy() -> None:
    if linears._multiplying(torch.ones(1, 1)) is None:
        pytest.skip("this CPU has no matrix tiles")
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    rows = torch.randn(3, 8)
    wanted = [layer(rows) for layer in (first, second)]
    linears.prepack(nn.Sequential(first, second).requires_grad_(False))
    assert first.weight is second.weight
    for layer, output in zip((first, second), wanted, strict=True):
        kept = linears.packed_parts(layer)
        assert kept is not None
        assert kept[0].data_ptr() == first.weight.data_ptr()
        torch.testing.assert_close(layer(rows), output)


@pytest.mark.parametrize("fixture", ["torchs_own", None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(65, 48), (1, 97, 48), (2, 40, 48), (128, 48), (48,), (0, 48)])
def test_products_of_any_number_of_rows(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    fixture: str | None,
    request: pytest.FixtureRequest,
) -> None:
    """Long ones are computed of more rows than there are."""
    if fixture is not None:
        request.getfixturevalue(fixture)
    torch.manual_seed(0)
    weight, bias, rows = (torch.randn(size).to(dtype) for size in ((32, 48), (32,), shape))
    product, _ = product_of(weight, bias)
    given = product(rows)
    assert given.is_contiguous()
    tolerance = DTYPES[dtype]
    wanted = linear(rows.double(), weight.double(), bias.double()).to(dtype)
    torch.testing.assert_close(given, wanted, rtol=tolerance, atol=tolerance)


def _nothing(*_: Any) -> None:
    raise RuntimeError("no such operator")


REAL = torch.ops.mkldnn
MISSING: dict[str, Any] = {
    "none": SimpleNamespace(),
    "no product": SimpleNamespace(_reorder_linear_weight=REAL._reorder_linear_weight),
    "another signature": SimpleNamespace(
        _reorder_linear_weight=REAL._reorder_linear_weight,
        _linear_pointwise=SimpleNamespace(default=lambda rows, weight: rows),
    ),
    "another result": SimpleNamespace(
        _reorder_linear_weight=REAL._reorder_linear_weight,
        _linear_pointwise=SimpleNamespace(default=lambda rows, *_: 2 * rows),
    ),
    "another layout": SimpleNamespace(
        _reorder_linear_weight=lambda weight, rows: weight,
        _linear_pointwise=REAL._linear_pointwise,
    ),
    "an error": SimpleNamespace(
        _reorder_linear_weight=_nothing, _linear_pointwise=REAL._linear_pointwise
    ),
}


@pytest.mark.usefixtures("fresh", "torchs_own")
@pytest.mark.parametrize("operators", MISSING.values(), ids=MISSING)
def test_without_the_operators_layers_stay_as_they_are(
    operators: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    model = tiny("llama", num_hidden_layers=1)
    wanted = generate(model, prompt(5), 6)
    with caplog.at_level(logging.WARNING):
        loaded = adopt_model(copy.deepcopy(model))
    assert not any(m.weight.is_mkldnn for m in loaded.model.modules() if isinstance(m, nn.Linear))
    assert caplog.text.count("not packed") == 1
    core = make_core(loaded)
    assert run(core, [request("a", prompt(5), max_tokens=6)])["a"][0] == wanted
