"""Preallocated key/value cache: one pair of tensors a layer, because layers differ in their heads."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from openelm.model.geometry import ModelConfig


class Cache:
    """Keys and values of the tokens seen so far, ``length`` of ``capacity`` in use.

    Each layer holds a (batch, kv_heads, capacity, head_dim) tensor for keys and one for values; decoding
    writes in place and allocates nothing.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shapes = [(batch, heads, capacity, config.head_dim) for heads in config.num_kv_heads]
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.capacity = capacity
        self.length = 0

    def append(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values behind those in use; return views of all of them for this layer."""
        end = self.length + k_BGTK.shape[2]
        assert end <= self.capacity, f"{end} tokens in a cache of {self.capacity}"
        self.keys[layer][:, :, self.length : end] = k_BGTK
        self.values[layer][:, :, self.length : end] = v_BGTK
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def part(self, rows: slice | Tensor) -> Cache:
        """A cache of the rows named: views of a slice's, copies of a tensor's."""
        part = copy(self)
        part.keys = [keys_BGSK[rows] for keys_BGSK in self.keys]
        part.values = [values_BGSK[rows] for values_BGSK in self.values]
        return part

    def num_bytes(self) -> int:
        """Bytes allocated."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))
