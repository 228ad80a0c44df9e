"""Safetensors files written a tensor at a time: a model need not fit into memory to be saved."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint32: "U32"}


WORD = 4  # bytes


@dataclass(frozen=True)
class Entry:
    """A tensor that is going to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(
    folder: Path, entries: Sequence[Entry], tensors: Iterable[Tensor], shard_bytes: int, metadata: dict[str, str]
) -> None:
    """Write model.safetensors, or as many parts as ``shard_bytes`` asks for, with an index.

    ``tensors`` come in the order of ``entries``; each is asked for when the one before is written.
    """
    shards = _cut(entries, shard_bytes)
    coming = iter(tensors)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(folder / file, shard, coming, metadata)
        weight_map.update({entry.name: file for entry in shard})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(entry.num_bytes for entry in entries)}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def write_file(path: Path, entries: Sequence[Entry], tensors: Iterator[Tensor], metadata: dict[str, str]) -> None:
    """Write one file: the length of a JSON header, the header, the tensors' bytes without gaps."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for entry in entries:
        # Readers take a tensor's bytes as they stand in memory; wide types therefore come first.
        assert end % entry.dtype.itemsize == 0, f"{entry.name} would stand at byte {end}"
        assert entry.name not in header, f"{entry.name} twice"
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [end, end := end + entry.num_bytes],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = next(tensors).detach().to("cpu", entry.dtype).contiguous()
            assert tuple(tensor.shape) == entry.shape, f"{entry.name}: {tuple(tensor.shape)} for {entry.shape}"
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _cut(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        # Not within a quantised matrix whose scales are an odd number of 16 bits: words would stand askew behind it.
        if shards[-1] and size + entry.num_bytes > shard_bytes and size % WORD == 0:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards
