"""What a run would take, worked out before it begins: memory of a rank, FLOPs, time, checkpoints, reading, money."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from openelm.config import RunConfig
from openelm.data.sources import find_units
from openelm.errors import UserError
from openelm.model.geometry import ModelConfig
from openelm.train import parts
from openelm.train.hardware import (
    CPU,
    GPUS_PER_NODE,
    HARDWARE,
    Hardware,
    Workload,
    checkpoint_bytes,
    estimate_memory,
    find_hardware,
    fits,
)
from openelm.train.metrics import gemm_flops_per_s
from openelm.train.parallel import pick_device

CHECKPOINTING = ("none", "selective", "full")
SHARDING = ("none", "node", "full")
# Share of the peak that products reach, recomputed ones counted: measured on a CPU (docs/benchmarks.md), else assumed.
CPU_SHARE, GPU_SHARE = 0.75, 0.40
LARGEST_MICRO_BATCH = 16


@dataclass(frozen=True)
class Assumptions:
    """What no recipe says. The time between failures is that of Llama 3's 54 days on 16,384 GPUs: 419 of them."""

    mfu: float | None = None
    price_per_gpu_hour: float | None = None
    gpu_hours_per_failure: float = 50_000.0
    write_bytes_per_s: float = 2e9
    bytes_per_token: float = 4.0

    def __post_init__(self) -> None:
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise UserError(f"--mfu {self.mfu:g} must be more than 0 and at most 1, as 0.4")
        if self.price_per_gpu_hour is not None and not 0 <= self.price_per_gpu_hour < math.inf:
            raise UserError(f"--price-per-gpu-hour {self.price_per_gpu_hour:g} must be a number of at least 0")
        for name in ("gpu_hours_per_failure", "write_bytes_per_s", "bytes_per_token"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name):g} must be a number of more than 0")


def check_workload(work: Workload) -> None:
    """Refuse what no rank could begin, naming what is near."""
    for name in ("ranks", "row_length", "micro_batch", "global_batch", "steps"):
        if getattr(work, name) < 1:
            option = {"ranks": "gpus", "global_batch": "global-batch-tokens"}.get(name, name.replace("_", "-"))
            raise UserError(f"--{option}: {getattr(work, name)} is too few: give at least 1")
    if work.row_length > work.model.max_context_length:
        raise UserError(
            f"rows of {work.row_length} tokens are longer than the context of {work.model.max_context_length}: shorten "
            "them with --row-length, or raise model.max_context_length"
        )
    if work.sharding == "node" and work.ranks > GPUS_PER_NODE and work.ranks % GPUS_PER_NODE:
        low = work.ranks // GPUS_PER_NODE * GPUS_PER_NODE
        raise UserError(
            f"sharding=node: {work.ranks} GPUs are not whole nodes of {GPUS_PER_NODE}: use {low} or "
            f"{low + GPUS_PER_NODE}, or sharding=full"
        )
    unit = work.ranks * work.micro_batch
    if work.global_batch % unit:
        below = work.global_batch // unit * unit
        near = " or ".join(
            f"{rows:,} rows ({rows * work.row_length:,} tokens)" for rows in (below, below + unit) if rows
        )
        raise UserError(
            f"a global batch of {work.global_batch:,} rows is not a multiple of {work.ranks:,} GPUs x "
            f"{work.micro_batch:,} rows = {unit:,}: use {near}, or other --gpus or --micro-batch"
        )


def largest_micro_batch(work: Workload, hardware: Hardware) -> int:
    """The largest power of two, up to 16 rows, that shares the batch equally and fits; 1 where none does."""
    check_workload(replace(work, micro_batch=1))
    rows = work.global_batch // work.ranks
    sizes = [2**k for k in range(LARGEST_MICRO_BATCH.bit_length()) if rows % 2**k == 0]
    return max((m for m in sizes if fits(replace(work, micro_batch=m), hardware)), default=1)


def nearest_that_fits(work: Workload, hardware: Hardware) -> Workload | None:
    """The first setting that fits: more checkpointing, then more sharding, then a smaller micro-batch."""
    return next((other for other in _neighbours(work) if fits(other, hardware)), None)


def _neighbours(work: Workload) -> Iterator[Workload]:
    smaller = [m for m in range(work.micro_batch, 0, -1) if work.global_batch % (work.ranks * m) == 0]
    shardings = SHARDING[SHARDING.index(work.sharding) :]
    degrees = CHECKPOINTING[CHECKPOINTING.index(work.activation_checkpointing) :]
    for micro_batch, sharding, degree in product(smaller, shardings, degrees):
        if sharding != "node" or work.ranks <= GPUS_PER_NODE or work.ranks % GPUS_PER_NODE == 0:
            yield replace(work, micro_batch=micro_batch, sharding=sharding, activation_checkpointing=degree)


def ranks_that_fit(work: Workload, hardware: Hardware) -> int | None:
    """The fewest GPUs that share the batch and hold the run with all that saves memory; None where none do."""
    least = replace(work, micro_batch=1, sharding="full", activation_checkpointing="full")
    divisors = (ranks for ranks in range(1, work.global_batch + 1) if work.global_batch % ranks == 0)
    return next((ranks for ranks in divisors if fits(replace(least, ranks=ranks), hardware)), None)


def recomputed_flops_per_token(work: Workload) -> int:
    """FLOPs of computing again. proj_2 is left out: nothing that the backward pass keeps depends on its product."""
    if work.activation_checkpointing == "none":
        return 0
    model = work.model
    gate_and_up = 2 * model.model_dim * sum(model.ffn_dims)
    if work.activation_checkpointing == "selective":
        return 2 * gate_and_up
    proj_2 = gate_and_up // 2
    # A third of what training counts is forward; the output layer is not computed again.
    attention = 2 * work.row_length * model.head_dim * sum(model.num_query_heads)
    return 2 * (sum(model.layer_matmul_parameters()) - proj_2) + attention


def plan_training(work: Workload, hardware: Hardware, given: Assumptions) -> dict[str, Any]:
    """All figures of a run on ``work.ranks`` such devices, ready for JSON."""
    check_workload(work)
    flops = work.model.train_flops_per_token(work.row_length)
    mfu, rule = _mfu(work, hardware, given)
    tokens = work.steps * work.tokens_per_step
    tokens_per_s = work.ranks * hardware.flops_per_s * mfu / flops
    time_s = tokens / tokens_per_s
    price = given.price_per_gpu_hour
    gpu_hours = work.ranks * time_s / 3600
    return {
        "setting": {key: value for key, value in asdict(work).items() if key != "model"},
        "hardware": {**asdict(hardware), "usable_bytes": hardware.usable_bytes},
        "parameters": work.model.num_parameters(),
        "tokens": tokens,
        "flops_per_token": flops,
        "flops_rule": "6 a matmul parameter (output layer in, look-up out) + causal attention",
        "recomputed_flops_per_token": recomputed_flops_per_token(work),
        "flops": tokens * flops,
        "mfu": mfu,
        "mfu_rule": rule,
        "tokens_per_s": tokens_per_s,
        "step_s": work.tokens_per_step / tokens_per_s,
        "days": time_s / 86_400,
        "gpu_hours": gpu_hours,
        "price_per_gpu_hour": price,
        "cost": None if price is None else price * gpu_hours,
        "checkpoint": _checkpoint_plan(work, work.tokens_per_step / tokens_per_s, given),
        "reading": {
            "bytes_per_token": given.bytes_per_token,
            "bytes_per_s": tokens_per_s * given.bytes_per_token,
            "bytes_per_s_per_gpu": tokens_per_s * given.bytes_per_token / work.ranks,
        },
        **_memory_plan(work, hardware),
        "paper": paper_table(),
    }


def _mfu(work: Workload, hardware: Hardware, given: Assumptions) -> tuple[float, str]:
    if given.mfu is not None:
        return given.mfu, "as given"
    share = CPU_SHARE if hardware.name == CPU else GPU_SHARE
    flops = work.model.train_flops_per_token(work.row_length)
    mfu = share * flops / (flops + recomputed_flops_per_token(work))
    again = "" if work.activation_checkpointing == "none" else ", of which what is computed again does not count"
    return mfu, f"assumed: {share:.0%} of the peak{again}"


def _checkpoint_plan(work: Workload, step_s: float, given: Assumptions) -> dict[str, Any]:
    """Young's interval: the square root of twice the save time and the time between failures."""
    size = checkpoint_bytes(work)
    save_s = size / given.write_bytes_per_s
    failure_s = given.gpu_hours_per_failure * 3600 / work.ranks
    interval_steps = min(work.steps, max(1, round(math.sqrt(2 * save_s * failure_s) / step_s)))
    interval_s = interval_steps * step_s
    return {
        "bytes": size,
        "write_bytes_per_s": given.write_bytes_per_s,
        "save_s": save_s,
        "gpu_hours_per_failure": given.gpu_hours_per_failure,
        "failure_every_s": failure_s,
        "interval_s": interval_s,
        "interval_steps": interval_steps,
        # Saving, and on average half an interval again after each failure.
        "lost_share": save_s / interval_s + interval_s / (2 * failure_s),
    }


def _memory_plan(work: Workload, hardware: Hardware) -> dict[str, Any]:
    on_cpu = hardware.name == CPU
    memory = estimate_memory(work, on_cpu=on_cpu)
    fitting = memory.total <= hardware.usable_bytes
    nearest = work if fitting else nearest_that_fits(work, hardware)
    choices: dict[str, dict[str, Any]] = {}
    for degree in CHECKPOINTING:
        other = replace(work, activation_checkpointing=degree)
        estimate = estimate_memory(other, on_cpu=on_cpu)
        totals = {s: estimate_memory(replace(other, sharding=s), on_cpu=on_cpu).total for s in SHARDING}
        choices[degree] = {
            "activations": estimate.activations,
            "recomputed": estimate.recomputed,
            "total_by_sharding": totals,
        }
    return {
        "memory": {**asdict(memory), "total": memory.total},
        "host_copy_bytes": checkpoint_bytes(work) // work.shards if work.async_checkpoints else 0,
        "by_checkpointing": choices,
        "fits": fitting,
        "nearest_that_fits": nearest
        and {key: getattr(nearest, key) for key in ("activation_checkpointing", "sharding", "micro_batch")},
        "gpus_that_fit": None if nearest else ranks_that_fit(work, hardware),
    }


@dataclass(frozen=True)
class PaperRun:
    """One column of Table 9."""

    size: str
    gpu: str
    days: int
    activation_checkpointing: str
    sharding: str
    gpus: int = 128
    steps: int = 350_000
    # "approx. 4M" tokens: 2,048 rows.
    global_batch: int = 2048
    row_length: int = 2048

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.steps * self.global_batch * self.row_length

    def implied_mfu(self) -> float:
        """The share of the GPUs' peak that the paper's days come to: its FLOPs over what they could have made."""
        flops = self.tokens * ModelConfig.from_name(self.size).train_flops_per_token(self.row_length)
        return flops / (self.days * 86_400 * self.gpus * HARDWARE[self.gpu].flops_per_s)


PAPER_RUNS = (
    PaperRun("270M", "a100-80", 3, "none", "none"),
    PaperRun("450M", "h100-80", 3, "full", "none"),
    PaperRun("1.1B", "a100-80", 11, "full", "none"),
    PaperRun("3B", "h100-80", 13, "full", "full"),
)


def paper_table() -> list[dict[str, Any]]:
    """Table 9's runs: their parameters and FLOPs, the MFU that the paper's days imply, and what we would expect."""
    table = []
    for run in PAPER_RUNS:
        model, hardware = ModelConfig.from_name(run.size), find_hardware(run.gpu)
        work = Workload(
            model,
            run.gpus,
            run.row_length,
            1,
            run.global_batch,
            run.steps,
            compute_bytes=2,
            activation_checkpointing=run.activation_checkpointing,
            sharding=run.sharding,
        )
        work = replace(work, micro_batch=largest_micro_batch(work, hardware))
        flops = model.train_flops_per_token(run.row_length)
        mfu, _ = _mfu(work, hardware, Assumptions())
        table.append(
            {
                **asdict(run),
                "parameters": model.num_parameters(),
                "flops_per_token": flops,
                "tokens_per_s": run.tokens / (run.days * 86_400),
                "implied_mfu": run.implied_mfu(),
                "micro_batch": work.micro_batch,
                "memory_bytes": estimate_memory(work, on_cpu=False).total,
                "expected_mfu": mfu,
                "expected_days": run.tokens * flops / (run.gpus * hardware.flops_per_s * mfu) / 86_400,
            }
        )
    return table


def workload(config: RunConfig, model: ModelConfig, *, ranks: int, compute_bytes: int) -> Workload:
    """What a recipe would run on so many ranks."""
    train, data = config.train, config.data
    return Workload(
        model,
        ranks,
        data.row_length,
        train.micro_batch,
        train.global_batch,
        train.steps,
        compute_bytes,
        train.activation_checkpointing,
        train.sharding,
        train.ema_decay > 0,
        train.async_checkpoints,
        data.separate_pieces,
    )


def memory_bytes(config: RunConfig, model: ModelConfig, *, compute_bytes: int) -> int:
    """The most memory that a run of this recipe takes as one process, without a GPU."""
    return estimate_memory(workload(config, model, ranks=1, compute_bytes=compute_bytes), on_cpu=True).total


def plan_run(config: RunConfig, run: Path) -> dict[str, Any]:
    """Data, rows, memory, disk and time of a run here; raises UserError for whatever the run itself would refuse."""
    tokenizer = parts.load_tokenizer(config)
    model = parts.geometry(config, tokenizer)
    device = pick_device()
    dtype = parts.compute_dtype(config.train.dtype, device)
    units = [find_units(source) for source in parts.sources(config)]
    parts.check_sources(config, tokenizer, units)
    work = workload(config, model, ranks=1, compute_bytes=dtype.itemsize)
    train = config.train
    flops = train.steps * work.tokens_per_step * model.train_flops_per_token(work.row_length)
    rate = gemm_flops_per_s(dtype, device)
    kept = train.keep_last + (train.steps // train.milestone_every if train.milestone_every else 0)
    existing = next(folder for folder in [run.absolute(), *run.absolute().parents] if folder.exists())
    by_name = zip((source.name for source in config.data.sources), units, strict=True)
    return {
        "run_folder": str(run),
        "run_folder_state": _state_of(run),
        "parameters": model.num_parameters(),
        "device": f"{device}, computing in {str(dtype).removeprefix('torch.')}",
        **{
            f"source_{name}": f"{len(found):,} files or parts, {sum(u.size_bytes for u in found):,} bytes"
            for name, found in by_name
        },
        "rows": train.steps * train.global_batch,
        "tokens_at_most": train.steps * work.tokens_per_step,
        "flops": flops,
        "memory_bytes": estimate_memory(work, on_cpu=device.type == "cpu").total,
        "disk_bytes": checkpoint_bytes(work) * min(kept, max(1, train.steps // train.checkpoint_every)),
        "disk_free_bytes": shutil.disk_usage(existing).free,
        "time_s": round(flops / (rate * CPU_SHARE)),
        "time_rule": f"{CPU_SHARE:.0%} of the {rate / 1e9:,.0f} GFLOP/s that a matrix product reaches here",
    }


def _state_of(run: Path) -> str:
    """Whether a run of that name could begin, in words."""
    if not run.exists():
        return "new"
    if run.is_dir() and (run / "config.yaml").is_file():
        return "is there: go on with --resume, start anew with --overwrite, or choose another with --run FOLDER"
    if run.is_dir() and not any(run.iterdir()):
        return "is there, and empty: taken with --overwrite"
    return "is there and is no run folder (it has no config.yaml): choose another with --run FOLDER"
