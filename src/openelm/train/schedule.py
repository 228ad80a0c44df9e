"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from ``warmup_init_lr``, then one of cosine, linear, constant or wsd (warm-up, stable, decay).

    ``wsd`` keeps ``lr`` until the last ``decay_steps`` steps and falls linearly to ``min_lr`` over them.
    """

    kind: str
    steps: int
    lr: float
    min_lr: float
    warmup_steps: int
    warmup_init_lr: float = 1e-6
    decay_steps: int = 0

    def at(self, step: int) -> float:
        """Learning rate of the 0-based ``step``."""
        if step < self.warmup_steps:
            return self.warmup_init_lr + (self.lr - self.warmup_init_lr) * step / self.warmup_steps
        if self.kind == "constant":
            return self.lr
        if self.kind == "wsd":
            left = self.steps - step
            return self.lr if left >= self.decay_steps else self._between(1 - left / self.decay_steps)
        # One more than the steps there are: the released runs' cosine ends a hair above its minimum.
        progress = min(1.0, (step - self.warmup_steps) / (self.steps - self.warmup_steps + 1))
        if self.kind == "linear":
            return self._between(progress)
        return self._between((1 - math.cos(math.pi * progress)) / 2)

    def _between(self, fraction: float) -> float:
        return self.lr + (self.min_lr - self.lr) * fraction
