"""Decoder layers as compiled functions, for the steps and weights that these take.

The model calls its layers one by one. In a step of few tokens Python takes a while between two, so
the first computes those behind it as well, up to one that has a hook, or follows one that has; when
the model calls these, what they give is there. Only hooks that edit single rows of a layer's output
(`EditingHook`) are no such end: their edits are made on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol
from weakref import ref

from torch import Tensor, nn

from reft_runtime.base.attention import AttentionStep, Scoring
from reft_runtime.base.linears import Merged, packed_parts
from reft_runtime.base.plans import Hooks
from reft_runtime.base.trial import Operator
from reft_runtime.kernels.cpu import Kernels
from reft_runtime.kernels.operators import (
    DecoderLayer,
    LayerRun,
    LayerWeights,
    Norm,
    PackedLinear,
    RowEdits,
)

AHEAD_ROWS = 64
"""Most rows of a step in which layers are computed ahead. With more, Python's part is nothing, and
the outputs of all layers are much memory."""


class EditingHook(Protocol):
    """A forward hook of a layer whose work somebody else can do. Other hooks lack the methods."""

    def row_edits(self, width: int) -> RowEdits | None:
        """What it does to rows so wide, if that is to edit single rows and no more."""

    def done(self) -> None:
        """Leave the next output as it is: it is edited."""


class Computed(NamedTuple):
    """What a layer gives for the input at an `address`, and for these cosines and sines.

    `hook` is that of the layer, if its edits have been made.
    """

    address: int
    cos: Tensor
    sin: Tensor
    out: Tensor
    hook: EditingHook | None


@dataclass(slots=True)
class LayersAhead:
    """What layers give that were computed ahead in a step, by index, and which have been called.

    Where computing several has `failed`, the others are computed one by one.
    """

    computed: dict[int, Computed] = field(default_factory=dict)
    called: set[int] = field(default_factory=set)
    failed: bool = False


class LayerStep(AttentionStep, Protocol):
    """A step that knows where compiled layers find their keys and values.

    Other steps lack both.
    """

    ahead: LayersAhead

    def whole_layers(
        self,
        first: int,
        run: LayerRun,
        rows: Tensor,
        cos: Tensor,
        sin: Tensor,
        edits: Sequence[RowEdits | None],
    ) -> Tensor | None:
        """The outputs [layers, T, d] of the decoder layers from `first` on; None where it cannot.

        `rows` [T, d] is the input of the first, and `edits` are those of each layer's output.
        """


class CompiledLayer:
    """One decoder layer; `make` returns its function, or None.

    It is made at the first step that could use it: until then weights may be packed. `inner` are
    the hooks of the modules in the layer.
    """

    def __init__(
        self, layer: nn.Module, index: int, inner: Hooks, make: Callable[[], DecoderLayer | None]
    ) -> None:
        self._module = layer
        self._index = index
        self._make = make
        self._made: DecoderLayer | None = None
        self._asked = False
        self._inner = inner
        self._before: Mapping[int, Any] = layer._forward_pre_hooks
        self._after: Mapping[int, Any] = layer._forward_hooks
        self._forward: ref[Operator] | None = None
        self._following: CompiledLayer | None = None
        self._takes_output = True
        self._runs: dict[int, LayerRun] = {}

    def place(self, forward: Operator, following: CompiledLayer | None) -> None:
        """Tell what the layer's `forward` is now, and the layer behind it, if that is compiled."""
        self._forward, self._following = ref(forward), following  # the forward has this object

    def compute(self, rows: Tensor, cos: Tensor, sin: Tensor, step: Any) -> Tensor | None:
        """The layer's output for rows [T, d]; None where its operators have to be called.

        `step` is a `LayerStep`, or another for which there is nothing.
        """
        ahead: LayersAhead | None = getattr(step, "ahead", None)
        if ahead is None:
            return None
        ahead.called.add(self._index)
        known = ahead.computed.pop(self._index, None)
        if known is not None:
            same = known.address == rows.data_ptr() and known.out.shape == rows.shape
            if same and known.cos is cos and known.sin is sin:
                return _given(known.out, known.hook)
            # The model does something between the two layers.
            self._takes_output = False
            ahead.computed.clear()
        first = self._layer()
        if first is None:
            return None
        behind = self._all_behind(rows, ahead)
        run = self._runs.get(len(behind))
        if run is None:
            layers = [one.made for one in behind]
            run = self._runs[len(behind)] = LayerRun([first, *layers])
        # The last layer's own hook does its work.
        hooks = [*(one.hook for one in behind), None]
        edits = [*(one.edits for one in behind), None]
        made: Tensor | None = step.whole_layers(self._index, run, rows, cos, sin, edits)
        if made is None:
            ahead.failed = True
            return None
        outs = made.unbind()
        for later in range(1, len(outs)):
            ahead.computed[self._index + later] = Computed(
                outs[later - 1].data_ptr(), cos, sin, outs[later], hooks[later]
            )
        return _given(outs[0], hooks[0])

    def _all_behind(self, rows: Tensor, ahead: LayersAhead) -> list[_Behind]:
        """The layers to compute with this one."""
        found: list[_Behind] = []
        if ahead.failed or len(rows) > AHEAD_ROWS:
            return found
        width, last = rows.shape[1], self
        while (one := last._behind(width)) is not None and one.layer._index not in ahead.called:
            found.append(one)
            last = one.layer
        return found

    def _behind(self, width: int) -> _Behind | None:
        """The next layer, if it gets this one's output and nobody else looks at what is between."""
        following = self._following
        if following is None or following._index != self._index + 1:
            return None
        if not following._takes_output or following._before or any(following._inner):
            return None
        if self._is_changed() or following._is_changed():
            return None
        own, made = self._layer(), following._layer()
        if own is None or made is None or made.kind != own.kind:
            return None
        if not self._after:
            return _Behind(following, made, None, None)
        hook, *others = self._after.values()
        edits = None if others or not hasattr(hook, "row_edits") else hook.row_edits(width)
        return None if edits is None else _Behind(following, made, hook, edits)

    def _is_changed(self) -> bool:
        """Whether somebody has given the layer another forward since."""
        own = None if self._forward is None else self._forward()
        return own is None or vars(self._module).get("forward") is not own

    def _layer(self) -> DecoderLayer | None:
        if not self._asked:
            self._made, self._asked = self._make(), True
        return self._made


class _Behind(NamedTuple):
    """A layer behind another; the edits between the two, and the hook that would make them."""

    layer: CompiledLayer
    made: DecoderLayer
    hook: EditingHook | None
    edits: RowEdits | None


def _given(out: Tensor, hook: EditingHook | None) -> Tensor:
    if hook is not None:
        hook.done()
    return out


def layer_of_weights(
    operators: Kernels,
    norms: tuple[Norm, Norm],
    qkv: Merged,
    o: nn.Module,
    gate_up: Merged,
    down: nn.Module,
    heads: tuple[int, int],
    scoring: Scoring,
) -> DecoderLayer | None:
    """The function of a layer with these parts; None unless all its linear layers are packed.

    `heads` are the number of key heads and the width of a head.
    """
    packed = [packed_parts(each) for each in (qkv.product, o, gate_up.product, down)]
    linears = [PackedLinear(*parts) for parts in packed if parts is not None]
    if len(linears) < len(packed):
        return None
    return operators.decoder_layer(
        LayerWeights(
            norms[0],
            linears[0],
            linears[1],
            norms[1],
            linears[2],
            linears[3],
            *heads,
            scoring.of_heads(heads[1]),
        )
    )
