"""A model, records and recipes to tune with: runs of six steps, about a second."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from openelm import cli
from openelm.data.tokenizer import Tokenizer
from openelm.model.folder import save_model
from small_models import make

RECIPE: dict[str, Any] = {
    "name": "tuned",
    "seed": 1,
    "data": {"row_length": 64, "prompt_length": 40, "held_out": 0.15},
    "train": {
        "steps": 6,
        "global_batch": 4,
        "micro_batch": 2,
        "lr": 1e-2,
        "dtype": "float32",
        "checkpoint_every": 2,
        "keep_last": 3,
        "validate_every": 3,
        "sample_every": 3,
        "sample_prompts": ["After "],
        "sample_tokens": 4,
    },
}


def write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def records(tmp_path_factory, text_folder) -> dict[str, str]:
    """Files of 24 records each: prompts with answers, conversations, pairs of answers."""
    draw, folder = random.Random(3), tmp_path_factory.mktemp("records")
    vocabulary = sorted({word for file in text_folder.iterdir() for word in file.read_text().lower().split()})

    def words(least: int, most: int) -> str:
        return " ".join(draw.choices(vocabulary, k=draw.randint(least, most)))

    texts = [(words(2, 9), words(1, 8), words(1, 8)) for _ in range(24)]
    return {
        name: str(write_records(folder / f"{name}.jsonl", [form(*text) for text in texts]))
        for name, form in {
            "prompt": lambda prompt, answer, _: {"prompt": prompt, "answer": f" {answer}"},
            "chat": lambda prompt, answer, _: {
                "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            },
            "preference": lambda prompt, one, two: {"prompt": prompt, "chosen": f" {one}", "rejected": f" {two}"},
        }.items()
    }


@pytest.fixture(scope="session")
def base_model(tmp_path_factory, golden_weights, tokenizer_file) -> Path:
    """The uneven model of three layers, its embedding shared, with its tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "model"
    return save_model(make(golden_weights), folder, tokenizer=Tokenizer.load(tokenizer_file))


@pytest.fixture(scope="session")
def tuning_recipe(records, base_model) -> Callable[..., dict[str, Any]]:
    """``tuning_recipe("prompt", adapter=LORA, train={"steps": 3})``: sections are changed, or put in."""

    def build(form: str = "prompt", **sections: Any) -> dict[str, Any]:
        recipe = copy.deepcopy(RECIPE) | {"model": {"path": str(base_model)}}
        recipe["data"]["sources"] = [{"name": form, "path": records[form], "format": form}]
        if form == "preference":
            recipe["preference"] = {"beta": 0.5}
        for name, values in sections.items():
            known = recipe.get(name)
            recipe[name] = {**known, **values} if isinstance(known, dict) and isinstance(values, dict) else values
        return recipe

    return build


@pytest.fixture(scope="session")
def reference_cache(tmp_path_factory) -> Path:
    """Where runs keep the reference's figures: of equal pairs and models they are asked for once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def quiet(monkeypatch, reference_cache) -> None:
    """The roof for MFU is not measured and the report not drawn: both take longer than such a run, and have tests."""
    monkeypatch.setattr("openelm.train.run.gemm_flops_per_s", lambda *_, **__: 1e12)
    monkeypatch.setattr("openelm.report.page.write_report", lambda run, *_: run / "report" / "index.html")
    monkeypatch.setenv("OPENELM_CACHE", str(reference_cache))


@pytest.fixture
def command(tmp_path, quiet) -> Callable[..., list[str]]:
    """The words of ``openelm finetune`` or ``dpo``, as the recipe asks for it, in the run folder ``name``."""

    def words(recipe: dict[str, Any], name: str, *more: str) -> list[str]:
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return ["dpo" if "preference" in recipe else "finetune", str(file), "--run", str(tmp_path / name), *more]

    return words


@pytest.fixture
def tune(command, tmp_path) -> Callable[..., Path]:
    """Run ``command`` here; it must end well. Gives the run folder."""

    def run(recipe: dict[str, Any], name: str, *more: str, code: int = 0) -> Path:
        assert cli.run(command(recipe, name, *more)) == code
        return tmp_path / name

    return run
