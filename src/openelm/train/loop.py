"""The one training loop. Pre-training, fine-tuning and preference tuning differ in batches and loss only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from openelm.data.loader import Step
from openelm.errors import UserError
from openelm.train.allocator import keep_freed_memory
from openelm.train.metrics import peak_memory_bytes
from openelm.train.optim import Optimizer
from openelm.train.schedule import Schedule

# loss_fn(model, batch) -> (loss summed over the batch, metrics summed likewise)
LossFunction = Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]]
# probe(step, model, account of the data) -> entries for metrics.jsonl
Probe = Callable[[int, nn.Module, dict[str, Any]], list[dict[str, Any]]]


class Record(Protocol):
    """Where the loop's metrics go."""

    def train(self, entry: dict[str, Any], timing: dict[str, Any]) -> None: ...

    def write(self, entry: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class LoopSettings:
    """What the loop itself needs to know."""

    steps: int
    clip_norm: float
    log_every: int
    checkpoint_every: int
    flops_per_token: int
    peak_flops_per_s: float


def run(
    model: nn.Module,
    optimizer: Optimizer,
    schedule: Schedule,
    data: Iterable[Step],
    loss_fn: LossFunction,
    settings: LoopSettings,
    recorder: Record,
    *,
    save: Callable[[int, int, Any], None],
    probes: Iterable[Probe] = (),
    first_step: int = 0,
    tokens: int = 0,
) -> int:
    """Train from ``first_step`` to ``settings.steps``; returns the tokens (valid targets) seen in all.

    ``save(step, tokens, snapshot)`` is called after every ``checkpoint_every`` steps and after the last, ``probes``
    after every step, both when the step is complete. Gradients are sums divided by the step's whole weight, so
    micro-batches and padding change nothing beyond rounding. Raises UserError at a loss or gradient that is not
    finite, before it reaches the weights.
    """
    keep_freed_memory()
    batches = iter(data)
    for step in range(first_step, settings.steps):
        start_s = time.perf_counter()
        chunk = next(batches)
        weight = sum(batch.valid_tokens() for batch in chunk.batches)
        if not weight:
            raise UserError(f"step {step + 1}: its rows hold no target that counts: make data.row_length longer")

        loss = torch.zeros(())
        sums: dict[str, Tensor] = {}
        for batch in chunk.batches:
            loss_sum, metrics = loss_fn(model, batch)
            (loss_sum / weight).backward()
            loss += loss_sum.detach().cpu()
            for name, value in metrics.items():
                sums[name] = sums.get(name, torch.zeros(())) + value.cpu()

        norm = optimizer.clip(settings.clip_norm)
        lr = schedule.at(step)
        _stop_if_not_finite(step, loss, norm)
        optimizer.update(lr)

        tokens += weight
        done = step + 1
        step_s = time.perf_counter() - start_s
        if done % settings.log_every == 0 or done == settings.steps:
            tokens_per_s = weight / step_s
            recorder.train(
                {
                    "step": done,
                    "loss": loss.item() / weight,
                    **{name: value.item() / weight for name, value in sums.items()},
                    "grad_norm": norm.item(),
                    "lr": lr,
                    "tokens": tokens,
                },
                {
                    "step_s": step_s,
                    "tokens_per_s": tokens_per_s,
                    "mfu": tokens_per_s * settings.flops_per_token / settings.peak_flops_per_s,
                    "data_wait_s": chunk.wait_s,
                    "memory_bytes": peak_memory_bytes(),
                },
            )
        for probe in probes:
            for entry in probe(done, model, chunk.counts):
                recorder.write(entry)
        if done % settings.checkpoint_every == 0 or done == settings.steps:
            save(done, tokens, chunk.snapshot)
    return tokens


def pretraining_loss(z_loss: float) -> LossFunction:
    """Next-token cross-entropy and z-loss, summed over valid targets."""

    def loss_fn(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        device = next(model.parameters()).device
        tokens, targets, segments = batch.tensors(device)
        total, z = model(tokens, targets, segments, z_loss_weight=z_loss)
        return total, {"cross_entropy": (total.detach() - z), "z_loss": z}

    return loss_fn


def _stop_if_not_finite(step: int, loss: Tensor, norm: Tensor) -> None:
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise UserError(
            f"step {step + 1}: loss {loss.item()}, gradient norm {norm.item()}: not finite, so the update was not "
            "made. The last checkpoint is whole; lower train.lr, or look at the rows of this step"
        )
