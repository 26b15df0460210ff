"""Fused operators for the parts of a layer between its matrix products, by device."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from reft_runtime.kernels.cpu import DeltaNetWeights as DeltaNetWeights
from reft_runtime.kernels.cpu import HeadScoring as HeadScoring
from reft_runtime.kernels.cpu import Kernels as Kernels
from reft_runtime.kernels.cpu import RowEdit as RowEdit
from reft_runtime.kernels.cpu import RowEdits as RowEdits
from reft_runtime.kernels.cpu import kernels
from reft_runtime.kernels.cpu.decoder_layer import DecoderLayer as DecoderLayer
from reft_runtime.kernels.cpu.decoder_layer import LayerRun as LayerRun
from reft_runtime.kernels.cpu.decoder_layer import LayerWeights as LayerWeights
from reft_runtime.kernels.cpu.decoder_layer import Norm as Norm
from reft_runtime.kernels.cpu.decoder_layer import PackedLinear as PackedLinear
from reft_runtime.kernels.cpu.decoder_layer import StepPlaces as StepPlaces
from reft_runtime.kernels.cpu.picking import Picking as Picking
from reft_runtime.kernels.cpu.picking import Picks as Picks
from reft_runtime.kernels.cpu.torch_functions import padded_rows as padded_rows
from reft_runtime.kernels.norms import NormForm as NormForm

_log = logging.getLogger(__name__)


class Operators(Protocol):
    """A device's operators; shapes are trusted, because the callers take them from models.

    Arguments are contiguous tensors of one dtype, as `supports` says (heads: as `rotates` says).
    `name` is what the log calls the operators.
    """

    name: str

    def supports(self, *tensors: Tensor) -> bool:
        """Whether the operators take these tensors.

        They must be contiguous, of one dtype that the operators know, and need no gradient.
        """

    def rotates(self, *heads: Tensor) -> bool:
        """Whether `rotate_` takes these heads [T, heads, dim].

        Dtype and gradient are as for `supports`, but only the numbers of a head must lie side by
        side. Tokens may lie apart: heads are often columns of a wider product. So may heads: they
        may be the first numbers of wider ones.
        """

    def rms_norm(
        self,
        rows: Tensor,
        weight: Tensor,
        epsilon: float,
        form: NormForm = NormForm.LLAMA,
    ) -> Tensor:
        """Rows [..., d] divided by their root mean square, and `weight` [d] applied as in a form.

        `epsilon` is added to the mean of the squares.
        """

    def add_rms_norm(
        self, rows: Tensor, more: Tensor, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        """The sum of two tensors [..., d], and its `rms_norm` in Llama's form."""

    def silu_mul(self, both: Tensor) -> Tensor:
        """silu(gate) * up [..., d] of rows [..., 2 d] that hold gate and up side by side."""

    def rotate_(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotary positions in place: heads [T, heads, dim], `cos` and `sin` [T, dim].

        The halves of a head are rotated against each other (`rotate_half` in transformers).
        """


@runtime_checkable
class ProductOperators(Operators, Protocol):
    """Operators that include the matrix products beside them. Weights have no bias."""

    def gated_product(self, rows: Tensor, weight: Tensor) -> Tensor:
        """`silu_mul` of rows [T, k] times a weight [2 d, k] that gives gate and up."""

    def add_product_(self, rows: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
        """Add inputs [T, k] times a weight [d, k] to rows [T, d] in place; returns the rows."""

    def add_product_and_norm(
        self, rows: Tensor, inputs: Tensor, weight: Tensor, norm: Tensor, epsilon: float
    ) -> Tensor:
        """`add_product_`; returns `rms_norm` of its rows with the weight `norm` [d]."""


@runtime_checkable
class MixerOperators(Protocol):
    """Operators for recurrent layers. Those that return a tensor return None where they do not take
    what they are given.
    """

    def delta_rule_(
        self,
        heads: tuple[Tensor, Tensor, Tensor],
        gate: Tensor,
        beta: Tensor,
        state: Tensor,
        *,
        normalised: bool,
    ) -> Tensor | None:
        """The gated delta rule, token by token: returns [n, T, value_heads, value_dim].

        `heads` are queries and keys [n, T, key_heads, key_dim] and values [n, T, value_heads,
        value_dim] of n sequences; each query head serves as many consecutive value heads as there
        are to one. They are divided by their lengths before if `normalised`. `gate`, the logarithm
        of the decay, and `beta` are [n, T, value_heads]. `state` [n, value_heads, key_dim,
        value_dim], float32, is changed in place.
        """

    def convolve_(
        self, inputs: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool
    ) -> Tensor | None:
        """Causal convolutions of n sequences, a channel each: returns [n, tokens, channels].

        `inputs` are [n, tokens, channels], `weight` [channels, taps], `bias` [channels]. `state`
        [n, channels, kept] are the newest inputs before them, at least taps - 1; it is changed in
        place. With `silu` the result is silu of the convolution.
        """

    def gated_rms_norm(
        self, rows: Tensor, gate: Tensor, weight: Tensor, epsilon: float, *, once: bool = False
    ) -> Tensor | None:
        """`Operators.rms_norm` of rows [n, d], times silu of `gate` [n, d].

        With `once` nothing is rounded but the result.
        """

    def gated_delta_net_(
        self, rows: Tensor, weights: DeltaNetWeights, inputs: Tensor, state: Tensor, out: Tensor
    ) -> None:
        """All that a gated delta net computes between its two products, for n sequences.

        `rows` [n * T, ...] hold side by side queries, keys and values, the gates of the norm
        [value_heads * value_dim], and what beta and the decay are made of [value_heads] each.
        `convolve_`, with silu and the states `inputs`, `delta_rule_` of normalised queries and
        keys, and `gated_rms_norm` fill `out` [n * T, value_heads * value_dim]. Raises ValueError
        if shapes disagree, or if it does not take the tensors.
        """


def operators_for(device: torch.device) -> Operators | None:
    """The operators of a device; None if there are none, for example without a compiler."""
    if device.type == "cpu":
        return cpu_operators()
    if has_triton(device):
        from reft_runtime.kernels.cuda.operators import TritonOperators

        return TritonOperators()
    return None


def cpu_operators() -> Kernels | None:
    """The CPU's operators, which also pick tokens and attend; None without a compiler.

    The first call may take some seconds.
    """
    return kernels()


@cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on a device; among other things that needs a C compiler."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    from reft_runtime.kernels.cuda.operators import TritonOperators

    rows = torch.ones(2, 16, device=device)
    try:
        TritonOperators().rms_norm(rows, rows[0], 1e-5)
    except Exception as error:
        _log.warning("Triton does not work, torch's own operators are used: %s", error)
        return False
    return True
