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

STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Subject:
    """One model that is going to be measured, and the file of its results."""

    folder: Path
    origin: str
    label: str  # in file names and tables
    results: Path
    about: dict[str, Any] = field(default_factory=dict)  # step, averaged, tokens

    @property
    def is_openelm(self) -> bool:
        """Whether our engine computes it; other models are transformers'."""
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return isinstance(config, dict) and config.get("model_type") == "openelm"

    def begun(self, dtype: str, environment: dict[str, Any]) -> Evaluation:
        """The evaluation so far: empty, or what an earlier one has measured of the very same weights."""
        about = {"origin": self.origin, "label": self.label, "dtype": dtype, **self.about}
        about["digest"] = digest([self.folder / "config.json", *safetensors_files(self.folder, "model")])
        if self.is_openelm:
            about["parameters"] = load_config(self.folder)[0].num_parameters()
        else:
            shapes = StoredTensors(safetensors_files(self.folder, "model")).shapes.values()
            about["parameters"] = sum(math.prod(shape) for shape in shapes)
        if self.results.is_file():
            found = Evaluation.load(self.results)
            if (found.model.get("digest"), found.model.get("dtype")) == (about["digest"], dtype):
                return found
            # Of other weights, or computed otherwise: kept, under a name that tells.
            old = str(found.model.get("digest"))[:8]
            self.results.rename(self.results.with_name(f"{self.results.stem}.{old}-{found.model.get('dtype')}.json"))
        return Evaluation(about, environment)


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


def open_lm(
    subject: Subject,
    *,
    dtype: torch.dtype | None,
    device: str | None,
    tokenizer: str | None,
    add_bos: bool,
    transformers: bool,
    answers: Path | None,
) -> Any:
    """A model of lm-eval's kind: on our engine, or on transformers where that is asked for or the model is no OpenELM.

    UserError: no tokenizer, not enough installed, a device that cannot be used.
    """
    if transformers or not subject.is_openelm:
        return _transformers_lm(subject, dtype=dtype, device=device, tokenizer=tokenizer, add_bos=add_bos)
    from openelm.evaluate.harness import EngineLM
    from openelm.infer.engine import Engine
    from openelm.interop.source import open_folder

    # A run keeps one tokenizer for all its checkpoints, which the folder's reader knows.
    words = tokenizer_path(tokenizer) if tokenizer else None
    if words is None and not any((subject.folder / name).is_file() for name in TOKENIZER_FILES[:2]):
        if open_folder(subject.folder).tokenizer is None:
            raise UserError(tokenizer_help(subject.origin))
        words = subject.folder.parent.parent / "tokenizer"
    engine = Engine.load(subject.folder, dtype=dtype, device=device, tokenizer=words)
    template = subject.folder / "chat_template.jinja"
    return EngineLM(
        engine,
        add_bos=add_bos,
        cache=answers,
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
    )


def _transformers_lm(
    subject: Subject, *, dtype: torch.dtype | None, device: str | None, tokenizer: str | None, add_bos: bool
) -> Any:
    from openelm.evaluate.tasks import quiet

    with quiet():
        from lm_eval.models.huggingface import HFLM
    if subject.is_openelm:
        import openelm.interop.huggingface  # noqa: F401 (makes the Auto classes know OpenELM)
    return HFLM(
        pretrained=str(subject.folder),
        tokenizer=str(tokenizer_path(tokenizer)) if tokenizer else None,
        dtype=dtype or "auto",
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        add_bos_token=add_bos,
        batch_size=8,
    )
