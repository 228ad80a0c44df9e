"""What a run would take, worked out before it begins."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from openelm.config import RunConfig
from openelm.data.sources import find_units
from openelm.model.geometry import ModelConfig
from openelm.model.loss import CHUNK_LOGITS
from openelm.train import parts
from openelm.train.metrics import gemm_flops_per_s

# Share of a matrix product's rate that training reaches (docs/benchmarks.md).
TYPICAL_MFU = 0.75
# Python, torch and their threads, before the first tensor.
PROCESS_BYTES = 350 * 2**20


def plan_run(config: RunConfig, run: Path) -> dict[str, Any]:
    """Data, rows, memory, disk and time of a run; raises UserError for whatever the run itself would refuse."""
    tokenizer = parts.load_tokenizer(config)
    model = parts.geometry(config, tokenizer)
    device = parts.pick_device()
    dtype = parts.compute_dtype(config.train.dtype, device)
    parts.token_stream(config, tokenizer).next_row()
    train, data = config.train, config.data
    tokens = train.steps * train.global_batch * data.row_length
    rate = gemm_flops_per_s(dtype, device)
    checkpoint_bytes = 12 * model.num_parameters()
    kept = train.keep_last + (train.steps // train.milestone_every if train.milestone_every else 0)
    existing = next(folder for folder in [run.absolute(), *run.absolute().parents] if folder.exists())
    found = {s.name: find_units(s) for s in parts.sources(config)}
    return {
        "run_folder": str(run),
        "parameters": model.num_parameters(),
        "device": f"{device}, computing in {str(dtype).removeprefix('torch.')}",
        **{
            f"source_{name}": f"{len(units):,} files or parts, {sum(u.size_bytes for u in units):,} bytes"
            for name, units in found.items()
        },
        "rows": train.steps * train.global_batch,
        "tokens_at_most": tokens,
        "flops": tokens * model.train_flops_per_token(data.row_length),
        "memory_bytes": memory_bytes(config, model, compute_bytes=dtype.itemsize),
        "disk_bytes": checkpoint_bytes * min(kept, max(1, train.steps // train.checkpoint_every)),
        "disk_free_bytes": shutil.disk_usage(existing).free,
        "time_s": round(tokens * model.train_flops_per_token(data.row_length) / (rate * TYPICAL_MFU)),
        "time_rule": f"{TYPICAL_MFU:.0%} of the {rate / 1e9:,.0f} GFLOP/s that a matrix product reaches here",
    }


def memory_bytes(config: RunConfig, model: ModelConfig, *, compute_bytes: int) -> int:
    """Weights, gradients and moments in fp32, a copy to compute with, and the activations of a micro-batch."""
    states = 16 * model.num_parameters() + (compute_bytes * model.num_parameters() if compute_bytes < 4 else 0)
    per_token = 0
    for query, kv, ffn in zip(model.num_query_heads, model.num_kv_heads, model.ffn_dims, strict=True):
        if config.train.activation_checkpointing == "full":
            per_token += model.model_dim
            continue
        # What the backward pass keeps: both norms' inputs and outputs; the projection; rotated queries and keys;
        # attention's output twice (its own, and laid out for out_proj); gate, up and their product.
        per_token += 4 * model.model_dim + (4 * query + 3 * kv) * model.head_dim + 3 * ffn
    rows = config.train.micro_batch * config.data.row_length
    # The output layer's gradient twice, as it is made and as it is added; a few chunks of logits.
    loss = 8 * model.vocab_size * model.model_dim + 12 * min(CHUNK_LOGITS, rows * model.vocab_size)
    return states + per_token * rows * compute_bytes + loss + PROCESS_BYTES
