"""Tuning runs hold what pre-training holds: the same bits however often they are stopped, and on any ranks the same."""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from openelm import cli
from openelm.config import resolve
from openelm.data.chat import encode_chat
from openelm.data.tokenizer import Tokenizer
from openelm.interop import transformers_folder
from openelm.model.folder import load_model
from openelm.train.checkpoint import sha256
from openelm.train.keeper import Keeper
from openelm.train.metrics import Recorder
from openelm.tune import reference
from openelm.tune.adapters import load_adapter
from openelm.tune.beginning import open_all
from openelm.tuning_config import TuneConfig

pytest.importorskip("peft")

PAPER_TARGETS = ["token_embeddings", "qkv_proj", "out_proj", "proj_1", "proj_2"]
LORA = {"kind": "lora", "r": 4, "alpha": 8}
DORA = {"kind": "dora", "r": 4, "alpha": 8, "dropout": 0.2, "targets": PAPER_TARGETS}
# Examples and pairs, all weights and an adapter; what is averaged, and what is kept besides.
FORMS: dict[str, dict[str, Any]] = {
    "examples": {
        "form": "prompt",
        "data": {"packing": "pack"},
        "train": {"ema_decay": 0.9, "average_last": 2, "warmup_steps": 2},
    },
    "examples-dora": {"form": "chat", "adapter": DORA, "train": {"ema_decay": 0.9, "average_last": 2}},
    "pairs": {"form": "preference", "train": {"milestone_every": 2, "keep_last": 1}},
    "pairs-dora": {"form": "preference", "adapter": DORA, "train": {"dtype": "bfloat16"}},
}


def entries(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """All metrics but the times."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    return [{k: v for k, v in entry.items() if k != "timing"} for entry in found if kind in (None, entry["kind"])]


def outcome(run: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All metrics but the times, and the checksum of every file of models, adapters and checkpoints."""
    folders = [path for path in run.iterdir() if path.name.startswith(("model", "adapter", "checkpoints"))]
    files = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    return entries(run), {str(file.relative_to(run)): sha256(file) for file in files}


class Killed(BaseException):
    """What nothing in the package catches."""


def kill_at(monkeypatch, command: list[str], step: int) -> None:
    """Run until the moment before the checkpoint of ``step`` is begun."""
    save = Keeper.save

    def killed(self, at, tokens, data):
        if at == step:
            raise Killed
        return save(self, at, tokens, data)

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "save", killed)
        with pytest.raises(Killed):
            cli.run(command)


def stop_at(monkeypatch, command: list[str], step: int) -> None:
    """Run until a signal comes in ``step``."""
    train = Recorder.train

    def signalled(self, entry, timing):
        train(self, entry, timing)
        if entry["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "train", signalled)
        assert cli.run(command) == 75


@pytest.mark.parametrize("form", FORMS)
def test_stopped_and_killed_it_ends_with_the_bits_of_a_run_left_alone(
    tuning_recipe, tune, command, monkeypatch, tmp_path, form
):
    recipe = tuning_recipe(**FORMS[form])
    expected = outcome(tune(recipe, "alone"))
    assert {"train", "validation", "examples", "sample"} == {entry["kind"] for entry in expected[0]}
    words = command(recipe, "run", "train.async_checkpoints=true")
    stop_at(monkeypatch, words, 2)  # with a checkpoint of step 3, which no other run has
    kill_at(monkeypatch, [*words, "--auto-resume"], 6)
    assert cli.run([*words, "--auto-resume"]) == 0
    assert outcome(tmp_path / "run") == expected
    assert not list(tmp_path.rglob(".*.tmp*")), "no draft is left behind"


# Killed by the system


@pytest.mark.parametrize(
    ("form", "kills"),
    [
        ("pairs-dora", 1),
        *(pytest.param(form, 20, marks=pytest.mark.slow(reason="twenty starts, minutes")) for form in FORMS),
    ],
)
def test_killed_at_random_instants_it_ends_with_the_same_bits(
    tuning_recipe, tune, command, quick, tmp_path, form, kills
):
    """Wherever it is: in reading examples, in asking the reference, in a step, in writing a checkpoint or the model."""
    recipe = tuning_recipe(**FORMS[form], name=form)
    recipe["train"] |= {"checkpoint_every": 1, "steps": 3 if kills < 10 else 30}
    start_s = time.perf_counter()
    expected, draw, killed, number = outcome(tune(recipe, "alone")), random.Random(kills), 0, 0
    longest_s = 0.6 * (time.perf_counter() - start_s)
    while killed < kills:
        run = tmp_path / f"run{number}"
        words = command(recipe, run.name, "--auto-resume", f"train.async_checkpoints={number % 2 == 0}")
        while True:
            process = quick(words, {"OPENELM_CACHE": str(run.with_suffix(".cache"))})
            process.join(draw.uniform(0.1, longest_s) if killed < kills else None)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            killed += 1
            longest_s *= 1.02  # a run that needs longer than most starts live ends all the same
        assert process.exitcode == 0, (tmp_path / "log").read_text()
        assert outcome(run) == expected
        assert not list(tmp_path.rglob(".*.tmp*")), "no draft is left behind"
        number += 1


# Ranks


def assert_close(run: Path, expected: Path) -> None:
    """The same examples, and losses within what sums in another order may do, as they grow from step to step."""
    one, many = entries(expected, "train"), entries(run, "train")
    assert [(e["step"], e["tokens"]) for e in many] == [(e["step"], e["tokens"]) for e in one]
    for step, (mine, theirs) in enumerate(zip(many, one, strict=True), start=1):
        bound = 1e-6 if step == 1 else 1e-5 if step <= 10 else 1e-3
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=bound, abs=1e-6), step
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2 if step > 10 else 1e-3), step
    assert entries(run, "examples") == entries(expected, "examples")
    for mine, theirs in zip(entries(run, "validation"), entries(expected, "validation"), strict=True):
        assert mine.pop("kind") == theirs.pop("kind")
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    scores = [json.loads((folder / "summary.json").read_text())["held_out"] for folder in (run, expected)]
    for name, score in scores[1].items():
        assert scores[0][name] == pytest.approx(score, rel=1e-3, abs=1e-5)


SHARDED = pytest.mark.slow(reason="more of the same, ten seconds each")


@pytest.mark.parametrize(
    ("form", "sharding"),
    [
        ("examples-dora", "full"),
        ("pairs", "none"),
        *(
            pytest.param(form, sharding, marks=SHARDED)
            for form in FORMS
            for sharding in ("none", "full")
            if (form, sharding) not in (("examples-dora", "full"), ("pairs", "none"))
        ),
    ],
)
def test_two_ranks_train_as_one_does(tuning_recipe, tune, command, run_ranks, tmp_path, form, sharding):
    """With rows by themselves dropout is the same too, since their numbers decide it."""
    recipe = tuning_recipe(**FORMS[form])
    recipe["train"] |= {
        "micro_batch": 1,
        "sharding": sharding,
        "dtype": "float32",
        "timeout_s": 60,
        "steps": 8,
        "lr": 2e-3,
    }
    alone = tune(recipe, "alone")
    assert run_ranks(2, command(recipe, "run")) == [0, 0], logs(tmp_path)
    assert_close(tmp_path / "run", alone)
    resumed = command(recipe, "run", "--resume-step", "6")
    assert cli.run(resumed) == 0, "on one rank"
    assert_close(tmp_path / "run", alone)
    if form == "pairs":
        assert run_ranks(2, command(recipe, "run", "--resume-step", "4")) == [0, 0], logs(tmp_path)
        assert_close(tmp_path / "run", alone)


def logs(tmp_path: Path) -> str:
    return "\n".join(f"{log.name}: {log.read_text()}" for log in sorted(tmp_path.glob("rank_*.log")))


# Rows


def test_packed_and_padded_rows_of_the_same_examples_make_the_same_step(tuning_recipe, tune):
    """One step over all examples: how many rows they are changes neither loss nor gradient, and so no weight."""
    found = {}
    for packing, rows in (("pad", 24), ("pack", 18)):
        recipe = tuning_recipe("prompt", name=packing)
        recipe["data"] |= {"packing": packing, "held_out": 0, "row_length": 63}
        recipe["train"] |= {"steps": 1, "global_batch": rows, "micro_batch": 3}
        run = tune(recipe, packing)
        (entry,) = entries(run, "examples")
        assert entry["epoch"] == 1, f"each example once: {entry}"
        found[packing] = entries(run, "train")[0], load_file(run / "model" / "model.safetensors")
    (padded, weights), (packed, others) = found.values()
    assert packed["tokens"] == padded["tokens"]
    for name in ("loss", "cross_entropy", "grad_norm"):
        assert packed[name] == pytest.approx(padded[name], rel=1e-5)
    # AdamW's first step goes by the sign of a gradient: 99 of 100 elements are far enough from zero.
    for name, weight in weights.items():
        assert ((others[name] - weight).abs() < 1e-4).float().mean() > 0.99


def test_recomputed_activations_drop_out_the_same(tuning_recipe, tune):
    recipe = tuning_recipe("prompt", adapter=DORA, train={"steps": 3, "sample_prompts": []})
    expected = entries(tune(recipe, "kept"), "train")
    for degree in ("selective", "full"):
        found = entries(tune(recipe, degree, f"train.activation_checkpointing={degree}"), "train")
        for one, other in zip(expected, found, strict=True):
            assert [other[key] for key in ("loss", "grad_norm")] == pytest.approx(
                [one[key] for key in ("loss", "grad_norm")], rel=1e-5
            )


# The reference


def asked_of(monkeypatch, words: list[str]) -> int:
    """How many batches a run asks the reference model for, before its first step."""
    asked = 0
    batch = reference._batch

    def counted(*given):
        nonlocal asked
        asked += 1
        return batch(*given)

    with monkeypatch.context() as patch:
        patch.setattr(reference, "_batch", counted)
        assert cli.run(words) == 0
    return asked


def test_the_reference_is_asked_once_for_a_model_and_pairs(
    tuning_recipe, command, monkeypatch, tmp_path, base_model, records
):
    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path / "cache"))
    recipe = tuning_recipe("preference", train={"steps": 1})
    assert asked_of(monkeypatch, command(recipe, "first")) == 12
    assert asked_of(monkeypatch, command(recipe | {"adapter": LORA}, "second")) == 0, "an adapter has the same base"
    assert asked_of(monkeypatch, command(recipe, "first", "--resume")) == 0
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 1

    shutil.copytree(base_model, tmp_path / "other")
    weights = load_file(base_model / "model.safetensors")
    weights["transformer.norm.weight"][3] *= 1.5
    save_file(weights, tmp_path / "other" / "model.safetensors")
    changed = recipe | {"model": {"path": str(tmp_path / "other")}}
    assert asked_of(monkeypatch, command(changed, "other-model")) == 12
    fewer = write_lines(tmp_path / "fewer.jsonl", Path(records["preference"]).read_text().splitlines()[:20])
    recipe["data"]["sources"][0]["path"] = str(fewer)
    assert asked_of(monkeypatch, command(recipe, "other-pairs")) > 0


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_a_run_that_goes_on_has_the_reference_that_it_began_with(tuning_recipe, tune, command, monkeypatch, tmp_path):
    """The cache is lost: it is the model as it was that is asked again, and not what the checkpoint holds."""
    recipe = tuning_recipe("preference", train={"steps": 4})
    expected = outcome(tune(recipe, "alone"))
    assert expected[0][-1]["step"] == 4 and abs(entries(tmp_path / "alone", "train")[-1]["margin"]) > 0
    kill_at(monkeypatch, command(recipe, "run"), 4)
    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path / "empty"))
    assert asked_of(monkeypatch, command(recipe, "run", "--resume")) == 12
    assert outcome(tmp_path / "run") == expected


@pytest.mark.parametrize("form", ["prompt", "preference"])
def test_a_run_goes_on_with_its_own_model_and_examples_only(
    tuning_recipe, tune, command, tmp_path, capsys, base_model, records, form
):
    shutil.copytree(base_model, tmp_path / "base")
    data = write_lines(tmp_path / "data.jsonl", Path(records[form]).read_text().splitlines())
    recipe = tuning_recipe(form, model={"path": str(tmp_path / "base")})
    recipe["data"]["sources"][0]["path"] = str(data)
    del recipe["train"]["steps"]
    recipe["train"] |= {"epochs": 0.2, "warmup_ratio": 0.5}
    run = tune(recipe, "run")
    assert entries(run, "train")[-1]["step"] == 1

    def refused(*more: str, **sections: Any) -> str:
        capsys.readouterr()
        assert cli.run(command(recipe | sections, "run", "--resume", *more)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    # A setting is named before the data that depend on it.
    assert "data.row_length was 64, is 32" in refused("data.row_length=32", "data.prompt_length=16")
    lines = data.read_text().splitlines()
    write_lines(data, lines * 2)
    error = refused()
    assert "began with other examples than data.sources give now" in error and "'records': 24" in error
    assert "put the files back" in error
    write_lines(data, [lines[0].replace('"prompt": "', '"prompt": "other '), *lines[1:]])
    assert "began with other examples" in refused()
    write_lines(data, lines)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["transformer.norm.weight"][3] *= 1.5
    save_file(weights, tmp_path / "base" / "model.safetensors")
    assert "began with other weights than" in refused()
    (run / "data.json").unlink()
    assert "data.json cannot be read" in refused()
    (run / "config.yaml").write_text("[")
    assert "config.yaml cannot be read" in refused()


# What it leaves behind


def logits(folder: Path, rows: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return load_model(folder).eval()(rows)


@pytest.mark.parametrize("adapter", [LORA, DORA, DORA | {"kind": "rslora", "targets": ["proj_1"]}])
def test_model_and_adapter_compute_the_same_in_every_library(tuning_recipe, tune, base_model, adapter):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    recipe = tuning_recipe("chat", adapter=adapter, data={"held_out": 0}, train={"steps": 3, "checkpoint_every": 3})
    run = tune(recipe, "run")
    rows = torch.randint(0, 400, (2, 33), generator=torch.Generator().manual_seed(7))
    ours = logits(run / "model", rows)
    assert (ours - logits(base_model, rows)).abs().max() > 0.1, "it has learnt something"

    unmerged = load_model(base_model).eval()
    load_adapter(unmerged, run / "adapter")
    with torch.inference_mode():
        torch.testing.assert_close(unmerged(rows), ours, rtol=0, atol=1e-4)
    shutil.copytree(base_model, run / "base")
    transformers_folder.complete(run / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "base", trust_remote_code=True).eval()
    theirs = peft.PeftModel.from_pretrained(theirs, str(run / "adapter"))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(rows).logits, ours, rtol=0, atol=1e-4)
        whole = transformers.AutoModelForCausalLM.from_pretrained(run / "model", trust_remote_code=True).eval()
        torch.testing.assert_close(whole(rows).logits, ours, rtol=0, atol=1e-4)

    # An embedding that is the output layer too becomes two matrices, of which the second is as it was.
    weights, base = (load_file(folder / "model.safetensors") for folder in (run / "model", base_model))
    apart = "token_embeddings" in adapter.get("targets", [])
    assert load_model(run / "model").config.share_input_output_layers is not apart
    assert ("lm_head.weight" in weights) is apart
    if apart:
        assert torch.equal(weights["lm_head.weight"], base["transformer.token_embeddings.weight"])
        assert not torch.equal(weights["transformer.token_embeddings.weight"], weights["lm_head.weight"])


@pytest.mark.parametrize("empty_system_turn", [False, True])
def test_the_chat_template_asks_as_training_did(tuning_recipe, tune, tokenizer_file, records, empty_system_turn):
    transformers = pytest.importorskip("transformers")
    recipe = tuning_recipe("chat", adapter=LORA, train={"steps": 1})
    recipe["data"] |= {"empty_system_turn": empty_system_turn, "prompt_length": None, "held_out": 0}
    run = tune(recipe, "run")
    config = resolve(TuneConfig, recipe, "test")
    opened = open_all(config, None)
    messages = json.loads(Path(records["chat"]).read_text().splitlines()[5])["messages"]
    seen = [example.ids.tolist() for example in opened.examples.train]
    for folder in ("model", "adapter"):
        theirs = transformers.AutoTokenizer.from_pretrained(run / folder)
        prompt = theirs.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        own = Tokenizer.load(run / folder)
        ids, counts = encode_chat(own, messages, empty_system_turn=empty_system_turn)
        start = counts.index(True)
        assert [own.bos_id, *prompt] == ids[:start]
        assert any(example[:start] == ids[:start] for example in seen)
    (entry,) = [entry for entry in entries(run, "sample") if entry["step"] == 1]
    assert entry["prompt"] == "After "


def test_averages_are_those_of_the_checkpoints(tuning_recipe, tune, base_model):
    """Of an adapter: its parts are averaged, and merged then."""
    for name, adapter, folder, stem in (
        ("whole", None, "model", "model"),
        ("parts", LORA, "adapter", "adapter_model"),
    ):
        recipe = tuning_recipe("prompt", train={"average_last": 2, "ema_decay": 0.5, "keep_last": 2})
        recipe |= {"adapter": adapter}
        run = tune(recipe, name)
        steps = [load_file(run / "checkpoints" / f"step_{step:08}" / f"{stem}.safetensors") for step in (4, 6)]
        last, averaged, moving = (
            load_file(run / f"{folder}{end}" / f"{stem}.safetensors") for end in ("-last", "", "-ema")
        )
        for key, mean in averaged.items():
            torch.testing.assert_close(mean, (steps[0][key] + steps[1][key]) / 2)
            assert torch.equal(last[key], steps[1][key])
        assert any(not torch.equal(moving[key], last[key]) for key in last)
        scores = json.loads((run / "summary.json").read_text())["held_out"]
        assert list(scores) == ["before", "last", "exponential average", "averaged"]
        assert len({score["loss"] for score in scores.values()}) == 4
        folders = (Path(recipe["model"]["path"]), *(run / f"model{end}" for end in ("-last", "-ema", "")))
        for folder, score in zip(folders, scores.values(), strict=True):
            assert held_out_loss(folder, recipe) == pytest.approx(score["loss"], rel=1e-4)


def held_out_loss(folder: Path, recipe: dict[str, Any]) -> float:
    """By the book: one example at a time."""
    model, total, count = load_model(folder).eval(), 0.0, 0
    for example in open_all(resolve(TuneConfig, recipe, "test"), None).examples.held_out:
        ids = torch.from_numpy(example.ids).long()[None]
        with torch.inference_mode():
            losses = cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="none")
        counts = torch.from_numpy(example.counts[1:])
        total, count = total + losses[counts].sum().item(), count + int(counts.sum())
    return total / count


def test_milestones_outlive_the_checkpoints_that_are_kept(tuning_recipe, tune):
    recipe = tuning_recipe("prompt", adapter=LORA)
    recipe["train"] |= {"checkpoint_every": 1, "keep_last": 2, "milestone_every": 3, "steps": 8, "sample_prompts": []}
    run = tune(recipe, "run")
    assert sorted(int(folder.name[5:]) for folder in (run / "checkpoints").iterdir()) == [3, 6, 7, 8]
    assert cli.run(["info", str(run / "checkpoints" / "step_00000003")]) == 0


# Recipes and options


def test_config_yaml_of_a_run_is_a_recipe_for_the_same_run(tuning_recipe, tune, command, tmp_path):
    """Epochs and shares are steps there."""
    recipe = tuning_recipe("preference", adapter=LORA)
    del recipe["train"]["steps"]
    recipe["train"] |= {"epochs": 1.5, "warmup_ratio": 0.3, "validate_every": 100, "sample_prompts": []}
    expected = outcome(tune(recipe, "run"))
    begun = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    pairs = entries(tmp_path / "run", "examples")[-1]["examples"]
    steps = -(-pairs * 3 // 8)
    assert begun["train"]["steps"] == steps == len(entries(tmp_path / "run", "train"))
    assert begun["train"]["warmup_steps"] == -(-steps * 3 // 10)
    assert entries(tmp_path / "run", "train")[0]["lr"] == 0.0
    assert cli.run(["dpo", str(tmp_path / "run" / "config.yaml"), "--run", str(tmp_path / "again")]) == 0
    assert outcome(tmp_path / "again") == expected
    assert yaml.safe_load((tmp_path / "again" / "config.yaml").read_text()) == begun
    # And so it goes on: with the epochs of the recipe, or with the steps of config.yaml.
    for file in (tmp_path / "run.yaml", tmp_path / "run" / "config.yaml"):
        assert cli.run(["dpo", str(file), "--run", str(tmp_path / "run"), "--resume"]) == 0
    assert outcome(tmp_path / "run") == expected


@pytest.mark.parametrize(
    ("ratio", "steps", "warmup"), [(0.07, 100, 7), (0.1, 1, 0), (0.1, 3, 1), (0.5, 3, 2), (0.999, 5, 4)]
)
def test_a_share_of_warm_up_leaves_a_step_to_learn(tuning_recipe, ratio, steps, warmup):
    recipe = tuning_recipe("prompt")
    recipe["train"] |= {"steps": 0, "epochs": 1.0, "warmup_ratio": ratio}
    train = resolve(TuneConfig, recipe, "test").with_steps(4 * steps).train
    assert (train.steps, train.warmup_steps) == (steps, warmup)


def test_starting_anew_and_going_on_as_asked(tuning_recipe, command, tmp_path, capsys):
    recipe = tuning_recipe("prompt", train={"steps": 2, "sample_prompts": []})
    words = command(recipe, "run")
    assert cli.run([*words, "--auto-resume"]) == 0, "there is none: it begins"
    assert cli.run([*words, "--auto-resume"]) == 0, "it has ended: it goes on with nothing"
    capsys.readouterr()
    assert cli.run(words) == 2
    assert "run exists: go on with --resume, start anew with --overwrite" in capsys.readouterr().err
    (tmp_path / "run" / "left-over").touch()
    assert cli.run([*words, "seed=2", "--overwrite"]) == 0
    assert not (tmp_path / "run" / "left-over").exists()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 2


def test_what_the_run_needs_is_not_overwritten_by_it(tuning_recipe, tune, command, tmp_path, capsys):
    """Tuned further under the same name, the model to begin from would be deleted first."""
    run = tune(tuning_recipe("prompt", train={"steps": 2, "sample_prompts": []}), "run")
    before = outcome(run)
    capsys.readouterr()
    for place in (run, run / "model", run / "checkpoints" / "step_00000002"):
        recipe = tuning_recipe("prompt", model={"path": str(place)}, train={"steps": 2})
        assert cli.run(command(recipe, "run", "--overwrite")) == 2
        assert f"model.path={place} is in {run}, which --overwrite deletes" in capsys.readouterr().err
    assert outcome(run) == before


@pytest.mark.parametrize("form", ["prompt", "preference"])
def test_a_run_goes_on_from_anything_that_holds_a_model(tuning_recipe, tune, form):
    """A run, its model, a checkpoint of it: each with the run's tokenizer, and the same first loss."""
    run = tune(tuning_recipe("prompt", train={"steps": 2, "sample_prompts": []}), "first")
    losses = []
    for number, place in enumerate((run, run / "model", run / "checkpoints" / "step_00000002")):
        recipe = tuning_recipe(form, model={"path": str(place)}, adapter=LORA, train={"steps": 1})
        losses.append(entries(tune(recipe, f"second{number}"), "train"))
    assert losses[0] == losses[1] == losses[2]


def test_a_run_of_another_kind_is_not_gone_on_with(tuning_recipe, command, recipe, write_recipe, tmp_path, capsys):
    recipe["train"] |= {"steps": 3, "sample_prompts": []}
    assert cli.run(["pretrain", write_recipe(recipe), "--run", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert cli.run(command(tuning_recipe("prompt"), "run", "--resume")) == 2
    assert f"{tmp_path / 'run'} is a run of `openelm pretrain`: choose another --run" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_and_leaves_nothing(tuning_recipe, command, tune, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path / "cache"))
    recipe = tuning_recipe("preference", adapter=LORA, data={"held_out": 0})
    recipe["train"] |= {"steps": 0, "epochs": 0.5}

    def plan(**sections: Any) -> dict[str, Any]:
        capsys.readouterr()
        assert cli.run(command({**recipe, **sections}, "run", "--dry-run", "--json")) == 0
        return json.loads(capsys.readouterr().out)

    found = plan()
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    assert found["parameters"] == 133_664 and found["steps"] == 3
    assert found["examples"]["records"] == found["examples"]["trained_on"] == found["rows_in_an_epoch"] == 24
    assert found["reference"] == "of 48 answers, to be computed first"
    run = tune(recipe, "run")
    trained = load_file(run / "adapter" / "adapter_model.safetensors")
    assert found["parameters_trained"] == sum(tensor.numel() for tensor in trained.values())
    assert len(entries(run, "train")) == found["steps"]
    assert entries(run, "train")[-1]["tokens"] <= found["tokens_at_most"]
    assert "kept in" in plan()["reference"]
    assert found["notes"] == []

    packed = tuning_recipe("prompt", data={"packing": "pack", "held_out": 0})
    capsys.readouterr()
    assert cli.run(command(packed, "other", "--dry-run")) == 0
    words = capsys.readouterr().out
    for line in ("parameters trained +133,664", "rows in an epoch +17", "steps +6", r"row filling +0\.\d+"):
        assert re.search(rf"^{line}$", words, re.MULTILINE), words
    assert re.search(r"^examples +records 24, trained on 24", words, re.MULTILINE)
    assert "reference" not in words


def test_what_is_likely_to_be_meant_otherwise_is_said(
    tuning_recipe, command, tmp_path, capsys, records, tokenizer_file
):
    few = write_lines(tmp_path / "few.jsonl", Path(records["prompt"]).read_text().splitlines()[:3])
    recipe = tuning_recipe("prompt", adapter={"r": 60, "targets": ["out_proj", "proj_2"]}, data={"held_out": 1e-9})
    recipe["data"]["sources"][0]["path"] = str(few)
    recipe["train"] |= {"steps": 2, "sample_prompts": []}
    assert cli.run(command(recipe, "run")) == 0
    said = capsys.readouterr().err
    assert "an epoch is 3 rows, fewer than train.global_batch=4" in said
    assert "no example was held out (data.held_out=1e-09" in said
    assert "adapter.r=60 is more than the smaller side of 2 of 6 matrices (layers.0.attn.out_proj: 32)" in said


# Measured on the way


@pytest.mark.parametrize(
    "ranks", [1, pytest.param(2, marks=pytest.mark.slow(reason="two processes that load lm-eval"))]
)
def test_tasks_measured_on_the_way_change_nothing(tuning_recipe, tune, command, run_ranks, tmp_path, ranks):
    pytest.importorskip("lm_eval")
    data = write_questions(tmp_path / "tasks")
    recipe = tuning_recipe("prompt", adapter=DORA, train={"steps": 4, "validate_every": 2, "timeout_s": 60})
    recipe["train"] |= {"micro_batch": 1, "sharding": "full", "sample_prompts": []}
    watched = ["train.evaluate_every=2", "train.evaluate_tasks=arc_easy", f"train.evaluate_data={data}"]
    expected, models = outcome(tune(recipe, "without"))
    with_tasks, watched_models = outcome(tune(recipe, "with", *watched))
    found = [entry for entry in with_tasks if entry["kind"] == "evaluation"]
    assert [entry for entry in with_tasks if entry["kind"] != "evaluation"] == expected
    assert watched_models == models
    assert [(entry["step"], entry["task"], entry["examples"]) for entry in found] == [
        (step, "arc_easy", 9) for step in (2, 4)
    ]
    if ranks > 1:
        assert run_ranks(ranks, [*command(recipe, "many"), *watched]) == [0] * ranks, logs(tmp_path)
        assert_close(tmp_path / "many", tmp_path / "without")
        assert [entry["acc"] for entry in entries(tmp_path / "many", "evaluation")] == [entry["acc"] for entry in found]


def write_questions(folder: Path) -> Path:
    """Data for arc_easy, in its columns."""
    questions = [
        {
            "id": str(number),
            "question": f"Which word is number {number}?",
            "choices": {"text": ["one", "another house", "water"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[number % 3],
        }
        for number in range(9)
    ]
    file = folder / "ai2_arc" / "ARC-Easy" / "test.jsonl"
    file.parent.mkdir(parents=True)
    write_lines(file, [json.dumps(question) for question in questions])
    return folder


# A full disk


def test_where_the_model_finds_no_room_the_run_ends_later(tuning_recipe, tune, command, tmp_path, largest_file, capsys):
    """Checkpoints of an adapter are small; the model with it merged in is not."""
    recipe = tuning_recipe("prompt", adapter=LORA, train={"steps": 3, "checkpoint_every": 3})
    expected = outcome(tune(recipe, "alone"))
    capsys.readouterr()
    with largest_file(400_000):
        assert cli.run(command(recipe, "run")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / 'run' / 'model'}" in error and "no space" in error
    assert not (tmp_path / "run" / "model").exists() and (tmp_path / "run" / "adapter").is_dir()
    assert cli.run(command(recipe, "run", "--resume")) == 0
    assert outcome(tmp_path / "run") == expected
    with largest_file(2_000):
        assert cli.run(command(recipe, "other")) == 2
    assert not (tmp_path / "other").exists()
