"""A rank's memory and speed: what accelerators have, and what training puts into them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace

import torch

from openelm.environment import environment
from openelm.errors import UserError
from openelm.model.geometry import ModelConfig
from openelm.model.loss import CHUNK_LOGITS
from openelm.train.metrics import gemm_flops_per_s

# Of a device's memory; the rest is the driver's context, communication buffers and holes between tensors.
USABLE_SHARE = 0.92
GPUS_PER_NODE = 8
CPU = "cpu"
# Python, torch and their threads, before the first tensor.
PROCESS_BYTES = 350 * 2**20
# The C library's heap cannot use every hole that freed activations leave, least of all once gradients that stay for the
# next micro-batch have settled in them. Measured on top: a quarter of what is kept, with several micro-batches half of
# what would be kept without checkpointing.
HEAP_SHARE, HEAP_SHARE_OF_SEVERAL = 0.25, 0.5


@dataclass(frozen=True)
class Hardware:
    """One accelerator: memory in bytes, and the peak of dense products in the dtype that is trained in."""

    name: str
    memory_bytes: int
    flops_per_s: float
    source: str

    @property
    def usable_bytes(self) -> int:
        """What a rank's tensors may take."""
        return int(USABLE_SHARE * self.memory_bytes)


# Memory as the data sheets give it, in units of 10^9 bytes, which is on the safe side: CUDA reports 3 to 7 % more.
# Rates are bf16, dense, without the factor of two for sparsity that data sheets like to include.
HARDWARE = {
    row.name: row
    for row in (
        Hardware("a100-40", 40 * 10**9, 312e12, "NVIDIA A100 data sheet"),
        Hardware("a100-80", 80 * 10**9, 312e12, "NVIDIA A100 data sheet"),
        Hardware("h100-80", 80 * 10**9, 989e12, "NVIDIA H100 data sheet, SXM5"),
        Hardware("h200", 141 * 10**9, 989e12, "NVIDIA H200 data sheet, SXM5"),
        Hardware("rtx4090", 24 * 10**9, 165e12, "NVIDIA Ada architecture paper: bf16 with fp32 sums"),
    )
}


def find_hardware(name: str, dtype: torch.dtype = torch.float32) -> Hardware:
    """The row of that name; ``cpu`` is this machine, its rate measured in ``dtype``. UserError names the nearest."""
    if name == CPU:
        memory = environment()["hardware"]["memory_bytes"]
        if not memory:
            raise UserError("the memory of this machine could not be found out: name a GPU with --gpu")
        rate = gemm_flops_per_s(dtype, torch.device("cpu"))
        return Hardware(CPU, memory, rate, "measured here: the best square product of 2,048")
    if name not in HARDWARE:
        begun = [known for known in HARDWARE if name and known.startswith(name.lower())]
        near = (begun or difflib.get_close_matches(name.lower(), [*HARDWARE, CPU], n=1, cutoff=0.0))[0]
        raise UserError(f"gpu {name!r} is not one of {', '.join([*HARDWARE, CPU])}: did you mean {near}?")
    return HARDWARE[name]


@dataclass(frozen=True)
class Workload:
    """A run as far as memory and time depend on it; ``global_batch`` and ``micro_batch`` in rows.

    ``compute_bytes`` is the size of a number in the products: 4 for fp32, 2 for bf16.
    """

    model: ModelConfig
    ranks: int
    row_length: int
    micro_batch: int
    global_batch: int
    steps: int
    compute_bytes: int
    activation_checkpointing: str = "none"
    sharding: str = "none"
    ema: bool = False
    async_checkpoints: bool = False
    separate_pieces: bool = False

    @property
    def shards(self) -> int:
        """Ranks that hold one copy of weights, gradients and moments together."""
        return {"none": 1, "node": min(GPUS_PER_NODE, self.ranks), "full": self.ranks}[self.sharding]

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.row_length


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank, by what they hold."""

    weights: int  # fp32 masters, and the copy to compute with of a rank that is alone
    gathered: int  # of several ranks: what is put together from all shards, and its gradients
    gradients: int
    moments: int
    average: int
    activations: int
    recomputed: int  # of the one layer that is being computed again
    loss: int  # a few chunks of logits, and the output layer's gradient
    checkpoint_copy: int  # in the host's memory: of this device only where that is the same
    process: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def estimate_memory(work: Workload, *, on_cpu: bool) -> MemoryEstimate:
    """What a rank holds at its fullest, at the end of a forward pass (train/optim.py, train/parallel.py)."""
    model, size = work.model, work.compute_bytes
    P, held = model.num_parameters(), -(-model.num_parameters() // work.shards)
    alone = work.ranks == 1
    # The layer with the widest products stands for "the one at work" and "the one fetched ahead".
    block = max(model.layer_matmul_parameters()) + 2 * (model.model_dim + model.head_dim)
    tables = 1 if model.share_input_output_layers else 2
    root = (tables * model.vocab_size + 1) * model.model_dim
    whole = P if work.sharding == "none" else 2 * block + root
    rows = work.micro_batch * work.row_length
    kept, again = _activations(work)
    output = model.vocab_size * model.model_dim
    return MemoryEstimate(
        weights=4 * held + (size * P if alone and size < 4 else 0),
        gathered=0 if alone else size * (whole + 2 * block + root),
        gradients=4 * held,
        moments=8 * held,
        average=4 * held if work.ema else 0,
        activations=kept * rows,
        recomputed=again * rows,
        # The output layer's gradient as it is made and as it is added; three chunks of fp32 logits.
        loss=8 * output + 12 * min(CHUNK_LOGITS, rows * model.vocab_size),
        checkpoint_copy=checkpoint_bytes(work) // work.shards if work.async_checkpoints and on_cpu else 0,
        process=PROCESS_BYTES + int(_heap_holes(work, kept) * rows) if on_cpu else 0,
    )


def _heap_holes(work: Workload, kept: int) -> float:
    """Bytes a token that a CPU's heap holds without use."""
    if work.global_batch == work.ranks * work.micro_batch:
        return HEAP_SHARE * kept
    return HEAP_SHARE_OF_SEVERAL * _activations(replace(work, activation_checkpointing="none"))[0]


def _activations(work: Workload) -> tuple[int, int]:
    """Bytes a token that the backward pass keeps, and that it makes again while it is in one layer."""
    model, size = work.model, work.compute_bytes
    attentions, ffns = [], []
    for query, kv, ffn in zip(model.num_query_heads, model.num_kv_heads, model.ffn_dims, strict=True):
        # Both norms' inputs, the first one's output; the projection; rotated queries and keys; attention's output
        # twice (its own, and laid out for out_proj). In fp32: a scale a norm, attention's normaliser a head.
        values = 3 * model.model_dim + (4 * query + 3 * kv) * model.head_dim
        statistics = 2 + query + (query + kv if model.normalize_qk_projections else 0)
        # A mask is turned into numbers, a row of them a token, by each layer for itself.
        mask = size * work.row_length if work.separate_pieces else 0
        attentions.append(size * values + 4 * statistics + mask)
        # The second norm's output; gate and up, and their product.
        ffns.append(size * (model.model_dim + 3 * ffn))
    # The last norm's input, and the mask itself.
    last = size * model.model_dim + (work.row_length if work.separate_pieces else 0)
    if work.activation_checkpointing == "full":
        return len(ffns) * size * model.model_dim + last, max(map(sum, zip(attentions, ffns, strict=True)))
    if work.activation_checkpointing == "selective":
        return sum(attentions) + last, max(ffns)
    return sum(attentions) + sum(ffns) + last, 0


def checkpoint_bytes(work: Workload) -> int:
    """fp32 weights and two moments, and the average where one is kept."""
    return (16 if work.ema else 12) * work.model.num_parameters()


def fits(work: Workload, hardware: Hardware) -> bool:
    """Whether a rank's share goes into the memory that is reckoned with."""
    return estimate_memory(work, on_cpu=hardware.name == CPU).total <= hardware.usable_bytes
