"""What there is to evaluate behind a path or a name: one model, or all checkpoints of a run."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from openelm.data.tokenizer import Tokenizer
from openelm.errors import UserError
from openelm.evaluate.results import Evaluation, digest
from openelm.interop import adapter as peft_files
from openelm.interop.convert import open_source
from openelm.interop.hub import TOKENIZER_FILES, model_path, tokenizer_help, tokenizer_path
from openelm.interop.source import Source, read_text
from openelm.model.folder import find_model_folder, load_config
from openelm.model.geometry import ModelConfig
from openelm.model.stored import StoredTensors, safetensors_files
from openelm.model.transformer import OpenELM

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
    run: Path | None = None  # that it is of, or the base of: for what its folder lacks
    cards: tuple[Path, ...] = ()  # that may say what was measured: of models of one's own

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter only, as checkpoints of a run that trains one do."""
        return (self.folder / peft_files.CONFIG).is_file() and not any(self.folder.glob("model*.safetensors"))

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
        weights = _adapter_files(self.folder) if self.is_adapter else safetensors_files(self.folder, "model")
        words = [file for file in _tokenizer_files(tokenizer or self.folder) if file.is_file()]
        about = {"origin": self.origin, "label": self.label, "dtype": dtype, "engine": engine, **self.about}
        if self.folder.parent.name == "snapshots":  # of the Hub's cache
            about["revision"] = self.folder.name
        about["digest"] = digest([self.folder / "config.json", *weights, *words])
        if self.is_openelm:
            about["parameters"] = self._geometry().num_parameters()
        else:
            shapes = StoredTensors(weights).shapes.items()
            about["parameters"] = sum(math.prod(shape) for name, shape in shapes if not name.endswith(BUFFERS))
        kind = f"{about['digest'][:8]}-{dtype}{'' if engine == 'openelm' else f'-{engine}'}"
        path = self.results.with_name(f"{self.results.stem}.{kind}.json")
        return Started(path, Evaluation.load(path) if path.is_file() else Evaluation(about, environment))

    def _geometry(self) -> ModelConfig:
        config = load_config(self.folder)[0]
        if self.is_adapter and peft_files.changes_output(peft_files.read_config(self.folder)[0], config):
            return config.changed(share_input_output_layers=False)  # as it is merged
        return config


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
    checkpoint = all((path / name).is_file() for name in ("config.json", "manifest.json"))
    # A checkpoint may be of an adapter, whose run knows the rest; an adapter by itself is refused.
    folder = path if checkpoint else find_model_folder(path)
    label = re.sub(r"[^\w.-]+", "-", reference.strip("/")).strip("-.") or "model"
    step = STEP.fullmatch(folder.name)
    about = {"step": int(step[1])} if step else {}
    results = (out or Path("evaluations")) / f"{label}.json"
    if checkpoint:
        return [Subject(folder, reference, label, results, about, run=folder.resolve().parent.parent)]
    cards = (folder / "README.md",) if Path(reference).exists() else ()  # what the Hub's cache holds stays as it is
    return [Subject(folder, reference, label, results, about, cards=cards)]


def _of_run(run: Path, reference: str, out: Path) -> list[Subject]:
    steps = {int(found[1]): path for path in (run / "checkpoints").iterdir() if (found := STEP.fullmatch(path.name))}
    subjects = [
        Subject(
            path,
            f"{reference}, step {step:,}",
            f"{run.name}, step {step:,}",
            out / f"{path.name}.json",
            {"step": step, **_tokens(path)},
            run,
        )
        for step, path in sorted(steps.items())
    ]
    if (run / "model" / "config.json").is_file():
        about = {"averaged": (run / "model-last").is_dir(), **(subjects[-1].about if subjects else {})}
        cards = tuple(run / kind / "README.md" for kind in ("model", "adapter") if (run / kind).is_dir())
        subjects.append(Subject(run / "model", reference, run.resolve().name, out / "model.json", about, run, cards))
    if not subjects:
        raise UserError(f"{run} has neither checkpoints nor a model yet: let the run go on")
    return [*_base(run, out), *subjects]


def _base(run: Path, out: Path) -> list[Subject]:
    """The model that a tuning run began from, where it is one that can be measured beside it, as its step 0."""
    try:
        origin = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["model"].get("path")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        return []
    if not isinstance(origin, str):
        return []
    try:
        folder = find_model_folder(model_path(origin))
    except UserError as error:
        print(f"{run}: the model that it began from is not measured: {error}", file=sys.stderr)
        return []
    return [Subject(folder, origin, f"{run.name}, base", out / "base.json", {"step": 0, "tokens": 0}, run)]


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
    of_run = (subject.run or subject.folder.parent.parent) / "tokenizer"
    if not of_run.is_dir():
        raise UserError(tokenizer_help(subject.origin))
    return of_run


def open_engine(
    subject: Subject,
    *,
    dtype: torch.dtype | None,
    device: str | None,
    tokenizer: Path | None,
    merge: Callable[[Source, Path], Source],
) -> Any:
    """Our engine, and the text of the model's chat template; UserError for a device that cannot be used.

    ``merge`` puts the adapter of a folder into its base, in memory.
    """
    from openelm.infer.engine import Engine, checked_device, native_dtype

    places = [subject.folder, *([subject.run / "model"] if subject.run and "step" in subject.about else [])]
    text = next((found for place in places if (found := read_text(place / "chat_template.jinja"))), None)
    if not subject.is_adapter:
        return Engine.load(subject.folder, dtype=dtype, device=device, tokenizer=tokenizer), text
    device_ = checked_device(device)
    source = merge(open_source(_base_of(subject.folder)), subject.folder)
    with torch.device("meta"):
        model = OpenELM(source.config)
    model = model.to(dtype or native_dtype(torch.float32, device_)).to_empty(device=device_)
    for name, tensor in model.state_dict().items():
        tensor.copy_(source.weight(name))
    return Engine(model.eval().requires_grad_(False), Tokenizer.load(tokenizer or subject.folder)), text


def _base_of(adapter: Path) -> str:
    """What an adapter belongs to; UserError where that is not there."""
    base = peft_files.read_config(adapter)[1]
    try:
        if not base:
            raise UserError("it does not say of which")
        if not model_path(base).exists():
            raise UserError(f"there is no {base}")
    except UserError as error:
        raise UserError(
            f"{adapter} holds an adapter, which is measured with the model that it belongs to ({error}): put that "
            "model back, or measure the run's model/"
        ) from error
    return base


def _adapter_files(folder: Path) -> list[Path]:
    """All that decides what an adapter computes: its own files, and the weights of its base."""
    base = model_path(_base_of(folder))
    weights = safetensors_files(find_model_folder(base), "model") if base.is_dir() else [base]
    return [folder / peft_files.CONFIG, *safetensors_files(folder, peft_files.STEM), *weights]


def open_transformers(
    subject: Subject, *, dtype: torch.dtype | None, device: str | None, tokenizer: Path | None, add_bos: bool
) -> Any:
    """lm-eval's own model on transformers."""
    from openelm.evaluate.tasks import quiet

    with quiet():
        from lm_eval.models.huggingface import HFLM
    if subject.is_openelm:
        if subject.is_adapter:
            raise UserError(
                f"{subject.folder} holds an adapter, which --engine transformers does not measure: leave the option "
                "out, or merge it with `openelm merge`"
            )
        import openelm.interop.huggingface  # noqa: F401 (makes the Auto classes know OpenELM)
    return HFLM(
        pretrained=str(subject.folder),
        tokenizer=str(tokenizer) if tokenizer else None,
        dtype=dtype or "auto",
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        add_bos_token=add_bos,
        batch_size=8,
    )
