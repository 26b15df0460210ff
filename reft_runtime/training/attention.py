"""Attention of a packed batch in training: differentiable, over the tokens of each row alone.

Recurrent layers run by their own code, for rows of the same length together.

The packed forward (`base.attention`) asks a step object; this one pads the rows to
one product, and can start behind prefixes whose keys and values are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from reft_runtime.base.attention import Reach, Scoring, attend_seen
from reft_runtime.base.recurrent import MixerCall, Rows, each, join


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values of a row's first tokens: by layer, tensors [kv_heads, length, dim]."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def length(self) -> int:
        """The number of tokens of the prefix."""
        return self.keys[0].shape[1]

    @property
    def size_bytes(self) -> int:
        """The memory that the keys and values take; layers may share some."""
        each = {id(t): t.numel() * t.element_size() for t in (*self.keys, *self.values)}
        return sum(each.values())


class BatchAttention:
    """A `RecurrentStep` for rows of `lengths` tokens, packed one after another.

    `prefixes`, where given, are what each row's tokens come behind. What was attended to is kept
    by layer in `own`, if `keep_own`, and taken apart by `prefixes_of_rows`.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        *,
        prefixes: Sequence[Prefix | None] = (),
        keep_own: bool = False,
    ) -> None:
        self._lengths = lengths
        self._prefixes = prefixes
        self._keep_own = keep_own
        self._own: dict[int, tuple[Tensor, Tensor]] = {}
        self._masks: dict[Reach, Tensor] = {}
        longest = max(lengths)
        within = torch.arange(longest, device=device)
        counts = torch.tensor(lengths, device=device)
        starts = counts.cumsum(0) - counts
        # Packed row of every place of the padded batch; places behind a row's end repeat its last.
        self._spread = starts[:, None] + torch.minimum(within, counts[:, None] - 1)
        self._packed = (within < counts[:, None]).flatten().nonzero()[:, 0]
        known = [prefix.length if prefix else 0 for prefix in prefixes] or [0] * len(lengths)
        self._longest_prefix = max(known)
        behind = torch.tensor(known, device=device)[:, None]
        places = torch.arange(self._longest_prefix, device=device).expand(len(lengths), -1)
        far = torch.iinfo(torch.long).max
        # Positions of queries and keys in their rows; keys that are padding lie in the future.
        self._queries = behind + within
        self._keys = torch.cat(
            [
                places.masked_fill(places >= behind, far),
                (behind + within).masked_fill(within >= counts[:, None], far),
            ],
            dim=1,
        )

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        """See `base.attention.AttentionStep.attend`."""
        query, key, value = (t.transpose(0, 1)[None] for t in (query, key, value))
        if self._keep_own:
            self._own[layer] = (key[0], value[0])
        query, key, value = (self._padded(t) for t in (query, key, value))
        if self._longest_prefix:
            key = torch.cat([self._known(layer, key, "keys"), key], dim=2)
            value = torch.cat([self._known(layer, value, "values"), value], dim=2)
        result = attend_seen(query, key, value, self._mask(scoring), scoring)
        rows = result.transpose(1, 2).flatten(0, 1)  # [rows * longest, heads, dim]
        return rows.index_select(0, self._packed)

    def recur(self, mixer: int, call: MixerCall) -> Rows:
        """See `base.recurrent.RecurrentStep.recur`; there must be no prefixes."""
        groups = [self._spread[rows, :length] for length, rows in self._same_length.items()]
        made = join([each(call.rectangle(g), lambda part: part[None]) for g in groups])
        order = torch.cat([group.flatten() for group in groups]).argsort()
        return each(made, lambda rows: rows.index_select(1, order))

    @cached_property
    def _same_length(self) -> dict[int, list[int]]:
        """The rows of each length."""
        found: dict[int, list[int]] = {}
        for row, length in enumerate(self._lengths):
            found.setdefault(length, []).append(row)
        return found

    def prefixes_of_rows(self) -> list[Prefix]:
        """The keys and values of each row's own tokens, with `keep_own`."""
        layers = [self._own[layer] for layer in sorted(self._own)]
        first = 0
        found = []
        for length in self._lengths:
            tokens = slice(first, first + length)
            # Layers may share keys and values: what lies at one place is copied once.
            copies = {
                _place(heads): heads[:, tokens].clone()
                for heads in {_place(each): each for pair in layers for each in pair}.values()
            }
            found.append(
                Prefix(
                    tuple(copies[_place(keys)] for keys, _ in layers),
                    tuple(copies[_place(values)] for _, values in layers),
                )
            )
            first += length
        return found

    def _padded(self, packed: Tensor) -> Tensor:
        """Packed tokens [1, heads, T, dim] as padded rows [rows, heads, longest, dim]."""
        heads, _, dim = packed.shape[1:]
        spread = packed[0].index_select(1, self._spread.flatten())
        return spread.view(heads, *self._spread.shape, dim).transpose(0, 1)

    def _known(self, layer: int, own: Tensor, which: str) -> Tensor:
        """The prefixes' keys or values, [rows, kv_heads, longest prefix, dim]."""
        parts = []
        for prefix in self._prefixes:
            if prefix is None:
                parts.append(own.new_zeros(own.shape[1], self._longest_prefix, own.shape[3]))
            else:
                missing = self._longest_prefix - prefix.length
                parts.append(pad(getattr(prefix, which)[layer], (0, 0, 0, missing)))
        return torch.stack(parts)

    def _mask(self, scoring: Scoring) -> Tensor:
        """The mask [rows, 1, longest, longest prefix + longest], True where a key is seen."""
        reach = Reach(scoring.window, scoring.chunk)
        if reach not in self._masks:
            queries, keys = self._queries[:, :, None], self._keys[:, None, :]
            self._masks[reach] = scoring.sees(queries, keys)[:, None]
        return self._masks[reach]


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape
