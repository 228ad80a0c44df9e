"""Checkpoints: a model folder with all that is needed to go on, whole or not there at all.

checkpoints/step_00005000/ holds config.json and model.safetensors (fp32 masters: it opens as a model folder),
optimizer.safetensors (moments, random state), state.json (stream, counters) and manifest.json (a SHA-256 each).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from openelm.errors import UserError
from openelm.files import remove_drafts, remove_folder, whole_folder
from openelm.model.folder import copy_tensors, load_config, write_model
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: fp32 weights and moments by name, and the rest as plain data."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: the last ``keep_last``, and every ``milestone_every``-th step for good."""

    def __init__(self, folder: Path, *, keep_last: int, milestone_every: int = 0) -> None:
        self.folder, self.keep_last, self.milestone_every = folder, keep_last, milestone_every

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, rising."""
        names = (path.name for path in self.folder.glob("step_*") if path.is_dir())
        return sorted(int(name[5:]) for name in names if name[5:].isdecimal())

    def path(self, step: int) -> Path:
        """Where the checkpoint of ``step`` stands."""
        return self.folder / f"step_{step:08}"

    def save(self, config: ModelConfig, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, then delete those that are no longer kept."""
        path = self.path(checkpoint.step)
        with whole_folder(path, overwrite=True) as draft:
            write_model(draft, config, checkpoint.weights, torch.float32)
            save_file({**checkpoint.optimizer, "rng.cpu": torch.get_rng_state()}, draft / "optimizer.safetensors")
            (draft / "state.json").write_text(json.dumps({"step": checkpoint.step, **checkpoint.state}))
            sums = {file.name: sha256(file) for file in sorted(draft.iterdir())}
            (draft / MANIFEST).write_text(json.dumps({"step": checkpoint.step, "sha256": sums}, indent=1))
        for step in self.steps()[: -self.keep_last]:
            if not self.milestone_every or step % self.milestone_every:
                remove_folder(self.path(step))
        return path

    def load(self, step: int | None = None) -> Checkpoint:
        """The newest checkpoint, or that of ``step``, verified; the random state is set too.

        Raises UserError where a file is damaged, naming it and the older steps that could be taken instead.
        """
        remove_drafts(self.folder)
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.folder} holds no complete checkpoint: start anew with --overwrite")
        if step is not None and step not in steps:
            raise UserError(f"there is no checkpoint of step {step} in {self.folder}: there are {steps}")
        step = steps[-1] if step is None else step
        path = self.path(step)
        older = [s for s in steps if s < step]
        remedy = f"take an older one with --resume-step {older[-1]}" if older else "there is no older one"
        try:
            verify(path)
            _, weights = read_weights(path)
            tensors = load_file(path / "optimizer.safetensors")
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        except (UserError, SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{error}; {remedy}") from error
        torch.set_rng_state(tensors.pop("rng.cpu"))
        return Checkpoint(step, weights, tensors, state)

    def drop_after(self, step: int) -> None:
        """Delete checkpoints newer than ``step``: a run that goes on from an older one will write them again."""
        for newer in [s for s in self.steps() if s > step]:
            remove_folder(self.path(newer))


def verify(path: Path) -> None:
    """Check every file against the manifest; UserError names the first that differs."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        sums = dict(manifest["sha256"])
        if path.name != f"step_{manifest['step']:08}":
            raise ValueError(f"it is of step {manifest['step']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"damaged checkpoint: {path / MANIFEST} cannot be read ({error})") from error
    for name, expected in sums.items():
        file = path / name
        if not file.is_file():
            raise UserError(f"damaged checkpoint: {file} is missing")
        if sha256(file) != expected:
            raise UserError(f"damaged checkpoint: {file} does not have the checksum of its manifest")


def sha256(file: Path) -> str:
    """Checksum of a file's bytes, in hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_weights(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Geometry and fp32 weights, by their names inside the package, of a checkpoint or any model folder."""
    config, _ = load_config(path)
    with torch.device("meta"):
        shapes = OpenELM(config).state_dict()
    weights = {name: torch.empty(tensor.shape, dtype=torch.float32) for name, tensor in shapes.items()}
    copy_tensors(path, weights)
    return config, weights
