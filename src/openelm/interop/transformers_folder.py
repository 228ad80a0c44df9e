"""Folders for Hugging Face transformers, which open there with our package and without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from openelm.errors import UserError
from openelm.interop.source import Source, open_folder
from openelm.interop.target import Format, MissingEngineError, Target, write_beside
from openelm.model.folder import write_model

MODELING_FILE = Path(__file__).with_name("modeling_openelm.py")
AUTO_MAP = {
    "AutoConfig": "modeling_openelm.OpenELMConfig",
    "AutoModel": "modeling_openelm.OpenELMModel",
    "AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM",
}


def check(source: Source, form: Format) -> None:
    """UserError where something is asked for that transformers' own format does not have."""
    if form.quantize:
        raise UserError(
            f"--quantize {form.quantize} is not written for transformers: use --to mlx or --to gguf, or let "
            "transformers quantise while it loads"
        )


def write(folder: Path, source: Source, form: Format) -> None:
    """Fill a draft: config.json, weights, tokenizer, chat template, card, the model's code."""
    write_model(folder, source.config, source.weight, form.dtype)
    if source.tokenizer is not None and source.tokenizer.pad_id is not None:
        _change(folder / "generation_config.json", pad_token_id=source.tokenizer.pad_id)
    write_beside(folder, source)
    complete(folder)


def complete(folder: Path) -> None:
    """Let a model folder of ours, with all else in it, open in transformers without our package."""
    shutil.copyfile(MODELING_FILE, folder / MODELING_FILE.name)
    _change(folder / "config.json", auto_map=AUTO_MAP)
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        # transformers 4 would make a third input, token_type_ids, which its generate then refuses; 4 and 5 would pad on
        # the right, where generate takes the padding for the end of the prompt.
        _change(tokenizer, model_input_names=["input_ids", "attention_mask"], padding_side="left")


def logits(path: Path, rows: list[list[int]]) -> Tensor:
    """(B, T, V) logits in fp32, as transformers computes them in the folder's dtype."""
    try:
        from transformers.utils import logging

        from openelm.interop.modeling_openelm import OpenELMForCausalLM
    except ImportError as error:
        raise MissingEngineError(
            f"transformers cannot be used here ({error}): pip install 'openelm-framework[hf]'"
        ) from error
    logging.disable_progress_bar()
    model = OpenELMForCausalLM.from_pretrained(path, dtype="auto").eval()
    with torch.inference_mode():
        found: Tensor = model(torch.tensor(rows), use_cache=False).logits.float()
    return found


def _change(path: Path, **entries: object) -> None:
    data = {**json.loads(path.read_text(encoding="utf-8")), **entries}
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


TARGET = Target(engine="transformers", is_file=False, check=check, write=write, stored=open_folder, logits=logits)
