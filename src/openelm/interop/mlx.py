"""Folders for mlx-lm: in 32 or 16 bits a float, or quantised to 4 or 8; mlx itself is needed only to run them.

mlx-lm runs the project's own folders as they are, so what is written here differs from them only where it is quantised:
as mlx_lm.convert does it, each matrix whose rows are whole groups, the embedding too, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from openelm.errors import UserError
from openelm.interop.source import Source, open_folder
from openelm.interop.target import Format, MissingEngineError, Target, write_beside
from openelm.model.folder import SHARD_BYTES, write_config
from openelm.model.quantize import GROUP_SIZES, fits, packed_columns, quantize
from openelm.model.safetensors_file import Entry, write_shards
from openelm.model.stored import to_folder_name

BITS = {"4bit": 4, "8bit": 8}


def check(source: Source, form: Format) -> None:
    """UserError for a quantisation that mlx-lm does not have, or that would leave every matrix as it is."""
    if not form.quantize:
        return
    if form.quantize not in BITS:
        raise UserError(f"mlx-lm cannot quantize to {form.quantize!r}: choose {' or '.join(BITS)}, or leave it out")
    if form.group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise UserError(f"group size {form.group_size}: mlx quantises in groups of one of {sizes}")
    if not any(fits(shape, form.group_size) for shape in source.shapes.values()):
        width = max(shape[1] for shape in source.shapes.values() if len(shape) == 2)
        raise UserError(
            f"group size {form.group_size}: no matrix of {source.origin} has rows of whole groups (the longest row has "
            f"{width} values), so nothing would be quantised: choose a smaller group size, or leave --quantize out"
        )


def write(folder: Path, source: Source, form: Format) -> None:
    """Fill a folder that is there already; one matrix is held at a time."""
    more = {}
    if form.quantize:
        # Twice, as mlx_lm.convert writes it: the second is what the Hub looks at.
        how = {"group_size": form.group_size, "bits": BITS[form.quantize], "mode": "affine"}
        more = {"quantization": how, "quantization_config": how}
    write_config(folder, source.config, form.dtype, more)
    # Quantised ones first: each is whole words in all, so that words stand at whole words whatever comes after.
    names = sorted(source.shapes, key=lambda name: not is_quantized(source.shapes[name], form))
    entries = [entry for name in names for entry in entries_of(name, source.shapes[name], form)]
    tensors = (tensor for name in names for tensor in tensors_of(name, source, form))
    write_shards(folder, entries, tensors, SHARD_BYTES, {"format": "mlx"})
    write_beside(folder, source, library="mlx", quantize=form.quantize)


def is_quantized(shape: tuple[int, ...], form: Format) -> bool:
    """Whether a tensor of this shape is quantised in this format."""
    return bool(form.quantize) and fits(shape, form.group_size)


def entries_of(name: str, shape: tuple[int, ...], form: Format) -> list[Entry]:
    """What a tensor becomes in the files: itself, or its words, scales and biases."""
    stored = to_folder_name(name)
    if not is_quantized(shape, form):
        return [Entry(stored, shape, form.dtype)]
    rows, columns = shape
    base, groups = stored.removesuffix(".weight"), (rows, columns // form.group_size)
    return [
        Entry(stored, (rows, packed_columns(columns, BITS[form.quantize])), torch.uint32),
        Entry(f"{base}.scales", groups, form.dtype),
        Entry(f"{base}.biases", groups, form.dtype),
    ]


def tensors_of(name: str, source: Source, form: Format) -> Iterator[Tensor]:
    """The same, as tensors."""
    if not is_quantized(source.shapes[name], form):
        yield source.weight(name)
        return
    # Cast first, as mlx_lm.convert does: scales and biases have the dtype of what was quantised.
    quantized = source.codes.get(name) or quantize(
        source.weight(name).to(form.dtype), BITS[form.quantize], form.group_size
    )
    yield quantized.weight
    yield quantized.scales
    yield quantized.biases


def logits(folder: Path, rows: list[list[int]]) -> Tensor:
    """The (B, T, V) fp32 logits that mlx-lm computes from a folder."""
    try:
        import mlx.core as mx
        from mlx_lm.utils import load_model
    except ImportError as error:
        raise MissingEngineError(
            f"mlx-lm cannot be loaded here ({error}): pip install 'openelm-framework[mlx]'"
        ) from error
    import numpy as np

    model, _ = load_model(folder)
    return torch.from_numpy(np.array(model(mx.array(rows)).astype(mx.float32)))


TARGET = Target(engine="mlx-lm", is_file=False, check=check, write=write, stored=open_folder, logits=logits)
