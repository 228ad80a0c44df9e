"""Training goes on from any model folder, with its tokenizer; another geometry is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from openelm import cli
from openelm.config import load_recipe
from openelm.data.tokenizer import Tokenizer
from openelm.model.folder import load_model
from openelm.train import parts


@pytest.fixture
def trained(recipe: dict[str, Any], write_recipe: Callable[..., str], tmp_path: Path) -> Path:
    assert cli.run(["pretrain", write_recipe(recipe), "--run", str(tmp_path / "first")]) == 0
    return tmp_path / "first" / "model"


def test_the_first_step_has_the_loss_of_the_model_it_begins_from(
    recipe: dict[str, Any], write_recipe: Callable[..., str], trained: Path, tmp_path: Path
) -> None:
    recipe["tokenizer"] = {}  # so that the folder's own is taken
    recipe["train"]["init_from"] = str(trained)
    file, run = write_recipe({**recipe, "name": "second"}), tmp_path / "second"
    assert cli.run(["pretrain", file, "--run", str(run)]) == 0
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])

    model = load_model(trained)
    stream = parts.token_stream(load_recipe(file, []), Tokenizer.load(trained))
    batch = stream.next_batch(recipe["train"]["global_batch"])
    with torch.no_grad():
        loss = float(model(*batch.tensors("cpu"))) / batch.valid_tokens()
    # One micro-batch against two: fp32 sums in another order.
    assert first["cross_entropy"] == pytest.approx(loss, rel=1e-5)


def test_another_geometry_is_refused_by_the_name_of_the_field(
    recipe: dict[str, Any],
    write_recipe: Callable[..., str],
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe["train"]["init_from"] = str(trained)
    recipe["model"]["model_dim"] = 64
    file = write_recipe({**recipe, "name": "other"})
    assert cli.run(["pretrain", file, "--run", str(tmp_path / "other")]) == 2
    assert "model_dim (32 there, 64 here)" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
