"""Checkpoints: a model folder with all that is needed to go on, whole or not there at all.

checkpoints/step_00005000/ holds config.json and model.safetensors (fp32 masters: it opens as a model folder; of an
adapter, PEFT's files), optimizer.safetensors (moments, random state), state.json (stream, counters) and manifest.json
(a SHA-256 each). Where
several ranks wrote it, each has written the rows that it holds: model-00001-of-00004.safetensors and
optimizer-00001-of-00004.safetensors, and state-00002-of-00004.json beside the first rank's state.json.

Nothing here speaks to other ranks. ``write_part`` on every rank, then ``publish`` on the first, in a draft whose name
holds the attempt: what a killed attempt left is never mixed in.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from openelm.errors import UserError
from openelm.files import disk_errors_named, put_in_place, remove_drafts, remove_folder, sync
from openelm.model.folder import copy_tensors, load_config, tensor_shapes
from openelm.model.geometry import ModelConfig
from openelm.model.stored import Slice as Slice
from openelm.model.stored import StoredTensors, safetensors_files, save_slices
from openelm.train.form import Form, open_form

MANIFEST = "manifest.json"
STATE = "state.json"
RANDOM_STATE = "rng.cpu"
HASHING_THREADS = 4
# What two models must share for the weights of one to mean the same in the other; the widths follow from these.
GEOMETRY = (
    *("model_dim", "num_transformer_layers", "head_dim", "num_query_heads", "num_kv_heads", "ffn_dims"),
    *("vocab_size", "rope_freq_constant", "normalize_qk_projections", "share_input_output_layers"),
    "normalization_layer_name",
)


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: fp32 weights and moments by name, and the rest as plain data."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


@dataclass(frozen=True)
class Part:
    """What one rank saves: its rows of weights and moments by name, and its state as plain data.

    Each row of a tensor is in the part of one rank only. The first rank's state holds what all of them share.
    """

    step: int
    weights: dict[str, Slice]
    optimizer: dict[str, Slice]
    state: dict[str, Any]


class Opened:
    """A checkpoint to read from: any rows of any tensor, whoever wrote them.

    What it reads is as good as its files: ``open_checkpoint`` verifies them first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.form, self._weights = open_form(path)
        self.config = self.form.config
        self._states = [_read_state(file) for file in (path / STATE, *sorted(path.glob("state-?????-of-?????.json")))]
        self.step: int = self._states[0]["step"]
        self._optimizer = StoredTensors(safetensors_files(path, "optimizer"))
        self.optimizer_shapes = self._optimizer.shapes

    def states(self) -> list[dict[str, Any]]:
        """The states of the ranks that wrote it; the first holds what all of them share."""
        return self._states

    def read_weight(self, name: str, first_row: int = 0, rows: int | None = None) -> Tensor:
        """Rows of a weight, by its name inside the package, in fp32 on the CPU; all of them by default."""
        return self._weights.read(name, first_row, rows)

    def read_optimizer(self, name: str, first_row: int = 0, rows: int | None = None) -> Tensor:
        """Rows of an optimizer tensor likewise."""
        return self._optimizer.read(name, first_row, rows)

    def restore_random_state(self) -> None:
        """Let random numbers go on where they were, if the checkpoint says where."""
        if RANDOM_STATE in self.optimizer_shapes:
            torch.set_rng_state(self.read_optimizer(RANDOM_STATE))


class Checkpoints:
    """The checkpoints of one run: the last ``keep_last``, and every ``milestone_every``-th step for good.

    One that is not due, at no multiple of ``every``, is there because the run was stopped: it goes with the next one,
    so that what is kept and averaged in the end does not tell how often that was.
    """

    def __init__(self, folder: Path, *, keep_last: int, milestone_every: int = 0, every: int = 1) -> None:
        self.folder, self.keep_last, self.milestone_every, self.every = folder, keep_last, milestone_every, every

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, rising."""
        names = (path.name for path in self.folder.glob("step_*") if path.is_dir())
        return sorted(int(name[5:]) for name in names if name[5:].isdecimal())

    def due(self) -> list[int]:
        """Those of ``steps`` that a run never stopped would have: multiples of ``every``, and the newest."""
        steps = self.steps()
        return [step for step in steps if step % self.every == 0 or step == steps[-1]]

    def path(self, step: int) -> Path:
        """Where the checkpoint of ``step`` stands."""
        return self.folder / f"step_{step:08}"

    def save(self, form: Form, checkpoint: Checkpoint) -> Path:
        """Write all of a checkpoint at once, then delete those that are no longer kept."""
        weights = {name: Slice.whole(tensor) for name, tensor in checkpoint.weights.items()}
        optimizer = {name: Slice.whole(tensor) for name, tensor in checkpoint.optimizer.items()}
        part = Part(checkpoint.step, weights, {**optimizer, **random_state()}, checkpoint.state)
        attempt = new_attempt()
        try:
            self.write_part(form, part, 0, 1, attempt)
            return self.publish(part.step, 1, attempt)
        finally:
            self.discard(part.step, attempt)

    def write_part(self, form: Form, part: Part, rank: int, ranks: int, attempt: str) -> None:
        """Write what rank ``rank`` of ``ranks`` has to save, and see it on the disk, with a checksum per file.

        All ranks hand in the same ``attempt``, one that was never used before (``new_attempt`` of the first). Raises
        UserError where there is no room: ``discard`` then removes what all of them wrote.
        """
        draft = self._draft(part.step, attempt)
        with disk_errors_named(self.path(part.step)):
            draft.mkdir(parents=True, exist_ok=True)
            described = form.describe(draft) if rank == 0 else []
            if ranks == 1:
                form.write(draft, lambda name: part.weights[name].tensor)
                tensors = {name: piece.tensor.detach().cpu().contiguous() for name, piece in part.optimizer.items()}
                save_file(tensors, draft / "optimizer.safetensors")
                files = list(draft.iterdir())
            else:
                files = _write_slices(draft, form, part, f"-{rank + 1:05}-of-{ranks:05}") + described
            files.append(draft / (STATE if rank == 0 else f"state-{rank + 1:05}-of-{ranks:05}.json"))
            files[-1].write_text(json.dumps({"step": part.step, **part.state}), encoding="utf-8")
            for file in files:
                sync(file)
            sums = draft / _sums_name(rank)
            sums.write_text(json.dumps({file.name: sha256(file) for file in sorted(files)}), encoding="utf-8")
            sync(sums)

    def publish(self, step: int, ranks: int, attempt: str) -> Path:
        """Put a checkpoint that ``ranks`` ranks have written under its name; then delete those no longer kept.

        For the first rank alone, once all have come back from ``write_part``. Raises UserError where a part is not
        there; the attempt's files are then deleted.
        """
        draft, path = self._draft(step, attempt), self.path(step)
        try:
            with disk_errors_named(path):
                sums = _merged_sums(draft, ranks)
                (draft / MANIFEST).write_text(json.dumps({"step": step, "sha256": sums}, indent=1), encoding="utf-8")
                sync(draft / MANIFEST)
                for rank in range(ranks):
                    (draft / _sums_name(rank)).unlink()
                sync(draft)
                put_in_place(draft, path)
                self.drop_old()
        finally:
            self.discard(step, attempt)
        return path

    def discard(self, step: int, attempt: str) -> None:
        """Delete what was written of an attempt that is given up, if it is there."""
        shutil.rmtree(self._draft(step, attempt), ignore_errors=True)

    def open(self, step: int | None = None, *, share: tuple[int, int] = (0, 1)) -> Opened:
        """The newest checkpoint, or that of ``step``, verified as ``open_checkpoint`` does, to read from.

        Raises UserError where a file is damaged, naming it and the older step that could be taken instead.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.folder} holds no complete checkpoint: start anew with --overwrite")
        if step is not None and step not in steps:
            raise UserError(f"there is no checkpoint of step {step} in {self.folder}: there are {steps}")
        step = steps[-1] if step is None else step
        older = [s for s in steps if s < step]
        try:
            return open_checkpoint(self.path(step), share=share)
        except UserError as error:
            remedy = f"take an older one with --resume-step {older[-1]}" if older else "there is no older one"
            raise UserError(f"{error}; {remedy}") from error

    def load(self, step: int | None = None) -> Checkpoint:
        """All of the newest checkpoint, or that of ``step``, verified; the random state is set too."""
        remove_drafts(self.folder)
        opened = self.open(step)
        opened.restore_random_state()
        weights = {name: opened.read_weight(name) for name in opened.form.shapes}
        names = sorted(opened.optimizer_shapes.keys() - {RANDOM_STATE})
        return Checkpoint(opened.step, weights, {n: opened.read_optimizer(n) for n in names}, opened.states()[0])

    def drop_after(self, step: int) -> None:
        """Delete checkpoints newer than ``step``: a run that goes on from an older one will write them again."""
        for newer in [s for s in self.steps() if s > step]:
            remove_folder(self.path(newer))

    def drop_old(self) -> None:
        """Delete those no longer kept: after each new one, and where a run goes on that was killed before it had."""
        kept = self.due()[-self.keep_last :]
        for old in self.steps():
            if old not in kept and (not self.milestone_every or old % self.milestone_every):
                remove_folder(self.path(old))

    def _draft(self, step: int, attempt: str) -> Path:
        return self.folder / f".{self.path(step).name}.tmp-part-{attempt}"


def new_attempt() -> str:
    """A name for one attempt to save, for all ranks to use."""
    return secrets.token_hex(4)


def random_state() -> dict[str, Slice]:
    """Where PyTorch's random numbers stand, to go with one rank's optimizer tensors."""
    return {RANDOM_STATE: Slice.whole(torch.get_rng_state())}


def open_checkpoint(path: Path, *, share: tuple[int, int] = (0, 1)) -> Opened:
    """Verify the files of ``share``, as (rank, ranks), and open the checkpoint; UserError names what is damaged."""
    verify(path, share=share)
    try:
        return Opened(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        # With a share, the damage may be in a file that another rank looks at.
        raise UserError(f"damaged checkpoint: {path}: {error}") from error


def verify(path: Path, *, share: tuple[int, int] = (0, 1)) -> None:
    """Check every file against the manifest; UserError names the first that differs.

    With ``share`` = (rank, ranks), each of several ranks sums up some of the files, the largest dealt first.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        sums = dict(manifest["sha256"])
        if path.name != f"step_{manifest['step']:08}":
            raise ValueError(f"it is of step {manifest['step']}")
        if missing := {"config.json", STATE} - sums.keys():
            raise ValueError(f"it does not list {min(missing)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"damaged checkpoint: {path / MANIFEST} cannot be read ({error})") from error
    for name in sums:
        if not (path / name).is_file():
            raise UserError(f"damaged checkpoint: {path / name} is missing")
    rank, ranks = share
    mine = sorted(sums, key=lambda name: (-(path / name).stat().st_size, name))[rank::ranks]
    with ThreadPoolExecutor(min(HASHING_THREADS, os.cpu_count() or 1)) as threads:
        for name, found in zip(mine, threads.map(lambda name: sha256(path / name), mine), strict=True):
            if found != sums[name]:
                raise UserError(f"damaged checkpoint: {path / name} does not have the checksum of its manifest")


def check_geometry(config: ModelConfig, path: Path) -> None:
    """Raise UserError where the checkpoint or model folder at ``path`` is of another geometry, naming the fields."""
    stored, _ = load_config(path)
    differing = [
        f"{name} is {getattr(stored, name)} there and {getattr(config, name)} here"
        for name in GEOMETRY
        if getattr(stored, name) != getattr(config, name)
    ]
    if differing:
        raise UserError(f"{path} is of another geometry: {'; '.join(differing)}: use the model that it was made with")


def sha256(file: Path) -> str:
    """Checksum of a file's bytes, in hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_weights(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Geometry and fp32 weights, by their names inside the package, of a checkpoint or any model folder."""
    config, _ = load_config(path)
    weights = {name: torch.empty(shape, dtype=torch.float32) for name, shape in tensor_shapes(config).items()}
    copy_tensors(path, weights)
    return config, weights


def _write_slices(draft: Path, form: Form, part: Part, suffix: str) -> list[Path]:
    """One file of weights and one of optimizer tensors; slices without rows are left out, files never."""
    files = [draft / f"{stem}{suffix}.safetensors" for stem in (form.stem, "optimizer")]
    weights = {form.file_name(name): piece for name, piece in part.weights.items()}
    for file, slices in zip(files, (weights, part.optimizer), strict=True):
        save_slices(file, {name: piece for name, piece in slices.items() if piece.tensor.numel() or not piece.shape[0]})
    return files


def _merged_sums(draft: Path, ranks: int) -> dict[str, str]:
    sums: dict[str, str] = {}
    for rank in range(ranks):
        file = draft / _sums_name(rank)
        if not file.is_file():
            raise UserError(
                f"the part of rank {rank + 1} of {ranks} is not in {draft}: all ranks must write to one file system, "
                "and be done before the checkpoint is put in place"
            )
        sums |= json.loads(file.read_text(encoding="utf-8"))
    return dict(sorted(sums.items()))


def _sums_name(rank: int) -> str:
    return f"sums-{rank + 1:05}.json"


def _read_state(file: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return state
