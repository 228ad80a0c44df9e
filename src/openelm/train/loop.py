"""The one training loop. Pre-training, fine-tuning and preference tuning differ in batches and loss only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from openelm.data.loader import Step
from openelm.errors import Stopped, UserError
from openelm.train.allocator import keep_freed_memory
from openelm.train.guard import Event, Guard
from openelm.train.metrics import peak_memory_bytes
from openelm.train.optim import Optimizer
from openelm.train.parallel import World, before_micro_batch
from openelm.train.schedule import Schedule

# loss_fn(model, batch) -> (loss summed over the batch, metrics summed likewise)
LossFunction = Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]]
# probe(step, model, its data) -> entries for metrics.jsonl
Probe = Callable[[int, nn.Module, Step], list[dict[str, Any]]]
# The host looks at what the guard saw at least this often.
EXAMINE_EVERY = 50


class Record(Protocol):
    """Where the loop's metrics go."""

    def train(self, entry: dict[str, Any], timing: dict[str, Any]) -> None: ...

    def write(self, entry: dict[str, Any]) -> None: ...

    def event(self, event: Event) -> None: ...


class Keep(Protocol):
    """Who writes checkpoints."""

    def save(self, step: int, tokens: int, data: Step) -> None: ...

    def written(self) -> bool: ...

    def all_written(self) -> None: ...


@dataclass(frozen=True)
class LoopSettings:
    """What the loop itself needs to know; ``usual_weight`` is that of a whole step of all ranks, within reason."""

    steps: int
    usual_weight: int
    clip_norm: float
    log_every: int
    checkpoint_every: int
    flops_per_token: int
    peak_flops_per_s: float


@dataclass(frozen=True)
class Reached:
    """How far a run came, and the tokens that it has read in all (padding left out)."""

    step: int
    tokens: int


def run(
    model: nn.Module,
    optimizer: Optimizer,
    schedule: Schedule,
    data: Iterable[Step],
    loss_fn: LossFunction,
    settings: LoopSettings,
    recorder: Record,
    *,
    world: World,
    guard: Guard,
    keep: Keep,
    probes: Iterable[Probe] = (),
    asked_to_stop: Callable[[], bool] = lambda: False,
    start: Reached = Reached(0, 0),
) -> Reached:
    """Train from ``start`` to ``settings.steps``, or to the end of the step in which any rank is asked to stop.

    Checkpoints are written after every ``checkpoint_every`` steps and after the last, ``probes`` run after every step.
    Gradients are sums over all ranks divided by the step's whole weight, so micro-batches, ranks and padding change
    nothing beyond rounding. Raises UserError at a loss or gradient that is not finite (where the guard is to stop):
    no such step reaches the weights.
    """
    keep_freed_memory()
    batches, done, tokens = iter(data), start.step, start.tokens
    span = _Span()
    for step in range(start.step, settings.steps):
        start_s = time.perf_counter()
        chunk = next(batches)
        weight = sum(batch.weight() for batch in chunk.batches)
        size = sum(batch.size() for batch in chunk.batches)

        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(chunk.batches, start=1):
            before_micro_batch(model, world, last=number == len(chunk.batches))
            loss_sum, metrics = loss_fn(model, batch)
            (loss_sum / settings.usual_weight).backward()
            for name, value in {"loss": loss_sum.detach(), **metrics}.items():
                sums[name] = sums[name] + value if name in sums else value

        # Sums over all ranks: each replica has its gradients whole, so they count in part. The host waits for nothing.
        squares = optimizer.squares() / world.replicas
        figures = [squares, squares.new_full((), weight), *(value.to(squares) for value in sums.values())]
        totals = world.sum_(torch.stack(figures))
        scale = totals[1] / settings.usual_weight
        norm, loss = totals[0].sqrt() / scale, totals[2] / totals[1]
        skip = guard.judge(step + 1, loss, norm, chunk)
        lr = schedule.at(step)
        optimizer.update(lr, divisor=scale * (norm / settings.clip_norm).clamp(min=1.0), skip=skip)

        all_weight, read, stops, unwritten = world.agree(step, weight, size, asked_to_stop(), not keep.written())
        if not all_weight:
            raise UserError(f"step {step + 1}: its rows hold no target that counts: make data.row_length longer")
        tokens += read
        done = step + 1
        if not unwritten:
            keep.all_written()
        ends = done == settings.steps or stops > 0
        saves = ends or done % settings.checkpoint_every == 0
        logs = ends or done % settings.log_every == 0
        if logs:
            means = dict(zip(sums, (totals[2:] / totals[1]).tolist(), strict=True))
        if logs or saves or guard.pending >= EXAMINE_EVERY:
            _examine(guard, recorder, world)
        span.add(read, time.perf_counter() - start_s, chunk.wait_s)  # behind what waits for the device
        if logs:
            entry = {"step": done, **means, "grad_norm": norm.item(), "lr": lr, "tokens": tokens}
            recorder.train(entry, span.end(settings))
        for probe in probes:
            for found in probe(done, model, chunk):
                recorder.write(found)
        if saves:
            keep.save(done, tokens, chunk)
        if stops:
            break
    return Reached(done, tokens)


def pretraining_loss(z_loss: float) -> LossFunction:
    """Next-token cross-entropy and z-loss, summed over valid targets."""

    def loss_fn(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        device = next(model.parameters()).device
        tokens, targets, segments = batch.tensors(device)
        total, z = model(tokens, targets, segments, z_loss_weight=z_loss, counted=batch.counted())
        return total, {"cross_entropy": (total.detach() - z), "z_loss": z}

    return loss_fn


class _Span:
    """The steps since figures were last taken: on a GPU only their sum can be timed without waiting."""

    def __init__(self) -> None:
        self._tokens = self._steps = 0
        self._elapsed_s = self._wait_s = 0.0

    def add(self, tokens: int, elapsed_s: float, wait_s: float) -> None:
        self._tokens, self._steps = self._tokens + tokens, self._steps + 1
        self._elapsed_s, self._wait_s = self._elapsed_s + elapsed_s, self._wait_s + wait_s

    def end(self, settings: LoopSettings) -> dict[str, Any]:
        """Means of a step; the next span begins."""
        tokens_per_s = self._tokens / self._elapsed_s
        found = {
            "step_s": self._elapsed_s / self._steps,
            "tokens_per_s": tokens_per_s,
            "mfu": tokens_per_s * settings.flops_per_token / settings.peak_flops_per_s,
            "data_wait_s": self._wait_s / self._steps,
            "memory_bytes": peak_memory_bytes(),
        }
        self._tokens = self._steps = 0
        self._elapsed_s = self._wait_s = 0.0
        return found


def _examine(guard: Guard, recorder: Record, world: World) -> None:
    for event in guard.examine():
        recorder.event(event)
        if event.action == "stopped" and world.rank:
            raise Stopped("", 2)  # all ranks see the same; the first says so
        if event.action == "stopped":
            raise UserError(
                f"step {event.step}: loss {event.loss}, gradient norm {event.grad_norm}: not finite, so the update was "
                "not made. The last checkpoint is whole, and the rows are recorded in replay/; lower train.lr, look at "
                "the rows, or set train.on_non_finite=skip"
            )
