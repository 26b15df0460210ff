"""Multi-head latent attention (MLA, arXiv 2405.04434) over the latents themselves.

A module of this kind makes keys and values of all heads from one latent for each token, by
`expand_kv` with the weight of `kv_b_proj`. A key is the latent times a matrix, beside rotated
numbers that all heads share. A query times such a key is the query times the matrix, times the
latent; so queries *absorb* the matrix, and all heads attend over latents as over one key head. The
matrix of the values is applied to the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

EXPAND = "expand_kv"
"""Name of the method that makes keys and values of latents, in transformers' models."""


class Latent:
    """Takes the place of the method `expand_kv` of a module."""

    def __init__(self, module: Any) -> None:
        weight: Tensor = module.kv_b_proj.weight.detach()
        key_dim: int = module.qk_nope_head_dim
        heads = weight.view(-1, key_dim + module.v_head_dim, weight.shape[1])
        self._keys, self._values = heads[:, :key_dim], heads[:, key_dim:].transpose(1, 2)

    @property
    def rank(self) -> int:
        """Numbers of a latent, without the rotated ones beside it."""
        return self._keys.shape[2]

    def __call__(self, latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        """One key head [1, 1, T, rank + rotated], whose first numbers are the values."""
        key = torch.cat([latent, rotated], -1)
        return key, key[..., : self.rank]

    def absorbed(self, query: Tensor) -> Tensor:
        """Queries [1, heads, T, dim] as they meet latents, [1, heads, T, rank + rotated]."""
        plain, rotated = query.tensor_split([self._keys.shape[1]], -1)
        return torch.cat([plain @ self._keys, rotated], -1)

    def values(self, mixed: Tensor) -> Tensor:
        """The values [T, heads, dim] of mixed latents [T, heads, rank]."""
        return (mixed.transpose(0, 1) @ self._values).transpose(0, 1)


def latent_of(module: nn.Module) -> Latent | None:
    """The `Latent` that is a module's own attribute `EXPAND`; None if there is none."""
    latent = vars(module).get(EXPAND)
    return latent if isinstance(latent, Latent) else None
