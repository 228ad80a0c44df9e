"""--guard: who looks at prompts and answers before they are computed, and shown.

A guard is a function ``f(prompt, answer) -> bool``, True where the text must not be shown. It is called with "" for an
answer before anything is computed, then with the answer as far as it has come, on a thread of its own.
"""

from __future__ import annotations

import asyncio
import re
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from openelm.errors import UserError
from openelm.serve.errors import Refused
from openelm.user_function import user_function

Guard = Callable[[str, str], bool]

FORMS = "FILE.py:FUNCTION, MODULE:FUNCTION, or for a classifier of transformers FOLDER:LABEL or FOLDER:LABEL:THRESHOLD"


async def judged(guard: Guard, prompt: str, answer: str) -> bool:
    """What a guard says, on a thread of its own. Refused where it fails: then nothing is shown."""
    try:
        return bool(await asyncio.to_thread(guard, prompt, answer))
    except Exception as error:
        traceback.print_exc()
        raise Refused(500, "the guard has failed: see the server's own output", code="guard") from error


def load_guard(reference: str) -> Guard:
    """The guard that ``--guard`` names. UserError for what is none."""
    place, _, rest = reference.partition(":")
    if not place or not rest:
        raise UserError(f"--guard {reference} names no guard: write {FORMS}")
    if Path(place).is_dir():
        return _classifier(Path(place), rest)
    guard: Guard = user_function(f"--guard {reference}", place, rest)[1]
    return guard


def _classifier(folder: Path, rest: str) -> Guard:
    """A sequence classifier: True where it gives a label a probability of the threshold or more.

    It reads the prompt before there is an answer, then the answer by itself, and of each the last that fits.
    """
    try:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError as error:
        raise UserError(f"a classifier needs transformers ({error}): pip install 'openelm-framework[hf]'") from error
    label, _, text = rest.partition(":")
    if not re.fullmatch(r"(0?\.\d+|1(\.0+)?)?", text):
        raise UserError(f"--guard {folder}:{rest}: {text} is no probability: write one from 0 to 1, as 0.5")
    threshold = float(text or 0.5)
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True, **options).eval()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--guard {folder}: no classifier of transformers ({str(error).splitlines()[0]})") from error
    if label not in model.config.label2id:
        raise UserError(f"--guard {folder}: there is no label {label}: take one of {', '.join(model.config.label2id)}")
    place, lock = model.config.label2id[label], threading.Lock()
    tokenizer.truncation_side = "left"
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))

    @torch.inference_mode()
    def guard(prompt: str, answer: str) -> bool:
        with lock:
            inputs = tokenizer(answer or prompt, truncation=True, max_length=longest, return_tensors="pt")
            logits_BC = model(**inputs).logits
        several = logits_BC.shape[1] > 1 and model.config.problem_type != "multi_label_classification"
        odds_BC = logits_BC.softmax(-1) if several else logits_BC.sigmoid()
        return bool(odds_BC[0, place] >= threshold)

    return guard
