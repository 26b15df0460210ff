"""Linear layers with the products that suit the CPU, and weights in the layout that these want.

On a CPU with matrix tiles products are our own (`kernels/cpu/product.h`), with the weight as it is,
but copied to large pages.

On others they are oneDNN's, which reorders a plain weight at every product. With weights reordered
once, products are 1.3 to 2.5 times faster at decode sizes. The operators are those that torch's own
compiler (Inductor) emits. Where they are missing, or do not take the weight, the layer stays as it
is. (With tiles they would take 1.2 to 1.3 times as long as our own for up to 32 rows.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from reft_runtime.kernels.operators import Kernels, cpu_operators, padded_rows
from reft_runtime.machine.memory import in_large_pages

EXPECTED_ROWS = 32
"""The layout is chosen for products of this many rows; others work as well."""

Product = Callable[[Tensor], Tensor]

_log = logging.getLogger(__name__)


class Merged:
    """Linear layers of one input, seen as one layer whose outputs [..., sum of widths] are joined.

    Until `merge` the layers stay as they are, and `product` calls one after another.
    """

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        self.parts = parts
        self.weight: Tensor | None = None
        """The merged weight [sum of widths, in]; None before `merge`, or if it is packed."""
        self.product: Product = lambda rows: torch.cat([part(rows) for part in parts], -1)

    @staticmethod
    def possible(parts: Sequence[Any]) -> bool:
        """Whether these are plain linear layers of one input that can be put together."""
        if not all(_is_plain(part) and not part.weight.is_mkldnn for part in parts):
            return False
        kinds = {(p.weight.shape[1], p.weight.dtype, p.bias is None) for p in parts}
        return len(kinds) == 1 and len({id(part.weight) for part in parts}) == len(parts)

    def merge(self) -> None:
        """Join the weights; a layer called alone then computes all outputs and returns its part.

        One product instead of several saves 5 to 10 % of a decode step.
        """
        parts = self.parts
        weight = torch.cat([part.weight.detach() for part in parts])
        bias = None if parts[0].bias is None else torch.cat([part.bias.detach() for part in parts])
        self.weight = None if packable(weight) else weight
        self.product, weight = product_of(weight, bias)
        merged = nn.Parameter(weight, requires_grad=False)
        first = 0
        for part in parts:
            columns = slice(first, first + part.out_features)
            part.forward = partial(_take, self.product, columns)  # type: ignore[method-assign]
            part.weight = merged
            first = columns.stop


@dataclass(frozen=True, slots=True)
class Packed:
    """How many linear layers have packed weights, merged ones included, and the bytes this adds.

    `experts` are the mixtures of experts that have packed weights.
    """

    layers: int = 0
    added_bytes: int = 0
    experts: int = 0


def prepack(model: nn.Module, leave: Collection[nn.Module] = ()) -> Packed:
    """Reorder or copy the weights of all linear layers on a CPU, but those of layers to `leave`.

    A layer's own weight is replaced. One that another module shares (a tied embedding) is replaced
    in both by the same copy, or kept beside the reordered one. `forward` still runs through the
    module, with its hooks.
    """
    added, count = 0, 0
    users: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((module, name))
    kept: dict[int, Tensor] = {}
    for module in model.modules():
        count += isinstance(module, nn.Linear) and _is_merged(module)
        if module in leave or not _is_plain(module) or not packable(module.weight):
            continue
        count += 1
        weight = module.weight
        if id(weight) not in kept:
            made = kept[id(weight)] = _kept(weight.detach())
            sharing = users[id(weight)]
            if len(sharing) > 1 and made.is_mkldnn:
                added += weight.nbytes
            else:
                parameter = nn.Parameter(made, requires_grad=False)
                kept[id(parameter)] = made  # another layer may have it too
                for user, name in sharing:
                    user._parameters[name] = parameter
        module.forward = _product(kept[id(weight)], module.bias)  # type: ignore[method-assign, assignment]
    return Packed(count, added)


def packed_parts(product: object) -> tuple[Tensor, Tensor | None] | None:
    """The weight as kept, and the bias, of a product, or of a layer that computes just one."""
    if isinstance(product, nn.Module):
        product = vars(product).get("forward")
    if not isinstance(product, partial) or product.func not in (_packed_linear, _own_linear):
        return None
    _, weight, bias = product.args
    return weight, bias


def _is_merged(linear: nn.Linear) -> bool:
    forward = vars(linear).get("forward")
    return (
        isinstance(forward, partial)
        and forward.func is _take
        and packed_parts(forward.args[0]) is not None
    )


def plain_weight(linear: nn.Module) -> Tensor:
    """The weight [out, in] that a linear layer had before it was merged or packed."""
    weight: Any = linear.weight
    plain: Tensor = weight.to_dense() if weight.is_mkldnn else weight.detach()
    forward = vars(linear).get("forward")
    if isinstance(forward, partial) and forward.func is _take:
        _, columns = forward.args
        return plain[columns].clone()
    return plain


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is torch's linear layer as it is; another one may compute something else."""
    # The weight itself is of another kind where it is quantised.
    plain = type(module) is nn.Linear and type(module.weight.data) is Tensor
    return plain and "forward" not in vars(module)


def packable(weight: Tensor) -> bool:
    """Whether a weight on a CPU can be packed, and is not yet."""
    if weight.device.type != "cpu" or weight.is_mkldnn:  # is_mkldnn: packed before
        return False
    return _multiplying(weight) is not None or _packing(weight.dtype) is not None


def _multiplying(weight: Tensor) -> Kernels | None:
    """The operators that multiply with this weight as it is, if there are any."""
    own = cpu_operators() if weight.device.type == "cpu" else None
    return own if own is not None and own.multiplies(weight) else None


@dataclass(frozen=True, slots=True)
class _Packing:
    """torch's private operators for packed weights."""

    reorder: Callable[[Tensor, int], Tensor]
    product: Callable[..., Tensor]


@cache
def _packing(dtype: torch.dtype) -> _Packing | None:
    """The operators for weights of a dtype; None if torch has none that give the right product."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    try:
        found = torch.ops.mkldnn
        if dtype == torch.bfloat16 and not found._is_mkldnn_bf16_supported():
            return None
        packing = _Packing(found._reorder_linear_weight, found._linear_pointwise.default)
        weight, rows = torch.eye(16, dtype=dtype), torch.ones(2, 16, dtype=dtype)
        packed = packing.reorder(weight, EXPECTED_ROWS)
        same = packed.is_mkldnn and torch.equal(packed.to_dense(), weight)
        same = same and torch.equal(_packed_linear(packing.product, packed, None, rows), rows)
    except (AttributeError, TypeError, RuntimeError) as error:
        _log.warning("Linear layers are not packed, which is slower: %s", error)
        return None
    if not same:
        _log.warning("Linear layers are not packed, which is slower: torch's operators changed")
        return None
    return packing


def product_of(weight: Tensor, bias: Tensor | None) -> tuple[Product, Tensor]:
    """A function for the product with a weight [out, in], and the weight as it keeps it."""
    kept = _kept(weight)
    return _product(kept, bias), kept


def _kept(weight: Tensor) -> Tensor:
    """The weight as products want it: in large pages, reordered, or as it is."""
    if _multiplying(weight) is not None:
        return in_large_pages(weight)
    packing = _packing(weight.dtype) if packable(weight) else None
    return weight if packing is None else packing.reorder(weight, EXPECTED_ROWS)


def _product(kept: Tensor, bias: Tensor | None) -> Product:
    """The product with a weight that is kept so."""
    packing = _packing(kept.dtype) if kept.is_mkldnn else None
    if packing is not None:
        return partial(_packed_linear, packing.product, kept, bias)
    own = _multiplying(kept)
    if own is not None:
        return partial(_own_linear, own, kept, bias)
    return partial(linear, weight=kept, bias=bias)


def _packed_linear(
    product: Callable[..., Tensor], packed: Tensor, bias: Tensor | None, rows: Tensor
) -> Tensor:
    if rows.requires_grad:  # the packed product has no gradient
        return linear(rows, packed.to_dense(), bias)
    count = rows.numel() // rows.shape[-1]
    more = padded_rows(count) - count
    if more and rows.shape[-2] == count:
        rows = pad(rows, (0, 0, 0, more))
        return product(rows, packed, bias, "none", [], "")[..., :count, :]
    return product(rows, packed, bias, "none", [], "")


def _own_linear(own: Kernels, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    if rows.requires_grad or not rows.is_cpu or rows.dtype != weight.dtype:
        return linear(rows, weight, bias)
    return own.multiply(rows, weight, bias)


def _take(product: Product, columns: slice, rows: Tensor) -> Tensor:
    return product(rows)[..., columns].contiguous()
