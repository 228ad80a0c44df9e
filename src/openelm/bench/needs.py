"""Memory and disk that a benchmark will take, reckoned and said before anything is started."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from openelm.environment import environment
from openelm.errors import UserError
from openelm.model.geometry import ModelConfig

# Measured on Linux: the interpreter, the library and its threads, before the first weight.
LIBRARY_BYTES = {
    "ours": 550 * 2**20,
    "transformers_peer": 800 * 2**20,
    "llama_cpp": 150 * 2**20,
    "mlx_lm": 350 * 2**20,
    "openvino_peer": 900 * 2**20,
}
COMPILER_BYTES = 600 * 2**20  # what torch.compile takes in the process itself


@dataclass(frozen=True)
class Need:
    """Bytes of one entry."""

    weights: int
    cache: int
    logits: int
    process: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.logits + self.process


def work_bytes(config: ModelConfig, batch: int, room: int, longest_prompt: int) -> tuple[int, int]:
    """Bytes of (keys and values of ``room`` tokens; logits, and the widest activations of a prompt), each a text."""
    cache = batch * room * config.cache_bytes_per_token()
    widest = 4 * max(3 * max(config.ffn_dims), 3 * config.head_dim * max(config.num_query_heads), 4 * config.model_dim)
    return cache, batch * (3 * 4 * config.vocab_size + longest_prompt * widest)


def available_memory() -> int | None:
    """Bytes that this machine, or this container, has to give now; None where it does not say."""
    found: list[int] = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        found.append(int(limit) - int(used))
    except (OSError, ValueError, StopIteration):
        pass  # no Linux; or no limit of a group
    if not found:
        memory: int | None = environment()["hardware"]["memory_bytes"]
        return memory
    return min(found)


def available_on(device: str) -> int | None:
    """The same of the device."""
    if not device.startswith("cuda"):
        return available_memory()
    import torch

    return int(torch.cuda.mem_get_info(torch.device(device))[0])


def check_memory(totals: dict[str, int], *, together: bool, device: str) -> str:
    """One line that announces the need. UserError where it is more than there is, with what would fit."""
    largest = max(totals, key=lambda name: totals[name])
    need = sum(totals.values()) if together else totals[largest]
    free = available_on(device)
    how = f"{len(totals)} entries in memory together" if together and len(totals) > 1 else f"at most, for {largest}"
    line = f"memory: {need / 1e9:.2f} GB for {how}" if together else f"memory: {need / 1e9:.2f} GB {how}"
    if free is None:
        return f"{line}; how much is free could not be found out"
    if need > free:
        remedy = "measure fewer, or smaller ones"
        if together and totals[largest] <= free:
            remedy = f"pass --one-at-a-time, which takes {totals[largest] / 1e9:.2f} GB, or measure fewer"
        raise UserError(f"{line}, and {free / 1e9:.2f} GB are free on {device}: {remedy}")
    return f"{line}, of {free / 1e9:.2f} GB free"


def check_disk(folder: Path, need: int) -> None:
    """UserError where the models to be made take more than is free."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"the models to be made take {need / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are free: name "
            "another folder with --models-folder"
        )
