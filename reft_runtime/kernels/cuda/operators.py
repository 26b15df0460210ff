"""The small operators between matrix products as Triton kernels; sums are float32."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from reft_runtime.kernels.cuda import layer_kernels as kernels
from reft_runtime.kernels.cuda import products
from reft_runtime.kernels.cuda.products import early, row_block
from reft_runtime.kernels.norms import NormForm
from reft_runtime.machine.dtypes import DTYPES

_DTYPES = frozenset(DTYPES.values())


class TritonOperators:
    """`Operators` on a CUDA device."""

    name = "Triton kernels"

    def supports(self, *tensors: Tensor) -> bool:
        """See `Operators.supports`."""
        dtype = tensors[0].dtype
        return dtype in _DTYPES and all(
            t.dtype == dtype and t.is_contiguous() and not t.requires_grad for t in tensors
        )

    def rotates(self, *heads: Tensor) -> bool:
        """See `Operators.rotates`."""
        dtype = heads[0].dtype
        for tensor in heads:
            _, between, within = tensor.stride()
            if within != 1 or between < tensor.shape[2]:
                return False
            if tensor.dtype != dtype or tensor.requires_grad:
                return False
        return dtype in _DTYPES

    def rms_norm(
        self,
        rows: Tensor,
        weight: Tensor,
        epsilon: float,
        form: NormForm = NormForm.LLAMA,
    ) -> Tensor:
        """See `Operators.rms_norm`."""
        return products.rms_norm(rows, weight, epsilon, form)

    def add_rms_norm(
        self, rows: Tensor, more: Tensor, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        """See `Operators.add_rms_norm`."""
        total, out = torch.empty_like(rows), torch.empty_like(rows)
        width = weight.shape[0]
        kernels.norm[(rows.numel() // width,)](
            rows,
            more,
            weight,
            total,
            out,
            epsilon,
            ADD=True,
            ONCE=False,
            FROM_ONE=False,
            **row_block(width),
            **early(),
        )
        return total, out

    def silu_mul(self, both: Tensor) -> Tensor:
        """See `Operators.silu_mul`."""
        return products.silu_mul(both)

    def gated_product(self, rows: Tensor, weight: Tensor) -> Tensor:
        """See `ProductOperators.gated_product`."""
        return products.gated_product(rows, weight)

    def add_product_(self, rows: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
        """See `ProductOperators.add_product_`."""
        return products.add_product_(rows, inputs, weight)

    def add_product_and_norm(
        self, rows: Tensor, inputs: Tensor, weight: Tensor, norm: Tensor, epsilon: float
    ) -> Tensor:
        """See `ProductOperators.add_product_and_norm`."""
        return products.add_product_and_norm(rows, inputs, weight, norm, epsilon)

    def rotate_(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
        """See `Operators.rotate_`."""
        tokens, heads, width = query.shape
        kv_heads = key.shape[1]
        kernels.rotate[(tokens, heads + kv_heads)](
            query,
            key,
            cos,
            sin,
            *query.stride()[:2],
            *key.stride()[:2],
            HEADS=heads,
            HALF=width // 2,
            BLOCK=triton.next_power_of_2(width // 2),
        )
