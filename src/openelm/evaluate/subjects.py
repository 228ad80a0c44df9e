"""What there is to evaluate behind a path or a name: one model, or all checkpoints of a run."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from openelm.errors import UserError
from openelm.evaluate.results import Evaluation, digest
from openelm.interop.hub import TOKENIZER_FILES, model_path, tokenizer_help, tokenizer_path
from openelm.model.folder import find_model_folder, load_config
from openelm.model.stored import StoredTensors, safetensors_files

# What other models keep beside their parameters.
BUFFERS = ("attention.bias", ".attn.bias", "masked_bias", "inv_freq")
STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Subject:
    """One model that is going to be measured, and the file of its results."""

    folder: Path
    origin: str
    label: str  # in tables
    results: Path  # to which what distinguishes one evaluation from another is added
    about: dict[str, Any] = field(default_factory=dict)  # step, averaged, tokens

    @property
    def is_openelm(self) -> bool:
        """Whether our engine computes it; other models are transformers'. UserError for a damaged config.json."""
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON ({error})") from error
        return isinstance(config, dict) and config.get("model_type") == "openelm"

    def begun(self, dtype: str, engine: str, tokenizer: Path | None, environment: dict[str, Any]) -> Started:
        """What an earlier evaluation has measured of the same model and tokenizer in this dtype, or nothing yet."""
        weights = safetensors_files(self.folder, "model")
        words = [file for file in _tokenizer_files(tokenizer or self.folder) if file.is_file()]
        about = {"origin": self.origin, "label": self.label, "dtype": dtype, "engine": engine, **self.about}
        if self.folder.parent.name == "snapshots":  # of the Hub's cache
            about["revision"] = self.folder.name
        about["digest"] = digest([self.folder / "config.json", *weights, *words])
        if self.is_openelm:
            about["parameters"] = load_config(self.folder)[0].num_parameters()
        else:
            shapes = StoredTensors(weights).shapes.items()
            about["parameters"] = sum(math.prod(shape) for name, shape in shapes if not name.endswith(BUFFERS))
        kind = f"{about['digest'][:8]}-{dtype}{'' if engine == 'openelm' else f'-{engine}'}"
        path = self.results.with_name(f"{self.results.stem}.{kind}.json")
        return Started(path, Evaluation.load(path) if path.is_file() else Evaluation(about, environment))


@dataclass(frozen=True)
class Started:
    """An evaluation and its file, whose name tells weights, tokenizer, dtype and engine apart."""

    path: Path
    evaluation: Evaluation


def _tokenizer_files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    return [place / name for name in (*TOKENIZER_FILES, "chat_template.jinja")]


def find(reference: str, out: Path | None) -> list[Subject]:
    """The models behind a path or a Hub id, those of a run in the order of their steps, its final model last.

    Results go to ``out``, or to RUN/evaluation, or to evaluations/ here. UserError where there is no model.
    """
    path = model_path(reference)
    if (path / "checkpoints").is_dir() and not (path / "config.json").is_file():
        return _of_run(path, reference, out or path / "evaluation")
    folder = find_model_folder(path)
    label = re.sub(r"[^\w.-]+", "-", reference.strip("/")).strip("-.") or "model"
    step = STEP.fullmatch(folder.name)
    about = {"step": int(step[1])} if step else {}
    return [Subject(folder, reference, label, (out or Path("evaluations")) / f"{label}.json", about)]


def _of_run(run: Path, reference: str, out: Path) -> list[Subject]:
    steps = {int(found[1]): path for path in (run / "checkpoints").iterdir() if (found := STEP.fullmatch(path.name))}
    subjects = [
        Subject(
            path,
            f"{reference}, step {step:,}",
            f"{run.name}, step {step:,}",
            out / f"{path.name}.json",
            {"step": step, **_tokens(path)},
        )
        for step, path in sorted(steps.items())
    ]
    if (run / "model" / "config.json").is_file():
        about = {"averaged": (run / "model-last").is_dir(), **(subjects[-1].about if subjects else {})}
        subjects.append(Subject(run / "model", reference, run.resolve().name, out / "model.json", about))
    if not subjects:
        raise UserError(f"{run} has neither checkpoints nor a model yet: let the run go on")
    return subjects


def _tokens(checkpoint: Path) -> dict[str, int]:
    try:
        tokens = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["tokens"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {"tokens": tokens} if isinstance(tokens, int) else {}


def find_tokenizer(subject: Subject, given: str | None) -> Path | None:
    """The tokenizer that was asked for, or a run's for its checkpoint; None where the folder has its own.

    UserError where there is none at all.
    """
    if given:
        return tokenizer_path(given)
    if any((subject.folder / name).is_file() for name in TOKENIZER_FILES[:2]) or not subject.is_openelm:
        return None
    of_run = subject.folder.parent.parent / "tokenizer"
    if not of_run.is_dir():
        raise UserError(tokenizer_help(subject.origin))
    return of_run


def open_engine(subject: Subject, *, dtype: torch.dtype | None, device: str | None, tokenizer: Path | None) -> Any:
    """Our engine, and the text of the model's chat template; UserError for a device that cannot be used."""
    from openelm.infer.engine import Engine

    template = subject.folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else None
    return Engine.load(subject.folder, dtype=dtype, device=device, tokenizer=tokenizer), text


def open_transformers(
    subject: Subject, *, dtype: torch.dtype | None, device: str | None, tokenizer: Path | None, add_bos: bool
) -> Any:
    """lm-eval's own model on transformers."""
    from openelm.evaluate.tasks import quiet

    with quiet():
        from lm_eval.models.huggingface import HFLM
    if subject.is_openelm:
        import openelm.interop.huggingface  # noqa: F401 (makes the Auto classes know OpenELM)
    return HFLM(
        pretrained=str(subject.folder),
        tokenizer=str(tokenizer) if tokenizer else None,
        dtype=dtype or "auto",
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        add_bos_token=add_bos,
        batch_size=8,
    )
