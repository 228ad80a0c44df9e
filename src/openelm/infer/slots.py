"""What engines offer to all who generate: slots for texts in the making, which advance alone or together.

torch_decoder.py has them on any device, native.py on the CPU. Shapes: B slots, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from openelm.model.geometry import ModelConfig


class Slots(Protocol):
    """Some slots, each with the keys and values of one text; what does not fit is a ValueError."""

    @property
    def capacity(self) -> int:
        """Tokens that each has room for."""

    def length(self, slot: int) -> int:
        """Tokens that a slot holds."""

    def prefill(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Run each slot's tokens behind those that it holds; logits (B, V) after the last of each."""

    def decode(self, slots: Sequence[int], tokens_B: Tensor) -> Tensor:
        """Run one more token of each slot; logits (B, V) after it, which the next call may write over."""

    def verify(self, slot: int, ids: Sequence[int]) -> Tensor:
        """Run tokens behind those that a slot holds; logits (T, V) after each."""

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but a slot's first ``length`` tokens."""

    def copy(self, source: int, target: int) -> None:
        """Let ``target`` hold what ``source`` holds."""


class Decoder(Protocol):
    """A model that makes slots."""

    @property
    def config(self) -> ModelConfig:
        """Its geometry."""

    @property
    def device(self) -> torch.device:
        """Where logits are, and tokens are wanted."""

    @property
    def description(self) -> str:
        """What computes, for people: the engine, the device or instructions, the weights."""

    def slots(self, count: int, capacity: int) -> Slots:
        """Empty slots; ``capacity`` is the model's context at most, else ValueError."""
