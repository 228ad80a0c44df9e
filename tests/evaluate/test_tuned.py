"""What there is to measure of a tuning run: its base, its checkpoints with their adapters merged, its model."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

import small_tuning
from openelm import cli
from openelm.errors import UserError
from openelm.evaluate.results import of_run
from openelm.evaluate.subjects import Subject, find, find_tokenizer, open_engine
from openelm.model.folder import load_config, load_model
from openelm.tune.adapters import merged
from small_tasks import write_tasks

pytest.importorskip("peft")


@pytest.fixture
def run(tmp_path, golden_weights, tokenizer_file, monkeypatch) -> Path:
    """Of an adapter on the embedding and on the attention."""
    return small_tuning.train(tmp_path, golden_weights, tokenizer_file, monkeypatch)


def weights(subject: Subject) -> dict[str, torch.Tensor]:
    words = find_tokenizer(subject, None)
    engine, _ = open_engine(subject, dtype=None, device="cpu", tokenizer=words, merge=partial(merged, untie=True))
    return dict(engine.model.state_dict())


def test_the_last_checkpoint_of_an_adapter_is_the_runs_model_to_the_bit(run):
    base, second, last, final = find(str(run), None)
    assert [subject.label for subject in (base, second, last, final)] == [
        *("run, base", "run, step 2", "run, step 4"),
        "run",
    ]
    assert (base.about, final.about["step"]) == ({"step": 0, "tokens": 0}, 4)
    expected = load_model(run / "model").state_dict()
    found = weights(last)
    assert found.keys() == expected.keys()  # the output layer of its own, too
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(weights(second)["layers.0.attn.qkv_proj.weight"], found["layers.0.attn.qkv_proj.weight"])
    (alone,) = find(str(run / "checkpoints" / "step_00000004"), None)
    assert all(torch.equal(weights(alone)[name], tensor) for name, tensor in expected.items())
    begun = [subject.begun("stored", "openelm", find_tokenizer(subject, None), {}) for subject in (last, final)]
    parameters = load_config(run / "model")[0].num_parameters()
    assert [one.evaluation.model["parameters"] for one in begun] == [parameters, parameters]


def test_another_base_under_the_same_name_is_another_model(run, golden_weights):
    from openelm.model.folder import save_model
    from small_models import make

    last = find(str(run), None)[2]
    before = last.begun("stored", "openelm", None, {}).evaluation.model["digest"]
    assert last.begun("stored", "openelm", None, {}).evaluation.model["digest"] == before
    other = make(golden_weights)
    with torch.no_grad():
        other.norm.weight += 1
    save_model(other, run.parent / "base", overwrite=True)
    assert last.begun("stored", "openelm", None, {}).evaluation.model["digest"] != before


def test_without_its_base_a_checkpoint_is_refused_and_the_model_is_not(run, capsys):
    (run.parent / "base").rename(run.parent / "moved")
    capsys.readouterr()
    second, _, final = find(str(run), None)
    assert "the model that it began from is not measured" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"step_00000002 holds an adapter, .*put that model back, or measure the run's"):
        second.begun("stored", "openelm", None, {})
    with pytest.raises(UserError, match="put that model back"):
        weights(second)
    assert weights(final)


def test_an_adapter_by_itself_is_to_be_merged(run):
    with pytest.raises(UserError, match=rf"`openelm merge {run.parent / 'base'} {run / 'adapter'} OUT`"):
        find(str(run / "adapter"), None)


def test_base_and_tuned_stand_in_one_table_and_the_figures_in_both_cards(run, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    data, base_card = write_tasks(tmp_path / "data"), (tmp_path / "base" / "README.md").read_text()
    capsys.readouterr()
    assert cli.run(["evaluate", str(run), "--tasks", "arc_easy", "--data", str(data), "--card"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["run, base", "run, step 2", "run, step 4", "run"]
    assert lines[4].split("|")[2:] == lines[5].split("|")[2:]  # the last checkpoint is the model
    for kind in ("model", "adapter"):
        assert "## Accuracy" in (run / kind / "README.md").read_text()
    assert (tmp_path / "base" / "README.md").read_text() == base_card
    assert [one.model["step"] for one in of_run(run)] == [0, 4, 2, 4]
    (manifest,) = run.glob("checkpoints/step_00000004/manifest.json")
    assert "README.md" not in json.loads(manifest.read_text())["sha256"]


def test_transformers_does_not_measure_an_adapter(run):
    from openelm.evaluate.subjects import open_transformers

    pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match="which --engine transformers does not measure: leave the option out"):
        open_transformers(find(str(run), None)[1], dtype=None, device="cpu", tokenizer=None, add_bos=True)
