"""From any model that we can open to any format that we can write: whole or not at all, a tensor at a time."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from openelm.errors import UserError
from openelm.files import whole_file, whole_folder
from openelm.interop.hub import model_path
from openelm.interop.source import Source, open_folder
from openelm.interop.target import Format, Target
from openelm.model.folder import find_model_folder

# Each is a module of this folder, imported when it is asked for, and what it calls its target.
TARGETS = {
    "hf": ("transformers_folder", "TARGET"),
    "corenet": ("corenet", "TARGET"),
    "mlx": ("mlx", "TARGET"),
    "gguf": ("gguf", "TARGET"),
    "ollama": ("gguf", "OLLAMA"),
}


def target(name: str) -> Target:
    """One of ``TARGETS``."""
    module, attribute = TARGETS[name]
    found: Target = getattr(importlib.import_module(f"openelm.interop.{module}"), attribute)
    return found


def open_source(reference: str, *, geometry: Path | None = None) -> Source:
    """The model behind a path or a Hub id, recognised by content: what a file is called says nothing.

    ``geometry`` is CoreNet's YAML, for a .pt file. UserError where there is no model, or none that can be read.
    """
    path = model_path(reference)
    if path.is_dir():
        return replace(open_folder(find_model_folder(path)), origin=reference)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(
            f"{reference} cannot be read ({error.strerror}): give a model folder, a file or a Hub id"
        ) from error
    if magic == b"GGUF":
        from openelm.interop.gguf import open_gguf

        return open_gguf(path)
    if magic == b"PK\x03\x04" or magic[:1] == b"\x80":
        from openelm.interop.corenet import open_checkpoint

        return open_checkpoint(path, geometry)
    raise UserError(
        f"{reference} is no model that can be read: it is neither a folder with config.json, nor a GGUF file, nor a "
        "PyTorch checkpoint"
    )


def convert(
    source: Source,
    name: str,
    destination: Path,
    form: Format,
    *,
    overwrite: bool = False,
    check: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write ``source`` in the format ``name``, one of TARGETS. The destination appears whole, or stays as it was.

    ``check`` is handed what was written before it takes its name, and may refuse it.
    """
    chosen = target(name)
    check_destination(destination, is_file=chosen.is_file, overwrite=overwrite)
    chosen.check(source, form)
    source = within_range(source, form)
    if chosen.is_file:
        with whole_file(destination) as draft:
            chosen.write(draft, source, form)
            check(draft)
    else:
        with whole_folder(destination, overwrite=overwrite) as draft:
            chosen.write(draft, source, form)
            check(draft)


def check_destination(path: Path, *, is_file: bool, overwrite: bool) -> None:
    """UserError where ``path`` is taken, or where replacing it would cost something else than a model."""
    if not path.exists():
        return
    if not overwrite:
        raise UserError(f"{path} exists, and nothing is overwritten unasked: choose another name, or pass --overwrite")
    if path.is_dir() and (is_file or not any((path / name).is_file() for name in ("config.json", "Modelfile"))):
        raise UserError(f"{path} is a folder that holds no model, so it is not replaced: choose another name")
    if path.is_file() and not is_file:
        raise UserError(f"{path} is a file, and a folder is to be written: choose another name")


def within_range(source: Source, form: Format) -> Source:
    """The source, refusing by name a tensor whose values float16 cannot hold, where that is asked for."""
    if form.dtype != torch.float16:
        return source
    largest = torch.finfo(torch.float16).max

    def read(name: str) -> Tensor:
        tensor = source.read(name)
        if tensor.numel() and tensor.abs().max() > largest:
            raise UserError(
                f"{source.origin}: {name} holds {tensor.abs().max():.3g}, beyond float16's {largest:.0f}: "
                "use --dtype bfloat16"
            )
        return tensor

    return replace(source, read=read)


def watched(source: Source, seen: Callable[[int], None]) -> Source:
    """The source, telling ``seen`` the number of parameters of each tensor that was read."""

    def read(name: str) -> Tensor:
        tensor = source.read(name)
        seen(tensor.numel())
        return tensor

    return replace(source, read=read)
