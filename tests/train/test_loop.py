"""The loop: what may not change a number does not, and what is not finite never reaches the weights."""

import json
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch

from openelm.config import resolve
from openelm.data.loader import Step
from openelm.data.packing import IGNORE, Batch
from openelm.errors import UserError
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM, init_weights
from openelm.train import loop
from openelm.train.optim import Optimizer
from openelm.train.pretrain import pretrain
from openelm.train.schedule import Schedule

CONFIG = ModelConfig(
    model_dim=32, num_transformer_layers=2, head_dim=16, num_gqa_groups=1, ffn_dim_divisor=16, vocab_size=50
)


class Notes:
    """A recorder that only remembers."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self.timing: list[dict[str, Any]] = []

    def train(self, entry: dict[str, Any], timing: dict[str, Any]) -> None:
        self.entries.append(entry)
        self.timing.append(timing)

    def write(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)


def rows(step: int, number: int = 8, length: int = 16) -> Batch:
    draw = np.random.default_rng(step)
    tokens, targets = draw.integers(3, 50, (2, number, length))
    targets[draw.random(targets.shape) < 0.2] = IGNORE
    targets[0] = IGNORE  # micro-batches of very different weight
    targets[0, 3] = 7
    return Batch(tokens, targets)


def cut(batch: Batch, size: int) -> list[Batch]:
    return [Batch(batch.tokens[i : i + size], batch.targets[i : i + size]) for i in range(0, len(batch.tokens), size)]


def train(steps: list[list[Batch]], *, dtype=torch.float32, settings=None, **options) -> tuple[OpenELM, Notes]:
    model = OpenELM(CONFIG)
    init_weights(model, seed=0)
    model = model.to(dtype)
    optimizer = Optimizer(model, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    notes = Notes()
    loop.run(
        model,
        optimizer,
        Schedule("constant", len(steps), 1e-2, 1e-2, 0),
        [Step(batches, snapshot, {}) for batches, snapshot in zip(steps, count(1), strict=False)],
        loop.pretraining_loss(1e-4),
        loop.LoopSettings(len(steps), 1.0, **{"log_every": 1, "checkpoint_every": 100, **(settings or {})}, **FLOPS),
        notes,
        **{"save": lambda *_: None, **options},
    )
    return model, notes


FLOPS = {"flops_per_token": 1, "peak_flops_per_s": 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_micro_batches_of_one_row_are_one_of_eight(dtype):
    batches = [rows(step) for step in range(3)]
    one, one_notes = train([[b] for b in batches], dtype=dtype)
    eight, eight_notes = train([cut(b, 1) for b in batches], dtype=dtype)
    # Sums in another order: fp32 agrees to 1e-5 over three steps. In bf16 each gradient is rounded to 8 bits
    # (2**-9) before it is added in fp32, and AdamW's first steps, of size lr, may turn where a gradient is tiny.
    rel = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(one_notes.entries, eight_notes.entries, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=rel)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * rel)
        assert (a["tokens"], a["step"], a["lr"]) == (b["tokens"], b["step"], b["lr"])
    if dtype == torch.float32:
        for name, weight in one.state_dict().items():
            torch.testing.assert_close(weight, eight.state_dict()[name], rtol=0, atol=2e-5)


def test_the_loss_is_the_mean_over_all_valid_tokens_of_the_step():
    model = OpenELM(CONFIG)
    init_weights(model, seed=0)
    batch = rows(0)
    with torch.no_grad():
        logits = model(torch.from_numpy(batch.tokens)).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.targets).flatten())
    # Means of unequal micro-batches, averaged, would give something else.
    means = [
        torch.nn.functional.cross_entropy(part, torch.from_numpy(targets))
        for part, targets in zip(logits.split(16), batch.targets, strict=True)
    ]
    assert abs(torch.stack(means).mean() - expected) > 1e-3
    _, notes = train([cut(batch, 1)])
    assert notes.entries[0]["cross_entropy"] == pytest.approx(expected.item(), rel=1e-5)
    assert notes.entries[0]["loss"] == pytest.approx(expected.item() + notes.entries[0]["z_loss"], rel=1e-6)
    assert notes.entries[0]["tokens"] == batch.valid_tokens()


def test_padding_changes_nothing():
    batches = [rows(step) for step in range(2)]
    padded = []
    for batch in batches:
        tokens = np.pad(batch.tokens, ((0, 2), (0, 5)), constant_values=1)
        targets = np.pad(batch.targets, ((0, 2), (0, 5)), constant_values=IGNORE)
        padded.append(Batch(tokens, targets))
    plain, plain_notes = train([[b] for b in batches])
    other, other_notes = train([[b] for b in padded])
    for a, b in zip(plain_notes.entries, other_notes.entries, strict=True):
        assert a == pytest.approx(b, rel=1e-5)  # products of other shapes are summed in another order
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(weight, other.state_dict()[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(bad):
    def poisoned(model, batch):
        total, metrics = loop.pretraining_loss(0.0)(model, batch)
        return total * bad, metrics

    model = OpenELM(CONFIG)
    init_weights(model, seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    saved: list[int] = []
    with pytest.raises(UserError, match=r"step 1: .*not finite.*train\.lr"):
        loop.run(
            model,
            optimizer,
            Schedule("constant", 2, 1e-2, 1e-2, 0),
            [Step([rows(0)], None, {})],
            poisoned,
            loop.LoopSettings(2, 1.0, 1, 1, **FLOPS),
            Notes(),
            save=lambda step, *_: saved.append(step),
        )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert saved == []


def test_a_gradient_that_is_not_finite_stops_the_run_too():
    model = OpenELM(CONFIG)
    init_weights(model, seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.layers[0].ffn.proj_1.weight.register_hook(lambda gradient: gradient / 0)
    optimizer = Optimizer(model, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    with pytest.raises(UserError, match=r"gradient norm (nan|inf)"):
        loop.run(
            model,
            optimizer,
            Schedule("constant", 1, 1e-2, 1e-2, 0),
            [Step([rows(0)], None, {})],
            loop.pretraining_loss(0.0),
            loop.LoopSettings(1, 1.0, 1, 1, **FLOPS),
            Notes(),
            save=lambda *_: None,
        )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_metrics_checkpoints_and_probes_come_at_their_steps_with_the_state_behind_them():
    saved, probed = [], []
    _, notes = train(
        [[rows(step)] for step in range(7)],
        settings={"log_every": 3, "checkpoint_every": 2},
        save=lambda step, tokens, snapshot: saved.append((step, tokens, snapshot)),
        probes=[lambda step, model, account: probed.append(step) or []],
    )
    assert [entry["step"] for entry in notes.entries] == [3, 6, 7]
    weights = np.cumsum([rows(step).valid_tokens() for step in range(7)])
    assert saved == [(step, weights[step - 1], step) for step in (2, 4, 6, 7)]
    assert probed == list(range(1, 8))


def metrics_of(run) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "timing"} for entry in entries]


def run_recipe(recipe, folder, **changes):
    """Train a recipe; gives its metrics without the times, and the bits of its model."""
    data = {**recipe, "seed": changes.pop("seed", recipe["seed"])}
    for section, values in changes.items():
        data[section] = {**data[section], **values}
    pretrain(resolve(data, "test"), folder, resume=False, resume_step=None, overwrite=False)
    return metrics_of(folder), (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_looking_at_the_model_does_not_change_the_training(recipe, tmp_path, dtype):
    looked, bits = run_recipe(recipe, tmp_path / "a", train={"dtype": dtype, "validate_every": 1, "sample_every": 1})
    alone, other_bits = run_recipe(
        recipe,
        tmp_path / "b",
        train={"dtype": dtype, "validate_every": 1000, "sample_every": 1000, "sample_prompts": []},
        data={"validation_tokens": 0},
    )
    assert {entry["kind"] for entry in looked} == {"train", "validation", "sample", "data"}
    assert "validation" not in {entry["kind"] for entry in alone}
    assert [e for e in looked if e["kind"] == "train"] == [e for e in alone if e["kind"] == "train"]
    assert bits == other_bits


def test_a_seed_decides_every_bit(recipe, tmp_path):
    first, again, other = (
        run_recipe(recipe, tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again
    assert first[1] != other[1]
    assert first[0][0]["loss"] != other[0][0]["loss"]


def test_training_learns(recipe, tmp_path):
    metrics, _ = run_recipe(recipe, tmp_path / "run", train={"steps": 40})
    losses = [entry["loss"] for entry in metrics if entry["kind"] == "train"]
    # Uniform over 400 pieces is ln 400 = 6; a hundred words in free order are far less.
    assert losses[0] == pytest.approx(np.log(400), rel=0.1)
    assert losses[-1] < 4.5
    scores = [entry["bits_per_byte"] for entry in metrics if entry["kind"] == "validation"]
    assert scores[-1] < 0.8 * scores[0]
