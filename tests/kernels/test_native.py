"""The compiled operators against torch's own, and what happens without them."""

import ctypes
import logging
import math
from array import array
from itertools import product
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, rms_norm, scaled_dot_product_attention, silu
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

from reft_runtime.kernels.cpu import HeadScoring, Kernels, build
from reft_runtime.kernels.cpu.picking import Picking
from reft_runtime.kernels.norms import NormForm
from reft_runtime.machine.dtypes import DTYPES
from server.settings import Dtype
from tests.helpers.sampling import bits_of

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}

dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(given: Tensor, wanted: Tensor) -> None:
    assert given.dtype == wanted.dtype
    tolerance = TOLERANCE[given.dtype]
    torch.testing.assert_close(given, wanted, rtol=tolerance, atol=tolerance)


@dtypes
@pytest.mark.parametrize("rows", [1, 5, 700])
def test_rms_norm(operators: Kernels, dtype: torch.dtype, rows: int) -> None:
    x, weight = rand(1, rows, 37, dtype=dtype), rand(37, dtype=dtype, seed=1)
    before = x.clone()
    close(operators.rms_norm(x, weight, 1e-5), rms_norm(x, (37,), eps=1e-5) * weight)
    assert torch.equal(x, before)


@dtypes
@pytest.mark.parametrize("rows", [1, 700])
def test_norms_from_one(operators: Kernels, dtype: torch.dtype, rows: int) -> None:
    x, weight = rand(rows, 37, dtype=dtype), rand(37, dtype=dtype, seed=1)
    wanted = rms_norm(x.float(), (37,), eps=1e-5) * (1 + weight.float())
    close(operators.rms_norm(x, weight, 1e-5, NormForm.GEMMA), wanted.to(dtype))


@dtypes
@pytest.mark.parametrize("rows", [1, 700])
def test_gated_norms(operators: Kernels, dtype: torch.dtype, rows: int) -> None:
    x, gate = rand(rows, 37, dtype=dtype), rand(rows, 37, dtype=dtype, seed=1)
    weight = rand(37, dtype=dtype, seed=2)
    made = operators.gated_rms_norm(x, gate, weight, 1e-5)
    assert made is not None
    close(made, rms_norm(x, (37,), eps=1e-5) * weight * silu(gate))
    assert operators.gated_rms_norm(x, gate.double(), weight, 1e-5) is None
    with pytest.raises(ValueError, match="shapes disagree"):
        operators.gated_rms_norm(x, gate[:, :36], weight, 1e-5)


@dtypes
@pytest.mark.parametrize("rows", [1, 700])
def test_add_rms_norm(operators: Kernels, dtype: torch.dtype, rows: int) -> None:
    x, more = rand(rows, 40, dtype=dtype), rand(rows, 40, dtype=dtype, seed=1)
    weight = rand(40, dtype=dtype, seed=2)
    total, normal = operators.add_rms_norm(x, more, weight, 1e-5)
    assert torch.equal(total, x + more)
    close(normal, rms_norm(x + more, (40,), eps=1e-5) * weight)


@dtypes
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("width", [1, 1023, 1025, 2100])
def test_silu_mul(operators: Kernels, dtype: torch.dtype, rows: int, width: int) -> None:
    gate, up = rand(rows, width, dtype=dtype) * 5, rand(rows, width, dtype=dtype, seed=1)
    given = operators.silu_mul(torch.cat((gate, up), -1))
    close(given, (silu(gate.float()) * up.float()).to(dtype))


def test_silu_mul_at_the_extremes(operators: Kernels) -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, math.inf, math.nan])
    given = operators.silu_mul(torch.cat((gate, torch.ones_like(gate))))
    torch.testing.assert_close(given, silu(gate), equal_nan=True, rtol=1e-6, atol=1e-30)


def test_norms_in_bfloat16_that_are_rounded_once(operators: Kernels) -> None:
    x, gate = (rand(200, 48, dtype=torch.bfloat16, seed=seed) for seed in range(2))
    weight = rand(48, dtype=torch.bfloat16, seed=2)
    normal = rms_norm(x.double(), (48,), eps=1e-5) * weight.double()
    gated = operators.gated_rms_norm(x, gate, weight, 1e-5, once=True)
    assert gated is not None
    for found, wanted in (
        (operators.rms_norm(x, weight, 1e-5, NormForm.OLMO2), normal),
        (gated, normal * silu(gate.double())),
    ):
        assert float((found == wanted.bfloat16()).float().mean()) > 0.995


def greedy(operators: Kernels, logits: Tensor) -> list[int]:
    return operators.pick(logits, [Picking()] * len(logits)).tokens


@dtypes
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("width", [1, 31, 20_001])
@pytest.mark.parametrize("shift", [-9, 0, 9])
def test_greedy(operators: Kernels, dtype: torch.dtype, rows: int, width: int, shift: int) -> None:
    logits = rand(rows, width, dtype=dtype) + shift  # in bfloat16 many of them are equal
    assert greedy(operators, logits) == logits.argmax(-1).tolist()


@dtypes
@pytest.mark.parametrize("width", [1, 31, 32, 33, 600])
def test_allowed_tokens(operators: Kernels, dtype: torch.dtype, width: int) -> None:
    row = rand(width, dtype=dtype)
    for kept in (range(width), range(0), range(0, width, 3), range(30, width)):
        among = torch.full_like(row, -torch.inf)
        among[list(kept)] = row[list(kept)]
        wanted = int(among.argmax()) if len(kept) else -1
        allowed = bits_of(kept, width)
        assert operators.pick(row[None], [Picking(allowed=allowed)]).tokens == [wanted]


@dtypes
def test_greedy_at_the_extremes(operators: Kernels, dtype: torch.dtype) -> None:
    inf, nan = math.inf, math.nan
    wanted = {
        (0.0, -0.0, -1.0): 0,
        (-1.0, -0.0, 0.0): 1,
        (-inf, -3.0, -2.0): 2,
        (-inf, -inf, -inf): -1,
        (1.0, inf, 2.0): -1,
        (1.0, nan, 2.0): -1,
        (1.0, -nan, 2.0): -1,
        (3e38, -3e38, -inf): 0,
    }
    given = greedy(operators, torch.tensor([list(row) for row in wanted], dtype=dtype))
    assert given == list(wanted.values())


def test_draw_keeps_what_reaches_the_share(operators: Kernels) -> None:
    """Many equal scores, and a row so long that it is cut in parts; points near both ends."""
    scores = (rand(4, 150_000) * 3).round()
    scores[:, ::7] = -math.inf
    ways = ((0, 1.0), (0, 0.5), (1000, 1.0), (1000, 0.5), (149_999, 1 - 1e-9))
    for temperature, (top_k, top_p) in product((0.7, 1000.0), ways):
        for point in (0.0, 0.37, 1 - 2**-53):
            picking = Picking(temperature=temperature, top_k=top_k, top_p=top_p, point=point)
            given = operators.pick(scores, [picking] * 4)
            for row, token in zip(scores, given.tokens, strict=True):
                order = row.double().sort(descending=True, stable=True)
                weights = (order.values / temperature).softmax(-1)
                if top_k:
                    weights[top_k:] = 0
                before = weights.cumsum(-1) - weights
                kept = order.indices[(before < top_p * weights.sum()) & (weights > 0)].sort().values
                cumulated = (row.double()[kept] / temperature).softmax(-1).cumsum(-1)
                at = int((kept == token).nonzero())  # an error where it was not kept
                # Sums in float64 are exact enough to tell all but neighbours apart.
                assert cumulated[max(0, at - 2)] <= point + 1e-9 or at < 2
                assert cumulated[min(len(kept) - 1, at + 1)] >= point - 1e-9


def test_settings_that_do_not_fit_the_rows(operators: Kernels) -> None:
    ids, numbers = array("q", [2, 33]), array("q", [1, 1])
    for bad in (
        [],
        [Picking()] * 2,
        [Picking(scored=33)],
        [Picking(seen=(ids, numbers))],
        [Picking(added=(array("q", [-1]), array("d", [1])))],
        [Picking(added=(ids[:1], array("d")))],
        [Picking(added=(array("i", [1]), array("d", [1])))],
        [Picking(allowed=torch.zeros(1, dtype=torch.int32))],
        [Picking(allowed=torch.zeros(2))],
        [Picking(allowed=torch.zeros(1, 2, dtype=torch.int32))],
        [Picking(allowed=torch.zeros(4, dtype=torch.int32)[::2])],
    ):
        with pytest.raises(ValueError, match="pick: "):
            operators.pick(rand(1, 33), bad)


@dtypes
@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("head", [16, 24])
def test_rotate(operators: Kernels, dtype: torch.dtype, tokens: int, head: int) -> None:
    # Columns of one product, as a merged linear layer gives them; perhaps a part of each head.
    both = rand(tokens, 9, head, dtype=dtype)
    query, key, rest = torch.split(both[..., :16], [4, 2, 3], 1)
    others, behind = rest.clone(), both[..., 16:].clone()
    angles = rand(tokens, 8, seed=2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def turned(heads: Tensor) -> Tensor:
        wide = heads.float()
        half = torch.cat((-wide[..., 8:], wide[..., :8]), -1)
        return (wide * cos[:, None].float() + half * sin[:, None].float()).to(dtype)

    wanted = turned(query), turned(key)
    operators.rotate_(query, key, cos, sin)
    close(query, wanted[0])
    close(key, wanted[1])
    assert torch.equal(rest, others)
    assert torch.equal(both[..., 16:], behind)


@dtypes
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("dims", [(8, 6), (128, 128), (256, 40)])
@pytest.mark.parametrize("normalised", [True, False])
def test_delta_rule(
    operators: Kernels, dtype: torch.dtype, tokens: int, dims: tuple[int, int], normalised: bool
) -> None:
    key_dim, value_dim = dims
    # Columns of one product, as a linear layer gives them.
    both = rand(3, tokens, 4 * key_dim + 4 * value_dim, dtype=dtype) / key_dim**0.5
    query, key, value = both.split([2 * key_dim, 2 * key_dim, 4 * value_dim], -1)
    heads = query.unflatten(-1, (2, -1)), key.unflatten(-1, (2, -1)), value.unflatten(-1, (4, -1))
    gate, beta = -rand(3, tokens, 4).exp(), rand(3, tokens, 4, dtype=dtype, seed=1).sigmoid()
    state = rand(3, 4, key_dim, value_dim, seed=2)
    out, kept = torch_recurrent_gated_delta_rule(
        *heads,
        gate,
        beta,
        initial_state=state.clone(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=normalised,
    )
    made = operators.delta_rule_(heads, gate, beta, state, normalised=normalised)
    assert made is not None
    close(made, out)
    assert kept is not None
    close(state, kept)


def test_what_delta_rule_does_not_take(operators: Kernels) -> None:
    state = rand(1, 1, 8, 8)
    untouched = state.clone()
    heads, gate = (rand(1, 1, 1, 8),) * 3, rand(1, 1, 1)
    wide, wider = rand(1, 1, 1, 512), rand(1, 1, 512, 8)
    assert operators.delta_rule_((wide, wide, heads[2]), gate, gate, wider, normalised=True) is None
    assert operators.delta_rule_(heads, gate, gate, state.bfloat16(), normalised=True) is None
    assert operators.delta_rule_(heads, gate, gate, state.mT, normalised=True) is None
    half = tuple(tensor.half() for tensor in heads)
    assert (
        operators.delta_rule_((half[0], half[1], half[2]), gate, gate, state, normalised=True)
        is None
    )
    with pytest.raises(ValueError, match="shapes disagree"):
        operators.delta_rule_(heads, gate, gate, rand(1, 2, 8, 8), normalised=True)
    assert torch.equal(state, untouched)


@dtypes
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("more", [0, 2])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("channels", [1, 37, 1101])
@pytest.mark.parametrize(("count", "tokens"), [(1, 1), (9, 1), (1, 2), (1, 30), (3, 3)])
def test_convolve(
    operators: Kernels,
    dtype: torch.dtype,
    taps: int,
    more: int,
    biased: bool,
    channels: int,
    count: int,
    tokens: int,
) -> None:
    state = rand(count, channels, taps - 1 + more, dtype=dtype)
    # Columns of a wider product, as a merged linear layer gives them.
    inputs = rand(count, tokens, channels + 3, dtype=dtype, seed=1)[..., :channels]
    weight = rand(channels, taps, dtype=dtype)
    bias = rand(channels, dtype=dtype, seed=2) if biased else None
    every = torch.cat((state, inputs.transpose(1, 2)), -1)
    wanted = conv1d(
        every[..., -taps - tokens + 1 :].float(),
        weight[:, None].float(),
        None if bias is None else bias.float(),
        groups=channels,
    ).transpose(1, 2)
    for activated in (False, True):
        kept = state.clone()
        made = operators.convolve_(inputs, kept, weight, bias, silu=activated)
        assert made is not None
        assert torch.equal(kept, every[..., tokens:])
        close(made, (silu(wanted) if activated else wanted).to(dtype))


@dtypes
def test_convolutions_of_many_taps_are_left_to_others(
    operators: Kernels, dtype: torch.dtype
) -> None:
    inputs, state = rand(1, 2, 3, dtype=dtype), rand(1, 3, 9, dtype=dtype)
    kept = state.clone()
    assert operators.convolve_(inputs, state, rand(3, 9, dtype=dtype), None, silu=True) is None
    assert torch.equal(kept, state)


@dtypes
@pytest.mark.parametrize(
    ("dim", "group"), [(64, 1), (64, 3), (64, 9), (96, 7), (128, 3), (128, 16), (256, 2), (24, 3)]
)
@pytest.mark.parametrize("window", [0, 5, 70])
def test_attend(operators: Kernels, dtype: torch.dtype, dim: int, group: int, window: int) -> None:
    """Decoding rows of several lengths, and one prompt whose tokens see each other."""
    kv_heads, capacity = 2, 160
    slots = [4, 0, 2, 1, 1, 1]
    positions = [0, 63, 64, 130, 131, 132]
    both = rand(6, kv_heads * (group + 2), dim, dtype=dtype)
    query, key, value = torch.split(both, [kv_heads * group, kv_heads, kv_heads], 1)
    rows = rand(5, 2, kv_heads, capacity, dim, dtype=dtype, seed=3)
    keys, values = rows.unbind(1)
    # What lies beyond a row's own tokens may be anything.
    keys[0, :, 64:] = values[0, :, 64:] = math.nan
    untouched = keys[3].clone()
    out = query.new_empty(query.shape)
    places = torch.tensor(
        [(rows[slot].data_ptr(), capacity, at) for slot, at in zip(slots, positions, strict=True)]
    )
    before = 0, kv_heads * dim
    operators.attend(query, key, value, out, places, before, HeadScoring(0.2, window))
    for token, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        assert torch.equal(keys[slot, :, position], key[token])
        assert torch.equal(values[slot, :, position], value[token])
        first = max(0, position - window + 1) if window else 0
        seen = slice(first, position + 1)
        wanted = scaled_dot_product_attention(
            query[token].view(kv_heads, group, dim).float(),
            keys[slot, :, seen].float(),
            values[slot, :, seen].float(),
            scale=0.2,
        )
        close(out[token], wanted.reshape(-1, dim).to(dtype))
    assert torch.equal(keys[3], untouched)


@dtypes
@pytest.mark.parametrize("dim", [16, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("window", [0, 5, 70])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_attend_prompts(
    operators: Kernels, dtype: torch.dtype, dim: int, window: int, group: int
) -> None:
    """Beginnings and continuations of prompts, none a multiple of a tile or a block."""
    kv_heads, capacity = 2, 320
    segments = [(0, 2, 0, 65), (65, 0, 130, 9), (74, 1, 63, 100), (174, 4, 250, 50)]
    tokens = 224
    both = rand(tokens, kv_heads * (group + 2), dim, dtype=dtype)
    query, key, value = torch.split(both, [kv_heads * group, kv_heads, kv_heads], 1)
    rows = rand(5, 2, kv_heads, capacity, dim, dtype=dtype, seed=3)
    keys, values = rows.unbind(1)
    untouched = keys[3].clone()
    for _, slot, start, length in segments:  # what lies beyond may be anything
        keys[slot, :, start + length :] = values[slot, :, start + length :] = math.nan
    out = query.new_empty(query.shape)
    places = torch.tensor(
        [(rows[slot].data_ptr(), capacity, first, *rest) for first, slot, *rest in segments]
    )
    before = 0, kv_heads * dim
    operators.attend_prompts(query, key, value, out, places, before, HeadScoring(0.2, window))
    for first, slot, start, length in segments:
        own, stop = slice(first, first + length), start + length
        assert torch.equal(keys[slot, :, start:stop], key[own].transpose(0, 1))
        assert torch.equal(values[slot, :, start:stop], value[own].transpose(0, 1))
        at, columns = torch.arange(start, stop)[:, None], torch.arange(stop)
        seen = (columns <= at) & (columns > at - (window or stop))
        wanted = scaled_dot_product_attention(
            query[own].transpose(0, 1).float(),
            keys[slot, :, :stop].float().repeat_interleave(group, 0),
            values[slot, :, :stop].float().repeat_interleave(group, 0),
            attn_mask=seen,
            scale=0.2,
        ).transpose(0, 1)
        if dtype == torch.float32:
            torch.testing.assert_close(out[own], wanted, rtol=1e-5, atol=1e-5)
        else:
            close(out[own], wanted.to(dtype))
    assert torch.equal(keys[3], untouched)


@dtypes
def test_a_token_that_is_not_finite_spoils_no_other_prompt(
    operators: Kernels, dtype: torch.dtype
) -> None:
    query, key, value = (rand(40, 2, 64, dtype=dtype) for _ in range(3))
    query[3] = math.nan
    rows = torch.zeros(2, 2, 2, 32, 64, dtype=dtype)
    out = torch.empty_like(query)
    places = [(rows[0].data_ptr(), 32, 0, 0, 20), (rows[1].data_ptr(), 32, 20, 0, 20)]
    operators.attend_prompts(
        query, key, value, out, torch.tensor(places), (0, 128), HeadScoring(1.0)
    )
    assert out[3].isnan().all()
    assert out[:3].isfinite().all()
    assert out[4:].isfinite().all()


def test_a_row_that_is_not_finite_spoils_no_other(operators: Kernels) -> None:
    query, key, value = rand(2, 2, 64), rand(2, 2, 64), rand(2, 2, 64)
    query[0] = math.nan
    rows = torch.zeros(2, 2, 2, 16, 64)
    out = torch.empty_like(query)
    places = torch.tensor([(row.data_ptr(), 16, 0) for row in rows])
    operators.attend(query, key, value, out, places, (0, 128), HeadScoring(1.0))
    assert out[0].isnan().all()
    close(out[1], value[1])


@pytest.mark.parametrize("place", [(16, 16), (16, -1), (0, 0)])
def test_a_place_beyond_a_row_is_refused(operators: Kernels, place: tuple[int, int]) -> None:
    """Capacity and position of the second of two tokens; the first one is not written either."""
    heads, rows = rand(2, 2, 64), torch.zeros(2, 2, 2, 16, 64)
    out = torch.empty_like(heads)
    address = rows.data_ptr()
    places = torch.tensor([(address, 16, 0), (address, *place)])
    with pytest.raises(ValueError, match="beyond"):
        operators.attend(heads, heads, heads, out, places, (0, 128), HeadScoring(1.0))
    segments = [(address, 16, 0, 0, 1), (address, place[0], 1, place[1], 1)]
    with pytest.raises(ValueError, match="beyond"):
        operators.attend_prompts(
            heads, heads, heads, out, torch.tensor(segments), (0, 128), HeadScoring(1.0)
        )
    with pytest.raises(ValueError, match="beyond"):
        operators.attend_prompts(
            heads,
            heads,
            heads,
            out,
            torch.tensor([(address, 16, 1, 0, 2)]),
            (0, 128),
            HeadScoring(1.0),
        )
    assert not rows.any()


@dtypes
@pytest.mark.parametrize("dim", [24, 64, 128])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_not_finite_is_seen(
    operators: Kernels, dtype: torch.dtype, dim: int, number: float
) -> None:
    rows = torch.ones(2, 1, 32, dim, dtype=dtype)
    rows[0, 0, 3, 5] = number
    heads, out = torch.ones(1, 2, dim, dtype=dtype), torch.empty(1, 2, dim, dtype=dtype)
    places = torch.tensor([(rows.data_ptr(), 32, 20)])
    own = heads[:, :1]
    operators.attend(heads, own, own, out, places, (0, dim), HeadScoring(1.0))
    assert not out.isfinite().any()
    if not operators.attends_prompts(own, own):
        return
    rows[0, 0, 3, 5] = number
    prompt, results = heads.repeat(20, 1, 1), out.repeat(20, 1, 1)
    places = torch.tensor([(rows.data_ptr(), 32, 0, 4, 20)])
    own = prompt[:, :1].contiguous()
    operators.attend_prompts(prompt, own, own, results, places, (0, dim), HeadScoring(1.0))
    assert not results.isfinite().any()


def test_shapes_that_disagree_are_refused(operators: Kernels) -> None:
    heads, rows = rand(2, 4, 64), torch.zeros(2, 2, 4, 16, 64)
    out, wide = torch.empty_like(heads), rand(2, 130)
    places = torch.tensor([(rows.data_ptr(), 16, 0), (rows.data_ptr(), 16, 1)])
    angles = rand(2, 64)

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        places: Tensor,
        before: tuple[int, int] = (0, 256),
        sinks: Tensor | None = None,
    ) -> None:
        scoring = HeadScoring(1.0, sinks=sinks)
        operators.attend(query, key, value, out, places, before, scoring)

    for bad in (
        lambda: attend(heads, heads[:1], heads, out, places),
        lambda: attend(heads, heads, heads[:, :2], out, places),
        lambda: attend(heads, heads[:, :3], heads[:, :3], out, places, before=(0, 9)),
        lambda: attend(heads, heads, heads, out[:1], places),
        lambda: attend(heads, heads, rand(2, 4, 16), out, places),
        lambda: attend(heads, heads, rand(2, 4, 65), rand(2, 4, 65), places, before=(0, 0)),
        lambda: attend(heads, heads, heads, out, places[:1]),
        lambda: attend(heads, heads, heads, out, places[:, :2]),
        lambda: attend(heads, heads, heads, out, places, sinks=rand(3)),
        lambda: attend(heads, heads, heads, out, places, sinks=rand(4).bfloat16()),
        lambda: operators.rms_norm(wide, rand(131), 1e-5),
        lambda: operators.rms_norm(wide, rand(65), 1e-5),
        lambda: operators.rms_norm(wide, rand(130).bfloat16(), 1e-5),
        lambda: operators.add_rms_norm(wide, wide[:1], rand(130), 1e-5),
        lambda: operators.silu_mul(rand(2, 131)),
        lambda: operators.rotate_(heads, heads[:1], angles, angles),
        lambda: operators.rotate_(heads, heads, angles[:1], angles[:1]),
        lambda: operators.rotate_(heads, heads, angles.bfloat16(), angles.bfloat16()),
    ):
        with pytest.raises(ValueError, match=r"shapes|places|width|for rows|gate|sinks"):
            bad()
    assert not rows.any()


def test_what_the_operators_take(operators: Kernels) -> None:
    supports, packs, rotates = operators.supports, operators.packs, operators.rotates
    attends, attends_prompts = operators.attends, operators.attends_prompts
    heads = rand(3, 4, 16)
    assert supports(heads, heads)
    assert attends(heads, heads, heads)
    assert not supports(heads, heads.bfloat16())
    assert not supports(heads.half())
    assert not supports(heads.transpose(0, 1))
    assert not supports(heads.to("meta"))
    assert packs(heads[:, 1:3], heads)
    assert not supports(heads[:, 1:3])
    for other in (heads.transpose(0, 1), heads[..., :8], heads.half()):
        assert not packs(other)
    assert rotates(heads[:, 1:3], heads[..., :8], heads.transpose(0, 1))
    for other in (heads.half(), heads[..., ::2], heads[:, :1].expand(3, 4, 16)):
        assert not rotates(other)
    assert attends(heads, heads, rand(3, 4, 8))  # values may be narrower
    assert attends(heads.transpose(0, 1), heads, heads)  # they are packed first
    assert not attends(heads, heads, heads.bfloat16())
    assert attends_prompts(heads, heads)
    assert not attends_prompts(heads, rand(3, 4, 8))
    assert not attends_prompts(rand(3, 4, 24), rand(3, 4, 24))
    latents = rand(3, 1, 576), rand(3, 1, 512)
    assert attends_prompts(*latents, values_in_keys=True)
    assert not attends_prompts(*latents)
    wide = rand(1, 1, 577)
    assert not attends(wide, wide, wide)
    learned = rand(3, 4, 16).requires_grad_()
    assert not supports(heads, learned)
    assert not packs(learned)
    assert not attends(heads, heads, learned)


@pytest.mark.parametrize("group", [1, 16, 17, 48, 49, 128])
@pytest.mark.parametrize("dim", [16, 24, 256, 576, 577])
def test_the_library_takes_the_heads_that_it_says_it_takes(
    operators: Kernels, dim: int, group: int
) -> None:
    query, key, rows = rand(1, group, dim), rand(1, 1, dim), torch.zeros(2 * 16 * dim)
    out = torch.empty_like(query)
    for attend, taken, place in (
        (operators.attend, operators.attends(query, key, key), (16, 0)),
        (operators.attend_prompts, operators.attends_prompts(key, key), (16, 0, 0, 1)),
    ):
        rows.zero_()
        places = torch.tensor([(rows.data_ptr(), *place)])
        if taken:
            attend(query, key, key, out, places, (0, dim), HeadScoring(1.0))
            close(out, key.expand_as(query))
        else:
            with pytest.raises(ValueError, match="beyond"):
                attend(query, key, key, out, places, (0, dim), HeadScoring(1.0))
            assert not rows.any()


def test_dtypes_have_one_table(operators: Kernels) -> None:
    """The option's values, which need no torch, and what the library exports, agree with it."""
    assert get_args(Dtype) == ("auto", *DTYPES)
    taken = [name for name, dtype in DTYPES.items() if operators.supports(rand(2, dtype=dtype))]
    assert taken == ["float32", "bfloat16"]


def test_it_is_compiled_once_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("REFT_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O0"))  # a quarter of the time
    assert isinstance(build.load_library(), ctypes.CDLL)
    (compiled,) = (tmp_path / "native").iterdir()
    written = compiled.stat().st_mtime_ns
    assert isinstance(build.load_library(), ctypes.CDLL)
    assert compiled.stat().st_mtime_ns == written
    assert caplog.text.count("Compiling the C++ kernels") == 1


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    compiler: str,
) -> None:
    monkeypatch.setenv("REFT_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.INFO):
        assert build.load_library() is None
    assert "plain torch operators" in caplog.text
