"""Steps that must not reach the weights: judged on the device, so that the host need not wait to know."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Steps before anything can be called a spike; and what each later step leaves of the past: little in the mean, which
# must keep up with a falling loss, more in the variance.
BEFORE_JUDGING = 50
MEMORY = torch.tensor([0.9, 0.97])
# Loss (nats a token) and logarithm of the norm wander by this much in any run.
LEAST_DEVIATION = 0.01


@dataclass(frozen=True)
class Event:
    """A step that was out of the ordinary, and its data."""

    step: int
    problem: str  # "not finite" or "spike"
    action: str  # "stopped", "skipped" or "kept"
    loss: float
    grad_norm: float
    data: Any


class Guard:
    """Watches loss and gradient norm, the same on every rank.

    A step that is not finite is never applied; with ``stop`` none after it is either, until ``examine`` has told the
    host. A spike is a rise of more than ``deviations`` standard deviations over the running mean; ``skip_spikes``
    leaves those steps out too.
    """

    def __init__(self, device: torch.device, *, stop: bool, skip_spikes: bool, deviations: float) -> None:
        self._stop, self._skip_spikes, self._deviations = stop, skip_spikes, deviations
        self._seen, self._mean, self._variance = (torch.zeros(n, device=device) for n in (1, 2, 2))
        self._stopped = torch.zeros((), device=device, dtype=torch.bool)
        self._memory = MEMORY.to(device)
        self._pending: list[tuple[int, Tensor, Any]] = []

    def judge(self, step: int, loss: Tensor, norm: Tensor, data: Any) -> Tensor:
        """1 where the step is to be left out, else 0: a scalar on the device. ``data`` is kept until ``examine``."""
        values = torch.stack([loss, norm.log()]).float()
        finite = (torch.isfinite(loss) & torch.isfinite(norm)).reshape(())
        rise = torch.where(finite, torch.nan_to_num(values) - self._mean, 0.0)
        bound = self._deviations * self._variance.sqrt().clamp(min=LEAST_DEVIATION)
        spike = finite & (self._seen[0] >= BEFORE_JUDGING) & (rise > bound).any()
        # A spike moves the mean no further than the largest ordinary step: a new level is got used to.
        rise = torch.where(self._seen >= BEFORE_JUDGING, torch.minimum(rise, bound), rise)
        left, spread = torch.minimum(self._seen / (self._seen + 1), self._memory)
        self._mean += (1 - left) * rise
        self._variance.copy_(torch.where(finite, spread * self._variance + (1 - spread) * rise**2, self._variance))
        self._seen += finite
        if self._stop:
            self._stopped |= ~finite
        skip = self._stopped | ~finite | (spike & self._skip_spikes)
        self._pending.append((step, torch.stack([~finite, spike, loss, norm]), data))
        return skip.float()

    def examine(self) -> list[Event]:
        """What was out of the ordinary since the last time. Waits for the device."""
        pending, self._pending = self._pending, []
        if not pending:
            return []
        events = []
        figures = torch.stack([figures for _, figures, _ in pending]).tolist()
        for (step, _, data), (not_finite, spike, loss, norm) in zip(pending, figures, strict=True):
            if not_finite:
                events.append(Event(step, "not finite", "stopped" if self._stop else "skipped", loss, norm, data))
                if self._stop:
                    break  # those after it were left out because of it
            elif spike:
                events.append(Event(step, "spike", "skipped" if self._skip_spikes else "kept", loss, norm, data))
        return events

    @property
    def pending(self) -> int:
        """Steps that have not been examined."""
        return len(self._pending)

    def state(self) -> dict[str, Tensor]:
        """Running figures, for the checkpoint."""
        return {"guard.seen": self._seen, "guard.mean": self._mean, "guard.variance": self._variance}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state()``."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def as_entry(event: Event) -> dict[str, Any]:
    """An event for metrics.jsonl; JSON has no word for what is not finite."""
    loss, norm = (value if math.isfinite(value) else str(value) for value in (event.loss, event.grad_norm))
    found = {"kind": "guard", "step": event.step, "problem": event.problem, "action": event.action}
    return {**found, "loss": loss, "grad_norm": norm, "first_row": event.data.first_row}
