"""The run folder: made whole, held by one run at a time, and gone on with only by the run that it belongs to."""

from __future__ import annotations

import errno
import glob
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from openelm.config import RunConfig
from openelm.data.tokenizer import Tokenizer
from openelm.environment import environment
from openelm.errors import UserError
from openelm.files import disk_errors_named, remove_drafts, whole_folder, write_json
from openelm.model.geometry import ModelConfig
from openelm.tuning_config import TuneConfig

# What may differ between a run and its resume. None of the first changes a number that is computed; the second, where
# and in which parts it is computed, changes no more than the rounding.
NO_NUMBER = {
    "train.log_every",
    "train.tensorboard",
    "train.wandb",
    "train.keep_last",
    "train.milestone_every",
    "train.async_checkpoints",
    "train.timeout_s",
    "train.evaluate_every",
    "train.evaluate_tasks",
    "train.evaluate_limit",
    "train.evaluate_data",
    "data.workers",
}
ROUNDING = {"train.micro_batch", "train.sharding", "train.activation_checkpointing", "train.compile"}
DATA = "data.json"  # what the files were like when the run began
# Said by file systems that have no locks at all: some network ones, as they are mounted.
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder's name, whether the folder is there yet or not, against any other process.

    The system lets go of it when the process ends, however it ends. What a killed start left is cleared away.
    UserError: somebody holds it, or the folder that it is in cannot be written to.
    """
    real = run.resolve()  # one folder has one lock, however it is spelt
    path = real.parent / f".{real.name}.lock"
    with disk_errors_named(run):
        with suppress(FileExistsError):  # it is no folder, which the opening says in better words
            path.parent.mkdir(parents=True, exist_ok=True)
        handle = _taken(path, run)
    try:
        with disk_errors_named(run):
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        remove_drafts(real.parent, glob.escape(real.name))
        yield
    finally:
        with suppress(OSError):  # Windows keeps what is open
            path.unlink(missing_ok=True)
        os.close(handle)


def _taken(path: Path, run: Path) -> int:
    """The lock file, open and held."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _take(handle)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                print(
                    f"{path.parent} is on a file system without locks ({os.strerror(error.errno)}): nothing keeps a "
                    "second run off the same folder",
                    file=sys.stderr,
                )
                return handle
            holder = "another process"
            with suppress(OSError):
                holder = os.read(handle, 200).decode("utf-8", "replace") or holder
            os.close(handle)
            raise UserError(
                f"{run} is in use by {holder}: a run folder takes one run at a time; wait for it, stop it, or choose "
                "another --run"
            ) from error
        # The last holder may have deleted the file between our opening and our taking it.
        with suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == path.stat().st_ino:
                return handle
        os.close(handle)


def _take(handle: int) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def check_start(run: Path, config: RunConfig | TuneConfig, *, resume: bool, overwrite: bool) -> list[str]:
    """Whether this run may begin, or go on, here; what to say about settings that differ from those it began with."""
    if run.exists() and not (run.is_dir() and ((run / "config.yaml").is_file() or not any(run.iterdir()))):
        raise UserError(
            f"{run} is there and is no run folder (it has no config.yaml): choose another with --run FOLDER"
        )
    if run.exists() and not (resume or overwrite):
        raise UserError(f"{run} exists: go on with --resume, start anew with --overwrite, or choose --run FOLDER")
    if run.exists() and not resume:
        for key, path in _paths(as_plain(config)):
            if Path(path).exists() and Path(path).resolve().is_relative_to(run.resolve()):
                raise UserError(f"{key}={path} is in {run}, which --overwrite deletes: choose another --run")
    if resume and not run.exists():
        raise UserError(f"{run} does not exist, so there is nothing to resume: leave out --resume")
    return _differences(run, config) if resume else []


def _paths(data: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """What a config reads: key and path."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        if key in ("path", "init_from", "evaluate_data") and value:
            yield f"{prefix}{key}", value
        else:
            yield from _paths(value, f"{prefix}{key}.")


def _differences(run: Path, config: RunConfig | TuneConfig) -> list[str]:
    """Refuse to go on with a recipe that computes something else, naming each key; what differs in rounding only."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is not a run folder: it has no config.yaml; start anew with --overwrite")
    try:
        before = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): put it back as it was, or start anew with --overwrite"
        ) from error
    before.pop("geometry", None)
    old, new = flat(before), flat(as_plain(config))
    differing = {
        key: f"{key} was {old.get(key, _default(config, key))!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if key not in NO_NUMBER and old.get(key, _default(config, key)) != new.get(key)
    }
    if refused := [text for key, text in differing.items() if key not in ROUNDING]:
        raise UserError(
            f"{run} was begun with another recipe: {', '.join(refused)}: resume with the same values, or choose "
            "another --run"
        )
    if not differing:
        return []
    return [f"other than when the run began, with no effect beyond rounding: {', '.join(differing.values())}"]


def _default(config: RunConfig | TuneConfig, key: str) -> Any:
    """What a key means that a run does not know, because it was begun before there was such a key."""
    section, _, name = key.partition(".")
    fields = getattr(type(config).model_fields.get(section), "annotation", None)
    field = getattr(fields, "model_fields", {}).get(name)
    return field.default if field is not None and not field.is_required() else None


def create(
    run: Path,
    config: RunConfig | TuneConfig,
    geometry: ModelConfig,
    tokenizer: Tokenizer,
    fingerprint: dict[str, Any],
) -> None:
    """Make the run folder, with what it will compute, from what, and on what."""
    geometry_of_run = {
        **geometry.as_dict(),
        "ffn_dims": list(geometry.ffn_dims),
        "num_parameters": geometry.num_parameters(),
    }
    with whole_folder(run.resolve(), overwrite=True) as draft:  # a link to a folder stays one
        (draft / "checkpoints").mkdir()
        (draft / "tokenizer").mkdir()
        tokenizer.save(draft / "tokenizer")
        write_json(draft / "environment.json", environment())
        write_json(draft / DATA, fingerprint)
        text = yaml.safe_dump({**as_plain(config), "geometry": geometry_of_run}, sort_keys=False)
        (draft / "config.yaml").write_text(text, encoding="utf-8")


def as_plain(config: RunConfig | TuneConfig) -> dict[str, Any]:
    """A config as plain values, as its YAML has them."""
    plain: dict[str, Any] = json.loads(config.model_dump_json())
    return plain


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """A config as plain values by dotted keys."""
    if not isinstance(data, dict):
        return {prefix.removesuffix("."): data}
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= flat(value, f"{prefix}{key}.")
    return found
