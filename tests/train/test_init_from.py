"""Training goes on from any model, with its tokenizer, and from CoreNet's training states; what cannot is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openelm import cli
from openelm.config import load_recipe
from openelm.data.tokenizer import Tokenizer
from openelm.model.folder import load_model
from openelm.model.transformer import OpenELM
from openelm.train import parts
from openelm.train.schedule import Schedule


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
        loss = float(model(*batch.tensors("cpu"))) / batch.weight()
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


def test_weights_of_a_corenet_checkpoint_begin_a_run(
    recipe: dict[str, Any], write_recipe: Callable[..., str], trained: Path, tmp_path: Path
) -> None:
    model = load_model(trained)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    losses = []
    for name, start in {"folder": trained, "corenet": tmp_path / "weights.pt"}.items():
        recipe["train"] |= {"init_from": str(start), "steps": 3}
        assert cli.run(["pretrain", write_recipe({**recipe, "name": name}), "--run", str(tmp_path / name)]) == 0
        entries = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([entry["loss"] for entry in entries if "lr" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 3


STEPS = 3  # that CoreNet made before


def corenet_state(model: OpenELM, path: Path, **extra: Any) -> tuple[list[tuple[str, nn.Parameter]], torch.optim.AdamW]:
    """A few steps of AdamW as CoreNet makes them, saved as CoreNet saves them; its parameters and optimizer."""
    inner = (
        *("attn.qkv_proj", "attn.q_norm", "attn.k_norm", "attn.out_proj"),
        *("ffn.proj_1", "ffn.proj_2", "ffn_norm", "attn_norm"),
    )
    layers = [f"layers.{layer}.{part}" for layer in range(len(model.layers)) for part in inner]
    own = dict(model.requires_grad_(True).named_parameters())
    named = [(f"{part}.weight", own[f"{part}.weight"]) for part in ("token_embeddings", *layers, "norm")]
    assert len(named) == len(own)
    groups = [
        {"params": [p for _, p in named if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for _, p in named if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    for step in range(STEPS):
        rows = torch.randint(0, 400, (4, 33), generator=torch.Generator().manual_seed(step))
        (model(rows[:, :-1], rows[:, 1:]) / rows[:, 1:].numel()).backward()
        adamw.step()
        adamw.zero_grad()
    state = {
        "iterations": STEPS,
        "epoch": 0,
        "model_state_dict": {name: parameter.detach() for name, parameter in named},
        "optim_state_dict": adamw.state_dict(),
        "best_metric": 0.0,
        "is_interval_ckpt": True,
        **extra,
    }
    torch.save(state, path)
    return named, adamw


@pytest.fixture
def goes_on(recipe: dict[str, Any], trained: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe that goes on from ``tmp_path/state.pt`` with its optimizer, for one step."""
    recipe["tokenizer"] = {"path": str(trained)}
    recipe["train"] |= {"init_from": str(tmp_path / "state.pt"), "init_optimizer": True, "steps": STEPS + 1}
    return {**recipe, "name": "goes_on"}


def test_the_next_step_from_a_training_state_is_the_one_that_adamw_makes(
    goes_on: dict[str, Any], write_recipe: Callable[..., str], trained: Path, tmp_path: Path
) -> None:
    model = load_model(trained).train()
    named, adamw = corenet_state(model, tmp_path / "state.pt")
    file, run = write_recipe(goes_on), tmp_path / "run"
    assert cli.run(["pretrain", file, "--run", str(run)]) == 0

    config = load_recipe(file, [])
    batch = parts.token_stream(config, Tokenizer.load(trained)).next_batch(goes_on["train"]["global_batch"])
    loss, _ = model(*batch.tensors("cpu"), z_loss_weight=config.train.z_loss)
    (loss / batch.weight()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm)
    train = config.train
    rate = Schedule(train.schedule, train.steps, train.lr, train.min_lr, train.warmup_steps).at(STEPS)
    for group in adamw.param_groups:
        group["lr"] = rate
    adamw.step()

    (entry,) = (e for e in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "lr" in e)
    assert (entry["step"], entry["lr"]) == (STEPS + 1, pytest.approx(rate))
    found = load_model(run / "checkpoints" / f"step_{STEPS + 1:08}").state_dict()
    for name, parameter in named:
        torch.testing.assert_close(
            found[name], parameter.detach(), rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_run_from_a_training_state_is_resumed_like_any_other(
    goes_on: dict[str, Any], write_recipe: Callable[..., str], trained: Path, tmp_path: Path
) -> None:
    average: dict[str, Tensor] = {name: weight + 0.5 for name, weight in load_model(trained).state_dict().items()}
    corenet_state(load_model(trained).train(), tmp_path / "state.pt", ema_state_dict=average)
    goes_on["train"] |= {"steps": 8, "ema_decay": 0.5}
    file, weights = write_recipe(goes_on), {}
    for name in ("whole", "resumed"):
        run = tmp_path / name
        assert cli.run(["pretrain", file, "--run", str(run)]) == 0
        if name == "resumed":
            assert cli.run(["pretrain", file, "--run", str(run), "--resume", "--resume-step", "6"]) == 0
        weights[name] = [load_model(run / folder).state_dict() for folder in ("model", "model-ema")]
    for one, other in zip(weights["whole"], weights["resumed"], strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    # After five steps at one half, a thirty-second of the average that the state brought is left.
    last = load_model(tmp_path / "whole" / "checkpoints" / "step_00000008").state_dict()["norm.weight"]
    assert ((weights["whole"][1]["norm.weight"] - last).mean() - 0.5 / 32).abs() < 5e-3


def test_two_ranks_that_share_a_training_state_out_go_on_as_one_does(
    goes_on: dict[str, Any],
    write_recipe: Callable[..., str],
    run_ranks: Callable[..., list[int]],
    trained: Path,
    tmp_path: Path,
) -> None:
    corenet_state(load_model(trained).train(), tmp_path / "state.pt")
    goes_on["train"] |= {"validate_every": 99, "sample_every": 99, "sample_prompts": [], "average_last": 0}
    file = write_recipe(goes_on)
    assert cli.run(["pretrain", file, "--run", str(tmp_path / "one")]) == 0
    assert run_ranks(2, ["pretrain", file, "--run", str(tmp_path / "two"), "train.sharding=full"]) == [0, 0]
    one, two = (load_model(tmp_path / name / "model").state_dict() for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6)


REFUSED = {
    "train.init_from=null": "train.init_optimizer=true needs train.init_from",
    f"train.steps={STEPS} train.warmup_steps=0": f"is of step {STEPS}, so train.steps={STEPS} leaves nothing to do",
    "model.model_dim=64": "model_dim (32 there, 64 here)",
    "tokenizer.path=null": "has no tokenizer: set tokenizer.path",
    "train.init_from=WEIGHTS": "holds weights only",
    "train.init_from=FOLDER": "needs a training state of CoreNet",
    "train.init_from=EVIL": "nothing of it was run",
}


def test_what_a_training_state_does_not_fit_is_refused_before_there_is_a_run(
    goes_on: dict[str, Any],
    write_recipe: Callable[..., str],
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = load_model(trained).train()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.save({"model_state_dict": print}, tmp_path / "evil.pt")
    corenet_state(model, tmp_path / "state.pt")
    paths = {"WEIGHTS": tmp_path / "weights.pt", "FOLDER": trained, "EVIL": tmp_path / "evil.pt"}
    for changes, expected in REFUSED.items():
        words = [word.replace(key := word.rpartition("=")[2], str(paths.get(key, key))) for word in changes.split()]
        for dry in ([], ["--dry-run"]):
            capsys.readouterr()
            assert cli.run(["pretrain", write_recipe(goes_on), "--run", str(tmp_path / "run"), *dry, *words]) == 2
            assert expected in capsys.readouterr().err
            assert not (tmp_path / "run").exists()
