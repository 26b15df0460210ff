"""Where edits happen: the modules of a model behind the names of components, and their hooks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from reft_runtime.base.recurrent import EachTokenStep
from reft_runtime.errors import WrongBaseModel
from reft_runtime.interventions.format.components import NAMED, module_path
from reft_runtime.kernels.operators import RowEdits

Site = tuple[int, str]
"""Layer index and component."""

Side = Literal["input", "output"]

# Names that architectures give to the parts of a decoder layer.
_ATTENTION = ("self_attn", "attn", "attention")
_MLP = ("mlp", "feed_forward")
_ACT = ("act_fn", "act")
_OUT_PROJECTION = ("o_proj", "c_proj", "dense", "out_proj")


class Editor(Protocol):
    """Changes the rows of its sites."""

    @property
    def sites(self) -> SequenceOf[Site]:
        """The sites whose rows it changes."""

    def apply(self, site: Site, hidden: Tensor) -> None:
        """Change packed rows [T, d] of one site in place."""


class EditSites:
    """The places of one model where edits can act, found by name.

    `mixers` are the model's recurrent modules. What is inside one of them is no such place: it gets
    the rows of one sequence at a time.
    `forward_two` runs two tokens through the model, keeps the logits of one, and calls attention
    with the given step: this shows which modules take or return a row per token, and how wide.
    Where several ranks compute the model, `alike` says which of its numbers are the same on all of
    them: a place whose rows differ holds a part of the hidden states, and no edit can act there.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: SequenceOf[nn.Module],
        mixers: Collection[nn.Module],
        forward_two: Callable[[Any], Any],
        alike: Callable[[SequenceOf[int]], list[bool]] | None = None,
    ) -> None:
        self._model = model
        self._layers = layers
        self._mixers = set(mixers)
        self._widths: dict[tuple[nn.Module, Side], int] = {}
        self._rows: dict[tuple[nn.Module, Side], int] | None = None if alike is None else {}
        self._split: set[tuple[nn.Module, Side]] = set()
        self._names: dict[tuple[nn.Module, Side], Site] = {}
        self._same: dict[Site, Site] = {}
        handles = [handle for module in model.modules() for handle in self._probe(module)]
        try:
            forward_two(EachTokenStep())
        finally:
            for handle in handles:
                handle.remove()
        if alike is not None and self._rows is not None:
            whole = alike(list(self._rows.values()))
            self._split = {place for place, same in zip(self._rows, whole, strict=True) if not same}

    def _probe(self, module: nn.Module) -> tuple[RemovableHandle, ...]:
        def see(side: Side, rows: object) -> None:
            if isinstance(rows, Tensor) and rows.ndim == 3 and rows.shape[:2] == (1, 2):
                self._widths[module, side] = rows.shape[-1]
                if self._rows is not None:
                    self._rows[module, side] = _fingerprint(rows)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see("input", args[0] if args else kwargs.get("hidden_states"))

        def after(_: nn.Module, args: Any, output: Any) -> None:
            see("output", output[0] if isinstance(output, tuple) else output)

        return (
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        )

    def check(self, layer: int, component: str, width: int) -> None:
        """Raise `WrongBaseModel` if the model has no such place, or its rows have another width."""
        where = component[:120] + (f" of layer {layer}" if component in NAMED else "")
        place = self._place(layer, component)
        found = None if place is None else self._widths.get(place)
        if found is None:
            told = f"The loaded model has no {where} that could be edited."
            if component in NAMED and place is None and self._mixer(layer) is not None:
                told += " That layer is recurrent: it has mixer_input and mixer_output."
            raise WrongBaseModel(told)
        if place in self._split:
            raise WrongBaseModel(
                f"The {where} is split over the ranks of --tensor-parallel, and each edits whole"
                " hidden states: inputs and outputs of blocks, attention and MLPs. Serve this file"
                " without --tensor-parallel."
            )
        if found != width:
            raise WrongBaseModel(
                f"The {where} is {found} wide in the loaded model, and {width} in the file."
            )

    def same(self, site: Site) -> Site:
        """Return one site for all sites that name the same place: the first that was asked for.

        A component that is a module's path names that module whatever the layer of the site is.
        """
        if site not in self._same:
            place = self._place(*site)
            assert place is not None, f"{site} was not checked"
            self._same[site] = self._names.setdefault(place, site)
        return self._same[site]

    @contextmanager
    def hooked(self, editor: Editor) -> Iterator[None]:
        """Let `editor` change its sites in the forward passes made inside the `with` block."""
        handles = [handle for site in editor.sites for handle in self._hook(site, editor)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, site: Site, editor: Editor) -> list[RemovableHandle]:
        place = self._place(*site)
        assert place is not None, f"{site} was not checked"
        module, side = place
        if side == "input":
            return [module.register_forward_pre_hook(_input_hook(editor, site), with_kwargs=True)]
        return [module.register_forward_hook(_OutputHook(editor, site))]

    def _place(self, layer: int, component: str) -> tuple[nn.Module, Side] | None:
        """Module and side of a site, None where the model has no such place."""
        if component not in NAMED:
            path, side = module_path(component)
            try:
                return self._model.get_submodule(path), "input" if side == "input" else "output"
            except AttributeError:
                return None
        module: nn.Module | None = self._layers[layer]
        part, _, side = component.rpartition("_")
        match part:
            case "mlp" if side == "activation":
                module, side = _child(_child(module, _MLP), _ACT), "output"
            case "mlp":
                module = _child(module, _MLP)
            case "mixer":
                module = self._mixer(layer)
            case "attention":
                module = self._attention(layer)
            case "attention_value":
                module, side = _child(self._attention(layer), _OUT_PROJECTION), "input"
            case "query" | "key" | "value":
                module = _child(self._attention(layer), (f"{part[0]}_proj",))
        return None if module is None else (module, "input" if side == "input" else "output")

    def _attention(self, layer: int) -> nn.Module | None:
        found = _child(self._layers[layer], _ATTENTION)
        return None if found in self._mixers else found

    def _mixer(self, layer: int) -> nn.Module | None:
        """The recurrent module of a layer; None if it has none, or several."""
        found = [module for module in self._layers[layer].modules() if module in self._mixers]
        return found[0] if len(found) == 1 else None


def _child(module: nn.Module | None, names: SequenceOf[str]) -> nn.Module | None:
    for name in names:
        child = getattr(module, name, None)
        if isinstance(child, nn.Module):
            return child
    return None


def _fingerprint(rows: Tensor) -> int:
    """A number of 56 bits for the bytes of a tensor."""
    content = rows.detach().clone().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:7])


class _OutputHook:
    """Edits a module's output; a `base.compiled_layer.EditingHook`."""

    def __init__(self, editor: Editor, site: Site) -> None:
        self._editor = editor
        self._site = site
        self._fresh = site[1] == "block_output"
        self._done = False

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._done:
            self._done = False
            return None  # the output stays as it is
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        # A block's output is its own fresh sum. Other outputs may be another tensor's too (a
        # dropout returns its input when it does nothing), so they are copied.
        if not self._fresh:
            hidden = hidden.clone()
        self._editor.apply(self._site, hidden[0])
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def row_edits(self, width: int) -> RowEdits | None:
        """See `EditingHook`; None for an editor that cannot tell."""
        told = getattr(self._editor, "row_edits", None)
        found: RowEdits | None = None if told is None else told(self._site, width)
        return found

    def done(self) -> None:
        """See `EditingHook`."""
        self._done = True


def _input_hook(
    editor: Editor, site: Site
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden: Tensor = (args[0] if args else kwargs["hidden_states"]).clone()
        editor.apply(site, hidden[0])
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    return hook
