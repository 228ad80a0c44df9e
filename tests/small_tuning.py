"""Tuning runs of four steps on the tiny model that tests share: of examples or of pairs, all weights or an adapter."""

import json
from pathlib import Path
from typing import Any

import yaml

from openelm import cli
from openelm.data.tokenizer import Tokenizer
from openelm.model.folder import save_model
from small_models import make

ADAPTER = {"kind": "dora", "r": 2, "alpha": 4, "targets": ["token_embeddings", "qkv_proj"]}


def write_recipe(
    folder: Path, golden_weights: Any, tokenizer_file: Path, *, pairs: bool = False, **sections: Any
) -> Path:
    """A recipe, with its base model (folder/base) and its records beside it; ``sections`` stand over its own."""
    tokenizer = Tokenizer.load(tokenizer_file)
    save_model(make(golden_weights), folder / "base", tokenizer=tokenizer, card="---\nlicense: mit\n---\n# Base\n")
    words = ("house", "water", "night", "garden", "winter", "paper")
    rows = [{"prompt": f"Which word is {n}? ", "answer": words[n % 6] + " and other words"} for n in range(24)]
    if pairs:
        rows = [{"prompt": row["prompt"], "chosen": row["answer"], "rejected": "none of these"} for row in rows]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": "words", "path": str(folder / "records.jsonl"), "format": "preference" if pairs else "prompt"}
    recipe = {
        "name": "tuned",
        "model": {"path": str(folder / "base")},
        "data": {"sources": [source], "row_length": 48, "held_out": 0.2},
        "adapter": ADAPTER,
        **({"preference": {"loss": "sigmoid", "beta": 0.1}} if pairs else {}),
        "train": {
            "steps": 4,
            "global_batch": 4,
            "micro_batch": 2,
            "lr": 1e-2,
            "dtype": "float32",
            "checkpoint_every": 2,
            "validate_every": 2,
            "sample_prompts": ["Which word is 3? "],
            "sample_tokens": 3,
        },
    }
    path = folder / "tuned.yaml"
    path.write_text(yaml.safe_dump({**recipe, **sections}), encoding="utf-8")
    return path


def train(folder: Path, golden_weights: Any, tokenizer_file: Path, monkeypatch: Any, **options: Any) -> Path:
    """The folder of a run by such a recipe; neither the roof is measured nor the report drawn."""
    monkeypatch.setattr("openelm.train.run.gemm_flops_per_s", lambda *_, **__: 1e12)
    monkeypatch.setattr("openelm.report.page.write_report", lambda run, *_: run / "report" / "index.html")
    monkeypatch.setenv("OPENELM_CACHE", str(folder / "cache"))
    recipe = write_recipe(folder, golden_weights, tokenizer_file, **options)
    command = "dpo" if options.get("pairs") else "finetune"
    assert cli.run([command, str(recipe), "--run", str(folder / "run")]) == 0
    return folder / "run"
