"""Rewards of answers: a Python function, or a classifier of transformers."""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from openelm.errors import UserError
from openelm.infer.engine import native_dtype
from openelm.interop.hub import model_path
from openelm.model.stored import safetensors_files
from openelm.tune.rejection import Prompt, Reward
from openelm.user_function import user_function

PREFIX = "python:"
FORMS = "python:FILE.py:FUNCTION, python:MODULE:FUNCTION, or a classifier's folder or Hub id"
SMALL = (".json", ".jinja", ".model", ".txt")  # a vocabulary may be any of these
TOKENS_AT_ONCE = 8192  # that a classifier reads, padding included


def open_reward(reference: str, label: str | None, device: torch.device) -> tuple[Reward, str]:
    """The reward, and a digest of what it is made of: a function's file, a classifier's model and tokenizer.

    What begins with "python:" is a function, anything else a classifier; ``label`` names one of its outputs.
    """
    if not reference.startswith(PREFIX):
        folder = _classifier_folder(reference)
        return Classifier(reference, folder, label, device), _digest(_small_files(folder) + _weights(folder))
    if label is not None:
        raise UserError(f"--reward-label {label} goes with a classifier, and {reference} is a function: leave it out")
    module, function = _imported(reference)
    file = getattr(module, "__file__", None)
    return Function(reference, function), _digest([Path(file)]) if file else ""


def _digest(files: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            total.update(file.name.encode() + b"\0" + hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()


# A function


class Function:
    """A user's function of (prompt, answer), or of (prompt, answer, record) where it takes three."""

    def __init__(self, reference: str, function: Callable[..., Any]) -> None:
        self._reference, self._function = reference, function
        self._takes_record = _parameters(function) >= 3

    def __call__(self, answers: Sequence[tuple[Prompt, str]]) -> list[float]:
        return [self._of(prompt, answer) for prompt, answer in answers]

    def _of(self, prompt: Prompt, answer: str) -> float:
        asked = (prompt.content, answer, prompt.record) if self._takes_record else (prompt.content, answer)
        about = f"for the answer {_short(answer)} to the prompt {_short(prompt.content)}"
        try:
            value = self._function(*asked)
        except Exception as error:
            raise UserError(
                f"{self._reference} failed {about} ({type(error).__name__}: {error}): correct it; --traceback shows "
                "where, and what is finished is kept"
            ) from error
        try:
            number = math.nan if isinstance(value, str) else float(value)
        except (TypeError, ValueError, RuntimeError):  # the last is torch's, for a tensor of many numbers
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{self._reference} gave {value!r} {about}: a reward is a finite number: correct it")
        return number


def _parameters(function: Callable[..., Any]) -> int:
    """How many arguments it must be given; two where it does not say."""
    try:
        named = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 2
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(one.kind in places and one.default is inspect.Parameter.empty for one in named)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _imported(reference: str) -> tuple[ModuleType, Callable[..., Any]]:
    place, _, name = reference.removeprefix(PREFIX).rpartition(":")
    if not place or not name:
        raise UserError(f"--reward {reference} names no function: write {FORMS}")
    return user_function(f"--reward {reference}", place, name)


# A classifier


def _classifier_folder(reference: str) -> Path:
    folder = model_path(reference)
    if not (folder / "config.json").is_file():
        raise UserError(f"--reward {reference} is no model's folder, and no name of one on the Hub: write {FORMS}")
    return folder


def _small_files(folder: Path) -> list[Path]:
    """Config, tokenizer and chat template, under whatever names this kind of tokenizer has them."""
    return sorted(file for file in folder.iterdir() if file.suffix in SMALL and file.is_file())


def _weights(folder: Path) -> list[Path]:
    try:
        return safetensors_files(folder, "model")
    except UserError as error:
        raise UserError(f"--reward {folder}: {error}") from error


class Classifier:
    """A sequence classifier of transformers: its one output, or the log-odds of one class against the others.

    Its tokenizer's chat template, where there is one, lays out conversations; else prompt and answer are a pair of
    texts. What is longer than the model can read loses its beginning.
    """

    def __init__(self, reference: str, folder: Path, label: str | None, device: torch.device) -> None:
        try:
            from transformers import AutoTokenizer
            from transformers.utils import logging
        except ImportError as error:
            raise UserError(
                f"a classifier needs transformers ({error}): pip install 'openelm-framework[hf]'"
            ) from error
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self._reference = reference
        self._model = _model(reference, folder, device)
        self._tokenizer: Any
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"--reward {reference}: its tokenizer cannot be opened ({_line(error)})") from error
        self._tokenizer.padding_side, self._tokenizer.truncation_side = "right", "left"
        config = self._model.config.get_text_config()
        sizes = (self._tokenizer.model_max_length, _positions(self._model, config))
        self._longest = min((size for size in sizes if size), default=None)
        # Padding that the model does not know for such would be read as text.
        self._pads = config.pad_token_id is not None and config.pad_token_id == self._tokenizer.pad_token_id
        self._output = _output(reference, self._model.config, label)
        self._said = False

    @torch.inference_mode()
    def __call__(self, answers: Sequence[tuple[Prompt, str]]) -> list[float]:
        encoded = [self._encoded(prompt, answer) for prompt, answer in answers]
        rewards = [0.0] * len(encoded)
        for group in self._groups([len(one["input_ids"]) for one in encoded]):
            if len(group) == 1:
                inputs = {name: torch.tensor([ids]) for name, ids in encoded[group[0]].items()}
            else:
                inputs = dict(self._tokenizer.pad([encoded[index] for index in group], return_tensors="pt"))
            logits_BC = self._model(**{name: value.to(self._model.device) for name, value in inputs.items()}).logits
            for index, value in zip(group, self._judged(logits_BC.float()).tolist(), strict=True):
                if not math.isfinite(value):
                    raise UserError(
                        f"--reward {self._reference} gave {value} for the answer {_short(answers[index][1])}: damaged "
                        "weights, or float16 has overflowed: take another model"
                    )
                rewards[index] = value
        return rewards

    def _judged(self, logits_BC: Tensor) -> Tensor:
        place, by_itself = self._output
        if by_itself:
            return logits_BC[:, place]
        others = [other for other in range(logits_BC.shape[1]) if other != place]
        return logits_BC[:, place] - logits_BC[:, others].logsumexp(-1)

    def _groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of what is computed together: of about the same length, shortest first."""
        groups: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lengths.__getitem__):
            if groups and self._pads and (len(groups[-1]) + 1) * lengths[index] <= TOKENS_AT_ONCE:
                groups[-1].append(index)
            else:
                groups.append([index])
        return groups

    def _encoded(self, prompt: Prompt, answer: str) -> Mapping[str, list[int]]:
        tokenizer, content = self._tokenizer, prompt.content
        texts: tuple[str, ...]
        if not isinstance(content, str) and tokenizer.chat_template:
            texts = (tokenizer.apply_chat_template(prompt.answered(answer), tokenize=False),)
            options = {"add_special_tokens": False}  # the template has written them
        else:
            asked = content if isinstance(content, str) else "\n\n".join(turn["content"] for turn in content)
            texts, options = (asked, answer), {}
        found: Mapping[str, list[int]] = tokenizer(*texts, **options)
        if self._longest is None or len(found["input_ids"]) <= self._longest:
            return found
        if not self._said:
            self._said = True
            print(
                f"{self._reference} reads {self._longest} tokens at most: what is longer loses its beginning",
                file=sys.stderr,
            )
        cut: Mapping[str, list[int]] = tokenizer(*texts, truncation=True, max_length=self._longest, **options)
        return cut


def _model(reference: str, folder: Path, device: torch.device) -> Any:
    from transformers import AutoModelForSequenceClassification

    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(
            f"--reward {reference} cannot be opened as a sequence classifier of transformers ({_line(error)}): take "
            "another; code that comes with a model is not executed"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"--reward {reference} has no {missing[0]}, so its rewards would be random: give a model that was trained "
            "as a sequence classifier"
        )
    return model.to(device=device, dtype=native_dtype(model.dtype, device)).eval()


def _positions(model: Any, config: Any) -> int | None:
    """How many tokens have a position; None where the model does not say."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and getattr(module, "padding_idx", None) is not None:
            return config.max_position_embeddings - int(module.padding_idx) - 1  # RoBERTa counts from behind padding
    return getattr(config, "max_position_embeddings", None)


def _output(reference: str, config: Any, label: str | None) -> tuple[int, bool]:
    """Which output is the reward, and whether it is one by itself: of a class, it is so only beside the others'."""
    names = {str(name): int(place) for place, name in config.id2label.items()}
    if label is None:
        if len(names) > 1:
            raise UserError(
                f"--reward {reference} has {len(names)} outputs: name the one that is the reward with --reward-label: "
                f"{', '.join(names)}"
            )
        return 0, True
    if label not in names:
        raise UserError(f"--reward-label {label}: {reference} has {', '.join(names)}: name one of these")
    several = ("regression", "multi_label_classification")
    return names[label], len(names) == 1 or config.problem_type in several


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
