"""Training speed: the real loop on random tokens, against the rate of a matrix product in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from openelm.bench.needs import check_memory
from openelm.data.loader import Step
from openelm.data.packing import Batch
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import Checkpointing, initial_weights
from openelm.train import loop
from openelm.train.guard import Event, Guard
from openelm.train.hardware import Workload, estimate_memory
from openelm.train.metrics import gemm_flops_per_s, peak_memory_bytes
from openelm.train.optim import Optimizer
from openelm.train.parallel import World, build
from openelm.train.parts import compute_dtype
from openelm.train.schedule import Schedule


@dataclass(frozen=True)
class TrainingBench:
    """What to measure: ``micro_batches`` of ``micro_batch`` rows a step, ``steps`` steps after ``warmup`` ones."""

    row_length: int
    micro_batch: int
    micro_batches: int
    steps: int
    warmup: int
    dtype: str
    compile: bool
    activation_checkpointing: Checkpointing


def announced_memory(config: ModelConfig, bench: TrainingBench) -> str:
    """What `openelm plan` reckons for it, beside what is free. UserError where that is not enough."""
    device = World().device
    rows = bench.micro_batch * bench.micro_batches
    size = compute_dtype(bench.dtype, device).itemsize
    kept = bench.activation_checkpointing
    work = Workload(config, 1, bench.row_length, bench.micro_batch, rows, bench.steps, size, kept)
    need = estimate_memory(work, on_cpu=device.type == "cpu").total
    return check_memory({"training": need}, together=False, device=str(device))


def bench_training(config: ModelConfig, bench: TrainingBench) -> dict[str, Any]:
    """Tokens/s, model FLOP/s and their share of a 2048-cubed product; optimizer, clipping and casts are counted."""
    world = World()
    device = world.device
    dtype = compute_dtype(bench.dtype, device)
    model = build(
        config,
        world,
        lambda model: initial_weights(model, 0),
        dtype=dtype,
        checkpointing=bench.activation_checkpointing,
        compile=bench.compile,
    )
    optimizer = Optimizer(model, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, dtype=dtype)
    times = _Times()
    flops = config.train_flops_per_token(bench.row_length)
    gemms = [gemm_flops_per_s(dtype, device)]
    steps = bench.warmup + bench.steps

    def measure_roof(step: int, model: nn.Module, data: Step) -> list[dict[str, Any]]:
        gemms.append(gemm_flops_per_s(dtype, device))  # between steps, as the machine's speed drifts
        return []

    tokens_per_step = bench.row_length * bench.micro_batch * bench.micro_batches
    loop.run(
        model,
        optimizer,
        Schedule("constant", steps, lr=1e-4, min_lr=0.0, warmup_steps=0),
        _random_steps(config, bench),
        loop.pretraining_loss(1e-4),
        loop.LoopSettings(steps, tokens_per_step, 1.0, 1, steps, flops, gemms[0]),
        times,
        world=world,
        guard=Guard(device, stop=True, skip_spikes=False, deviations=6.0),
        keep=NoCheckpoints(),
        probes=[measure_roof],
    )
    counted = times.tokens_per_s[bench.warmup :]
    roof = max(gemms)
    median, median_s = statistics.median(counted), statistics.median(times.step_s[bench.warmup :])
    return {
        "parameters": config.num_parameters(),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "compiled": bench.compile,
        "compile_s": max(0.0, times.step_s[0] - median_s) if bench.compile else 0.0,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"] if bench.compile else 0,
        "tokens_per_step": tokens_per_step,
        "tokens_per_s": median,
        "tokens_per_s_all": counted,
        "model_flops_per_s": median * flops,
        "gemm_flops_per_s": roof,
        "gemm_flops_per_s_all": gemms,
        "share_of_gemm": median * flops / roof,
        "flops_per_token": flops,
        "flops_rule": "6 a matmul parameter (output layer in, look-up out) + causal attention",
        "peak_memory_bytes": peak_memory_bytes(),
    }


class _Times:
    """Stands in for the recorder, and keeps only the speed of each step."""

    def __init__(self) -> None:
        self.tokens_per_s: list[float] = []
        self.step_s: list[float] = []

    def train(self, entry: dict[str, Any], timing: dict[str, Any]) -> None:
        self.tokens_per_s.append(timing["tokens_per_s"])
        self.step_s.append(timing["step_s"])

    def write(self, entry: dict[str, Any]) -> None:
        pass

    def event(self, event: Event) -> None:
        pass


class NoCheckpoints:
    """Stands in for the keeper of a run that nobody will resume."""

    def save(self, step: int, tokens: int, data: Step) -> None:
        pass

    def written(self) -> bool:
        return True

    def all_written(self) -> None:
        pass


def _random_steps(config: ModelConfig, bench: TrainingBench) -> Iterator[Step]:
    random = np.random.default_rng(0)
    shape = (bench.micro_batch, bench.row_length + 1)
    while True:
        rows = [random.integers(0, config.vocab_size, shape) for _ in range(bench.micro_batches)]
        yield Step([Batch(row[:, :-1].copy(), row[:, 1:].copy()) for row in rows])
