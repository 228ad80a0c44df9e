"""openelm average: mean weights as a model folder."""

import json
from pathlib import Path

import pytest
import torch

from openelm import ModelConfig, OpenELM, cli, load_model
from openelm.data.tokenizer import Tokenizer, train_tokenizer
from openelm.interop.adapter import Adapter, open_adapter, shapes
from openelm.interop.card import parse, section
from openelm.train.checkpoint import Checkpoint, Checkpoints
from openelm.train.form import Form

CONFIG = ModelConfig(
    model_dim=32, num_transformer_layers=2, head_dim=16, num_gqa_groups=1, ffn_dim_divisor=16, vocab_size=320
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints, every weight of which is its step."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=5)
    model = OpenELM(CONFIG)
    for step in (10, 20, 60):
        weights = {name: torch.full_like(tensor, step) for name, tensor in model.state_dict().items()}
        checkpoints.save(Form(CONFIG), Checkpoint(step, weights, {}, {}))
    return tmp_path


def values(folder: Path) -> set[float]:
    return {float(value) for tensor in load_model(folder).state_dict().values() for value in tensor.unique()}


def test_the_mean_of_the_last_checkpoints_is_written(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["average", str(run), "--last", "2"]) == 0
    out, err = capsys.readouterr()
    assert "steps 20, 60" in out and "holds no tokenizer" in err
    assert values(run / "model-averaged-60") == {40.0}


def test_out_dtype_and_json(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["average", str(run), "--last", "3", "--out", str(tmp_path / "mean"), "--dtype", "bfloat16", "--json"]
    assert cli.run(words) == 0
    expected = {"folder": str(tmp_path / "mean"), "steps": [10, 20, 60], "ema": False}
    assert json.loads(capsys.readouterr().out) == {**expected, "tokenizer": False, "adapter": False}
    assert values(tmp_path / "mean") == {30.0}
    assert json.loads((tmp_path / "mean" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_runs_tokenizer_goes_along(run: Path) -> None:
    text = "".join(chr(97 + i * i % 26) + (" " if i % 5 == 0 else "") for i in range(4000))
    tokenizer = train_tokenizer([text], run / "tokenizer" / "tokenizer.model", 300)
    assert cli.run(["average", str(run), "--last", "1"]) == 0
    assert Tokenizer.load(run / "model-averaged-60").fingerprint == tokenizer.fingerprint


def test_the_card_is_the_models_without_its_figures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["average", str(run), "--last", "1", "--out", str(run / "without")]) == 0
    assert not (run / "without" / "README.md").exists(), "there is no card to take it from"
    (run / "model").mkdir()
    (run / "model" / "README.md").write_text(
        "---\nlicense: mit\nmodel-index: [{name: x, results: []}]\n---\n# x\nReached 99 %.\n\n## Licence\nMIT.\n\n"
        "## Evaluation\n1.5 bits per byte\n\n## Data\nBooks.\n"
    )
    assert cli.run(["average", str(run), "--last", "2"]) == 0
    metadata, body = parse((run / "model-averaged-60" / "README.md").read_text())
    assert metadata == {"license": "mit"}
    assert body.startswith("# model-averaged-60\n\nThese weights are the mean of the checkpoints of steps 20, 60. They")
    assert section(body, "Data") == "Books." and section(body, "Licence") == "MIT."
    assert "99" not in body and "1.5" not in body


def test_nothing_is_overwritten_unasked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["average", str(run), "--last", "1"]) == 0
    assert cli.run(["average", str(run), "--last", "2"]) == 2
    assert "model-averaged-60 exists" in capsys.readouterr().err
    assert values(run / "model-averaged-60") == {60.0}
    assert cli.run(["average", str(run), "--last", "2", "--overwrite"]) == 0
    assert values(run / "model-averaged-60") == {40.0}


def test_overwrite_does_not_delete_what_is_no_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["average", str(run), "--last", "2", "--out", str(run), "--overwrite"]) == 2
    assert "is no model folder" in capsys.readouterr().err
    assert len(list((run / "checkpoints").iterdir())) == 3


def test_a_run_with_too_few_checkpoints_or_none_is_refused(
    run: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["average", str(run), "--last", "5"]) == 2
    assert "has 3 checkpoints, not 5" in capsys.readouterr().err
    assert not list(run.glob("model*"))
    assert cli.run(["average", str(run), "--last", "0"]) == 2
    assert "--last" in capsys.readouterr().err
    empty = tmp_path_factory.mktemp("empty")
    assert cli.run(["average", str(empty)]) == 2
    assert f"{empty} has no checkpoints" in capsys.readouterr().err
    assert cli.run(["average", str(empty / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named_and_nothing_written(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "checkpoints" / "step_00000020" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert cli.run(["average", str(run), "--last", "2"]) == 2
    assert str(file) in capsys.readouterr().err
    assert not list(run.glob("*model*"))


def test_without_last_those_in_a_row_are_taken(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["average", str(run), "--out", str(run / "all")]) == 0
    assert "steps 10, 20, 60" in capsys.readouterr().out, "without a config nothing tells a milestone"
    (run / "config.yaml").write_text("train: {checkpoint_every: 40}")
    assert cli.run(["average", str(run), "--out", str(run / "forty"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == [10, 20, 60]
    (run / "config.yaml").write_text("train: {checkpoint_every: 10}")
    assert cli.run(["average", str(run), "--out", str(run / "ten"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == [60]
    assert values(run / "ten") == {60.0}


def test_only_every_so_many_steps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["average", str(run), "--every", "20", "--last", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == [20, 60]
    for every in ("7", "0", "-1"):
        assert cli.run(["average", str(run), "--every", every]) == 2
        assert f"--every {every}: no checkpoint is at a multiple of that; there are [10, 20, 60]" in (
            capsys.readouterr().err
        )


def test_the_exponential_average_is_written(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints(run / "checkpoints", keep_last=5)
    weights = OpenELM(CONFIG).state_dict()
    for step in (70, 80):
        kept = {f"ema.{name}": torch.full_like(tensor, step + 1) for name, tensor in weights.items()}
        checkpoints.save(Form(CONFIG), Checkpoint(step, weights, kept, {}))
    assert cli.run(["average", str(run), "--ema"]) == 0
    assert "checkpoint of step 80" in capsys.readouterr().out
    assert values(run / "model-ema-80") == {81.0}
    assert cli.run(["average", str(run), "--ema", "--step", "70"]) == 0
    assert values(run / "model-ema-70") == {71.0}
    capsys.readouterr()
    for words, said in (
        (["--ema", "--step", "60"], "holds no exponential average"),
        (["--ema", "--step", "61"], "no checkpoint of step 61"),
        (["--ema", "--last", "2"], "leave out --last"),
        (["--step", "70"], "--step 70 goes with --ema"),
    ):
        assert cli.run(["average", str(run), *words, "--out", str(run / "none")]) == 2
        assert said in capsys.readouterr().err
    assert not (run / "none").exists()


ADAPTER = Adapter("dora", r=2, targets=("token_embeddings", "qkv_proj"))


@pytest.fixture
def adapter_run(tmp_path: Path) -> Path:
    """The same of an adapter, with exponential averages; its run has a chat template."""
    run = tmp_path / "tuned"
    checkpoints = Checkpoints(run / "checkpoints", keep_last=5)
    for step in (10, 20):
        values = {name: torch.full(shape, float(step)) for name, shape in shapes(ADAPTER, CONFIG).items()}
        kept = {f"ema.{name}": tensor + 1 for name, tensor in values.items()}
        checkpoints.save(Form(CONFIG, ADAPTER, "someone/small"), Checkpoint(step, values, kept, {}))
    (run / "model").mkdir()
    (run / "model" / "chat_template.jinja").write_text("{{ messages }}")
    (run / "model" / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    return run


def adapter_values(folder: Path) -> set[float]:
    adapter, stored = open_adapter(folder, CONFIG)
    assert adapter == ADAPTER
    return {float(value) for name in stored.shapes for value in stored.read(name).unique()}


def test_of_an_adapters_run_the_mean_is_an_adapter(adapter_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["average", str(adapter_run), "--last", "2"]) == 0
    out = adapter_run / "adapter-averaged-20"
    assert f"openelm merge someone/small {out} OUT" in capsys.readouterr().out
    assert adapter_values(out) == {15.0} and not (out / "config.json").exists()
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "license: mit" in (out / "README.md").read_text()
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/small"
    assert cli.run(["average", str(adapter_run), "--ema", "--step", "10", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapter"] is True
    assert adapter_values(adapter_run / "adapter-ema-10") == {11.0}


def test_an_adapter_keeps_its_dtype_and_replaces_no_model(
    run: Path, adapter_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["average", str(adapter_run), "--last", "2"]
    assert cli.run([*words, "--dtype", "bfloat16"]) == 2
    assert "trains an adapter, which is kept in float32" in capsys.readouterr().err
    assert cli.run(["average", str(run), "--last", "1"]) == 0
    assert cli.run([*words, "--out", str(run / "model-averaged-60"), "--overwrite"]) == 2
    assert "model-averaged-60 is no adapter folder, so it is not replaced" in capsys.readouterr().err
    assert values(run / "model-averaged-60") == {60.0}


def test_checkpoints_of_different_adapters_have_no_mean(adapter_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Adapter("lora", r=4, targets=("qkv_proj",))
    weights = {name: torch.zeros(shape) for name, shape in shapes(other, CONFIG).items()}
    checkpoints = Checkpoints(adapter_run / "checkpoints", keep_last=5)
    checkpoints.save(Form(CONFIG, other, "someone/small"), Checkpoint(30, weights, {}, {}))
    assert cli.run(["average", str(adapter_run), "--last", "2"]) == 2
    assert "they have no mean; average checkpoints of one run" in capsys.readouterr().err
