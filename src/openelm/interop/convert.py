"""From any model that we can open to any format that we can write: whole or not at all, a tensor at a time."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from glob import escape
from pathlib import Path

import torch
from torch import Tensor

from openelm.errors import UserError
from openelm.files import remove_drafts, whole_file, whole_folder
from openelm.interop.hub import MODEL_FILES, model_path
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
# What files begin with.
GGUF, PICKLES = b"GGUF", (b"PK\x03\x04", b"\x80")
MAGICS = (GGUF, *PICKLES)


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
    try:
        magic = b"" if path.is_dir() else _first_bytes(path)
    except OSError as error:
        raise UserError(
            f"{reference} cannot be read ({error.strerror}): give a model folder, a file or a Hub id"
        ) from error
    if geometry is not None and not magic.startswith(PICKLES):
        raise UserError(f"--geometry is for a .pt file, and {reference} is none: leave it out")
    if path.is_dir():
        return replace(open_folder(find_model_folder(path)), origin=reference)
    if magic.startswith(GGUF):
        from openelm.interop.gguf import open_gguf

        return open_gguf(path)
    if magic.startswith(PICKLES):
        from openelm.interop.corenet import open_checkpoint

        return open_checkpoint(path, geometry)
    raise UserError(
        f"{reference} is no model that can be read: it is neither a folder with config.json, nor a GGUF file, nor a "
        "PyTorch checkpoint"
    )


def _first_bytes(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(4)


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
    here = {Path(source.origin).resolve(), (Path(source.origin) / "model").resolve()}
    if destination.resolve() in here and (form.quantize or form.dtype.itemsize < source.dtype.itemsize):
        raise UserError(
            f"{destination} is the source, of which {form.quantize or form.dtype} keeps less: choose another name"
        )
    remove_drafts(destination.parent, escape(destination.name), of_the_dead=True)
    check_norm(source, name)
    chosen.check(source, form)
    source = within_range(source, form)
    if chosen.is_file:
        with whole_file(destination, overwrite=overwrite) as draft:
            chosen.write(draft, source, form)
            check(draft)
    else:
        with whole_folder(destination, overwrite=overwrite) as draft:
            chosen.write(draft, source, form)
            check(draft)


def check_norm(source: Source, name: str) -> None:
    """UserError where the model has a norm that engines of the format ``name`` would take for another."""
    norm = source.config.normalization_layer_name
    if norm != "rms_norm" and name != "hf":
        raise UserError(
            f"{source.origin} has normalization_layer_name={norm!r}, and engines that read {name} compute 'rms_norm' "
            "whatever a model has: keep the model as it is, or use --to hf"
        )


def check_destination(path: Path, *, is_file: bool, overwrite: bool) -> None:
    """UserError where ``path`` is taken, or where replacing it would cost something else than a model."""
    if is_file and path.is_dir():
        raise UserError(f"{path} is a folder, and a file is to be written: name one, such as {path / 'model.gguf'}")
    if not path.exists():
        return
    if not overwrite:
        raise UserError(f"{path} exists, and nothing is overwritten unasked: choose another name, or pass --overwrite")
    if not is_file and not path.is_dir():
        raise UserError(f"{path} is a file, and a folder is to be written: choose another name")
    strange = _no_weights(path) if is_file else _no_part_of_a_model(path)
    if strange:
        raise UserError(f"{path} {strange}, so it is not replaced: choose another name")


def _no_weights(file: Path) -> str:
    """Why a file is not one that we would have written; "" where it is."""
    if not file.is_file():
        return "is no ordinary file"
    return "" if _first_bytes(file).startswith(MAGICS) else "holds no model"


def _no_part_of_a_model(folder: Path) -> str:
    """The same for a folder: it must be a model folder, and nothing else must stand in it."""
    try:
        ours = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == "openelm"
    except (OSError, ValueError, AttributeError, RecursionError):
        ours = (folder / "Modelfile").is_file() and (folder / "model.gguf").is_file()
    if not ours:
        return "is a folder that holds no model"
    patterns = (*MODEL_FILES, "modeling_openelm.py", "Modelfile", "model.gguf", "*.safetensors.index.json")
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() or not any(fnmatch(entry.name, pattern) for pattern in patterns):
            return f"holds more than a model ({entry.name})"
        if entry.name.startswith("optimizer"):
            return "is a checkpoint, from which a run may want to go on"
    return ""


def within_range(source: Source, form: Format) -> Source:
    """The source, refusing by name a tensor whose values ``form.dtype`` cannot hold, at the one end or the other."""

    def read(name: str) -> Tensor:
        tensor = source.read(name)
        if tensor.dtype != form.dtype and tensor.numel():
            largest = tensor.abs().max()
            cast = largest.to(form.dtype)
            if largest.isfinite() and (not cast.isfinite() or (largest > 0) != (cast > 0)):
                what = "beyond" if not cast.isfinite() else "all below"
                limit = torch.finfo(form.dtype).max if what == "beyond" else torch.finfo(form.dtype).smallest_normal
                kind = str(form.dtype).removeprefix("torch.")
                raise UserError(
                    f"{source.origin}: {name} holds {largest:.3g}, {what} {kind}'s {limit:.3g}: use a wider --dtype"
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
